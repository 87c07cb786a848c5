// One token a sequence, in place on a pool of states. With a = exp(g), one sweep over the state reads
//
//     x = (a e) S (or e S, for the read before the decay),   y = (a q) S,
//
// then w = z - x is what is written and o = y + (q k) w, q scaled, and a second sweep, from the cache, leaves
// S <- a S + k w. The state's way from memory and back is all that takes time, so the second sweep asks for the state
// that comes next.

#include "delta.h"

namespace kl {
namespace delta {
namespace {

// Vectors of columns that a sweep takes at once: twice as many sums have room in the registers.
constexpr int kSweepVectors = KL_HAS_AVX512 ? 8 : 4;

// The terms of one token and head, K floats each, and what both sweeps need of them.
struct Step {
  const float *read_q, *read_e;  // a q and a e (or e); read_e null: nothing is erased
  const float *k, *decay;
  float strength, q_dot_k;
  int64_t K, V;
};

// One group of columns of a state: kVectors vectors, of which the last has `lanes` lanes.
template <int kVectors, class T>
KL_INLINE void step_columns(const Step& step, const T* value, T* o, float* state, int lanes, const float* next) {
  const auto load_at = [&](const auto* p, int v) {
    return v + 1 < kVectors || lanes == kLanes ? load(p + v * kLanes) : load_first(p + v * kLanes, lanes);
  };
  const auto store_at = [&](auto* p, int v, vf x) {
    if (v + 1 < kVectors || lanes == kLanes) {
      store(p + v * kLanes, x);
    } else {
      store_first(p + v * kLanes, x, lanes);
    }
  };
  vf x[kVectors] = {}, y[kVectors] = {};
  if (step.read_e) {
    for (int64_t c = 0; c < step.K; ++c) {
      const vf e = splat(step.read_e[c]), q = splat(step.read_q[c]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const vf s = load_at(state + c * step.V, v);
        x[v] = fma(e, s, x[v]);
        y[v] = fma(q, s, y[v]);
      }
    }
  } else {
    for (int64_t c = 0; c < step.K; ++c) {
      const vf q = splat(step.read_q[c]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) y[v] = fma(q, load_at(state + c * step.V, v), y[v]);
    }
  }
  vf written[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    written[v] = load_at(value, v) * splat(step.strength) - x[v];
    store_at(o, v, fma(splat(step.q_dot_k), written[v], y[v]));
  }
  for (int64_t c = 0; c < step.K; ++c) {
    const vf a = splat(step.decay[c]), k = splat(step.k[c]);
    float* row = state + c * step.V;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if (next && v * kLanes % 16 == 0) __builtin_prefetch(next + c * step.V + v * kLanes, 1, 2);
      store_at(row, v, fma(a, load_at(row, v), k * written[v]));
    }
  }
}

// Columns [first, last) of a head's state, first a multiple of kLanes.
template <class T>
void step_state(const Step& step, const T* value, T* o, float* state, int64_t first, int64_t last, const float* next) {
  const auto columns = [&](auto vectors, int64_t c, int lanes) {
    step_columns<decltype(vectors)::value>(step, value + c, o + c, state + c, lanes, next ? next + c : nullptr);
  };
  int64_t c = first;
  for (; c + kSweepVectors * kLanes <= last; c += kSweepVectors * kLanes) {
    columns(std::integral_constant<int, kSweepVectors>(), c, kLanes);
  }
  for (; c + 2 * kLanes <= last; c += 2 * kLanes) columns(std::integral_constant<int, 2>(), c, kLanes);
  for (; c < last; c += kLanes) {
    columns(std::integral_constant<int, 1>(), c, static_cast<int>(std::min<int64_t>(kLanes, last - c)));
  }
}

// Forms the step of one token (row `token` of the inputs) and head from the source, in memory of its own.
class StepTerms {
 public:
  explicit StepTerms(const Source& source) : source_(source), rows_(4 * padded(source.K)) {
    const int64_t Kp = padded(source.K);
    terms_.q = rows_;
    terms_.k = rows_ + Kp;
    terms_.e = rows_ + 2 * Kp;
    terms_.decay = rows_ + 3 * Kp;
    terms_.log_decay = terms_.logits = nullptr;
  }

  Step form(int64_t token, int64_t head, float rate) {
    if (source_.core) {
      load_core_rows(source_, token, 1, head, rate, terms_);
    } else {
      load_plain_row(source_, token, head, 0, terms_);
    }
    vf dot{};
    for (int64_t c = 0; c < padded(source_.K); c += kLanes) {
      const vf q = load(terms_.q + c), a = load(terms_.decay + c);
      dot = fma(q, load(terms_.k + c), dot);
      store(terms_.q + c, q * a);
      if (source_.erases() && !source_.pre) store(terms_.e + c, load(terms_.e + c) * a);
    }
    return Step{terms_.q,          source_.erases() ? terms_.e : nullptr, terms_.k, terms_.decay, terms_.strength[0],
                sum(dot), source_.K, source_.V};
  }

 private:
  const Source& source_;
  Scratch<float> rows_;
  Terms terms_;
};

struct Call {
  Source source;
  void* o;     // [N, HV, V] in the type of value
  float* pool;  // state of (slot, head) at slot * slot_stride + head * head_stride
  const int64_t* slots;
  int64_t slot_stride, head_stride, N;

  float* state(int64_t pair) const {
    const int64_t slot = pair < N * source.HV ? slots[pair / source.HV] : -1;
    return slot < 0 ? nullptr : pool + slot * slot_stride + pair % source.HV * head_stride;
  }
};

template <class T>
void run_pair(const Call& call, int64_t pair, int64_t first, int64_t last) {
  const Source& source = call.source;
  const int64_t token = pair / source.HV, head = pair % source.HV;
  T* o = static_cast<T*>(call.o) + pair * source.V;
  float* state = call.state(pair);
  if (state == nullptr) {
    std::fill(o + first, o + last, T{});
    return;
  }
  StepTerms terms(source);
  const Step step = terms.form(token, head, source.core ? rate_of(source, head) : 0.0f);
  step_state(step, static_cast<const T*>(source.value.data) + pair * source.V, o, state, first, last,
             call.state(pair + 1));
}

void run(const Call& call) {
  const Source& source = call.source;
  const int64_t pairs = call.N * source.HV, blocks = ceil_div(source.V, kBlock);
  if (pairs == 0 || blocks == 0) return;
  const int64_t groups = std::min(blocks, ceil_div(num_threads(), pairs));
  const int64_t width = ceil_div(blocks, groups) * kBlock;
  parallel_for(pairs * groups, [&](int64_t item) {
    const int64_t first = item % groups * width, last = std::min(source.V, first + width);
    if (first >= last) return;
    dispatch(source.value.type, [&](auto zero) { run_pair<decltype(zero)>(call, item / groups, first, last); });
  });
}

}  // namespace

void kda_core_step(const float* q, const float* k, const float* v, const float* gate, float beta, float rate,
                   const float* bias, float lower_bound, float beta_scale, float scale, int64_t K, int64_t V,
                   float* state, float* o) {
  const Source source = core_source(q, k, v, gate, &beta, nullptr, bias, 0, 1, 1, K, V, lower_bound, beta_scale, scale);
  StepTerms terms(source);
  step_state(terms.form(0, 0, rate), v, o, state, 0, V, nullptr);
}

}  // namespace delta
}  // namespace kl

// One token of each of N sequences; tensors as for kl_delta_rule_forward without the token axis. slots [N]: -1 skips
// the row and zeroes its output. Strides in floats; a head's state is contiguous.
KL_EXPORT int64_t kl_delta_rule_decode(const void* q, const void* k, const void* e, const void* z, const void* g,
                                       float* pool, const int64_t* slots, void* o, int64_t types, int64_t slot_stride,
                                       int64_t head_stride, int64_t N, int64_t H, int64_t HV, int64_t K, int64_t V,
                                       int64_t erase_heads, int64_t scalar_decay, int64_t pre, double scale) {
  using namespace kl::delta;
  const Source source =
      plain_source(q, k, e, z, g, nullptr, types, H, HV, K, V, erase_heads, scalar_decay != 0, pre != 0, scale);
  run(Call{source, o, pool, slots, slot_stride, head_stride, N});
  return 0;
}

// The same from raw projections; arguments as for kl_kda_core_forward.
KL_EXPORT int64_t kl_kda_core_decode(const void* q, const void* k, const void* v, const void* gate, const void* beta,
                                     const float* A_log, const float* dt_bias, float* pool, const int64_t* slots,
                                     void* o, int64_t types, int64_t slot_stride, int64_t head_stride, int64_t N,
                                     int64_t H, int64_t HV, int64_t K, int64_t V, double lower_bound, double beta_scale,
                                     double scale) {
  using namespace kl::delta;
  const Source source = core_source(q, k, v, gate, beta, A_log, dt_bias, types, H, HV, K, V, lower_bound, beta_scale,
                                    scale);
  run(Call{source, o, pool, slots, slot_stride, head_stride, N});
  return 0;
}
