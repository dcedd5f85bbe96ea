"""Pipeline stages without a model: they only keep book of what is in which slot of the cache.

In place of keys and values a slot holds the hash of all tokens up to its own, which is what keys and values depend
on, too. A stage that finds another hash in a slot that it must read has found a wrong block, a stale write or a wrong
token. The last stage "samples" a token that follows from that hash, so the right continuation of a prompt can be
computed by anybody.
"""

from __future__ import annotations

from collections import deque
from random import Random

from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput

VOCAB = 50


def prefix_hash(before: int, token: int) -> int:
    return hash((before, token))


def sampled(state: int) -> int:
    return state % VOCAB


def continuation(prompt: list[int], count: int) -> list[int]:
    """What must be sampled after `prompt`."""
    state, tokens = 0, []
    for token in prompt:
        state = prefix_hash(state, token)
    for _ in range(count):
        tokens.append(sampled(state))
        state = prefix_hash(state, tokens[-1])
    return tokens


class PaperRequest:
    """What a stage knows of a request."""

    def __init__(self, tokens: list[int], block_ids: list[int]) -> None:
        self.tokens = tokens
        self.block_ids = block_ids


class PaperStage:
    """Follows the messages as a runner does. Only the last stage keeps tokens that it was not told of: those that it
    has sampled, also while a request is preempted."""

    def __init__(self, block_size: int, *, is_last: bool) -> None:
        self.block_size = block_size
        self.is_last = is_last
        self.slots: dict[int, int] = {}
        self.requests: dict[str, PaperRequest] = {}

    def execute(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        for request_id in scheduled.finished_request_ids:
            self.requests.pop(request_id, None)
        starts = {}
        for new in scheduled.new_requests:
            tokens = new.prompt_token_ids + new.output_token_ids
            known = self.requests.get(new.request_id)
            if self.is_last and known is not None:
                assert known.tokens[: len(tokens)] == tokens
                tokens = known.tokens
            self.requests[new.request_id] = PaperRequest(tokens, list(new.block_ids))
            starts[new.request_id] = new.num_computed_tokens
        cached = scheduled.cached_requests
        for request_id, blocks, start, told in zip(
            cached.request_ids, cached.new_block_ids, cached.num_computed_tokens, cached.new_token_ids, strict=True
        ):
            request = self.requests[request_id]
            request.block_ids += blocks
            starts[request_id] = start
            end = start + scheduled.num_scheduled_tokens[request_id]
            if self.is_last:
                assert request.tokens[end - len(told) : end] == told
            else:
                request.tokens[end - len(told) : end] = told
        ids = list(scheduled.num_scheduled_tokens)
        for request_id, count in scheduled.num_scheduled_tokens.items():  # everybody writes before anybody reads
            self._write(self.requests[request_id], starts[request_id], count)
        return ModelRunnerOutput(
            ids, [self._read(i, starts[i] + count) for i, count in scheduled.num_scheduled_tokens.items()]
        )

    def _slot(self, request: PaperRequest, position: int) -> int:
        return request.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def _write(self, request: PaperRequest, start: int, count: int) -> None:
        assert start + count <= len(request.tokens), "asked to compute a token that this stage does not know"
        state = 0
        for position, token in enumerate(request.tokens[: start + count]):
            state = prefix_hash(state, token)
            if position >= start:
                self.slots[self._slot(request, position)] = state

    def _read(self, request_id: str, length: int) -> list[int]:
        request = self.requests[request_id]
        state = 0
        for position, token in enumerate(request.tokens[:length]):
            state = prefix_hash(state, token)
            found = self.slots.get(self._slot(request, position))
            assert found == state, f"{request_id}: position {position} holds something else"
        if not self.is_last or length < len(request.tokens):
            return []
        request.tokens.append(sampled(state))
        return [sampled(state)]


class PaperPipeline:
    """Stages that each take their time: how far each has come at any moment is random."""

    def __init__(self, num_stages: int, block_size: int, random: Random) -> None:
        self._stages = [PaperStage(block_size, is_last=i == num_stages - 1) for i in range(num_stages)]
        self._random = random
        self._steps: list[SchedulerOutput] = []
        self._executed = [0] * num_stages
        self._outputs: deque[ModelRunnerOutput] = deque()
        self._read = 0

    @property
    def num_in_flight(self) -> int:
        return len(self._steps) - self._read

    def submit(self, scheduled: SchedulerOutput) -> None:
        self._steps.append(scheduled)
        self._advance(at_least=0)

    def result(self) -> ModelRunnerOutput:
        """Of the oldest step in flight."""
        self._read += 1
        self._advance(at_least=self._read)
        return self._outputs.popleft()

    def _advance(self, at_least: int) -> None:
        limit = len(self._steps)
        for index, stage in enumerate(self._stages):
            limit = self._random.randint(max(at_least, self._executed[index]), limit)
            for step in self._steps[self._executed[index] : limit]:
                output = stage.execute(step)
                if stage.is_last:
                    self._outputs.append(output)
            self._executed[index] = limit
