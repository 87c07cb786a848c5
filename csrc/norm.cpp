// RMSNorm, gated RMSNorm and L2 norm with their gradients (ops/norm/reference.py), row by row over the last axis [D].
//
//     r = (mean(x^2) + eps)^(-1/2)                                                      (1)
//     n = r x                                                                           (2)
//     rms_norm:        y = weight * cast(n)                                             (3)
//     gated_rms_norm:  y = cast(weight * n * act(gate)),  act = sigmoid or silu         (4)
//     l2_norm:         y = cast(r x),  r = (sum(x^2) + eps)^(-1/2)                      (5)
//
// A row is read from memory once: the second and third look at it find it in the cache. The gradient of the weight is
// summed over fixed blocks of rows, then over the blocks in order.

#include "rows.h"

namespace kl {
namespace {

// Elements of a forward item: enough to outweigh handing it to a thread.
constexpr int64_t kItemElements = 16384;

// A matrix of rows, contiguous along each row.
struct Rows {
  const void* data;
  int64_t stride;
  int64_t dtype;
};

template <class T>
KL_INLINE const T* row_of(const Rows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

int64_t rows_per_item(int64_t size) { return std::max<int64_t>(1, kItemElements / size); }

// Write the gradient of the weight: what block(begin, end, sums) adds to `sums` [D] for every block of rows.
template <class F>
void write_weight_gradient(int64_t rows, int64_t size, int64_t dtype, void* out, const F& block) {
  const Scratch<float> total(static_cast<size_t>(size));
  sum_over_blocks(rows, size, total.get(), block);
  dispatch(dtype, [&](auto zero) {
    for_lanes(size, [&](int64_t i, int lanes) {
      store_lanes(static_cast<decltype(zero)*>(out) + i, load_lanes(total + i, lanes), lanes);
    });
  });
}

// dn = w dy, dx = r (dn - n (dn . n) / D), dw += dy cast(n): the cast of Eq. 3 passes gradients unchanged.
template <class T>
void rms_norm_backward_row(const T* grad_y, const T* x, const float* weight, T* grad_x, float* grad_weight, int64_t n,
                           float eps) {
  const float r = rms_scale(x, n, eps);
  const float dot = sum_row(n, [&](int64_t i, int lanes, vf total) {
    return fma(load_lanes(grad_y + i, lanes) * load_lanes(weight + i, lanes), load_lanes(x + i, lanes), total);
  });
  const vf scale = splat(r), along = splat(-r * r * dot / static_cast<float>(n));
  for_lanes(n, [&](int64_t i, int lanes) {
    const vf g = load_lanes(grad_y + i, lanes), v = load_lanes(x + i, lanes);
    store_lanes(grad_x + i, fma(along, v, g * load_lanes(weight + i, lanes)) * scale, lanes);
    store_lanes(grad_weight + i, fma(g, rounded<T>(v * scale), load_lanes(grad_weight + i, lanes)), lanes);
  });
}

// act(g) and its derivative.
template <bool kSilu>
KL_INLINE vf activation_and_slope(vf g, vf* slope) {
  const vf s = sigmoid(g), rest = splat(1.0f) - s;
  *slope = kSilu ? s * fma(g, rest, splat(1.0f)) : s * rest;
  return kSilu ? g * s : s;
}

// h = dy act(gate), dw += h n, dn = w h, dx as above, dgate = dy w n act'(gate). `held` keeps h, n floats.
template <bool kSilu, class T, class G>
void gated_rms_norm_backward_row(const T* grad_y, const T* x, const G* gate, const float* weight, T* grad_x,
                                 G* grad_gate, float* grad_weight, float* held, int64_t n, float eps) {
  const float r = rms_scale(x, n, eps);
  const vf scale = splat(r);
  const float dot = sum_row(n, [&](int64_t i, int lanes, vf total) {
    const vf g = load_lanes(grad_y + i, lanes), weighted = load_lanes(x + i, lanes) * load_lanes(weight + i, lanes);
    vf slope;
    const vf h = g * activation_and_slope<kSilu>(load_lanes(gate + i, lanes), &slope);
    store_lanes(held + i, h, lanes);
    store_lanes(grad_gate + i, g * weighted * scale * slope, lanes);
    return fma(h, weighted, total);
  });
  const vf along = splat(-r * r * dot / static_cast<float>(n));
  for_lanes(n, [&](int64_t i, int lanes) {
    const vf h = load_lanes(held + i, lanes), v = load_lanes(x + i, lanes);
    store_lanes(grad_x + i, fma(along, v, h * load_lanes(weight + i, lanes)) * scale, lanes);
    store_lanes(grad_weight + i, fma(h, v * scale, load_lanes(grad_weight + i, lanes)), lanes);
  });
}

template <bool kSilu>
void gated_rms_norm(const Rows& x, const Rows& gate, const float* weight, void* y, int64_t rows, int64_t size,
                    float eps) {
  dispatch(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    dispatch(gate.dtype, [&](auto gate_zero) {
      using G = decltype(gate_zero);
      parallel_ranges(rows, rows_per_item(size), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
          gated_rms_norm_row<kSilu>(row_of<T>(x, m), row_of<G>(gate, m), weight, static_cast<T*>(y) + m * size, size,
                                    eps);
        }
      });
    });
  });
}

template <bool kSilu>
void gated_rms_norm_backward(const Rows& grad_y, const Rows& x, const Rows& gate, const float* weight, void* grad_x,
                             void* grad_gate, void* grad_weight, int64_t weight_dtype, int64_t rows, int64_t size,
                             float eps) {
  dispatch(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    dispatch(gate.dtype, [&](auto gate_zero) {
      using G = decltype(gate_zero);
      write_weight_gradient(rows, size, weight_dtype, grad_weight, [&](int64_t begin, int64_t end, float* sums) {
        Scratch<float> held(static_cast<size_t>(size));
        for (int64_t m = begin; m < end; ++m) {
          gated_rms_norm_backward_row<kSilu>(row_of<T>(grad_y, m), row_of<T>(x, m), row_of<G>(gate, m), weight,
                                             static_cast<T*>(grad_x) + m * size, static_cast<G*>(grad_gate) + m * size,
                                             sums, held.get(), size, eps);
        }
      });
    });
  });
}

}  // namespace
}  // namespace kl

// In all of these: a matrix comes as (address, elements from row to row, dtype code); results are contiguous, in the
// dtype of the tensor they belong to.

KL_EXPORT int64_t kl_rms_norm(const void* x, int64_t x_stride, int64_t x_dtype, const void* weight,
                              int64_t weight_dtype, void* y, int64_t rows, int64_t size, double eps) {
  using namespace kl;
  Scratch<float> wide(static_cast<size_t>(size));
  const float* w = as_floats(weight, weight_dtype, size, wide);
  const Rows in{x, x_stride, x_dtype};
  dispatch(x_dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_ranges(rows, rows_per_item(size), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        rms_norm_row<T>(row_of<T>(in, m), w, static_cast<T*>(y) + m * size, size, static_cast<float>(eps));
      }
    });
  });
  return 0;
}

KL_EXPORT int64_t kl_rms_norm_backward(const void* grad_y, int64_t grad_stride, const void* x, int64_t x_stride,
                                       int64_t x_dtype, const void* weight, int64_t weight_dtype, void* grad_x,
                                       void* grad_weight, int64_t rows, int64_t size, double eps) {
  using namespace kl;
  Scratch<float> wide(static_cast<size_t>(size));
  const float* w = as_floats(weight, weight_dtype, size, wide);
  const Rows grads{grad_y, grad_stride, x_dtype}, in{x, x_stride, x_dtype};
  dispatch(x_dtype, [&](auto zero) {
    using T = decltype(zero);
    write_weight_gradient(rows, size, weight_dtype, grad_weight, [&](int64_t begin, int64_t end, float* sums) {
      for (int64_t m = begin; m < end; ++m) {
        rms_norm_backward_row(row_of<T>(grads, m), row_of<T>(in, m), w, static_cast<T*>(grad_x) + m * size, sums, size,
                              static_cast<float>(eps));
      }
    });
  });
  return 0;
}

KL_EXPORT int64_t kl_gated_rms_norm(const void* x, int64_t x_stride, int64_t x_dtype, const void* gate,
                                    int64_t gate_stride, int64_t gate_dtype, const void* weight, int64_t weight_dtype,
                                    void* y, int64_t rows, int64_t size, double eps, int64_t silu) {
  using namespace kl;
  Scratch<float> wide(static_cast<size_t>(size));
  const float* w = as_floats(weight, weight_dtype, size, wide);
  const auto run = silu ? gated_rms_norm<true> : gated_rms_norm<false>;
  run({x, x_stride, x_dtype}, {gate, gate_stride, gate_dtype}, w, y, rows, size, static_cast<float>(eps));
  return 0;
}

KL_EXPORT int64_t kl_gated_rms_norm_backward(const void* grad_y, int64_t grad_stride, const void* x, int64_t x_stride,
                                             int64_t x_dtype, const void* gate, int64_t gate_stride,
                                             int64_t gate_dtype, const void* weight, int64_t weight_dtype,
                                             void* grad_x, void* grad_gate, void* grad_weight, int64_t rows,
                                             int64_t size, double eps, int64_t silu) {
  using namespace kl;
  Scratch<float> wide(static_cast<size_t>(size));
  const float* w = as_floats(weight, weight_dtype, size, wide);
  const auto run = silu ? gated_rms_norm_backward<true> : gated_rms_norm_backward<false>;
  run({grad_y, grad_stride, x_dtype}, {x, x_stride, x_dtype}, {gate, gate_stride, gate_dtype}, w, grad_x, grad_gate,
      grad_weight, weight_dtype, rows, size, static_cast<float>(eps));
  return 0;
}

KL_EXPORT int64_t kl_l2_norm(const void* x, int64_t x_stride, int64_t x_dtype, void* y, int64_t rows, int64_t size,
                             double eps) {
  using namespace kl;
  const Rows in{x, x_stride, x_dtype};
  dispatch(x_dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_ranges(rows, rows_per_item(size), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        l2_norm_row(row_of<T>(in, m), static_cast<T*>(y) + m * size, size, static_cast<float>(eps));
      }
    });
  });
  return 0;
}

KL_EXPORT int64_t kl_l2_norm_backward(const void* grad_y, int64_t grad_stride, const void* x, int64_t x_stride,
                                      int64_t x_dtype, void* grad_x, int64_t rows, int64_t size, double eps) {
  using namespace kl;
  const Rows grads{grad_y, grad_stride, x_dtype}, in{x, x_stride, x_dtype};
  dispatch(x_dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_ranges(rows, rows_per_item(size), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        l2_norm_row_backward(row_of<T>(grads, m), row_of<T>(in, m), static_cast<T*>(grad_x) + m * size, size,
                             static_cast<float>(eps));
      }
    });
  });
  return 0;
}
