// What the attention kernels share: powers of two of scores, and the lane sums of a tile of dot products.
#pragma once

#include <limits>

#include "simd.h"
#include "vmath.h"

namespace kl::attention {

// Scores are kept in units of ln 2, so that e^s is a power of two.
constexpr float kLog2E = 1.44269504088896341f;
// Below every finite score. Finite itself, so that a difference from it is never NaN.
constexpr float kLowest = -std::numeric_limits<float>::max();

// 2^x for x <= 0, to 1e-7: 0 for -inf, NaN for NaN. x = n + r with |r| <= 1/2; a polynomial gives 2^r.
KL_INLINE vf exp2(vf x) {
  // 2^-151 is 0 already. Written so that a NaN passes.
  x = x < splat(-151.0f) ? splat(-151.0f) : x;
  const vf n = round_even(x);
  const vf r = x - n;
  vf p = splat(1.3264727e-3f);
  p = fma(p, r, splat(9.6715127e-3f));
  p = fma(p, r, splat(5.5507337e-2f));
  p = fma(p, r, splat(2.4022242e-1f));
  p = fma(p, r, splat(6.9314698e-1f));
  p = fma(p, r, splat(1.0f));
  return scale_by_power(p, n);
}
KL_INLINE float exp2(float x) { return exp2(splat(x))[0]; }

// Sums of a tile of dot products at a time: enough chains to hide the latency, few enough to stay in registers.
constexpr int kSums = KL_HAS_AVX512 ? 16 : 8;

// out[i] = sum of the lanes of x[i], all by the same tree.
KL_INLINE void sum_each(const vf (&x)[kSums], float* out) {
#if KL_HAS_AVX512
  __m512 fours[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 a = (__m512)x[4 * i], b = (__m512)x[4 * i + 1], c = (__m512)x[4 * i + 2], d = (__m512)x[4 * i + 3];
    const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    // In each quarter, the four sums over that quarter.
    fours[i] = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
  }
  const auto halve = [](__m512 a, __m512 b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  _mm512_storeu_ps(out, halve(halve(fours[0], fours[1]), halve(fours[2], fours[3])));
#else
  for (int i = 0; i < kSums; ++i) out[i] = sum(x[i]);
#endif
}

}  // namespace kl::attention
