// One query a sequence over its cache: attention.h's Eq. 1, a piece of the context at a time.
//
// A piece is walked in blocks of tokens that stay in the caches between its two products: the scores of all heads, then
// the weighted sum of the values of all heads, under a running maximum (online softmax). So the cache is read from
// memory once, whatever the number of heads. Tokens are reached through pointers, hence pages cost nothing.
//
// Every score is one chain over the channels and one tree over the lanes, every mixed channel one chain over the
// tokens, however the heads and tokens are tiled.

#include "attention.h"

#include "attention_simd.h"

namespace kl::attention {
namespace {

// Tokens whose keys and values stay in the second-level cache between the two products.
constexpr int64_t kBlock = 64;
// Channels of a step of a dot product; queries are padded with zeros to whole steps.
constexpr int64_t kStep = 32;
// Row pointers behind the last token repeat it, so that a tile is always whole.
constexpr int64_t kPointers = kBlock + kSums;

struct Widths {
  int64_t keys, shared;
  int64_t shared_at() const { return round_up(keys, kStep); }
  int64_t padded() const { return shared_at() + round_up(shared, kStep); }
};

template <class T>
struct RowPointers {
  const T* keys[kPointers];
  const T* shared[kPointers];
  const T* values[kPointers];
};

// The cache lines of the next block, which the products of this one fetch into the second-level cache, a few at each
// step: the products take longer than the lines' way from memory, but nobody else would ask for them in time. Only for
// dot products; float32 ones are so slow that the processor's own fetching does better.
class Ahead {
 public:
  explicit Ahead(int64_t most_lines) : lines_(static_cast<size_t>(most_lines)) {}

  // Nothing to fetch.
  void clear() { at_ = end_ = lines_; }
  void add(const void* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLine) *end_++ = static_cast<const char*>(row) + i;
  }
  // So many lines a step that they are done in `steps`.
  void spread(int64_t steps) { burst_ = ceil_div(end_ - at_, steps); }
  KL_INLINE void fetch() {
    for (int64_t i = 0; i < burst_ && at_ < end_; ++i) __builtin_prefetch(*at_++, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  Scratch<const char*> lines_;
  const char **at_ = nullptr, **end_ = nullptr;
  int64_t burst_ = 1;
};

// --- scores: kSums dot products at a time, HT heads by kSums / HT tokens.

template <int HT, class T>
KL_INLINE void add_products(vf (&sums)[kSums], const float* q, int64_t ldq, const T* const* rows, int64_t width,
                           Ahead&) {
  constexpr int TT = kSums / HT;
  for_lanes(width, [&](int64_t i, int lanes) {
    vf row[TT];
#pragma GCC unroll 16
    for (int t = 0; t < TT; ++t) row[t] = load_lanes(rows[t] + i, lanes);
#pragma GCC unroll 4
    for (int h = 0; h < HT; ++h) {
      const vf query = load(q + h * ldq + i);
#pragma GCC unroll 16
      for (int t = 0; t < TT; ++t) sums[h * TT + t] = fma(query, row[t], sums[h * TT + t]);
    }
  });
}

#if KL_HAS_DOT
KL_INLINE __m512i load_step(const bf16* p, int64_t count) {
  if (count >= kStep) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
}

template <int HT>
KL_INLINE void add_products(vf (&sums)[kSums], const bf16* q, int64_t ldq, const bf16* const* rows, int64_t width,
                           Ahead& ahead) {
  constexpr int TT = kSums / HT;
  const auto step = [&](int64_t i, int64_t count) {
    ahead.fetch();
    __m512bh row[TT];
#pragma GCC unroll 16
    for (int t = 0; t < TT; ++t) row[t] = (__m512bh)load_step(rows[t] + i, count);
#pragma GCC unroll 4
    for (int h = 0; h < HT; ++h) {
      const __m512bh query = (__m512bh)_mm512_loadu_si512(q + h * ldq + i);
#pragma GCC unroll 16
      for (int t = 0; t < TT; ++t) {
        sums[h * TT + t] = (vf)_mm512_dpbf16_ps((__m512)sums[h * TT + t], query, row[t]);
      }
    }
  };
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) step(i, kStep);
  if (i < width) step(i, width - i);
}
#endif

template <int HT, class Q, class T>
void score_heads(const Q* q, const Widths& widths, const RowPointers<T>& rows, int64_t tokens, float* scores,
                 Ahead& ahead) {
  constexpr int TT = kSums / HT;
  for (int64_t t = 0; t < tokens; t += TT) {
    vf sums[kSums] = {};
    add_products<HT>(sums, q, widths.padded(), rows.keys + t, widths.keys, ahead);
    if (widths.shared > 0) {
      add_products<HT>(sums, q + widths.shared_at(), widths.padded(), rows.shared + t, widths.shared, ahead);
    }
    float tile[kSums];
    sum_each(sums, tile);
    for (int h = 0; h < HT; ++h) {
      std::memcpy(scores + h * kBlock + t, tile + h * TT,
                  static_cast<size_t>(std::min<int64_t>(TT, tokens - t)) * sizeof(float));
    }
  }
}

// scores [heads, kBlock] of the first `tokens` rows.
template <class Q, class T>
void score(const Q* q, const Widths& widths, int64_t heads, const RowPointers<T>& rows, int64_t tokens, float* scores,
           Ahead& ahead) {
  const auto tile = [&](auto run, int64_t h) {
    run(q + h * widths.padded(), widths, rows, tokens, scores + h * kBlock, ahead);
  };
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) tile(score_heads<4, Q, T>, h);
  for (; h + 2 <= heads; h += 2) tile(score_heads<2, Q, T>, h);
  for (; h < heads; ++h) tile(score_heads<1, Q, T>, h);
}

// --- mixing: mixed [heads, ldm] += weights [heads, kBlock] values, over `tokens` rows.

template <int HT, int NV, class T>
KL_INLINE void mix_columns(const float* weights, const T* const* values, int64_t tokens, int64_t column, int lanes,
                           float* mixed, int64_t ldm) {
  vf sums[HT][NV];
  for (int h = 0; h < HT; ++h) {
    for (int v = 0; v < NV; ++v) sums[h][v] = load(mixed + h * ldm + column + v * kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    vf value[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) value[v] = load_lanes(values[t] + column + v * kLanes, lanes);
#pragma GCC unroll 4
    for (int h = 0; h < HT; ++h) {
      const vf weight = splat(weights[h * kBlock + t]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[h][v] = fma(weight, value[v], sums[h][v]);
    }
  }
  for (int h = 0; h < HT; ++h) {
    for (int v = 0; v < NV; ++v) store(mixed + h * ldm + column + v * kLanes, sums[h][v]);
  }
}

template <int HT, int NV, class T>
void mix_heads(const float* weights, const T* const* values, int64_t tokens, int64_t width, float* mixed, int64_t ldm) {
  int64_t c = 0;
  for (; c + NV * kLanes <= width; c += NV * kLanes) {
    mix_columns<HT, NV>(weights, values, tokens, c, kLanes, mixed, ldm);
  }
  for (; c < width; c += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, width - c));
    mix_columns<HT, 1>(weights, values, tokens, c, lanes, mixed, ldm);
  }
}

template <class T>
void mix(const float* weights, int64_t heads, const T* const* values, Ahead&, int64_t tokens, int64_t width,
         float* mixed,
         int64_t ldm) {
  constexpr int kWide = KL_HAS_AVX512 ? 8 : 2;
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) {
    mix_heads<4, kWide / 2>(weights + h * kBlock, values, tokens, width, mixed + h * ldm, ldm);
  }
  for (; h < heads; ++h) mix_heads<1, kWide>(weights + h * kBlock, values, tokens, width, mixed + h * ldm, ldm);
}

#if KL_HAS_DOT
// Pairs of tokens meet pairs of weights. Interleaving two rows of 32 channels leaves them in the order of `Unshuffle`;
// the sums stay in that order until the piece is done.
template <int HT, int NC>
KL_INLINE void mix_columns(const bf16* weights, const bf16* const* values, Ahead& ahead, int64_t pairs,
                           int64_t column, int64_t count, float* mixed, int64_t ldm) {
  __m512 sums[HT][2 * NC];
  for (int h = 0; h < HT; ++h) {
    for (int v = 0; v < 2 * NC; ++v) sums[h][v] = _mm512_loadu_ps(mixed + h * ldm + column + v * kLanes);
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    ahead.fetch();
    __m512bh value[2 * NC];
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      const __m512i even = load_step(values[2 * pair] + column + c * kStep, count);
      const __m512i odd = load_step(values[2 * pair + 1] + column + c * kStep, count);
      value[2 * c] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
      value[2 * c + 1] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
    }
#pragma GCC unroll 8
    for (int h = 0; h < HT; ++h) {
      int32_t word;
      std::memcpy(&word, weights + h * kBlock + 2 * pair, sizeof word);
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(word);
#pragma GCC unroll 16
      for (int v = 0; v < 2 * NC; ++v) sums[h][v] = _mm512_dpbf16_ps(sums[h][v], value[v], weight);
    }
  }
  for (int h = 0; h < HT; ++h) {
    for (int v = 0; v < 2 * NC; ++v) _mm512_storeu_ps(mixed + h * ldm + column + v * kLanes, sums[h][v]);
  }
}

template <int HT, int NC>
void mix_heads(const bf16* weights, const bf16* const* values, Ahead& ahead, int64_t pairs, int64_t width,
               float* mixed, int64_t ldm) {
  int64_t c = 0;
  for (; c + NC * kStep <= width; c += NC * kStep) {
    mix_columns<HT, NC>(weights, values, ahead, pairs, c, kStep, mixed, ldm);
  }
  for (; c < width; c += kStep) {
    mix_columns<HT, 1>(weights, values, ahead, pairs, c, std::min(kStep, width - c), mixed, ldm);
  }
}

void mix(const bf16* weights, int64_t heads, const bf16* const* values, Ahead& ahead, int64_t tokens, int64_t width,
         float* mixed, int64_t ldm) {
  const int64_t pairs = ceil_div(tokens, 2);
  const auto tile = [&](auto run, int64_t h) {
    run(weights + h * kBlock, values, ahead, pairs, width, mixed + h * ldm, ldm);
  };
  int64_t h = 0;
  for (; h + 8 <= heads; h += 8) tile(mix_heads<8, 1>, h);
  for (; h + 4 <= heads; h += 4) tile(mix_heads<4, 2>, h);
  for (; h < heads; ++h) tile(mix_heads<1, 8>, h);
}

// Of every 32 sums, from the interleaved order back to that of the channels.
void unshuffle(float* sums, int64_t width) {
  for (int64_t c = 0; c < width; c += kStep) {
    const __m512 low = _mm512_loadu_ps(sums + c), high = _mm512_loadu_ps(sums + c + kLanes);
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    _mm512_storeu_ps(sums + c, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(sums + c + kLanes,
                     _mm512_permutex2var_ps(low, _mm512_add_epi32(first, _mm512_set1_epi32(8)), high));
  }
}
#endif

// --- the running softmax of one head over a block: scores -> weights under the new maximum.

template <class W>
KL_INLINE float rounded(W* weight, float p) {
  *weight = from_float<W>(p);
  return to_float(*weight);
}

struct Running {
  float maximum, total;
};

template <class W>
void weigh(float* scores, int64_t tokens, W* weights, Running& running, float* mixed, int64_t width) {
  for (int64_t t = tokens; t < kBlock; ++t) scores[t] = -std::numeric_limits<float>::infinity();
  vf largest = splat(running.maximum);
  for (int64_t t = 0; t < kBlock; t += kLanes) largest = max(load(scores + t), largest);
  float maximum = running.maximum;
  for (int i = 0; i < kLanes; ++i) maximum = std::max(maximum, largest[i]);
  const float decay = exp2(running.maximum - maximum);
  vf total{};
  for (int64_t t = 0; t < kBlock; t += kLanes) {
    // What is behind the last token weighs 0.
    store(weights + t, exp2(load(scores + t) - splat(maximum)));
    total += load(weights + t);
  }
  running.total = running.total * decay + sum(total);
  running.maximum = maximum;
  if (decay != 1.0f) {
    for (int64_t c = 0; c < width; c += kLanes) store(mixed + c, load(mixed + c) * splat(decay));
  }
}

// --- a piece

template <class T>
const T* row_at(const Rows& rows, const Cache& cache, int64_t token) {
  const T* data = static_cast<const T*>(rows.data);
  if (cache.pages == nullptr) return data + token * rows.stride;
  return data + cache.pages[token / cache.page_size] * rows.page_stride + token % cache.page_size * rows.stride;
}

template <class T>
void point_at(const Cache& cache, int64_t begin, int64_t tokens, RowPointers<T>& rows) {
  for (int64_t i = 0; i < kPointers; ++i) {
    const int64_t token = begin + std::min(i, tokens - 1);
    rows.keys[i] = row_at<T>(cache.keys, cache, token);
    rows.shared[i] = cache.shared.width > 0 ? row_at<T>(cache.shared, cache, token) : nullptr;
    rows.values[i] = row_at<T>(cache.values, cache, token);
  }
}

// What a block with these pointers reads, to be fetched within the products of another.
template <class T>
void look_ahead(const RowPointers<T>& rows, const Widths& widths, int64_t value_width, int64_t heads, int64_t tokens,
                Ahead& ahead) {
  constexpr int64_t itemsize = sizeof(T);
  const bool values_apart = rows.values[0] != rows.keys[0];
  for (int64_t t = 0; t < tokens; ++t) {
    ahead.add(rows.keys[t], widths.keys * itemsize);
    ahead.add(rows.shared[t], widths.shared * itemsize);
    if (values_apart) ahead.add(rows.values[t], value_width * itemsize);
  }
  // Steps of the two products, about: a token, four heads and a vector of channels, and the same with eight heads.
  ahead.spread(kBlock * ceil_div(heads, 4) * (widths.padded() + value_width) / (4 * kStep));
}

// Queries in units of ln 2, each part padded with zeros to whole steps.
template <class Q>
void take_queries(const Queries& queries, const Widths& widths, Q* out) {
  const int64_t given = widths.keys + widths.shared;
  for (int64_t h = 0; h < queries.heads; ++h) {
    Q* row = out + h * widths.padded();
    for (int64_t i = 0; i < widths.padded(); ++i) row[i] = from_float<Q>(0.0f);
    const float* query = queries.data + h * given;
    for (int64_t i = 0; i < widths.keys; ++i) row[i] = from_float<Q>(query[i] * kLog2E);
    for (int64_t i = 0; i < widths.shared; ++i) {
      row[widths.shared_at() + i] = from_float<Q>(query[widths.keys + i] * kLog2E);
    }
  }
}

// Q is the type of queries and weights: bf16 for dot products, else float.
template <class Q, class T>
void run_piece(const Queries& queries, const Cache& cache, int64_t begin, int64_t end, float* partial) {
  const Widths widths{cache.keys.width, cache.shared.width};
  const int64_t heads = queries.heads, ldm = partial_width(cache.values.width), width = ldm - 16;
  const Scratch<Q> q(static_cast<size_t>(heads * widths.padded()));
  const Scratch<float> scores(static_cast<size_t>(heads * kBlock));
  const Scratch<Q> weights(static_cast<size_t>(heads * kBlock));
  const Scratch<Running> running(static_cast<size_t>(heads));
  const Scratch<RowPointers<T>> pointers(2);
  RowPointers<T>*rows = pointers, *next = rows + 1;
  // A row may begin within a line.
  Ahead ahead(kBlock * (ceil_div((widths.padded() + cache.values.width) * static_cast<int64_t>(sizeof(T)), 64) + 3));
  take_queries<Q>(queries, widths, q);
  std::fill(partial, partial + heads * ldm, 0.0f);
  for (int64_t h = 0; h < heads; ++h) running[h] = Running{kLowest, 0.0f};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t tokens = std::min(kBlock, end - block), left = end - block - tokens;
    if (block == begin) point_at<T>(cache, block, tokens, *rows);
    ahead.clear();
    if (left > 0) {
      point_at<T>(cache, block + tokens, std::min(kBlock, left), *next);
      if (!std::is_same_v<Q, float>) {
        look_ahead(*next, widths, cache.values.width, heads, std::min(kBlock, left), ahead);
      }
    }
    score(q.get(), widths, heads, *rows, tokens, scores.get(), ahead);
    for (int64_t h = 0; h < heads; ++h) {
      weigh(scores + h * kBlock, tokens, weights + h * kBlock, running[h], partial + h * ldm, width);
    }
    mix(weights.get(), heads, rows->values, ahead, tokens, cache.values.width, partial, ldm);
    std::swap(rows, next);
  }
  for (int64_t h = 0; h < heads; ++h) {
#if KL_HAS_DOT
    if constexpr (std::is_same_v<Q, bf16>) unshuffle(partial + h * ldm, width);
#endif
    partial[h * ldm + width] = running[h].maximum;
    partial[h * ldm + width + 1] = running[h].total;
  }
}

}  // namespace

void decode_piece(const Queries& queries, const Cache& cache, int64_t first, int64_t length, int64_t piece,
                  float* partial) {
  const int64_t begin = first + piece * piece_tokens(length);
  const int64_t end = std::min(first + length, begin + piece_tokens(length));
#if KL_HAS_DOT
  if (queries.low && cache.dtype == kBFloat16) return run_piece<bf16, bf16>(queries, cache, begin, end, partial);
#endif
  dispatch(cache.dtype, [&](auto zero) { run_piece<float, decltype(zero)>(queries, cache, begin, end, partial); });
}

void combine(const float* partials, int64_t pieces, int64_t heads, int64_t h, int64_t value_width, float* mixed) {
  const int64_t ldm = partial_width(value_width), width = ldm - 16, apart = heads * ldm;
  const float* head = partials + h * ldm;
  float maximum = kLowest, total = 0.0f;
  for (int64_t i = 0; i < pieces; ++i) maximum = std::max(maximum, head[i * apart + width]);
  float weights[kMostPieces];
  for (int64_t i = 0; i < pieces; ++i) {
    weights[i] = exp2(head[i * apart + width] - maximum);
    total += weights[i] * head[i * apart + width + 1];
  }
  const float share = pieces > 0 ? 1.0f / total : 0.0f;
  for_lanes(value_width, [&](int64_t c, int lanes) {
    vf sums{};
    for (int64_t i = 0; i < pieces; ++i) sums = fma(weights[i], load(head + i * apart + c), sums);
    store_lanes(mixed + c, sums * splat(share), lanes);
  });
}

}  // namespace kl::attention
