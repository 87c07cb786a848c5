// Matrix products  C[m, n] = sum_k A[m, k] B[k, n],  float32 sums of float32 or bfloat16 operands.
//
// A call goes in three steps: B is packed into panels of kPanel columns, a block of rows of A is packed into tiles, and
// every tile meets every panel in a micro-kernel that holds kTileRows x kPanel sums in registers. What becomes of
// finished sums is up to the caller: an epilogue receives them a row of a panel at a time.
//
// Every sum is one chain: c <- c + a_k b_k for k = 0, 1, 2, ... (for bfloat16 at the level with dot products, pairs:
// c <- c + a_2k b_2k + a_2k+1 b_2k+1). Blocks of k continue the chain where the last one left it. So the bits of a row
// of C depend on that row of A and on B alone: not on how many rows there are, nor where the row stands, nor on how the
// work is cut into tiles, blocks and threads.
//
// Operands are packed in words of 32 bits: one float32, or two neighbours in k of bfloat16.
#pragma once

#include "simd.h"

namespace kl::gemm {

// Columns of a panel: two vectors.
constexpr int kPanel = 2 * kLanes;
// Rows of the largest tile: as many as leave registers for a panel row and a broadcast.
constexpr int kTileRows = KL_HAS_AVX512 ? 12 : 6;
// Words in k that a tile of A is stored by.
constexpr int kStep = 16;
// Words in k of a block: a block of a panel stays in the first-level cache while the tiles pass.
constexpr int64_t kBlock = 256;
// Rows of A that are packed at a time, and panels whose partial sums are kept between blocks of k.
constexpr int64_t kRowBlock = 16 * kTileRows;
constexpr int64_t kPanelBlock = 8;

// A matrix in memory: row i is at data + (index ? index[i] : i) * stride.
template <class T, class Index = int64_t>
struct Matrix {
  const T* data;
  int64_t stride;
  const Index* index = nullptr;
  KL_INLINE const T* row(int64_t i) const { return data + (index == nullptr ? i : index[i]) * stride; }
};

// How a matrix in memory is read as an operand.
enum class Along {
  kRow,     // k runs along a row in memory: A as usual, B as the weight of a linear layer [N, K]
  kColumn,  // k runs from row to row: A transposed, B as usual [K, N]
};

// The words that hold k operands of type Op.
template <class Op>
constexpr int64_t words(int64_t k) {
  return std::is_same_v<Op, bf16> ? ceil_div(k, 2) : k;
}
// Words of A that one word of B meets: without dot products, pairs of B are widened and A is float32.
template <class Op>
constexpr int kSpread = std::is_same_v<Op, bf16> && !KL_HAS_DOT ? 2 : 1;

inline int64_t panels(int64_t n) { return ceil_div(n, kPanel); }
// Words of a packed B.
template <class Op>
int64_t packed_words(int64_t n, int64_t k) {
  return panels(n) * kPanel * words<Op>(k);
}

// --- packing. T is float or bf16, Op is float or bf16; Index is int32_t or int64_t. Defined in gemm_pack.cpp.

// Words [word_begin, word_end) of panel `panel` of B with n columns and k rows, to out[(word - word_begin) * kPanel].
// Columns and rows that do not exist read as zero.
template <class Op, class T, class Index>
void pack_panel(const Matrix<T, Index>& b, Along along, int64_t n, int64_t k, int64_t panel, int64_t word_begin,
                int64_t word_end, uint32_t* out);

// `rows` rows of A from row `first`, k operands each, in tiles, to out [packed_row_words(rows, k)].
template <class Op, class T, class Index>
void pack_rows(const Matrix<T, Index>& a, Along along, int64_t first, int64_t rows, int64_t k, uint32_t* out);

// Tile by tile, each in steps of kStep words: Along::kRow [steps][rows][kStep], Along::kColumn [steps][kStep][rows].
template <class Op>
int64_t packed_row_words(int64_t rows, int64_t k) {
  return rows * round_up(words<Op>(k) * kSpread<Op>, kStep);
}

// All panels of B on the threads, panel by panel: panel p begins at out + p * kPanel * words<Op>(k).
template <class Op, class T, class Index>
void pack_weights(const Matrix<T, Index>& b, Along along, int64_t n, int64_t k, uint32_t* out) {
  const int64_t all = words<Op>(k), length = kPanel * all;
  // Memory is read in order: whole panels where k runs along rows, else a few rows of all panels.
  const int64_t rows = along == Along::kRow ? all : 4 * kStep;
  const int64_t width = along == Along::kRow ? 1 : panels(n);
  const int64_t bands = width == 1 ? panels(n) : 1, pieces = all == 0 ? 0 : ceil_div(all, rows);
  parallel_for(bands * pieces, [&](int64_t task) {
    const int64_t first = task / pieces * width, begin = task % pieces * rows;
    for (int64_t panel = first; panel < first + width; ++panel) {
      uint32_t* const to = out + panel * length + begin * kPanel;
      pack_panel<Op>(b, along, n, k, panel, begin, std::min(all, begin + rows), to);
    }
  });
}

// --- the micro-kernel. Defined in gemm.cpp.

// How many panels a tile of so many rows takes at once: a low tile has registers left, and needs more chains to be fast.
KL_INLINE constexpr int panels_at_once(int64_t rows) { return rows <= kTileRows / 4 ? 4 : rows <= kTileRows / 2 ? 2 : 1; }

// c [rows, at_once * kPanel] <- (add ? c : 0) + a b over `count` words of k, with panel i of b at b + i * b_stride.
// at_once is 1, 2 or 4, at most panels_at_once(rows). `along` says how the tile was packed.
template <class Op>
void tile_product(int rows, int at_once, Along along, const uint32_t* a, const uint32_t* b, int64_t b_stride,
                  int64_t count, float* c, bool add);

// --- sources of panels

// B packed by pack_weights.
struct PackedPanels {
  const uint32_t* data;
  int64_t length;  // words of a panel: kPanel * words<Op>(k)
  static constexpr bool kInPlace = true;
  const uint32_t* at(int64_t panel, int64_t word) const { return data + panel * length + word * kPanel; }
};

// B packed piece by piece as it is needed: for few rows, which would not pay for packing it all.
template <class Op, class T, class Index = int64_t>
struct LoosePanels {
  Matrix<T, Index> matrix;
  Along along;
  int64_t n, k;
  static constexpr bool kInPlace = false;
  void fill(int64_t panel, int64_t word_begin, int64_t word_end, uint32_t* out) const {
    pack_panel<Op>(matrix, along, n, k, panel, word_begin, word_end, out);
  }
};

// --- the macro-kernel

// The largest of 1, 2 and 4 that is not above x.
KL_INLINE int64_t power_of_two(int64_t x) { return x >= 4 ? 4 : x >= 2 ? 2 : 1; }

// Rows of A in tiles.
class PackedRows {
 public:
  PackedRows(const uint32_t* words, int64_t row_count, Along layout)
      : data(words), rows(row_count), along(layout), tiles(ceil_div(rows, kTileRows)),
        height_(tiles == 0 ? 0 : rows / tiles), higher_(tiles == 0 ? 0 : rows % tiles) {}
  const uint32_t* data;
  int64_t rows;
  Along along;
  int64_t tiles;
  // Heights differ by one at most, so that no tile is much lower than the others.
  int64_t first_row(int64_t tile) const { return tile * height_ + std::min(tile, higher_); }

 private:
  int64_t height_, higher_;
};

// Sums of panels [panel_begin, panel_end) for packed rows of k operands. epilogue(row, panel, lower, upper): the
// two vectors of sums of a row (counted from the first packed one) in a panel; called once for each.
template <class Op, class Panels, class Epilogue>
void multiply(const PackedRows& a, const Panels& b, int64_t k, int64_t panel_begin, int64_t panel_end,
              const Epilogue& epilogue) {
  const int64_t tiles = a.tiles, a_words = packed_row_words<Op>(1, k);
  const int64_t k_words = words<Op>(k);
  if (tiles == 0 || panel_begin >= panel_end) return;
  const int64_t most = power_of_two(std::min<int64_t>(panels_at_once(a.first_row(1)), panel_end - panel_begin));
  // With a single tile nothing is used twice, and panels are best read from end to end.
  const int64_t block = !Panels::kInPlace ? kBlock / most : tiles == 1 ? std::max<int64_t>(k_words, 1) : kBlock;
  const int64_t blocks = std::max<int64_t>(1, ceil_div(k_words, block));
  const int64_t kept = blocks > 1 ? std::max<int64_t>(kPanelBlock, most) : most;
  const Scratch<float> sums(static_cast<size_t>(blocks > 1 ? kept * a.rows * kPanel : most * kTileRows * kPanel));
  const Scratch<uint32_t> filled(static_cast<size_t>(Panels::kInPlace ? 1 : most * block * kPanel));
  for (int64_t chunk = panel_begin; chunk < panel_end; chunk += kept) {
    const int64_t chunk_end = std::min(panel_end, chunk + kept);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t begin = i * block, end = std::min(k_words, begin + block);
      for (int64_t panel = chunk, together; panel < chunk_end; panel += together) {
        together = power_of_two(std::min(most, chunk_end - panel));
        const uint32_t* source;
        int64_t stride;
        if constexpr (Panels::kInPlace) {
          source = b.at(panel, begin);
          stride = b.length;
        } else {
          source = filled;
          stride = block * kPanel;
          for (int64_t p = 0; p < together; ++p) b.fill(panel + p, begin, end, filled + p * stride);
        }
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t first = a.first_row(t), rows = a.first_row(t + 1) - first;
          float* const c = sums + (blocks > 1 ? ((panel - chunk) * a.rows + first * together) * kPanel : 0);
          tile_product<Op>(static_cast<int>(rows), static_cast<int>(together), a.along,
                           a.data + first * a_words + begin * rows * kSpread<Op>, source, stride, end - begin, c, i > 0);
          if (i + 1 < blocks) continue;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t p = 0; p < together; ++p) {
              const float* const pair = c + (r * together + p) * kPanel;
              epilogue(first + r, panel + p, load(pair), load(pair + kLanes));
            }
          }
        }
      }
    }
  }
}

// Pack rows [row_begin, row_end) of A and multiply, kRowBlock at a time: what one thread does. The epilogue's rows count
// from the first row of A.
template <class Op, class T, class Index, class Panels, class Epilogue>
void gemm_rows(const Matrix<T, Index>& a, Along along, int64_t row_begin, int64_t row_end, int64_t k, const Panels& b,
               int64_t panel_begin, int64_t panel_end, const Epilogue& epilogue) {
  if (row_begin >= row_end) return;
  const int64_t blocks = ceil_div(row_end - row_begin, kRowBlock);
  const int64_t height = ceil_div(row_end - row_begin, blocks);
  const Scratch<uint32_t> packed(static_cast<size_t>(packed_row_words<Op>(height, k)));
  for (int64_t first = row_begin; first < row_end; first += height) {
    const int64_t rows = std::min(height, row_end - first);
    pack_rows<Op>(a, along, first, rows, k, packed);
    multiply<Op>(PackedRows(packed, rows, along), b, k, panel_begin, panel_end,
                 [&](int64_t row, int64_t panel, vf lower, vf upper) { epilogue(first + row, panel, lower, upper); });
  }
}

// Rows of A, from here on, for which packing B beforehand pays.
constexpr int64_t kFewRows = 4 * kTileRows;
// Tasks there should be for each thread, so that threads end together.
constexpr int64_t kTasksPerThread = 4;

// gemm_rows over m rows and n columns, cut into tasks for the threads: by rows as far as these go, because every task
// packs its rows of A.
template <class Op, class T, class Index, class Panels, class Epilogue>
void gemm_parallel(const Matrix<T, Index>& a, Along along, int64_t m, int64_t n, int64_t k, const Panels& b,
                   const Epilogue& epilogue) {
  if (m == 0 || n == 0) return;
  const int64_t threads = num_threads(), tasks = threads == 1 ? 1 : threads * kTasksPerThread;
  const int64_t wanted = std::clamp(round_up(ceil_div(m, tasks), kTileRows), kFewRows, kRowBlock);
  const int64_t row_blocks = ceil_div(m, wanted), height = ceil_div(m, row_blocks);
  const int64_t all = panels(n);
  const int64_t width = ceil_div(all, std::min(all, ceil_div(std::min(tasks, 2 * threads), row_blocks)));
  const int64_t groups = ceil_div(all, width);
  parallel_for(row_blocks * groups, [&](int64_t task) {
    const int64_t row = task / groups * height, panel = task % groups * width;
    gemm_rows<Op>(a, along, row, std::min(m, row + height), k, b, panel, std::min(all, panel + width), epilogue);
  });
}

// The whole product on the threads: B is packed first where that pays.
template <class Op, class TA, class TB, class IA, class IB, class Epilogue>
void gemm(const Matrix<TA, IA>& a, Along a_along, const Matrix<TB, IB>& b, Along b_along, int64_t m, int64_t n,
          int64_t k, const Epilogue& epilogue) {
  if (m <= kFewRows) {
    gemm_parallel<Op>(a, a_along, m, n, k, LoosePanels<Op, TB, IB>{b, b_along, n, k}, epilogue);
    return;
  }
  const Scratch<uint32_t> packed(static_cast<size_t>(packed_words<Op>(n, k)));
  pack_weights<Op>(b, b_along, n, k, packed);
  gemm_parallel<Op>(a, a_along, m, n, k, PackedPanels{packed, kPanel * words<Op>(k)}, epilogue);
}

// --- epilogues

// Store the two vectors of a row of a panel to columns of y [.., n], less those beyond n.
template <class T>
KL_INLINE void store_panel(T* y, int64_t n, int64_t panel, vf lower, vf upper) {
  const int64_t column = panel * kPanel, left = n - column;
  if (left >= kPanel) {
    store(y + column, lower);
    store(y + column + kLanes, upper);
    return;
  }
  store_lanes(y + column, lower, static_cast<int>(std::min<int64_t>(left, kLanes)));
  if (left > kLanes) store_lanes(y + column + kLanes, upper, static_cast<int>(left - kLanes));
}

// Ask for the memory of a row of a panel two tiles further down, which is written before long: large results are not in
// the caches. An address beyond the last row does no harm.
template <class T>
KL_INLINE void expect_write(const T* y, int64_t stride, int64_t row, int64_t panel) {
  const int64_t offset = (row + 2 * kTileRows) * stride + panel * kPanel;
  const auto* const at = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(y) + offset * sizeof(T));
  constexpr int kLine = 64;
  for (int line = 0; line < kPanel * static_cast<int>(sizeof(T)); line += kLine) __builtin_prefetch(at + line, 1, 2);
}

// y[row, :] = sums
template <class T>
struct Store {
  T* y;
  int64_t n, stride;
  KL_INLINE void operator()(int64_t row, int64_t panel, vf lower, vf upper) const {
    expect_write(y, stride, row, panel);
    store_panel(y + row * stride, n, panel, lower, upper);
  }
};

// y[row, :] = sums + bias
template <class T, class TBias>
struct StoreBiased {
  T* y;
  int64_t n, stride;
  const TBias* bias;
  KL_INLINE void operator()(int64_t row, int64_t panel, vf lower, vf upper) const {
    expect_write(y, stride, row, panel);
    const int64_t column = panel * kPanel;
    const auto of = [&](int64_t begin) {
      return begin >= n ? vf{} : load_lanes(bias + begin, static_cast<int>(std::min<int64_t>(n - begin, kLanes)));
    };
    store_panel(y + row * stride, n, panel, lower + of(column), upper + of(column + kLanes));
  }
};

}  // namespace kl::gemm
