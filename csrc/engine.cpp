// One token a row through a whole model: embedding, layers, last norm, output head.

#include "engine.h"

#include "rows.h"

namespace kl::engine {
namespace {

constexpr int64_t kMostPhasesOfALayer = 16;

// Phase: the norm of the stream, as the operand of the product that follows. The values are rounded as the model's dtype
// would round them, so that a router sees what it saw in training.
void norm_phase(const Context& c, const float* weight, const PackedWeight& next) {
  const int64_t D = c.model.D, rows = c.call.rows;
  c.team.phase(ceil_div(rows, kRows), [&](int64_t block) {
    for (int64_t m = block * kRows; m < std::min(rows, (block + 1) * kRows); ++m) {
      float* const y = c.work.normed + m * D;
      dispatch(c.call.dtype, [&](auto zero) {
        using T = decltype(zero);
        rms_norm_row<T>(c.work.stream + m * D, weight, y, D, static_cast<float>(c.model.norm_eps));
        for_lanes(D, [&](int64_t i, int lanes) { store_lanes(y + i, rounded<T>(load_lanes(y + i, lanes)), lanes); });
      });
    }
    make_block(next, c.work.normed, D, rows, block, c.work.operand);
  });
}

template <class T>
void head_phase(const Context& c, T* logits) {
  const PackedWeight& head = c.model.head;
  const int64_t rows = c.call.rows, panels = gemm::panels(head.outputs);
  constexpr int64_t kPanels = 4;
  c.team.phase(ceil_div(panels, kPanels), [&](int64_t item) {
    for (int64_t first = 0; first < rows; first += kRows) {
      linear_rows(head, c.work.operand + first / kRows * block_bytes(head), std::min(kRows, rows - first),
                  item * kPanels, std::min(panels, (item + 1) * kPanels),
                  [&](int64_t row, int64_t panel, vf lower, vf upper) {
                    gemm::store_panel(logits + (first + row) * head.outputs, head.outputs, panel, lower, upper);
                  });
    }
  });
}

void step(const Context& c) {
  const Model& model = c.model;
  const int64_t D = model.D;
  c.team.phase(c.call.rows, [&](int64_t m) {
    dispatch(model.embedding_dtype, [&](auto zero) {
      using T = decltype(zero);
      const T* const row = static_cast<const T*>(model.embedding) + c.call.tokens[m] * D;
      for_lanes(D, [&](int64_t i, int lanes) {
        store_lanes(c.work.stream + m * D + i, load_lanes(row + i, lanes), lanes);
      });
    });
  });
  for (int64_t i = 0; i < model.num_layers; ++i) {
    const Layer& layer = model.layers[i];
    if (layer.mixer_kind == kKda) {
      const auto& mixer = *static_cast<const KdaLayer*>(layer.mixer);
      norm_phase(c, layer.mixer_norm, mixer.in);
      kda_layer(c, mixer, c.call.states[i]);
    } else {
      const auto& mixer = *static_cast<const MlaLayer*>(layer.mixer);
      norm_phase(c, layer.mixer_norm, mixer.in);
      mla_layer(c, mixer, c.call.states[i]);
    }
    if (layer.ffn_kind == kSwiGlu) {
      const auto& ffn = *static_cast<const SwiGluLayer*>(layer.ffn);
      norm_phase(c, layer.ffn_norm, ffn.in);
      swiglu_layer(c, ffn);
    } else {
      const auto& ffn = *static_cast<const MoeLayer*>(layer.ffn);
      norm_phase(c, layer.ffn_norm, ffn.in);
      moe_layer(c, ffn);
    }
  }
  norm_phase(c, model.norm, model.head);
  dispatch(c.call.dtype, [&](auto zero) { head_phase(c, static_cast<decltype(zero)*>(c.call.logits)); });
}

// The most that any layer needs: a block of rows of operands, a row of everything else.
struct Sizes {
  int64_t block = 0, row = 0, projected = 0, mixed = 0, latent_q = 0, slots = 0, gated = 0;
  int64_t gated_row = 0, gated_block = 0;
};

void grow(int64_t& field, int64_t value) { field = std::max(field, value); }

void grow(Sizes& most, const KdaLayer& layer) {
  grow(most.block, std::max(block_bytes(layer.in), block_bytes(layer.out)));
  grow(most.projected, layer.in.outputs);
  grow(most.mixed, layer.HV * layer.V);
}
void grow(Sizes& most, const MlaLayer& layer) {
  grow(most.block, std::max(block_bytes(layer.in), block_bytes(layer.out)));
  grow(most.projected, layer.in.outputs);
  grow(most.mixed, layer.H * layer.dv);
  grow(most.latent_q, layer.H * (layer.R + layer.dr));
}
void grow(Sizes& most, const SwiGluLayer& layer) {
  grow(most.block, block_bytes(layer.in));
  grow(most.gated, layer.F);
  grow(most.gated_block, block_bytes(layer.down));
}
void grow(Sizes& most, const MoeLayer& layer) {
  grow(most.block, block_bytes(layer.in));
  grow(most.row, row_bytes(layer.in));
  grow(most.gated, layer.k * layer.F + layer.shared.F);
  grow(most.gated_row, layer.k * row_bytes(layer.down));
  if (layer.shared.F) grow(most.gated_block, block_bytes(layer.shared.down));
  grow(most.slots, std::max(layer.k, layer.E));
}

Sizes sizes_of(const Model& model) {
  Sizes most;
  grow(most.block, block_bytes(model.head));
  for (int64_t i = 0; i < model.num_layers; ++i) {
    const Layer& layer = model.layers[i];
    if (layer.mixer_kind == kKda) {
      grow(most, *static_cast<const KdaLayer*>(layer.mixer));
    } else {
      grow(most, *static_cast<const MlaLayer*>(layer.mixer));
    }
    if (layer.ffn_kind == kSwiGlu) {
      grow(most, *static_cast<const SwiGluLayer*>(layer.ffn));
    } else {
      grow(most, *static_cast<const MoeLayer*>(layer.ffn));
    }
  }
  return most;
}

}  // namespace

void run(const Model& model, const Call& call) {
  const int64_t M = call.rows, D = model.D;
  const Sizes most = sizes_of(model);
  const auto count = [M](int64_t a_row) { return static_cast<size_t>(M * a_row); };
  const Scratch<float> stream(count(D)), normed(count(D)), projected(count(most.projected)), mixed(count(most.mixed)),
      latent_q(count(most.latent_q)), weights(count(most.slots)), gated(count(most.gated));
  const int64_t most_pieces = mla_most_pieces(call);
  int64_t partial_floats = 0;
  for (int64_t i = 0; i < model.num_layers; ++i) {
    if (model.layers[i].mixer_kind != kMla) continue;
    const auto& mixer = *static_cast<const MlaLayer*>(model.layers[i].mixer);
    partial_floats = std::max(partial_floats, mla_partial_floats(mixer, most_pieces));
  }
  const Scratch<float> partials(count(partial_floats));
  const size_t blocks = static_cast<size_t>(ceil_div(M, kRows));
  const Scratch<char> operand(blocks * most.block), row_operand(count(most.row)),
      gated_operand(count(most.gated_row) + blocks * most.gated_block);
  const Scratch<int64_t> experts(count(most.slots)), chosen(count(most.slots)), first_slot(count(most.slots) + 1),
      slots(count(most.slots));
  const Workspace work{stream,   normed,      operand, row_operand, projected, mixed,      latent_q,
                       partials, most_pieces, weights, experts,     chosen,    first_slot, slots,
                       gated,    gated_operand};
  run_team((model.num_layers + 1) * kMostPhasesOfALayer, [&](Team& team) { step(Context{team, model, call, work}); });
}

}  // namespace kl::engine

// Returns 1, with nothing done, for a token outside the vocabulary.
KL_EXPORT int64_t kl_engine_step(const void* model, const void* call) {
  const auto& of = *static_cast<const kl::engine::Model*>(model);
  const auto& given = *static_cast<const kl::engine::Call*>(call);
  for (int64_t m = 0; m < given.rows; ++m) {
    if (given.tokens[m] < 0 || given.tokens[m] >= of.head.outputs) return 1;
  }
  kl::engine::run(of, given);
  return 0;
}
