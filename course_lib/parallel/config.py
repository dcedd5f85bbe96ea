"""How many processes an engine is, and where they run: resolved and checked.

vLLM: `vllm/config/parallel.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from course_lib.parallel.layout import ParallelLayout
from course_lib.parallel.replicas import ReplicaPlace, read_environment

BACKENDS = ("uni", "mp", "ray", "external_launcher")
STEP_TIME_LIMIT = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"  # in the environment
_DEFAULT_STEP_TIME_LIMIT_S = 300.0


@dataclass(frozen=True)
class ParallelConfig:
    """Final sizes. One replica is `layout.tensor * layout.pipeline` ranks; `layout.data` counts replicas.

    Without a `replica` the engine is all of them: in one process if there is one, otherwise behind one front. With a
    `replica` it is that one of them, and `layout.data` is 1 unless they share experts: its ranks' numbers in the
    world start at `layout.rank(data=replica.rank)`, and all replicas' ranks meet in the store at `replica`'s address.
    """

    layout: ParallelLayout
    backend: str  # one of BACKENDS
    enable_expert_parallel: bool
    data_backend: str = "mp"  # where a front starts its replicas: one of DATA_BACKENDS
    balancing: str = "least_loaded"  # which replica is given a request: one of BALANCINGS
    replica: ReplicaPlace | None = None
    step_time_limit_s: float = _DEFAULT_STEP_TIME_LIMIT_S  # a rank that takes longer for one step counts as hanging

    @property
    def ranks_per_replica(self) -> int:
        return self.layout.tensor * self.layout.pipeline

    @property
    def in_lock_step(self) -> bool:
        """Whether replicas share experts, so that all of them must take part in every forward pass."""
        return self.enable_expert_parallel and self.layout.data > 1

    @property
    def runs_elsewhere(self) -> bool:
        """Whether models may run in other processes than this one, the engine's."""
        return self.layout.data > 1 or self.replica is not None or self.backend in ("mp", "ray")

    def for_replica(self, place: ReplicaPlace) -> ParallelConfig:
        """What one of several replicas is to know."""
        data = self.layout.data if self.in_lock_step else 1
        return replace(self, layout=replace(self.layout, data=data), replica=place)


def resolve_parallel(
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    data_parallel_size: int,
    backend: str | None,
    enable_expert_parallel: bool,
    data_backend: str,
    balancing: str,
    num_heads: int,
    num_kv_heads: int,
    num_layers: int,
    num_experts: int | None,
) -> ParallelConfig:
    """Check sizes against the model; backend None: "uni" for one process, "mp" for several.

    Raises ValueError with the sizes that would work.
    """
    tensor, pipeline, data = tensor_parallel_size, pipeline_parallel_size, data_parallel_size
    fitting = [
        size
        for size in range(1, num_heads + 1)
        if num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    ]
    if tensor not in fitting:
        raise ValueError(
            f"tensor_parallel_size={tensor} cannot share out this model's {num_heads} attention heads and "
            f"{num_kv_heads} KV heads: what works is {', '.join(map(str, fitting))}"
        )
    if pipeline > num_layers:
        raise ValueError(
            f"pipeline_parallel_size={pipeline} is more than the model's {num_layers} layers: a stage needs at least "
            f"one"
        )
    if enable_expert_parallel and num_experts is None:
        raise ValueError(
            "enable_expert_parallel=True: this model has no experts to share out; leave it out, or make some of the "
            "course model's layers with upcycle_experts="
        )
    launched = read_environment(os.environ)
    if launched is not None:
        if data not in (1, launched[0]):
            raise ValueError(
                f"data_parallel_size={data}, but the environment says VLLM_DP_SIZE={launched[0]} and makes this "
                f"process one of so many replicas: leave the argument out, or unset VLLM_DP_SIZE"
            )
        data = launched[0]
    elif data == 1 and data_backend == "ray":
        raise ValueError(
            'data_parallel_backend="ray" says where replicas run, and data_parallel_size=1 is one engine in this '
            "process: raise the size, or leave the backend out"
        )
    layout = ParallelLayout(tensor, pipeline, data)
    backend = backend or ("uni" if tensor * pipeline == 1 else "mp")
    if backend not in BACKENDS:
        raise ValueError(f"distributed_executor_backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "uni" and tensor * pipeline > 1:
        raise ValueError(
            f'distributed_executor_backend="uni" is one process, and tensor_parallel_size={tensor} times '
            f'pipeline_parallel_size={pipeline} needs {tensor * pipeline}: use "mp", or leave it out'
        )
    if backend == "external_launcher":
        _check_launcher(layout)
    limit = _step_time_limit()
    parallel = ParallelConfig(
        layout, backend, enable_expert_parallel, data_backend, balancing, step_time_limit_s=limit
    )
    if launched is None:
        return parallel
    if parallel.in_lock_step and not 1 <= launched[1].port <= 65535:
        raise ValueError(
            "VLLM_DP_MASTER_PORT is missing in the environment: replicas that share experts meet there; set it to a "
            "port that is free on the machine of replica 0, the same for all"
        )
    return parallel.for_replica(launched[1])


def _step_time_limit() -> float:
    """Seconds, from the environment. Raises ValueError."""
    given = os.environ.get(STEP_TIME_LIMIT)
    if given is None:
        return _DEFAULT_STEP_TIME_LIMIT_S
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{STEP_TIME_LIMIT}={given!r} in the environment must be a number of seconds above 0")
    return seconds


def _check_launcher(layout: ParallelLayout) -> None:
    if layout.pipeline > 1 or layout.data > 1:
        raise ValueError(
            'distributed_executor_backend="external_launcher": every rank schedules for itself, which works for '
            "tensor parallelism alone; set pipeline_parallel_size and data_parallel_size to 1"
        )
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f'distributed_executor_backend="external_launcher" is for scripts under torchrun, which sets '
            f"{', '.join(missing)}: start it with `torchrun --nproc-per-node={layout.tensor} script.py`"
        )
    if int(os.environ["WORLD_SIZE"]) != layout.tensor:
        raise ValueError(
            f"tensor_parallel_size={layout.tensor}, but torchrun has started {os.environ['WORLD_SIZE']} processes: "
            f"use --nproc-per-node={layout.tensor}"
        )
