// The delta rule in chunks: what a call is, the terms of a chunk, the scores between its rows, and the products with a
// state. Shared by the forward (delta_forward.cpp), the step of one token (delta_decode.cpp) and the backward.
//
//     S_t = D_t S_{t-1} + k_t (z_t - r_t)^T,   r_t = S^T e_t read from D_t S_{t-1} (post) or S_{t-1} (pre)
//     o_t = scale S_t^T q_t,                   D_t = Diag(a_t),  a_t = exp(g_t)
//
// A chunk is kChunk = 16 rows (tokens) of one sequence and one value head, in float32, row r at r * padded(K). With S
// the state that enters it and A_r = a_0 ... a_r (A'_r = A_r, or A_{r-1} for the read before the decay),
//
//     N_rs = sum_c e_rc k_sc (a_{s+1} ... a_r)_c, s < r     P_rs = scale sum_c q_rc k_sc (a_{s+1} ... a_r)_c, s <= r
//     q~_r = scale q_r A_r     e~_r = e_r A'_r     k^_s = k_s a_{s+1} ... a_15                              (1)
//     R = (I + N)^-1 (z - e~ S)                    what each row writes, by forward substitution            (2)
//     O = q~ S + P R                                                                                        (3)
//     S' = Diag(A_15) S + k^^T R                                                                            (4)
//
// Every decay is a running product of factors <= 1: no exponent is added up, subtracted or clamped. Rows past the end
// of a sequence are neutral: q = k = e = z = 0, a = 1.
//
// Calling order: load_terms, then `scores` (turns k into k^), then `decay_queries` (turns q, e into q~, e~). The factor
// `scale` is inside q from the start: gradients of q as loaded are to be multiplied by it once more.
//
// Boundaries: for the backward the forward keeps the state that enters every segment of kSegment tokens of every
// sequence, float32 [segments of all sequences, HV, K, V], sequence after sequence; a sequence of n tokens has
// ceil(n / kSegment) of them, an empty one none. `first_segments` numbers them.
#pragma once

#include "delta_terms.h"

namespace kl {
namespace delta {

// --- scores

// Lane l of the result is the sum over the lanes of x[l], 16 of them; written to to[0..15].
KL_INLINE void sum_each(const vf (&x)[16], float* to) {
#if KL_HAS_AVX512
  __m512 u[8], t[4];
  // Halves, then quarters: block b of t[i] holds four partial sums of x[4 b + i].
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)x[i < 4 ? i : i + 4], b = (__m512)x[i < 4 ? i + 4 : i + 8];
    u[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd));
  }
  const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(t[0], t[1]), _mm512_unpackhi_ps(t[0], t[1]));
  const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(t[2], t[3]), _mm512_unpackhi_ps(t[2], t[3]));
  _mm512_storeu_ps(to, _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee)));
#else
  for (int i = 0; i < 16; ++i) to[i] = sum(x[i]);
#endif
}

// Rows i and i + 1 against rows j .. j + 3 of the keys; kBelow = min(i - j, 4) of these lie below row i. Brings the
// keys from row i - 1 to row i + 1: w_s = k_s a_{s+1} ... a_{i+1}.
template <int kBelow, bool kErases, bool kPre>
KL_INLINE void score_tile(const Terms& terms, int64_t Kp, int i, int j, float* N, float* P) {
  vf x[16] = {};
  const float *q = terms.q + i * Kp, *e = terms.e + i * Kp, *a = terms.decay + i * Kp;
  float* k = terms.k + j * Kp;
  for (int64_t c = 0; c < Kp; c += kLanes) {
    const vf a0 = load(a + c), a1 = load(a + Kp + c), q0 = load(q + c), q1 = load(q + Kp + c);
    const vf e0 = kErases ? load(e + c) : vf{}, e1 = kErases ? load(e + Kp + c) : vf{};
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      if (s > kBelow + 1) continue;
      vf w = load(k + s * Kp + c);
      if (s < kBelow) {
        if (kErases && kPre) x[s] = fma(e0, w, x[s]);
        w *= a0;
        if (kErases && !kPre) x[s] = fma(e0, w, x[s]);
      }
      if (s <= kBelow) x[4 + s] = fma(q0, w, x[4 + s]);
      if (s < kBelow + 1) {
        if (kErases && kPre) x[8 + s] = fma(e1, w, x[8 + s]);
        w *= a1;
        if (kErases && !kPre) x[8 + s] = fma(e1, w, x[8 + s]);
        store(k + s * Kp + c, w);
      }
      x[12 + s] = fma(q1, w, x[12 + s]);
    }
  }
  alignas(64) float sums[16];
  sum_each(x, sums);
  std::memcpy(N + i * kChunk + j, sums, 16);
  std::memcpy(P + i * kChunk + j, sums + 4, 16);
  std::memcpy(N + (i + 1) * kChunk + j, sums + 8, 16);
  std::memcpy(P + (i + 1) * kChunk + j, sums + 12, 16);
}

template <bool kErases, bool kPre>
inline void scores_of(const Terms& terms, int64_t Kp, float* N, float* P) {
  std::memset(N, 0, kChunk * kChunk * sizeof(float));
  std::memset(P, 0, kChunk * kChunk * sizeof(float));
  for (int i = 0; i < kChunk; i += 2) {
    int j = 0;
    for (; j + 4 <= i; j += 4) score_tile<4, kErases, kPre>(terms, Kp, i, j, N, P);
    if (j == i) score_tile<0, kErases, kPre>(terms, Kp, i, j, N, P);
    if (j == i - 2) score_tile<2, kErases, kPre>(terms, Kp, i, j, N, P);
  }
}

// N and P [kChunk, kChunk] of (1), zero where not defined; N is zero where nothing is erased. Turns terms.k into k^.
inline void scores(const Source& source, const Terms& terms, float* N, float* P) {
  const int64_t Kp = padded(source.K);
  if (!source.erases()) {
    scores_of<false, false>(terms, Kp, N, P);
  } else if (source.pre) {
    scores_of<true, true>(terms, Kp, N, P);
  } else {
    scores_of<true, false>(terms, Kp, N, P);
  }
}

// Turns terms.q into q~ and terms.e into e~; total [padded(K)] takes A_15. `decay` stays.
inline void decay_queries(const Source& source, const Terms& terms, float* total) {
  const int64_t Kp = padded(source.K);
  const bool erases = source.erases();
  for (int64_t c = 0; c < Kp; c += kLanes) {
    vf product = splat(1.0f);
    for (int r = 0; r < kChunk; ++r) {
      const int64_t at = r * Kp + c;
      const vf before = product;
      product *= load(terms.decay + at);
      store(terms.q + at, load(terms.q + at) * product);
      if (erases) store(terms.e + at, load(terms.e + at) * (source.pre ? before : product));
    }
    store(total + c, product);
  }
}

// --- states in column blocks: block b holds columns [b kBlock, (b + 1) kBlock), row c at c * kBlock; rows padded(K),
// columns past V zero.

KL_INLINE int64_t block_floats(int64_t K) { return padded(K) * kBlock; }

// Column block `block` of a state [K, V] into its packed form, and back.
inline void pack_block(const float* state, int64_t K, int64_t V, int64_t block, float* to) {
  const int64_t first = block * kBlock, width = std::min(V - first, kBlock);
  for (int64_t c = 0; c < padded(K); ++c) {
    for (int v = 0; v < kBlockVectors; ++v) store(to + c * kBlock + v * kLanes, vf{});
    if (c >= K || state == nullptr) continue;
    for_lanes(width, [&](int64_t x, int lanes) {
      store(to + c * kBlock + x, load_lanes(state + c * V + first + x, lanes));
    });
  }
}
inline void unpack_block(const float* packed, int64_t K, int64_t V, int64_t block, float* state) {
  const int64_t first = block * kBlock, width = std::min(V - first, kBlock);
  for (int64_t c = 0; c < K; ++c) {
    for_lanes(width, [&](int64_t x, int lanes) {
      store_lanes(state + c * V + first + x, load(packed + c * kBlock + x), lanes);
    });
  }
}

// --- products with a block

// Calls of `between` that `product` and `update` make.
KL_INLINE int64_t product_steps(int rows) { return rows / 8; }
KL_INLINE int64_t update_steps(int64_t depth) { return depth / kRowTile; }
struct Nothing {
  KL_INLINE void operator()() const {}
  template <class T>
  KL_INLINE void operator()(int64_t, const T&) const {}
};

// x [kRows, kBlock] <- a [kRows, depth] b [depth, kBlock], row r of a at r * stride.
template <int kRows>
KL_INLINE void product_tile(const float* a, int64_t stride, const float* b, int64_t depth, float* x) {
  vf sums[kRows][kBlockVectors] = {};
  for (int64_t c = 0; c < depth; ++c) {
    vf row[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) row[v] = load(b + c * kBlock + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vf factor = splat(a[r * stride + c]);
      for (int v = 0; v < kBlockVectors; ++v) sums[r][v] = fma(factor, row[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kBlockVectors; ++v) store(x + r * kBlock + v * kLanes, sums[r][v]);
  }
}

// x [rows, kBlock] <- a [rows, depth] b [depth, kBlock]; rows a multiple of 8. Calls between() every 8 rows.
template <class F = Nothing>
inline void product(const float* a, int64_t stride, const float* b, int64_t depth, int rows, float* x,
                    F&& between = F()) {
  for (int r = 0; r < rows; r += 8) {
    between();
#if KL_HAS_AVX512
    product_tile<8>(a + r * stride, stride, b, depth, x + r * kBlock);
#else
    product_tile<4>(a + r * stride, stride, b, depth, x + r * kBlock);
    product_tile<4>(a + (r + 4) * stride, stride, b, depth, x + (r + 4) * kBlock);
#endif
  }
}

// Rows [0, kTile) of b <- Diag(total) b + a^T y; `also` gets them with the number `row` of the first.
template <int kTile, class G>
KL_INLINE void update_tile(const float* a, int64_t stride, const float* y, int rows, const float* total, float* b,
                           int64_t row, const G& also) {
  vf sums[kTile][kBlockVectors];
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) {
    const vf factor = splat(total[t]);
    for (int v = 0; v < kBlockVectors; ++v) sums[t][v] = factor * load(b + t * kBlock + v * kLanes);
  }
  for (int r = 0; r < rows; ++r) {
    vf term[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) term[v] = load(y + r * kBlock + v * kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < kTile; ++t) {
      const vf factor = splat(a[r * stride + t]);
      for (int v = 0; v < kBlockVectors; ++v) sums[t][v] = fma(factor, term[v], sums[t][v]);
    }
  }
  also(row, sums);
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) {
    for (int v = 0; v < kBlockVectors; ++v) store(b + t * kBlock + v * kLanes, sums[t][v]);
  }
}

// b [depth, kBlock] <- Diag(total) b + a^T y over `rows` rows: a [rows, depth], row r at r * stride, y [rows, kBlock].
// depth a multiple of kRowTile. Calls between() every kRowTile rows of b, and also(c, rows) with some new rows from c
// on.
template <class F = Nothing, class G = Nothing>
inline void update(const float* a, int64_t stride, const float* y, int rows, const float* total, int64_t depth,
                   float* b, F&& between = F(), const G& also = G()) {
  for (int64_t c = 0; c < depth; c += kRowTile) {
    between();
#if KL_HAS_AVX512
    update_tile<kRowTile>(a + c, stride, y, rows, total + c, b + c * kBlock, c, also);
#else
    constexpr int kHalf = kRowTile / 2;
    for (int64_t half = c; half < c + kRowTile; half += kHalf) {
      update_tile<kHalf>(a + half, stride, y, rows, total + half, b + half * kBlock, half, also);
    }
#endif
  }
}

// --- the step of one token, for inference engines (delta_decode.cpp)

// One value head, one token, in place: q, k, gate [K], v, o [V] as they come out of the convolutions and projections,
// beta its logit, `rate` = exp(A_log) of the head, bias [K] its part of dt_bias or null, state [K, V]. lower_bound:
// the bounded gate's, or 0 for the softplus gate. beta_scale is 1, or 2 for strengths in (0, 2). scale multiplies the
// normalised q. Runs on the caller's thread; the bits are those of kl_kda_core_decode.
void kda_core_step(const float* q, const float* k, const float* v, const float* gate, float beta, float rate,
                   const float* bias, float lower_bound, float beta_scale, float scale, int64_t K, int64_t V,
                   float* state, float* o);

}  // namespace delta
}  // namespace kl
