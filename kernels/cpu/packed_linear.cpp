// Products of bfloat16 rows with a weight laid out for them, where the processor multiplies pairs of bfloat16.
//
// The instruction (VDPBF16PS) adds to sixteen float32 sums the products of sixteen pairs with sixteen other pairs. So
// the weight lies in panels of 48 outputs, three vectors: for each pair of inputs, the pair's two numbers for every
// output of the panel. A tile is eight rows of x by one panel: 24 sums stay in registers from the first input to the
// last, and each step loads three vectors of the weight and one pair of each row. Few rows are bound by reading the
// weight, many by the instruction: so the tiles of one panel, which the cache holds by then, also ask for the next.
//
// The compiler has no loop that it would make this instruction of, hence the intrinsics. Other processors, and weights
// with an odd number of inputs, use oneDNN (`course_lib/layers/cpu_matmul.py`). After Goto and van de Geijn, "Anatomy
// of High-Performance Matrix Multiplication" (2008); vLLM: csrc/cpu/sgl-kernels/gemm.cpp.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "arguments.h"
#include "instructions.h"
#include "numbers.h"

namespace {

constexpr int kLanes = 16;                 // sums in a vector, and pairs
constexpr int kVectors = 3;                // in a panel
constexpr int kPanel = kVectors * kLanes;  // outputs
constexpr int kRows = 8;                   // in a tile

using Pair = uint32_t;  // two bfloat16 of neighbouring inputs

// ---- layout ----------------------------------------------------------------------------------------------------

// Panel p of a weight [N, 2 * pairs] begins at pair p * kPanel * pairs; its width is kPanel or what is left of N.
int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

int64_t width_of(int64_t panel, int64_t outputs) { return std::min<int64_t>(kPanel, outputs - panel * kPanel); }

// Calls move(place in rows, place in panels) for every pair of the weight.
template <typename Move>
void for_pairs(int64_t outputs, int64_t pairs, const Move& move) {
  at::parallel_for(0, panels_of(outputs), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, width = width_of(panel, outputs);
      for (int64_t pair = 0; pair < pairs; ++pair)
        for (int64_t i = 0; i < width; ++i) move((first + i) * pairs + pair, first * pairs + pair * width + i);
    }
  });
}

// weight [N, K] bfloat16, K even -> uint16 [N, K]: its bits in panels, for packed_linear and unpack_weight only.
at::Tensor pack_weight(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.is_cpu() && weight.scalar_type() == at::kBFloat16 && weight.dim() == 2 &&
                        weight.is_contiguous() && weight.size(1) % 2 == 0,
                    "weight: wanted a contiguous CPU matrix of bfloat16 with an even number of columns, not " +
                        described(weight));
  at::Tensor packed = at::empty(weight.sizes(), weight.options().dtype(at::kUInt16));
  const auto* from = static_cast<const Pair*>(weight.const_data_ptr());
  auto* to = static_cast<Pair*>(packed.data_ptr());
  for_pairs(weight.size(0), weight.size(1) / 2, [=](int64_t row, int64_t panel) { to[panel] = from[row]; });
  return packed;
}

void check_packed(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.is_cpu() && weight.scalar_type() == at::kUInt16 && weight.dim() == 2 &&
                        weight.is_contiguous() && weight.size(1) % 2 == 0,
                    "weight: wanted what pack_weight returned, not " + described(weight));
}

// What pack_weight was given.
at::Tensor unpack_weight(const at::Tensor& weight) {
  check_packed(weight);
  at::Tensor plain = at::empty(weight.sizes(), weight.options().dtype(at::kBFloat16));
  const auto* from = static_cast<const Pair*>(weight.const_data_ptr());
  auto* to = static_cast<Pair*>(plain.data_ptr());
  for_pairs(weight.size(0), weight.size(1) / 2, [=](int64_t row, int64_t panel) { to[row] = from[panel]; });
  return plain;
}

// ---- product ---------------------------------------------------------------------------------------------------

// A panel of the weight, and what the tiles on it share.
struct Panel {
  const Pair* weight;
  int64_t pairs;     // of inputs
  int64_t width;     // outputs
  int64_t outputs;   // of the whole weight: from one row of the result to the next
  const float* bias;  // kPanel numbers
};

#ifdef HAS_BFLOAT16_INTRINSICS
// x [Rows, 2 * pairs], to [Rows, width]. At every pair, `lines` cache lines from `next` on are asked for.
template <int Rows>
FOR_BFLOAT16 void multiply_tile(const Pair* x, const Panel& panel, c10::BFloat16* to, const char* next, int lines) {
  __mmask16 there[kVectors];
  __m512 sums[Rows][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int64_t columns = std::clamp<int64_t>(panel.width - v * kLanes, 0, kLanes);
    there[v] = static_cast<__mmask16>((1u << columns) - 1);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) sums[r][v] = _mm512_loadu_ps(panel.bias + v * kLanes);
  }
  const Pair* weight = panel.weight;
  for (int64_t pair = 0; pair < panel.pairs; ++pair, weight += panel.width) {
    __m512bh vectors[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      vectors[v] = (__m512bh)_mm512_maskz_loadu_epi32(there[v], weight + v * kLanes);
    for (int i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[r * panel.pairs + pair]));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, vectors[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      _mm256_mask_storeu_epi16(to + r * panel.outputs + v * kLanes, there[v],
                               (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
}
#else
template <int Rows>
void multiply_tile(const Pair*, const Panel&, c10::BFloat16*, const char*, int) {}
#endif

using Multiply = void (*)(const Pair*, const Panel&, c10::BFloat16*, const char*, int);
constexpr Multiply kMultiply[kRows] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,
                                       multiply_tile<5>, multiply_tile<6>, multiply_tile<7>, multiply_tile<8>};

void multiply_panel(const Pair* x, int64_t rows, const Panel& panel, c10::BFloat16* to) {
  const int64_t tiles = (rows + kRows - 1) / kRows;
  const char* next = reinterpret_cast<const char*>(panel.weight + panel.pairs * panel.width);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * rows / tiles, count = (tile + 1) * rows / tiles - first;  // 9 rows are 4 and 5
    const int lines = tiles == 1 ? 3 : tiles == 2 ? 2 - tile : tile < 3;  // three for each pair, by the first tiles
    kMultiply[count - 1](x + first * panel.pairs, panel, to + first * panel.outputs, next, lines);
    next += lines * panel.pairs * 64;
  }
}

// x [T, K] bfloat16, weight as pack_weight returned it for [N, K], bias [N] bfloat16 -> x W^T + bias [T, N] bfloat16.
at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_packed(weight);
  const int64_t outputs = weight.size(0), pairs = weight.size(1) / 2;
  TORCH_CHECK_VALUE(x.is_cpu() && x.scalar_type() == at::kBFloat16 && x.dim() == 2 && x.is_contiguous() &&
                        x.size(1) == weight.size(1),
                    "x: wanted contiguous CPU rows of " + std::to_string(weight.size(1)) + " bfloat16, not " +
                        described(x));
  TORCH_CHECK_VALUE(!bias || (bias->is_cpu() && bias->scalar_type() == at::kBFloat16 && bias->is_contiguous() &&
                              bias->dim() == 1 && bias->size(0) == outputs),
                    "bias: wanted " + std::to_string(outputs) + " contiguous bfloat16 on a CPU");
  TORCH_CHECK(multiplies_bfloat16(), "packed_linear: this processor has no products of bfloat16 (AVX512-BF16)");
  const int64_t rows = x.size(0);
  at::Tensor out = at::empty({rows, outputs}, x.options());
  const auto* from = static_cast<const Pair*>(x.const_data_ptr());
  const auto* panels = static_cast<const Pair*>(weight.const_data_ptr());
  const auto* added = bias ? bias->const_data_ptr<c10::BFloat16>() : nullptr;
  auto* to = out.data_ptr<c10::BFloat16>();
  // What a panel costs: reading it is as much work as multiplying it with some eight rows.
  const int64_t grain = 1 + (int64_t(1) << 18) / ((rows + 8) * kPanel * (2 * pairs + 1));
  at::parallel_for(0, rows ? panels_of(outputs) : 0, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kPanel, width = width_of(i, outputs);
      float start[kPanel] = {};
      for (int64_t n = 0; added && n < width; ++n) start[n] = added[first + n];
      multiply_panel(from, rows, {panels + first * pairs, pairs, width, outputs, start}, to + first);
    }
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(course_cpu, library) {
  library.def("multiplies_bfloat16() -> bool", &multiplies_bfloat16);
  library.def("pack_weight(Tensor weight) -> Tensor", &pack_weight);
  library.def("unpack_weight(Tensor weight) -> Tensor", &unpack_weight);
  library.def("packed_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", &packed_linear);
}

}  // namespace
