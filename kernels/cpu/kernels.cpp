// A decoder layer's operations that are not large matrix products, for a CPU: each reads its input once.
//
// Every loop over features is written so that the compiler makes vector instructions of it, whichever this processor
// has: no intrinsics. Numbers are float32 or bfloat16 in memory and float32 in registers; a result is rounded once.
// What each function computes is said, and tested, in `kernels/reference.py`.
//
// vLLM: csrc/cpu/ (cpu_attn.cpp, layernorm.cpp, pos_encoding.cpp, activation.cpp), with intrinsics by instruction set.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "arguments.h"
#include "attention_bfloat16.h"
#include "numbers.h"

namespace {

// Threads get at least so many numbers each: below, waking one costs more than it saves.
constexpr int64_t kGrain = 16384;

int64_t grain(int64_t numbers_per_item) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, numbers_per_item)); }

// ---- small operations ------------------------------------------------------------------------------------------

at::Tensor rms_norm(at::Tensor x, const at::Tensor& weight, double eps, const std::optional<at::Tensor>& residual) {
  check("x", x, 2, x.size(-1));
  check("weight", weight, 1, x.size(1));
  check_like("weight", weight, "x", x);
  if (residual) {
    check("residual", *residual, 2, x.size(1));
    check_like("residual", *residual, "x", x);
    TORCH_CHECK_VALUE(residual->size(0) == x.size(0), "residual: wanted " + text(x.sizes()) + ", not " + text(residual->sizes()));
  }
  const int64_t size = x.size(1), rows = x.size(0);
  at::Tensor out = at::empty_like(x);
  for_dtype(x, [&](auto type) {
    using T = decltype(type);
    T* const xs = x.data_ptr<T>();
    const T* const ws = weight.const_data_ptr<T>();
    const T* const rs = residual ? residual->const_data_ptr<T>() : nullptr;
    T* const outs = out.data_ptr<T>();
    at::parallel_for(0, rows, grain(size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* const __restrict in = xs + row * size;
        T* const __restrict to = outs + row * size;
        if (rs) {
          const T* const __restrict add = rs + row * size;
#pragma omp simd
          for (int64_t i = 0; i < size; ++i) narrow(widen(in[i]) + widen(add[i]), &in[i]);
        }
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) sum += widen(in[i]) * widen(in[i]);
        const float factor = 1.0f / std::sqrt(sum / float(size) + float(eps));
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) narrow(widen(in[i]) * factor * widen(ws[i]), &to[i]);
      }
    });
  });
  return out;
}

at::Tensor silu_and_mul(const at::Tensor& gate_up) {
  check("gate_up", gate_up, 2, gate_up.size(-1));
  const int64_t size = gate_up.size(1) / 2, rows = gate_up.size(0);
  at::Tensor out = at::empty({rows, size}, gate_up.options());
  for_dtype(gate_up, [&](auto type) {
    using T = decltype(type);
    const T* const in = gate_up.const_data_ptr<T>();
    T* const outs = out.data_ptr<T>();
    at::parallel_for(0, rows, grain(2 * size), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* const __restrict gate = in + 2 * row * size;
        const T* const __restrict up = gate + size;
        T* const __restrict to = outs + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          const float g = widen(gate[i]);
          narrow(g / (1.0f + fast_exp(std::min(-g, 88.0f))) * widen(up[i]), &to[i]);
        }
      }
    });
  });
  return out;
}

constexpr int64_t kLine = 64;  // bytes that memory gives at once
// So many tokens ahead memory is asked for the place of a token's key and value: each is somewhere else.
constexpr int64_t kTokensAhead = 4;

// qkv [T, (H + 2 Hkv) D]: queries and keys are rotated in place, keys and values written to their slots (none if -1).
void rotary_and_cache(at::Tensor qkv, const at::Tensor& cos_sin, const at::Tensor& positions, const at::Tensor& k_cache,
                      const at::Tensor& v_cache, const at::Tensor& slots) {
  at::Tensor key_cache = stored("k_cache", k_cache), value_cache = stored("v_cache", v_cache);
  check("qkv", qkv, 2, qkv.size(-1));
  check("cos_sin", cos_sin, 2, key_cache.size(3));
  check_like("qkv", qkv, "k_cache", key_cache);
  check_like("cos_sin", cos_sin, "k_cache", key_cache);
  check_like("v_cache", value_cache, "k_cache", key_cache);
  check_indices("positions", positions, at::kLong, qkv.size(0));
  check_indices("slot_mapping", slots, at::kLong, qkv.size(0));
  const int64_t tokens = qkv.size(0), kv_heads = key_cache.size(1), block_size = key_cache.size(2),
                dim = key_cache.size(3), half = dim / 2, heads = qkv.size(1) / dim - 2 * kv_heads;
  const int64_t* const rows = positions.const_data_ptr<int64_t>();
  const int64_t* const slot_of = slots.const_data_ptr<int64_t>();
  for_dtype(qkv, [&](auto type) {
    using T = decltype(type);
    T* const all = qkv.data_ptr<T>();
    const T* const table = cos_sin.const_data_ptr<T>();
    T* const keys = key_cache.data_ptr<T>();
    T* const values = value_cache.data_ptr<T>();
    // Where head 0 of a token's key and value belongs.
    const auto place_of = [&](int64_t slot) { return (slot / block_size * kv_heads * block_size + slot % block_size) * dim; };
    at::parallel_for(0, tokens, grain(qkv.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        T* const own = all + token * qkv.size(1);
        if (const int64_t next = token + kTokensAhead; next < end && slot_of[next] >= 0) {
          for (int64_t head = 0; head < kv_heads; ++head) {
            for (int64_t i = 0; i < dim; i += kLine / int64_t(sizeof(T))) {
              __builtin_prefetch(keys + place_of(slot_of[next]) + head * block_size * dim + i, 1);
              __builtin_prefetch(values + place_of(slot_of[next]) + head * block_size * dim + i, 1);
            }
          }
        }
        const T* const __restrict cos = table + rows[token] * dim;
        const T* const __restrict sin = cos + half;
        for (int64_t head = 0; head < heads + kv_heads; ++head) {
          T* const __restrict low = own + head * dim;
          T* const __restrict high = low + half;
#pragma omp simd
          for (int64_t i = 0; i < half; ++i) {
            const float a = widen(low[i]), b = widen(high[i]), c = widen(cos[i]), s = widen(sin[i]);
            narrow(a * c - b * s, &low[i]);
            narrow(b * c + a * s, &high[i]);
          }
        }
        if (slot_of[token] < 0) continue;
        const T* const new_keys = own + heads * dim;
        for (int64_t head = 0; head < kv_heads; ++head) {
          const int64_t place = place_of(slot_of[token]) + head * block_size * dim;
          std::copy_n(new_keys + head * dim, dim, keys + place);
          std::copy_n(new_keys + (kv_heads + head) * dim, dim, values + place);
        }
      }
    });
  });
}

// ---- vectors ---------------------------------------------------------------------------------------------------

// Sixteen numbers; the compiler makes of them what the processor has: one register, two or four.
constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef int16_t SignedHalfBits __attribute__((vector_size(kLanes * sizeof(int16_t))));

inline Floats load(const float* from) {
  Floats loaded;
  std::memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

inline Floats as_floats(Bits bits) {
  Floats floats;
  std::memcpy(&floats, &bits, sizeof floats);
  return floats;
}

inline Floats load(const c10::BFloat16* from) {
  HalfBits half;
  std::memcpy(&half, from, sizeof half);
  return as_floats(__builtin_convertvector(half, Bits) << 16);
}

inline Floats load(const c10::Half* from) {  // finite ones: see `widen`
  SignedHalfBits half;
  std::memcpy(&half, from, sizeof half);
  return as_floats(Bits(__builtin_convertvector(half, Ints) << 13) & 0x8fffe000) * 0x1p112f;
}

inline void store(Floats vector, float* to) { std::memcpy(to, &vector, sizeof vector); }

// Numbers i to i + 15 of a row of `size`, zeros behind its end.
template <int size, typename T>
inline Floats load_part(const T* row, int i) {
  if (i + kLanes <= size) return load(row + i);
  float part[kLanes] = {};
  for (int j = 0; i + j < size; ++j) part[j] = widen(row[i + j]);
  return load(part);
}

// Per block of 2 * half lanes: first a's two halves added up, then b's.
template <int half>
inline Floats fold(Floats a, Floats b) {
  Ints low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / (2 * half) * 2 * half + i % half + (i & half ? kLanes : 0);
    high[i] = low[i] + half;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// Lane p of the result: the sum of the lanes of rows[p].
inline Floats sums_of_lanes(Floats (&rows)[kLanes]) {
  for (int i = 0; i < 8; ++i) rows[i] = fold<8>(rows[i], rows[i + 8]);
  for (int i = 0; i < 4; ++i) rows[i] = fold<4>(rows[i], rows[i + 4]);
  for (int i = 0; i < 2; ++i) rows[i] = fold<2>(rows[i], rows[i + 2]);
  return fold<1>(rows[0], rows[1]);
}

// ---- attention -------------------------------------------------------------------------------------------------

// One piece of work: some positions of one request, for all heads: a block's keys lie behind each other, head by head,
// and memory is faster with long streams. Several pieces of a request are merged.
struct Piece {
  int64_t request, first, last;
};

// Positions of a piece: enough to be worth a merge; fewer if there would be too few pieces for the threads to share.
constexpr int64_t kMostOfPiece = 256, kLeastOfPiece = 64;

template <int D>
constexpr int kPadded = (D + kLanes - 1) / kLanes* kLanes;

// Which cache prefetched lines go to, the second: see attention_bfloat16.cpp (here 21 against 14 GB/s).
constexpr int kFar = 2;

// Row of the caches, seen as [rows, D], in which the first KV head's part of a position lies.
inline int64_t row_of(const int32_t* table, int64_t position, int64_t kv_heads, int64_t block_size) {
  return table[position / block_size] * kv_heads * block_size + position % block_size;
}

// Sixteen positions (the first `count` of them count) for G query heads of one KV head: adds exp(score - best) * value
// to acc, and exp(score - best) to total. query [G, kPadded], zeros behind D; acc [G, kPadded], best and total [G].
// Along the way it asks memory for the sixteen positions at next_keys and next_values, a line at a time, since memory
// cannot guess which block comes next, and takes no more requests than it has places for.
template <typename T, int D, int G>
inline void attend_chunk(const float* query, const T* keys, const T* values, const T* next_keys, const T* next_values,
                         int count, float* acc, float* best, float* total) {
  constexpr int width = kPadded<D>, vectors = width / kLanes, half = kLanes / 2;
  Floats products[G][kLanes];
  for (int first = 0; first < kLanes; first += half) {  // half of them at a time: what registers hold
    Floats sums[G][half] = {};
    for (int i = 0; i < vectors; ++i) {
      Floats parts[G];
      for (int g = 0; g < G; ++g) parts[g] = load(query + g * width + i * kLanes);
      for (int p = 0; p < half; ++p) {
        const Floats key = load_part<D>(keys + std::min(first + p, count - 1) * D, i * kLanes);
        __builtin_prefetch(next_keys + (first + p) * D + i * kLanes, 0, kFar);
        for (int g = 0; g < G; ++g) sums[g][p] += parts[g] * key;
      }
    }
    for (int g = 0; g < G; ++g)
      for (int p = 0; p < half; ++p) products[g][first + p] = sums[g][p];
  }
  float weights[G][kLanes], shrink[G];
  for (int g = 0; g < G; ++g) {
    store(sums_of_lanes(products[g]), weights[g]);
    float highest = best[g], sum = 0;
#pragma omp simd reduction(max : highest)
    for (int p = 0; p < kLanes; ++p) highest = std::max(highest, weights[g][p]);  // the last one is there repeatedly
#pragma omp simd reduction(+ : sum)
    for (int p = 0; p < kLanes; ++p) {
      weights[g][p] = p < count ? fast_exp(weights[g][p] - highest) : 0;
      sum += weights[g][p];
    }
    shrink[g] = fast_exp(best[g] - highest);
    total[g] = total[g] * shrink[g] + sum;
    best[g] = highest;
  }
  Floats kept[G][vectors];
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < vectors; ++i) kept[g][i] = load(acc + g * width + i * kLanes) * shrink[g];
  for (int p = 0; p < count; ++p) {
    for (int i = 0; i < vectors; ++i) {
      const Floats value = load_part<D>(values + p * D, i * kLanes);
      __builtin_prefetch(next_values + p * D + i * kLanes, 0, kFar);
      for (int g = 0; g < G; ++g) kept[g][i] += weights[g][p] * value;
    }
  }
  for (int g = 0; g < G; ++g)
    for (int i = 0; i < vectors; ++i) store(kept[g][i], acc + g * width + i * kLanes);
}

// The chunks of a piece, for all heads. query, acc [H, kPadded], best and total [H]. Work goes on at `row_after`.
template <typename T, int D>
void attend_piece(const float* query, const T* keys, const T* values, const int32_t* table, const Piece& piece,
                  int64_t row_after, int64_t kv_heads, int64_t block_size, int64_t group, float* acc, float* best,
                  float* total) {
  constexpr int width = kPadded<D>;
  const int64_t heads = kv_heads * group;
  std::fill_n(acc, heads * width, 0.0f);
  std::fill_n(best, heads, -std::numeric_limits<float>::infinity());
  std::fill_n(total, heads, 0.0f);
  for (int64_t start = piece.first; start < piece.last;) {
    const int64_t offset = start % block_size;
    const int count = int(std::min({block_size - offset, piece.last - start, int64_t(kLanes)}));
    const int64_t row = row_of(table, start, kv_heads, block_size);
    const int64_t next_row = start + count < piece.last ? row_of(table, start + count, kv_heads, block_size) : row_after;
    for (int64_t head = 0; head < heads;) {
      const int64_t place = (row + head / group * block_size) * D;
      const int64_t left = group - head % group;  // of those that share this KV head: three at a time fit the registers
      const auto attend = [&](auto together) {
        constexpr int G = decltype(together)::value;
        const int64_t ahead = (next_row + head / group * block_size) * D;
        attend_chunk<T, D, G>(query + head * width, keys + place, values + place, keys + ahead, values + ahead, count,
                              acc + head * width, best + head, total + head);
        head += G;
      };
      if (left >= 3) {
        attend(std::integral_constant<int, 3>{});
      } else if (left == 2) {
        attend(std::integral_constant<int, 2>{});
      } else {
        attend(std::integral_constant<int, 1>{});
      }
    }
    start += count;
  }
}

template <typename T, int D>
void attend(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
            const at::Tensor& block_table, const at::Tensor& seq_lens, double scale, int64_t window,
            const at::Tensor& out) {
  constexpr int width = kPadded<D>;
  const int64_t requests = query.size(0), heads = query.size(1), kv_heads = key_cache.size(1),
                block_size = key_cache.size(2), group = heads / kv_heads, table_width = block_table.stride(0);
  const int32_t* const lens = seq_lens.const_data_ptr<int32_t>();
  const int32_t* const tables = block_table.const_data_ptr<int32_t>();
  const T* const queries = query.const_data_ptr<T>();
  const T* const keys = key_cache.const_data_ptr<T>();
  const T* const values = value_cache.const_data_ptr<T>();
  T* const outs = out.data_ptr<T>();

  const auto first_of = [&](int64_t request) { return window > 0 ? std::max<int64_t>(0, lens[request] - window) : 0; };
  int64_t positions = 0;
  for (int64_t request = 0; request < requests; ++request) positions += lens[request] - first_of(request);
  const int64_t length = std::clamp(positions / (4 * at::get_num_threads()) / kLanes * kLanes, kLeastOfPiece, kMostOfPiece);
  std::vector<Piece> pieces;
  std::vector<int64_t> first_piece;  // of each request, and the end
  for (int64_t request = 0; request < requests; ++request) {
    first_piece.push_back(int64_t(pieces.size()));
    int64_t first = first_of(request);
    do {  // the last one may be half as long again
      const int64_t left = lens[request] - first, last = left < length + length / 2 ? lens[request] : first + length;
      pieces.push_back({request, first, last});
      first = last;
    } while (first < lens[request]);
  }
  first_piece.push_back(int64_t(pieces.size()));

  const int64_t stride = heads * (width + 2);  // per piece: acc [H, width], best [H], total [H]
  std::vector<float> partial(pieces.size() * stride);
  const bool in_pairs = course_cpu::attends_bfloat16(D);
  at::parallel_for(0, int64_t(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scaled(heads * width);
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      const T* const own = queries + piece.request * query.stride(0);
      const Piece& after = pieces[std::min(i + 1, end - 1)];
      const int64_t row_after = after.first < after.last
                                    ? row_of(tables + after.request * table_width, after.first, kv_heads, block_size)
                                    : 0;
      float* const acc = partial.data() + i * stride;
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        if (in_pairs) {
          course_cpu::attend_bfloat16(D, {own, keys, values, tables + piece.request * table_width, piece.first,
                                          piece.last, row_after, kv_heads, group, block_size, float(scale)},
                                      acc, acc + heads * width, acc + heads * (width + 1));
          continue;
        }
      }
      for (int64_t head = 0; head < heads; ++head)
        for (int j = 0; j < D; ++j) scaled[head * width + j] = widen(own[head * D + j]) * float(scale);
      attend_piece<T, D>(scaled.data(), keys, values, tables + piece.request * table_width, piece, row_after, kv_heads,
                         block_size, group, acc, acc + heads * width, acc + heads * (width + 1));
    }
  });
  at::parallel_for(0, requests, grain(heads * D), [&](int64_t begin, int64_t end) {
    for (int64_t request = begin; request < end; ++request) {
      for (int64_t head = 0; head < heads; ++head) {
        float best = -std::numeric_limits<float>::infinity(), total = 0, sum[D] = {};
        for (int64_t i = first_piece[request]; i < first_piece[request + 1]; ++i)
          best = std::max(best, partial[i * stride + heads * width + head]);
        for (int64_t i = first_piece[request]; i < first_piece[request + 1]; ++i) {
          const float* const part = partial.data() + i * stride;
          const float own = part[heads * (width + 1) + head];
          const float weight = own > 0 ? fast_exp(part[heads * width + head] - best) : 0;
          total += weight * own;
          for (int j = 0; j < D; ++j) sum[j] += weight * part[head * width + j];
        }
        T* const to = outs + (request * heads + head) * D;
        for (int j = 0; j < D; ++j) narrow(total > 0 ? sum[j] / total : 0, &to[j]);
      }
    }
  });
}

constexpr int kHeadSizes[] = {8, 16, 32, 64, 80, 96, 128, 256};

std::vector<int64_t> head_sizes() { return {std::begin(kHeadSizes), std::end(kHeadSizes)}; }

template <typename T, size_t... I>
bool attend_by_size(int64_t dim, std::index_sequence<I...>, const auto&... arguments) {
  return ((dim == kHeadSizes[I] && (attend<T, kHeadSizes[I]>(arguments...), true)) || ...);
}

at::Tensor paged_attention_decode(const at::Tensor& query, const at::Tensor& k_cache, const at::Tensor& v_cache,
                                  const at::Tensor& block_table, const at::Tensor& seq_lens, double scale,
                                  std::optional<int64_t> sliding_window) {
  const at::Tensor key_cache = stored("k_cache", k_cache), value_cache = stored("v_cache", v_cache);
  check_like("v_cache", value_cache, "k_cache", key_cache);
  check_like("query", query, "k_cache", key_cache);
  TORCH_CHECK_VALUE(query.dim() == 3 && query.stride(2) == 1 && query.stride(1) == query.size(2) &&
                        query.size(2) == key_cache.size(3) && query.size(1) % key_cache.size(1) == 0,
                    "query: wanted [B, H, D] with contiguous heads as the caches have them, not " + described(query));
  TORCH_CHECK_VALUE(block_table.dim() == 2 && block_table.size(0) == query.size(0) && block_table.stride(1) == 1 &&
                        block_table.scalar_type() == at::kInt,
                    "block_table: wanted int32 [B, MB] with contiguous rows, not " + described(block_table));
  check_indices("seq_lens", seq_lens, at::kInt, query.size(0));
  at::Tensor out = at::empty(query.sizes(), query.options());
  bool compiled = false;
  for_dtype(query, [&](auto type) {
    compiled = attend_by_size<decltype(type)>(query.size(2), std::make_index_sequence<std::size(kHeadSizes)>{}, query,
                                              key_cache, value_cache, block_table, seq_lens, scale,
                                              sliding_window.value_or(0), out);
  });
  TORCH_CHECK_VALUE(compiled, "query: heads of " + std::to_string(query.size(2)) + "; compiled are " + text(head_sizes()));
  return out;
}

// ---- products --------------------------------------------------------------------------------------------------

// A function of its own: of pointers that a lambda has captured the compiler makes no vector instructions.
template <typename W>
inline float dot(const W* __restrict weights, const float* __restrict x, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += widen(weights[i]) * x[i];
  return sum;
}

// Rows of either factor that are multiplied together: what registers hold the sums of.
#ifdef __AVX512F__
constexpr int kTile = 4;
#else
constexpr int kTile = 2;
#endif
static_assert(kTile * kTile <= kLanes);

// Sixteen numbers of a row from i on, zeros behind its end.
template <typename T>
inline Floats load_until(const T* row, int64_t i, int64_t size) {
  T part[kLanes] = {};
  std::memcpy(part, row + i, std::min<int64_t>(kLanes, size - i) * sizeof(T));
  return load(part);
}

// products[w * kTile + r] = the product of rows w of `weights` and r of `xs`.
template <typename W>
inline void multiply_tile(const W* const (&weights)[kTile], const float* const (&xs)[kTile], int64_t size,
                          const W* next, float* products) {
  Floats sums[kLanes] = {};
  const auto add = [&](const auto& load_from) {
    Floats x[kTile];
    for (int r = 0; r < kTile; ++r) x[r] = load_from(xs[r]);
    for (int w = 0; w < kTile; ++w, next += kLanes) __builtin_prefetch(next);
    for (int w = 0; w < kTile; ++w) {
      const Floats weight = load_from(weights[w]);
      for (int r = 0; r < kTile; ++r) sums[w * kTile + r] += weight * x[r];
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) add([i](const auto* row) { return load(row + i); });
  if (i < size) add([=](const auto* row) { return load_until(row, i, size); });
  store(sums_of_lanes(sums), products);
}

template <typename W>
void multiply_rows(const float* x, const W* weight, float* to, int64_t rows, int64_t inputs, int64_t outputs) {
  if (rows == 1) {
    at::parallel_for(0, outputs, grain(inputs), [&](int64_t begin, int64_t end) {
      // Not several rows at once: memory is faster with one stream at a time.
      for (int64_t row = begin; row < end; ++row) to[row] = dot(weight + row * inputs, x, inputs);
    });
    return;
  }
  at::parallel_for(0, (outputs + kTile - 1) / kTile, grain(kTile * inputs), [&](int64_t begin, int64_t end) {
    for (int64_t output = begin * kTile; output < std::min(end * kTile, outputs); output += kTile) {
      for (int64_t row = 0; row < rows; row += kTile) {
        const W* weights[kTile];
        const float* xs[kTile];
        for (int i = 0; i < kTile; ++i) {  // at the end the last row stands in for those that are not there
          weights[i] = weight + std::min(output + i, outputs - 1) * inputs;
          xs[i] = x + std::min(row + i, rows - 1) * inputs;
        }
        float products[kLanes];
        multiply_tile(weights, xs, inputs, weight + (output + kTile) * inputs, products);
        for (int w = 0; w < std::min<int64_t>(kTile, outputs - output); ++w)
          for (int r = 0; r < std::min<int64_t>(kTile, rows - row); ++r)
            to[(row + r) * outputs + output + w] = products[w * kTile + r];
      }
    }
  });
}

// x [T, K] float32, weight [N, K] float32 or finite float16 -> [T, N] float32, as if the weight had been float32.
at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight) {
  check("x", x, 2, weight.size(-1));
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, "x: wanted rows of float32, not " + described(x));
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous() && weight.is_cpu() &&
                        (weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kHalf),
                    "weight: wanted a contiguous CPU matrix of float32 or float16, not " + described(weight));
  at::Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  const auto multiply = [&](auto type) {
    using W = decltype(type);
    multiply_rows(x.const_data_ptr<float>(), weight.const_data_ptr<W>(), out.data_ptr<float>(), x.size(0), x.size(1),
                  weight.size(0));
  };
  if (weight.scalar_type() == at::kFloat) {
    multiply(float{});
  } else {
    multiply(c10::Half{});
  }
  return out;
}

TORCH_LIBRARY(course_cpu, library) {
  library.def("rms_norm(Tensor(a!) x, Tensor weight, float eps, Tensor? residual=None) -> Tensor", &rms_norm);
  library.def("silu_and_mul(Tensor gate_up) -> Tensor", &silu_and_mul);
  library.def(
      "rotary_and_cache(Tensor(a!) qkv, Tensor cos_sin, Tensor positions, Tensor(b!) k_cache, Tensor(c!) v_cache, "
      "Tensor slot_mapping) -> ()",
      &rotary_and_cache);
  library.def(
      "paged_attention_decode(Tensor query, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seq_lens, "
      "float scale, *, int? sliding_window=None) -> Tensor",
      &paged_attention_decode);
  library.def("head_sizes() -> int[]", &head_sizes);
  library.def("few_rows_linear(Tensor x, Tensor weight) -> Tensor", &few_rows_linear);
}

}  // namespace
