// Attention over a piece of a request's cache in products of bfloat16 pairs: see attention_bfloat16.cpp.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace course_cpu {

struct BFloat16Piece {
  const c10::BFloat16* query;                   // [H, D]
  const c10::BFloat16* keys;                    // the cache as it lies, [NB, Hkv, BS, D]
  const c10::BFloat16* values;                  // likewise
  const int32_t* table;                         // the request's blocks
  int64_t first, last;                          // positions
  int64_t row_after;                            // of a cache seen as [rows, D]: where the work goes on
  int64_t kv_heads, group, block_size;
  float scale;
};

// Whether this processor, and heads of this size, can be had.
bool attends_bfloat16(int64_t head_size);

// acc [H, D]: sum of exp(score - best) * value; best [H]: the highest score; total [H]: sum of exp(score - best).
void attend_bfloat16(int64_t head_size, const BFloat16Piece& piece, float* acc, float* best, float* total);

}  // namespace course_cpu
