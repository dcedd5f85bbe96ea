"""What every launch checks before a kernel touches memory.

Owns the checks of shapes, types, strides and devices, and the one question "compiled or interpreted?".
Invariant: a tensor that passes can be addressed by the kernels without an out-of-range access, as far
as the host can know; table entries, lengths and slots live on the device and are the caller's promise.
An error names the argument.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HEAD_DIM = 256
MAX_BLOCK_SIZE = 256
SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Triton reads TRITON_INTERPRET when a function is decorated, so what counts is its value now, while
# this package is being imported, not its value at a launch.
INTERPRETED: bool = triton.knobs.runtime.interpret


def _check_interpreter() -> None:
    """Refuse, while importing, the two set-ups whose first launch would fail with a puzzling message."""
    import numpy

    if isinstance(tl.max, triton.JITFunction):
        # Triton's own library was decorated for the compiler; interpreted kernels cannot call it.
        raise ImportError(
            "TRITON_INTERPRET=1 was set after something had imported triton: set it before the process "
            "starts (or before the first import of triton)."
        )
    triton_release, numpy_release = (
        tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)
    )
    if triton_release < (3, 7) and numpy_release >= (2, 4):
        # `range` over a loaded bound fails in it: "only 0-dimensional arrays can be converted".
        raise ImportError(
            f"Triton {triton.__version__}'s interpreter does not work with NumPy {numpy.__version__}: "
            "install triton>=3.7 or numpy<2.4, or unset TRITON_INTERPRET to compile for a GPU."
        )


if INTERPRETED:
    _check_interpreter()


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's GPU current: Triton launches on the current device, whatever the tensors say."""
    return torch.cuda.device_of(tensor)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse values (keys, values, queries, caches) that a kernel cannot read together.

    Args:
        tensors: by argument name, the first one sets dtype, device and head size for the others.

    Raises:
        TypeError: unsupported or mixed dtypes, bfloat16 under the interpreter.
        ValueError: mixed devices, CPU tensors for compiled kernels, unequal or unsupported head sizes,
            a last dimension that is not contiguous.
    """
    first_name, first = next(iter(tensors.items()))
    if first.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{first_name} is {first.dtype}: the kernels take float32, float16 or bfloat16.")
    if INTERPRETED and first.dtype == torch.bfloat16:
        raise TypeError(
            f"{first_name} is bfloat16, which Triton's interpreter computes wrongly without saying so: use "
            "float32 or float16 with TRITON_INTERPRET=1, or run compiled on a GPU."
        )
    if not INTERPRETED and not first.is_cuda:
        raise ValueError(
            f"{first_name} is on {first.device}: compiled Triton kernels need a GPU. On a CPU, set "
            "TRITON_INTERPRET=1 before the process starts, or use kernels.reference."
        )
    head_dim = first.shape[-1]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{first_name} has head size {head_dim}: the kernels take 1 to {MAX_HEAD_DIM}.")
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but {first_name} is {first.dtype}: make them equal.")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first.device}.")
        if tensor.shape[-1] != head_dim:
            raise ValueError(
                f"{name} has head size {tensor.shape[-1]} but {first_name} has {head_dim}: make them equal."
            )
        if head_dim > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, its stride there is "
                             f"{tensor.stride(-1)}.")  # fmt: skip


def check_rows(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that an elementwise or row-wise kernel cannot read together; head sizes do not matter.

    Raises TypeError (dtypes, bfloat16 under the interpreter) or ValueError (devices, strides) as
    `check_tensors` does, which this is without the head sizes.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        check_tensors({name: tensor[..., :1]})
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} is {tensor.dtype} but {first_name} is {first.dtype}: make them equal.")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first.device}.")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, its stride there is "
                             f"{tensor.stride(-1)}.")  # fmt: skip


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Refuse a tensor whose shape is not `shape`; None stands for any size. Raises ValueError."""
    if tensor.dim() == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    ):
        return
    wanted_text = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{name} has shape {list(tensor.shape)}: expected [{wanted_text}].")


def check_index(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...],
                device: torch.device) -> None:  # fmt: skip
    """Refuse an index tensor of another dtype, shape or device, or not contiguous in its last dimension."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}: expected {dtype}.")
    check_shape(name, tensor, shape)
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: expected {device}.")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension.")


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    """Refuse caches that are not [NB, BS, Hkv, D] of one shape with a supported block size."""
    check_shape("k_cache", k_cache, (None, None, None, None))
    check_shape("v_cache", v_cache, tuple(k_cache.shape))
    block_size = k_cache.shape[1]
    if not 1 <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(
            f"k_cache has block size {block_size}: it must be a power of two from 1 to {MAX_BLOCK_SIZE}."
        )


def check_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    sliding_window: int | None,
    out: Tensor | None,
) -> None:
    """The checks that decode and ragged attention share. Raises TypeError or ValueError."""
    check_shape("query", query, (None, None, None))
    check_caches(k_cache, v_cache)
    tensors = {"query": query, "k_cache": k_cache, "v_cache": v_cache}
    if out is not None:
        check_shape("out", out, tuple(query.shape))
        tensors["out"] = out
    check_tensors(tensors)
    num_heads, num_kv_heads = query.shape[1], k_cache.shape[2]
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"query has {num_heads} heads and k_cache has {num_kv_heads}: the first must be a multiple of "
            "the second."
        )
    check_index("seq_lens", seq_lens, torch.int32, (None,), query.device)
    check_index("block_table", block_table, torch.int32, (len(seq_lens), None), query.device)
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}: it must be at least 1, or None for no window.")
