"""Counts of torch operations, for budgets: how much work an answer does, the same on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def count_torch_calls(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Counter[str]:
    """How often each operation runs during `function(*args, **kwargs)`, by its name in torch's dispatcher.

    Names are the primitive ones: "sort", "topk", "mm", "add_" (in place); a matmul of two matrices counts as
    "mm", a softmax as "_softmax", `.T` as "t". Exceptions of the function pass through.
    """
    counting = _Counting()
    with counting:
        function(*args, **kwargs)
    return counting.calls


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler for the first call, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
