// Products of packed tiles for attention over many queries, and the packing.
//
//    C[r, c] = sum_k A[r, k] B[k, c]
//
// Operands are words of 32 bits along k: one float32 (`Single`), or two neighbours in bfloat16 (`Pairs`, where the
// level has dot products). A is stored by rows, B and C in panels: up to kPanel columns next to each other, row after
// row, and behind them the next panel. A sum is one chain over k, so its bits do not depend on the tiling.
#pragma once

#include "attention_simd.h"

namespace kl::attention {

// Rows of a tile, and vectors across the widest panel: as many sums as registers allow.
constexpr int kTileRows = 6;
constexpr int kPanelVectors = KL_HAS_AVX512 ? 4 : 2;
constexpr int64_t kPanel = kPanelVectors * kLanes;

using Word = uint32_t;

struct Single {
  static constexpr int kElements = 1;
  static KL_INLINE vf multiply_add(Word a, vu b, vf c) {
    float x;
    std::memcpy(&x, &a, sizeof x);
    return fma(splat(x), (vf)b, c);
  }
  static KL_INLINE vf multiply_add(vu a, vu b, vf c) { return fma((vf)a, (vf)b, c); }
  // A word a lane of neighbours in k.
  static KL_INLINE vu join(const vf (&x)[1]) { return (vu)x[0]; }
};

#if KL_HAS_DOT
struct Pairs {
  static constexpr int kElements = 2;
  static KL_INLINE vf multiply_add(Word a, vu b, vf c) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
  static KL_INLINE vf multiply_add(vu a, vu b, vf c) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static KL_INLINE vu join(const vf (&x)[2]) {
    const __m512i behind = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    // Lanes j and 16 + j next to each other.
    const __m512i lane = (__m512i)vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    return (vu)_mm512_permutexvar_epi16(order, behind);
  }
};
#endif

KL_INLINE vu load_words(const Word* p) {
  vu x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
KL_INLINE void store_words(Word* p, vu x) { __builtin_memcpy(p, &x, sizeof x); }

template <class M>
KL_INLINE int64_t words_of(int64_t elements) {
  return ceil_div(elements, M::kElements);
}

// sums += the product of kTileRows rows of A, `lda` words apart, and a panel of NV vectors, over `words` in k.
template <class M, int NV>
KL_INLINE void multiply(vf (&sums)[kTileRows][NV], const Word* a, int64_t lda, const Word* b, int64_t words) {
  for (int64_t k = 0; k < words; ++k) {
    vu across[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) across[v] = load_words(b + (k * NV + v) * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const Word down = a[r * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[r][v] = M::multiply_add(down, across[v], sums[r][v]);
    }
  }
}

// Call f(first column, integral_constant of the panel's vectors) for the panels of `columns`, a multiple of kLanes.
template <class F>
KL_INLINE void for_panels(int64_t columns, const F& f) {
  int64_t c = 0;
  for (; c + kPanel <= columns; c += kPanel) f(c, std::integral_constant<int, kPanelVectors>());
  if constexpr (kPanelVectors == 4) {
    if (c + 2 * kLanes <= columns) {
      f(c, std::integral_constant<int, 2>());
      c += 2 * kLanes;
    }
  }
  if (c < columns) f(c, std::integral_constant<int, 1>());
}

// C += A B, with `rows` (a multiple of kTileRows) of C of those `c_rows` that its panels have, over words [begin, end)
// in k of those `b_words` that the panels of B have. before(column, sums) may change the sums that were there.
template <class M, int NV, class Before>
KL_INLINE void add_panel(const Word* a, int64_t lda, int64_t rows, const Word* b, int64_t words, float* c,
                         const Before& before) {
  constexpr int64_t width = NV * kLanes;
  for (int64_t r = 0; r < rows; r += kTileRows) {
    vf sums[kTileRows][NV];
    float* tile = c + r * width;
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[i][v] = before(v, load(tile + i * width + v * kLanes));
    }
    multiply<M, NV>(sums, a + r * lda, lda, b, words);
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(tile + i * width + v * kLanes, sums[i][v]);
    }
  }
}

// --- packing

// kLanes words of a row from word w on; what is behind `width` elements is zero.
template <class M, class T>
KL_INLINE vu row_words(const T* row, int64_t w, int64_t width) {
  const int64_t left = width - w * M::kElements;
  if (left <= 0) return vu{};
  if constexpr (M::kElements == 1) {
    return (vu)load_lanes(row + w, static_cast<int>(std::min<int64_t>(kLanes, left)));
  } else {
    static_assert(std::is_same_v<T, bf16>);
    alignas(64) bf16 buffer[2 * kLanes] = {};
    if (left >= 2 * kLanes) return load_words(reinterpret_cast<const Word*>(row + 2 * w));
    std::memcpy(buffer, row + 2 * w, static_cast<size_t>(left) * sizeof(T));
    return load_words(reinterpret_cast<const Word*>(buffer));
  }
}

// kLanes words, each the elements of neighbouring rows in one column, from column c on. `rows` of them exist.
template <class M, class T>
KL_INLINE vu column_words(const T* row, int64_t stride, int64_t rows, int64_t c, int64_t width) {
  const int lanes = static_cast<int>(std::min<int64_t>(kLanes, width - c));
  if (rows <= 0 || lanes <= 0) return vu{};
  const vu even = (vu)load_lanes(row + c, lanes);
  if constexpr (M::kElements == 1) return even;
  const vu odd = rows > 1 ? (vu)load_lanes(row + stride + c, lanes) : vu{};
  return (even >> 16) | (odd & 0xffff0000u);
}

// x[i][j] <-> x[j][i]
KL_INLINE void transpose(vu (&x)[kLanes]) {
#if KL_HAS_AVX512
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
  }
  // b[4 i + j]: in each quarter, rows 4 i .. 4 i + 3 of column 4 * quarter + j.
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), high = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    x[j] = (vu)_mm512_shuffle_i32x4(low, low2, 0x88);
    x[8 + j] = (vu)_mm512_shuffle_i32x4(low, low2, 0xdd);
    x[4 + j] = (vu)_mm512_shuffle_i32x4(high, high2, 0x88);
    x[12 + j] = (vu)_mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#else
  vu y[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) y[i][j] = x[j][i];
  }
  for (int i = 0; i < kLanes; ++i) x[i] = y[i];
#endif
}

// A operand [padded_rows, words]: rows as they are; zeros behind them.
template <class M, class T>
void pack_rows(const T* data, int64_t stride, int64_t rows, int64_t padded_rows, int64_t width, Word* out) {
  const int64_t words = words_of<M>(width);
  for (int64_t r = 0; r < padded_rows; ++r) {
    for (int64_t w = 0; w < words; w += kLanes) {
      const vu x = r < rows ? row_words<M>(data + r * stride, w, width) : vu{};
      std::memcpy(out + r * words + w, &x, static_cast<size_t>(std::min<int64_t>(kLanes, words - w)) * sizeof(Word));
    }
  }
}

// B operand in panels, words of a row down, rows across: [words of width] x `columns`, zeros behind the rows.
template <class M, class T>
void pack_across(const T* data, int64_t stride, int64_t rows, int64_t columns, int64_t width, Word* out) {
  const int64_t words = words_of<M>(width);
  for_panels(columns, [&](int64_t c, auto vectors) {
    constexpr int64_t across = vectors() * kLanes;
    Word* panel = out + c * words;
    for (int64_t v = 0; v < across; v += kLanes) {
      for (int64_t w = 0; w < words; w += kLanes) {
        vu x[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int64_t r = c + v + i;
          x[i] = r < rows ? row_words<M>(data + r * stride, w, width) : vu{};
        }
        transpose(x);
        const int64_t count = std::min<int64_t>(kLanes, words - w);
        for (int64_t i = 0; i < count; ++i) store_words(panel + (w + i) * across + v, x[i]);
      }
    }
  });
}

// B operand in panels, words of neighbouring rows down, columns across: [words of rows] x width padded to kLanes.
template <class M, class T>
void pack_down(const T* data, int64_t stride, int64_t rows, int64_t words, int64_t width, Word* out) {
  for_panels(round_up(width, kLanes), [&](int64_t c, auto vectors) {
    constexpr int64_t across = vectors() * kLanes;
    Word* panel = out + c * words;
    for (int64_t w = 0; w < words; ++w) {
      const int64_t r = w * M::kElements;
      for (int64_t v = 0; v < across; v += kLanes) {
        store_words(panel + w * across + v, column_words<M>(data + r * stride, stride, rows - r, c + v, width));
      }
    }
  });
}

// A operand [padded_width, words]: columns as rows, words of neighbouring rows; zeros behind.
template <class M, class T>
void pack_transposed(const T* data, int64_t stride, int64_t rows, int64_t words, int64_t width, int64_t padded_width,
                     Word* out) {
  for (int64_t w = 0; w < words; w += kLanes) {
    for (int64_t c = 0; c < padded_width; c += kLanes) {
      vu x[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t r = (w + i) * M::kElements;
        x[i] = w + i < words ? column_words<M>(data + r * stride, stride, rows - r, c, width) : vu{};
      }
      transpose(x);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, padded_width - c); ++i) {
        std::memcpy(out + (c + i) * words + w, &x[i],
                    static_cast<size_t>(std::min<int64_t>(kLanes, words - w)) * sizeof(Word));
      }
    }
  }
}

// out [columns of the panels, width] <- factor(column) C^T, for C [width padded, c_rows] in panels; `columns` are
// wanted.
template <class T>
void write_transposed(const float* c, int64_t c_rows, int64_t columns, int64_t width, const float* factors, T* out,
                      int64_t stride) {
  for_panels(round_up(columns, kLanes), [&](int64_t first, auto vectors) {
    constexpr int64_t across = vectors() * kLanes;
    for (int64_t v = 0; v < across; v += kLanes) {
      const vf factor = load(factors + first + v);
      for (int64_t r = 0; r < width; r += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, width - r));
        vu x[kLanes] = {};
        for (int i = 0; i < lanes; ++i) x[i] = (vu)(load(c + first * c_rows + (r + i) * across + v) * factor);
        transpose(x);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, columns - first - v); ++i) {
          store_lanes(out + (first + v + i) * stride + r, (vf)x[i], lanes);
        }
      }
    }
  });
}

}  // namespace kl::attention
