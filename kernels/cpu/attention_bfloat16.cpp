// Attention over a piece of a request's cache, bfloat16, on processors that multiply pairs of bfloat16.
//
// Three passes over a piece, which is short enough that its scores stay in the cache: all scores, all exponentials, all
// weighted values. A product of pairs (VDPBF16PS) adds two products to each of sixteen float32 sums. For scores the
// pairs are neighbouring dimensions, as they lie in memory, and the sixteen sums are added up at the end, for sixteen
// positions at once. For values the pairs are neighbouring positions, two rows of the cache interleaved; weights are
// rounded to bfloat16 before they are used and added up, so that they still sum to one.
//
// Memory is asked for a chunk ahead, into the second cache: the first has few places for lines that are on their way
// (here 23 against 15 GB/s with two cores).
//
// vLLM: csrc/cpu/cpu_attn_*.hpp.

#include "attention_bfloat16.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>

#include "instructions.h"
#include "numbers.h"

namespace {

using c10::BFloat16;
using course_cpu::BFloat16Piece;

constexpr int kLanes = 16;     // sums in a vector
constexpr int kInVector = 32;  // bfloat16 numbers in a vector

#ifdef HAS_AVX512

// Row of a cache, seen as [rows, D], in which the first KV head's part of a position lies.
int64_t row_of(const BFloat16Piece& piece, int64_t position) {
  return piece.table[position / piece.block_size] * piece.kv_heads * piece.block_size + position % piece.block_size;
}

FOR_BFLOAT16 inline __m512bh load(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

// Lanes 2i and 2i + 1 of `both`: the sums of those lanes of a and of b.
FOR_BFLOAT16 inline __m512 fold_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, a, _mm512_moveldup_ps(b)),
                       _mm512_mask_blend_ps(0xaaaa, _mm512_movehdup_ps(a), b));
}

// Eight vectors -> per pair of lanes 2i, 2i + 1 two numbers that add up to the sum of all lanes of rows[i].
FOR_BFLOAT16 inline __m512 fold_eight(__m512 (&rows)[8]) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i)
    rows[i] = _mm512_add_ps(_mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x44),
                            _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xee));
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i)
    rows[i] = _mm512_add_ps(_mm512_permutex2var_ps(rows[i], low, rows[i + 2]),
                            _mm512_permutex2var_ps(rows[i], high, rows[i + 2]));
  return _mm512_add_ps(_mm512_shuffle_ps(rows[0], rows[1], 0x44), _mm512_shuffle_ps(rows[0], rows[1], 0xee));
}

// scores[g * stride + p] = scale * query g times key p, for G heads and sixteen positions, of which `count` are there.
// Asks for as much memory behind `next`.
template <int Vectors, int G>
FOR_BFLOAT16 void multiply_keys(const BFloat16* query, const BFloat16* keys, const BFloat16* next, int count,
                                float scale, float* scores, int64_t stride) {
  constexpr int D = Vectors * kInVector, kHalf = kLanes / 2;
  __m512 halves[2][G];
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {  // half of the positions at a time
    __m512 sums[G][kHalf];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i)
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) sums[g][i] = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      __m512bh parts[G];
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) parts[g] = load(query + g * D + v * kInVector);
#pragma GCC unroll 8
      for (int i = 0; i < kHalf; ++i) {
        const int position = 2 * i + odd;
        const __m512bh key = load(keys + std::min(position, count - 1) * D + v * kInVector);
        _mm_prefetch(next + position * D + v * kInVector, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) sums[g][i] = _mm512_dpbf16_ps(sums[g][i], parts[g], key);
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) halves[odd][g] = fold_eight(sums[g]);
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g)
    _mm512_storeu_ps(scores + g * stride,
                     _mm512_mul_ps(fold_pairs(halves[0][g], halves[1][g]), _mm512_set1_ps(scale)));
}

// acc[g] += the sum over `count` positions of weights[g * stride + p] * value p. acc [G, D] in the order that
// interleaving two rows makes: see in_order.
template <int Vectors, int G>
FOR_BFLOAT16 void add_values(const BFloat16* weights, int64_t stride, const BFloat16* values, const BFloat16* next,
                             int count, float* acc) {
  constexpr int D = Vectors * kInVector;
  __m512 sums[G][2 * Vectors];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int i = 0; i < 2 * Vectors; ++i) sums[g][i] = _mm512_loadu_ps(acc + g * D + i * kLanes);
  for (int p = 0; p < count; p += 2) {
    const bool alone = p + 1 == count;
    const BFloat16* const other = values + (alone ? p : p + 1) * D;
    __m512bh pairs[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      uint32_t both = 0;
      std::memcpy(&both, weights + g * stride + p, 4);
      pairs[g] = (__m512bh)_mm512_set1_epi32(static_cast<int>(alone ? both & 0xffff : both));
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const __m512i one = _mm512_loadu_si512(values + p * D + v * kInVector);
      const __m512i two = _mm512_loadu_si512(other + v * kInVector);
      _mm_prefetch(next + p * D + v * kInVector, _MM_HINT_T1);
      _mm_prefetch(next + (p + 1) * D + v * kInVector, _MM_HINT_T1);
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(one, two), high = (__m512bh)_mm512_unpackhi_epi16(one, two);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        sums[g][2 * v] = _mm512_dpbf16_ps(sums[g][2 * v], pairs[g], low);
        sums[g][2 * v + 1] = _mm512_dpbf16_ps(sums[g][2 * v + 1], pairs[g], high);
      }
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int i = 0; i < 2 * Vectors; ++i) _mm512_storeu_ps(acc + g * D + i * kLanes, sums[g][i]);
}

// 32 sums as add_values leaves them (of every eight dimensions four in the first vector, four in the second), in order.
FOR_BFLOAT16 inline void in_order(float* sums) {
  const __m512i begin = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i end = _mm512_add_epi32(begin, _mm512_set1_epi32(8));
  const __m512 low = _mm512_loadu_ps(sums), high = _mm512_loadu_ps(sums + kLanes);
  _mm512_storeu_ps(sums, _mm512_permutex2var_ps(low, begin, high));
  _mm512_storeu_ps(sums + kLanes, _mm512_permutex2var_ps(low, end, high));
}

// scores [size] -> weights: exp(score - the highest), rounded; and the highest, and the sum of the weights.
void weigh(float* scores, int64_t size, BFloat16* weights, float* best, float* total) {
  float highest = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < size; ++i) highest = std::max(highest, scores[i]);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) scores[i] = fast_exp(scores[i] - highest);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) narrow(scores[i], &weights[i]);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += widen(weights[i]);
  *best = highest;
  *total = sum;
}

// Calls work(row, the next one's, positions before, count) for sixteen positions or fewer of one block after the
// other: where the first KV head's part of them begins in a `cache`. Behind the last comes `after`.
template <int D, typename Work>
void for_chunks(const BFloat16Piece& piece, const BFloat16* cache, const BFloat16* after, const Work& work) {
  for (int64_t start = piece.first; start < piece.last;) {
    const int64_t in_block = piece.block_size - start % piece.block_size;
    const int count = int(std::min({in_block, piece.last - start, int64_t(kLanes)}));
    const int64_t next = start + count;
    work(cache + row_of(piece, start) * D, next < piece.last ? cache + row_of(piece, next) * D : after,
         start - piece.first, count);
    start = next;
  }
}

// Calls work(first head, its KV head, how many) for all heads, at most `Most` that share a KV head at a time.
template <int Most, typename Work>
void for_heads(const BFloat16Piece& piece, const Work& work) {
  for (int64_t kv_head = 0; kv_head < piece.kv_heads; ++kv_head) {
    int64_t head = kv_head * piece.group;
    for (const int64_t end = head + piece.group; head < end;) {
      const int64_t together = std::min<int64_t>(Most, end - head);
      if (together == 3) work(head, kv_head, std::integral_constant<int, 3>{});
      if (together == 2) work(head, kv_head, std::integral_constant<int, 2>{});
      if (together == 1) work(head, kv_head, std::integral_constant<int, 1>{});
      head += together;
    }
  }
}

template <int Vectors>
void attend(const BFloat16Piece& piece, float* acc, float* best, float* total) {
  constexpr int D = Vectors * kInVector, kMost = Vectors <= 4 ? 3 : 1;  // what registers hold
  const int64_t heads = piece.kv_heads * piece.group, positions = piece.last - piece.first;
  const int64_t stride = positions + kLanes;  // sixteen are written at a time
  const std::unique_ptr<float[]> scores(new float[heads * stride]);
  const std::unique_ptr<BFloat16[]> weights(new BFloat16[heads * stride]);
  std::fill_n(acc, heads * D, 0.0f);
  const int64_t part = piece.block_size * D;  // of a KV head in a block
  const auto multiply = [&](const BFloat16* keys, const BFloat16* next, int64_t before, int count) {
    for_heads<kMost>(piece, [&](int64_t head, int64_t kv_head, auto together) {
      multiply_keys<Vectors, decltype(together)::value>(piece.query + head * D, keys + kv_head * part,
                                                        next + kv_head * part, count, piece.scale,
                                                        &scores[head * stride + before], stride);
    });
  };
  const auto add = [&](const BFloat16* values, const BFloat16* next, int64_t before, int count) {
    for_heads<kMost>(piece, [&](int64_t head, int64_t kv_head, auto together) {
      add_values<Vectors, decltype(together)::value>(&weights[head * stride + before], stride,
                                                     values + kv_head * part, next + kv_head * part, count,
                                                     acc + head * D);
    });
  };
  for_chunks<D>(piece, piece.keys, piece.values + (positions ? row_of(piece, piece.first) * D : 0), multiply);
  for (int64_t head = 0; head < heads; ++head)
    weigh(&scores[head * stride], positions, &weights[head * stride], &best[head], &total[head]);
  for_chunks<D>(piece, piece.values, piece.keys + piece.row_after * D, add);
  for (int64_t i = 0; i < heads * Vectors; ++i) in_order(acc + i * kInVector);
}

#endif

}  // namespace

namespace course_cpu {

bool attends_bfloat16(int64_t head_size) {
  return multiplies_bfloat16() && (head_size == 32 || head_size == 64 || head_size == 96 || head_size == 128 ||
                                   head_size == 256);
}

void attend_bfloat16([[maybe_unused]] int64_t head_size, [[maybe_unused]] const BFloat16Piece& piece,
                     [[maybe_unused]] float* acc, [[maybe_unused]] float* best, [[maybe_unused]] float* total) {
#ifdef HAS_AVX512
  switch (head_size / kInVector) {
    case 1: return attend<1>(piece, acc, best, total);
    case 2: return attend<2>(piece, acc, best, total);
    case 3: return attend<3>(piece, acc, best, total);
    case 4: return attend<4>(piece, acc, best, total);
    default: return attend<8>(piece, acc, best, total);
  }
#endif
}

}  // namespace course_cpu
