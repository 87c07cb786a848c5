// The delta rule's backward: what a call writes, the memory of one item of work, and its parts.
//
// An item is a few value heads of a run of sequences. Each sequence is walked from its last segment to its first:
// forward through the segment from the state that entered it, which the forward pass kept, then through its chunks from
// the last. The heads take turns, a segment each, because their rows share pages of memory.
// With dO, dS' given, and dq~ and so on the gradients of the factors (1) of delta.h,
//
//     dR = P^T dO + k^ dS'        dz = (I + N)^-T dR       dP = tril(dO R^T)       dN = -stril(dz R^T)           (5)
//     dq~ = dO S^T                de~ = -dz S^T            dk^ = R dS'^T                                         (6)
//     dS = Diag(A_15) dS' + q~^T dO - e~^T dz                                                                   (7)
#pragma once

#include "delta_backward_scores.h"

namespace kl::delta::backward {

constexpr int kChunks = kSegment / kChunk;

// A tensor of gradients, [tokens, heads, width].
struct Target {
  void* data;
  DType type;
};

// Where gradients go. Those of q, k and a shared erase key have a row for every value head where these are grouped, to
// be summed afterwards.
struct Targets {
  Target q, k, e, value, gate, beta;
  float* initial;  // [N, HV, K, V]
  // Core: of every head of the item's sequences, summands of d A_log, then of d dt_bias [K]; null otherwise.
  double* parameters;
};

// What one chunk keeps from the walk forward to the walk back. Its terms are loaded again: they would take as much as
// the state, and what leaves the second-level cache costs more than to be formed twice.
struct Slot {
  float *written, *N, *P, *state;
  int64_t token;
  int rows;
};

// Whether the products (6) and dP, dN take their factors in bfloat16: their results are gradients, no other product is
// made of them, and the inputs are no better. Not in short sums, where roundings do not average out.
constexpr int64_t kLongSum = 64;
KL_INLINE bool narrow(const Source& source) {
  return KL_HAS_DOT && source.V >= kLongSum && source.q.type == kBFloat16 && source.k.type == kBFloat16 &&
         source.value.type == kBFloat16;
}

KL_INLINE int64_t padded_values(int64_t V) { return round_up(V, std::max(16, kCols * kLanes)); }

// The memory of an item, all of it in one piece.
struct Memory {
  int64_t Kp, Vp;
  float* d_states;  // of each head, [Kp, Vp]
  Slot slots[kChunks];
  Terms terms;
  float *d_state;                   // that of the head at work
  float *queries, *keys, *total;    // [2, 16, Kp], [16, Kp], [Kp]
  float *flow;                      // sum_v S dS', [Kp]
  float *d_read;                    // dO, then -dz, [2, 16, Vp]
  float *d_read_across;             // the same as [Vp, 32]
  float *written_across;            // R as [Vp, 16]
  float *d_queries_across, *d_keys_across;  // [Kp, 32], [Kp, 16]
  float *d_scores_across, *d_scores;        // [16, 32], dP then dN [2, 16, 16]
  bf16 *state16, *d_state16, *rows16;       // S, dS' and rows in bfloat16, where `narrow`
  FactorGradients d;
  float *row;                       // max(Kp, Vp)

  // Hands out the parts of `base`; with null, returns how many floats that takes.
  int64_t lay_out(const Source& source, int64_t heads, float* base);
};

// Rows of one head, a page or so apart, are fetched by no hardware ahead of time: bring them into the second-level
// cache while a chunk before them is at work. kWrite: to be written.
template <bool kWrite>
inline void prefetch_rows(const void* data, DType type, int64_t first_row, int64_t stride, int rows, int64_t width) {
  constexpr int64_t kLine = 64;
  const int64_t row_bytes = width * (type == kBFloat16 ? 2 : 4);
  const char* at = static_cast<const char*>(data) + first_row * row_bytes;
  for (int r = 0; r < rows; ++r, at += stride * row_bytes) {
    for (int64_t x = 0; x < row_bytes; x += kLine) __builtin_prefetch(at + x, kWrite, 2);
  }
}

// A few value heads of one sequence.
class Walk {
 public:
  Walk(const Source& source, const Targets& targets, const Rows& d_o, Memory& memory, int64_t first_head, int64_t heads)
      : source_(source), targets_(targets), d_o_(d_o), m_(memory), first_head_(first_head), heads_(heads) {}

  // Tokens [start, start + length); boundaries: state [HV, K, V] entering each segment. memory.d_states holds the
  // gradients of the last states and takes those of the first.
  void run(int64_t start, int64_t length, const float* boundaries);

 private:
  void prefetch(const Rows& x, int64_t token, int64_t heads, int64_t width) const;
  void prefetch(const Target& x, const Slot& slot, int64_t width) const;
  void forward(int64_t start, int64_t length, const float* state);
  void forward_chunk(Slot& slot, float* next);
  void backward_chunk(const Slot& slot);
  void read_gradients(const Slot& slot);
  void factor_gradients(const Slot& slot);
  void factor_gradients_narrow(const Slot& slot);
  void load_values(const Rows& x, const Slot& slot, const float* factors, float* to) const;
  void finish_plain(const Slot& slot);
  float finish_weights(const Slot& slot, int r);
  void finish_core(const Slot& slot);
  void finish_gate(const Slot& slot);

  const Source& source_;
  const Targets& targets_;
  const Rows& d_o_;
  Memory& m_;
  int64_t first_head_, heads_;
  int64_t head_ = 0;              // the one at work
  int64_t start_ = 0, end_ = 0;  // of the sequence
};

// to <- factor x [width], row `row` of a tensor, zero up to a whole vector.
template <class T>
KL_INLINE void load_row(const T* x, int64_t width, float factor, float* to) {
  for_lanes(width, [&](int64_t c, int lanes) { store(to + c, load_lanes(x + c, lanes) * splat(factor)); });
}
KL_INLINE void load_row(const Rows& x, int64_t row, int64_t width, float factor, float* to) {
  if (x.type == kBFloat16) {
    load_row(static_cast<const bf16*>(x.data) + row * width, width, factor, to);
  } else {
    load_row(static_cast<const float*>(x.data) + row * width, width, factor, to);
  }
}

// The other way: a row of a target takes factor x, in its type.
template <class T>
KL_INLINE void store_row(T* to, const float* x, int64_t width, float factor) {
  for_lanes(width, [&](int64_t c, int lanes) { store_lanes(to + c, load_lanes(x + c, lanes) * splat(factor), lanes); });
}
KL_INLINE void store_row(const Target& to, int64_t row, const float* x, int64_t width, float factor) {
  if (to.type == kBFloat16) {
    store_row(static_cast<bf16*>(to.data) + row * width, x, width, factor);
  } else {
    store_row(static_cast<float*>(to.data) + row * width, x, width, factor);
  }
}
KL_INLINE void store_one(const Target& to, int64_t at, float x) {
  if (to.type == kBFloat16) {
    static_cast<bf16*>(to.data)[at] = to_bf16(x);
  } else {
    static_cast<float*>(to.data)[at] = x;
  }
}

// Both hold whole vectors, zero past their width.
KL_INLINE float dot(const float* a, const float* b, int64_t width) {
  vf total{};
  for (int64_t c = 0; c < width; c += kLanes) total = fma(load(a + c), load(b + c), total);
  return sum(total);
}

// d <- root (factor d - y (y d)), the way back through y = x root, for y given as factor times it.
KL_INLINE void normalise_backward(float* d, const float* y, int64_t width, float root, float factor) {
  const float along = dot(d, y, width);
  const vf own = splat(root * factor), off = splat(factor == 0.0f ? 0.0f : -root * along / factor);
  for (int64_t c = 0; c < width; c += kLanes) store(d + c, fma(load(d + c), own, load(y + c) * off));
}

}  // namespace kl::delta::backward
