// One token a row through a Kimi Delta Attention mixer (nn/mixers/kda/README.md) and its residual.

#include "delta.h"
#include "engine.h"
#include "rows.h"

namespace kl::engine {
namespace {

// Convolve `n` channels of one row, in place; the history moves on.
void convolve(float* x, const float* weight, void* history, int64_t dtype, int64_t n, int64_t taps) {
  dispatch(dtype, [&](auto zero) {
    using P = decltype(zero);
    conv_step_row(x, weight, static_cast<P*>(history), x, n, taps, true);
  });
}

template <class T>
T* at(void* base, int64_t element) {
  return static_cast<T*>(base) + element;
}
void* at(void* base, int64_t dtype, int64_t element) {
  return dtype == kBFloat16 ? static_cast<void*>(at<bf16>(base, element)) : static_cast<void*>(at<float>(base, element));
}

// Everything of one query/key head of one row, and of the value heads that read it.
void head(const Context& c, const KdaLayer& layer, const LayerState& state, int64_t m, int64_t h) {
  const int64_t K = layer.K, V = layer.V, history = layer.W - 1, group = layer.HV / layer.H;
  const int64_t dtype = c.call.dtype;
  float* const row = c.work.projected + m * layer.in.outputs;
  float *const q = row + h * K, *const k = row + layer.at_k + h * K;
  const int64_t tail = (m * layer.H + h) * K * history;
  convolve(q, layer.conv_q + h * K * layer.W, at(state.conv_q, dtype, tail), dtype, K, layer.W);
  convolve(k, layer.conv_k + h * K * layer.W, at(state.conv_k, dtype, tail), dtype, K, layer.W);
  const Scratch<char> low_rank(static_cast<size_t>(std::max(row_bytes(layer.decay), row_bytes(layer.gate))));
  const Scratch<float> logits(static_cast<size_t>(K)), gate(static_cast<size_t>(V)), o(static_cast<size_t>(V));
  for (int64_t hv = h * group; hv < (h + 1) * group; ++hv) {
    float* const v = row + layer.at_v + hv * V;
    convolve(v, layer.conv_v + hv * V * layer.W, at(state.conv_v, dtype, (m * layer.HV + hv) * V * history), dtype, V,
             layer.W);
    make_operand(layer.decay, row + layer.at_decay, low_rank);
    product(layer.decay, hv * layer.decay_rows, hv * layer.decay_rows + K, low_rank, logits);
    make_operand(layer.gate, row + layer.at_gate, low_rank);
    product(layer.gate, hv * layer.gate_rows, hv * layer.gate_rows + V, low_rank, gate);
    delta::kda_core_step(q, k, v, logits, row[layer.at_beta + hv], layer.rate[hv], layer.dt_bias + hv * K,
                         static_cast<float>(layer.lower_bound), 1.0f, static_cast<float>(layer.scale), K, V,
                         state.recurrent + (m * layer.HV + hv) * K * V, o);
    gated_rms_norm_row<false>(o.get(), gate.get(), layer.out_norm, c.work.mixed + (m * layer.HV + hv) * V, V,
                              static_cast<float>(layer.out_eps));
  }
}

}  // namespace

void kda_layer(const Context& c, const KdaLayer& layer, const LayerState& state) {
  product_phase(c, layer.in, c.work.operand, c.work.projected, layer.in.outputs);
  c.team.phase(c.call.rows * layer.H, [&](int64_t item) { head(c, layer, state, item / layer.H, item % layer.H); });
  operand_phase(c, layer.out, c.work.mixed, layer.HV * layer.V, c.work.operand);
  product_phase(c, layer.out, c.work.operand, c.work.stream, c.model.D, true);
}

}  // namespace kl::engine
