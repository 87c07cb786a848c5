// Routing, and sorting assignments by expert. Equations as numbered in ops/moe/router.py:
//
//   s = sigmoid(logits)  or  softmax(logits)                                                (1)
//   experts = the k largest of  s + bias                                                    (2)
//   w = s[experts];  w <- w / (sum w + 1e-20);  w <- scaling w                              (3)
//   dw_j = r (dw'_j - sum_i dw'_i w'_i / scaling),  r = scaling / (sum w + 1e-20)           (4)
//   dlogits = ds s (1 - s)  or  s (ds - sum ds s)                                           (5)

#include <limits>

#include "moe.h"

namespace kl::moe {
namespace {

// Keeps 0 / 0 away when every chosen score underflows.
constexpr float kEpsilon = 1e-20f;
// Tokens a thread takes at a time.
constexpr int64_t kTokens = 64;

// Eq. 1, into scores [E rounded up to kLanes].
template <class T>
void score(const Routing& routing, const T* logits, float* scores) {
  const int64_t E = routing.experts;
  if (!routing.softmax) {
    for_lanes(E, [&](int64_t i, int lanes) { store(scores + i, sigmoid(load_lanes(logits + i, lanes))); });
    return;
  }
  float greatest = -std::numeric_limits<float>::infinity();
  for (int64_t e = 0; e < E; ++e) greatest = std::max(greatest, to_float(logits[e]));
  for_lanes(E, [&](int64_t i, int lanes) { store(scores + i, exp(load_lanes(logits + i, lanes) - splat(greatest))); });
  float total = 0;
  for (int64_t e = 0; e < E; ++e) total += scores[e];
  for_lanes(E, [&](int64_t i, int) { store(scores + i, load(scores + i) / splat(total)); });
}

// Eq. 2, by insertion: most experts fail the first comparison. A score that is NaN counts as the greatest of all, so that
// it is chosen and seen.
void choose(const Routing& routing, const float* scores, const float* bias, float* keys, int64_t* experts) {
  const int64_t k = routing.choices;
  for (int64_t e = 0, held = 0; e < routing.experts; ++e) {
    const float sum = scores[e] + bias[e];
    const float key = sum == sum ? sum : std::numeric_limits<float>::infinity();
    if (held == k && !(key > keys[k - 1])) continue;
    int64_t place = held < k ? held++ : k - 1;
    for (; place > 0 && key > keys[place - 1]; --place) {
      keys[place] = keys[place - 1];
      experts[place] = experts[place - 1];
    }
    keys[place] = key;
    experts[place] = e;
  }
}

}  // namespace

template <class T>
void route_row(const Routing& routing, const T* logits, const float* bias, float* scores, float* weights,
               int64_t* experts) {
  score(routing, logits, scores);
  // The keys of the chosen lie where their weights will.
  choose(routing, scores, bias, weights, experts);
  float total = 0;
  for (int64_t j = 0; j < routing.choices; ++j) total += weights[j] = scores[experts[j]];
  // Eq. 3
  for (int64_t j = 0; j < routing.choices; ++j) {
    weights[j] = (routing.renormalize ? weights[j] / (total + kEpsilon) : weights[j]) * routing.scaling;
  }
}

template <class T>
void route_row_backward(const Routing& routing, const T* logits, const int64_t* experts, const float* d_weights,
                        float* scores, T* d_logits) {
  score(routing, logits, scores);
  const int64_t k = routing.choices;
  float total = 0, along = 0, d_along = 0;
  for (int64_t j = 0; j < k; ++j) {
    total += scores[experts[j]];
    along += d_weights[j] * routing.scaling * scores[experts[j]];
  }
  total += kEpsilon;
  // Eq. 4
  const auto d_score = [&](int64_t j) {
    const float d = d_weights[j] * routing.scaling;
    return routing.renormalize ? (d - along / total) / total : d;
  };
  // Eq. 5
  for (int64_t j = 0; j < k; ++j) d_along += d_score(j) * scores[experts[j]];
  for (int64_t e = 0; e < routing.experts; ++e) {
    d_logits[e] = from_float<T>(routing.softmax ? -scores[e] * d_along : 0.0f);
  }
  for (int64_t j = 0; j < k; ++j) {
    const float s = scores[experts[j]];
    const float d = routing.softmax ? s * (d_score(j) - d_along) : d_score(j) * s * (1.0f - s);
    d_logits[experts[j]] = from_float<T>(d);
  }
}

int64_t find_wrong_expert(const int64_t* experts, int64_t assignments, int64_t E) {
  for (int64_t i = 0; i < assignments; ++i) {
    if (experts[i] < 0 || experts[i] >= E) return i;
  }
  return -1;
}

template <class TWeight>
void sort_by_expert(const int64_t* experts, const TWeight* weights, int64_t M, int64_t k, int64_t E, Row* rows,
                    int32_t* tokens, int64_t* offsets) {
  std::fill(offsets, offsets + E + 1, 0);
  for (int64_t i = 0; i < M * k; ++i) ++offsets[experts[i] + 1];
  for (int64_t e = 0; e < E; ++e) offsets[e + 1] += offsets[e];
  const Scratch<int64_t> next(static_cast<size_t>(E));
  std::copy(offsets, offsets + E, next.get());
  for (int64_t m = 0; m < M; ++m) {
    int64_t first = M * k, last = -1;
    for (int64_t i = m * k; i < (m + 1) * k; ++i) {
      const int64_t r = next[experts[i]]++;
      rows[r] = Row{static_cast<int32_t>(m), static_cast<int32_t>(i), to_float(weights[i]), false, false};
      tokens[r] = static_cast<int32_t>(m);
      first = std::min(first, r);
      last = std::max(last, r);
    }
    if (k > 0) rows[first].is_first = rows[last].is_last = true;
  }
}

template void route_row(const Routing&, const float*, const float*, float*, float*, int64_t*);
template void route_row(const Routing&, const bf16*, const float*, float*, float*, int64_t*);
template void route_row_backward(const Routing&, const float*, const int64_t*, const float*, float*, float*);
template void route_row_backward(const Routing&, const bf16*, const int64_t*, const float*, float*, bf16*);
template void sort_by_expert(const int64_t*, const float*, int64_t, int64_t, int64_t, Row*, int32_t*, int64_t*);
template void sort_by_expert(const int64_t*, const bf16*, int64_t, int64_t, int64_t, Row*, int32_t*, int64_t*);

}  // namespace kl::moe

// logits [M, E], bias [E] to weights [M, k] and experts [M, k].
KL_EXPORT int64_t kl_moe_route(int64_t dtype, const void* logits, const float* bias, int64_t M, int64_t E, int64_t k,
                               int64_t renormalize, double scaling, int64_t softmax, float* weights,
                               int64_t* experts) {
  using namespace kl;
  const moe::Routing routing{E, k, renormalize != 0, static_cast<float>(scaling), softmax != 0};
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_ranges(M, moe::kTokens, [&](int64_t begin, int64_t end) {
      const Scratch<float> scores(static_cast<size_t>(round_up(E, kLanes)));
      for (int64_t m = begin; m < end; ++m) {
        moe::route_row(routing, static_cast<const T*>(logits) + m * E, bias, scores, weights + m * k, experts + m * k);
      }
    });
  });
  return 0;
}

// d_weights [M, k], logits [M, E] and experts [M, k] to d_logits [M, E].
KL_EXPORT int64_t kl_moe_route_backward(int64_t dtype, const float* d_weights, const void* logits,
                                        const int64_t* experts, int64_t M, int64_t E, int64_t k, int64_t renormalize,
                                        double scaling, int64_t softmax, void* d_logits) {
  using namespace kl;
  const moe::Routing routing{E, k, renormalize != 0, static_cast<float>(scaling), softmax != 0};
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_ranges(M, moe::kTokens, [&](int64_t begin, int64_t end) {
      const Scratch<float> scores(static_cast<size_t>(round_up(E, kLanes)));
      for (int64_t m = begin; m < end; ++m) {
        moe::route_row_backward(routing, static_cast<const T*>(logits) + m * E, experts + m * k, d_weights + m * k,
                                scores, static_cast<T*>(d_logits) + m * E);
      }
    });
  });
  return 0;
}
