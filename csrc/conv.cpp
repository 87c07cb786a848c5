// The short causal depthwise convolution (ops/conv/reference.py), forward, backward and one token in place.
//
//     u      = [history; x] of every sequence                                           (1)
//     pre_t  = sum_j weight[:, j] * u_{t - (W - 1) + j}                                 (2)
//     y_t    = silu(pre_t), or pre_t                                                    (3)
//     final  = the last W - 1 rows of u                                                 (4)
//
// A vector of channels sweeps a tile of tokens with the last W - 1 inputs in registers, then the next vector the same
// tile. With gp the gradient of pre, whose last W - 1 rows are kept in registers too, the backward sweep has
//
//     du_t = sum_j weight[:, j] gp_{t - j}   (+ dfinal where u_t is in the final state)
//
// the gradient of the input W - 1 tokens back, or of the history. Items of work are runs of tokens, whatever sequences
// they belong to; a run of the backward looks W - 1 tokens past its end. The gradient of the weight is summed
// run by run, then over the runs in order.

#include "rows.h"

namespace kl {
namespace {

// Tokens that a vector of channels sweeps before the next one does.
constexpr int64_t kTile = 32;
constexpr int64_t kItemElements = 1 << 17, kLeastTokens = 64;
// Filters that are longer have another backend.
constexpr int kMostTaps = 16;

// Sequences in memory: a batch of equal length, or packed ones between offsets.
struct Sequences {
  int64_t count, length;
  const int64_t* offsets;  // [count + 1], or null
  int64_t begin(int64_t n) const { return offsets == nullptr ? n * length : offsets[n]; }
  int64_t size(int64_t n) const { return offsets == nullptr ? length : offsets[n + 1] - offsets[n]; }
  int64_t total() const { return begin(count); }
  // The sequence that token `flat` of all belongs to.
  int64_t of_token(int64_t flat) const {
    if (offsets == nullptr) return flat / length;
    return std::upper_bound(offsets, offsets + count + 1, flat) - offsets - 1;
  }
  // Offsets run from 0 to the length and never fall.
  bool are_valid() const {
    if (offsets == nullptr) return true;
    for (int64_t n = 0; n < count; ++n) {
      if (offsets[n + 1] < offsets[n]) return false;
    }
    return offsets[0] == 0 && offsets[count] == length;
  }
};

template <class T>
struct Inputs {
  Sequences sequences;
  const T* x;
  int64_t batch_stride, token_stride;
  const T* history;   // [N, D, W - 1], or null
  const float* taps;  // [W, D]
  int64_t channels;
  int taps_count;
  const T* token(int64_t n, int64_t t) const {
    const int64_t begin = sequences.offsets == nullptr ? n * batch_stride : sequences.offsets[n] * token_stride;
    return x + begin + t * token_stride;
  }
};

int64_t tokens_per_item(int64_t channels) {
  return std::max(kLeastTokens, kItemElements / std::max<int64_t>(channels, 1) / kTile * kTile);
}
int64_t count_items(const Sequences& sequences, int64_t channels) {
  return ceil_div(sequences.total(), tokens_per_item(channels));
}

// f(n, a, b) for tokens [a, b) of sequence n, for every sequence that item `item` touches.
template <class F>
void for_pieces(const Sequences& sequences, int64_t channels, int64_t item, const F& f) {
  const int64_t tokens = tokens_per_item(channels);
  int64_t flat = item * tokens;
  const int64_t end = std::min(sequences.total(), flat + tokens);
  for (int64_t n = flat < end ? sequences.of_token(flat) : 0; flat < end; ++n) {
    const int64_t begin = sequences.begin(n), stop = std::min(end, begin + sequences.size(n));
    if (stop > flat) f(n, flat - begin, stop - begin);
    flat = std::max(flat, stop);
  }
}

// weight [D, W] -> [W, D].
template <class T>
void transpose_taps(const T* weight, int64_t channels, int64_t taps, float* out) {
  for (int64_t j = 0; j < taps; ++j) {
    for (int64_t c = 0; c < channels; ++c) out[j * channels + c] = to_float(weight[c * taps + j]);
  }
}

// What one vector of channels sees of a sequence.
template <int kTaps, bool kWhole, class T>
struct Column {
  const Inputs<T>& in;
  int64_t n, channel;
  int lanes;

  KL_INLINE int taps() const { return kTaps ? kTaps : in.taps_count; }
  template <class V>
  KL_INLINE vf get(const V* p) const {
    return kWhole ? load(p) : load_first(p, lanes);
  }
  template <class V>
  KL_INLINE void put(V* p, vf x) const {
    if (kWhole) {
      store(p, x);
    } else {
      store_first(p, x, lanes);
    }
  }
  // One input of [N, D, W - 1] memory.
  template <class V>
  KL_INLINE vf get_state(const V* state, int64_t row) const {
    const int64_t past = taps() - 1;
    return load_strided(state + (n * in.channels + channel) * past + row, past, kWhole ? kLanes : lanes);
  }
  // The input at token t, which may lie in the history.
  KL_INLINE vf input(int64_t t) const {
    if (t >= 0) return get(in.token(n, t) + channel);
    return in.history == nullptr ? vf{} : get_state(in.history, t + taps() - 1);
  }
};

// The last taps - 1 rows of something; Eq. 2 with the row that comes next.
template <int kTaps>
struct Window {
  static constexpr int kSize = kTaps ? kTaps : kMostTaps;
  vf row[kSize];
  KL_INLINE void push(vf newest, int taps) {
    for (int j = 0; j + 2 < taps; ++j) row[j] = row[j + 1];
    if (taps > 1) row[taps - 2] = newest;
  }
};

template <int kTaps>
KL_INLINE vf correlate(const Window<kTaps>& window, vf newest, const vf* tap, int taps) {
  if (taps == 1) return newest * tap[0];
  vf sum = window.row[0] * tap[0];
  for (int j = 1; j + 1 < taps; ++j) sum = fma(window.row[j], tap[j], sum);
  return fma(newest, tap[taps - 1], sum);
}

// A sweep jumps from row to row, which the processor does not foresee: ask for the columns after the next in time.
template <class T>
KL_INLINE void prefetch(const T* read, const T* written) {
  constexpr int kAhead = 128 / static_cast<int>(sizeof(T));
  __builtin_prefetch(read + kAhead);
  __builtin_prefetch(written + kAhead, 1);
}

// --- forward

template <int kTaps, bool kSilu, bool kWhole, class T>
KL_INLINE void forward_column(const Column<kTaps, kWhole, T>& column, int64_t first, int64_t last, T* y) {
  const int taps = column.taps();
  const int64_t channels = column.in.channels, stride = column.in.token_stride;
  Window<kTaps> window;
  vf tap[Window<kTaps>::kSize];
  for (int j = 0; j < taps; ++j) tap[j] = column.get(column.in.taps + j * channels + column.channel);
  for (int j = 0; j + 1 < taps; ++j) window.row[j] = column.input(first - (taps - 1) + j);
  const T* x = column.in.token(column.n, first) + column.channel;
  for (int64_t t = first; t < last; ++t, x += stride, y += channels) {
    prefetch(x, y);
    const vf newest = column.get(x);
    const vf pre = correlate<kTaps>(window, newest, tap, taps);
    window.push(newest, taps);
    column.put(y, kSilu ? silu(pre) : pre);
  }
}

template <int kTaps, bool kSilu, class T>
void forward(const Inputs<T>& in, T* y) {
  const int64_t channels = in.channels;
  parallel_for(count_items(in.sequences, channels), [&](int64_t item) {
    for_pieces(in.sequences, channels, item, [&](int64_t n, int64_t a, int64_t b) {
      T* const rows = y + in.sequences.begin(n) * channels;
      for (int64_t first = a; first < b; first += kTile) {
        const int64_t last = std::min(b, first + kTile);
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) {
          forward_column<kTaps, kSilu>(Column<kTaps, true, T>{in, n, c, kLanes}, first, last,
                                       rows + first * channels + c);
        }
        if (c == channels) continue;
        forward_column<kTaps, kSilu>(Column<kTaps, false, T>{in, n, c, static_cast<int>(channels - c)}, first, last,
                                     rows + first * channels + c);
      }
    });
  });
}

// Eq. 4, [N, D, W - 1].
template <class T>
void write_final(const Inputs<T>& in, T* final_state) {
  const int64_t past = in.taps_count - 1, channels = in.channels;
  if (past == 0) return;
  parallel_for(in.sequences.count, [&](int64_t n) {
    for (int64_t row = 0; row < past; ++row) {
      const int64_t t = in.sequences.size(n) - past + row;
      T* const out = final_state + n * channels * past + row;
      const T* const token = t >= 0 ? in.token(n, t) : nullptr;
      const T* const before = in.history == nullptr ? nullptr : in.history + n * channels * past + t + past;
      for (int64_t c = 0; c < channels; ++c) {
        out[c * past] = token != nullptr ? token[c] : before != nullptr ? before[c * past] : from_float<T>(0.0f);
      }
    }
  });
}

// --- backward

template <class T>
struct Gradients {
  const T* y;      // of y, [B * T, D]
  const T* final;  // of the final state, [N, D, W - 1]
  T* x;            // [B * T, D]
  float* history;  // [N, D, W - 1], or null
};

// Tokens [a, b) of sequence n, and what passes from tile to tile: the last rows of gp [W - 1, D], dweight [W, D].
struct Piece {
  int64_t n, a, b;
  float *carried, *sums;
};

// One step at any token: past the end of the piece, past the end of the sequence, before there is a token to emit.
template <int kTaps, bool kWhole, class T>
KL_INLINE void edge_step(const Column<kTaps, kWhole, T>& column, const Gradients<T>& grads, const Piece& piece,
                         int64_t t, vf gp, const Window<kTaps>& window, const vf* reversed) {
  const int taps = column.taps();
  const int64_t past = taps - 1, channels = column.in.channels, size = column.in.sequences.size(piece.n);
  vf du = correlate<kTaps>(window, gp, reversed, taps);
  if (t >= size && past > 0) du = du + column.get_state(grads.final, t - size);
  if (t - past >= piece.a) {
    const int64_t flat = column.in.sequences.begin(piece.n) + t - past;
    column.put(grads.x + flat * channels + column.channel, du);
  } else if (piece.a == 0 && grads.history != nullptr) {
    float* const out = grads.history + (piece.n * channels + column.channel) * past + t;
    for (int i = 0; i < column.lanes; ++i) out[i * past] = du[i];
  }
}

template <int kTaps, bool kSilu, bool kWhole, class T>
KL_INLINE void backward_column(const Column<kTaps, kWhole, T>& column, const Gradients<T>& grads, const Piece& piece,
                               int64_t first, int64_t last) {
  const Inputs<T>& in = column.in;
  const int taps = column.taps();
  const int64_t past = taps - 1, channels = in.channels, c = column.channel, size = in.sequences.size(piece.n);
  Window<kTaps> inputs, pres;
  vf tap[Window<kTaps>::kSize], reversed[Window<kTaps>::kSize], sums[Window<kTaps>::kSize];
  for (int j = 0; j < taps; ++j) {
    tap[j] = reversed[past - j] = column.get(in.taps + j * channels + c);
    sums[j] = column.get(piece.sums + j * channels + c);
  }
  for (int j = 0; j < past; ++j) {
    inputs.row[j] = column.input(first - past + j);
    pres.row[j] = column.get(piece.carried + j * channels + c);
  }
  // gp_t; the sums of the weight's gradient take it unless it belongs to the next piece.
  const T* x = in.token(piece.n, first) + c;
  const T* grad_y = grads.y + (in.sequences.begin(piece.n) + first) * channels + c;
  const auto next = [&](bool is_counted) __attribute__((always_inline)) {
    prefetch(x, grads.x + (grad_y - grads.y));
    __builtin_prefetch(grad_y + 128 / sizeof(T));
    const vf newest = column.get(x);
    vf gp = column.get(grad_y);
    if (kSilu) gp = gp * silu_derivative(correlate<kTaps>(inputs, newest, tap, taps));
    if (is_counted) {
      for (int j = 0; j < past; ++j) sums[j] = fma(gp, inputs.row[j], sums[j]);
      sums[past] = fma(gp, newest, sums[past]);
    }
    inputs.push(newest, taps);
    x += in.token_stride;
    grad_y += channels;
    return gp;
  };
  int64_t t = first;
  const auto at_edge = [&]() __attribute__((always_inline)) {
    const vf gp = t < size ? next(t < piece.b) : vf{};
    edge_step<kTaps>(column, grads, piece, t, gp, pres, reversed);
    pres.push(gp, taps);
    ++t;
  };
  while (t < std::min(last, piece.a + past)) at_edge();
  T* grad_x = grads.x + (in.sequences.begin(piece.n) + t - past) * channels + c;
  for (const int64_t end = std::min(last, piece.b); t < end; ++t, grad_x += channels) {
    const vf gp = next(true);
    column.put(grad_x, correlate<kTaps>(pres, gp, reversed, taps));
    pres.push(gp, taps);
  }
  while (t < last) at_edge();
  for (int j = 0; j < taps; ++j) column.put(piece.sums + j * channels + c, sums[j]);
  for (int j = 0; j < past; ++j) column.put(piece.carried + j * channels + c, pres.row[j]);
}

template <int kTaps, bool kSilu, class T>
void backward_piece(const Inputs<T>& in, const Gradients<T>& grads, const Piece& piece) {
  const int64_t channels = in.channels, past = in.taps_count - 1, end = piece.b + past;
  std::memset(piece.carried, 0, static_cast<size_t>(past * channels) * sizeof(float));
  for (int64_t first = piece.a; first < end; first += kTile) {
    const int64_t last = std::min(end, first + kTile);
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      backward_column<kTaps, kSilu>(Column<kTaps, true, T>{in, piece.n, c, kLanes}, grads, piece, first, last);
    }
    if (c == channels) continue;
    backward_column<kTaps, kSilu>(Column<kTaps, false, T>{in, piece.n, c, static_cast<int>(channels - c)}, grads, piece,
                                  first, last);
  }
}

// dx and dhistory; dweight as one [W, D] sum an item.
template <int kTaps, bool kSilu, class T>
void backward(const Inputs<T>& in, const Gradients<T>& grads, float* sums) {
  const int64_t channels = in.channels, taps = in.taps_count;
  parallel_for(count_items(in.sequences, channels), [&](int64_t item) {
    const Scratch<float> carried(static_cast<size_t>(taps * channels));
    float* const mine = sums + item * taps * channels;
    std::memset(mine, 0, static_cast<size_t>(taps * channels) * sizeof(float));
    for_pieces(in.sequences, channels, item, [&](int64_t n, int64_t a, int64_t b) {
      backward_piece<kTaps, kSilu>(in, grads, Piece{n, a, b, carried.get(), mine});
    });
  });
  if (grads.history == nullptr) return;
  // What an empty sequence returns is what it was given.
  const int64_t state = channels * (taps - 1);
  for (int64_t n = 0; n < in.sequences.count; ++n) {
    if (in.sequences.size(n) > 0) continue;
    for (int64_t i = n * state; i < (n + 1) * state; ++i) grads.history[i] = to_float(grads.final[i]);
  }
}

// dweight [D, W] from `items` sums [W, D].
template <class W>
void write_weight_gradient(const float* sums, int64_t items, int64_t channels, int64_t taps, W* out) {
  for (int64_t j = 0; j < taps; ++j) {
    for_lanes(channels, [&](int64_t c, int lanes) {
      vf total{};
      for (int64_t i = 0; i < items; ++i) total = total + load_lanes(sums + (i * taps + j) * channels + c, lanes);
      for (int k = 0; k < lanes; ++k) out[(c + k) * taps + j] = from_float<W>(total[k]);
    });
  }
}

// Slots lie in [-1, count), none but -1 twice.
bool are_valid_slots(const int64_t* slots, int64_t rows, int64_t count) {
  const Scratch<int64_t> sorted(static_cast<size_t>(rows));
  std::copy(slots, slots + rows, sorted.get());
  std::sort(sorted.get(), sorted.get() + rows);
  for (int64_t i = 0; i < rows; ++i) {
    if (sorted[i] < -1 || sorted[i] >= count) return false;
    if (i > 0 && sorted[i] >= 0 && sorted[i] == sorted[i - 1]) return false;
  }
  return true;
}

// Call f<taps or 0, silu> for a filter.
template <class F>
void for_filter(int64_t taps, bool silu, const F& f) {
  using Four = std::integral_constant<int, 4>;
  using Any = std::integral_constant<int, 0>;
  if (taps == 4) {
    silu ? f(Four{}, std::true_type{}) : f(Four{}, std::false_type{});
  } else {
    silu ? f(Any{}, std::true_type{}) : f(Any{}, std::false_type{});
  }
}

}  // namespace
}  // namespace kl

// x [B, T, D] with these strides; weight [D, W], W <= 16; history [N, D, W - 1] or null; offsets [N + 1] or null (then
// N = B); y [B, T, D], final_state [N, D, W - 1]. All of dtype but weight. Returns 1 for offsets that are not.
KL_EXPORT int64_t kl_short_conv(int64_t dtype, const void* x, int64_t batch_stride, int64_t token_stride,
                                const void* weight, int64_t weight_dtype, const void* history, const int64_t* offsets,
                                void* y, void* final_state, int64_t sequences, int64_t tokens, int64_t channels,
                                int64_t taps, int64_t silu) {
  using namespace kl;
  const Sequences all{sequences, tokens, offsets};
  if (!all.are_valid()) return 1;
  const Scratch<float> wide(static_cast<size_t>(taps * channels));
  dispatch(weight_dtype,
           [&](auto zero) { transpose_taps(static_cast<const decltype(zero)*>(weight), channels, taps, wide.get()); });
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Inputs<T> in{all, static_cast<const T*>(x), batch_stride, token_stride, static_cast<const T*>(history),
                       wide.get(), channels, static_cast<int>(taps)};
    for_filter(taps, silu != 0, [&](auto count, auto with_silu) {
      forward<decltype(count)::value, decltype(with_silu)::value>(in, static_cast<T*>(y));
    });
    write_final(in, static_cast<T*>(final_state));
  });
  return 0;
}

// As above; grad_y [B, T, D] contiguous, grad_final [N, D, W - 1], grad_x contiguous, grad_history float32 or null (as
// history), grad_weight [D, W] of the dtype of weight. The offsets are valid.
KL_EXPORT int64_t kl_short_conv_backward(int64_t dtype, const void* grad_y, const void* grad_final, const void* x,
                                         int64_t batch_stride, int64_t token_stride, const void* weight,
                                         int64_t weight_dtype, const void* history, const int64_t* offsets,
                                         void* grad_x, void* grad_weight, float* grad_history, int64_t sequences,
                                         int64_t tokens, int64_t channels, int64_t taps, int64_t silu) {
  using namespace kl;
  const Sequences all{sequences, tokens, offsets};
  const int64_t items = count_items(all, channels);
  const Scratch<float> wide(static_cast<size_t>(taps * channels)), sums(static_cast<size_t>(items * taps * channels));
  dispatch(weight_dtype,
           [&](auto zero) { transpose_taps(static_cast<const decltype(zero)*>(weight), channels, taps, wide.get()); });
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Inputs<T> in{all, static_cast<const T*>(x), batch_stride, token_stride, static_cast<const T*>(history),
                       wide.get(), channels, static_cast<int>(taps)};
    const Gradients<T> grads{static_cast<const T*>(grad_y), static_cast<const T*>(grad_final), static_cast<T*>(grad_x),
                             grad_history};
    for_filter(taps, silu != 0, [&](auto count, auto with_silu) {
      backward<decltype(count)::value, decltype(with_silu)::value>(in, grads, sums.get());
    });
  });
  dispatch(weight_dtype, [&](auto zero) {
    write_weight_gradient(sums.get(), items, channels, taps, static_cast<decltype(zero)*>(grad_weight));
  });
  return 0;
}

// x [N, D] and y of dtype; pool [S, D, W - 1] of pool_dtype, rows `slots` [N] of it move on; -1 skips a row, whose y is
// zero. Returns 1, with nothing changed, for slots outside [-1, S) or named twice.
KL_EXPORT int64_t kl_short_conv_decode(int64_t dtype, const void* x, const void* weight, int64_t weight_dtype,
                                       int64_t pool_dtype, void* pool, const int64_t* slots, void* y, int64_t rows,
                                       int64_t pool_rows, int64_t channels, int64_t taps, int64_t silu) {
  using namespace kl;
  if (!are_valid_slots(slots, rows, pool_rows)) return 1;
  const Scratch<float> scratch(static_cast<size_t>(taps * channels));
  const float* wide = as_floats(weight, weight_dtype, taps * channels, scratch.get());
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    dispatch(pool_dtype, [&](auto pool_zero) {
      using P = decltype(pool_zero);
      parallel_ranges(rows, std::max<int64_t>(1, kItemElements / 8 / channels), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          T* const out = static_cast<T*>(y) + n * channels;
          if (slots[n] < 0) {
            std::memset(static_cast<void*>(out), 0, static_cast<size_t>(channels) * sizeof(T));
            continue;
          }
          P* const history = static_cast<P*>(pool) + slots[n] * channels * (taps - 1);
          conv_step_row(static_cast<const T*>(x) + n * channels, wide, history, out, channels, taps, silu != 0);
        }
      });
    });
  });
  return 0;
}
