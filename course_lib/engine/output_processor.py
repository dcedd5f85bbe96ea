"""From token ids to what the caller sees: text, log-probabilities, the reason it ended.

The core knows tokens only; stop *strings* are found here, and the core is then told to abort the
request. Each step's news of one request becomes at most one `RequestOutput`, shaped by its
`output_kind`.

Invariant: every request that was added yields exactly one output with `finished=True`, or was
aborted by the caller.

vLLM: `vllm/v1/engine/output_processor.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from course_lib.core.messages import EngineCoreOutput
from course_lib.core.request import Request
from course_lib.engine.detokenizer import IncrementalDetokenizer
from course_lib.engine.logprobs import LogprobsProcessor
from course_lib.engine.parallel_sampling import ParentRequest
from course_lib.outputs import CompletionOutput, PromptLogprobs, RequestMetrics, RequestOutput
from course_lib.sampling_params import RequestOutputKind


class RequestState:
    """One engine request on this side of the core; `request_id` is the caller's, `core_id` the core's."""

    def __init__(
        self,
        request_id: str,
        request: Request,
        prompt: str | None,
        tokenizer: Any,
        parent: ParentRequest | None,
        index: int,
    ) -> None:
        self.request_id = request_id
        self.core_id = request.request_id
        self.prompt = prompt
        self.prompt_token_ids = request.token_ids[: request.num_prompt_tokens]
        self.params = request.sampling_params
        self.parent = parent
        self.index = index
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.detokenizer = IncrementalDetokenizer.from_request(tokenizer, self.prompt_token_ids, self.params)
        self.logprobs = LogprobsProcessor.from_request(tokenizer, self.params)
        self.num_cached_tokens = 0
        self.num_reported_tokens = 0  # what DELTA outputs have carried so far

    def take(self, news: EngineCoreOutput, now: float) -> tuple[str | None, int | str | None]:
        """Digest one step's news. Returns (finish reason, stop reason)."""
        metrics = self.metrics
        if news.new_token_ids:
            if metrics.first_token_time is None:
                metrics.first_scheduled_time = news.first_scheduled_time
                metrics.first_token_time = now
            metrics.last_token_time = now
        metrics.num_preemptions = news.num_preemptions
        self.num_cached_tokens = news.num_cached_tokens
        stop_string = self.detokenizer.update(news.new_token_ids, news.finish_reason == "stop")
        if news.logprobs is not None:
            self.logprobs.update_from_sample(news.logprobs)
        if news.prompt_logprobs is not None:
            self.logprobs.update_from_prompt(news.prompt_logprobs)
        if stop_string is not None:
            self.logprobs.truncate(len(self.detokenizer.token_ids))
            return "stop", stop_string
        return news.finish_reason, news.stop_reason

    def prompt_logprobs(self) -> PromptLogprobs | None:
        """The prompt's log-probabilities; in DELTA outputs only once."""
        if self.params.output_kind is RequestOutputKind.DELTA:
            return self.logprobs.take_prompt_logprobs()
        return self.logprobs.prompt_logprobs

    def completion(self, finish_reason: str | None, stop_reason: int | str | None) -> CompletionOutput:
        """This request's output in the shape its `output_kind` asks for."""
        delta = self.params.output_kind is RequestOutputKind.DELTA
        text = self.detokenizer.get_next_output_text(finish_reason is not None, delta)
        token_ids = self.detokenizer.token_ids
        logprobs = self.logprobs.logprobs
        start = self.num_reported_tokens if delta else 0
        self.num_reported_tokens = len(token_ids)
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids[start:],
            cumulative_logprob=self.logprobs.cumulative_logprob,
            logprobs=None if logprobs is None else logprobs[start:],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )


@dataclass(slots=True)
class ProcessedOutputs:
    """What one step means to callers, and which requests the core must drop."""

    request_outputs: list[RequestOutput] = field(default_factory=list)
    requests_to_abort: list[str] = field(default_factory=list)


class OutputProcessor:
    """Args:
    tokenizer: Hugging Face tokenizer, or None to produce no text.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self.tokenizer = tokenizer
        self.states: dict[str, RequestState] = {}  # by the core's ids
        self.live: dict[str, list[str]] = {}  # caller's id -> core ids of its unfinished requests

    def add_request(
        self, request_id: str, requests: list[Request], prompt: str | None, parent: ParentRequest | None
    ) -> None:
        """Expect outputs of a request: itself, or its n children. Raises ValueError if the id is in use."""
        if request_id in self.live:
            raise ValueError(f"request_id {request_id!r} belongs to an unfinished request: choose another")
        states = {
            request.request_id: RequestState(request_id, request, prompt, self.tokenizer, parent, index)
            for index, request in enumerate(requests)
        }
        self.live[request_id] = list(states)
        self.states |= states

    def core_ids(self, request_id: str) -> list[str]:
        """The core's ids behind a caller's id; none if it is not live."""
        return list(self.live.get(request_id, ()))

    def abort(self, request_id: str) -> RequestOutput | None:
        """Forget a request. Returns its last output, finished with reason "abort"; None if it is not live."""
        states = [self.states[core_id] for core_id in self.core_ids(request_id)]
        outputs = []
        for state in states:
            outputs.append(self._make_output(state, "abort", None))
            self._finish(state)
        merged = _merge_siblings([output for output in outputs if output is not None])
        return merged[0] if merged else None

    def process(self, news: list[EngineCoreOutput]) -> ProcessedOutputs:
        """Turn one step's news into outputs."""
        result = ProcessedOutputs()
        now = time.time()
        any_siblings = False
        for item in news:
            state = self.states.get(item.request_id)
            if state is None:  # aborted meanwhile
                continue
            finish_reason, stop_reason = state.take(item, now)
            if finish_reason is not None:
                state.metrics.finished_time = now
                if item.finish_reason is None:  # a stop string: the core does not know yet
                    result.requests_to_abort.append(item.request_id)
            output = self._make_output(state, finish_reason, stop_reason)
            if finish_reason is not None:
                self._finish(state)
            if output is not None:
                result.request_outputs.append(output)
                any_siblings |= state.parent is not None
        if any_siblings:
            result.request_outputs = _merge_siblings(result.request_outputs)
        return result

    def _make_output(
        self, state: RequestState, finish_reason: str | None, stop_reason: int | str | None
    ) -> RequestOutput | None:
        """None while nothing is due: FINAL_ONLY before the end (of all siblings)."""
        kind = state.params.output_kind
        final_only = kind is RequestOutputKind.FINAL_ONLY
        parent = state.parent
        if final_only and finish_reason is None:
            return None
        completion = state.completion(finish_reason, stop_reason)
        if parent is None:
            outputs, finished = [completion], finish_reason is not None
        else:
            parent.record(state.core_id, completion)
            finished = parent.finished
            if final_only and not finished:
                return None
            outputs = [completion] if kind is RequestOutputKind.DELTA else parent.outputs()
        return RequestOutput(
            request_id=state.request_id,
            prompt=state.prompt,
            prompt_token_ids=state.prompt_token_ids,
            prompt_logprobs=state.prompt_logprobs(),
            outputs=outputs,
            finished=finished,
            metrics=state.metrics,
            num_cached_tokens=state.num_cached_tokens,
        )

    def _finish(self, state: RequestState) -> None:
        del self.states[state.core_id]
        siblings = self.live[state.request_id]
        siblings.remove(state.core_id)
        if not siblings:
            del self.live[state.request_id]


def _merge_siblings(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """One output per request and step: siblings' news of the same step are joined."""
    merged: dict[str, RequestOutput] = {}
    for output in outputs:
        first = merged.setdefault(output.request_id, output)
        if first is not output:
            first.add(output, aggregate=False)
    for output in merged.values():
        output.outputs.sort(key=lambda completion: completion.index)
    return list(merged.values())
