// One token a row through multi-head latent attention in its absorbed form (nn/mixers/mla/README.md), and its residual.

#include "attention.h"
#include "engine.h"
#include "rows.h"

namespace kl::engine {
namespace {

// ops/rope/reference.py, Eqs. 1 to 3, in place.
void rotate(float* x, const double* frequencies, int64_t half, int64_t position) {
  for (int64_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * frequencies[i];
    const float cosine = static_cast<float>(std::cos(angle)), sine = static_cast<float>(std::sin(angle));
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine - b * sine;
    x[i + half] = b * cosine + a * sine;
  }
}

// Heads whose scores one item computes: few enough for two threads, enough to read the latents seldom.
KL_INLINE int64_t heads_of_item(int64_t H) { return std::min<int64_t>(8, ceil_div(H, 2)); }

// The latent and the shared key of a row's new token, to their place in the state.
void remember(const Context& c, const MlaLayer& layer, const LayerState& state, int64_t m) {
  float* const latent = c.work.projected + m * layer.in.outputs + layer.at_latent;
  float* const key = latent + layer.R;
  const int64_t position = c.call.lengths[m], slot = m * state.capacity + position;
  if (layer.frequencies) rotate(key, layer.frequencies, layer.dr / 2, position);
  dispatch(c.call.dtype, [&](auto zero) {
    using T = decltype(zero);
    rms_norm_row<T>(latent, layer.latent_norm, static_cast<T*>(state.latent) + slot * layer.R, layer.R,
                    static_cast<float>(layer.latent_eps));
    T* const to = static_cast<T*>(state.key_rope) + slot * layer.dr;
    for_lanes(layer.dr, [&](int64_t i, int lanes) { store_lanes(to + i, load_lanes(key + i, lanes), lanes); });
  });
}

attention::Cache cached(const Context& c, const MlaLayer& layer, const LayerState& state, int64_t m) {
  const DType dtype = static_cast<DType>(c.call.dtype);
  const int64_t size = dtype == kBFloat16 ? 2 : 4;
  const char* const latent = static_cast<const char*>(state.latent) + m * state.capacity * layer.R * size;
  const char* const key = static_cast<const char*>(state.key_rope) + m * state.capacity * layer.dr * size;
  const attention::Rows latents{latent, layer.R, layer.R, 0};
  return attention::Cache{dtype, latents, attention::Rows{key, layer.dr, layer.dr, 0}, latents};
}

}  // namespace

int64_t mla_most_pieces(const Call& call) {
  int64_t most = 0;
  for (int64_t m = 0; m < call.rows; ++m) most = std::max(most, attention::num_pieces(call.lengths[m] + 1));
  return most;
}

int64_t mla_partial_floats(const MlaLayer& layer, int64_t most_pieces) {
  const int64_t heads = heads_of_item(layer.H);
  return ceil_div(layer.H, heads) * most_pieces * attention::partial_floats(heads, layer.R);
}

void mla_layer(const Context& c, const MlaLayer& layer, const LayerState& state) {
  const int64_t rows = c.call.rows, H = layer.H, R = layer.R, dn = layer.dn, dr = layer.dr, dv = layer.dv;
  const int64_t width = R + dr, ldp = layer.in.outputs;
  const Workspace& work = c.work;
  const attention::MlaSizes sizes{H, R, dn, dr, dv};
  const DType kv_dtype = static_cast<DType>(layer.kv_dtype);
  product_phase(c, layer.in, work.operand, work.projected, ldp);
  c.team.phase(H + rows, [&](int64_t item) {
    if (item >= H) {
      remember(c, layer, state, item - H);
      return;
    }
    float* const q = work.projected + item * (dn + dr);
    for (int64_t m = 0; layer.frequencies && m < rows; ++m) {
      rotate(q + m * ldp + dn, layer.frequencies, dr / 2, c.call.lengths[m]);
    }
    attention::mla_absorb(sizes, item, rows, kFloat32, q, ldp, kv_dtype, layer.kv_b, static_cast<float>(layer.scale),
                          work.latent_q + item * width, H * width);
  });

  // Scores: an item is a piece of a row's context and a group of heads.
  const int64_t heads = heads_of_item(H), groups = ceil_div(H, heads);
  const int64_t piece_floats = attention::partial_floats(heads, R);
  const auto partials_of = [&](int64_t m, int64_t group) {
    return work.partials + (m * groups + group) * work.most_pieces * piece_floats;
  };
  c.team.phase(rows * groups * work.most_pieces, [&](int64_t item) {
    const int64_t m = item / (groups * work.most_pieces), group = item / work.most_pieces % groups;
    const int64_t piece = item % work.most_pieces, length = c.call.lengths[m] + 1;
    if (piece >= attention::num_pieces(length)) return;
    const attention::Queries queries{work.latent_q + (m * H + group * heads) * width,
                                     std::min(heads, H - group * heads), c.call.dtype == kBFloat16};
    attention::decode_piece(queries, cached(c, layer, state, m), 0, length, piece,
                            partials_of(m, group) + piece * attention::partial_floats(queries.heads, R));
  });
  c.team.phase(H, [&](int64_t h) {
    const int64_t group = h / heads, in_group = std::min(heads, H - group * heads);
    const Scratch<float> mixed(static_cast<size_t>(rows * R));
    for (int64_t m = 0; m < rows; ++m) {
      attention::combine(partials_of(m, group), attention::num_pieces(c.call.lengths[m] + 1), in_group, h % heads, R,
                         mixed + m * R);
    }
    attention::mla_project(sizes, h, rows, mixed, R, kv_dtype, layer.kv_b, kFloat32, work.mixed + h * dv, H * dv);
  });
  operand_phase(c, layer.out, work.mixed, H * dv, work.operand);
  product_phase(c, layer.out, work.operand, work.stream, c.model.D, true);
}

}  // namespace kl::engine
