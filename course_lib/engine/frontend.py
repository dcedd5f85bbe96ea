"""What the synchronous and the asynchronous engine share: everything that touches text.

The core knows a request by an id of its own, never used twice: a caller may use an id again at once after an
abort, while the core is still inside a step that computes the old request, and news of the old one must not
reach the new.

vLLM: the code common to `vllm/v1/engine/llm_engine.py` and `async_llm.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from course_lib.config import EngineConfig
from course_lib.core.request import Request
from course_lib.engine.input_processor import InputProcessor
from course_lib.engine.output_processor import OutputProcessor
from course_lib.engine.parallel_sampling import ParentRequest
from course_lib.executor.portable import pack
from course_lib.prompts import PromptType
from course_lib.sampling_params import SamplingParams


@dataclass(slots=True)
class PreparedRequest:
    """A checked request, not yet queued: the engine's requests behind it, and the prompt's text."""

    request_id: str
    requests: list[Request]
    prompt: str | None
    parent: ParentRequest | None


class Frontend:
    """Args:
    config: final engine configuration.
    tokenizer: Hugging Face tokenizer, or None under `skip_tokenizer_init`.
    """

    def __init__(self, config: EngineConfig, tokenizer: Any | None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.input_processor = InputProcessor(config.model, tokenizer)
        self.output_processor = OutputProcessor(tokenizer)
        self._serial = itertools.count()

    def prepare(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: Any = None,
        priority: int = 0,
    ) -> PreparedRequest:
        """Check a request and fan it out to n children; changes nothing.

        Raises:
            TypeError, ValueError: something is wrong with the request.
        """
        if lora_request is not None:
            raise ValueError("lora_request: adapters are not supported yet; leave it out")
        request, text = self.input_processor.process(request_id, prompt, params, arrival_time, priority)
        if priority != 0 and self.config.scheduler.policy != "priority":
            raise ValueError(
                f"priority={priority} has no effect under scheduling_policy='fcfs': construct the engine with "
                f"scheduling_policy='priority'"
            )
        if request.sampling_params.logits_processors and self.config.parallel.runs_elsewhere:
            pack(request.sampling_params.logits_processors, "logits_processors")  # or raise, while that harms nobody
        request.request_id = f"{request_id}#{next(self._serial)}"
        if request.sampling_params.n == 1:
            return PreparedRequest(request_id, [request], text, None)
        parent = ParentRequest(request.request_id, request.sampling_params)
        children = [
            Request(
                child_id,
                request.token_ids,
                parent.child_params(index),
                request.eos_token_id,
                request.arrival_time,
                priority,
                request.cache_keys,
            )
            for index, child_id in enumerate(parent.child_ids)
        ]
        return PreparedRequest(request_id, children, text, parent)

    def register(self, prepared: PreparedRequest) -> list[Request]:
        """Expect outputs of a prepared request. Returns what the core must be given.

        Raises ValueError if the id belongs to an unfinished request.
        """
        self.output_processor.add_request(prepared.request_id, prepared.requests, prepared.prompt, prepared.parent)
        return prepared.requests

    def forget_all(self) -> None:
        """Expect nothing any more (the core has dropped all requests)."""
        self.output_processor = OutputProcessor(self.tokenizer)

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer. Raises ValueError under `skip_tokenizer_init`."""
        if self.tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: this engine has no tokenizer")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Sampling defaults that the model's authors recommend (generation_config.json), if any."""
        names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
        defaults = self.config.model.generation_defaults
        chosen = {name: defaults[name] for name in names if defaults.get(name) is not None}
        if defaults.get("max_new_tokens"):
            chosen["max_tokens"] = defaults["max_new_tokens"]
        return SamplingParams(**chosen)
