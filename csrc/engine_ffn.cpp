// One token a row through a gated feed-forward network, dense or a mixture of experts (nn/ffn), and its residual.

#include "engine.h"
#include "rows.h"

namespace kl::engine {
namespace {

// h[n] <- silu(gate[n]) up[n] for n < count; `sums` holds gate and, kItem behind it, up.
void activate(const float* sums, int64_t count, float* h) {
  for_lanes(count, [&](int64_t i, int lanes) {
    store_lanes(h + i, silu(load_lanes(sums + i, lanes)) * load_lanes(sums + kItem + i, lanes), lanes);
  });
}

// Activations [begin, begin + count) of a dense network for all rows.
void dense_item(const SwiGluLayer& layer, int64_t begin, int64_t count, const char* x, int64_t rows, float* h) {
  const Scratch<float> sums(static_cast<size_t>(2 * rows * kItem));
  block_product(layer.in, begin, begin + count, x, rows, sums, 2 * kItem);
  block_product(layer.in, layer.at_up + begin, layer.at_up + begin + count, x, rows, sums + kItem, 2 * kItem);
  for (int64_t m = 0; m < rows; ++m) activate(sums + 2 * m * kItem, count, h + m * layer.F + begin);
}

// The chosen experts and their weights for one row: ops/moe/router.py, Eqs. 1 to 3.
void route(const MoeLayer& layer, const float* x, int64_t D, float* weights, int64_t* experts) {
  const Scratch<float> scores(static_cast<size_t>(layer.E)), biased(static_cast<size_t>(layer.E));
  for (int64_t e = 0; e < layer.E; ++e) {
    scores[e] = sum_row(D, [&](int64_t i, int lanes, vf total) {
      return fma(load_lanes(layer.router + e * D + i, lanes), load_lanes(x + i, lanes), total);
    });
  }
  // Eq. 1
  float largest = scores[0], total = 0;
  for (int64_t e = 1; e < layer.E; ++e) largest = std::max(largest, scores[e]);
  for (int64_t e = 0; e < layer.E; ++e) {
    scores[e] = layer.softmax ? exp(splat(scores[e] - largest))[0] : sigmoid(splat(scores[e]))[0];
    total += scores[e];
  }
  for (int64_t e = 0; e < layer.E; ++e) {
    if (layer.softmax) scores[e] /= total;
    biased[e] = scores[e] + layer.bias[e];
  }
  // Eq. 2
  float chosen = 0;
  for (int64_t j = 0; j < layer.k; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < layer.E; ++e) {
      if (!std::isnan(biased[e]) && (best < 0 || biased[e] > biased[best])) best = e;
    }
    best = std::max<int64_t>(best, 0);
    biased[best] = NAN;
    experts[j] = best;
    weights[j] = scores[best];
    chosen += scores[best];
  }
  // Eq. 3
  for (int64_t j = 0; j < layer.k; ++j) {
    if (layer.renormalize) weights[j] /= chosen + 1e-20f;
    weights[j] *= static_cast<float>(layer.scaling);
  }
}

// Sort the slots m * k + j of a call by expert. Chosen expert number a is work.chosen[a], and its slots are work.slots
// from work.first_slot[a] to work.first_slot[a + 1]; numbers from the count of chosen experts on have none.
void sort_by_expert(const MoeLayer& layer, const Workspace& work, int64_t rows, int64_t most) {
  int64_t count = 0, at = 0;
  for (int64_t e = 0; e < layer.E; ++e) {
    const int64_t first = at;
    for (int64_t slot = 0; slot < rows * layer.k; ++slot) {
      if (work.experts[slot] == e) work.slots[at++] = slot;
    }
    if (at == first) continue;
    work.chosen[count] = e;
    work.first_slot[count++] = first;
  }
  for (; count <= most; ++count) work.first_slot[count] = at;
}

}  // namespace

void swiglu_layer(const Context& c, const SwiGluLayer& layer) {
  const int64_t rows = c.call.rows;
  c.team.phase(ceil_div(layer.F, kItem), [&](int64_t item) {
    const int64_t begin = item * kItem, count = std::min(kItem, layer.F - begin);
    dense_item(layer, begin, count, c.work.operand, rows, c.work.gated);
  });
  operand_phase(c, layer.down, c.work.gated, layer.F, c.work.gated_operand);
  product_phase(c, layer.down, c.work.gated_operand, c.work.stream, c.model.D, true);
}

void moe_layer(const Context& c, const MoeLayer& layer) {
  const int64_t rows = c.call.rows, D = c.model.D, k = layer.k;
  const int64_t in_bytes = row_bytes(layer.in), down_bytes = row_bytes(layer.down);
  const SwiGluLayer& shared = layer.shared;
  const Workspace& work = c.work;
  c.team.phase(rows, [&](int64_t m) {
    make_operand(layer.in, work.normed + m * D, work.row_operand + m * in_bytes);
    route(layer, work.normed + m * D, D, work.weights + m * k, work.experts + m * k);
  });
  const int64_t most = std::min(layer.E, rows * k);
  c.team.phase(1, [&](int64_t) { sort_by_expert(layer, work, rows, most); });

  // Up: slot i's activations at gated + i F, the shared experts' behind all of them.
  const int64_t tiles = ceil_div(layer.F, kItem), shared_tiles = ceil_div(shared.F, kItem);
  float* const shared_gated = work.gated + rows * k * layer.F;
  c.team.phase(most * tiles + shared_tiles, [&](int64_t item) {
    if (item >= most * tiles) {
      const int64_t first = (item - most * tiles) * kItem;
      dense_item(shared, first, std::min(kItem, shared.F - first), work.operand, rows, shared_gated);
      return;
    }
    const int64_t a = item / tiles, first = item % tiles * kItem, count = std::min(kItem, layer.F - first);
    const int64_t row = work.chosen[a] * layer.in_rows + first;
    const Scratch<float> sums(static_cast<size_t>(2 * kItem));
    for (int64_t at = work.first_slot[a]; at < work.first_slot[a + 1]; ++at) {
      const int64_t slot = work.slots[at];
      const char* const x = work.row_operand + slot / k * in_bytes;
      product(layer.in, row, row + count, x, sums);
      product(layer.in, row + layer.at_up, row + layer.at_up + count, x, sums + kItem);
      activate(sums, count, work.gated + slot * layer.F + first);
    }
  });
  char* const shared_operand = work.gated_operand + rows * k * down_bytes;
  const int64_t shared_blocks = shared.F ? ceil_div(rows, kRows) : 0;
  c.team.phase(rows * k + shared_blocks, [&](int64_t i) {
    if (i < rows * k) {
      make_operand(layer.down, work.gated + i * layer.F, work.gated_operand + i * down_bytes);
    } else {
      make_block(shared.down, shared_gated, shared.F, rows, i - rows * k, shared_operand);
    }
  });

  // Down: the slots of a row are added in their order, then the shared experts, then the stream.
  c.team.phase(ceil_div(D, kItem), [&](int64_t item) {
    const int64_t first = item * kItem, end = std::min(D, first + kItem);
    const Scratch<float> sums(static_cast<size_t>(rows * (k + 1) * kItem));
    for (int64_t a = 0; a < most; ++a) {
      const int64_t row = work.chosen[a] * layer.down_rows;
      for (int64_t at = work.first_slot[a]; at < work.first_slot[a + 1]; ++at) {
        const int64_t slot = work.slots[at];
        product(layer.down, row + first, row + end, work.gated_operand + slot * down_bytes, sums + slot * kItem);
      }
    }
    float* const of_shared = sums + rows * k * kItem;
    if (shared.F) block_product(shared.down, first, end, shared_operand, rows, of_shared, kItem);
    for (int64_t m = 0; m < rows; ++m) {
      for_lanes(end - first, [&](int64_t i, int lanes) {
        vf y{};
        for (int64_t j = 0; j < k; ++j) {
          y = fma(splat(work.weights[m * k + j]), load_lanes(sums + (m * k + j) * kItem + i, lanes), y);
        }
        if (shared.F) y += load_lanes(of_shared + m * kItem + i, lanes);
        float* const to = work.stream + m * D + first + i;
        store_lanes(to, load_lanes(to, lanes) + y, lanes);
      });
    }
  });
}

}  // namespace kl::engine
