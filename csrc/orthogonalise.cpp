// Newton-Schulz iteration on matrices, equations as numbered in ops/orthogonalise/reference.py:
//
//   X_0 = x / (|x|_F + tiny)                                    (1)
//   A = X X^T                                                   (2)
//   X <- a X + (b A + c A A) X                                  (3)
//
// Products of bfloat16 with float32 sums. X and A are rounded once and every term of (3) sees the same rounded matrix:
// then an error of X passes through the whole polynomial, whose slope is small near singular values of one, and not
// through single terms, whose slopes are up to 14. A and A A are symmetric: the part on and below the diagonal is computed and mirrored. Small matrices run one on a
// thread, a single large one on all threads, with the same bits.

#include <cmath>

#include "gemm.h"

namespace kl {
namespace {

using gemm::Along;
using gemm::kPanel;

constexpr int kSteps = 5;
constexpr float kA = 3.4445f, kB = -4.7750f, kC = 2.0315f;
constexpr float kTiny = 1e-7f;
// Rows of a symmetric product that are computed up to the same column.
constexpr int64_t kBand = 64;
// Side of the squares by which a matrix is transposed.
constexpr int64_t kSquare = 16;

using Rows = gemm::Matrix<bf16>;

// y[j][i] = scale x[i][j] for x [rows, columns]
template <class TX, class TY>
void transpose(const TX* x, int64_t rows, int64_t columns, float scale, TY* y) {
  parallel_for(ceil_div(rows, kSquare), [&](int64_t band) {
    const int64_t end = std::min(rows, (band + 1) * kSquare);
    for (int64_t j0 = 0; j0 < columns; j0 += kSquare) {
      for (int64_t j = j0; j < std::min(columns, j0 + kSquare); ++j) {
        for (int64_t i = band * kSquare; i < end; ++i) {
          y[j * rows + i] = from_float<TY>(scale * to_float(x[i * columns + j]));
        }
      }
    }
  });
}

// y[i] = scale x[i]
template <class TX, class TY>
void convert(const TX* x, int64_t size, float scale, TY* y) {
  for_lanes(size, [&](int64_t i, int lanes) { store_lanes(y + i, splat(scale) * load_lanes(x + i, lanes), lanes); });
}

// Pack B [k, n] and call f(panels).
template <class F>
void with_panels(const Rows& b, Along along, int64_t n, int64_t k, const F& f) {
  const Scratch<uint32_t> packed(static_cast<size_t>(gemm::packed_words<bf16>(n, k)));
  gemm::pack_weights<bf16>(b, along, n, k, packed);
  f(gemm::PackedPanels{packed, kPanel * gemm::words<bf16>(k)});
}

// c = epilogue of a b^T, symmetric [r, r]: bands of rows up to the diagonal, then the mirror image.
template <class Epilogue>
void symmetric_product(const bf16* a, int64_t r, int64_t k, bf16* c, const Epilogue& epilogue) {
  with_panels(Rows{a, k}, Along::kRow, r, k, [&](const gemm::PackedPanels& panels) {
    const int64_t bands = ceil_div(r, kBand);
    // The longest bands first, so that threads end together.
    parallel_for(bands, [&](int64_t item) {
      const int64_t begin = (bands - 1 - item) * kBand, end = std::min(r, begin + kBand);
      gemm::gemm_rows<bf16>(Rows{a, k}, Along::kRow, begin, end, k, panels, 0, ceil_div(end, kPanel), epilogue);
    });
  });
  parallel_for(ceil_div(r, kBand), [&](int64_t band) {
    for (int64_t i = band * kBand; i < std::min(r, (band + 1) * kBand); ++i) {
      for (int64_t j = i + 1; j < r; ++j) c[i * r + j] = c[j * r + i];
    }
  });
}

// Eqs. 2 and 3, once, on x [r, n]; gram, update [r, r] and next [r, n] are scratch. The result is in next.
void step(const bf16* x, int64_t r, int64_t n, bf16* gram, bf16* update, bf16* next) {
  symmetric_product(x, r, n, gram, gemm::Store<bf16>{gram, r, r});
  symmetric_product(gram, r, r, update, [&](int64_t row, int64_t panel, vf lower, vf upper) {
    const int64_t column = panel * kPanel;
    const auto mixed = [&](vf sums, int64_t begin) {
      if (begin >= r) return sums;
      const int lanes = static_cast<int>(std::min<int64_t>(r - begin, kLanes));
      return fma(splat(kC), sums, splat(kB) * load_lanes(gram + row * r + begin, lanes));
    };
    gemm::store_panel(update + row * r, r, panel, mixed(lower, column), mixed(upper, column + kLanes));
  });
  const auto add = [&](int64_t row, int64_t panel, vf lower, vf upper) {
    const int64_t column = panel * kPanel;
    const auto mixed = [&](vf sums, int64_t begin) {
      if (begin >= n) return sums;
      const int lanes = static_cast<int>(std::min<int64_t>(n - begin, kLanes));
      return fma(splat(kA), load_lanes(x + row * n + begin, lanes), sums);
    };
    gemm::store_panel(next + row * n, n, panel, mixed(lower, column), mixed(upper, column + kLanes));
  };
  with_panels(Rows{x, n}, Along::kColumn, n, r, [&](const gemm::PackedPanels& panels) {
    gemm::gemm_parallel<bf16>(Rows{update, r}, Along::kRow, r, n, r, panels, add);
  });
}

// 1 / max(|x|_F, tiny), rows summed one after the other.
float inverse_norm(const float* x, int64_t rows, int64_t columns) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    vf sums{};
    for_lanes(columns, [&](int64_t j, int lanes) {
      const vf v = load_lanes(x + i * columns + j, lanes);
      sums = fma(v, v, sums);
    });
    total += sum(sums);
  }
  return 1.0f / std::max(static_cast<float>(std::sqrt(total)), kTiny);
}

void one_matrix(const float* x, int64_t rows, int64_t columns, float* y) {
  const bool tall = rows > columns;
  const int64_t r = std::min(rows, columns), n = std::max(rows, columns), size = r * n;
  const Scratch<bf16> first(static_cast<size_t>(size)), second(static_cast<size_t>(size));
  const Scratch<bf16> gram(static_cast<size_t>(r * r)), update(static_cast<size_t>(r * r));
  bf16 *now = first, *next = second;
  const float scale = inverse_norm(x, rows, columns);
  if (tall) {
    transpose(x, rows, columns, scale, now);
  } else {
    convert(x, size, scale, now);
  }
  for (int i = 0; i < kSteps; ++i) {
    step(now, r, n, gram, update, next);
    std::swap(now, next);
  }
  if (tall) {
    transpose(now, r, n, 1.0f, y);
  } else {
    convert(now, size, 1.0f, y);
  }
}

}  // namespace
}  // namespace kl

// y = orthogonalise(x) for `count` matrices [rows, columns], float32.
KL_EXPORT int64_t kl_orthogonalise(const float* x, float* y, int64_t count, int64_t rows, int64_t columns) {
  const int64_t size = rows * columns;
  kl::parallel_for(count, [&](int64_t i) { kl::one_matrix(x + i * size, rows, columns, y + i * size); });
  return 0;
}
