// Small dense products of the delta rule's backward, and what goes with them: transposes, row sums, substitution.
//
// Rows of a chunk are 16, key channels padded(K), value channels padded_values(V), so that no product has a ragged
// edge. Row-major throughout; ld is the distance of rows in floats. Letters as in delta.h.
#pragma once

#include "delta.h"

namespace kl::delta::backward {

// Accumulators of a product: kRows x kCols vectors, enough to hide the latency of a multiply-add.
constexpr int kRows = KL_HAS_AVX512 ? 8 : 4;
constexpr int kCols = 2;
using Tile = vf[kRows][kCols];

// acc[r] += sum_i a(r, i) b[i], i < n, with a(r, i) = a[r * lda + i], or, kAcross, a[i * lda + r].
template <bool kAcross>
KL_INLINE void multiply(Tile& acc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    vf row[kCols];
#pragma GCC unroll 2
    for (int v = 0; v < kCols; ++v) row[v] = load(b + i * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vf x = splat(kAcross ? a[i * lda + r] : a[r * lda + i]);
#pragma GCC unroll 2
      for (int v = 0; v < kCols; ++v) acc[r][v] = fma(x, row[v], acc[r][v]);
    }
  }
}

KL_INLINE void clear(Tile& acc) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kCols; ++v) acc[r][v] = vf{};
  }
}
KL_INLINE void load_tile(Tile& acc, const float* p, int64_t ld) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kCols; ++v) acc[r][v] = load(p + r * ld + v * kLanes);
  }
}
KL_INLINE void store_tile(float* p, int64_t ld, const Tile& acc) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kCols; ++v) store(p + r * ld + v * kLanes, acc[r][v]);
  }
}

// Call f(row, column) for every tile of a matrix, down the columns first: the right factor's columns stay in cache.
template <class F>
KL_INLINE void for_tiles(int64_t rows, int64_t columns, const F& f) {
  for (int64_t v = 0; v < columns; v += kCols * kLanes) {
    for (int64_t r = 0; r < rows; r += kRows) f(r, v);
  }
}

// out = a b^T for a [rows, n] and b^T as [n, columns]: both factors as they lie, the large one is a.
inline void times_transposed(float* out, int64_t rows, int64_t columns, const float* a, int64_t lda, const float* b,
                             int64_t n) {
  if (columns >= kCols * kLanes) {
    for_tiles(rows, columns, [&](int64_t r, int64_t v) {
      Tile acc;
      clear(acc);
      multiply<false>(acc, a + r * lda, lda, b + v, columns, n);
      store_tile(out + r * columns + v, columns, acc);
    });
    return;
  }
  // One vector of columns: twice the rows make up for it.
  constexpr int kTall = 2 * kRows;
  for (int64_t r = 0; r < rows; r += kTall) {
    vf acc[kTall] = {};
    for (int64_t i = 0; i < n; ++i) {
      const vf row = load(b + i * columns);
#pragma GCC unroll 16
      for (int t = 0; t < kTall; ++t) acc[t] = fma(a[(r + t) * lda + i], row, acc[t]);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTall; ++t) store(out + (r + t) * columns, acc[t]);
  }
}

// next = Diag(decay) previous + a^T b for states [K, V] (dense), a [n, K], b [n, V]. The two states may be one.
inline void update_state(float* next, const float* previous, const float* decay, int64_t K, int64_t V, const float* a,
                         const float* b, int64_t n) {
  for_tiles(K, V, [&](int64_t r, int64_t v) {
    Tile acc;
    load_tile(acc, previous + r * V + v, V);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kCols; ++j) acc[i][j] *= splat(decay[r + i]);
    }
    multiply<true>(acc, a + r, K, b + v, V, n);
    store_tile(next + r * V + v, V, acc);
  });
}

// --- transposes, sums, substitution

#if KL_HAS_AVX512
inline void transpose_block(const float* in, int64_t ldi, float* out, int64_t ldo) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * ldi);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = (__m512)_mm512_unpacklo_pd((__m512d)b[i], (__m512d)b[i + 2]);
    a[i + 1] = (__m512)_mm512_unpackhi_pd((__m512d)b[i], (__m512d)b[i + 2]);
    a[i + 2] = (__m512)_mm512_unpacklo_pd((__m512d)b[i + 1], (__m512d)b[i + 3]);
    a[i + 3] = (__m512)_mm512_unpackhi_pd((__m512d)b[i + 1], (__m512d)b[i + 3]);
  }
  // a[4 g + c]: column 4 l + c of rows 4 g .. 4 g + 3 in 128-bit lane l.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(out + c * ldo, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(out + (8 + c) * ldo, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(out + (4 + c) * ldo, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(out + (12 + c) * ldo, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
}
constexpr int64_t kTransposed = 16;
#else
constexpr int64_t kTransposed = 8;
inline void transpose_block(const float* in, int64_t ldi, float* out, int64_t ldo) {
  for (int i = 0; i < kTransposed; ++i) {
    for (int j = 0; j < kTransposed; ++j) out[j * ldo + i] = in[i * ldi + j];
  }
}
#endif

// out [columns, rows] = in^T.
inline void transpose(const float* in, int64_t ldi, int64_t rows, int64_t columns, float* out, int64_t ldo) {
  for (int64_t i = 0; i < rows; i += kTransposed) {
    for (int64_t j = 0; j < columns; j += kTransposed) transpose_block(in + i * ldi + j, ldi, out + j * ldo + i, ldo);
  }
}

// out[k] = sum_v a[k, v] b[k, v] for two states, k < K, a multiple of 8. kNarrow: a16 and b16 take them in bfloat16.
template <bool kNarrow>
inline void row_products(const float* a, const float* b, int64_t K, int64_t V, float* out, bf16* a16, bf16* b16) {
  for (int64_t k = 0; k < K; k += 8) {
    vf rows[16] = {};
    for (int64_t v = 0; v < V; v += kLanes) {
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        const int64_t at = (k + r) * V + v;
        const vf x = load(a + at), y = load(b + at);
        rows[r] = fma(x, y, rows[r]);
        if (kNarrow) {
          store(a16 + at, x);
          store(b16 + at, y);
        }
      }
    }
    alignas(64) float total[16];
    sum_each(rows, total);
    std::memcpy(out + k, total, 8 * sizeof(float));
  }
}

#if KL_HAS_DOT
// --- the same products with bfloat16 factors, added up in float32: pairs of neighbours along the sum are one element

KL_INLINE vf fma_pairs(float pair, vf pairs, vf acc) {
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_ps(pair), (__m512bh)pairs);
}

// out = a b^T for a [rows, 2 n] in bfloat16 and b^T as [n, columns] pairs.
inline void times_transposed_pairs(float* out, int64_t rows, int64_t columns, const bf16* a, int64_t lda,
                                   const float* b, int64_t n) {
  const float* pairs = reinterpret_cast<const float*>(a);
  const int64_t ld = lda / 2;
  constexpr int kTall = 2 * kRows;
  for (int64_t v = 0; v < columns; v += kLanes) {
    for (int64_t r = 0; r < rows; r += kTall) {
      vf acc[kTall] = {};
      for (int64_t i = 0; i < n; ++i) {
        const vf row = load(b + i * columns + v);
#pragma GCC unroll 16
        for (int t = 0; t < kTall; ++t) acc[t] = fma_pairs(pairs[(r + t) * ld + i], row, acc[t]);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTall; ++t) store(out + (r + t) * columns + v, acc[t]);
    }
  }
}

// The rows of x [rows, V] as pairs across, [V / 2, rows]; `narrow` takes them in bfloat16.
inline void pairs_across(const float* x, int64_t rows, int64_t V, bf16* narrow, float* across) {
  for (int64_t at = 0; at < rows * V; at += kLanes) store(narrow + at, load(x + at));
  transpose(reinterpret_cast<const float*>(narrow), V / 2, rows, V / 2, across, rows);
}
#endif

// x <- (I + L)^-1 x, or (I + L)^-T x, for x [16, V] and strictly lower L [16, 16]: substitution, a vector of columns at
// a time, every row taken from the others as soon as it is known.
template <bool kFromBelow>
inline void substitute(float* x, int64_t V, const float* L) {
  for (int64_t v = 0; v < V; v += kLanes) {
    vf row[kChunk];
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i) row[i] = load(x + i * V + v);
#pragma GCC unroll 16
    for (int step = 0; step < kChunk; ++step) {
      const int j = kFromBelow ? kChunk - 1 - step : step;
#pragma GCC unroll 16
      for (int i = kFromBelow ? 0 : j + 1; i < (kFromBelow ? j : kChunk); ++i) {
        row[i] = fma(-L[kFromBelow ? j * kChunk + i : i * kChunk + j], row[j], row[i]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kChunk; ++i) store(x + i * V + v, row[i]);
  }
}

}  // namespace kl::delta::backward
