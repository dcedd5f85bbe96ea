"""The compiled kernels, with the arguments and meaning of `kernels.reference` for float32 and bfloat16, where:

* rms_norm, silu_and_mul, rotary_and_cache: x, residual, gate_up and qkv are contiguous;
* rotary_and_cache: keys are rotated in place, too;
* rotary_and_cache, paged_attention_decode: the caches are stored heads first;
* paged_attention_decode: head sizes are HEAD_SIZES, rows of the query may be parts of longer ones; of the options
  there is `sliding_window`;
* few_rows_linear: x is float32, the weight float32 or finite float16; how many rows are few, `layers/cpu_matmul.py`
  says;
* pack_weight, unpack_weight: bfloat16 with an even number of inputs, or float16; packed_linear: x bfloat16 where the
  processor PACKS_BFLOAT16, or float32 with a weight that was float16 where it PACKS_FLOAT32.

Arguments that are not so raise ValueError. They are compiled once per machine (`kernels.cpu.build`); importing this
module loads what was compiled, and fails with the remedy if nothing was. They are what remains when torch's own
operations have been tried: a step of a small model on a CPU is hundreds of small operations, each of which is a trip
through memory and a wait for threads, and attention over blocks costs torch a copy of all keys and values.

vLLM: csrc/cpu/.
"""

from __future__ import annotations

import torch

from kernels.cpu.build import library_path

if not library_path().exists():
    raise ImportError("kernels.cpu is not compiled here: `python3 -m kernels.cpu.build` does it")
torch.ops.load_library(library_path())
_compiled = torch.ops.course_cpu

DTYPES = (torch.float32, torch.bfloat16)
HEAD_SIZES = tuple(_compiled.head_sizes())
PACKS_BFLOAT16 = _compiled.multiplies_bfloat16()
PACKS_FLOAT32 = _compiled.multiplies_float32()

few_rows_linear = _compiled.few_rows_linear.default
pack_weight = _compiled.pack_weight.default
packed_linear = _compiled.packed_linear.default
paged_attention_decode = _compiled.paged_attention_decode.default
rms_norm = _compiled.rms_norm.default
rotary_and_cache = _compiled.rotary_and_cache.default
silu_and_mul = _compiled.silu_and_mul.default
unpack_weight = _compiled.unpack_weight.default
