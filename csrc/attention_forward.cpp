// Causal attention of many queries, forward.
//
//    p_ts = 2^(s_ts - m_t),   s_ts = scale log2(e) q_t . k_s,   o_t = sum_s p_ts v_s / sum_s p_ts              (1), (2)
//
// Keys and values of a stream are packed once. A block of queries walks over tiles of its keys: S^T = K Q^T, the powers
// under a running maximum m_t, O^T = O^T 2^(old m - new m) + V^T P^T. Tiles begin at fixed keys of the sequence and
// every sum is one chain, so a query's bits depend neither on the block it is in nor on how a prompt was cut.

#include "attention_prefill.h"

namespace kl::attention {
namespace {

// Keys of a tile: its K, V and scores stay in the second-level cache. Queries of an item.
constexpr int64_t kKeys = 192;
constexpr int64_t kQueries = 2 * kPanel < 64 ? 64 : 2 * kPanel;
// Words of packed keys and values that are held at a time, if one stream is not larger.
constexpr int64_t kPackedBudget = int64_t{1} << 24;
static_assert(kKeys % kTileRows == 0 && kTileRows % 2 == 0);

// Sizes in words of the packed keys and values of a stream with S keys.
template <class M>
struct Packing {
  int64_t S, K, V;
  int64_t tile_keys() const { return std::min(kKeys, round_up(S, kTileRows)); }
  int64_t tiles() const { return S == 0 ? 0 : ceil_div(S, tile_keys()); }
  int64_t k_words() const { return words_of<M>(K); }
  int64_t tile_words() const { return tile_keys() / M::kElements; }
  int64_t v_rows() const { return round_up(V, kTileRows); }
  int64_t k_tile() const { return tile_keys() * k_words(); }
  int64_t v_tile() const { return v_rows() * tile_words(); }
  int64_t total() const { return tiles() * (k_tile() + v_tile()); }
  int64_t v_at(int64_t tile) const { return tiles() * k_tile() + tile * v_tile(); }
};

template <class M, class T>
void pack_tile(const Call& call, const Sequence& s, int64_t h, int64_t tile, Word* packed) {
  const Packing<M> sizes{s.S, call.K, call.V};
  const int64_t first = tile * sizes.tile_keys(), rows = std::min(sizes.tile_keys(), s.S - first);
  const T* k = call.k.at<const T>(s.b, s.k_first + first, h);
  const T* v = call.v.at<const T>(s.b, s.k_first + first, h);
  pack_rows<M>(k, call.k.token, rows, sizes.tile_keys(), call.K, packed + tile * sizes.k_tile());
  pack_transposed<M>(v, call.v.token, rows, sizes.tile_words(), call.V, sizes.v_rows(), packed + sizes.v_at(tile));
}

// Scores of rows [begin, end) under the new maximum -> words of powers; the queries' maximum, total and the factor by
// which what was summed before shrinks.
template <class M>
KL_INLINE void take_powers(const float* scores, Word* powers, int64_t width, int64_t begin, int64_t end, float* maximum,
                           float* total, float* decay) {
  const vf before = load(maximum);
  vf largest = before;
  for (int64_t r = begin; r < end; ++r) largest = max(load(scores + r * width), largest);
  const vf shrink = exp2(before - largest);
  vf sum{};
  for (int64_t r = begin; r < end; r += M::kElements) {
    vf p[M::kElements];
    for (int i = 0; i < M::kElements; ++i) {
      p[i] = exp2(load(scores + (r + i) * width) - largest);
      sum += p[i];
    }
    store_words(powers + r / M::kElements * width, M::join(p));
  }
  store(maximum, largest);
  store(total, fma(load(total), shrink, sum));
  store(decay, shrink);
}

// A block of queries: position of the first, and what is kept of each from tile to tile.
struct Block {
  int64_t position, count;
  const Word* queries;  // [words of K, columns] in panels
  float *sums;          // [V padded, columns] in panels
  float *maximum, *total;
};

// One tile of keys, from `first_key` on, for the queries of one panel.
template <class M, int NV>
void tile_by_panel(const Call& call, const Packing<M>& sizes, const Block& block, int64_t column, int64_t first_key,
                   const Word* keys, const Word* values, float* scores, Word* powers) {
  constexpr int64_t width = NV * kLanes;
  const int64_t most = block.position + block.count - 1, position = block.position + column;
  const int64_t from = std::max(first_key, seen_by(call, std::min(position, most)).begin);
  const int64_t to = std::min(first_key + sizes.tile_keys(), seen_by(call, std::min(position + width - 1, most)).end);
  if (from >= to) return;
  const int64_t first_word = (from - first_key) / M::kElements, end_word = ceil_div(to - first_key, M::kElements);
  const int64_t begin = first_word * M::kElements, end = end_word * M::kElements;
  const int64_t k_words = sizes.k_words();
  const Word* queries = block.queries + column * k_words;
  const vf factor = splat(call.scale * kLog2E);
  for (int64_t r = begin / kTileRows * kTileRows; r < end; r += kTileRows) {
    vf sums[kTileRows][NV] = {};
    multiply<M, NV>(sums, keys + r * k_words, k_words, queries, k_words);
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(scores + (r + i) * width + v * kLanes, sums[i][v] * factor);
    }
  }
  alignas(64) float decay[width];
  for (int v = 0; v < NV; ++v) {
    const Lanes lanes(call, position + v * kLanes, most);
    float* vector = scores + v * kLanes;
    for (int64_t r = begin; r < end; ++r) {
      if (!lanes.all_see(first_key + r)) store(vector + r * width, lanes.mask(load(vector + r * width), first_key + r));
    }
    const int64_t at = column + v * kLanes;
    take_powers<M>(vector, powers + v * kLanes, width, begin, end, block.maximum + at, block.total + at,
                   decay + v * kLanes);
  }
  vf shrink[NV];
  for (int v = 0; v < NV; ++v) shrink[v] = load(decay + v * kLanes);
  add_panel<M, NV>(values + first_word, sizes.tile_words(), sizes.v_rows(), powers + first_word * width,
                   end_word - first_word, block.sums + column * sizes.v_rows(),
                   [&](int v, vf sum) { return sum * shrink[v]; });
}

template <class M, class T>
void run_block(const Call& call, const Sequence& s, int64_t h, int64_t first, const Word* packed, const Tensor& o) {
  const Packing<M> sizes{s.S, call.K, call.V};
  const int64_t count = std::min(kQueries, s.T - first), columns = round_up(count, kLanes);
  const Scratch<Word> queries(static_cast<size_t>(sizes.k_words() * columns));
  const Scratch<float> sums(static_cast<size_t>(sizes.v_rows() * columns));
  const Scratch<float> maximum(static_cast<size_t>(columns)), total(static_cast<size_t>(columns));
  const Scratch<float> scores(static_cast<size_t>(kKeys * kPanel));
  const Scratch<Word> apart(static_cast<size_t>(M::kElements == 1 ? 0 : kKeys / M::kElements * kPanel));
  Word* powers = M::kElements == 1 ? reinterpret_cast<Word*>(scores.get()) : apart.get();
  pack_across<M>(call.q.at<const T>(s.b, s.q_first + first, h), call.q.token, count, columns, call.K, queries.get());
  std::fill(sums.get(), sums + sizes.v_rows() * columns, 0.0f);
  std::fill(maximum.get(), maximum + columns, kLowest);
  std::fill(total.get(), total + columns, 0.0f);
  const Block block{first + s.ahead(), count, queries, sums, maximum, total};
  const int64_t begin = seen_by(call, block.position).begin, end = seen_by(call, block.position + count - 1).end;
  for (int64_t tile = begin / sizes.tile_keys(); tile * sizes.tile_keys() < end; ++tile) {
    const Word *keys = packed + tile * sizes.k_tile(), *values = packed + sizes.v_at(tile);
    for_panels(columns, [&](int64_t column, auto vectors) {
      tile_by_panel<M, vectors()>(call, sizes, block, column, tile * sizes.tile_keys(), keys, values, scores, powers);
    });
  }
  for (int64_t i = 0; i < columns; i += kLanes) store(total + i, splat(1.0f) / load(total + i));
  write_transposed(sums, sizes.v_rows(), count, call.V, total, o.at<T>(s.b, s.q_first + first, h), o.token);
  const int64_t at = (s.b * call.Hq + h) * call.T + s.q_first + first;
  std::memcpy(call.maximum + at, maximum, static_cast<size_t>(count) * sizeof(float));
  std::memcpy(call.share + at, total, static_cast<size_t>(count) * sizeof(float));
}

// Items of work by stream: stream i has those from first[i] on.
struct Item {
  int64_t stream, part;
};

// Streams [begin, end): pack them all, then all their blocks of queries, those with the most keys first.
template <class M, class T>
void run_streams(const Call& call, int64_t begin, int64_t end, const Tensor& o) {
  const int64_t groups = call.Hq / call.Hkv;
  const Scratch<int64_t> offsets(static_cast<size_t>(end - begin));
  int64_t words = 0, tiles = 0, blocks = 0, most_blocks = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Sequence s = sequence_of(call, i / call.Hkv);
    offsets[i - begin] = words;
    words += Packing<M>{s.S, call.K, call.V}.total();
    tiles += Packing<M>{s.S, call.K, call.V}.tiles();
    blocks += ceil_div(s.T, kQueries) * groups;
    most_blocks = std::max(most_blocks, ceil_div(s.T, kQueries));
  }
  const Scratch<Word> packed(static_cast<size_t>(words));
  const Scratch<Item> items(static_cast<size_t>(std::max(tiles, blocks)));
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Sequence s = sequence_of(call, i / call.Hkv);
    // Keys that nobody asks about are not packed.
    const int64_t asked = s.T > 0 ? Packing<M>{s.S, call.K, call.V}.tiles() : 0;
    for (int64_t tile = 0; tile < asked; ++tile) items[count++] = Item{i, tile};
  }
  parallel_for(count, [&](int64_t item) {
    const auto [i, tile] = items[item];
    pack_tile<M, T>(call, sequence_of(call, i / call.Hkv), i % call.Hkv, tile, packed + offsets[i - begin]);
  });
  count = 0;
  for (int64_t block = most_blocks - 1; block >= 0; --block) {
    for (int64_t i = begin; i < end; ++i) {
      if (block * kQueries >= sequence_of(call, i / call.Hkv).T) continue;
      for (int64_t g = 0; g < groups; ++g) items[count++] = Item{i, block * groups + g};
    }
  }
  parallel_for(count, [&](int64_t item) {
    const auto [i, part] = items[item];
    const int64_t h = i % call.Hkv * groups + part % groups;
    run_block<M, T>(call, sequence_of(call, i / call.Hkv), h, part / groups * kQueries, packed + offsets[i - begin], o);
  });
}

template <class M, class T>
void forward(const Call& call, const Tensor& o) {
  const int64_t streams = call.N * call.Hkv;
  for (int64_t begin = 0, end = 0; begin < streams; begin = end) {
    int64_t words = 0;
    for (end = begin; end < streams; ++end) {
      words += Packing<M>{sequence_of(call, end / call.Hkv).S, call.K, call.V}.total();
      if (end > begin && words > kPackedBudget) break;
    }
    run_streams<M, T>(call, begin, end, o);
  }
}

}  // namespace
}  // namespace kl::attention

// o [B, T, Hq, V] = causal attention; sizes and strides as in attention_prefill.h. `strides`: batch, token and head of
// q, k, v and o. window 0: all keys.
KL_EXPORT int64_t kl_attention_forward(void* q, void* k, void* v, const int64_t* cu_q, const int64_t* cu_k, void* o,
                                       float* maximum, float* share, const int64_t* strides, int64_t N, int64_t T,
                                       int64_t S, int64_t Hq, int64_t Hkv, int64_t K, int64_t V, int64_t window,
                                       int64_t dtype, double scale) {
  using namespace kl::attention;
  const auto tensor =
      [&](void* data, int i) { return Tensor{data, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]}; };
  const Call call{tensor(q, 0), tensor(k, 1), tensor(v, 2), cu_q, cu_k, maximum, share, N, T, S, Hq, Hkv, K, V, window,
                  static_cast<float>(scale)};
  if (dtype == kl::kFloat32) {
    forward<Single, float>(call, tensor(o, 3));
    return 0;
  }
#if KL_HAS_DOT
  forward<Pairs, kl::bf16>(call, tensor(o, 3));
#else
  forward<Single, kl::bf16>(call, tensor(o, 3));
#endif
  return 0;
}
