// Whether this compiler and this processor have vectors of sixteen floats (AVX-512), and products of bfloat16 pairs.
//
// The library is compiled for any processor with the same vectors, so functions that need more say so one by one.

#pragma once

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>
#define HAS_AVX512
#define FOR_FLOAT32 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define FOR_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#endif

namespace {

inline bool multiplies_float32() {
#ifdef HAS_AVX512
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

inline bool multiplies_bfloat16() {
#ifdef HAS_AVX512
  return multiplies_float32() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace
