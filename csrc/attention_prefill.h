// Attention of many queries: what its forward and backward share.
//
// Letters: T queries and S keys a sequence, Hq query heads, Hkv key heads, K and V widths. A stream is one key head of
// one sequence. Everything is computed transposed, keys down and queries across: a vector holds one key's scores for
// neighbouring queries, so the softmax needs no sum across lanes.
#pragma once

#include "attention_tile.h"

namespace kl::attention {

// Strides in elements; the last axis is dense.
struct Tensor {
  void* data;
  int64_t batch, token, head;
  template <class T>
  KL_INLINE T* at(int64_t b, int64_t t, int64_t h) const {
    return static_cast<T*>(data) + b * batch + t * token + h * head;
  }
};

// The call. cu_q, cu_k [N + 1]: offsets of packed sequences (then B is 1), or null: B sequences of T queries, S keys.
// Per query and head, [B, Hq, T]: the largest score in units of ln 2, and one over the sum of the powers below it.
struct Call {
  Tensor q, k, v;
  const int64_t *cu_q, *cu_k;
  float *maximum, *share;
  int64_t N, T, S, Hq, Hkv, K, V, window;
  float scale;
};

// One sequence of a call.
struct Sequence {
  int64_t b, q_first, k_first, T, S;
  int64_t ahead() const { return S - T; }
};

inline Sequence sequence_of(const Call& call, int64_t n) {
  if (call.cu_q == nullptr) return Sequence{n, 0, 0, call.T, call.S};
  return Sequence{0, call.cu_q[n], call.cu_k[n], call.cu_q[n + 1] - call.cu_q[n], call.cu_k[n + 1] - call.cu_k[n]};
}

// Keys [begin, end) that a query sees which stands behind `position` keys.
struct Span {
  int64_t begin, end;
};

inline Span seen_by(const Call& call, int64_t position) {
  return Span{call.window > 0 ? std::max<int64_t>(0, position - call.window + 1) : 0, position + 1};
}

// Which keys kLanes neighbouring queries see: the last lanes may stand in for queries that do not exist.
struct Lanes {
  vi first, last;       // of each lane: first <= key <= last
  int64_t from, to;     // keys that any lane sees: from <= key < to
  int64_t all_from, all_to;  // keys that all lanes see; may be empty

  Lanes(const Call& call, int64_t position, int64_t most) {
    for (int i = 0; i < kLanes; ++i) {
      const Span span = seen_by(call, std::min(position + i, most));
      first[i] = static_cast<int32_t>(span.begin);
      last[i] = static_cast<int32_t>(span.end - 1);
      if (i == 0) from = span.begin, all_to = span.end;
      all_from = span.begin, to = span.end;
    }
  }
  // -inf where a lane does not see the key.
  KL_INLINE vf mask(vf scores, int64_t key) const {
    const vi at = splat_int(static_cast<int32_t>(key));
    const vf hidden = splat(-std::numeric_limits<float>::infinity());
    return select(((at >= first) & (at <= last)), scores, hidden);
  }
  KL_INLINE bool all_see(int64_t key) const { return key >= all_from && key < all_to; }
};

}  // namespace kl::attention
