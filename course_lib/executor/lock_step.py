"""Ranks that each schedule for themselves, compared before every step.

Under torchrun nobody sends schedules around: every rank runs the same scheduler on the same requests and must come
to the same decision, or the ranks wait for each other in different collectives, for ever. So before each step they
compare what they are about to do, and what they sampled in the steps before: eight bytes each, and all of it only if
those differ.

vLLM does not compare: its external launcher relies on equal inputs and seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import fields
from typing import Any

from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput
from course_lib.errors import RankDivergenceError, WorkerDiedError
from course_lib.parallel.group import Group, PeerLostError
from course_lib.sampling_params import SamplingParams


class LockStep:
    """`agree` before each step, `note` its output afterwards, on every rank of `group`."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._num_steps = 0
        self._sampled: list[tuple[int, str, list[int]]] = []  # step, request, tokens; not compared yet

    def agree(self, scheduled: SchedulerOutput) -> None:
        """Compare the coming step with the other ranks'.

        Raises:
            RankDivergenceError: they differ, on every rank.
            WorkerDiedError: another rank takes part in no step any more.
        """
        self._num_steps += 1
        plan = [self._sampled, *_plan(scheduled)]
        self._sampled = []
        text = json.dumps(plan, separators=(",", ":"))
        try:
            digests = self._group.all_gather_object(hashlib.blake2b(text.encode(), digest_size=8).digest())
        except PeerLostError as error:
            raise WorkerDiedError(
                f"rank {self._group.rank} is alone in step {self._num_steps}: another rank has ended, failed or "
                f"taken too long; what it printed says why"
            ) from error
        if len(set(digests)) > 1:
            self._explain(digests, self._group.all_gather_object(plan))

    def note(self, output: ModelRunnerOutput) -> None:
        """Keep what a step has sampled, to be compared before the next."""
        self._sampled += [
            (self._num_steps, request_id, tokens)
            for request_id, tokens in zip(output.request_ids, output.sampled_token_ids, strict=True)
        ]

    def reset(self) -> None:
        """After an interrupted step."""
        self._sampled = []

    def _explain(self, digests: list[bytes], plans: list[Any]) -> None:
        # What most ranks have; where there is no such thing, what rank 0 has.
        usual = Counter(digests).most_common(1)[0][0]
        model = digests.index(usual)
        others = [rank for rank, digest in enumerate(digests) if digest != usual]
        rank = others[0]
        what, mine, theirs = first_difference(statements(plans[rank]), statements(plans[model]))
        who = f"rank {others[0]} differs" if len(others) == 1 else f"ranks {', '.join(map(str, others))} differ"
        raise RankDivergenceError(
            f"{who} from rank {model} before step {self._num_steps}: rank {rank} {what} {mine}, rank {model} "
            f"{theirs}. Every rank must make the same engine, with the same seed and limits, and be given the same "
            f"requests in the same order"
        )


def first_difference(mine: dict[str, str], theirs: dict[str, str]) -> tuple[str, str, str]:
    """What differs first, and how it is on either side."""
    for what in [*mine, *theirs]:
        if mine.get(what) != theirs.get(what):
            return what, mine.get(what, "nothing"), theirs.get(what, "nothing")
    raise ValueError("there is no difference")


def _plan(scheduled: SchedulerOutput) -> list[Any]:
    """What must be the same on all ranks, in an order that is."""
    cached = scheduled.cached_requests
    return [
        sorted(scheduled.finished_request_ids),
        sorted(scheduled.preempted_request_ids),
        list(scheduled.num_scheduled_tokens.items()),
        [
            (new.request_id, new.prompt_token_ids, new.output_token_ids, _settings(new.sampling_params),
             new.block_ids, new.num_computed_tokens)
            for new in scheduled.new_requests
        ],
        [cached.request_ids, cached.num_computed_tokens, cached.new_block_ids],
    ]  # fmt: skip


def _settings(params: SamplingParams) -> dict[str, str]:
    """All that influences sampling; functions by their names, since addresses differ from process to process."""
    values = {field.name: repr(getattr(params, field.name)) for field in fields(params)}
    processors = params.logits_processors or ()
    values["logits_processors"] = str([getattr(one, "__qualname__", type(one).__qualname__) for one in processors])
    return values


def statements(plan: list[Any]) -> dict[str, str]:
    """A plan in words, the most telling first: "schedules for request 3" -> "16 tokens"."""
    sampled, finished, preempted, counts, new, cached = plan
    said = {f"sampled in step {step} for request {request}": f"{tokens}" for step, request, tokens in sampled}
    said |= {"ends": ", ".join(finished), "preempts": ", ".join(preempted)}
    said |= {f"schedules for request {request}": f"{count} tokens" for request, count in counts}
    said |= {"schedules in this order": ", ".join(request for request, _ in counts)}
    for request, prompt, output, settings, blocks, computed in new:
        said[f"has for request {request} the prompt"] = f"{prompt}"
        said |= {f"has for request {request} {name}": value for name, value in settings.items()}
        said[f"has for request {request} the output"] = f"{output}"
        said[f"finds in its cache for request {request}"] = f"{computed} tokens"
        said[f"gives request {request} the blocks"] = f"{blocks}"
    for request, computed, blocks in zip(*cached, strict=True):
        said[f"has computed for request {request}"] = f"{computed} tokens"
        said[f"gives request {request} the further blocks"] = f"{blocks}"
    return said
