"""Which replica is given the next request.

Pure bookkeeping, no processes: a balancer counts the requests that each replica has been given and not yet finished,
and chooses. Both ways of choosing take turns among equals, so that a burst to idle replicas is spread evenly.

Invariant: a replica's load is the number of its requests that were assigned and not released; those that were removed
have none and are never chosen.

vLLM: `DPLBAsyncMPClient.get_core_engine_for_request` in `vllm/v1/engine/core_client.py`, which always takes the
replica with the least load; the argument `data_parallel_balancing` is this engine's own.
"""

from __future__ import annotations


class Balancer:
    """Args:
    num_replicas: numbered from 0.
    policy: "least_loaded" (fewest requests in flight) or "round_robin" (each in turn, whatever its load). Least
        loaded is the better rule when requests differ in length, as a replica with long ones is given fewer;
        round robin is the one whose result can be told beforehand.
    """

    def __init__(self, num_replicas: int, policy: str) -> None:
        self.loads: dict[int, int] = dict.fromkeys(range(num_replicas), 0)  # of those that are there
        self.num_assigned = [0] * num_replicas  # requests ever given to each
        self._policy = policy
        self._size = num_replicas
        self._turn = 0  # who is first among equals

    def assign(self) -> int:
        """Choose a replica and count one request more for it. Raises LookupError if none is left."""
        in_turn = sorted(self.loads, key=lambda replica: (replica - self._turn) % self._size)
        if not in_turn:
            raise LookupError("no replica is left")
        # `min` takes the first of equals.
        chosen = in_turn[0] if self._policy == "round_robin" else min(in_turn, key=self.loads.__getitem__)
        self._turn = (chosen + 1) % self._size
        self.loads[chosen] += 1
        self.num_assigned[chosen] += 1
        return chosen

    def release(self, replica: int) -> None:
        """One request of `replica` has ended there."""
        if replica in self.loads:
            self.loads[replica] -= 1

    def remove(self, replica: int) -> None:
        """`replica` is gone, and with it what it had in flight."""
        self.loads.pop(replica, None)

    def clear(self) -> None:
        """No replica has anything in flight any more."""
        self.loads = dict.fromkeys(self.loads, 0)
