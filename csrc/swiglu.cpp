// The gated activation of a feed-forward network, element by element. Equations as in ops/swiglu/reference.py:
//
//   y = silu(gate) up                                                                       (1)
//   dgate = dy up silu'(gate),   dup = dy silu(gate)                                        (2)

#include "vmath.h"

namespace kl {
namespace {

// Elements of a thread's piece: several tensors of them fit the second-level cache.
constexpr int64_t kPiece = 16384;

template <class T>
void forward(const T* gate, const T* up, T* y, int64_t count) {
  parallel_ranges(count, kPiece, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t at, int lanes) {
      const int64_t i = begin + at;
      // Eq. 1
      store_lanes(y + i, silu(load_lanes(gate + i, lanes)) * load_lanes(up + i, lanes), lanes);
    });
  });
}

template <class T>
void backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t count) {
  parallel_ranges(count, kPiece, [&](int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t at, int lanes) {
      const int64_t i = begin + at;
      const vf grad = load_lanes(dy + i, lanes), x = load_lanes(gate + i, lanes);
      const vf s = sigmoid(x);
      // Eq. 2
      const vf derivative = s * fma(x, splat(1.0f) - s, splat(1.0f));
      store_lanes(dgate + i, grad * load_lanes(up + i, lanes) * derivative, lanes);
      store_lanes(dup + i, grad * (x * s), lanes);
    });
  });
}

}  // namespace
}  // namespace kl

// All tensors [count], of one dtype.
KL_EXPORT int64_t kl_swiglu_forward(int64_t dtype, const void* gate, const void* up, void* y, int64_t count) {
  kl::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    kl::forward(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(y), count);
  });
  return 0;
}

KL_EXPORT int64_t kl_swiglu_backward(int64_t dtype, const void* dy, const void* gate, const void* up, void* dgate,
                                     void* dup, int64_t count) {
  kl::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    kl::backward(static_cast<const T*>(dy), static_cast<const T*>(gate), static_cast<const T*>(up),
                 static_cast<T*>(dgate), static_cast<T*>(dup), count);
  });
  return 0;
}
