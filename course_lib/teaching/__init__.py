"""The teaching wing: what lessons and learners use. It uses the engine; the engine never imports it.

`import course_lib.teaching` costs nothing: names are resolved on first use. No module of this package may
have the name of one of them, or importing the module would hide the function.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> module that defines it
_EXPORTS = {
    "exercise": "learner.session",
    "check": "learner.session",
    "hint": "learner.session",
    "solution": "learner.session",
    "course_llm": "learner.session",
    "my_code": "learner.patching",
    "patched": "learner.patching",
    "predict": "learner.questions",
    "reveal": "learner.questions",
    "record": "recording.trace",
    "explore_blocks": "explorers.kv_blocks",
    "explore_schedule": "explorers.schedule",
    "explore_requests": "explorers.requests",
    "explore_next_token": "explorers.next_token",
    "explore_hits": "explorers.hit_rate",
    "show": "explorers.figures",
    "course_style": "explorers.style",
    "COURSE_STYLE": "explorers.style",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'course_lib.teaching' has no attribute {name!r}")
    value = getattr(import_module(f"course_lib.teaching.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
