// Mixture of experts: what the kernels of moe_*.cpp share, and what an inference engine calls directly.
//
// M tokens of width D, E experts of width F, k experts a token; M k assignments (token, slot).
#pragma once

#include "vmath.h"

namespace kl::moe {

// --- routing

struct Routing {
  int64_t experts;
  int64_t choices;
  bool renormalize;
  float scaling;
  bool softmax;  // otherwise sigmoid
};

// Route one token: logits [E] and bias [E] to weights [k] and experts [k], in falling order of score + bias, the lowest
// index first among equals. `scores` [E rounded up to kLanes] is scratch. Equations 1 to 3 of ops/moe/router.py.
template <class T>
void route_row(const Routing& routing, const T* logits, const float* bias, float* scores, float* weights,
               int64_t* experts);

// The gradient of its logits [E], given that of its weights [k]. Equations 4 and 5.
template <class T>
void route_row_backward(const Routing& routing, const T* logits, const int64_t* experts, const float* d_weights,
                        float* scores, T* d_logits);

// --- assignments sorted by expert

// Row r of the sorted order. A token's rows are added up in this order: by expert, then by slot.
struct Row {
  int32_t token;
  int32_t assignment;
  float weight;
  bool is_first;  // of its token
  bool is_last;
};

// The index of the first assignment whose expert is outside [0, E), or -1.
int64_t find_wrong_expert(const int64_t* experts, int64_t assignments, int64_t E);

// Counting sort, ties in the order of assignments: rows [M k] and tokens [M k] (of each row, for gathering), and
// offsets [E + 1], expert e having rows [offsets[e], offsets[e + 1]). Experts must be in range.
template <class TWeight>
void sort_by_expert(const int64_t* experts, const TWeight* weights, int64_t M, int64_t k, int64_t E, Row* rows,
                    int32_t* tokens, int64_t* offsets);

// --- the gated activation

// silu(gate) up
KL_INLINE vf swiglu(vf gate, vf up) { return silu(gate) * up; }

}  // namespace kl::moe
