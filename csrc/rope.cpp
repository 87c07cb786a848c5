// Rotary positions (ops/rope/reference.py): every pair of channels (i, i + K/2) turned by the angle of its token.
//
//     angle_{t,i} = position_t * theta ** (-2 i / K),   i = 0 .. K/2 - 1                       (1)
//     y_i       = x_i cos - x_{i + K/2} sin                                                    (2)
//     y_{i+K/2} = x_{i + K/2} cos + x_i sin                                                    (3)
//
// Angles in float64, their cosines and sines to float32; one table of K/2 serves all heads of a token.

#include "simd.h"

namespace kl {
namespace {

constexpr double kTwoOverPi = 0.63661977236758134308;
// pi / 2 in two parts, the first with few enough bits for whole multiples of it to be exact.
constexpr double kHalfPiHigh = 1.57079632673412561417, kHalfPiLow = 6.07710050650619224932e-11;
// Adding it to a number of ordinary size leaves the nearest whole number in the low bits.
constexpr double kWholeShift = 6755399441055744.0;

// The cosines and sines for one position. An angle is n quarter turns, counted in float64, and a rest of at most an
// eighth turn, which float32 polynomials take; n modulo 4 says which of them is which.
class Table {
 public:
  explicit Table(int64_t half)
      : half_(half),
        rests_(static_cast<size_t>(half)),
        quarters_(static_cast<size_t>(half)),
        cosines_(static_cast<size_t>(half)),
        sines_(static_cast<size_t>(half)) {}
  const float* cosines() const { return cosines_; }
  const float* sines() const { return sines_; }

  void fill(double position, const double* frequencies) {
    for (int64_t i = 0; i < half_; ++i) {
      const double angle = position * frequencies[i], shifted = angle * kTwoOverPi + kWholeShift;
      const double n = shifted - kWholeShift;
      rests_[i] = static_cast<float>((angle - n * kHalfPiHigh) - n * kHalfPiLow);
      int64_t bits;
      std::memcpy(&bits, &shifted, sizeof bits);
      quarters_[i] = static_cast<float>(bits & 3);
    }
    for_lanes(half_, [&](int64_t i, int lanes) { fill_lanes(i, lanes); });
  }

 private:
  KL_INLINE void fill_lanes(int64_t i, int lanes) {
    const vf r = load_lanes(rests_ + i, lanes), z = r * r;
    const vi quarter = __builtin_convertvector(load_lanes(quarters_ + i, lanes), vi);
    vf s = fma(splat(-1.9515295891e-4f), z, splat(8.3321608736e-3f));
    s = fma(s, z, splat(-1.6666654611e-1f));
    s = fma(s * z, r, r);
    vf c = fma(splat(2.443315711809948e-5f), z, splat(-1.388731625493765e-3f));
    c = fma(c, z, splat(4.166664568298827e-2f));
    c = fma(c, z, splat(-0.5f));
    c = fma(c, z, splat(1.0f));
    const vi swapped = (quarter & 1) == 1;
    // Bit 1 of the quarter is the sign of the sine, that of the quarter after it the sign of the cosine.
    const vi sine_sign = (quarter & 2) << 30, cosine_sign = ((quarter + 1) & 2) << 30;
    store_lanes(cosines_ + i, (vf)((vi)select(swapped, s, c) ^ cosine_sign), lanes);
    store_lanes(sines_ + i, (vf)((vi)select(swapped, c, s) ^ sine_sign), lanes);
  }

  int64_t half_;
  Scratch<float> rests_, quarters_, cosines_, sines_;
};

// Eqs. 2 and 3 for the heads of one token.
template <class T>
void rotate(const T* x, const float* cosines, const float* sines, T* y, int64_t heads, int64_t half) {
  for (int64_t h = 0; h < heads; ++h, x += 2 * half, y += 2 * half) {
    for_lanes(half, [&](int64_t i, int lanes) {
      const vf low = load_lanes(x + i, lanes), high = load_lanes(x + half + i, lanes);
      const vf c = load_lanes(cosines + i, lanes), s = load_lanes(sines + i, lanes);
      store_lanes(y + i, fma(low, c, -(high * s)), lanes);
      store_lanes(y + half + i, fma(high, c, low * s), lanes);
    });
  }
}

}  // namespace
}  // namespace kl

// x, y [B, T, H, 2 half] of dtype; positions [T], or [B, T] if own. The inverse turns the other way.
KL_EXPORT int64_t kl_rope(int64_t dtype, const void* x, const int64_t* positions, int64_t own, double theta,
                          int64_t inverse, void* y, int64_t batch, int64_t tokens, int64_t heads, int64_t half) {
  using namespace kl;
  const Scratch<double> frequencies(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i) {
    frequencies[i] = std::pow(theta, -static_cast<double>(i) / static_cast<double>(half));
  }
  const int64_t size = heads * 2 * half;
  // An item is a position: of one sequence, or of all.
  parallel_ranges(own ? batch * tokens : tokens, 8, [&](int64_t begin, int64_t end) {
    Table table(half);
    for (int64_t item = begin; item < end; ++item) {
      table.fill(static_cast<double>(inverse ? -positions[item] : positions[item]), frequencies);
      dispatch(dtype, [&](auto zero) {
        using T = decltype(zero);
        for (int64_t row = item; row < batch * tokens; row += own ? batch * tokens : tokens) {
          rotate(static_cast<const T*>(x) + row * size, table.cosines(), table.sines(), static_cast<T*>(y) + row * size,
                 heads, half);
        }
      });
    }
  });
  return 0;
}
