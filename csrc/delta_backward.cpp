// The delta rule's backward, as Python calls it: items of work, sums over grouped heads and over sequences.

#include "delta_backward.h"

namespace kl::delta::backward {
namespace {

// Sequences are walked in at most this many runs a head, so that the summands of the parameters' gradients stay few
// whatever the number of sequences. Cut by number of sequences alone.
constexpr int64_t kMaxRuns = 64;

void load_gradient(const float* d_final, int64_t K, int64_t V, const Memory& memory, float* to) {
  std::memset(to, 0, static_cast<size_t>(memory.Kp * memory.Vp) * sizeof(float));
  for (int64_t k = 0; k < K; ++k) {
    std::memcpy(to + k * memory.Vp, d_final + k * V, static_cast<size_t>(V) * sizeof(float));
  }
}

void store_gradient(const float* from, int64_t K, int64_t V, const Memory& memory, float* d_initial) {
  for (int64_t k = 0; k < K; ++k) {
    std::memcpy(d_initial + k * V, from + k * memory.Vp, static_cast<size_t>(V) * sizeof(float));
  }
}

// Sequences [begin, end) and heads [first_head, first_head + heads).
void walk_run(const Source& source, const Targets& targets, const Layout& layout, const Rows& d_o, const float* d_final,
              const float* boundaries, const int64_t* segments, int64_t begin, int64_t end, int64_t first_head,
              int64_t heads) {
  Memory memory;
  const Scratch<float> floats(static_cast<size_t>(memory.lay_out(source, heads, nullptr)));
  memory.lay_out(source, heads, floats);
  Walk walk(source, targets, d_o, memory, first_head, heads);
  const int64_t state = source.K * source.V, padded_state = memory.Kp * memory.Vp;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t first = (n * source.HV + first_head) * state;
    for (int64_t h = 0; h < heads; ++h) {
      load_gradient(d_final + first + h * state, source.K, source.V, memory, memory.d_states + h * padded_state);
    }
    walk.run(layout.start(n), layout.length(n), boundaries + segments[n] * source.HV * state);
    for (int64_t h = 0; h < heads; ++h) {
      float* d_initial = targets.initial + first + h * state;
      store_gradient(memory.d_states + h * padded_state, source.K, source.V, memory, d_initial);
    }
  }
}

// Heads an item takes: as many as share a page, but no more than keep the threads equally busy. No bit depends on it.
int64_t heads_together(const Source& source, int64_t runs) {
  constexpr int64_t kPage = 4096;
  const int64_t most = std::min(source.HV, kPage / (source.K * (source.k.type == kBFloat16 ? 2 : 4)));
  int64_t best = 1, least = INT64_MAX;
  for (int64_t heads = 1; heads <= most; ++heads) {
    // What the busiest thread does.
    const int64_t work = ceil_div(runs * ceil_div(source.HV, heads), num_threads()) * heads;
    if (work <= least) best = heads, least = work;
  }
  return best;
}

// d_A_log [HV] and d_dt_bias [HV, K] from the runs' summands, in the order of the runs.
void sum_parameters(const double* parts, int64_t runs, int64_t HV, int64_t K, float* d_A_log, float* d_dt_bias) {
  for (int64_t head = 0; head < HV; ++head) {
    for (int64_t c = 0; c <= K; ++c) {
      double total = 0;
      for (int64_t run = 0; run < runs; ++run) total += parts[(run * HV + head) * (K + 1) + c];
      if (c == 0 && d_A_log) d_A_log[head] = static_cast<float>(total);
      if (c > 0 && d_dt_bias) d_dt_bias[head * K + c - 1] = static_cast<float>(total);
    }
  }
}

void backward(const Source& source, Targets targets, const Layout& layout, const Rows& d_o, const float* d_final,
              const float* boundaries, float* d_A_log, float* d_dt_bias) {
  const int64_t runs = std::min(layout.N, kMaxRuns), width = source.K + 1;
  const Scratch<int64_t> segments(static_cast<size_t>(layout.N));
  first_segments(layout, segments);
  const size_t count = source.core ? static_cast<size_t>(runs * source.HV * width) : 0;
  const Scratch<double> parts(count);
  std::fill_n(parts.get(), count, 0.0);
  const int64_t together = heads_together(source, runs), groups = ceil_div(source.HV, together);
  parallel_for(runs * groups, [&](int64_t item) {
    const int64_t run = item / groups, head = item % groups * together;
    Targets own = targets;
    own.parameters = source.core ? parts + run * source.HV * width : nullptr;
    walk_run(source, own, layout, d_o, d_final, boundaries, segments, layout.N * run / runs,
             layout.N * (run + 1) / runs, head, std::min(together, source.HV - head));
  });
  if (source.core) sum_parameters(parts, runs, source.HV, source.K, d_A_log, d_dt_bias);
}

// Row `row` of a gradient [tokens, H, K]: its group's rows of x [tokens, HV, K] added up, in order.
void sum_group(const float* x, int64_t row, int64_t group, int64_t K, float* total) {
  for_lanes(K, [&](int64_t c, int lanes) {
    vf y{};
    for (int64_t member = 0; member < group; ++member) y += load_lanes(x + (row * group + member) * K + c, lanes);
    store(total + c, y);
  });
}

// `normalised`: the raw vectors whose normalised form x belongs to, or null data.
void sum_groups(const float* x, int64_t rows, int64_t group, int64_t K, const Rows& normalised, const Target& target) {
  constexpr int64_t kGrain = 256;
  parallel_ranges(rows, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t Kp = round_up(K, kLanes);
    const Scratch<float> total(static_cast<size_t>(Kp)), raw(static_cast<size_t>(Kp));
    for (int64_t row = begin; row < end; ++row) {
      sum_group(x, row, group, K, total);
      if (normalised.data) {
        load_row(normalised, row, K, 1.0f, raw);
        const float root = 1.0f / std::sqrt(dot(raw, raw, Kp) + kNormEps);
        for (int64_t c = 0; c < Kp; c += kLanes) store(raw + c, load(raw + c) * splat(root));
        normalise_backward(total, raw, Kp, root, 1.0f);
      }
      store_row(target, row, total, K, 1.0f);
    }
  });
}

}  // namespace
}  // namespace kl::delta::backward

using namespace kl;
using namespace kl::delta;
using namespace kl::delta::backward;

// Gradients of delta_rule. `types`: TypeBits of the inputs, d_o's is that of the value; `d_types`: those of d_q, d_k,
// d_e, which are float32 and [tokens, HV, K] where heads are grouped. The others have their inputs' types.
KL_EXPORT int64_t kl_delta_rule_backward(const void* d_o, const float* d_final, const void* q, const void* k,
                                         const void* e, const void* value, const void* gate, const void* beta,
                                         const float* boundaries, const int64_t* offsets, void* d_q, void* d_k,
                                         void* d_e, void* d_value, void* d_gate, void* d_beta, float* d_initial,
                                         int64_t types, int64_t d_types, int64_t N, int64_t T, int64_t H, int64_t HV,
                                         int64_t K, int64_t V, int64_t erase_heads, int64_t scalar_decay, int64_t pre,
                                         double scale) {
  const Source source =
      plain_source(q, k, e, value, gate, beta, types, H, HV, K, V, erase_heads, scalar_decay != 0, pre != 0, scale);
  Targets targets{};
  targets.q = {d_q, type_of(d_types, kTypeQ)};
  targets.k = {d_k, type_of(d_types, kTypeK)};
  targets.e = {d_e, type_of(d_types, kTypeE)};
  targets.value = {d_value, source.value.type};
  targets.gate = {d_gate, source.gate.type};
  targets.beta = {d_beta, source.beta.type};
  targets.initial = d_initial;
  const Rows d_output{d_o, source.value.type};
  backward::backward(source, targets, {offsets, N, T}, d_output, d_final, boundaries, nullptr, nullptr);
  return 0;
}

// Gradients of kda_core; d_q and d_k as above, of the normalised vectors where heads are grouped.
KL_EXPORT int64_t kl_kda_core_backward(const void* d_o, const float* d_final, const void* q, const void* k,
                                       const void* value, const void* gate, const void* beta, const float* A_log,
                                       const float* dt_bias, const float* boundaries, const int64_t* offsets, void* d_q,
                                       void* d_k, void* d_value, void* d_gate, void* d_beta, float* d_A_log,
                                       float* d_dt_bias, float* d_initial, int64_t types, int64_t d_types, int64_t N,
                                       int64_t T, int64_t H, int64_t HV, int64_t K, int64_t V, double lower_bound,
                                       double beta_scale, double scale) {
  const Source source =
      core_source(q, k, value, gate, beta, A_log, dt_bias, types, H, HV, K, V, lower_bound, beta_scale, scale);
  Targets targets{};
  targets.q = {d_q, type_of(d_types, kTypeQ)};
  targets.k = {d_k, type_of(d_types, kTypeK)};
  targets.value = {d_value, source.value.type};
  targets.gate = {d_gate, source.gate.type};
  targets.beta = {d_beta, source.beta.type};
  targets.initial = d_initial;
  const Rows d_output{d_o, source.value.type};
  backward::backward(source, targets, {offsets, N, T}, d_output, d_final, boundaries, d_A_log, d_dt_bias);
  return 0;
}

// target [rows, K] = sums of `group` consecutive rows of x [rows * group, K]; where `raw` [rows, K] is given, taken
// back through its l2 normalisation.
KL_EXPORT int64_t kl_delta_rule_sum_groups(const float* x, const void* raw, void* target, int64_t raw_type,
                                           int64_t target_type, int64_t rows, int64_t group, int64_t K) {
  sum_groups(x, rows, group, K, {raw, static_cast<DType>(raw_type)}, {target, static_cast<DType>(target_type)});
  return 0;
}
