// Whether this compiler and this processor have products of bfloat16 pairs (AVX512-BF16).
//
// The library is compiled for any processor with the same vectors, so functions that need more say so one by one.

#pragma once

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>
#define HAS_BFLOAT16_INTRINSICS
#define FOR_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#endif

namespace {

inline bool multiplies_bfloat16() {
#ifdef HAS_BFLOAT16_INTRINSICS
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace
