// Functions of one row that several kernels share: norms, one step of the short convolution, the forget gate.
//
// A row is n channels side by side, of float32 or bfloat16 (X, Y, G); weights are float32. Equations are numbered as in
// the reference of the operator. A row's result depends on its values and its length alone.
#pragma once

#include "vmath.h"

namespace kl {

// The row as float32: itself, or widened into `scratch` (n floats).
inline const float* as_floats(const void* row, int64_t dtype, int64_t n, float* scratch) {
  if (dtype != kBFloat16) return static_cast<const float*>(row);
  for_lanes(n, [&](int64_t i, int lanes) {
    store_lanes(scratch + i, load_lanes(static_cast<const bf16*>(row) + i, lanes), lanes);
  });
  return scratch;
}

// x as it reads after a store as T.
template <class T>
KL_INLINE vf rounded(vf x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return widen(narrow(x));
  } else {
    return x;
  }
}

// The sum over a row of what f(i, lanes, total) adds to `total` for the channels i .. i + lanes. Four vectors take
// turns, so that no addition waits for the one before it.
template <class F>
KL_INLINE float sum_row(int64_t n, const F& f) {
  vf total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) total[k] = f(i + k * kLanes, kLanes, total[k]);
  }
  for (int k = 0; k < 4; ++k, i += kLanes) {
    if (i < n) total[k] = f(i, static_cast<int>(std::min<int64_t>(kLanes, n - i)), total[k]);
  }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// total [width] = what block(begin, end, sums) adds to `sums` [width] for every block of kBlockRows rows: the blocks
// run on the threads, and their sums are added up in order.
constexpr int64_t kBlockRows = 128;
template <class F>
void sum_over_blocks(int64_t rows, int64_t width, float* total, const F& block) {
  const int64_t blocks = ceil_div(rows, kBlockRows);
  const Scratch<float> sums(static_cast<size_t>(blocks * width));
  parallel_for(blocks, [&](int64_t b) {
    float* const mine = sums + b * width;
    std::memset(mine, 0, static_cast<size_t>(width) * sizeof(float));
    block(b * kBlockRows, std::min(rows, (b + 1) * kBlockRows), mine);
  });
  for_lanes(width, [&](int64_t i, int lanes) {
    vf sum{};
    for (int64_t b = 0; b < blocks; ++b) sum = sum + load_lanes(sums + b * width + i, lanes);
    store_lanes(total + i, sum, lanes);
  });
}

template <class X>
KL_INLINE float sum_of_squares(const X* x, int64_t n) {
  return sum_row(n, [&](int64_t i, int lanes, vf total) {
    const vf v = load_lanes(x + i, lanes);
    return fma(v, v, total);
  });
}

// r of Eq. 1, and r of Eq. 5.
template <class X>
KL_INLINE float rms_scale(const X* x, int64_t n, float eps) {
  return 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
}
template <class X>
KL_INLINE float l2_scale(const X* x, int64_t n, float eps) {
  return 1.0f / std::sqrt(sum_of_squares(x, n) + eps);
}

// Eq. 3: y = weight * cast(r x), the cast being to Rounded, the dtype of x wherever x may have been widened from.
template <class Rounded, class X, class Y>
KL_INLINE void rms_norm_row(const X* x, const float* weight, Y* y, int64_t n, float eps) {
  const vf r = splat(rms_scale(x, n, eps));
  for_lanes(n, [&](int64_t i, int lanes) {
    store_lanes(y + i, load_lanes(weight + i, lanes) * rounded<Rounded>(load_lanes(x + i, lanes) * r), lanes);
  });
}

// act(gate) of Eq. 4.
template <bool kSilu>
KL_INLINE vf gate_activation(vf gate) {
  return kSilu ? silu(gate) : sigmoid(gate);
}

// Eq. 4: y = cast(weight * r x * act(gate)).
template <bool kSilu, class X, class G, class Y>
KL_INLINE void gated_rms_norm_row(const X* x, const G* gate, const float* weight, Y* y, int64_t n, float eps) {
  const vf r = splat(rms_scale(x, n, eps));
  for_lanes(n, [&](int64_t i, int lanes) {
    const vf normed = load_lanes(x + i, lanes) * r * load_lanes(weight + i, lanes);
    store_lanes(y + i, normed * gate_activation<kSilu>(load_lanes(gate + i, lanes)), lanes);
  });
}

// Eq. 5: y = cast(r x). Returns r.
template <class X, class Y>
KL_INLINE float l2_norm_row(const X* x, Y* y, int64_t n, float eps) {
  const float r = l2_scale(x, n, eps);
  for_lanes(n, [&](int64_t i, int lanes) { store_lanes(y + i, load_lanes(x + i, lanes) * splat(r), lanes); });
  return r;
}

// dx = r (dy - r^2 x (x . dy)), with r computed again from x.
template <class G, class X, class D>
KL_INLINE void l2_norm_row_backward(const G* grad_y, const X* x, D* grad_x, int64_t n, float eps) {
  const float r = l2_scale(x, n, eps);
  const float dot = sum_row(n, [&](int64_t i, int lanes, vf total) {
    return fma(load_lanes(grad_y + i, lanes), load_lanes(x + i, lanes), total);
  });
  const vf scale = splat(r), along = splat(-r * r * dot);
  for_lanes(n, [&](int64_t i, int lanes) {
    const vf direction = fma(along, load_lanes(x + i, lanes), load_lanes(grad_y + i, lanes));
    store_lanes(grad_x + i, direction * scale, lanes);
  });
}

// The forget gate (ops/gate/reference.py, Eqs. 2 and 3) of u = x + dt_bias with rate a = exp(A_log).
KL_INLINE vf softplus_log_decay(vf u, vf rate) { return -rate * softplus(u); }
KL_INLINE vf bounded_log_decay(vf u, vf rate, vf lower_bound) { return lower_bound * sigmoid(rate * u); }

// --- one token of the short convolution

// One column of a few rows of [n, stride] memory.
template <class T>
KL_INLINE vf load_strided(const T* p, int64_t stride, int rows) {
  vf x{};
  for (int i = 0; i < rows; ++i) x[i] = to_float(p[i * stride]);
  return x;
}

#if KL_HAS_AVX512
// The four columns of 16 rows of [n, 4] memory.
KL_INLINE void load_four_columns(const float* p, vf column[4]) {
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512 a = (__m512)load(p), b = (__m512)load(p + 16), c = (__m512)load(p + 32), d = (__m512)load(p + 48);
  for (int j = 0; j < 4; ++j) {
    const __m512i at = _mm512_add_epi32(first, _mm512_set1_epi32(j));
    const __m512 low = _mm512_permutex2var_ps(a, at, b), high = _mm512_permutex2var_ps(c, at, d);
    column[j] = (vf)_mm512_insertf32x8(low, _mm512_castps512_ps256(high), 1);
  }
}

// The three columns of 16 rows of [n, 3] memory; then drop the first and put x behind the others, in place.
template <class P>
KL_INLINE void shift_three_columns(P* p, vf x, vf column[3]) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 a = (__m512)load(p), b = (__m512)load(p + 16), c = (__m512)load(p + 32);
  for (int j = 0; j < 3; ++j) {
    const __m512i at = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(3)), _mm512_set1_epi32(j));
    // Elements 0 to 31 come from a and b, the rest from c.
    const __mmask16 in_c = _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(32));
    const __m512 low = _mm512_permutex2var_ps(a, at, b);
    column[j] = (vf)_mm512_mask_permutexvar_ps(low, in_c, at, c);
  }
  vf moved[3] = {load(p + 1), load(p + 17), load_first(p + 33, 15)};
  // Element 3 d + 2 takes x_d.
  const __mmask16 newest[3] = {0x4924, 0x2492, 0x9249};
  const __m512i from[3] = {_mm512_setr_epi32(0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5),
                           _mm512_setr_epi32(5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10),
                           _mm512_setr_epi32(10, 11, 11, 11, 12, 12, 12, 13, 13, 13, 14, 14, 14, 15, 15, 15)};
  for (int k = 0; k < 3; ++k) {
    store(p + 16 * k, (vf)_mm512_mask_permutexvar_ps((__m512)moved[k], newest[k], from[k], (__m512)x));
  }
}
#endif

// One token of the short convolution in n channels: y = act(sum_j weight[d, j] u_j), u = [history; x]. weight [n, taps]
// and history [n, taps - 1] lie channel by channel, as modules store them; the history moves on by one input in place,
// rounded to its dtype P. The sum runs from the oldest input to the newest, as in the kernel for many tokens.
template <class X, class P, class Y>
inline void conv_step_row(const X* x, const float* weight, P* history, Y* y, int64_t n, int64_t taps, bool silu_after) {
  const int64_t past = taps - 1;
  const auto finish = [&](int64_t i, int lanes, vf sum, vf newest, vf tap) {
    sum = past == 0 ? newest * tap : fma(newest, tap, sum);
    store_lanes(y + i, silu_after ? silu(sum) : sum, lanes);
  };
  for_lanes(n, [&](int64_t i, int lanes) {
    const vf newest = load_lanes(x + i, lanes);
#if KL_HAS_AVX512
    if (taps == 4 && lanes == kLanes) {
      vf old[3], tap[4];
      load_four_columns(weight + 4 * i, tap);
      shift_three_columns(history + 3 * i, newest, old);
      finish(i, lanes, fma(old[2], tap[2], fma(old[1], tap[1], old[0] * tap[0])), newest, tap[3]);
      return;
    }
#endif
    vf sum{};
    for (int64_t j = 0; j < past; ++j) {
      const vf old = load_strided(history + i * past + j, past, lanes);
      const vf tap = load_strided(weight + i * taps + j, taps, lanes);
      sum = j == 0 ? old * tap : fma(old, tap, sum);
    }
    const vf tap = load_strided(weight + i * taps + past, taps, lanes);
    for (int d = 0; d < lanes && past > 0; ++d) {
      P* mine = history + (i + d) * past;
      std::memmove(mine, mine + 1, static_cast<size_t>(past - 1) * sizeof(P));
      mine[past - 1] = from_float<P>(to_float(x[i + d]));
    }
    finish(i, lanes, sum, newest, tap);
  });
}

}  // namespace kl
