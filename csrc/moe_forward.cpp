// The experts' gated MLPs, forward. Equations as numbered in ops/moe/reference.py:
//
//   a_e = silu(w1_e x) * (w3_e x),   y_e = w2_e a_e                                         (1)
//   o = sum_e c_e y_e                                                                       (2)
//
// The panels of the first product hold the same columns of w1_e x in their lower vector and of w3_e x in their upper
// one, so that the epilogue has both halves of a gate at once, in float32.

#include "moe_products.h"

namespace kl::moe {
namespace {

// Op: the type of the operands of products; X and W: those of the tensors.
template <class Op, class X, class W>
class Forward {
 public:
  Forward(const Plan& plan, const X* x, const W* w1, const W* w3, const W* w2, float* sums, Op* o, Op* h, int64_t D,
          int64_t F)
      : plan_(plan), x_(x), w1_(w1), w2_(w2), sums_(sums), o_(o), h_(h), D_(D), F_(F), halves_(ceil_div(F, kLanes)),
        places_(static_cast<size_t>(halves_ * kPanel)), up_words_(gemm::packed_words<Op>(halves_ * kPanel, D)),
        down_words_(gemm::packed_words<Op>(D, F)), packed_(static_cast<size_t>(2 * (up_words_ + down_words_))),
        activations_(static_cast<size_t>(2 * plan.longest * F)) {
    // Columns that do not exist repeat the last one; nobody stores them.
    for (int64_t i = 0; i < halves_ * kPanel; ++i) {
      const int64_t f = std::min(i / kPanel * kLanes + i % kLanes, F - 1);
      places_[i] = f * D + (i % kPanel < kLanes ? 0 : distance(w1, w3));
    }
  }

  void run() {
    for (int64_t step = 0; step < plan_.active + 2; ++step) {
      const Run *const packing = at(step), *const upward = at(step - 1), *const downward = at(step - 2);
      const Items down = downward ? Items(downward->rows, gemm::panels(D_)) : Items();
      const Items up = upward ? Items(upward->rows, halves_) : Items();
      // w2 is packed a step later than w1 and w3, as it is used a step later.
      const int64_t up_packs = packing && !packing->loose() ? pack_items(up_operand(*packing)) : 0;
      const int64_t down_packs = upward && !upward->loose() ? pack_items(down_operand(*upward)) : 0;
      parallel_for(down.count() + up.count() + up_packs + down_packs, [&](int64_t item) {
        if (item < down.count()) return down_item(*downward, down, item, step);
        item -= down.count();
        if (item < up.count()) return up_item(*upward, up, item, step - 1);
        item -= up.count();
        if (item < up_packs) return pack_item(up_operand(*packing), item, packed_up(step));
        pack_item(down_operand(*upward), item - up_packs, packed_down(step - 1));
      });
    }
  }

 private:
  const Run* at(int64_t i) const { return i < 0 || i >= plan_.active ? nullptr : plan_.runs + i; }
  // Two buffers of each kind, taken in turn.
  uint32_t* packed_up(int64_t i) const { return packed_ + (i & 1) * up_words_; }
  uint32_t* packed_down(int64_t i) const { return packed_ + 2 * up_words_ + (i & 1) * down_words_; }
  Op* activations(int64_t i) const { return activations_ + (i & 1) * plan_.longest * F_; }

  gemm::LoosePanels<Op, W> up_operand(const Run& run) const {
    return {Matrix<W>{w1_ + run.expert * F_ * D_, 1, places_}, Along::kRow, halves_ * kPanel, D_};
  }
  gemm::LoosePanels<Op, W> down_operand(const Run& run) const {
    return {Matrix<W>{w2_ + run.expert * D_ * F_, F_}, Along::kRow, D_, F_};
  }

  // Eq. 1: a, for a block of rows and a range of columns.
  void up_item(const Run& run, const Items& items, int64_t item, int64_t turn) const {
    const int64_t begin = items.row_begin(item), end = std::min(run.rows, begin + items.height);
    const Matrix<X, int32_t> tokens{x_, D_, plan_.tokens + run.first};
    Op* const out = activations(turn);
    Op* const kept = h_ == nullptr ? nullptr : h_ + run.first * 2 * F_;
    multiply<Op>(run, tokens, begin, end, D_, up_operand(run), packed_up(turn), items.panel_begin(item),
                 items.panel_end(item), [&](int64_t row, int64_t panel, vf gate, vf up) {
                   const int64_t f = panel * kLanes;
                   const int lanes = static_cast<int>(std::min<int64_t>(F_ - f, kLanes));
                   store_lanes(out + row * F_ + f, swiglu(gate, up), lanes);
                   if (kept == nullptr) return;
                   store_lanes(kept + row * 2 * F_ + f, gate, lanes);
                   store_lanes(kept + row * 2 * F_ + F_ + f, up, lanes);
                 });
  }

  // Eq. 2: what the expert says of a block of its rows, added up.
  void down_item(const Run& run, const Items& items, int64_t item, int64_t step) const {
    const Row* const rows = plan_.rows + run.first;
    using Sum = Combine<Op>;
    const int64_t begin = Sum::boundary(rows, items.row_begin(item), run.rows);
    const int64_t end = Sum::boundary(rows, items.row_begin(item) + items.height, run.rows);
    const int64_t turn = step - 2;
    multiply<Op>(run, Matrix<Op>{activations(turn), F_}, begin, end, F_, down_operand(run), packed_down(turn),
                 items.panel_begin(item), items.panel_end(item), Sum{rows, sums_, o_, D_, true});
  }

  const Plan& plan_;
  const X* const x_;
  const W *const w1_, *const w2_;
  float* const sums_;
  Op *const o_, *const h_;
  const int64_t D_, F_, halves_;
  const Scratch<int64_t> places_;
  const int64_t up_words_, down_words_;
  const Scratch<uint32_t> packed_;
  const Scratch<Op> activations_;
};

}  // namespace
}  // namespace kl::moe

// o [M, D] and, unless null, h [M k, 2 F] (w1 x, then w3 x, rows sorted by expert), both of type op, from x [M, D],
// w1 and w3 [E, F, D], w2 [E, D, F], weights [M, k] and experts [M, k]. sums [M, D] is scratch, for op bfloat16.
// wrong[0] is the first assignment whose expert does not exist, and then nothing else happens; -1 if all do.
KL_EXPORT int64_t kl_grouped_mlp_forward(int64_t op, int64_t x_type, int64_t w_type, int64_t weight_type, const void* x,
                                         const void* w1, const void* w3, const void* w2, const void* weights,
                                         const int64_t* experts, float* sums, void* o, void* h, int64_t* wrong,
                                         int64_t M, int64_t k, int64_t E, int64_t D, int64_t F) {
  using namespace kl;
  *wrong = moe::find_wrong_expert(experts, M * k, E);
  if (*wrong >= 0) return 0;
  return dispatch(weight_type, [&](auto weight_zero) -> int64_t {
    using TWeight = decltype(weight_zero);
    const moe::Plan plan(experts, static_cast<const TWeight*>(weights), M, k, E);
    return moe::dispatch_types(op, x_type, w_type, [&](auto op_zero, auto x_zero, auto w_zero) {
      using Op = decltype(op_zero);
      using X = decltype(x_zero);
      using W = decltype(w_zero);
      Op* const out = static_cast<Op*>(o);
      if (k == 0) std::memset(out, 0, static_cast<size_t>(M * D) * sizeof(Op));
      expect_use(out, static_cast<size_t>(M * D) * sizeof(Op));
      if (sums != nullptr) expect_use(sums, static_cast<size_t>(M * D) * sizeof(float));
      if (h != nullptr) expect_use(h, static_cast<size_t>(M * k * 2 * F) * sizeof(Op));
      if constexpr (std::is_same_v<Op, float>) sums = out;
      moe::Forward<Op, X, W>(plan, static_cast<const X*>(x), static_cast<const W*>(w1), static_cast<const W*>(w3),
                             static_cast<const W*>(w2), sums, out, static_cast<Op*>(h), D, F)
          .run();
    });
  });
}
