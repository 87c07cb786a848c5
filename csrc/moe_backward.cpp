// The experts' gated MLPs, backward. Equations as numbered in ops/moe/reference.py, with h1 = w1 x, h3 = w3 x kept by
// the forward, b = w2^T do and a = silu(h1) h3:
//
//   dweights = b . a;   dw2 = sum_tokens do (c a)^T                                         (3)
//   dh1 = c b h3 silu'(h1),   dh3 = c b silu(h1)                                            (4)
//   dw1 = sum dh1 x^T,  dw3 = sum dh3 x^T,  dx = sum_e w1^T dh1 + w3^T dh3                  (5)
//
// dh1 and dh3 lie side by side, [rows, 2 F], so that dx is one product with K = 2 F and dw1 and dw3 are one with 2 F
// rows.

#include "moe_products.h"

namespace kl::moe {
namespace {

// Panels whose share of b . a is added up together; a fixed number, as sums of other parts would round otherwise.
constexpr int64_t kDotPanels = 8;
// Panels of a gradient of weights that an item computes, at most; it packs the other operand once for all of them.
constexpr int64_t kWeightPanels = 32;

// Addresses of the tensors of a call.
template <class Op, class X, class W>
struct Tensors {
  const Op* d_o;
  const X* x;
  const W *w1, *w3, *w2;
  const Op* h;
  float* sums;
  X* d_x;
  W *d_w1, *d_w3, *d_w2;
  float* d_weights;
};

template <class Op, class X, class W>
class Backward {
 public:
  Backward(const Plan& plan, const Tensors<Op, X, W>& tensors, int64_t D, int64_t F)
      : plan_(plan), t_(tensors), D_(D), F_(F), places_(static_cast<size_t>(2 * F)),
        inner_words_(gemm::packed_words<Op>(F, D)), outer_words_(gemm::packed_words<Op>(D, 2 * F)),
        packed_(static_cast<size_t>(2 * (inner_words_ + outer_words_))),
        d_h_(static_cast<size_t>(2 * plan.longest * 2 * F)), weighted_(static_cast<size_t>(2 * plan.longest * F)),
        dots_(static_cast<size_t>(2 * plan.longest * dot_groups() * kLanes)) {
    for (int64_t i = 0; i < 2 * F; ++i) places_[i] = i < F ? i * D : distance(t_.w1, t_.w3) + (i - F) * D;
  }

  void run() {
    for (int64_t step = 0; step < plan_.active + 2; ++step) {
      const Run *const packing = at(step), *const inner = at(step - 1), *const outer = at(step - 2);
      const int64_t counts[] = {
          outer ? weight_items(gemm::panels(D_)) : 0,
          outer ? weight_items(gemm::panels(F_)) : 0,
          outer ? dx_items(*outer).count() : 0,
          inner ? inner_items(*inner).count() : 0,
          outer ? 1 : 0,
          inner && !inner->loose() ? pack_items(outer_operand(*inner)) : 0,
          packing && !packing->loose() ? pack_items(inner_operand(*packing)) : 0,
      };
      int64_t total = 0;
      for (const int64_t count : counts) total += count;
      parallel_for(total, [&](int64_t item) {
        int kind = 0;
        for (; item >= counts[kind]; ++kind) item -= counts[kind];
        switch (kind) {
          case 0: return d_up_item(*outer, item, step - 2);
          case 1: return d_down_item(*outer, item, step - 2);
          case 2: return d_x_item(*outer, item, step - 2);
          case 3: return inner_item(*inner, item, step - 1);
          case 4: return d_weights_item(*outer, step - 2);
          case 5: return pack_item(outer_operand(*inner), item, packed_outer(step - 1));
          default: return pack_item(inner_operand(*packing), item, packed_inner(step));
        }
      });
    }
  }

  // Gradients of the experts without rows.
  void clear_idle(int64_t E) const {
    const int64_t size = F_ * D_;
    parallel_for(E, [&](int64_t e) {
      for (int64_t i = 0; i < plan_.active; ++i) {
        if (plan_.runs[i].expert == e) return;
      }
      for (W* d_w : {t_.d_w1, t_.d_w3, t_.d_w2}) std::memset(d_w + e * size, 0, static_cast<size_t>(size) * sizeof(W));
    });
  }

 private:
  const Run* at(int64_t i) const { return i < 0 || i >= plan_.active ? nullptr : plan_.runs + i; }
  int64_t dot_groups() const { return ceil_div(gemm::panels(F_), kDotPanels); }
  // Two buffers of each kind, taken in turn.
  uint32_t* packed_inner(int64_t i) const { return packed_ + (i & 1) * inner_words_; }
  uint32_t* packed_outer(int64_t i) const { return packed_ + 2 * inner_words_ + (i & 1) * outer_words_; }
  Op* d_h(int64_t i) const { return d_h_ + (i & 1) * plan_.longest * 2 * F_; }
  Op* weighted(int64_t i) const { return weighted_ + (i & 1) * plan_.longest * F_; }
  float* dots(int64_t i) const { return dots_ + (i & 1) * plan_.longest * dot_groups() * kLanes; }

  gemm::LoosePanels<Op, W> inner_operand(const Run& run) const {
    return {Matrix<W>{t_.w2 + run.expert * D_ * F_, F_}, Along::kColumn, F_, D_};
  }
  gemm::LoosePanels<Op, W> outer_operand(const Run& run) const {
    return {Matrix<W>{t_.w1 + run.expert * F_ * D_, 1, places_}, Along::kColumn, D_, 2 * F_};
  }
  Items inner_items(const Run& run) const { return Items(run.rows, gemm::panels(F_), kDotPanels); }
  Items dx_items(const Run& run) const { return Items(run.rows, gemm::panels(D_)); }

  // b, and what is left of it at once: a block of rows of the terms of Eq. 3 and of dh1, dh3 of Eq. 4.
  void inner_item(const Run& run, int64_t item, int64_t turn) const {
    const Items items = inner_items(run);
    const int64_t begin = items.row_begin(item), end = std::min(run.rows, begin + items.height);
    const Row* const rows = plan_.rows + run.first;
    const Op* const h = t_.h + run.first * 2 * F_;
    Op *const d_h_rows = d_h(turn), *const weighted_rows = weighted(turn);
    float* const dot_rows = dots(turn);
    const auto half = [&](int64_t row, int64_t f, vf b) __attribute__((always_inline)) {
      const int lanes = static_cast<int>(std::min<int64_t>(F_ - f, kLanes));
      const Op* const gates = h + row * 2 * F_ + f;
      const vf gate = load_lanes(gates, lanes), up = load_lanes(gates + F_, lanes), c = splat(rows[row].weight);
      const vf s = sigmoid(gate), gated = gate * s, a = gated * up, d_a = c * b;
      store_lanes(weighted_rows + row * F_ + f, c * a, lanes);
      // Eq. 4
      Op* const d_gates = d_h_rows + row * 2 * F_ + f;
      store_lanes(d_gates, d_a * up * (s * fma(gate, splat(1.0f) - s, splat(1.0f))), lanes);
      store_lanes(d_gates + F_, d_a * gated, lanes);
      return b * a;
    };
    const auto epilogue = [&](int64_t row, int64_t panel, vf lower, vf upper) {
      const int64_t f = panel * kPanel;
      // Eq. 3: lane by lane; columns that do not exist are zero in every factor.
      vf dot = half(row, f, lower);
      if (f + kLanes < F_) dot += half(row, f + kLanes, upper);
      float* const sum = dot_rows + (row * dot_groups() + panel / kDotPanels) * kLanes;
      store(sum, panel % kDotPanels == 0 ? dot : load(sum) + dot);
    };
    multiply<Op>(run, Matrix<Op, int32_t>{t_.d_o, D_, plan_.tokens + run.first}, begin, end, D_, inner_operand(run),
                 packed_inner(turn), items.panel_begin(item), items.panel_end(item), epilogue);
  }

  // Eq. 3: the gradient of the weights.
  void d_weights_item(const Run& run, int64_t turn) const {
    for (int64_t r = 0; r < run.rows; ++r) {
      vf dot{};
      for (int64_t g = 0; g < dot_groups(); ++g) dot += load(dots(turn) + (r * dot_groups() + g) * kLanes);
      t_.d_weights[plan_.rows[run.first + r].assignment] = sum(dot);
    }
  }

  // Eq. 5: dx, added up over a token's experts.
  void d_x_item(const Run& run, int64_t item, int64_t turn) const {
    using Sum = Combine<X>;
    const Items items = dx_items(run);
    const Row* const rows = plan_.rows + run.first;
    const int64_t begin = Sum::boundary(rows, items.row_begin(item), run.rows);
    const int64_t end = Sum::boundary(rows, items.row_begin(item) + items.height, run.rows);
    multiply<Op>(run, Matrix<Op>{d_h(turn), 2 * F_}, begin, end, 2 * F_, outer_operand(run), packed_outer(turn),
                 items.panel_begin(item), items.panel_end(item), Sum{rows, t_.sums, t_.d_x, D_, false});
  }

  // Items of a gradient with so many panels; the gradients of a step are as many products as threads can share.
  static int64_t weight_items(int64_t panels) {
    return std::max(ceil_div(panels, kWeightPanels), std::min(panels, ceil_div(num_threads(), 2)));
  }

  // dw [m, n] = sum over the run's rows of a [row, m] b [row, n], for an item's range of panels of n.
  template <class TA, class TB, class IA, class IB, class Epilogue>
  static void weight_product(const Run& run, int64_t item, const Matrix<TA, IA>& a, int64_t m, const Matrix<TB, IB>& b,
                             int64_t n, const Epilogue& epilogue) {
    const int64_t all = gemm::panels(n), items = weight_items(all), width = ceil_div(all, items);
    const int64_t begin = item * width, count = std::min(width, all - begin), length = kPanel * words<Op>(run.rows);
    if (count <= 0) return;
    const Scratch<uint32_t> packed(static_cast<size_t>(count * length));
    for (int64_t first = 0; first < words<Op>(run.rows); first += kPackWords) {
      for (int64_t p = 0; p < count; ++p) {
        gemm::pack_panel<Op>(b, Along::kColumn, n, run.rows, begin + p, first,
                             std::min(words<Op>(run.rows), first + kPackWords), packed + p * length + first * kPanel);
      }
    }
    gemm::gemm_rows<Op>(
        a, Along::kColumn, 0, m, run.rows, gemm::PackedPanels{packed, length}, 0, count,
        [&](int64_t row, int64_t panel, vf lower, vf upper) { epilogue(row, begin + panel, lower, upper); });
  }

  // Eq. 5: dw1 and dw3.
  void d_up_item(const Run& run, int64_t item, int64_t turn) const {
    W *const d_w1 = t_.d_w1 + run.expert * F_ * D_, *const d_w3 = t_.d_w3 + run.expert * F_ * D_;
    weight_product(run, item, Matrix<Op>{d_h(turn), 2 * F_}, 2 * F_,
                   Matrix<X, int32_t>{t_.x, D_, plan_.tokens + run.first}, D_,
                   [&](int64_t row, int64_t panel, vf lower, vf upper) {
                     gemm::store_panel(row < F_ ? d_w1 + row * D_ : d_w3 + (row - F_) * D_, D_, panel, lower, upper);
                   });
  }

  // Eq. 3: dw2.
  void d_down_item(const Run& run, int64_t item, int64_t turn) const {
    weight_product(run, item, Matrix<Op, int32_t>{t_.d_o, D_, plan_.tokens + run.first}, D_,
                   Matrix<Op>{weighted(turn), F_}, F_,
                   gemm::Store<W>{t_.d_w2 + run.expert * D_ * F_, F_, F_});
  }

  const Plan& plan_;
  const Tensors<Op, X, W> t_;
  const int64_t D_, F_;
  const Scratch<int64_t> places_;
  const int64_t inner_words_, outer_words_;
  const Scratch<uint32_t> packed_;
  const Scratch<Op> d_h_, weighted_;
  const Scratch<float> dots_;
};

}  // namespace
}  // namespace kl::moe

// The gradients of x, w1, w3, w2 and weights (float32), given that of o. d_o and h are of type op, d_x and the d_w of
// the types of x and w; other arguments as in kl_grouped_mlp_forward. sums [M, D] is scratch, for x bfloat16.
KL_EXPORT int64_t kl_grouped_mlp_backward(int64_t op, int64_t x_type, int64_t w_type, int64_t weight_type,
                                          const void* d_o, const void* x, const void* w1, const void* w3,
                                          const void* w2, const void* weights, const int64_t* experts, const void* h,
                                          float* sums, void* d_x, void* d_w1, void* d_w3, void* d_w2, float* d_weights,
                                          int64_t M, int64_t k, int64_t E, int64_t D, int64_t F) {
  using namespace kl;
  return dispatch(weight_type, [&](auto weight_zero) -> int64_t {
    using TWeight = decltype(weight_zero);
    const moe::Plan plan(experts, static_cast<const TWeight*>(weights), M, k, E);
    return moe::dispatch_types(op, x_type, w_type, [&](auto op_zero, auto x_zero, auto w_zero) {
      using Op = decltype(op_zero);
      using X = decltype(x_zero);
      using W = decltype(w_zero);
      X* const out = static_cast<X*>(d_x);
      if (k == 0) std::memset(out, 0, static_cast<size_t>(M * D) * sizeof(X));
      for (void* d_w : {d_w1, d_w3, d_w2}) expect_use(d_w, static_cast<size_t>(E * D * F) * sizeof(W));
      expect_use(d_x, static_cast<size_t>(M * D) * sizeof(X));
      if constexpr (std::is_same_v<X, float>) sums = out;
      const moe::Tensors<Op, X, W> tensors{
          static_cast<const Op*>(d_o), static_cast<const X*>(x),  static_cast<const W*>(w1), static_cast<const W*>(w3),
          static_cast<const W*>(w2),   static_cast<const Op*>(h), sums,                      out,
          static_cast<W*>(d_w1),       static_cast<W*>(d_w3),     static_cast<W*>(d_w2),     d_weights};
      moe::Backward<Op, X, W> backward(plan, tensors, D, F);
      backward.clear_idle(E);
      backward.run();
    });
  });
}
