// What the forward and the backward of the experts' gated MLPs share: the experts that have rows, their matrices as
// operands of gemm.h, a product of one expert cut into items, and the weighted sum over a token's experts.
//
// The experts go through a pipeline. In step s expert s has its matrices packed, the expert before it goes through the
// first of its products, and the one before that through the second; everything within a step is independent, so a step
// is one list of items for the threads. Buffers hold two experts, not all of them.
#pragma once

#include "gemm.h"
#include "moe.h"

namespace kl::moe {

using gemm::Along;
using gemm::kPanel;
using gemm::Matrix;
using gemm::words;

// An expert that has rows: [first, first + rows) of the sorted order.
struct Run {
  int64_t expert;
  int64_t first;
  int64_t rows;
  // With a few rows each panel would be used once after packing it: then it is packed where it is used.
  bool loose() const { return rows <= gemm::kRowBlock; }
};

// The sorted assignments of a call. Lives in the calling thread's scratch memory.
class Plan {
 public:
  template <class TWeight>
  Plan(const int64_t* experts, const TWeight* weights, int64_t M, int64_t k, int64_t E)
      : rows(static_cast<size_t>(M * k)), tokens(static_cast<size_t>(M * k)), runs(static_cast<size_t>(E)) {
    const Scratch<int64_t> offsets(static_cast<size_t>(E + 1));
    sort_by_expert(experts, weights, M, k, E, rows, tokens, offsets);
    for (int64_t e = 0; e < E; ++e) {
      if (offsets[e + 1] == offsets[e]) continue;
      runs[active++] = Run{e, offsets[e], offsets[e + 1] - offsets[e]};
      longest = std::max(longest, offsets[e + 1] - offsets[e]);
    }
  }

  const Scratch<Row> rows;
  const Scratch<int32_t> tokens;
  const Scratch<Run> runs;
  int64_t active = 0;
  int64_t longest = 0;
};

// Call f with values of the three element types: of the operands of products, of x, of the experts' matrices. float32
// products have float32 tensors; bfloat16 products round float32 tensors while they are packed. Returns 0, or 1 where
// the types do not go together.
template <class F>
int64_t dispatch_types(int64_t op, int64_t x, int64_t w, const F& f) {
  if (op == kFloat32) {
    if (x != kFloat32 || w != kFloat32) return 1;
    f(float{}, float{}, float{});
    return 0;
  }
  dispatch(x, [&](auto x_zero) { dispatch(w, [&](auto w_zero) { f(bf16{}, x_zero, w_zero); }); });
  return 0;
}

// Two matrices of one shape read as one operand: `places` are element offsets from the first. They are separate
// tensors; their distance is a whole number of elements because both are aligned to one.
template <class T>
int64_t distance(const T* from, const T* to) {
  return (reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from)) / static_cast<intptr_t>(sizeof(T));
}

// A product of one expert, [rows, K] by panels of B, as items: row blocks times ranges of whole groups of panels. Each
// range packs the rows again, so there are no more than give every thread an item. Nothing but speed depends on it: a
// row's bits are the same however a product is cut.
struct Items {
  Items() = default;
  Items(int64_t rows, int64_t all_panels, int64_t group = 1)
      : panels(all_panels), blocks(ceil_div(rows, gemm::kRowBlock)), height(ceil_div(rows, blocks)) {
    const int64_t groups = ceil_div(panels, group);
    width = ceil_div(groups, std::min(groups, ceil_div(num_threads(), blocks))) * group;
    ranges = ceil_div(panels, width);
  }
  int64_t count() const { return blocks * ranges; }
  int64_t row_begin(int64_t item) const { return item / ranges * height; }
  int64_t panel_begin(int64_t item) const { return item % ranges * width; }
  int64_t panel_end(int64_t item) const { return std::min(panels, panel_begin(item) + width); }

  int64_t panels = 0, blocks = 0, height = 0, width = 1, ranges = 0;
};

// The products of an item, with B packed before or where it is used.
template <class Op, class TA, class TB, class IA, class IB, class Epilogue>
void multiply(const Run& run, const Matrix<TA, IA>& a, int64_t row_begin, int64_t row_end, int64_t k,
              const gemm::LoosePanels<Op, TB, IB>& b, const uint32_t* packed, int64_t panel_begin, int64_t panel_end,
              const Epilogue& epilogue) {
  if (run.loose()) {
    gemm::gemm_rows<Op>(a, Along::kRow, row_begin, row_end, k, b, panel_begin, panel_end, epilogue);
  } else {
    const gemm::PackedPanels panels{packed, kPanel * words<Op>(k)};
    gemm::gemm_rows<Op>(a, Along::kRow, row_begin, row_end, k, panels, panel_begin, panel_end, epilogue);
  }
}

// Words [begin, end) of all panels of B, where pack_weights would put them. An item is kPackWords words of every panel
// where k runs from row to row in memory, and one panel where k runs along rows: memory is read in order.
constexpr int64_t kPackWords = 64;

template <class Op, class TB, class IB>
int64_t pack_items(const gemm::LoosePanels<Op, TB, IB>& b) {
  return b.along == Along::kRow ? gemm::panels(b.n) : ceil_div(words<Op>(b.k), kPackWords);
}

template <class Op, class TB, class IB>
void pack_item(const gemm::LoosePanels<Op, TB, IB>& b, int64_t item, uint32_t* out) {
  const int64_t all = words<Op>(b.k), length = kPanel * all;
  if (b.along == Along::kRow) {
    b.fill(item, 0, all, out + item * length);
    return;
  }
  const int64_t begin = item * kPackWords, end = std::min(all, begin + kPackWords);
  for (int64_t p = 0; p < gemm::panels(b.n); ++p) b.fill(p, begin, end, out + p * length + begin * kPanel);
}

// The sum over a token's rows, in float32: the first row of a token begins it, the last one writes it out.
template <class TOut>
struct Combine {
  const Row* rows;  // of the run
  float* sums;      // [M, D]; out itself where that is float32
  TOut* out;        // [M, D]
  int64_t D;
  bool weighted;

  // The first row of a block that begins near row `row`: rows of one token, which follow each other, stay together.
  static int64_t boundary(const Row* rows, int64_t row, int64_t count) {
    while (row > 0 && row < count && rows[row].token == rows[row - 1].token) ++row;
    return std::min(row, count);
  }

  KL_INLINE void operator()(int64_t r, int64_t panel, vf lower, vf upper) const {
    const Row& row = rows[r];
    const int64_t column = panel * kPanel, at = row.token * D + column, left = D - column;
    const vf weight = splat(weighted ? row.weight : 1.0f);
    __builtin_prefetch(sums + at + kPanel, 1);
    __builtin_prefetch(sums + at + kPanel + kLanes, 1);
    if (left >= kPanel) {
      add(row, at, weight * lower, kLanes);
      add(row, at + kLanes, weight * upper, kLanes);
      return;
    }
    add(row, at, weight * lower, static_cast<int>(std::min<int64_t>(left, kLanes)));
    if (left > kLanes) add(row, at + kLanes, weight * upper, static_cast<int>(left - kLanes));
  }

 private:
  // Which rows are first and last follows no pattern: where there are masks, none of this branches on it.
  KL_INLINE void add(const Row& row, int64_t at, vf x, int lanes) const {
    if constexpr (KL_HAS_AVX512) {
      x += load_first(sums + at, row.is_first ? 0 : lanes);
    } else if (!row.is_first) {
      x += load_lanes(sums + at, lanes);
    }
    if constexpr (!std::is_same_v<TOut, float>) {
      if constexpr (KL_HAS_AVX512) {
        store_first(out + at, x, row.is_last ? lanes : 0);
      } else if (row.is_last) {
        store_lanes(out + at, x, lanes);
      }
    }
    store_lanes(sums + at, x, lanes);
  }
};

}  // namespace kl::moe
