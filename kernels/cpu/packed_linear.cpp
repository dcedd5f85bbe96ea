// Products with a weight laid out for them, on processors with vectors of sixteen floats (AVX-512).
//
// bfloat16: one instruction (VDPBF16PS) adds to sixteen float32 sums the products of sixteen pairs with sixteen other
// pairs. So the weight lies in panels of 48 outputs, three vectors: for each pair of inputs, the pair's two numbers for
// every output of the panel. A tile is eight rows of x by one panel: 24 sums stay in registers, and each step loads
// three vectors of the weight and one pair of each row. Few rows are bound by reading the weight, many by arithmetic: so
// the tiles of one panel, which the cache holds by then, also ask for the next.
//
// float32 has the same tiles and no pairs. Its weights are float16 numbers, as models are stored, half as long to read
// and widened exactly. So that float32 stays as exact as it can be, sums begin anew every kInBlock inputs.
//
// The compiler has no loop that it would make this of, hence the intrinsics. Other processors and weights multiply as
// `course_lib/layers/cpu_matmul.py` says. After Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (2008); vLLM: csrc/cpu/sgl-kernels/gemm.cpp.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "arguments.h"
#include "instructions.h"
#include "numbers.h"

namespace {

constexpr int kLanes = 16;                 // sums in a vector, and pairs
constexpr int kVectors = 3;                // in a panel
constexpr int kPanel = kVectors * kLanes;  // outputs
constexpr int kRows = 8;                   // in a tile
constexpr int64_t kInBlock = 64;           // inputs whose products are added up one after the other

using Pair = uint32_t;  // two bfloat16 of neighbouring inputs
using Half = uint16_t;  // one float16

// ---- layout ----------------------------------------------------------------------------------------------------

// A weight [N, steps] of pairs or halves. Panel p begins at kPanel * p * steps; its width is kPanel or what is left of N.
int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

int64_t width_of(int64_t panel, int64_t outputs) { return std::min<int64_t>(kPanel, outputs - panel * kPanel); }

// Copies a weight from rows to panels, or back.
template <typename Unit>
void rearrange(const at::Tensor& from, const at::Tensor& to, bool into_panels) {
  const int64_t outputs = from.size(0), steps = from.size(1) * 2 / int64_t(sizeof(Unit));
  const auto* source = static_cast<const Unit*>(from.const_data_ptr());
  auto* target = static_cast<Unit*>(to.data_ptr());
  at::parallel_for(0, panels_of(outputs), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, width = width_of(panel, outputs);
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t i = 0; i < width; ++i) {
          const int64_t row = (first + i) * steps + step, in_panel = first * steps + step * width + i;
          target[into_panels ? in_panel : row] = source[into_panels ? row : in_panel];
        }
      }
    }
  });
}

void check_weight(const at::Tensor& weight, bool right_dtype, const std::string& wanted) {
  TORCH_CHECK_VALUE(weight.is_cpu() && right_dtype && weight.dim() == 2 && weight.is_contiguous(),
                    "weight: wanted " + wanted + ", not " + described(weight));
}

void check_columns(const at::Tensor& weight, bool pairs) {
  TORCH_CHECK_VALUE(!pairs || weight.size(1) % 2 == 0,
                    "weight: wanted an even number of columns for bfloat16, not " + described(weight));
}

// weight [N, K] bfloat16 (K even) or float16 -> uint16 [N, K]: its bits in panels, for the two functions below only.
at::Tensor pack_weight(const at::Tensor& weight) {
  const bool pairs = weight.scalar_type() == at::kBFloat16;
  check_weight(weight, pairs || weight.scalar_type() == at::kHalf, "a contiguous CPU matrix of bfloat16 or float16");
  check_columns(weight, pairs);
  at::Tensor packed = at::empty(weight.sizes(), weight.options().dtype(at::kUInt16));
  pairs ? rearrange<Pair>(weight, packed, true) : rearrange<Half>(weight, packed, true);
  return packed;
}

// What pack_weight was given, which had this dtype.
at::Tensor unpack_weight(const at::Tensor& weight, at::ScalarType dtype) {
  const bool pairs = dtype == at::kBFloat16;
  check_weight(weight, weight.scalar_type() == at::kUInt16, "what pack_weight returned");
  TORCH_CHECK_VALUE(pairs || dtype == at::kHalf, "dtype: wanted bfloat16 or float16, not " + text(dtype));
  check_columns(weight, pairs);
  at::Tensor plain = at::empty(weight.sizes(), weight.options().dtype(dtype));
  pairs ? rearrange<Pair>(weight, plain, false) : rearrange<Half>(weight, plain, false);
  return plain;
}

// ---- product ---------------------------------------------------------------------------------------------------

// A panel of the weight, and what the tiles on it share.
template <typename Unit>
struct Panel {
  const Unit* weight;
  int64_t steps;      // pairs of inputs, or inputs
  int64_t width;      // outputs
  int64_t outputs;    // of the whole weight: from one row of the result to the next
  const float* bias;  // kPanel numbers
};

#ifdef HAS_AVX512

// Which of the outputs of vector v are there.
template <typename Unit>
inline __mmask16 there(const Panel<Unit>& panel, int v) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(panel.width - v * kLanes, 0, kLanes)) - 1);
}

// x [Rows, steps], to [Rows, width]. At every step, `lines` cache lines from `next` on are asked for.
template <int Rows>
FOR_BFLOAT16 void multiply_tile(const Pair* x, const Panel<Pair>& panel, c10::BFloat16* to, const char* next,
                                int lines) {
  const __mmask16 masks[kVectors] = {there(panel, 0), there(panel, 1), there(panel, 2)};
  __m512 sums[Rows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_loadu_ps(panel.bias + v * kLanes);
  const Pair* weight = panel.weight;
  for (int64_t step = 0; step < panel.steps; ++step, weight += panel.width) {
    __m512bh vectors[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) vectors[v] = (__m512bh)_mm512_maskz_loadu_epi32(masks[v], weight + v * kLanes);
    for (int i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[r * panel.steps + step]));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, vectors[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      _mm256_mask_storeu_epi16(to + r * panel.outputs + v * kLanes, masks[v], (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
}

template <int Rows>
FOR_FLOAT32 void multiply_tile(const float* x, const Panel<Half>& panel, float* to, const char* next, int lines) {
  const __mmask16 masks[kVectors] = {there(panel, 0), there(panel, 1), there(panel, 2)};
  __m512 totals[Rows][kVectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) totals[r][v] = _mm512_loadu_ps(panel.bias + v * kLanes);
  const Half* weight = panel.weight;
  for (int64_t begin = 0; begin < panel.steps; begin += kInBlock) {
    __m512 sums[Rows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
    for (int64_t step = begin; step < std::min(begin + kInBlock, panel.steps); ++step, weight += panel.width) {
      __m512 vectors[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        vectors[v] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(masks[v], weight + v * kLanes));
      for (int i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const __m512 one = _mm512_set1_ps(x[r * panel.steps + step]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_fmadd_ps(one, vectors[v], sums[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) totals[r][v] = _mm512_add_ps(totals[r][v], sums[r][v]);
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v)
      _mm512_mask_storeu_ps(to + r * panel.outputs + v * kLanes, masks[v], totals[r][v]);
}

#else

template <int Rows, typename X, typename Unit, typename Number>
void multiply_tile(const X*, const Panel<Unit>&, Number*, const char*, int) {}

#endif

// The tiles of a panel, as equal as can be: 9 rows are 4 and 5. Together they ask for the next panel.
template <typename X, typename Unit, typename Number, size_t... I>
void multiply_panel(const X* x, int64_t rows, const Panel<Unit>& panel, Number* to, std::index_sequence<I...>) {
  using Multiply = void (*)(const X*, const Panel<Unit>&, Number*, const char*, int);
  constexpr Multiply multiply[kRows] = {multiply_tile<I + 1>...};
  constexpr int kLines = (kPanel * sizeof(Unit) + 63) / 64;  // of cache, per step
  const int64_t tiles = (rows + kRows - 1) / kRows;
  const char* next = reinterpret_cast<const char*>(panel.weight + panel.steps * panel.width);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * rows / tiles, count = (tile + 1) * rows / tiles - first;
    const int lines = int((tile + 1) * kLines / tiles - tile * kLines / tiles);
    multiply[count - 1](x + first * panel.steps, panel, to + first * panel.outputs, next, lines);
    next += lines * panel.steps * 64;
  }
}

// X: what a row of x is read as, a step at a time.
template <typename X, typename Unit, typename Number>
void multiply(const at::Tensor& x, const at::Tensor& weight, const Number* bias, const at::Tensor& out) {
  const int64_t rows = x.size(0), outputs = weight.size(0), steps = x.size(1) * sizeof(Number) / sizeof(X);
  const auto* from = static_cast<const X*>(x.const_data_ptr());
  const auto* panels = static_cast<const Unit*>(weight.const_data_ptr());
  auto* to = out.data_ptr<Number>();
  // What a panel costs: reading it is as much work as multiplying it with some eight rows.
  const int64_t grain = 1 + (int64_t(1) << 18) / ((rows + 8) * kPanel * (x.size(1) + 1));
  at::parallel_for(0, rows ? panels_of(outputs) : 0, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kPanel, width = width_of(i, outputs);
      float start[kPanel] = {};
      for (int64_t n = 0; bias && n < width; ++n) start[n] = widen(bias[first + n]);
      multiply_panel(from, rows, Panel<Unit>{panels + first * steps, steps, width, outputs, start}, to + first,
                     std::make_index_sequence<kRows>{});
    }
  });
}

// x [T, K], weight as pack_weight returned it for [N, K], bias [N] -> x W^T + bias [T, N]. All bfloat16; or all float32
// and the weight float16.
at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_weight(weight, weight.scalar_type() == at::kUInt16, "what pack_weight returned");
  check("x", x, 2, weight.size(1));
  const bool pairs = x.scalar_type() == at::kBFloat16;
  check_columns(weight, pairs);
  if (bias) {
    check("bias", *bias, 1, weight.size(0));
    check_like("bias", *bias, "x", x);
  }
  TORCH_CHECK(pairs ? multiplies_bfloat16() : multiplies_float32(),
              "packed_linear: this processor has not the instructions for " + text(x.scalar_type()));
  at::Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  if (pairs) {
    multiply<Pair, Pair>(x, weight, bias ? bias->const_data_ptr<c10::BFloat16>() : nullptr, out);
  } else {
    multiply<float, Half>(x, weight, bias ? bias->const_data_ptr<float>() : nullptr, out);
  }
  return out;
}

TORCH_LIBRARY_FRAGMENT(course_cpu, library) {
  library.def("multiplies_bfloat16() -> bool", &multiplies_bfloat16);
  library.def("multiplies_float32() -> bool", &multiplies_float32);
  library.def("pack_weight(Tensor weight) -> Tensor", &pack_weight);
  library.def("unpack_weight(Tensor weight, ScalarType dtype) -> Tensor", &unpack_weight);
  library.def("packed_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", &packed_linear);
}

}  // namespace
