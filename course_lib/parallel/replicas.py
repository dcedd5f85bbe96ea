"""Data parallelism as it is asked for: how many replicas, which of them this is, and where they meet.

There are two ways to run N replicas. Either one process asks for all (`data_parallel_size=N`) and keeps them behind
itself, or somebody starts N processes that are each one replica and know it by the environment, as vLLM's
`data_parallel.py` does: VLLM_DP_RANK (0 to N - 1), VLLM_DP_RANK_LOCAL (the same, counted on this machine alone),
VLLM_DP_SIZE (N), VLLM_DP_MASTER_IP and VLLM_DP_MASTER_PORT (where rank 0 receives the others).

vLLM: `ParallelConfig.data_parallel_*` in `vllm/config/parallel.py`, `vllm/envs.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DATA_BACKENDS = ("mp", "ray")
BALANCINGS = ("least_loaded", "round_robin")


@dataclass(frozen=True)
class ReplicaPlace:
    """Which replica an engine is, and the store where it meets the others: only those that share experts need to."""

    rank: int
    local_rank: int  # among the replicas of this machine
    host: str
    port: int


def read_environment(environ: Mapping[str, str]) -> tuple[int, ReplicaPlace] | None:
    """The number of replicas and this one's place, from VLLM_DP_*; None if this process is not one of several.

    Raises ValueError naming the variable and what it must be.
    """
    size = _number(environ, "VLLM_DP_SIZE", 1)
    if size < 1:
        raise ValueError(f"VLLM_DP_SIZE={size} in the environment: it counts replicas, so it must be at least 1")
    if size == 1:
        return None
    rank = _number(environ, "VLLM_DP_RANK", None)
    if not 0 <= rank < size:
        raise ValueError(
            f"VLLM_DP_RANK={rank} in the environment: with VLLM_DP_SIZE={size} it must be 0 to {size - 1}"
        )
    local = _number(environ, "VLLM_DP_RANK_LOCAL", rank)
    if not 0 <= local <= rank:
        raise ValueError(
            f"VLLM_DP_RANK_LOCAL={local} in the environment: counted on one machine, replica {rank} is one of 0 to "
            f"{rank}"
        )
    port = _number(environ, "VLLM_DP_MASTER_PORT", 0)
    return size, ReplicaPlace(rank, local, environ.get("VLLM_DP_MASTER_IP") or "127.0.0.1", port)


def _number(environ: Mapping[str, str], name: str, default: int | None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{name}={text!r} in the environment must be a whole number: it belongs to VLLM_DP_SIZE="
            f"{environ.get('VLLM_DP_SIZE')}; set it in each replica's process, or unset VLLM_DP_SIZE"
        ) from None
