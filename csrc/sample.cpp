// Picking tokens from logits.

#include "simd.h"

namespace kl {
namespace {

// The first of the largest entries of a row, or -1 if an entry is NaN or infinite.
template <class T>
int64_t argmax_row(const T* x, int64_t n) {
  vf largest = splat(-INFINITY), strange{};
  for_lanes(n, [&](int64_t i, int lanes) {
    const vf v = load_lanes(x + i, lanes);
    // 0 for a finite number, else NaN.
    strange += v * splat(0.0f);
    largest = max(largest, lanes == kLanes ? v : [&] {
      vf padded = splat(-INFINITY);
      for (int j = 0; j < lanes; ++j) padded[j] = v[j];
      return padded;
    }());
  });
  if (sum(strange) != 0.0f) return -1;
  float best = largest[0];
  for (int j = 1; j < kLanes; ++j) best = std::max(best, largest[j]);
  for (int64_t i = 0; i < n; ++i) {
    if (to_float(x[i]) == best) return i;
  }
  return -1;
}

}  // namespace
}  // namespace kl

// tokens [rows] <- the first of the largest entries of each row of logits [rows, n], -1 for a row that is not finite.
KL_EXPORT int64_t kl_sample_argmax(int64_t dtype, const void* logits, int64_t rows, int64_t n, int64_t* tokens) {
  kl::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t m = 0; m < rows; ++m) tokens[m] = kl::argmax_row(static_cast<const T*>(logits) + m * n, n);
  });
  return 0;
}
