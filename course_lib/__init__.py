"""A small, complete vLLM-style inference engine, and the course that builds it.

`import course_lib` costs milliseconds: public names are resolved on first use (PEP 562), so that
the command line can start on a bare Python and tools can look around without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "LLM": "entrypoints.llm",
    "LLMEngine": "engine.llm_engine",
    "AsyncLLM": "engine.async_llm",
    "AsyncLLMEngine": "engine.async_llm",
    "EngineArgs": "engine_args",
    "AsyncEngineArgs": "engine_args",
    "FlexibleArgumentParser": "engine_args",
    "SamplingParams": "sampling_params",
    "RequestOutputKind": "sampling_params",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "TextPrompt": "prompts",
    "TokensPrompt": "prompts",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'course_lib' has no attribute {name!r}")
    value = getattr(import_module(f"course_lib.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
