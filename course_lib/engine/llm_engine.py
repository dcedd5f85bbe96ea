"""The synchronous engine: add requests, call `step()` until nothing is unfinished.

Ties the frontend (text) and the core (tokens) together; everything runs in the caller's thread.

vLLM: `vllm/v1/engine/llm_engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from course_lib.config import EngineConfig, ModelConfig
from course_lib.core.kv_events import KVListener
from course_lib.engine.core_client import make_core
from course_lib.engine.frontend import Frontend, PreparedRequest
from course_lib.engine.tokenizer import load_tokenizer
from course_lib.engine_args import EngineArgs
from course_lib.outputs import RequestOutput
from course_lib.prompts import PromptType
from course_lib.sampling_params import SamplingParams


class LLMEngine:
    """Construct with `from_engine_args`, or from a resolved configuration."""

    def __init__(self, config: EngineConfig) -> None:
        # The tokenizer first: if it is missing, say so before spending seconds on weights.
        tokenizer = load_tokenizer(config.model)
        self.core = make_core(config)
        self.config = self.core.config
        self.frontend = Frontend(self.config, tokenizer)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        """Resolve the arguments, load the model, allocate the cache."""
        return cls(engine_args.create_engine_config())

    # ---- requests -------------------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: Any = None,
        priority: int = 0,
    ) -> None:
        """Check and queue one request.

        Args:
            request_id: unique among unfinished requests.
            prompt: text, token ids, or a prompt dict.
            arrival_time: seconds since the epoch; now if None. Orders requests of equal priority.
            priority: smaller is served first (policy "priority" only).

        Raises:
            TypeError, ValueError: something is wrong with the request; the engine is unchanged.
        """
        prepared = self.frontend.prepare(request_id, prompt, params, arrival_time, lora_request, priority)
        self.enqueue(prepared)

    def enqueue(self, prepared: PreparedRequest) -> None:
        """Queue what `frontend.prepare` has checked.

        Raises EngineDeadError if nothing is left to serve it, ValueError if the id is in use.
        """
        if prepared.request_id in self.frontend.output_processor.live:
            self.core.check_health()  # the ids that a dead engine has not finished are no fault of the caller's
        requests = self.frontend.register(prepared)
        try:
            for request in requests:
                self.core.add_request(request)
        except BaseException:  # Ctrl-C in between: half a request must not stay behind
            self.abort_request(prepared.request_id)
            raise

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests at any moment; unknown ids are passed over. `step()` reports nothing of them."""
        outputs = self.frontend.output_processor
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            core_ids = outputs.core_ids(request_id)
            outputs.abort(request_id)
            self.core.abort_requests(core_ids)

    def get_num_unfinished_requests(self) -> int:
        """Requests not yet finished, n outputs of one prompt counting as one."""
        return len(self.frontend.output_processor.live)

    def has_unfinished_requests(self) -> bool:
        """Whether `step()` has something to do.

        Among replicas that share experts and were started one by one (VLLM_DP_*), that is so for all as long as any
        has requests; they ask each other here, so each must ask before each step, and as often as the others.
        """
        return self.core.anybody_unfinished(bool(self.frontend.output_processor.live))

    # ---- the loop -------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step of the engine and return the outputs it produced.

        If the step is interrupted or fails, the exception is passed on, all requests are dropped, and
        the engine can be used again.
        """
        try:
            news = self.core.step()
            processed = self.frontend.output_processor.process(news)
            self.core.abort_requests(processed.requests_to_abort)
        except BaseException:
            self.core.reset()
            self.frontend.forget_all()
            raise
        return processed.request_outputs

    # ---- the rest of vLLM's surface -------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer. Raises ValueError under `skip_tokenizer_init`."""
        return self.frontend.get_tokenizer()

    def get_model_config(self) -> ModelConfig:
        return self.config.model

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False (and nothing done) while requests are running."""
        return self.core.reset_prefix_cache()

    def subscribe_kv_events(self, listener: KVListener) -> Callable[[], None]:
        """Have `listener(events)` called after each step that changed the prefix cache; see `core.kv_events`.

        The cache is emptied first. Returns a function that ends the subscription.

        Raises:
            ValueError: prefix caching is off.
            RuntimeError: requests are running.
        """
        return self.core.subscribe_kv_events(listener)

    def shutdown(self) -> None:
        """End the engine's processes, if it has any, now instead of when it is forgotten. Idempotent."""
        self.core.shutdown()
