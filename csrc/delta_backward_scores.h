// The way back through a chunk's scores and decays, 16 key channels at a time: from the gradients of the factors (1) of
// delta.h and of the scores to those of q, k, e and g.
//
// With w_rs = k_s a_{s+1} ... a_r and c_s = a_{s+1} ... a_15, both running products,
//
//     dq_r = dq~_r A_r + sum_{s<r} dP_rs w_rs          de_r = de~_r A'_r + sum_{s<r} dN_rs w_rs
//     dk_s = dk^_s c_s + U_s,   U_s = sum_{r>s} (dP_rs q_r + dN_rs e_r) a_{s+1} ... a_r
//     dg_m = sum_{r>=m} (q_r dq_r + e_r de_r - k_r U_r) + sum_{s<m} k^_s dk^_s + A_15 sum_v S dS'
//
// (read before the decay: N has no a_r, and e_m de_m is left out of dg_m). U is a running product too, r from 15 down:
// U_s <- a_r (U_s + dP_rs q_r + dN_rs e_r); nothing is divided by a decay. P_rr holds none: its terms are added last.
#pragma once

#include "delta_backward_math.h"

namespace kl::delta::backward {

// exp(-40). Where a row keeps less than this, its decay's gradient, which has exp(g) as a factor, is set to zero: the
// sums that form it leave rounding errors there, which a gate's rate would magnify.
constexpr float kForgotten = 4.2483543e-18f;

// Gradients of a chunk's factors on the way in, rows of padded(K): q~, e~ and k^; on the way out those of q, e, k (q as
// loaded, times scale). g is written.
struct FactorGradients {
  float *q, *e, *k, *g;
};

// One vector of channels, `c`, from the first row on: the keys as each row sees them, for dq and de.
template <bool kErases, bool kPre>
KL_INLINE void query_gradients(const Terms& terms, int64_t Kp, int64_t c, const float* dP, const float* dN,
                               const FactorGradients& d) {
  vf w[kChunk], product = splat(1.0f);
#pragma GCC unroll 16
  for (int r = 0; r < kChunk; ++r) {
    const int64_t at = r * Kp + c;
    const vf a = load(terms.decay + at), before = product;
    product *= a;
    vf d_q = load(d.q + at) * product, d_e{};
    if (kErases) d_e = load(d.e + at) * (kPre ? before : product);
#pragma GCC unroll 16
    for (int s = 0; s < r; ++s) {
      if (kErases && kPre) d_e = fma(dN[r * kChunk + s], w[s], d_e);
      w[s] *= a;
      if (kErases && !kPre) d_e = fma(dN[r * kChunk + s], w[s], d_e);
      d_q = fma(dP[r * kChunk + s], w[s], d_q);
    }
    w[r] = load(terms.k + at);
    store(d.q + at, d_q);
    if (kErases) store(d.e + at, d_e);
  }
}

// The same from the last row on: what later rows ask of each key, for dk, and the decay's gradient. tail: A_15 sum_v S
// dS' of these channels.
template <bool kErases, bool kPre>
KL_INLINE void key_gradients(const Terms& terms, int64_t Kp, int64_t c, const float* dP, const float* dN, vf tail,
                             const FactorGradients& d) {
  vf u[kChunk], after = splat(1.0f), running{};
#pragma GCC unroll 16
  for (int s = 0; s < kChunk; ++s) u[s] = vf{};
  alignas(64) float asked[kChunk * kLanes];
#pragma GCC unroll 16
  for (int r = kChunk - 1; r >= 0; --r) {
    const int64_t at = r * Kp + c;
    const vf a = load(terms.decay + at), q = load(terms.q + at), k = load(terms.k + at);
    const vf e = kErases ? load(terms.e + at) : vf{};
    const vf d_q = load(d.q + at), d_keys = load(d.k + at) * after;
    store(d.k + at, d_keys + u[r]);
    store(asked + r * kLanes, k * d_keys);
    // The decay's gradient, without what comes by the states.
    running = fma(q, d_q, running) - k * u[r];
    if (kErases) {
      const vf read = e * load(d.e + at);
      running += read;
      store(d.g + at, kPre ? running - read : running);
    } else {
      store(d.g + at, running);
    }
    after *= a;
#pragma GCC unroll 16
    for (int s = 0; s < r; ++s) {
      u[s] = fma(dP[r * kChunk + s], q, u[s]);
      if (kErases && !kPre) u[s] = fma(dN[r * kChunk + s], e, u[s]);
      u[s] *= a;
      if (kErases && kPre) u[s] = fma(dN[r * kChunk + s], e, u[s]);
    }
  }
  for (int r = 0; r < kChunk; ++r) {
    const int64_t at = r * Kp + c;
    const vf d_g = load(d.g + at) + tail;
    store(d.g + at, select(load(terms.decay + at) < splat(kForgotten), vf{}, d_g));
    tail += load(asked + r * kLanes);
    const float own = dP[r * kChunk + r];
    store(d.q + at, fma(own, load(terms.k + at), load(d.q + at)));
    store(d.k + at, fma(own, load(terms.q + at), load(d.k + at)));
  }
}

// All channels. total: A_15; flow: sum_v S dS'.
template <bool kErases, bool kPre>
inline void score_gradients(const Terms& terms, int64_t Kp, const float* dP, const float* dN, const float* total,
                            const float* flow, const FactorGradients& d) {
  // Two loops: unrolled, either body alone fits the processor's cache of decoded instructions.
  for (int64_t c = 0; c < Kp; c += kLanes) query_gradients<kErases, kPre>(terms, Kp, c, dP, dN, d);
  for (int64_t c = 0; c < Kp; c += kLanes) {
    key_gradients<kErases, kPre>(terms, Kp, c, dP, dN, load(total + c) * load(flow + c), d);
  }
}

// The factors (1) of a chunk: queries [2, 16, Kp] takes q~, then e~; keys takes k^; total A_15.
inline void chunk_factors(const Source& source, const Terms& terms, float* queries, float* keys, float* total) {
  const int64_t Kp = padded(source.K);
  const bool erases = source.erases();
  for (int64_t c = 0; c < Kp; c += kLanes) {
    vf product = splat(1.0f);
    for (int r = 0; r < kChunk; ++r) {
      const int64_t at = r * Kp + c;
      const vf before = product;
      product *= load(terms.decay + at);
      store(queries + at, load(terms.q + at) * product);
      if (erases) store(queries + kChunk * Kp + at, load(terms.e + at) * (source.pre ? before : product));
    }
    store(total + c, product);
    vf after = splat(1.0f);
    for (int r = kChunk - 1; r >= 0; --r) {
      const int64_t at = r * Kp + c;
      store(keys + at, load(terms.k + at) * after);
      after *= load(terms.decay + at);
    }
  }
}

}  // namespace kl::delta::backward
