"""The executor under torchrun: every rank is a process with an engine of its own, and a worker in it.

The ranks find each other in the store that torchrun's agent serves at MASTER_ADDR:MASTER_PORT, each engine under a
prefix of its own, so that a script may make several, and use `torch.distributed` as well. What engines must agree on,
they agree on: the number of KV blocks is the least of all ranks, and before every step the schedules are compared.

vLLM: `ExecutorWithExternalLauncher` in `vllm/v1/executor/uniproc_executor.py`.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from course_lib.config import EngineConfig
from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput
from course_lib.executor.executor import StepInFlight
from course_lib.executor.lock_step import LockStep
from course_lib.executor.uniproc import UniProcExecutor
from course_lib.executor.worker import own_address
from course_lib.parallel.group import ParallelGroups
from course_lib.parallel.torch_group import connect


@dataclass(frozen=True, slots=True)
class _NotedStep:
    """A launched step whose output is kept for the comparison."""

    step: StepInFlight
    lock_step: LockStep

    def result(self) -> ModelRunnerOutput:
        output = self.step.result()
        self.lock_step.note(output)
        return output


class ExternalLauncherExecutor(UniProcExecutor):
    """Loads this rank's part of the model at construction. Every rank must make its engines in the same order."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._group = self.worker.groups.tensor
        self._lock_step = LockStep(self._group)

    def _join(self, config: EngineConfig) -> ParallelGroups:
        rank, limit_s = int(os.environ["RANK"]), config.parallel.step_time_limit_s
        device = torch.device("cpu")
        if config.device == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
            torch.cuda.set_device(device)
        store = _launcher_store(rank, limit_s)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A script that is started again after a failure finds what its last run has left in the store.
        run = dist.PrefixStore(f"course_lib{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        number = run.add(f"engines of rank {rank}", 1)
        return connect(
            config.parallel.layout, rank, dist.PrefixStore(f"engine{number}", run), device,
            host=own_address(host, port), time_limit_s=limit_s,
        )  # fmt: skip

    def determine_num_blocks(self) -> int:
        """How many KV blocks every rank has room for: with another number, a rank would preempt otherwise."""
        return min(self._group.all_gather_object(super().determine_num_blocks()))

    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """Compare the step with the other ranks', and run it. Raises RankDivergenceError or WorkerDiedError."""
        self._lock_step.agree(scheduled)
        output = super().execute_model(scheduled)
        self._lock_step.note(output)
        return output

    def launch_model(self, scheduled: SchedulerOutput) -> StepInFlight:
        self._lock_step.agree(scheduled)
        return _NotedStep(super().launch_model(scheduled), self._lock_step)

    def reset(self) -> None:
        super().reset()
        self._lock_step.reset()


def _launcher_store(rank: int, time_limit_s: float) -> dist.TCPStore:
    """Torchrun's agent serves it; other launchers, that set the same variables, leave that to rank 0."""
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not served,
        timeout=datetime.timedelta(seconds=time_limit_s),
        wait_for_workers=False,
        multi_tenant=True,  # this process may serve it already, for `torch.distributed` or another engine
    )
