// Numbers as they lie in memory and as they are computed with, and an exponential that vectorizes.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

inline float widen(float x) { return x; }

inline float widen(c10::BFloat16 x) {
  const uint32_t bits = uint32_t(x.x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline float widen(c10::Half x) {  // of a finite one: its exponent begins at 2^-15, a float's at 2^-127
  const uint32_t bits = uint32_t(int32_t(int16_t(x.x)) << 13) & 0x8fffe000;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide * 0x1p112f;
}

inline void narrow(float x, float* to) { *to = x; }

inline void narrow(float x, c10::BFloat16* to) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->x = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// exp(x) for x <= 88, to 2e-7 relative; 0 below -87. A branch-free polynomial, so that a loop of it is vectorized.
inline float fast_exp(float x) {
  const float clamped = std::max(x, -87.0f);
  const float n = std::nearbyint(clamped * 1.44269504f);
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

}  // namespace
