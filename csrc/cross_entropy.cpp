// Cross entropy of a linear head (ops/cross_entropy/chunk.py), a chunk of rows at a time. For each row m that counts,
//
//     z_m     = weight hidden_m                                                         (0)
//     loss_m  = log sum_v exp(z_mv) - z_{m, label_m}                                    (1)
//     dz_m    = (softmax(z_m) - onehot(label_m)) dloss_m                                (2)
//     dhidden = dz weight,  dweight = dz^T hidden                                       (3)
//
// Logits are float32, as the products leave them; bfloat16 are the operands of the products alone, dz among them. Rows
// that do not count are never read. dweight is summed chunk by chunk, and which rows make a chunk depends on the call's
// shapes and labels alone.

#include "gemm.h"
#include "vmath.h"

namespace kl {
namespace {

using gemm::Along;
using gemm::Matrix;

struct Sizes {
  int64_t rows, channels, vocabulary, chunk;
};

struct Results {
  float* loss;             // [M], or null
  float* total;            // one number, or null
  const float* grad_rows;  // [M], or null for ones
  void* grad_hidden;       // [M, D], or null
  float* grad_weight;      // [V, D], or null
};

// Memory of the caller: logits [chunk, V], and weight packed for its two products.
struct Workspace {
  float* logits;
  uint32_t *by_row, *by_column;
};

// Eq. 1 of one row; its logits become Eq. 2 times `scale` if that is not null.
float finish_row(float* z, int64_t vocabulary, int64_t label, const float* scale) {
  vf highest = splat(-INFINITY);
  for_lanes(vocabulary, [&](int64_t i, int lanes) {
    // Lanes beyond the row would read as zero: read its end once more instead.
    const vf v = lanes == kLanes ? load(z + i) : vocabulary >= kLanes ? load(z + vocabulary - kLanes) : splat(z[i]);
    highest = max(highest, v);
  });
  float top = highest[0];
  for (int i = 1; i < kLanes; ++i) top = std::max(top, highest[i]);
  for (int64_t i = 0; vocabulary < kLanes && i < vocabulary; ++i) top = std::max(top, z[i]);
  const float at_label = z[label];
  const vf shift = splat(top);
  vf total{};
  for_lanes(vocabulary, [&](int64_t i, int lanes) {
    vf e = exp(load_lanes(z + i, lanes) - shift);
    if (scale != nullptr) store_lanes(z + i, e, lanes);
    if (lanes < kLanes) {
      for (int k = lanes; k < kLanes; ++k) e[k] = 0.0f;
    }
    total = total + e;
  });
  const float summed = sum(total);
  if (scale != nullptr) {
    const vf factor = splat(*scale / summed);
    for_lanes(vocabulary, [&](int64_t i, int lanes) { store_lanes(z + i, load_lanes(z + i, lanes) * factor, lanes); });
    z[label] -= *scale;
  }
  return top - at_label + std::log(summed);
}

// The rows that count, in `rows`; how many, or -1 when a label is not a row of the weight.
int64_t find_rows(const int64_t* labels, int64_t ignore, const Sizes& sizes, int64_t* rows) {
  int64_t count = 0;
  for (int64_t m = 0; m < sizes.rows; ++m) {
    if (labels[m] == ignore) continue;
    if (labels[m] < 0 || labels[m] >= sizes.vocabulary) return -1;
    rows[count++] = m;
  }
  return count;
}

// dhidden[index[row], :] = sums
template <class T>
struct StoreRows {
  T* y;
  int64_t n;
  const int64_t* index;
  KL_INLINE void operator()(int64_t row, int64_t panel, vf lower, vf upper) const {
    gemm::store_panel(y + index[row] * n, n, panel, lower, upper);
  }
};

// dweight[row, :] += sums
struct AddRows {
  float* y;
  int64_t n;
  KL_INLINE void operator()(int64_t row, int64_t panel, vf lower, vf upper) const {
    float* const out = y + row * n;
    const int64_t column = panel * gemm::kPanel, left = n - column;
    const auto add = [&](int64_t at, int64_t some, vf x) {
      if (some <= 0) return;
      const int lanes = static_cast<int>(std::min<int64_t>(some, kLanes));
      store_lanes(out + at, load_lanes(out + at, lanes) + x, lanes);
    };
    add(column, left, lower);
    add(column + kLanes, left - kLanes, upper);
  }
};

// Eqs. 0 and 1 of the rows `index` [count], and Eq. 2 in place of the logits if there are gradients.
template <class Op, class H, class W>
void logits_of_chunk(const Matrix<H>& hidden, const Matrix<W>& weight, const int64_t* labels, const Sizes& sizes,
                     int64_t count, const Workspace& space, const Results& results, float* losses) {
  const int64_t V = sizes.vocabulary, D = sizes.channels;
  const gemm::Store<float> store{space.logits, V, V};
  if (space.by_row == nullptr) {
    const gemm::LoosePanels<Op, W> panels{weight, Along::kRow, V, D};
    gemm::gemm_parallel<Op>(hidden, Along::kRow, count, V, D, panels, store);
  } else {
    const gemm::PackedPanels panels{space.by_row, gemm::kPanel * gemm::words<Op>(D)};
    gemm::gemm_parallel<Op>(hidden, Along::kRow, count, V, D, panels, store);
  }
  const bool with_gradients = results.grad_hidden != nullptr;
  parallel_for(count, [&](int64_t row) {
    const int64_t m = hidden.index[row];
    const float scale = results.grad_rows == nullptr ? 1.0f : results.grad_rows[m];
    losses[row] = finish_row(space.logits + row * V, V, labels[m], with_gradients ? &scale : nullptr);
    if (results.loss != nullptr) results.loss[m] = losses[row];
  });
}

// Eq. 3 of a chunk whose dz stands in place of the logits.
template <class Op, class H, class W>
void gradients_of_chunk(const Matrix<H>& hidden, const Matrix<W>& weight, const Sizes& sizes, int64_t count,
                        const Workspace& space, const Results& results) {
  const int64_t V = sizes.vocabulary, D = sizes.channels;
  const Matrix<float> dz{space.logits, V};
  const StoreRows<H> store{static_cast<H*>(results.grad_hidden), D, hidden.index};
  if (space.by_column == nullptr) {
    const gemm::LoosePanels<Op, W> panels{weight, Along::kColumn, D, V};
    gemm::gemm_parallel<Op>(dz, Along::kRow, count, D, V, panels, store);
  } else {
    const gemm::PackedPanels panels{space.by_column, gemm::kPanel * gemm::words<Op>(V)};
    gemm::gemm_parallel<Op>(dz, Along::kRow, count, D, V, panels, store);
  }
  if (results.grad_weight == nullptr) return;
  const Scratch<uint32_t> packed(static_cast<size_t>(gemm::packed_words<Op>(D, count)));
  gemm::pack_weights<Op>(hidden, Along::kColumn, D, count, packed);
  const gemm::PackedPanels panels{packed, gemm::kPanel * gemm::words<Op>(count)};
  gemm::gemm_parallel<Op>(dz, Along::kColumn, V, D, count, panels, AddRows{results.grad_weight, D});
}

template <class Op, class H, class W>
void cross_entropy(const Matrix<H>& hidden, const Matrix<W>& weight, const int64_t* labels, const int64_t* rows,
                   int64_t count, const Sizes& sizes, const Workspace& space, const Results& results) {
  const int64_t V = sizes.vocabulary, D = sizes.channels;
  if (count > 0 && space.by_row != nullptr) gemm::pack_weights<Op>(weight, Along::kRow, V, D, space.by_row);
  if (count > 0 && space.by_column != nullptr) gemm::pack_weights<Op>(weight, Along::kColumn, D, V, space.by_column);
  const Scratch<float> losses(static_cast<size_t>(sizes.chunk));
  double total = 0;
  for (int64_t first = 0; first < count; first += sizes.chunk) {
    const int64_t here = std::min(sizes.chunk, count - first);
    const Matrix<H> chunk{hidden.data, hidden.stride, rows + first};
    logits_of_chunk<Op>(chunk, weight, labels, sizes, here, space, results, losses.get());
    for (int64_t row = 0; row < here; ++row) total += losses[row];
    if (results.grad_hidden != nullptr) gradients_of_chunk<Op>(chunk, weight, sizes, here, space, results);
  }
  if (results.total != nullptr) *results.total = static_cast<float>(total);
}

}  // namespace
}  // namespace kl

// hidden [M, D] and weight [V, D], contiguous along a row; labels [M]. loss [M] float32 or null, total one float32 or
// null. With gradients (grad_hidden [M, D] of the dtype of hidden, zero; grad_weight [V, D] float32, zero, or null) for
// the factors grad_rows [M] float32, or ones. Rows without a label that counts keep what loss and grad_hidden hold.
// logits [chunk, V]. by_row holds gemm::packed_words(V, D) words and by_column, unless there are no gradients,
// gemm::packed_words(D, V); both are null for few rows. Returns 1 when a label is not a row of the weight.
KL_EXPORT int64_t kl_cross_entropy(int64_t dtype, const void* hidden, int64_t hidden_stride, int64_t weight_dtype,
                                   const void* weight, int64_t weight_stride, const int64_t* labels, int64_t ignore,
                                   float* loss, float* total, const float* grad_rows, void* grad_hidden,
                                   float* grad_weight, float* logits, uint32_t* by_row, uint32_t* by_column,
                                   int64_t rows, int64_t channels, int64_t vocabulary, int64_t chunk) {
  using namespace kl;
  const Sizes sizes{rows, channels, vocabulary, chunk};
  const Scratch<int64_t> counted(static_cast<size_t>(rows));
  const int64_t count = find_rows(labels, ignore, sizes, counted);
  if (count < 0) return 1;
  dispatch(dtype, [&](auto zero) {
    using H = decltype(zero);
    dispatch(weight_dtype, [&](auto weight_zero) {
      using W = decltype(weight_zero);
      // Products in the dtype of hidden.
      cross_entropy<H>(Matrix<H>{static_cast<const H*>(hidden), hidden_stride, counted.get()},
                       Matrix<W>{static_cast<const W*>(weight), weight_stride}, labels, counted.get(), count, sizes,
                       Workspace{logits, by_row, by_column}, Results{loss, total, grad_rows, grad_hidden, grad_weight});
    });
  });
  return 0;
}
