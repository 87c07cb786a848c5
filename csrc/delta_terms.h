// Delta rule: what a call is, the gates, and how the terms of a chunk are loaded; equations and letters as in delta.h,
// which is what to include.
#pragma once

#include "common.h"
#include "simd.h"
#include "vmath.h"

namespace kl {
namespace delta {

constexpr int kChunk = 16;
constexpr int64_t kSegment = 256;
// Rows of a state that an update takes at once; K is padded to a multiple.
constexpr int kRowTile = 8;
// Vectors a row of a column block has: a block of 128 rows of 2 vectors is 16 KB, a third of a first-level cache.
constexpr int kBlockVectors = 2;
constexpr int64_t kBlock = kBlockVectors * kLanes;
constexpr float kNormEps = 1e-6f;

KL_INLINE int64_t padded(int64_t K) { return round_up(K, std::max<int64_t>(kLanes, kRowTile)); }

// --- a call

// A contiguous tensor [tokens, heads, width] of one of the element types.
struct Rows {
  const void* data;
  DType type;
};

// The arguments of a call. Plain: e, z and the log decay g as given, or e = beta k and z = beta value for the strength
// beta. Core: the same from the logits of beta, with k normalised, and g from the gate's logits.
struct Source {
  Rows q, k, e, value, gate, beta;
  const float* A_log;    // [HV], or null
  const float* dt_bias;  // [HV, K], or null
  int64_t H, HV, K, V;
  int64_t erase_heads;  // H or HV; 0: there is no e
  bool core;
  bool scalar_decay;  // gate is [tokens, HV]
  bool pre;           // the erase key reads before the decay
  bool bounded;       // g = lower_bound sigmoid(exp(A_log) u), else -exp(A_log) softplus(u); u = logits + dt_bias
  float lower_bound, beta_scale, scale;

  bool weighs() const { return beta.data != nullptr; }
  bool erases() const { return weighs() || erase_heads > 0; }
  int64_t key_head(int64_t head) const { return head / (HV / H); }
};

// Bits of the word that carries the tensors' element types from Python: 1 for bfloat16.
enum TypeBit : int64_t { kTypeQ = 0, kTypeK, kTypeE, kTypeValue, kTypeGate, kTypeBeta };
KL_INLINE DType type_of(int64_t types, TypeBit bit) { return (types >> bit) & 1 ? kBFloat16 : kFloat32; }

// The source of `delta_rule`. beta null: e and z as given, e null where nothing is erased; else e is null.
inline Source plain_source(const void* q, const void* k, const void* e, const void* z, const void* g, const void* beta,
                           int64_t types, int64_t H, int64_t HV, int64_t K, int64_t V, int64_t erase_heads,
                           bool scalar_decay, bool pre, double scale) {
  Source source{};
  source.q = {q, type_of(types, kTypeQ)};
  source.k = {k, type_of(types, kTypeK)};
  source.e = {e, type_of(types, kTypeE)};
  source.value = {z, type_of(types, kTypeValue)};
  source.gate = {g, type_of(types, kTypeGate)};
  source.beta = {beta, type_of(types, kTypeBeta)};
  source.H = H, source.HV = HV, source.K = K, source.V = V;
  source.erase_heads = e ? erase_heads : 0;
  source.scalar_decay = scalar_decay;
  source.pre = pre;
  source.scale = static_cast<float>(scale);
  return source;
}

// The source of `kda_core`; lower_bound 0: the softplus gate.
inline Source core_source(const void* q, const void* k, const void* v, const void* gate, const void* beta,
                          const float* A_log, const float* dt_bias, int64_t types, int64_t H, int64_t HV, int64_t K,
                          int64_t V, double lower_bound, double beta_scale, double scale) {
  Source source = plain_source(q, k, nullptr, v, gate, beta, types, H, HV, K, V, 0, false, false, scale);
  source.A_log = A_log;
  source.dt_bias = dt_bias;
  source.core = true;
  source.bounded = lower_bound != 0;
  source.lower_bound = static_cast<float>(lower_bound);
  source.beta_scale = static_cast<float>(beta_scale);
  return source;
}

// Sequences: tokens [offsets[n], offsets[n + 1]) of the flattened token axis, or T each where offsets is null.
struct Layout {
  const int64_t* offsets;
  int64_t N, T;

  int64_t start(int64_t n) const { return offsets ? offsets[n] : n * T; }
  int64_t length(int64_t n) const { return offsets ? offsets[n + 1] - offsets[n] : T; }
};

// first[n] = number of sequence n's first segment; first has N entries. Returns the number of all.
inline int64_t first_segments(const Layout& layout, int64_t* first) {
  int64_t total = 0;
  for (int64_t n = 0; n < layout.N; ++n) {
    first[n] = total;
    total += ceil_div(layout.length(n), kSegment);
  }
  return total;
}

// --- element-wise functions, shorter than those of vmath.h

// 1 / x for x in [1, inf].
KL_INLINE vf reciprocal(vf x) {
#if KL_HAS_AVX512
  // Within an inf the Newton step would make a NaN.
  const __m512 y = _mm512_min_ps(_mm512_set1_ps(1e37f), (__m512)x);
  const __m512 guess = _mm512_rcp14_ps(y);
  return (vf)_mm512_mul_ps(guess, _mm512_fnmadd_ps(y, guess, _mm512_set1_ps(2.0f)));
#else
  return splat(1.0f) / x;
#endif
}

// x, but at least `low`; a NaN passes.
KL_INLINE vf at_least(vf x, float low) {
#if KL_HAS_AVX512
  return (vf)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
#else
  return x < splat(low) ? splat(low) : x;
#endif
}

// A few vectors that go the same way step by step: one of these functions alone is a chain of forty dependent
// operations, and a processor does not see far enough ahead to run enough of them beside each other by itself.
template <int kCount>
struct Pack {
  vf at[kCount];
};
template <int kCount, class F>
KL_INLINE Pack<kCount> each(const F& f) {
  Pack<kCount> y;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) y.at[i] = f(i);
  return y;
}
// p <- p x + a
template <int kCount>
KL_INLINE void horner(Pack<kCount>& p, const Pack<kCount>& x, float a) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) p.at[i] = fma(p.at[i], x.at[i], splat(a));
}

// e^x for x <= 0, exactly 1 for 0: 2^(n + f) with |f| <= 1/2; 2^f = 1 + f p(f) within 1e-7. The one rounding of x log2
// e moves the result by |x| e^x 2^-24 at most.
template <int kCount>
KL_INLINE Pack<kCount> exp_negative(const Pack<kCount>& x) {
  const auto y = each<kCount>([&](int i) { return at_least(x.at[i] * splat(1.44269504088896341f), -160.0f); });
  const auto n = each<kCount>([&](int i) { return round_even(y.at[i]); });
  const auto f = each<kCount>([&](int i) { return y.at[i] - n.at[i]; });
  auto p = each<kCount>([&](int) { return splat(0.00015353361175f); });
  for (const float a : {0.0013398874664f, 0.0096184373626f, 0.055503324703f, 0.24022647914f, 0.69314720286f, 1.0f}) {
    horner(p, f, a);
  }
  return each<kCount>([&](int i) { return scale_by_power(p.at[i], n.at[i]); });
}
KL_INLINE vf exp_negative(vf x) { return exp_negative(Pack<1>{{x}}).at[0]; }

// 1 / (1 + e^-x), through t = e^-|x|: 1 / (1 + t), or t / (1 + t) for negative x.
template <int kCount>
KL_INLINE Pack<kCount> sigmoid_of(const Pack<kCount>& x) {
  const auto t = exp_negative(each<kCount>([&](int i) { return -abs(x.at[i]); }));
  return each<kCount>([&](int i) {
    return reciprocal(splat(1.0f) + t.at[i]) * select(x.at[i] < vf{}, t.at[i], splat(1.0f));
  });
}
KL_INLINE vf sigmoid_of(vf x) { return sigmoid_of(Pack<1>{{x}}).at[0]; }

// log(1 + e^x) = max(x, 0) + log(1 + t), t = e^-|x| in [0, 1], by a polynomial in t: within 2e-7 of the value.
template <int kCount>
KL_INLINE Pack<kCount> softplus_of(const Pack<kCount>& x) {
  const auto t = exp_negative(each<kCount>([&](int i) { return -abs(x.at[i]); }));
  auto p = each<kCount>([&](int) { return splat(-0.0032439808668f); });
  for (const float a : {0.019851262654f, -0.056959159142f, 0.10603616878f, -0.15305570123f, 0.19675931466f,
                        -0.24954132136f, 0.33329962268f, -0.49999902417f, 0.99999999529f}) {
    horner(p, t, a);
  }
  return each<kCount>([&](int i) { return fma(p.at[i], t.at[i], at_least(x.at[i], 0.0f)); });
}

KL_INLINE float exp_of(float x) { return exp(splat(x))[0]; }

// The gate's log decay for logits u.
template <int kCount>
KL_INLINE Pack<kCount> log_decay_of(const Source& source, const Pack<kCount>& u, float rate) {
  if (source.bounded) {
    const auto s = sigmoid_of(each<kCount>([&](int i) { return splat(rate) * u.at[i]; }));
    return each<kCount>([&](int i) { return splat(source.lower_bound) * s.at[i]; });
  }
  const auto s = softplus_of(u);
  return each<kCount>([&](int i) { return splat(-rate) * s.at[i]; });
}
KL_INLINE vf log_decay_of(const Source& source, vf u, float rate) {
  return log_decay_of(source, Pack<1>{{u}}, rate).at[0];
}

// A value head's rate, exp(A_log), or 1.
KL_INLINE float rate_of(const Source& source, int64_t head) {
  return source.A_log ? exp_of(source.A_log[head]) : 1.0f;
}

// --- the terms of a chunk

// Rows of padded(K) floats, zero past K but for decay, which is finite there. Loaded by load_terms.
struct Terms {
  float* q;      // scale q
  float* k;
  float* e;      // undefined where nothing is erased
  float* decay;  // a, the same in every channel for a scalar decay
  // What only the backward needs; null: not wanted.
  float* log_decay;  // g; zero in neutral rows
  float* logits;     // u (core)
  float strength[kChunk] = {};           // b in e = b k, z = b value; 1 where these are given. Neutral rows: 0
  float q_root[kChunk] = {}, k_root[kChunk] = {};  // core: 1 / sqrt(sum x^2 + eps); else 1
};

// Run f with the pointer to row `row` of x, in x's element type.
template <class F>
KL_INLINE void with_row(const Rows& x, int64_t row, int64_t width, const F& f) {
  if (x.type == kBFloat16) {
    f(static_cast<const bf16*>(x.data) + row * width);
  } else {
    f(static_cast<const float*>(x.data) + row * width);
  }
}

KL_INLINE float load_one(const Rows& x, int64_t at) {
  return x.type == kBFloat16 ? to_float(static_cast<const bf16*>(x.data)[at]) : static_cast<const float*>(x.data)[at];
}

KL_INLINE void fill_row(float* to, int64_t width, float value) {
  for (int64_t c = 0; c < width; c += kLanes) store(to + c, splat(value));
}

// What lies between the last whole vector of a row and its end at padded(K): nothing where vectors are wide.
KL_INLINE void clear_padding(float* row, int64_t K, float value) {
  if (kLanes < kRowTile) fill_row(row + round_up(K, kLanes), padded(K) - round_up(K, kLanes), value);
}

// to <- factor x, zero past K.
template <class T>
KL_INLINE void load_scaled(const T* x, int64_t K, float factor, float* to) {
  for_lanes(K, [&](int64_t c, int lanes) { store(to + c, load_lanes(x + c, lanes) * splat(factor)); });
  clear_padding(to, K, 0.0f);
}

// The sum of squares of a row; `to` takes the row in float32, zero past K.
template <class T>
KL_INLINE float load_squares(const T* x, int64_t K, float* to) {
  vf even{}, odd{};
  int64_t c = 0;
  for (; c + 2 * kLanes <= K; c += 2 * kLanes) {
    const vf a = load(x + c), b = load(x + c + kLanes);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
    store(to + c, a);
    store(to + c + kLanes, b);
  }
  for (; c < K; c += kLanes) {
    const vf a = load_lanes(x + c, static_cast<int>(std::min<int64_t>(kLanes, K - c)));
    even = fma(a, a, even);
    store(to + c, a);
  }
  clear_padding(to, K, 0.0f);
  return sum(even + odd);
}

// kCount vectors of load_gate; only the first `lanes` lanes of a single one.
template <bool kCore, int kCount, class T>
KL_INLINE void load_gates(const Source& source, const T* gate, const float* bias, float rate, float* decay,
                          float* log_decay, float* logits, int lanes) {
  auto g = each<kCount>([&](int i) { return load_lanes(gate + i * kLanes, lanes); });
  if (kCore) {
    if (bias) g = each<kCount>([&](int i) { return g.at[i] + load_lanes(bias + i * kLanes, lanes); });
    for (int i = 0; logits && i < kCount; ++i) store(logits + i * kLanes, g.at[i]);
    g = log_decay_of(source, g, rate);
  }
  for (int i = 0; log_decay && i < kCount; ++i) store(log_decay + i * kLanes, g.at[i]);
  const auto a = exp_negative(g);
  for (int i = 0; i < kCount; ++i) store(decay + i * kLanes, a.at[i]);
}

// The gate of one row: decay; log_decay and logits where they are wanted. What lies past K is finite.
template <bool kCore, class T>
KL_INLINE void load_gate(const Source& source, const T* gate, const float* bias, float rate, float* decay,
                         float* log_decay, float* logits) {
  constexpr int kCount = 4;
  const auto from = [](auto* row, int64_t c) { return row ? row + c : nullptr; };
  int64_t c = 0;
  for (; c + kCount * kLanes <= source.K; c += kCount * kLanes) {
    load_gates<kCore, kCount>(source, gate + c, from(bias, c), rate, decay + c, from(log_decay, c), from(logits, c),
                              kLanes);
  }
  for (; c < source.K; c += kLanes) {
    load_gates<kCore, 1>(source, gate + c, from(bias, c), rate, decay + c, from(log_decay, c), from(logits, c),
                         static_cast<int>(std::min<int64_t>(kLanes, source.K - c)));
  }
  clear_padding(decay, source.K, 1.0f);
}

KL_INLINE float* row_or_null(float* rows, int64_t at) { return rows ? rows + at : nullptr; }

// Rows [0, rows) of the terms of `kda_core`, for tokens [token, token + rows) of a value head.
inline void load_core_rows(const Source& source, int64_t token, int rows, int64_t head, float rate, Terms& terms) {
  const int64_t K = source.K, Kp = padded(K), key_head = source.key_head(head);
  for (int r = 0; r < rows; ++r) {
    const int64_t key_row = (token + r) * source.H + key_head;
    with_row(source.q, key_row, K, [&](auto* x) { terms.q_root[r] = load_squares(x, K, terms.q + r * Kp); });
    with_row(source.k, key_row, K, [&](auto* x) { terms.k_root[r] = load_squares(x, K, terms.k + r * Kp); });
    terms.strength[r] = load_one(source.beta, (token + r) * source.HV + head);
  }
  // Of all rows at once: these would be a long chain of single operations a row. Lanes past the last row hold what was
  // there, which is never used.
  for (int r = 0; r < rows; r += kLanes) {
    const vf one = splat(1.0f), eps = splat(kNormEps);
    store(terms.q_root + r, one / sqrt(load(terms.q_root + r) + eps));
    store(terms.k_root + r, one / sqrt(load(terms.k_root + r) + eps));
    store(terms.strength + r, splat(source.beta_scale) * sigmoid_of(load(terms.strength + r)));
  }
  const float* bias = source.dt_bias ? source.dt_bias + head * K : nullptr;
  for (int r = 0; r < rows; ++r) {
    const int64_t at = r * Kp;
    const vf q_factor = splat(terms.q_root[r] * source.scale), k_factor = splat(terms.k_root[r]);
    const vf strength = splat(terms.strength[r]);
    for (int64_t c = at; c < at + Kp; c += kLanes) {
      const vf unit = load(terms.k + c) * k_factor;
      store(terms.q + c, load(terms.q + c) * q_factor);
      store(terms.k + c, unit);
      store(terms.e + c, unit * strength);
    }
    with_row(source.gate, (token + r) * source.HV + head, K, [&](auto* x) {
      load_gate<true>(source, x, bias, rate, terms.decay + at, row_or_null(terms.log_decay, at),
                      row_or_null(terms.logits, at));
    });
  }
}

// Row r of the terms of `delta_rule`.
inline void load_plain_row(const Source& source, int64_t token, int64_t head, int r, Terms& terms) {
  const int64_t K = source.K, at = r * padded(K);
  const int64_t key_head = source.key_head(head), key_row = token * source.H + key_head, row = token * source.HV + head;
  with_row(source.q, key_row, K, [&](auto* x) { load_scaled(x, K, source.scale, terms.q + at); });
  with_row(source.k, key_row, K, [&](auto* x) { load_scaled(x, K, 1.0f, terms.k + at); });
  const float strength = source.weighs() ? load_one(source.beta, row) : 1.0f;
  if (source.weighs()) {
    load_scaled(terms.k + at, padded(K), strength, terms.e + at);
  } else if (source.erases()) {
    const int64_t erase_row = source.erase_heads == source.HV ? row : token * source.erase_heads + key_head;
    with_row(source.e, erase_row, K, [&](auto* x) { load_scaled(x, K, 1.0f, terms.e + at); });
  }
  terms.strength[r] = strength;
  terms.q_root[r] = terms.k_root[r] = 1.0f;
  float* log_decay = row_or_null(terms.log_decay, at);
  if (source.scalar_decay) {
    const float g = load_one(source.gate, row);
    fill_row(terms.decay + at, padded(K), exp_negative(splat(g))[0]);
    if (log_decay) fill_row(log_decay, padded(K), g);
    return;
  }
  with_row(source.gate, row, K, [&](auto* x) {
    load_gate<false>(source, x, nullptr, 0.0f, terms.decay + at, log_decay, nullptr);
  });
}

// The terms of tokens [token, token + rows) of a value head, rows <= kChunk; the other rows neutral.
inline void load_terms(const Source& source, int64_t token, int rows, int64_t head, Terms& terms) {
  const int64_t Kp = padded(source.K);
  if (source.core) {
    load_core_rows(source, token, rows, head, rate_of(source, head), terms);
  } else {
    for (int r = 0; r < rows; ++r) load_plain_row(source, token + r, head, r, terms);
  }
  for (int r = rows; r < kChunk; ++r) {
    fill_row(terms.q + r * Kp, Kp, 0.0f);
    fill_row(terms.k + r * Kp, Kp, 0.0f);
    if (source.erases()) fill_row(terms.e + r * Kp, Kp, 0.0f);
    fill_row(terms.decay + r * Kp, Kp, 1.0f);
    if (terms.log_decay) fill_row(terms.log_decay + r * Kp, Kp, 0.0f);
    if (terms.logits) fill_row(terms.logits + r * Kp, Kp, 0.0f);
    terms.strength[r] = 0.0f;
    terms.q_root[r] = terms.k_root[r] = 1.0f;
  }
}

// --- fetching ahead: an input row is a few hundred bytes, pages apart from the next, which no processor guesses; and
// asking for a chunk's rows at once would block the loads behind. So a chunk's rows are asked for one by one between
// the tiles of the products before it.

class Fetch {
 public:
  // Everything load_terms reads for tokens [token, token + rows) of a value head, and the rows of `output` (or null),
  // in `steps` calls of operator().
  Fetch(const Source& source, int64_t token, int rows, int64_t head, void* output, int64_t steps) : rows_(rows) {
    const int64_t key_row = token * source.H + source.key_head(head), row = token * source.HV + head;
    add(source.q, key_row, source.H, source.K);
    add(source.k, key_row, source.H, source.K);
    add(source.gate, row, source.HV, source.scalar_decay ? 1 : source.K);
    if (source.erase_heads == source.HV) add(source.e, row, source.HV, source.K);
    add(source.value, row, source.HV, source.V);
    if (output) add(Rows{output, source.value.type}, row, source.HV, source.V);
    per_step_ = ceil_div(count_ * rows_, std::max<int64_t>(steps, 1));
  }
  // The next few rows.
  KL_INLINE void operator()() {
    for (int64_t i = 0; i < per_step_ && at_ < count_ * rows_; ++i, ++at_) {
      const Part& part = parts_[at_ / rows_];
      const char* row = part.begin + at_ % rows_ * part.stride;
      for (int64_t b = 0; b < part.bytes; b += 64) __builtin_prefetch(row + b, 0, 3);
    }
  }

 private:
  struct Part {
    const char* begin;
    int64_t stride, bytes;
  };
  void add(const Rows& x, int64_t row, int64_t heads, int64_t width) {
    const int64_t bytes = width * (x.type == kBFloat16 ? 2 : 4);
    parts_[count_++] = Part{static_cast<const char*>(x.data) + row * bytes, heads * bytes, bytes};
  }

  Part parts_[6];
  int64_t count_ = 0, at_ = 0, rows_, per_step_;
};

}  // namespace delta
}  // namespace kl
