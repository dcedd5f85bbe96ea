"""Forward passes that all replicas run together, because each holds a part of every layer's experts.

A pass is a step if a replica has one to run, and an empty one otherwise. `LockStepCore` is one replica of several
processes that were each started by hand (VLLM_DP_*), with nobody in front of them: before each step all agree
whether anybody has requests left, so a process that is done goes on with empty passes until all are.

Invariant: between two agreements every replica runs equally many passes, one after the other.

vLLM: `ParallelConfig.has_unfinished_dp` and the offline path of `vllm/v1/engine/llm_engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from course_lib.config import EngineConfig
from course_lib.core.messages import EngineCoreOutput
from course_lib.engine.core import EngineCore
from course_lib.engine.core_client import InProcessCore
from course_lib.errors import EngineDeadError
from course_lib.executor.worker import own_address
from course_lib.parallel.config import ParallelConfig
from course_lib.parallel.torch_group import TorchGroup, open_store


def run_one_pass(core: EngineCore, step: Callable[[], list[EngineCoreOutput]]) -> list[EngineCoreOutput]:
    """Run exactly one forward pass, by `step` if there is something to compute; returns what it has produced."""
    news: list[EngineCoreOutput] = []
    if core.has_work:
        news = step()
        # A step may have told the runner of endings only, and computed nothing.
        if core.last_scheduled.total_num_scheduled_tokens:
            return news
    core.collective_rpc("execute_dummy_batch")
    return news


class Agreement:
    """A group of one process per replica, whose cores ask each other a question. All must ask equally often."""

    def __init__(self, parallel: ParallelConfig) -> None:
        place = parallel.replica
        store = dist.PrefixStore("cores", open_store(place.host, place.port, serve=False))
        own = own_address(place.host, place.port)
        self._group = TorchGroup(store, place.rank, parallel.layout.data, torch.device("cpu"), host=own)

    def anybody(self, we: bool) -> bool:
        """Whether any replica says yes. Waits for all."""
        return bool(self._group.all_reduce(torch.tensor([int(we)])).item())

    def close(self) -> None:
        self._group.close()


class LockStepCore(InProcessCore):
    """This process's replica. Replica 0's process serves the store where all meet."""

    def __init__(self, config: EngineConfig) -> None:
        place = config.parallel.replica
        if config.device == "cuda" and config.parallel.backend == "uni":
            if place.local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"VLLM_DP_RANK_LOCAL={place.local_rank}: torch sees {torch.cuda.device_count()} GPUs, not that "
                    f"one; set it to 0 if this process sees its own GPU only"
                )
            torch.cuda.set_device(place.local_rank)  # of this thread, the only one that uses the engine
        # Kept as long as we live: it is the server.
        self._store = open_store(place.host, place.port, serve=True) if place.rank == 0 else None
        self._agreement = Agreement(config.parallel)
        self._dead: EngineDeadError | None = None
        super().__init__(config)

    def step(self) -> list[EngineCoreOutput]:
        try:
            return run_one_pass(self, super().step)
        except BaseException as error:  # Ctrl-C, too: from here on the others are ahead of us
            self._dead = EngineDeadError(f"a pass that all replicas take part in has failed here: {error!r}")
            self.shutdown()  # by which they notice, instead of waiting for us
            raise

    def anybody_unfinished(self, we: bool) -> bool:
        if self._dead is not None:
            raise self._dead
        return self._agreement.anybody(we)

    def shutdown(self) -> None:
        super().shutdown()
        self._agreement.close()
