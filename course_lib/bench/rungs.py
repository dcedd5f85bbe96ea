"""The rungs of the ladder: the same engine with its ideas taken away and given back one after another.

Each rung is the one before plus one idea. The first needs an engine of its own (another attention backend); the others
are one engine, whose parts are covered for the length of a `with` block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from course_lib import LLM

TORCH_OPS = "eager, torch operations"
PAGED_KERNELS = "+ paged attention in Triton"
FUSED_OPS = "+ fused small operations"
GRAPHS = "+ CUDA graphs"
ASYNCHRONOUS = "+ asynchronous scheduling"
RUNGS = (TORCH_OPS, PAGED_KERNELS, FUSED_OPS, GRAPHS, ASYNCHRONOUS)


def engine_arguments(rung: str) -> dict[str, Any]:
    """What an engine for this rung is built with."""
    if rung == TORCH_OPS:
        return {"attention_backend": "torch", "enforce_eager": True}
    return {"attention_backend": "triton"}


@contextmanager
def only(llm: LLM, rung: str) -> Iterator[None]:
    """Inside the block `llm` has what `rung` and those below it have. Built with `engine_arguments`; idle."""
    from course_lib.layers import activation, linear, norm

    runner: Any = llm.llm_engine.core.executor.runner
    backend = runner.backend
    height = RUNGS.index(rung)
    saved = [
        (norm, "fused_kernels"), (activation, "fused_kernels"), (linear, "linear_kernels"), (runner, "graphs"),
    ]  # fmt: skip
    before = [(owner, name, getattr(owner, name)) for owner, name in saved]
    try:
        if height < RUNGS.index(FUSED_OPS):
            norm.fused_kernels = activation.fused_kernels = lambda x: None
            linear.linear_kernels = lambda x, weight: None
            backend.fuses_rotary = False
        if height < RUNGS.index(GRAPHS):
            runner.graphs = None
        if height < RUNGS.index(ASYNCHRONOUS):
            runner.can_run_ahead = False
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        vars(backend).pop("fuses_rotary", None)
        vars(runner).pop("can_run_ahead", None)
