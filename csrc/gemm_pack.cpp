// Packing of the operands of gemm.h: copies, roundings to bfloat16, and transposes of squares of 32-bit words.

#include "gemm.h"

#include <utility>

namespace kl::gemm {
namespace {

KL_INLINE vu load_words(const uint32_t* p) {
  vu x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
KL_INLINE void store_words(uint32_t* p, vu x) { __builtin_memcpy(p, &x, sizeof x); }

// An operand that is rounded to bfloat16 and held as float32, for levels without dot products.
struct WideBf16 {};

// x in the precision of Op, given what it was read from.
template <class Op, class T>
KL_INLINE vf rounded(vf x, const T*) {
  if constexpr (std::is_same_v<Op, WideBf16> && std::is_same_v<T, float>) return widen(narrow(x));
  return x;
}

KL_INLINE vu low_half(vf x) { return __builtin_convertvector(narrow(x), vu); }

// The words (even[j], odd[j]), rounded.
KL_INLINE vu pairs_of(vf even, vf odd) {
#if KL_HAS_DOT
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const __m512i order = (__m512i)vu{0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                    0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
  return (vu)_mm512_permutexvar_epi16(order, halves);
#else
  return low_half(even) | low_half(odd) << 16;
#endif
}

// The kLanes words from word `word` on of a row whose k runs along it; what lies beyond k reads as zero.
template <class Op, class T>
KL_INLINE vu row_words(const T* row, int64_t word, int64_t k) {
  if constexpr (!std::is_same_v<Op, bf16>) {
    const int64_t left = k - word;
    if (left <= 0) return vu{};
    return (vu)rounded<Op>(load_lanes(row + word, static_cast<int>(std::min<int64_t>(left, kLanes))), row);
  } else {
    const int64_t first = 2 * word, left = k - first;
    if (left <= 0) return vu{};
#if KL_HAS_DOT
    if constexpr (std::is_same_v<T, float>) {
      if (left >= 2 * kLanes) {
        return (vu)_mm512_cvtne2ps_pbh((__m512)load(row + first + kLanes), (__m512)load(row + first));
      }
    }
#endif
    bf16 pairs[2 * kLanes] = {};
    if constexpr (std::is_same_v<T, bf16>) {
      if (left >= 2 * kLanes) return load_words(reinterpret_cast<const uint32_t*>(row + first));
      std::memcpy(pairs, row + first, static_cast<size_t>(left) * sizeof(bf16));
    } else {
      const int lower = static_cast<int>(std::min<int64_t>(left, kLanes));
      store(pairs, load_lanes(row + first, lower));
      const int upper = static_cast<int>(std::min<int64_t>(left - lower, kLanes));
      if (upper > 0) store(pairs + kLanes, load_lanes(row + first + kLanes, upper));
    }
    return load_words(reinterpret_cast<const uint32_t*>(pairs));
  }
}

// `lanes` neighbours, from column `column` on, of the rows of word `word`, where k runs from row to row.
template <class Op, class T, class Index>
KL_INLINE vu column_words(const Matrix<T, Index>& matrix, int64_t word, int64_t k, int64_t column, int lanes) {
  if constexpr (!std::is_same_v<Op, bf16>) {
    return (vu)rounded<Op>(load_lanes(matrix.row(word) + column, lanes), matrix.data);
  } else {
    const int64_t first = 2 * word;
    const vf even = load_lanes(matrix.row(first) + column, lanes);
    const vf odd = first + 1 < k ? load_lanes(matrix.row(first + 1) + column, lanes) : vf{};
    // A widened bfloat16 is its bits and 16 zeros.
    if constexpr (std::is_same_v<T, bf16>) return (vu)even >> 16 | (vu)odd;
    return pairs_of(even, odd);
  }
}

// Exchange the lanes of x that have bit kBit with those of y that have it not.
template <int kBit, int... kLane>
KL_INLINE void exchange(vu& x, vu& y, std::integer_sequence<int, kLane...>) {
  const vu lower{static_cast<uint32_t>(kLane & kBit ? kLane - kBit + kLanes : kLane)...};
  const vu upper{static_cast<uint32_t>(kLane & kBit ? kLane + kLanes : kLane + kBit)...};
  const vu first = __builtin_shuffle(x, y, lower);
  y = __builtin_shuffle(x, y, upper);
  x = first;
}

template <int kBit>
KL_INLINE void stage(vu (&rows)[kLanes]) {
  if constexpr (kBit < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & kBit) == 0) exchange<kBit>(rows[i], rows[i + kBit], std::make_integer_sequence<int, kLanes>());
    }
  }
}

// rows[i][j] <-> rows[j][i]
KL_INLINE void transpose(vu (&rows)[kLanes]) {
  stage<1>(rows);
  stage<2>(rows);
  stage<4>(rows);
  stage<8>(rows);
}

// Words ahead of those in use that memory is asked for.
constexpr int64_t kAhead = 2 * kLanes;

// A panel whose columns are rows in memory: squares of kLanes columns and kLanes words, turned.
template <class Op, class T, class Index>
void pack_panel_of_rows(const Matrix<T, Index>& b, int64_t n, int64_t k, int64_t panel, int64_t word_begin,
                        int64_t word_end, uint32_t* out) {
  for (int64_t word = word_begin; word < word_end; word += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, word_end - word);
    for (int half = 0; half < 2; ++half) {
      const int64_t column = panel * kPanel + half * kLanes;
      vu square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (column + i >= n) {
          square[i] = vu{};
          continue;
        }
        const T* const row = b.row(column + i);
        square[i] = row_words<Op>(row, word, k);
        // Too many rows at once, and often too short ones, for the processor to see where each goes on. Into an outer
        // cache: rows a power of two apart crowd each other out of the first.
        const T* const ahead = row + (word + kAhead) * static_cast<int64_t>(sizeof(uint32_t) / sizeof(Op));
        __builtin_prefetch(ahead, 0, 1);
        if constexpr (sizeof(T) > sizeof(Op)) __builtin_prefetch(ahead + kLanes, 0, 1);
      }
      transpose(square);
      uint32_t* const to = out + (word - word_begin) * kPanel + half * kLanes;
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store_words(to + i * kPanel, square[i]);
      } else {
        for (int i = 0; i < count; ++i) store_words(to + i * kPanel, square[i]);
      }
    }
  }
}

// A panel whose columns lie side by side in memory.
template <class Op, class T, class Index>
void pack_panel_of_columns(const Matrix<T, Index>& b, int64_t n, int64_t k, int64_t panel, int64_t word_begin,
                           int64_t word_end, uint32_t* out) {
  const int64_t column = panel * kPanel, left = n - column;
  const int lower = static_cast<int>(std::min<int64_t>(left, kLanes));
  const int upper = static_cast<int>(std::min<int64_t>(left - lower, kLanes));
  for (int64_t word = word_begin; word < word_end; ++word, out += kPanel) {
    store_words(out, column_words<Op>(b, word, k, column, lower));
    store_words(out + kLanes, upper > 0 ? column_words<Op>(b, word, k, column + kLanes, upper) : vu{});
  }
}

// A tile of rows in memory: pieces of kStep words of each row.
template <class A, class T, class Index>
void pack_tile_of_rows(const Matrix<T, Index>& a, int64_t first, int64_t rows, int64_t k, int64_t count, uint32_t* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* const row = a.row(first + r);
    uint32_t* to = out + r * kStep;
    for (int64_t word = 0; word < count; word += kStep, to += rows * kStep) {
      for (int i = 0; i < kStep; i += kLanes) store_words(to + i, row_words<A>(row, word + i, k));
    }
  }
}

// Words of all tiles that are taken at a time where k runs from row to row: memory is read along its rows, tiles are
// written in longer runs.
constexpr int64_t kBand = 8;

// `height` words from each of kBand rows of `from`, behind each other. Writes run over into the next row's place, which
// is written afterwards; the last rows, behind which lies what was written before, are written to their length.
KL_INLINE void gather_band(const uint32_t* from, int64_t stride, int64_t height, uint32_t* to) {
  int64_t left = kBand * height;
  for (; left >= round_up(height, kLanes); left -= height, from += stride, to += height) {
    for (int64_t r = 0; r < height; r += kLanes) store_words(to + r, load_words(from + r));
  }
  for (; left > 0; left -= height, from += stride, to += height) {
    for_lanes(height, [&](int64_t r, int lanes) {
      store_lanes(reinterpret_cast<float*>(to) + r, load_lanes(reinterpret_cast<const float*>(from) + r, lanes), lanes);
    });
  }
}

template <class A, class T, class Index>
void pack_tiles_of_columns(const Matrix<T, Index>& a, const PackedRows& tiles, int64_t first, int64_t k, int64_t count,
                           uint32_t* out) {
  const int64_t given = words<A>(k), stride = round_up(tiles.rows, kLanes) + kLanes;
  const Scratch<uint32_t> band(static_cast<size_t>(kBand * stride));
  for (int64_t begin = 0; begin < count; begin += kBand) {
    for (int64_t word = 0; word < kBand; ++word) {
      for_lanes(tiles.rows, [&](int64_t r, int lanes) {
        const bool exists = begin + word < given;
        store_words(band + word * stride + r, exists ? column_words<A>(a, begin + word, k, first + r, lanes) : vu{});
      });
    }
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t row = tiles.first_row(t), height = tiles.first_row(t + 1) - row;
      gather_band(band + row, stride, height, out + row * count + begin * height);
    }
  }
}

}  // namespace

template <class Op, class T, class Index>
void pack_panel(const Matrix<T, Index>& b, Along along, int64_t n, int64_t k, int64_t panel, int64_t word_begin,
                int64_t word_end, uint32_t* out) {
  if (along == Along::kRow) {
    pack_panel_of_rows<Op>(b, n, k, panel, word_begin, word_end, out);
  } else {
    pack_panel_of_columns<Op>(b, n, k, panel, word_begin, word_end, out);
  }
}

template <class Op, class T, class Index>
void pack_rows(const Matrix<T, Index>& a, Along along, int64_t first, int64_t rows, int64_t k, uint32_t* out) {
  using A = std::conditional_t<kSpread<Op> == 2, WideBf16, Op>;
  const PackedRows tiles(out, rows, along);
  const int64_t count = round_up(words<Op>(k) * kSpread<Op>, kStep);
  if (along == Along::kColumn) {
    pack_tiles_of_columns<A>(a, tiles, first, k, count, out);
    return;
  }
  for (int64_t t = 0; t < tiles.tiles; ++t) {
    const int64_t begin = tiles.first_row(t);
    pack_tile_of_rows<A>(a, first + begin, tiles.first_row(t + 1) - begin, k, count, out + begin * count);
  }
}

#define KL_INSTANTIATE(Op, T, Index)                                                                                 \
  template void pack_panel<Op>(const Matrix<T, Index>&, Along, int64_t, int64_t, int64_t, int64_t, int64_t, uint32_t*); \
  template void pack_rows<Op>(const Matrix<T, Index>&, Along, int64_t, int64_t, int64_t, uint32_t*);
#define KL_INSTANTIATE_INDEX(Index)    \
  KL_INSTANTIATE(float, float, Index)  \
  KL_INSTANTIATE(float, bf16, Index)   \
  KL_INSTANTIATE(bf16, float, Index)   \
  KL_INSTANTIATE(bf16, bf16, Index)
KL_INSTANTIATE_INDEX(int32_t)
KL_INSTANTIATE_INDEX(int64_t)
#undef KL_INSTANTIATE_INDEX
#undef KL_INSTANTIATE

}  // namespace kl::gemm
