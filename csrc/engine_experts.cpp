// A mixture of experts for many rows, from packed weights: o_m = sum_j c_mj down_e (silu(gate_e x_m) * (up_e x_m)).
//
// Tokens are sorted by expert and go through each expert's matrices in blocks of rows, in four phases of one parallel
// region: operands of x, activations, operands of these, sums. The last one is cut by columns alone, and adds a token's
// experts in sorted order, so the result is the same for any number of threads.

#include "engine.h"
#include "moe_products.h"

namespace kl::engine {
namespace {

// Rows of one expert that are multiplied together: [first, first + rows) of the sorted order.
struct Block {
  int64_t expert, first, rows;
};

constexpr int64_t kBlockRows = gemm::kRowBlock;
// Panels of an item: of activations, and of sums.
constexpr int64_t kPanels = 4;

// The operands of a block of rows begin at first * row_bytes: those of several rows together take no more than singly.
char* operands_at(const PackedWeight& w, char* all, int64_t first) { return all + first * row_bytes(w); }

template <class X>
void experts_of(const MoeLayer& layer, const X* x, const float* weights, const int64_t* experts, X* y, int64_t M,
                int64_t D) {
  const int64_t k = layer.k, F = layer.F, all = M * k;
  const Scratch<moe::Row> rows(static_cast<size_t>(all));
  const Scratch<int32_t> tokens(static_cast<size_t>(all));
  const Scratch<int64_t> offsets(static_cast<size_t>(layer.E + 1));
  moe::sort_by_expert(experts, weights, M, k, layer.E, rows, tokens, offsets);
  const Scratch<Block> blocks(static_cast<size_t>(layer.E + all / kBlockRows + 1));
  int64_t count = 0;
  for (int64_t e = 0; e < layer.E; ++e) {
    const int64_t here = offsets[e + 1] - offsets[e], pieces = ceil_div(here, kBlockRows);
    for (int64_t p = 0, first = offsets[e]; p < pieces; ++p) {
      const int64_t height = here / pieces + (p < here % pieces);
      blocks[count++] = Block{e, first, height};
      first += height;
    }
  }
  const Scratch<char> operands(static_cast<size_t>(all * row_bytes(layer.in)));
  const Scratch<char> gated_operands(static_cast<size_t>(all * row_bytes(layer.down)));
  const Scratch<float> gated(static_cast<size_t>(all * F));
  constexpr bool kIsFloat = std::is_same_v<X, float>;
  const Scratch<float> own_sums(static_cast<size_t>(kIsFloat ? 0 : M * D));
  float* sums = own_sums;
  if constexpr (kIsFloat) sums = y;
  const int64_t up_items = ceil_div(ceil_div(F, kTile), kPanels), down_items = ceil_div(ceil_div(D, kTile), kPanels);
  run_team(4, [&](Team& team) {
    team.phase(count, [&](int64_t item) {
      const Block& b = blocks[item];
      const gemm::Matrix<X, int32_t> gathered{x, D, tokens + b.first};
      make_operands(layer.in, gathered, 0, b.rows, operands_at(layer.in, operands, b.first));
    });
    team.phase(count * up_items, [&](int64_t item) {
      const Block& b = blocks[item / up_items];
      const int64_t begin = item % up_items * kPanels * kTile, end = std::min(F, begin + kPanels * kTile);
      const int64_t row = b.expert * layer.in_rows + begin, width = kPanels * kTile;
      const Scratch<float> both(static_cast<size_t>(2 * b.rows * width));
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t first = (row + half * layer.at_up) / kTile;
        linear_rows(layer.in, operands_at(layer.in, operands, b.first), b.rows, first,
                    first + ceil_div(end - begin, kTile), [&](int64_t r, int64_t panel, vf lower, vf upper) {
                      float* const to = both + (2 * r + half) * width + (panel - first) * kTile;
                      store(to, lower);
                      store(to + kLanes, upper);
                    });
      }
      for (int64_t r = 0; r < b.rows; ++r) {
        const float *const gate = both + 2 * r * width, *const up = gate + width;
        for_lanes(end - begin, [&](int64_t i, int lanes) {
          store_lanes(gated + (b.first + r) * F + begin + i, moe::swiglu(load(gate + i), load(up + i)), lanes);
        });
      }
    });
    team.phase(count, [&](int64_t item) {
      const Block& b = blocks[item];
      make_operands(layer.down, gemm::Matrix<float>{gated, F}, b.first, b.rows,
                    operands_at(layer.down, gated_operands, b.first));
    });
    team.phase(down_items, [&](int64_t item) {
      const int64_t begin = item * kPanels * kTile, end = std::min(D, begin + kPanels * kTile);
      for (int64_t i = 0; i < count; ++i) {
        const Block& b = blocks[i];
        const int64_t first = (b.expert * layer.down_rows + begin) / kTile;
        const moe::Combine<X> combine{rows + b.first, sums, y, D, true};
        linear_rows(layer.down, operands_at(layer.down, gated_operands, b.first), b.rows, first,
                    first + ceil_div(end - begin, kTile), [&](int64_t r, int64_t panel, vf lower, vf upper) {
                      combine(r, begin / kTile + panel - first, lower, upper);
                    });
      }
    });
  });
}

}  // namespace
}  // namespace kl::engine

// x, y [M, D] of `dtype`; weights and experts [M, k].
KL_EXPORT int64_t kl_engine_experts(const void* layer, const void* x, const float* weights, const int64_t* experts,
                                    void* y, int64_t M, int64_t D, int64_t dtype) {
  kl::dispatch(dtype, [&](auto zero) {
    using X = decltype(zero);
    kl::engine::experts_of(*static_cast<const kl::engine::MoeLayer*>(layer), static_cast<const X*>(x), weights, experts,
                           static_cast<X*>(y), M, D);
  });
  return 0;
}
