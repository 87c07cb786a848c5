// The micro-kernels of gemm.h: a tile of rows times one, two or four panels, all sums in registers.

#include "gemm.h"

#include <utility>

namespace kl::gemm {
namespace {

// One word of k: sums <- sums + a b, vector v of b's row at b[v / 2] + v % 2 * kLanes. Word i of row r of the tile is at
// a[r * row_stride + i * word_stride].
template <class Op>
struct Word {
  template <int kRows, int kVectors>
  static KL_INLINE void accumulate(vf (&sums)[kRows][kVectors], const uint32_t* a, int row_stride, int,
                                   const uint32_t* const (&b)[kVectors / 2]) {
    vf right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = load(reinterpret_cast<const float*>(b[v / 2]) + v % 2 * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vf left = splat(reinterpret_cast<const float*>(a)[r * row_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
    }
  }
};

template <>
struct Word<bf16> {
#if KL_HAS_DOT
  template <int kRows, int kVectors>
  static KL_INLINE void accumulate(vf (&sums)[kRows][kVectors], const uint32_t* a, int row_stride, int,
                                   const uint32_t* const (&b)[kVectors / 2]) {
    __m512i right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = _mm512_loadu_si512(b[v / 2] + v % 2 * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * row_stride]));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = (vf)_mm512_dpbf16_ps((__m512)sums[r][v], left, (__m512bh)right[v]);
      }
    }
  }
#else
  // The two halves of the pairs in turn, widened; a holds a float32 for each.
  template <int kRows, int kVectors>
  static KL_INLINE void accumulate(vf (&sums)[kRows][kVectors], const uint32_t* a, int row_stride, int word_stride,
                                   const uint32_t* const (&b)[kVectors / 2]) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vf right[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        vu pair;
        __builtin_memcpy(&pair, b[v / 2] + v % 2 * kLanes, sizeof pair);
        right[v] = (vf)(half == 0 ? pair << 16 : pair & 0xffff0000u);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const vf left = splat(reinterpret_cast<const float*>(a)[r * row_stride + half * word_stride]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
      }
    }
  }
#endif
};

template <class Op, int kRows, int kAtOnce, Along kAlong>
void product(const uint32_t* a, const uint32_t* b, int64_t b_stride, int64_t count, float* c, bool add) {
  constexpr int kVectors = 2 * kAtOnce;
  constexpr int kRowStride = kAlong == Along::kRow ? kStep : 1;
  constexpr int kWordStride = kAlong == Along::kRow ? 1 : kRows;
  constexpr int kWords = kStep / kSpread<Op>;
  vf sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = add ? load(c + (r * kVectors + v) * kLanes) : vf{};
  }
  const uint32_t* each[kAtOnce];
  for (int p = 0; p < kAtOnce; ++p) each[p] = b + p * b_stride;
  const auto words = [&](int64_t n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int64_t w = 0; w < n; ++w) {
      Word<Op>::accumulate(sums, a + w * kSpread<Op> * kWordStride, kRowStride, kWordStride, each);
#pragma GCC unroll 4
      for (int p = 0; p < kAtOnce; ++p) each[p] += kPanel;
    }
  };
  for (; count >= kWords; count -= kWords) {
    words(kWords);
    a += kRows * kStep;
  }
  words(count);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(c + (r * kVectors + v) * kLanes, sums[r][v]);
  }
}

using Product = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, float*, bool);

// The micro-kernels by height, panels at once (1, 2, 4) and layout of the tile; null where the registers do not suffice.
template <class Op>
struct Table {
  Product of[kTileRows + 1][3][2];
};

template <class Op, int kRows, int kLog>
constexpr void enter(Table<Op>& table) {
  if constexpr ((1 << kLog) <= panels_at_once(kRows)) {
    table.of[kRows][kLog][0] = product<Op, kRows, 1 << kLog, Along::kRow>;
    table.of[kRows][kLog][1] = product<Op, kRows, 1 << kLog, Along::kColumn>;
  }
}

template <class Op, int... kRow>
constexpr Table<Op> make_table(std::integer_sequence<int, kRow...>) {
  Table<Op> table{};
  (enter<Op, kRow + 1, 0>(table), ...);
  (enter<Op, kRow + 1, 1>(table), ...);
  (enter<Op, kRow + 1, 2>(table), ...);
  return table;
}

template <class Op>
constexpr Table<Op> kTable = make_table<Op>(std::make_integer_sequence<int, kTileRows>());

}  // namespace

template <class Op>
void tile_product(int rows, int at_once, Along along, const uint32_t* a, const uint32_t* b, int64_t b_stride,
                  int64_t count, float* c, bool add) {
  kTable<Op>.of[rows][at_once / 2][along == Along::kColumn](a, b, b_stride, count, c, add);
}

template void tile_product<float>(int, int, Along, const uint32_t*, const uint32_t*, int64_t, int64_t, float*, bool);
template void tile_product<bf16>(int, int, Along, const uint32_t*, const uint32_t*, int64_t, int64_t, float*, bool);

}  // namespace kl::gemm
