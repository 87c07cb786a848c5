// Softmax attention of one query a sequence over its cache, for callers that split the work among threads themselves.
//
//    s_hs = q_h . k_s  (+ r_h . e_s),   p = softmax_s(s_hs),   mixed_h = sum_s p_hs v_s                       (1)
//
// for the H query heads that read one key head. Grouped heads: k_s and v_s are that head's key and value. Latent
// attention, absorbed: k_s = v_s = c_s is the latent, e_s the key part that all heads share, q_h = scale K_h^T q_n,h
// and r_h = scale q_r,h; what comes out is the mixed latent, which V_h then maps to the head's output.
//
// A context is cut into pieces, a function of its length alone. Each piece is summed by itself, with its own largest
// score, and `combine` puts the pieces together in order: so neither the number of threads nor the other sequences of a
// batch change a bit. Nor does the place of the rows in memory: contiguous or in pages.
#pragma once

#include "common.h"

namespace kl::attention {

// Rows of a cache, `stride` elements from one token to the next. In pages, token t is token t % page_size of page
// pages[t / page_size], and pages are `page_stride` elements apart; without, `page_stride` is not read.
struct Rows {
  const void* data = nullptr;
  int64_t width = 0;
  int64_t stride = 0;
  int64_t page_stride = 0;
};

// What one sequence (and one key head of it) has cached. `shared` has width 0 for grouped heads.
struct Cache {
  DType dtype;
  Rows keys, shared, values;
  const int32_t* pages = nullptr;  // null: contiguous
  int64_t page_size = 0;
};

// The queries of the heads that read the cache, [heads, width of keys + width of shared], scaled already. With `low`,
// they and the probabilities may be rounded to bfloat16 where the cache is bfloat16 and the level has dot products.
struct Queries {
  const float* data;
  int64_t heads;
  bool low;
};

// Tokens of a piece, and pieces, of a context of `length` tokens; at most kMostPieces.
constexpr int64_t kPiece = 256;
constexpr int64_t kMostPieces = 64;
KL_INLINE int64_t piece_tokens(int64_t length) {
  return kPiece * std::max<int64_t>(1, ceil_div(length, kPiece * kMostPieces));
}
KL_INLINE int64_t num_pieces(int64_t length) { return ceil_div(length, piece_tokens(length)); }

// Floats that the result of a piece takes: a row of `partial_width` a head.
KL_INLINE int64_t partial_width(int64_t value_width) { return round_up(value_width, 32) + 16; }
KL_INLINE int64_t partial_floats(int64_t heads, int64_t value_width) { return heads * partial_width(value_width); }

// Eq. 1 of tokens [first + piece * piece_tokens(length), ...) of the context [first, first + length). Writes
// partial_floats(heads, width of values) floats; reads no token outside the context.
void decode_piece(const Queries& queries, const Cache& cache, int64_t first, int64_t length, int64_t piece,
                  float* partial);

// mixed [value_width] <- head h of all pieces, in order; partials lie partial_floats(heads, value_width) apart. Zero
// pieces give zeros.
void combine(const float* partials, int64_t pieces, int64_t heads, int64_t h, int64_t value_width, float* mixed);

// Sizes of latent attention; kv_b is [H (dn + dv), R], a head's dn key rows first.
struct MlaSizes {
  int64_t H, R, dn, dr, dv;
};

// The queries of head h for `rows` sequences: out[n] = (K_h^T q_n, q_r) * scale, with q[n] = (q_n, q_r) of the head. q
// of q_dtype with rows `q_stride` elements apart, kv_b of kv_dtype, out rows `out_stride` floats apart. A row's result
// does not depend on the others.
void mla_absorb(const MlaSizes& sizes, int64_t h, int64_t rows, DType q_dtype, const void* q, int64_t q_stride,
                DType kv_dtype, const void* kv_b, float scale, float* out, int64_t out_stride);

// The outputs of head h for `rows` sequences: out[n] = V_h mixed[n], out of out_dtype.
void mla_project(const MlaSizes& sizes, int64_t h, int64_t rows, const float* mixed, int64_t mixed_stride,
                 DType kv_dtype,
                 const void* kv_b, DType out_dtype, void* out, int64_t out_stride);

}  // namespace kl::attention
