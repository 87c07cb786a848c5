// Vectors of floats, as wide as the level has them, over the compiler's vector extensions: + - * / and comparisons are
// the operators; what needs an instruction of its own is a function here. Loads and stores need no alignment.
//
// A float32 kernel written with these runs at every level. What only some levels can do is behind KL_HAS_*.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>

#include "common.h"

#if defined(__AVX512F__)
#define KL_HAS_AVX512 1
#else
#define KL_HAS_AVX512 0
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
// Products of pairs of bfloat16 and quadruples of int8, added up in 32 bits.
#define KL_HAS_DOT 1
#else
#define KL_HAS_DOT 0
#endif

namespace kl {

#if KL_HAS_AVX512
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

KL_INLINE vf splat(float x) { return x - vf{}; }
KL_INLINE vi splat_int(int32_t x) { return x - vi{}; }

// a * b + c, in one rounding where the level has the instruction.
KL_INLINE vf fma(vf a, vf b, vf c) {
#if KL_HAS_AVX512
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
KL_INLINE vf fma(float a, vf b, vf c) { return fma(splat(a), b, c); }

// Per lane, mask (from a comparison: -1 or 0) ? a : b.
KL_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
// a > b ? a : b and a < b ? a : b: b where either is a NaN.
KL_INLINE vf max(vf a, vf b) {
#if KL_HAS_AVX512
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
KL_INLINE vf min(vf a, vf b) {
#if KL_HAS_AVX512
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
KL_INLINE vf abs(vf a) { return (vf)((vi)a & splat_int(0x7fffffff)); }

KL_INLINE vf sqrt(vf a) {
#if KL_HAS_AVX512
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  for (int i = 0; i < kLanes; ++i) a[i] = std::sqrt(a[i]);
  return a;
#endif
}

// --- loads and stores of whole vectors and of their first n lanes (the rest reads as zero, is not written)

KL_INLINE vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
KL_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }

KL_INLINE vf widen(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
// Round to nearest, ties to even. Infinities stay; a NaN stays a NaN.
KL_INLINE vh narrow(vf x) {
#if KL_HAS_DOT
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector((vu)((x != x) ? (vi)quiet : (vi)rounded), vh);
#endif
}
KL_INLINE vf load(const bf16* p) {
  vh x;
  __builtin_memcpy(&x, p, sizeof x);
  return widen(x);
}
KL_INLINE void store(bf16* p, vf x) {
  const vh y = narrow(x);
  __builtin_memcpy(p, &y, sizeof y);
}

#if KL_HAS_AVX512
KL_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
#elif defined(__AVX2__)
KL_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

KL_INLINE vf load_first(const float* p, int n) {
#if KL_HAS_AVX512
  return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p);
#elif defined(__AVX2__)
  return (vf)_mm256_maskload_ps(p, first_lanes(n));
#else
  vf x{};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return x;
#endif
}
KL_INLINE void store_first(float* p, vf x, int n) {
#if KL_HAS_AVX512
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)x);
#else
  for (int i = 0; i < n; ++i) p[i] = x[i];
#endif
}
KL_INLINE vf load_first(const bf16* p, int n) {
#if KL_HAS_AVX512
  return widen((vh)_mm256_maskz_loadu_epi16(first_lanes(n), p));
#else
  vh x{};
  __builtin_memcpy(&x, p, static_cast<size_t>(n) * 2);
  return widen(x);
#endif
}
KL_INLINE void store_first(bf16* p, vf x, int n) {
  const vh y = narrow(x);
#if KL_HAS_AVX512
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)y);
#else
  __builtin_memcpy(p, &y, static_cast<size_t>(n) * 2);
#endif
}

// Loop over [0, n) in whole vectors and one partial one: for_lanes(n, [&](int64_t i, int lanes) { ... }), lanes == kLanes
// but in the last round. `load_lanes` and `store_lanes` take that number.
template <class F>
KL_INLINE void for_lanes(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}
template <class T>
KL_INLINE vf load_lanes(const T* p, int lanes) {
  return lanes == kLanes ? load(p) : load_first(p, lanes);
}
template <class T>
KL_INLINE void store_lanes(T* p, vf x, int lanes) {
  if (lanes == kLanes) {
    store(p, x);
  } else {
    store_first(p, x, lanes);
  }
}

// --- sums over the lanes, in a fixed order

KL_INLINE float sum(vf x) {
#if KL_HAS_AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
#endif
}

}  // namespace kl
