"""How many bytes a workload must move through memory, and what tokens/s that permits.

The formula: every step reads all weights once (W bytes; of a tied table once, of a separate input table nothing, a
lookup reads one row per token). A request whose prompt has P tokens and that yields N reads, for each of its N steps,
the keys and values of the sequence so far: P at its first step, then P + 1, ... P + N - 1; and it writes P + N - 1
of them (the last token is never computed). With K bytes per token of all layers:

    bytes = steps * W + K * (tokens read + tokens written)

Activations are left out: in a small batch they stay in the cache. Prompts are counted as read once, as if attention
over a prompt kept it on the chip, so the true traffic is a little higher.
"""

from __future__ import annotations

from typing import Any

from course_lib.bench.workloads import WorkItem


def kv_tokens(items: list[WorkItem]) -> int:
    """Tokens whose keys and values are read, plus those whose are written, over the whole workload."""
    total = 0
    for prompt, new, _ in items:
        length, steps = len(prompt), new
        total += steps * length + steps * (steps - 1) // 2  # read
        total += length + steps - 1  # written
    return total


def weight_bytes(model: Any) -> int:
    """Bytes of weights that one step reads, of one of this engine's models."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    if getattr(model, "lm_head", None) is not None:
        total -= model.embedding_weight().nbytes
    return total


def bytes_moved(items: list[WorkItem], steps: int, weights: int, kv_bytes_per_token: int) -> int:
    """Bytes over the whole workload, served in `steps` steps."""
    return steps * weights + kv_bytes_per_token * kv_tokens(items)
