// Causal attention of many queries, backward. With p_ts from the forward's maxima and sums, and D_t = do_t . o_t,
//
//    dv_s = sum_t p_ts do_t                                                                   (3)
//    da_ts = p_ts (do_t . v_s - D_t)                                                          (4)
//    dq_t = scale sum_s da_ts k_s,      dk_s = scale sum_t da_ts q_t                          (5)
//
// A thread takes a stream (one key head of one sequence) with all its query heads, so dk and dv are its own: blocks of
// queries in order, and for each the tiles of its keys in order. Nothing is shared, nothing depends on the threads.
// Scores are computed anew with the forward's chains, hence p is what the forward had, but for its rounding.

#include "attention_prefill.h"

namespace kl::attention {
namespace {

constexpr int64_t kKeys = 96;
constexpr int64_t kQueries = 2 * kPanel < 64 ? 64 : 2 * kPanel;
static_assert(kKeys % kTileRows == 0 && kTileRows % 2 == 0);

// Gradients beside the call; o and d_o as q.
struct Gradients {
  Tensor o, d_o, d_q, d_k, d_v;
};

template <class M>
using Element = std::conditional_t<M::kElements == 1, float, bf16>;

// A stream's keys and values packed, and the sums of their gradients.
template <class M>
struct Stream {
  int64_t S, K, V;
  int64_t tile_keys = std::min(kKeys, round_up(S, kTileRows));
  int64_t tiles = S == 0 ? 0 : ceil_div(S, tile_keys);
  int64_t rows = tiles * tile_keys;
  int64_t k_words = words_of<M>(K), v_words = words_of<M>(V), tile_words = tile_keys / M::kElements;
  int64_t k_rows = round_up(K, kTileRows), k_columns = round_up(K, kLanes), v_columns = round_up(V, kLanes);
  Scratch<Word> keys{static_cast<size_t>(rows * k_words)};
  Scratch<Word> values{static_cast<size_t>(rows * v_words)};
  // Tile after tile, [K padded, words of keys].
  Scratch<Word> keys_down{static_cast<size_t>(tiles * k_rows * tile_words)};
  Scratch<float> d_keys{static_cast<size_t>(rows * k_columns)};
  Scratch<float> d_values{static_cast<size_t>(rows * v_columns)};

  template <class T>
  void take(const T* k, int64_t k_stride, const T* v, int64_t v_stride) {
    pack_rows<M>(k, k_stride, S, rows, K, keys.get());
    pack_rows<M>(v, v_stride, S, rows, V, values.get());
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * tile_keys;
      pack_transposed<M>(k + first * k_stride, k_stride, std::min(tile_keys, S - first), tile_words, K, k_rows,
                         keys_down + tile * k_rows * tile_words);
    }
    std::fill(d_keys.get(), d_keys + rows * k_columns, 0.0f);
    std::fill(d_values.get(), d_values + rows * v_columns, 0.0f);
  }
};

// A block of queries: operands both ways round, and what a tile makes of them.
template <class M>
struct Block {
  int64_t position, count, K, V;
  int64_t columns = round_up(count, kLanes);
  int64_t k_words = words_of<M>(K), v_words = words_of<M>(V), words = columns / M::kElements;
  Scratch<Word> queries{static_cast<size_t>(k_words * columns)};
  Scratch<Word> d_outs{static_cast<size_t>(v_words * columns)};
  Scratch<Word> queries_down{static_cast<size_t>(words * round_up(K, kLanes))};
  Scratch<Word> d_outs_down{static_cast<size_t>(words * round_up(V, kLanes))};
  Scratch<float> maximum{static_cast<size_t>(columns)};
  Scratch<float> share{static_cast<size_t>(columns)};
  Scratch<float> expected{static_cast<size_t>(columns)};  // D of Eq. 4
  Scratch<float> d_queries{static_cast<size_t>(round_up(K, kTileRows) * columns)};
  // p and da of a tile: keys down and words of queries; and da with words of keys, in panels.
  Scratch<Word> powers{static_cast<size_t>(kKeys * words)};
  Scratch<Word> d_scores{static_cast<size_t>(kKeys * words)};
  Scratch<Word> d_scores_down{static_cast<size_t>(kKeys / M::kElements * columns)};

  int64_t most() const { return position + count - 1; }
};

// D of Eq. 4, [columns], from o and d_o with words of V down. The chain is that of do_t . v_s, so that a query with a
// single key, whose o is v, gets a slope of exactly zero.
template <class M>
void take_expected(const Word* o, const Word* d_o, int64_t words, int64_t columns, float* expected) {
  for_panels(columns, [&](int64_t column, auto vectors) {
    constexpr int64_t width = vectors() * kLanes;
    for (int64_t v = 0; v < width; v += kLanes) {
      vf sums{};
      for (int64_t w = 0; w < words; ++w) {
        const int64_t at = column * words + w * width + v;
        sums = M::multiply_add(load_words(o + at), load_words(d_o + at), sums);
      }
      store(expected + column + v, sums);
    }
  });
}

template <class M, class T>
void take_block(const Call& call, const Gradients& g, const Sequence& s, int64_t h, int64_t first, Block<M>& b) {
  const T* q = call.q.at<const T>(s.b, s.q_first + first, h);
  const T* o = g.o.at<const T>(s.b, s.q_first + first, h);
  const T* d_o = g.d_o.at<const T>(s.b, s.q_first + first, h);
  pack_across<M>(q, call.q.token, b.count, b.columns, call.K, b.queries.get());
  pack_across<M>(d_o, g.d_o.token, b.count, b.columns, call.V, b.d_outs.get());
  pack_down<M>(q, call.q.token, b.count, b.words, call.K, b.queries_down.get());
  pack_down<M>(d_o, g.d_o.token, b.count, b.words, call.V, b.d_outs_down.get());
  const int64_t at = (s.b * call.Hq + h) * call.T + s.q_first + first;
  for (int64_t t = 0; t < b.columns; ++t) {
    // Queries that do not exist get no weight.
    b.maximum[t] = t < b.count ? call.maximum[at + t] : 0.0f;
    b.share[t] = t < b.count ? call.share[at + t] : 0.0f;
  }
  const Scratch<Word> outs(static_cast<size_t>(b.v_words * b.columns));
  pack_across<M>(o, g.o.token, b.count, b.columns, call.V, outs.get());
  take_expected<M>(outs, b.d_outs, b.v_words, b.columns, b.expected);
  std::fill(b.d_queries.get(), b.d_queries + round_up(call.K, kTileRows) * b.columns, 0.0f);
}

// Eq. 4 for kTileRows keys and a panel of queries.
template <class M, int NV>
KL_INLINE void score_tile(const Call& call, const Block<M>& b, int64_t column, const Lanes* lanes, int64_t key,
                          int64_t row, const Word* keys, const Word* values) {
  constexpr int64_t width = NV * kLanes;
  using E = Element<M>;
  E* powers = reinterpret_cast<E*>(b.powers + row * b.words) + column;
  E* d_scores = reinterpret_cast<E*>(b.d_scores + row * b.words) + column;
  const int64_t stride = b.columns;
  const vf factor = splat(call.scale * kLog2E);
  alignas(64) float p[kTileRows][width];
  vf sums[kTileRows][NV] = {};
  multiply<M, NV>(sums, keys, b.k_words, b.queries + column * b.k_words, b.k_words);
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(p[i] + v * kLanes, sums[i][v] * factor);
  }
  for (int v = 0; v < NV; ++v) {
    const vf maximum = load(b.maximum + column + v * kLanes), share = load(b.share + column + v * kLanes);
    const bool whole = lanes[v].all_see(key) && lanes[v].all_see(key + kTileRows - 1);
    for (int i = 0; i < kTileRows; ++i) {
      vf score = load(p[i] + v * kLanes);
      if (!whole) score = lanes[v].mask(score, key + i);
      score = exp2(score - maximum) * share;
      store(p[i] + v * kLanes, score);
      store(powers + i * stride + v * kLanes, score);
    }
  }
  vf slopes[kTileRows][NV] = {};
  multiply<M, NV>(slopes, values, b.v_words, b.d_outs + column * b.v_words, b.v_words);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const vf expected = load(b.expected + column + v * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      slopes[i][v] = load(p[i] + v * kLanes) * (slopes[i][v] - expected);
      store(d_scores + i * stride + v * kLanes, slopes[i][v]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; i += M::kElements) {
      vf pair[M::kElements];
      for (int e = 0; e < M::kElements; ++e) pair[e] = slopes[i + e][v];
      const int64_t word = (row + i) / M::kElements;
      store_words(b.d_scores_down + column * (kKeys / M::kElements) + word * width + v * kLanes, M::join(pair));
    }
  }
}

// Eq. 4 and the queries' part of Eq. 5 for one panel of queries and the tile of keys from `first_key` on.
template <class M, int NV>
void panel_by_tile(const Call& call, const Stream<M>& stream, const Block<M>& b, int64_t column, int64_t tile) {
  constexpr int64_t width = NV * kLanes;
  const int64_t first_key = tile * stream.tile_keys, position = b.position + column;
  const int64_t from = std::max(first_key, seen_by(call, std::min(position, b.most())).begin);
  const int64_t to =
      std::min(first_key + stream.tile_keys, seen_by(call, std::min(position + width - 1, b.most())).end);
  if (from >= to) return;
  const int64_t begin = (from - first_key) / kTileRows * kTileRows, end = round_up(to - first_key, kTileRows);
  alignas(64) std::byte memory[sizeof(Lanes) * NV];
  Lanes* lanes = reinterpret_cast<Lanes*>(memory);
  for (int v = 0; v < NV; ++v) new (lanes + v) Lanes(call, position + v * kLanes, b.most());
  for (int64_t r = begin; r < end; r += kTileRows) {
    const int64_t key = first_key + r;
    score_tile<M, NV>(call, b, column, lanes, key, r, stream.keys + key * b.k_words, stream.values + key * b.v_words);
  }
  const int64_t first_word = begin / M::kElements, end_word = end / M::kElements;
  add_panel<M, NV>(stream.keys_down + tile * stream.k_rows * stream.tile_words + first_word, stream.tile_words,
                   stream.k_rows,
                   b.d_scores_down + column * (kKeys / M::kElements) + first_word * width, end_word - first_word,
                   b.d_queries + column * stream.k_rows, [](int, vf sum) { return sum; });
}

// Eq. 3 and the keys' part of Eq. 5: sums [rows, columns] += A B over the queries that see the keys of each tile of
// rows.
template <class M>
void add_keys(const Call& call, const Stream<M>& stream, const Block<M>& b, int64_t tile, const Word* a,
              const Word* down,
              int64_t columns, float* sums) {
  const int64_t first_key = tile * stream.tile_keys;
  for_panels(columns, [&](int64_t column, auto vectors) {
    constexpr int64_t width = vectors() * kLanes;
    for (int64_t r = 0; r < stream.tile_keys; r += kTileRows) {
      const int64_t key = first_key + r;
      const int64_t from = std::max<int64_t>(0, key - b.position);
      const int64_t last = call.window > 0 ? key + kTileRows - 1 + call.window - 1 - b.position : b.count - 1;
      const int64_t to = std::min(b.count, last + 1);
      if (key >= stream.S || from >= to) continue;
      const int64_t word = from / M::kElements;
      add_panel<M, vectors()>(a + r * b.words + word, b.words, kTileRows, down + column * b.words + word * width,
                              words_of<M>(to) - word, sums + column * stream.rows + key * width,
                              [](int, vf sum) { return sum; });
    }
  });
}

template <class M, class T>
void run_block(const Call& call, const Gradients& g, const Sequence& s, int64_t h, int64_t first,
               const Stream<M>& stream) {
  Block<M> b{first + s.ahead(), std::min(kQueries, s.T - first), call.K, call.V};
  take_block<M, T>(call, g, s, h, first, b);
  const int64_t begin = seen_by(call, b.position).begin, end = seen_by(call, b.most()).end;
  for (int64_t tile = begin / stream.tile_keys; tile * stream.tile_keys < end; ++tile) {
    for_panels(b.columns,
               [&](int64_t column, auto vectors) { panel_by_tile<M, vectors()>(call, stream, b, column, tile); });
    add_keys(call, stream, b, tile, b.powers.get(), b.d_outs_down.get(), stream.v_columns, stream.d_values.get());
    add_keys(call, stream, b, tile, b.d_scores.get(), b.queries_down.get(), stream.k_columns, stream.d_keys.get());
  }
  for (int64_t t = 0; t < b.columns; ++t) b.share[t] = call.scale;
  write_transposed(b.d_queries.get(), stream.k_rows, b.count, call.K, b.share.get(),
                   g.d_q.at<T>(s.b, s.q_first + first, h),
                   g.d_q.token);
}

// out [rows, width] <- factor sums, sums in panels of `padded_rows`.
template <class T>
void write_rows(const float* sums, int64_t padded_rows, int64_t rows, int64_t width, float factor, T* out,
                int64_t stride) {
  for_panels(round_up(width, kLanes), [&](int64_t column, auto vectors) {
    constexpr int64_t across = vectors() * kLanes;
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = sums + column * padded_rows + r * across;
      for_lanes(std::min(across, width - column), [&](int64_t i, int lanes) {
        store_lanes(out + r * stride + column + i, load(row + i) * splat(factor), lanes);
      });
    }
  });
}

template <class M, class T>
void run_stream(const Call& call, const Gradients& g, int64_t n, int64_t h) {
  const Sequence s = sequence_of(call, n);
  const int64_t groups = call.Hq / call.Hkv;
  Stream<M> stream{s.S, call.K, call.V};
  stream.take(call.k.at<const T>(s.b, s.k_first, h), call.k.token, call.v.at<const T>(s.b, s.k_first, h), call.v.token);
  for (int64_t q_head = h * groups; q_head < (h + 1) * groups; ++q_head) {
    for (int64_t first = 0; first < s.T; first += kQueries) run_block<M, T>(call, g, s, q_head, first, stream);
  }
  write_rows(stream.d_keys.get(), stream.rows, s.S, call.K, call.scale, g.d_k.at<T>(s.b, s.k_first, h), g.d_k.token);
  write_rows(stream.d_values.get(), stream.rows, s.S, call.V, 1.0f, g.d_v.at<T>(s.b, s.k_first, h), g.d_v.token);
}

}  // namespace
}  // namespace kl::attention

// d_q, d_k, d_v, in the dtype of the inputs, from d_o, o and the forward's maxima and shares. `strides`: batch, token
// and head of q, k, v, o, d_o, d_q, d_k, d_v.
KL_EXPORT int64_t kl_attention_backward(void* q, void* k, void* v, void* o, void* d_o, void* d_q, void* d_k, void* d_v,
                                        const int64_t* cu_q, const int64_t* cu_k, float* maximum, float* share,
                                        const int64_t* strides, int64_t N, int64_t T, int64_t S, int64_t Hq,
                                        int64_t Hkv, int64_t K, int64_t V, int64_t window, int64_t dtype,
                                        double scale) {
  using namespace kl::attention;
  const auto tensor =
      [&](void* data, int i) { return Tensor{data, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]}; };
  const Call call{tensor(q, 0), tensor(k, 1), tensor(v, 2), cu_q, cu_k, maximum, share, N, T, S, Hq, Hkv, K, V, window,
                  static_cast<float>(scale)};
  const Gradients gradients{tensor(o, 3), tensor(d_o, 4), tensor(d_q, 5), tensor(d_k, 6), tensor(d_v, 7)};
  kl::parallel_for(N * Hkv, [&](int64_t stream) {
    const int64_t n = stream / Hkv, h = stream % Hkv;
    if (dtype == kl::kFloat32) return run_stream<Single, float>(call, gradients, n, h);
#if KL_HAS_DOT
    return run_stream<Pairs, kl::bf16>(call, gradients, n, h);
#else
    return run_stream<Single, kl::bf16>(call, gradients, n, h);
#endif
  });
  return 0;
}
