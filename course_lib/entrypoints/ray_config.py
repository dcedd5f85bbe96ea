"""What a person may say about batch inference: names and meanings of `ray.data.llm`'s configuration.

Invariant: an argument that is accepted works; every other name that Ray's configurations have or had is
refused with what to do instead, at any value but the one that works. Imports nothing of Ray.

Ray: `python/ray/llm/_internal/batch/processor/vllm_engine_proc.py`, `base.py`.
"""

from __future__ import annotations

import difflib
import inspect
import os
from typing import Any

from course_lib import sampling_checks as check
from course_lib.engine_args import EngineArgs

# Arguments of Ray's configurations, past and present: name -> (the value that works, what to do).
_REFUSED: dict[str, tuple[Any, str]] = {
    "task_type": ("generate", "this engine generates text only; leave it out"),
    "accelerator_type": (None, "an engine takes a GPU if Ray has one; say engine_kwargs={'device': …}"),
    "placement_group_config": (None, "an engine is one process; leave it out"),
    "dynamic_lora_loading_path": (None, "adapters cannot be loaded; merge them into the weights first"),
    "log_engine_metrics": (False, "no metrics are exported; every answered row has its own 'metrics'"),
    "max_pending_requests": (None, "the scheduler's own queue holds what waits; leave it out"),
    "max_tasks_in_flight_per_actor": (None, "set max_concurrent_batches instead"),
    "prepare_multimodal_stage": (False, "prompts are text only; leave it out"),
    "has_image": (False, "prompts are text only; leave it out"),
    "apply_chat_template": (None, "say chat_template_stage=True or False"),
    "chat_template": (None, "say chat_template_stage={'chat_template': …}"),
    "tokenize": (None, "say tokenize_stage=True or False"),
    "detokenize": (None, "say detokenize_stage=True or False"),
    "resources_per_bundle": (None, "an engine takes one CPU, and a GPU if Ray has one; leave it out"),
    "experimental": (None, "leave it out"),
}
_TEMPLATE_KEYS = ("enabled", "chat_template", "chat_template_kwargs")



class EngineProcessorConfig:
    """What engines to run and how rows reach them. Names and meanings are Ray's.

    Args:
        model_source: a folder or a model id; as `model` of `LLM`.
        engine_kwargs: further arguments of `LLM`.
        concurrency: engines side by side, each a process with the weights and a cache of its own; (least,
            most) lets Ray Data decide in between.
        batch_size: rows handed to an engine at once.
        max_concurrent_batches: batches an engine works on at once, so that the last rows of one do not
            leave it idle.
        should_continue_on_error: a row that cannot be answered gets its error in `__inference_error__` and
            skips `postprocess` ("" for the others), instead of ending the whole run.
        chat_template_stage: True: rows have `messages`, formatted by the model's chat template; False: rows
            have a ready `prompt`, or token ids as `tokenized_prompt`; or a dict of `enabled`,
            `chat_template`, `chat_template_kwargs`.
        tokenize_stage, detokenize_stage: the engine does both itself. With detokenize_stage, rows whose
            sampling parameters say detokenize=False get their text all the same.
        runtime_env: Ray's runtime environment of the engines' processes.

    Raises:
        TypeError, ValueError: an argument is unknown, wrong or not supported.
    """

    def __init__(
        self,
        *,
        model_source: str,
        engine_kwargs: dict[str, Any] | None = None,
        concurrency: int | tuple[int, int] = 1,
        batch_size: int = 64,
        max_concurrent_batches: int = 8,
        should_continue_on_error: bool = False,
        chat_template_stage: bool | dict[str, Any] = True,
        tokenize_stage: bool = True,
        detokenize_stage: bool = True,
        runtime_env: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        for name, value in others.items():
            _refuse(name, value)
        if not isinstance(model_source, (str, os.PathLike)) or not str(model_source):
            raise TypeError(f"model_source must be a folder or a model id, not {model_source!r}")
        self.model_source = str(model_source)
        self.engine_kwargs = _engine_kwargs(self.model_source, engine_kwargs)
        self.concurrency = _concurrency(concurrency)
        self.batch_size = check.integer("batch_size", batch_size, low=1)
        self.max_concurrent_batches = check.integer("max_concurrent_batches", max_concurrent_batches, low=1)
        self.should_continue_on_error = check.boolean("should_continue_on_error", should_continue_on_error)
        self.chat_template_stage = _chat_template_stage(chat_template_stage)
        self.tokenize_stage = check.boolean("tokenize_stage", tokenize_stage)
        self.detokenize_stage = check.boolean("detokenize_stage", detokenize_stage)
        if runtime_env is not None and not isinstance(runtime_env, dict):
            raise TypeError(f"runtime_env must be a dict, not {runtime_env!r}")
        self.runtime_env = runtime_env


# The name in scripts written for vLLM.
vLLMEngineProcessorConfig = EngineProcessorConfig


def _refuse(name: str, value: Any) -> None:
    """Pass over an argument at the one value that works; raise for others and for unknown names."""
    if name in _REFUSED:
        works, remedy = _REFUSED[name]
        if value != works:
            raise ValueError(f"{name}={value!r} is not supported: {remedy}")
        return
    known = [n for n in inspect.signature(EngineProcessorConfig).parameters if n != "others"]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f". Known arguments: {', '.join(known)}"
    raise TypeError(f"unknown argument {name!r}{hint}")


def _engine_kwargs(model_source: str, kwargs: dict[str, Any] | None) -> dict[str, Any]:
    if kwargs is not None and not isinstance(kwargs, dict):
        raise TypeError(f"engine_kwargs must be a dict of arguments of LLM, not {kwargs!r}")
    kwargs = dict(kwargs or {})
    if "model" in kwargs:
        raise ValueError("engine_kwargs has 'model': say it as model_source")
    EngineArgs.from_kwargs(model=model_source, **kwargs)
    return kwargs


def _concurrency(value: Any) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"concurrency={value!r}: give a number of engines, or (least, most)")
        least, most = (check.integer("concurrency", one, low=1) for one in value)
        if least > most:
            raise ValueError(f"concurrency={value!r}: the first must be at most the second")
        return least, most
    number = check.integer("concurrency", value, low=1)
    return number, number


def _chat_template_stage(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {"enabled": check.boolean("chat_template_stage", value)}
    for key in value:
        if key not in _TEMPLATE_KEYS:
            raise ValueError(
                f"chat_template_stage has {key!r}: the template is applied by the engine's process, so only "
                f"{', '.join(_TEMPLATE_KEYS)} can be chosen"
            )
    return {**value, "enabled": check.boolean("chat_template_stage['enabled']", value.get("enabled", True))}
