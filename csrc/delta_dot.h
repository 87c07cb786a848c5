// Products with a state by dot products of bfloat16 pairs, for bfloat16 calls: the queries and a copy of the state are
// rounded, the state itself and its update stay float32. What the rounding does to an output is of the size of the
// output's own (about 2e-3 of its norm); the state, where errors would add up, sees it only through what is erased
// (measured 1e-4 to 1e-3). Rounding the operands of the update too would not do: 8e-3 for keys that are much alike.
#pragma once

#include "delta.h"

#if KL_HAS_DOT

namespace kl {
namespace delta {

// A column block of a state as pairs: entry [c / 2, column] holds rows c and c + 1. padded(K) is even.
KL_INLINE int64_t pair_words(int64_t K) { return padded(K) / 2 * kBlock; }

KL_INLINE __m512i pair_up(vf even, vf odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

// Takes the rows of a tile as `update` leaves them and writes their pairs.
struct KeepPairs {
  uint32_t* pairs;

  template <int kTile>
  KL_INLINE void operator()(int64_t row, const vf (&rows)[kTile][kBlockVectors]) const {
#pragma GCC unroll 8
    for (int t = 0; t < kTile; t += 2) {
      for (int v = 0; v < kBlockVectors; ++v) {
        _mm512_storeu_si512(pairs + (row + t) / 2 * kBlock + v * kLanes, pair_up(rows[t][v], rows[t + 1][v]));
      }
    }
  }
};

// The pairs of a whole packed block.
inline void make_pairs(const float* packed, int64_t K, uint32_t* pairs) {
  for (int64_t c = 0; c < padded(K); c += 2) {
    for (int v = 0; v < kBlockVectors; ++v) {
      const float* at = packed + c * kBlock + v * kLanes;
      _mm512_storeu_si512(pairs + c / 2 * kBlock + v * kLanes, pair_up(load(at), load(at + kBlock)));
    }
  }
}

// x [8, kBlock] <- a [8, 2 depth] b, b as `depth` rows of pairs; row r of a at r * stride.
KL_INLINE void dot_tile(const bf16* a, int64_t stride, const uint32_t* b, int64_t depth, float* x) {
  __m512 sums[8][kBlockVectors];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    for (int v = 0; v < kBlockVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < depth; ++c) {
    __m512bh row[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + c * kBlock + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * stride + 2 * c, sizeof pair);
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kBlockVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], factor, row[v]);
    }
  }
  for (int r = 0; r < 8; ++r) {
    for (int v = 0; v < kBlockVectors; ++v) store(x + r * kBlock + v * kLanes, (vf)sums[r][v]);
  }
}

// `product` of delta.h with a in bfloat16 and b in pairs.
template <class F>
inline void dot_product(const bf16* a, int64_t stride, const uint32_t* b, int64_t depth, int rows, float* x,
                        F&& between) {
  for (int r = 0; r < rows; r += 8) {
    between();
    dot_tile(a + r * stride, stride, b, depth / 2, x + r * kBlock);
  }
}

// As decay_queries, but q~ and e~ go to rows of bfloat16 and `terms` stays as it is.
inline void decay_queries(const Source& source, const Terms& terms, float* total, bf16* e, bf16* q) {
  const int64_t Kp = padded(source.K);
  const bool erases = source.erases();
  for (int64_t c = 0; c < Kp; c += kLanes) {
    vf product = splat(1.0f);
    for (int r = 0; r < kChunk; ++r) {
      const int64_t at = r * Kp + c;
      const vf before = product;
      product *= load(terms.decay + at);
      store(q + at, load(terms.q + at) * product);
      if (erases) store(e + at, load(terms.e + at) * (source.pre ? before : product));
    }
    store(total + c, product);
  }
}

}  // namespace delta
}  // namespace kl

#endif
