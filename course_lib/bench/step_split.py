"""Where a step's time goes: schedule, prepare, forward, sample, detokenize, and the rest.

The engine has no hooks for this: for the length of a `with` block, the methods at the borders between the phases are
covered by timed ones, on these objects only. A phase that calls into another is not charged for it. Steps are then
taken one after another, and on a GPU the host waits for the device at the end of every phase that uses it, so that each
phase shows its own time: such a run is slower than one without the block, whose speed must be measured separately.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from course_lib.engine.llm_engine import LLMEngine

PHASES = ("schedule", "prepare", "forward", "sample", "detokenize", "other")


class StepSplit:
    """Seconds by phase, and how many steps they are of."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.steps = 0
        self._phase: str | None = None  # the one the clock runs for
        self._since = 0.0

    def enter(self, phase: str) -> str | None:
        """Let the clock run for `phase`; returns the phase before, for `leave`."""
        now = time.perf_counter()
        before = self._phase
        if before is not None:
            self.seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before

    def leave(self, before: str | None) -> None:
        now = time.perf_counter()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = before, now

    def per_step_ms(self) -> dict[str, float]:
        """Milliseconds of an average step, by phase."""
        return {phase: round(1e3 * s / max(1, self.steps), 4) for phase, s in self.seconds.items()}


@contextmanager
def split_steps(engine: LLMEngine) -> Iterator[StepSplit]:
    """Time every step of `engine` inside the block. The engine must be idle at both ends."""
    split = StepSplit()
    core = engine.core
    runner = core.executor.runner
    wait = _device_wait(runner)
    step = core.step

    def counted() -> Any:
        split.steps += 1
        return step()

    with ExitStack() as undo:
        _cover(undo, runner, "can_run_ahead", False)
        _cover(undo, core, "step", counted)

        def timed(owner: object, name: str, phase: str, sync: Callable[[], None] | None = None) -> None:
            _cover(undo, owner, name, _timed(split, phase, getattr(owner, name), sync))

        timed(engine, "step", "other")
        for name in ("schedule", "update_from_output"):
            timed(core.scheduler, name, "schedule")
        timed(runner, "execute_model", "prepare")
        timed(runner.model, "forward", "forward", wait)
        timed(runner.model, "compute_logits", "forward", wait)
        for graphs in getattr(runner, "graphs", None) or ():
            timed(graphs, "replay", "forward", wait)
        timed(runner, "sampler", "sample", wait)
        for name in ("finish", "_sample"):  # reading the tokens, entering them
            if hasattr(runner, name):
                timed(runner, name, "sample")
        timed(engine.frontend.output_processor, "process", "detokenize")
        yield split


def _timed(
    split: StepSplit, phase: str, function: Callable[..., Any], sync: Callable[[], None] | None
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        before = split.enter(phase)
        try:
            result = function(*args, **kwargs)
            if sync is not None:
                sync()
            return result
        finally:
            split.leave(before)

    return call


def _device_wait(runner: Any) -> Callable[[], None] | None:
    if runner.device.type != "cuda":
        return None
    import torch

    return torch.cuda.synchronize


def _cover(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of this one object until `undo` closes."""
    missing = object()
    before = vars(owner).get(name, missing)
    if before is missing:
        undo.callback(lambda: vars(owner).pop(name, None))
    else:
        undo.callback(lambda: vars(owner).__setitem__(name, before))
    vars(owner)[name] = value
