// Latent attention's two products with kv_b, and the decode operators over a batch of sequences.
//
//    a_h = K_h^T q_n,h     before, and     o_h = V_h mixed_h     after attention.h's Eq. 1                     (2)
//
// kv_b is used as it is stored: K_h^T q sums its rows, V_h m is a dot product with each. The weights are read once for
// kRows sequences.

#include "attention.h"
#include "attention_simd.h"

namespace kl::attention {
namespace {

// Sequences that meet a weight while it is in a register.
constexpr int kRows = 4;
// Sequences of an item of work.
constexpr int64_t kItemRows = 32;
// Floats of the pieces' results that are kept at a time.
constexpr int64_t kPartialBudget = int64_t{1} << 22;

// out [RT, R] = factor q [RT, dn] K: NV vectors of channels at a time, a chain over the rows of K.
template <int RT, int NV, class W>
KL_INLINE void absorb_columns(const W* kv, int64_t R, int64_t dn, const float* q, int64_t ldq, float factor,
                              int64_t column,
                              int lanes, float* out, int64_t ldo) {
  vf sums[RT][NV] = {};
  for (int64_t d = 0; d < dn; ++d) {
    vf weight[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) weight[v] = load_lanes(kv + d * R + column + v * kLanes, lanes);
#pragma GCC unroll 4
    for (int n = 0; n < RT; ++n) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[n][v] = fma(splat(q[n * ldq + d]), weight[v], sums[n][v]);
    }
  }
  for (int n = 0; n < RT; ++n) {
    for (int v = 0; v < NV; ++v) {
      store_lanes(out + n * ldo + column + v * kLanes, sums[n][v] * splat(factor), lanes);
    }
  }
}

template <int RT, class W>
void absorb_rows(const W* kv, int64_t R, int64_t dn, const float* q, int64_t ldq, float factor, float* out,
                 int64_t ldo) {
  constexpr int NV = (KL_HAS_AVX512 ? 16 : 8) / (RT == 1 ? 2 : RT);
  int64_t c = 0;
  for (; c + NV * kLanes <= R; c += NV * kLanes) absorb_columns<RT, NV>(kv, R, dn, q, ldq, factor, c, kLanes, out, ldo);
  for (; c < R; c += kLanes) {
    absorb_columns<RT, 1>(kv, R, dn, q, ldq, factor, c, static_cast<int>(std::min<int64_t>(kLanes, R - c)), out, ldo);
  }
}

// out [RT] of each of kSums / RT rows of V: dot products with m [RT, padded R].
template <int RT, class W>
void project_rows(const W* const* weights, int64_t R, const float* m, int64_t ldm, float* out) {
  constexpr int VT = kSums / RT;
  vf sums[kSums] = {};
  for_lanes(R, [&](int64_t i, int lanes) {
    vf row[VT];
#pragma GCC unroll 16
    for (int v = 0; v < VT; ++v) row[v] = load_lanes(weights[v] + i, lanes);
#pragma GCC unroll 4
    for (int n = 0; n < RT; ++n) {
      const vf x = load_lanes(m + n * ldm + i, lanes);
#pragma GCC unroll 16
      for (int v = 0; v < VT; ++v) sums[n * VT + v] = fma(x, row[v], sums[n * VT + v]);
    }
  });
  sum_each(sums, out);
}

template <int RT, class W, class T>
void project_tile(const MlaSizes& sizes, const W* values, const float* m, int64_t ldm, T* out, int64_t ldo) {
  constexpr int VT = kSums / RT;
  for (int64_t v = 0; v < sizes.dv; v += VT) {
    const W* rows[VT];
    for (int i = 0; i < VT; ++i) rows[i] = values + std::min(v + i, sizes.dv - 1) * sizes.R;
    float tile[kSums];
    project_rows<RT>(rows, sizes.R, m, ldm, tile);
    for (int n = 0; n < RT; ++n) {
      const int64_t count = std::min<int64_t>(VT, sizes.dv - v);
      for (int64_t i = 0; i < count; ++i) out[n * ldo + v + i] = from_float<T>(tile[n * VT + i]);
    }
  }
}

}  // namespace

void mla_absorb(const MlaSizes& s, int64_t h, int64_t rows, DType q_dtype, const void* q, int64_t q_stride,
                DType kv_dtype,
                const void* kv_b, float scale, float* out, int64_t out_stride) {
  const Scratch<float> wide(static_cast<size_t>(rows * s.dn));
  dispatch(q_dtype, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(q);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t d = 0; d < s.dn; ++d) wide[n * s.dn + d] = to_float(from[n * q_stride + d]);
      for (int64_t d = 0; d < s.dr; ++d) {
        out[n * out_stride + s.R + d] = to_float(from[n * q_stride + s.dn + d]) * scale;
      }
    }
  });
  dispatch(kv_dtype, [&](auto zero) {
    const auto* keys = static_cast<const decltype(zero)*>(kv_b) + h * (s.dn + s.dv) * s.R;
    int64_t n = 0;
    for (; n + kRows <= rows; n += kRows) {
      absorb_rows<kRows>(keys, s.R, s.dn, wide + n * s.dn, s.dn, scale, out + n * out_stride, out_stride);
    }
    for (; n < rows; ++n) {
      absorb_rows<1>(keys, s.R, s.dn, wide + n * s.dn, s.dn, scale, out + n * out_stride, out_stride);
    }
  });
}

void mla_project(const MlaSizes& s, int64_t h, int64_t rows, const float* mixed, int64_t mixed_stride, DType kv_dtype,
                 const void* kv_b, DType out_dtype, void* out, int64_t out_stride) {
  dispatch(kv_dtype, [&](auto w) {
    dispatch(out_dtype, [&](auto t) {
      using T = decltype(t);
      const auto* values = static_cast<const decltype(w)*>(kv_b) + (h * (s.dn + s.dv) + s.dn) * s.R;
      T* to = static_cast<T*>(out);
      int64_t n = 0;
      for (; n + kRows <= rows; n += kRows) {
        project_tile<kRows>(s, values, mixed + n * mixed_stride, mixed_stride, to + n * out_stride, out_stride);
      }
      for (; n < rows; ++n) {
        project_tile<1>(s, values, mixed + n * mixed_stride, mixed_stride, to + n * out_stride, out_stride);
      }
    });
  });
}

namespace {

// The cache of a batch: strides in elements from one sequence (or, in pages, from one page) to the next and from one
// token to the next.
struct Strides {
  int64_t outer, token;
};

Rows rows_of(const void* data, int64_t itemsize, int64_t n, bool paged, int64_t offset, int64_t width,
             Strides strides) {
  const int64_t start = offset + (paged ? 0 : n * strides.outer);
  return Rows{static_cast<const char*>(data) + start * itemsize, width, strides.token, strides.outer};
}

// One (sequence, key head) after another: its context and where its pieces begin among those of its group.
struct Context {
  int64_t first, length, pieces_before;
};

// Run every piece of every context, and then combine_head(context, heads of it, partials) for each head, in groups of
// contexts whose partial results fit the budget.
template <class Piece, class Combine>
void run_contexts(Context* contexts, int64_t count, int64_t heads, int64_t value_width, const Piece& piece,
                  const Combine& combine_head) {
  const int64_t floats = partial_floats(heads, value_width);
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    int64_t pieces = 0;
    for (end = begin; end < count; ++end) {
      const int64_t more = num_pieces(contexts[end].length);
      if (end > begin && (pieces + more) * floats > kPartialBudget) break;
      contexts[end].pieces_before = pieces;
      pieces += more;
    }
    const Scratch<float> partials(static_cast<size_t>(pieces * floats));
    const Scratch<int64_t> owner(static_cast<size_t>(pieces));
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t i = 0; i < num_pieces(contexts[c].length); ++i) owner[contexts[c].pieces_before + i] = c;
    }
    parallel_for(pieces, [&](int64_t i) {
      const Context& context = contexts[owner[i]];
      piece(owner[i], context, i - context.pieces_before, partials + i * floats);
    });
    parallel_ranges((end - begin) * heads, 8, [&](int64_t from, int64_t to) {
      for (int64_t item = from; item < to; ++item) {
        const int64_t c = begin + item / heads;
        combine_head(c, item % heads, contexts[c], partials + contexts[c].pieces_before * floats);
      }
    });
  }
}

}  // namespace
}  // namespace kl::attention

// o [N, Hq, V] = attention of q [N, Hq, K] over the last `window` (0: all) of the first lengths[n] rows of
// k [N, S, Hkv, K] and v; heads next to each other. With a block table [N, max_pages], k and v are pools of pages,
// [P, page_size, Hkv, ..].
KL_EXPORT int64_t kl_attention_decode(const void* q, const void* k, const void* v, const int64_t* lengths,
                                      const int32_t* block_table, void* o, int64_t N, int64_t Hq, int64_t Hkv,
                                      int64_t K, int64_t V, int64_t k_outer, int64_t k_token, int64_t v_outer,
                                      int64_t v_token, int64_t max_pages, int64_t page_size, int64_t q_dtype,
                                      int64_t cache_dtype, int64_t window, double scale) {
  using namespace kl::attention;
  const int64_t heads = Hq / Hkv, itemsize = cache_dtype == kl::kFloat32 ? 4 : 2;
  const bool paged = block_table != nullptr;
  const kl::Scratch<float> queries(static_cast<size_t>(N * Hq * K));
  const kl::Scratch<Context> contexts(static_cast<size_t>(N * Hkv));
  kl::dispatch(q_dtype, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(q);
    for (int64_t i = 0; i < N * Hq * K; ++i) queries[i] = kl::to_float(from[i]) * static_cast<float>(scale);
  });
  for (int64_t c = 0; c < N * Hkv; ++c) {
    const int64_t length = lengths[c / Hkv], seen = window > 0 ? std::min(window, length) : length;
    contexts[c] = Context{length - seen, seen, 0};
  }
  run_contexts(
      contexts, N * Hkv, heads, V,
      [&](int64_t c, const Context& context, int64_t piece, float* partial) {
        const int64_t n = c / Hkv, h = c % Hkv;
        Cache cache{static_cast<kl::DType>(cache_dtype), rows_of(k, itemsize, n, paged, h * K, K, {k_outer, k_token}),
                    Rows{},
                    rows_of(v, itemsize, n, paged, h * V, V, {v_outer, v_token})};
        cache.pages = paged ? block_table + n * max_pages : nullptr;
        cache.page_size = page_size;
        const Queries group{queries + (n * Hkv + h) * heads * K, heads, q_dtype == kl::kBFloat16};
        decode_piece(group, cache, context.first, context.length, piece, partial);
      },
      [&](int64_t c, int64_t h, const Context& context, const float* partials) {
        const kl::Scratch<float> mixed(static_cast<size_t>(V));
        combine(partials, num_pieces(context.length), heads, h, V, mixed);
        kl::dispatch(q_dtype, [&](auto zero) {
          auto* to = static_cast<decltype(zero)*>(o) + (c * heads + h) * V;
          kl::for_lanes(V, [&](int64_t i, int lanes) {
            kl::store_lanes(to + i, kl::load_lanes(mixed + i, lanes), lanes);
          });
        });
      });
  return 0;
}

// o [N, H, dv] = absorbed latent attention of q [N, H, dn + dr] over the first lengths[n] rows of latent [N, S, R] and
// key_rope [N, S, dr], both of cache_dtype; kv_b [H (dn + dv), R] of q_dtype. With a block table, pools of pages.
KL_EXPORT int64_t kl_mla_decode(const void* q, const void* latent, const void* key_rope, const int64_t* lengths,
                                const void* kv_b, const int32_t* block_table, void* o, int64_t N, int64_t H, int64_t R,
                                int64_t dn, int64_t dr, int64_t dv, int64_t latent_outer, int64_t latent_token,
                                int64_t rope_outer, int64_t rope_token, int64_t max_pages, int64_t page_size,
                                int64_t q_dtype, int64_t cache_dtype, double scale) {
  using namespace kl::attention;
  const MlaSizes sizes{H, R, dn, dr, dv};
  const auto dtype = static_cast<kl::DType>(q_dtype);
  const int64_t itemsize = cache_dtype == kl::kFloat32 ? 4 : 2, q_itemsize = q_dtype == kl::kFloat32 ? 4 : 2;
  const int64_t row_items = kl::ceil_div(N, kItemRows), width = R + dr;
  const bool paged = block_table != nullptr;
  const kl::Scratch<float> queries(static_cast<size_t>(N * H * width));
  const kl::Scratch<float> mixed(static_cast<size_t>(N * H * R));
  const kl::Scratch<Context> contexts(static_cast<size_t>(N));
  for (int64_t n = 0; n < N; ++n) contexts[n] = Context{0, lengths[n], 0};
  // Items of a head by a block of sequences: f(head, first sequence, how many).
  const auto each_head = [&](const auto& f) {
    kl::parallel_for(row_items * H, [&](int64_t item) {
      const int64_t n = item / H * kItemRows;
      f(item % H, n, std::min(kItemRows, N - n));
    });
  };
  each_head([&](int64_t h, int64_t n, int64_t rows) {
    const char* from = static_cast<const char*>(q) + (n * H + h) * (dn + dr) * q_itemsize;
    mla_absorb(sizes, h, rows, dtype, from, H * (dn + dr), dtype, kv_b, static_cast<float>(scale),
               queries + (n * H + h) * width, H * width);
  });
  run_contexts(
      contexts, N, H, R,
      [&](int64_t n, const Context& context, int64_t piece, float* partial) {
        Cache cache{static_cast<kl::DType>(cache_dtype),
                    rows_of(latent, itemsize, n, paged, 0, R, {latent_outer, latent_token}),
                    rows_of(key_rope, itemsize, n, paged, 0, dr, {rope_outer, rope_token}), Rows{}};
        cache.values = cache.keys;
        cache.pages = paged ? block_table + n * max_pages : nullptr;
        cache.page_size = page_size;
        const Queries group{queries + n * H * width, H, dtype == kl::kBFloat16};
        decode_piece(group, cache, 0, context.length, piece, partial);
      },
      [&](int64_t n, int64_t h, const Context& context, const float* partials) {
        combine(partials, num_pieces(context.length), H, h, R, mixed + (n * H + h) * R);
      });
  each_head([&](int64_t h, int64_t n, int64_t rows) {
    char* to = static_cast<char*>(o) + (n * H + h) * dv * q_itemsize;
    mla_project(sizes, h, rows, mixed + (n * H + h) * R, H * R, dtype, kv_b, dtype, to, H * dv);
  });
  return 0;
}
