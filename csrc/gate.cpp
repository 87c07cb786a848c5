// The forget gate (ops/gate/reference.py) and its gradients, over rows of C = HV K channels; a = exp(A_log), per head.
//
//     u = x + dt_bias                                                                   (1)
//     softplus:  g = -a softplus(u)            dx = -a sigmoid(u) dg           dA_log = sum dg g     (2)
//     bounded:   g = bound sigmoid(a u)        dx = a bound s (1 - s) dg       dA_log = sum dx u     (3)
//
// with s = sigmoid(a u) and ddt_bias = sum dx. The sums run over fixed blocks of rows, then over the blocks in order.

#include "rows.h"

namespace kl {
namespace {

constexpr int64_t kItemElements = 16384;

// A rate and a bias for every channel.
class Channels {
 public:
  Channels(const float* A_log, const float* dt_bias, int64_t heads, int64_t per_head)
      : rates_(static_cast<size_t>(heads * per_head)), biases_(static_cast<size_t>(heads * per_head)) {
    for (int64_t h = 0; h < heads; ++h) {
      const float rate = A_log == nullptr ? 1.0f : exp(splat(A_log[h]))[0];
      std::fill_n(rates_.get() + h * per_head, per_head, rate);
    }
    for (int64_t c = 0; c < heads * per_head; ++c) biases_[c] = dt_bias == nullptr ? 0.0f : dt_bias[c];
  }
  const float* rates() const { return rates_; }
  const float* biases() const { return biases_; }

 private:
  Scratch<float> rates_, biases_;
};

template <bool kBounded, class T>
void forward_row(const T* x, const Channels& channels, float bound, float* log_decay, int64_t n) {
  for_lanes(n, [&](int64_t i, int lanes) {
    const vf u = load_lanes(x + i, lanes) + load_lanes(channels.biases() + i, lanes);
    const vf rate = load_lanes(channels.rates() + i, lanes);
    const vf g = kBounded ? bounded_log_decay(u, rate, splat(bound)) : softplus_log_decay(u, rate);
    store_lanes(log_decay + i, g, lanes);
  });
}

// Adds dx to sums [0, n) and the summands of dA_log to sums [n, 2 n).
template <bool kBounded, class T>
void backward_row(const float* grad, const T* x, const Channels& channels, float bound, T* grad_x, float* sums,
                  int64_t n) {
  for_lanes(n, [&](int64_t i, int lanes) {
    const vf g = load_lanes(grad + i, lanes), rate = load_lanes(channels.rates() + i, lanes);
    const vf u = load_lanes(x + i, lanes) + load_lanes(channels.biases() + i, lanes), one = splat(1.0f);
    vf dx, summand;
    if constexpr (kBounded) {
      const vf s = sigmoid(rate * u);
      dx = splat(bound) * rate * g * (s * (one - s));
      summand = dx * u;
    } else {
      // sigmoid and softplus from one exponential of -|u|.
      const vf e = exp(-abs(u));
      const vf s = select(u < vf{}, e, one) / (one + e);
      dx = -rate * s * g;
      summand = -rate * g * (max(u, vf{}) + log1p_unit(e));
    }
    store_lanes(grad_x + i, dx, lanes);
    store_lanes(sums + i, load_lanes(sums + i, lanes) + dx, lanes);
    store_lanes(sums + n + i, load_lanes(sums + n + i, lanes) + summand, lanes);
  });
}

template <bool kBounded, class T>
void forward(const T* x, const Channels& channels, float bound, float* log_decay, int64_t rows, int64_t n) {
  parallel_ranges(rows, std::max<int64_t>(1, kItemElements / n), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) forward_row<kBounded>(x + m * n, channels, bound, log_decay + m * n, n);
  });
}

template <bool kBounded, class T>
void backward(const float* grad, const T* x, const Channels& channels, float bound, T* grad_x, float* totals,
              int64_t rows, int64_t n) {
  sum_over_blocks(rows, 2 * n, totals, [&](int64_t begin, int64_t end, float* sums) {
    for (int64_t m = begin; m < end; ++m) {
      backward_row<kBounded>(grad + m * n, x + m * n, channels, bound, grad_x + m * n, sums, n);
    }
  });
}

}  // namespace
}  // namespace kl

// x [M, HV, K] of dtype; A_log [HV] and dt_bias [HV, K] float32 or null; bound < 0, or 0 for the softplus form;
// log_decay [M, HV, K] float32.
KL_EXPORT int64_t kl_forget_gate(int64_t dtype, const void* x, const float* A_log, const float* dt_bias, double bound,
                                 float* log_decay, int64_t rows, int64_t heads, int64_t per_head) {
  using namespace kl;
  const Channels channels(A_log, dt_bias, heads, per_head);
  const float limit = static_cast<float>(bound);
  dispatch(dtype, [&](auto zero) {
    const auto* in = static_cast<const decltype(zero)*>(x);
    (bound < 0 ? forward<true, decltype(zero)> : forward<false, decltype(zero)>)(in, channels, limit, log_decay, rows,
                                                                                  heads * per_head);
  });
  return 0;
}

// As above; grad [M, HV, K] float32, grad_x of dtype, grad_A_log [HV] and grad_dt_bias [HV, K] float32, always written.
KL_EXPORT int64_t kl_forget_gate_backward(int64_t dtype, const float* grad, const void* x, const float* A_log,
                                          const float* dt_bias, double bound, void* grad_x, float* grad_A_log,
                                          float* grad_dt_bias, int64_t rows, int64_t heads, int64_t per_head) {
  using namespace kl;
  const int64_t n = heads * per_head;
  const Channels channels(A_log, dt_bias, heads, per_head);
  const Scratch<float> totals(static_cast<size_t>(2 * n));
  const float limit = static_cast<float>(bound);
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    (bound < 0 ? backward<true, T> : backward<false, T>)(grad, static_cast<const T*>(x), channels, limit,
                                                         static_cast<T*>(grad_x), totals.get(), rows, n);
  });
  std::copy_n(totals.get(), n, grad_dt_bias);
  for (int64_t h = 0; h < heads; ++h) {
    grad_A_log[h] = sum_row(per_head, [&](int64_t i, int lanes, vf total) {
      return total + load_lanes(totals + n + h * per_head + i, lanes);
    });
  }
  return 0;
}
