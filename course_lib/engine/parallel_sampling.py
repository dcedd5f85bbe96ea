"""n > 1: one request of the user becomes n of the engine.

Each child samples on its own (with seed + i, if there is a seed) and shares the prompt's full blocks
with its siblings through the prefix cache: nothing is forked or copied.

vLLM: `vllm/v1/engine/parallel_sampling.py`.
"""

from __future__ import annotations

from course_lib.outputs import CompletionOutput
from course_lib.sampling_params import SamplingParams


class ParentRequest:
    """Knows its children and joins their outputs.

    Args:
        core_id: what the core would call the request if it were one.
    """

    def __init__(self, core_id: str, params: SamplingParams) -> None:
        self.params = params
        self.child_ids = [f"{i}_{core_id}" for i in range(params.n)]
        self.unfinished = set(self.child_ids)
        self.latest: dict[int, CompletionOutput] = {}

    def child_params(self, index: int) -> SamplingParams:
        """Parameters of child `index`: n=1, and a seed of its own."""
        params = self.params.clone()
        params.n = 1
        if params.seed is not None:
            params.seed += index
        return params

    def record(self, child_id: str, output: CompletionOutput) -> None:
        """Note a child's newest output, and its end if this is it."""
        self.latest[output.index] = output
        if output.finished():
            self.unfinished.discard(child_id)

    @property
    def finished(self) -> bool:
        return not self.unfinished

    def outputs(self) -> list[CompletionOutput]:
        """The newest output of every child that has one, by index."""
        return [self.latest[i] for i in sorted(self.latest)]
