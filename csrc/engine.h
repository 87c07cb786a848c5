// One token a row through a whole model: what Python describes once, and what the layers share.
//
// A step is one parallel region: the threads walk together through the phases of every layer (team.h). The residual
// stream and everything between two matrices is float32; the operands of a product are what the weights want (linear.h).
// A row's result does not depend on the other rows: every product, norm and sum is that of the row alone.
//
// M rows, D model width, E experts of width F, k experts a token; other letters as in the references of the operators.
// The structs are mirrored by ctypes in inference/native/structs.py: pointers, 64-bit integers and doubles alone.
#pragma once

#include "linear.h"
#include "team.h"

namespace kl::engine {

enum MixerKind : int64_t { kKda = 0, kMla = 1 };
enum FfnKind : int64_t { kSwiGlu = 0, kMoe = 1 };

// A delta-rule mixer with a decay a channel. `in` holds the rows of q, k, v, f_a, g_a and b.
// `decay` and `gate` hold the rows of f_b and g_b, those of each head padded to whole tiles.
struct KdaLayer {
  PackedWeight in, decay, gate, out;
  const float *conv_q, *conv_k, *conv_v;  // [H K, W], [H K, W], [HV V, W]
  const float *rate;                      // exp(A_log) [HV]
  const float *dt_bias, *out_norm;        // [HV K], [V]
  int64_t H, HV, K, V, W;
  int64_t decay_rows, gate_rows;                   // rows of `decay` and `gate` a head, padded
  int64_t at_k, at_v, at_decay, at_gate, at_beta;  // where the parts begin among the rows of `in`
  double lower_bound;  // 0: the softplus gate
  double scale, out_eps;
};

// Multi-head latent attention. `in` holds the rows of q and of kv_a; kv_b stays as it is.
struct MlaLayer {
  PackedWeight in, out;
  const void* kv_b;             // [H (dn + dv), R] of kv_dtype
  const float* latent_norm;     // [R]
  const double* frequencies;    // [dr / 2], or null without positions
  int64_t H, R, dn, dr, dv, kv_dtype;
  int64_t at_latent;
  double latent_eps, scale;
};


// down(silu(gate) * up): `in` holds the rows of gate, padded, then those of up.
struct SwiGluLayer {
  PackedWeight in, down;
  int64_t F, at_up;
};

// The experts' matrices lie behind each other: `in` has 2 * width rows an expert, as SwiGluLayer, `down` D rows.
struct MoeLayer {
  PackedWeight in, down;
  SwiGluLayer shared;  // F = 0: none
  const float *router, *bias;  // [E, D], [E]
  int64_t E, k, F, at_up, in_rows, down_rows;
  int64_t softmax, renormalize;
  double scaling;
};

struct Layer {
  const float *mixer_norm, *ffn_norm;  // [D]
  int64_t mixer_kind, ffn_kind;
  const void *mixer, *ffn;
};

struct Model {
  const Layer* layers;
  const void* embedding;  // [vocabulary, D] of embedding_dtype
  const float* norm;
  PackedWeight head;
  int64_t num_layers, D, embedding_dtype;
  double norm_eps;
};

// What one layer remembers of the rows of a call. KDA: the three convolutions' tails and the recurrent state. MLA: the
// latents and the shared keys, [M, capacity, ..].
struct LayerState {
  void *conv_q, *conv_k, *conv_v;
  float* recurrent;
  void *latent, *key_rope;
  int64_t capacity;
};

struct Call {
  const int64_t *tokens, *lengths;  // [M]; tokens seen before this one
  const LayerState* states;
  void* logits;  // [M, vocabulary] of `dtype`
  int64_t rows, dtype;  // that of the model's activations, states included
};

// Memory of one step that all threads see.
struct Workspace {
  float* stream;    // [M, D]
  float* normed;    // [M, D]
  char* operand;    // blocks of rows as a product wants them
  char* row_operand;  // the same rows one by one, for a mixture of experts
  float* projected; // [M, widest `in`]
  float* mixed;     // [M, widest mixer output]
  float* latent_q;  // [M, H (R + dr)]
  float* partials;  // of attention, for up to most_pieces pieces a row
  int64_t most_pieces;
  float* weights;   // [M, k]
  int64_t* experts; // [M, k]
  int64_t *chosen, *first_slot, *slots;  // the slots sorted by expert
  float* gated;     // [M, (k + 1) widest F]
  char* gated_operand;
};

struct Context {
  Team& team;
  const Model& model;
  const Call& call;
  const Workspace& work;
};

// Outputs of an item of a product: enough that taking the item costs nothing, few enough that threads end together.
constexpr int64_t kTile = gemm::kPanel;
constexpr int64_t kItem = 2 * kTile;
// Rows whose operands are made together and meet a piece of a weight at once.
constexpr int64_t kRows = gemm::kTileRows;

// Bytes from one block of kRows operands to the next, and of one row by itself.
inline int64_t block_bytes(const PackedWeight& w) { return round_up(operand_bytes(w, kRows), 64); }
inline int64_t row_bytes(const PackedWeight& w) { return round_up(operand_bytes(w, 1), 64); }

inline void make_operand(const PackedWeight& w, const float* x, void* out) {
  make_operands(w, gemm::Matrix<float>{x, w.inputs}, 0, 1, out);
}
// One block of the rows of x, which are `stride` floats apart.
inline void make_block(const PackedWeight& w, const float* x, int64_t stride, int64_t rows, int64_t block, char* out) {
  const int64_t first = block * kRows;
  make_operands(w, gemm::Matrix<float>{x, stride}, first, std::min(kRows, rows - first), out + block * block_bytes(w));
}

// y[n - begin] <- w[n] x for outputs n in [begin, end), begin at a tile, of one row as an operand.
inline void product(const PackedWeight& w, int64_t begin, int64_t end, const void* x, float* y) {
  linear_rows(w, x, 1, begin / kTile, ceil_div(end, kTile), [&](int64_t, int64_t panel, vf lower, vf upper) {
    gemm::store_panel(y, end - begin, panel - begin / kTile, lower, upper);
  });
}
// The same for all rows of a call, in blocks; y[m] is ldy floats behind y[m - 1].
inline void block_product(const PackedWeight& w, int64_t begin, int64_t end, const char* x, int64_t rows, float* y,
                          int64_t ldy) {
  for (int64_t first = 0; first < rows; first += kRows) {
    linear_rows(w, x + first / kRows * block_bytes(w), std::min(kRows, rows - first), begin / kTile,
                ceil_div(end, kTile), [&](int64_t row, int64_t panel, vf lower, vf upper) {
                  gemm::store_panel(y + (first + row) * ldy, end - begin, panel - begin / kTile, lower, upper);
                });
  }
}

// Phase: the operands of M rows x of `stride` floats.
inline void operand_phase(const Context& c, const PackedWeight& w, const float* x, int64_t stride, char* out) {
  const int64_t rows = c.call.rows;
  c.team.phase(ceil_div(rows, kRows), [&](int64_t block) { make_block(w, x, stride, rows, block, out); });
}

// Phase: y [M, outputs of w] <- w x, or y += w x.
inline void product_phase(const Context& c, const PackedWeight& w, const char* x, float* y, int64_t ldy,
                          bool add = false) {
  const int64_t rows = c.call.rows;
  c.team.phase(ceil_div(w.outputs, kItem), [&](int64_t item) {
    const int64_t begin = item * kItem, end = std::min(w.outputs, begin + kItem);
    if (!add) {
      block_product(w, begin, end, x, rows, y + begin, ldy);
      return;
    }
    const Scratch<float> sums(static_cast<size_t>(rows * kItem));
    block_product(w, begin, end, x, rows, sums, kItem);
    for (int64_t m = 0; m < rows; ++m) {
      for_lanes(end - begin, [&](int64_t i, int lanes) {
        float* const to = y + m * ldy + begin + i;
        store_lanes(to, load_lanes(to, lanes) + load_lanes(sums + m * kItem + i, lanes), lanes);
      });
    }
  });
}

void kda_layer(const Context& c, const KdaLayer& layer, const LayerState& state);
// The most pieces that the context of any row is cut into, and the floats that a row's pieces take.
int64_t mla_most_pieces(const Call& call);
int64_t mla_partial_floats(const MlaLayer& layer, int64_t most_pieces);
void mla_layer(const Context& c, const MlaLayer& layer, const LayerState& state);
void swiglu_layer(const Context& c, const SwiGluLayer& layer);
void moe_layer(const Context& c, const MoeLayer& layer);

}  // namespace kl::engine
