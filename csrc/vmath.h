// exp, log(1 + u), sigmoid, softplus and SiLU of vectors, to about one unit in the last place; the same bits in every
// lane and at every place of a tensor.
#pragma once

#include "simd.h"

namespace kl {

KL_INLINE vf round_even(vf x) {
#if KL_HAS_AVX512
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // Adding and taking away 1.5 * 2^23 leaves the nearest integer, for |x| < 2^22.
  const vf shift = splat(12582912.0f);
  volatile vf moved = x + shift;
  return moved - shift;
#endif
}

// x * 2^n for whole n in [-252, 254].
KL_INLINE vf scale_by_power(vf x, vf n) {
#if KL_HAS_AVX512
  return (vf)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  // In two halves, so that results down to the smallest subnormal come out.
  const vi whole = __builtin_convertvector(n, vi);
  const vi half = whole >> 1, rest = whole - half;
  return x * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
#endif
}

// e^x: 0 for -inf, inf for large x, NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2; a polynomial gives e^r.
KL_INLINE vf exp(vf x) {
  // Beyond these the result is 0 or infinite whatever the digits. Written so that a NaN passes.
  x = min(splat(90.0f), max(splat(-105.0f), x));
  const vf n = round_even(x * splat(1.44269504088896341f));
  // ln 2 in two parts, the first with few enough bits for n times it to be exact.
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  return scale_by_power(p, n);
}

// log(1 + u) for u in [0, 1]: 2 atanh(s) with s = u / (2 + u), s^2 <= 1/9.
KL_INLINE vf log1p_unit(vf u) {
  const vf s = u / (u + splat(2.0f));
  const vf q = s * s;
  vf p = splat(2.0f / 15);
  p = fma(p, q, splat(2.0f / 13));
  p = fma(p, q, splat(2.0f / 11));
  p = fma(p, q, splat(2.0f / 9));
  p = fma(p, q, splat(2.0f / 7));
  p = fma(p, q, splat(2.0f / 5));
  p = fma(p, q, splat(2.0f / 3));
  return fma(p * q, s, s + s);
}

KL_INLINE vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }
KL_INLINE vf softplus(vf x) { return max(x, vf{}) + log1p_unit(exp(-abs(x))); }
KL_INLINE vf silu(vf x) { return x * sigmoid(x); }
// d silu / dx = sigmoid(x) (1 + x (1 - sigmoid(x)))
KL_INLINE vf silu_derivative(vf x) {
  const vf s = sigmoid(x);
  return s * fma(x, splat(1.0f) - s, splat(1.0f));
}

}  // namespace kl
