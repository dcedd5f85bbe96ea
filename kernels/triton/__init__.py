"""The kernels in Triton, with the arguments and meaning of `kernels.reference`.

Invariant: no function here waits for the device or reads a device tensor on the host, so every one of
them can be captured in a CUDA graph. On a CPU they run in Triton's interpreter: set TRITON_INTERPRET=1
before anything imports Triton. Its wheels exist for Linux only; elsewhere this import fails with the
choice that is left.

vLLM: csrc/cache_kernels.cu, vllm/v1/attention/ops/triton_unified_attention.py, triton_decode_attention.py.
"""

try:
    import triton as _triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "kernels.triton needs the package 'triton', which exists for Linux only: install it there, or "
        "use the torch attention backend (and kernels.reference), which run everywhere."
    ) from error

from kernels.triton.cache_write import reshape_and_cache
from kernels.triton.few_rows_linear import few_rows_linear
from kernels.triton.gated_activation import silu_and_mul
from kernels.triton.moe_groups import group_by_expert
from kernels.triton.moe_mlp import moe_mlp
from kernels.triton.paged_decode import paged_attention_decode
from kernels.triton.paged_varlen import paged_attention_varlen
from kernels.triton.rms_norm import rms_norm
from kernels.triton.rotary_cache import rotary_and_cache

__all__ = [
    "few_rows_linear", "group_by_expert", "moe_mlp", "paged_attention_decode", "paged_attention_varlen",
    "reshape_and_cache", "rms_norm", "rotary_and_cache", "silu_and_mul",
]  # fmt: skip
