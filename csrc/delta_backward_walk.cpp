// The walk of the backward over a sequence, a few value heads side by side; equations in delta_backward.h.

#include "delta_backward.h"

namespace kl::delta::backward {
namespace {

// A state [K, V], or zeros for null, into rows of Vp.
void load_state(const float* state, int64_t K, int64_t V, float* to, int64_t Kp, int64_t Vp) {
  std::memset(to, 0, static_cast<size_t>(Kp * Vp) * sizeof(float));
  if (state == nullptr) return;
  for (int64_t k = 0; k < K; ++k) std::memcpy(to + k * Vp, state + k * V, static_cast<size_t>(V) * sizeof(float));
}

// Upper-left triangles of (dP^T | dN^T) [16, 32] as dP [16, 16], r >= s, and dN, r > s.
void turn_scores(const float* across, float* d_scores) {
  float *dP = d_scores, *dN = d_scores + kChunk * kChunk;
  for (int r = 0; r < kChunk; ++r) {
    for (int s = 0; s < kChunk; ++s) {
      dP[r * kChunk + s] = s <= r ? across[s * 2 * kChunk + r] : 0.0f;
      dN[r * kChunk + s] = s < r ? across[s * 2 * kChunk + kChunk + r] : 0.0f;
    }
  }
}

}  // namespace

int64_t Memory::lay_out(const Source& source, int64_t heads, float* base) {
  Kp = padded(source.K);
  Vp = padded_values(source.V);
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    float* part = base ? base + used : nullptr;
    // A cache line between two parts: rows lie powers of two apart, and columns of several parts are read together.
    used += round_up(count, 16) + 16;
    return part;
  };
  for (Slot& slot : slots) {
    slot.written = take(kChunk * Vp);
    slot.N = take(kChunk * kChunk);
    slot.P = take(kChunk * kChunk);
    slot.state = take(Kp * Vp);
  }
  float** const rows[] = {&terms.q, &terms.k, &terms.e, &terms.decay, &terms.log_decay, &terms.logits};
  for (float** part : rows) *part = take(kChunk * Kp);
  d_states = take(heads * Kp * Vp);
  queries = take(2 * kChunk * Kp);
  keys = take(kChunk * Kp);
  total = take(Kp);
  flow = take(Kp);
  d_read = take(2 * kChunk * Vp);
  d_read_across = take(2 * kChunk * Vp);
  written_across = take(kChunk * Vp);
  d_queries_across = take(2 * kChunk * Kp);
  d_keys_across = take(kChunk * Kp);
  d_scores_across = take(2 * kChunk * kChunk);
  d_scores = take(2 * kChunk * kChunk);
  const bool is_narrow = narrow(source);
  state16 = reinterpret_cast<bf16*>(take(is_narrow ? Kp * Vp / 2 : 0));
  d_state16 = reinterpret_cast<bf16*>(take(is_narrow ? Kp * Vp / 2 : 0));
  rows16 = reinterpret_cast<bf16*>(take(is_narrow ? kChunk * Vp : 0));
  float** const gradients[] = {&d.q, &d.e, &d.k, &d.g};
  for (float** part : gradients) *part = take(kChunk * Kp);
  row = take(std::max(Kp, Vp));
  return used;
}

// The chunk of tokens from `token` on, as far as the sequence goes.
void Walk::prefetch(const Rows& x, int64_t token, int64_t heads, int64_t width) const {
  if (token < start_ || token >= end_ || x.data == nullptr) return;
  const int rows = static_cast<int>(std::min<int64_t>(kChunk, end_ - token));
  const int64_t head = heads == source_.HV ? head_ : source_.key_head(head_);
  prefetch_rows<false>(x.data, x.type, token * heads + head, heads, rows, width);
}

void Walk::prefetch(const Target& x, const Slot& slot, int64_t width) const {
  if (x.data == nullptr) return;
  prefetch_rows<true>(x.data, x.type, slot.token * source_.HV + head_, source_.HV, slot.rows, width);
}

void Walk::run(int64_t start, int64_t length, const float* boundaries) {
  const int64_t states = source_.HV * source_.K * source_.V;
  start_ = start, end_ = start + length;
  for (int64_t segment = ceil_div(length, kSegment) - 1; segment >= 0; --segment) {
    const int64_t first = segment * kSegment, tokens = std::min(kSegment, length - first);
    for (int64_t h = 0; h < heads_; ++h) {
      head_ = first_head_ + h;
      m_.d_state = m_.d_states + h * m_.Kp * m_.Vp;
      forward(start + first, tokens, boundaries + segment * states + head_ * source_.K * source_.V);
      for (int64_t chunk = ceil_div(tokens, kChunk) - 1; chunk >= 0; --chunk) backward_chunk(m_.slots[chunk]);
    }
  }
}

void Walk::forward(int64_t start, int64_t length, const float* state) {
  load_state(state, source_.K, source_.V, m_.slots[0].state, m_.Kp, m_.Vp);
  const int64_t chunks = ceil_div(length, kChunk);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    Slot& slot = m_.slots[chunk];
    slot.token = start + chunk * kChunk;
    slot.rows = static_cast<int>(std::min<int64_t>(kChunk, length - chunk * kChunk));
    forward_chunk(slot, chunk + 1 < chunks ? m_.slots[chunk + 1].state : nullptr);
  }
}

// (1), (2) and, where there is a next state, (4).
void Walk::forward_chunk(Slot& slot, float* next) {
  const int64_t Kp = m_.Kp, Vp = m_.Vp;
  const int64_t K = source_.K, V = source_.V, later = slot.token + kChunk;
  load_terms(source_, slot.token, slot.rows, head_, m_.terms);
  chunk_factors(source_, m_.terms, m_.queries, m_.keys, m_.total);
  Terms scored = m_.terms;
  // `scores` advances the keys it is given.
  scored.k = m_.d.k;
  prefetch(source_.q, later, source_.H, K);
  prefetch(source_.k, later, source_.H, K);
  std::memcpy(scored.k, m_.terms.k, static_cast<size_t>(kChunk * Kp) * sizeof(float));
  scores(source_, scored, slot.N, slot.P);
  load_values(source_.value, slot, m_.terms.strength, slot.written);
  prefetch(source_.value, later, source_.HV, V);
  if (source_.erases()) {
    const float* erase = m_.queries + kChunk * Kp;
    for_tiles(kChunk, Vp, [&](int64_t r, int64_t v) {
      Tile acc, z;
      clear(acc);
      multiply<false>(acc, erase + r * Kp, Kp, slot.state + v, Vp, Kp);
      load_tile(z, slot.written + r * Vp + v, Vp);
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kCols; ++j) acc[i][j] = z[i][j] - acc[i][j];
      }
      store_tile(slot.written + r * Vp + v, Vp, acc);
    });
    substitute<false>(slot.written, Vp, slot.N);
  }
  if (!source_.scalar_decay) prefetch(source_.gate, later, source_.HV, K);
  if (source_.erase_heads > 0) prefetch(source_.e, later, source_.erase_heads, K);
  if (next) update_state(next, slot.state, m_.total, Kp, Vp, m_.keys, slot.written, kChunk);
}

// Rows of x [tokens, HV, V] times a factor each; zero past V and past the last row.
void Walk::load_values(const Rows& x, const Slot& slot, const float* factors, float* to) const {
  const int64_t V = source_.V, Vp = m_.Vp;
  for (int r = 0; r < kChunk; ++r) {
    float* row = to + r * Vp;
    const int64_t filled = r < slot.rows ? round_up(V, kLanes) : 0;
    if (filled) load_row(x, (slot.token + r) * source_.HV + head_, V, factors ? factors[r] : 1.0f, row);
    for (int64_t v = filled; v < Vp; v += kLanes) store(row + v, vf{});
  }
}

// (5): d_read takes dO and -dz.
void Walk::read_gradients(const Slot& slot) {
  const int64_t Kp = m_.Kp, Vp = m_.Vp;
  float *d_o = m_.d_read, *d_z = m_.d_read + kChunk * Vp;
  load_values(d_o_, slot, nullptr, d_o);
  for_tiles(kChunk, Vp, [&](int64_t r, int64_t v) {
    Tile acc;
    clear(acc);
    multiply<true>(acc, slot.P + r, kChunk, d_o + v, Vp, kChunk);
    multiply<false>(acc, m_.keys + r * Kp, Kp, m_.d_state + v, Vp, Kp);
    store_tile(d_z + r * Vp + v, Vp, acc);
  });
  if (source_.erases()) substitute<true>(d_z, Vp, slot.N);
}

// (6), and dP and dN of (5), transposed; and sum_v S dS'.
void Walk::factor_gradients(const Slot& slot) {
  const int64_t Kp = m_.Kp, Vp = m_.Vp;
  transpose(m_.d_read, Vp, 2 * kChunk, Vp, m_.d_read_across, 2 * kChunk);
  transpose(slot.written, Vp, kChunk, Vp, m_.written_across, kChunk);
  times_transposed(m_.d_scores_across, kChunk, 2 * kChunk, slot.written, Vp, m_.d_read_across, Vp);
  times_transposed(m_.d_queries_across, Kp, 2 * kChunk, slot.state, Vp, m_.d_read_across, Vp);
  times_transposed(m_.d_keys_across, Kp, kChunk, m_.d_state, Vp, m_.written_across, Vp);
  row_products<false>(slot.state, m_.d_state, Kp, Vp, m_.flow, nullptr, nullptr);
}

#if KL_HAS_DOT
void Walk::factor_gradients_narrow(const Slot& slot) {
  const int64_t Kp = m_.Kp, Vp = m_.Vp;
  pairs_across(m_.d_read, 2 * kChunk, Vp, m_.rows16, m_.d_read_across);
  pairs_across(slot.written, kChunk, Vp, m_.rows16, m_.written_across);
  row_products<true>(slot.state, m_.d_state, Kp, Vp, m_.flow, m_.state16, m_.d_state16);
  times_transposed_pairs(m_.d_scores_across, kChunk, 2 * kChunk, m_.rows16, Vp, m_.d_read_across, Vp / 2);
  times_transposed_pairs(m_.d_queries_across, Kp, 2 * kChunk, m_.state16, Vp, m_.d_read_across, Vp / 2);
  times_transposed_pairs(m_.d_keys_across, Kp, kChunk, m_.d_state16, Vp, m_.written_across, Vp / 2);
}
#else
void Walk::factor_gradients_narrow(const Slot& slot) { factor_gradients(slot); }
#endif

void Walk::backward_chunk(const Slot& slot) {
  const int64_t Kp = m_.Kp, Vp = m_.Vp, K = source_.K, V = source_.V;
  load_terms(source_, slot.token, slot.rows, head_, m_.terms);
  chunk_factors(source_, m_.terms, m_.queries, m_.keys, m_.total);
  read_gradients(slot);
  prefetch(d_o_, slot.token - kChunk, source_.HV, V);
  for (int64_t at = kChunk * Vp; at < 2 * kChunk * Vp; at += kLanes) store(m_.d_read + at, -load(m_.d_read + at));
  narrow(source_) ? factor_gradients_narrow(slot) : factor_gradients(slot);
  turn_scores(m_.d_scores_across, m_.d_scores);
  prefetch(targets_.q, slot, K);
  prefetch(targets_.k, slot, K);
  // (7)
  const int rows = source_.erases() ? 2 * kChunk : kChunk;
  update_state(m_.d_state, m_.d_state, m_.total, Kp, Vp, m_.queries, m_.d_read, rows);
  prefetch(targets_.e, slot, K);
  prefetch(targets_.value, slot, V);
  if (!source_.scalar_decay) prefetch(targets_.gate, slot, K);
  if (source_.weighs()) prefetch(source_.value, slot.token, source_.HV, V);
  transpose(m_.d_queries_across, 2 * kChunk, Kp, kChunk, m_.d.q, Kp);
  transpose(m_.d_queries_across + kChunk, 2 * kChunk, Kp, kChunk, m_.d.e, Kp);
  transpose(m_.d_keys_across, kChunk, Kp, kChunk, m_.d.k, Kp);
  const float *dP = m_.d_scores, *dN = m_.d_scores + kChunk * kChunk;
  if (!source_.erases()) {
    score_gradients<false, false>(m_.terms, Kp, dP, dN, m_.total, m_.flow, m_.d);
  } else if (source_.pre) {
    score_gradients<true, true>(m_.terms, Kp, dP, dN, m_.total, m_.flow, m_.d);
  } else {
    score_gradients<true, false>(m_.terms, Kp, dP, dN, m_.total, m_.flow, m_.d);
  }
  source_.core ? finish_core(slot) : finish_plain(slot);
}

void Walk::finish_plain(const Slot& slot) {
  const int64_t K = source_.K, Kp = m_.Kp;
  for (int r = 0; r < slot.rows; ++r) {
    const int64_t row = (slot.token + r) * source_.HV + head_, at = r * Kp;
    store_row(targets_.q, row, m_.d.q + at, K, source_.scale);
    if (source_.weighs()) {
      store_one(targets_.beta, row, finish_weights(slot, r));
    } else {
      if (source_.erases()) store_row(targets_.e, row, m_.d.e + at, K, 1.0f);
      // d_read holds -dz.
      store_row(targets_.value, row, m_.d_read + (kChunk + r) * m_.Vp, source_.V, -1.0f);
    }
    store_row(targets_.k, row, m_.d.k + at, K, 1.0f);
    if (source_.scalar_decay) {
      vf total{};
      for (int64_t c = 0; c < Kp; c += kLanes) total += load(m_.d.g + at + c);
      store_one(targets_.gate, row, sum(total));
    } else {
      store_row(targets_.gate, row, m_.d.g + at, K, 1.0f);
    }
  }
}

// Row r through e = b k and z = b v: stores the gradient of v, adds that of e to k's, and returns that of b.
float Walk::finish_weights(const Slot& slot, int r) {
  const int64_t row = (slot.token + r) * source_.HV + head_, at = r * m_.Kp, V = source_.V;
  const float strength = m_.terms.strength[r];
  // d_read holds -dz.
  const float *d_z = m_.d_read + (kChunk + r) * m_.Vp, *d_e = m_.d.e + at;
  float* d_k = m_.d.k + at;
  load_row(source_.value, row, V, 1.0f, m_.row);
  const float d_strength = dot(m_.terms.k + at, d_e, m_.Kp) - dot(m_.row, d_z, V);
  for (int64_t c = 0; c < m_.Kp; c += kLanes) store(d_k + c, fma(splat(strength), load(d_e + c), load(d_k + c)));
  store_row(targets_.value, row, d_z, V, -strength);
  return d_strength;
}

// From the terms' gradients to those of the raw inputs.
void Walk::finish_core(const Slot& slot) {
  const int64_t K = source_.K, Kp = m_.Kp;
  const bool grouped = source_.H != source_.HV;
  const float beta_scale = source_.beta_scale, scale = source_.scale;
  for (int r = 0; r < slot.rows; ++r) {
    const int64_t row = (slot.token + r) * source_.HV + head_, at = r * Kp;
    const float strength = m_.terms.strength[r];
    const float *q = m_.terms.q + at, *k = m_.terms.k + at;
    float *d_q = m_.d.q + at, *d_k = m_.d.k + at;
    store_one(targets_.beta, row, finish_weights(slot, r) * strength * (1.0f - strength / beta_scale));
    if (grouped) {
      store_row(targets_.q, row, d_q, K, scale);
      store_row(targets_.k, row, d_k, K, 1.0f);
    } else {
      // q holds scale times the normalised query.
      normalise_backward(d_q, q, Kp, m_.terms.q_root[r], scale);
      normalise_backward(d_k, k, Kp, m_.terms.k_root[r], 1.0f);
      store_row(targets_.q, row, d_q, K, 1.0f);
      store_row(targets_.k, row, d_k, K, 1.0f);
    }
  }
  finish_gate(slot);
}

void Walk::finish_gate(const Slot& slot) {
  const float rate = rate_of(source_, head_), bound = source_.lower_bound;
  const bool bounded = source_.bounded;
  const int64_t Kp = m_.Kp;
  const int rows = slot.rows;
  float *const d_gate = m_.d.g, *const d_bias = m_.row;
  const float *const logits = m_.terms.logits, *const log_decay = m_.terms.log_decay;
  vf d_rate{};
  for (int64_t c = 0; c < Kp; c += kLanes) {
    vf column{};
    for (int r = 0; r < rows; ++r) {
      const int64_t at = r * Kp + c;
      const vf u = load(logits + at), g = load(log_decay + at), d = load(d_gate + at);
      // g (1 - g / bound) is bound s (1 - s) for the sigmoid s.
      const vf d_x = bounded ? splat(rate) * d * g * (splat(1.0f) - g / splat(bound))
                             : splat(-rate) * sigmoid_of(u) * d;
      d_rate = bounded ? fma(d_x, u, d_rate) : fma(d, g, d_rate);
      column += d_x;
      store(d_gate + at, d_x);
    }
    store(d_bias + c, column);
  }
  for (int r = 0; r < rows; ++r) {
    store_row(targets_.gate, (slot.token + r) * source_.HV + head_, d_gate + r * Kp, source_.K, 1.0f);
  }
  double* parameters = targets_.parameters + head_ * (source_.K + 1);
  parameters[0] += sum(d_rate);
  for (int64_t c = 0; c < source_.K; ++c) parameters[1 + c] += d_bias[c];
}

}  // namespace kl::delta::backward
