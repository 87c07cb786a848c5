// The delta rule and KDA from a layer's raw projections, many tokens: equations (1) to (4) of delta.h, chunk after
// chunk.
//
// A work item is a sequence and a few value heads, or some column blocks of these where there are fewer than threads:
// columns of a state never meet, so the bits stay. Beside the inputs an item holds its states in packed blocks and the
// rows of one chunk. Every chunk starts at a multiple of kChunk from its sequence's first token, so a row's result
// depends on nothing outside its sequence.

#include <numeric>

#include "delta.h"
#include "delta_dot.h"

namespace kl {
namespace delta {
namespace {

// Heads that an item takes at most, and floats of their states.
constexpr int64_t kMostHeads = 4;
constexpr int64_t kMostStateFloats = 4 * 128 * 128;

struct Call {
  Source source;
  Layout layout;
  const float* initial;  // [N, HV, K, V], or null
  void* o;               // [tokens, HV, V] in the type of value
  float* final_state;    // [N, HV, K, V]
  float* boundaries;     // or null: not wanted
  const int64_t* first_segment;
};

// Whether the products with the state are dot products of bfloat16 (delta_dot.h): where q, k and the values are.
bool uses_dots(const Source& source) {
  return KL_HAS_DOT && source.q.type == kBFloat16 && source.k.type == kBFloat16 && source.value.type == kBFloat16;
}

// What a work item computes with: rows of one chunk, and its states, block after block.
struct Workspace {
  const bool dots;
  Scratch<float> queries, keys, decay, total, N, P, read_out, written, state;
  // With dot products: e~ and q~ rounded, and the states' pairs.
  Scratch<bf16> rounded;
  Scratch<uint32_t> pairs;
  Terms terms;

  Workspace(const Source& source, int64_t blocks)
      : dots(uses_dots(source)),
        queries(2 * kChunk * padded(source.K)),
        keys(kChunk * padded(source.K)),
        decay(kChunk * padded(source.K)),
        total(padded(source.K)),
        N(kChunk * kChunk),
        P(kChunk * kChunk),
        read_out(2 * kChunk * kBlock),
        written(kChunk * kBlock),
        state(blocks * block_floats(source.K)),
        rounded(dots ? 2 * kChunk * padded(source.K) : 0),
        pairs(dots ? blocks * block_floats(source.K) / 2 : 0) {
    terms.e = queries;
    terms.q = queries + kChunk * padded(source.K);
    terms.k = keys;
    terms.decay = decay;
    terms.log_decay = terms.logits = nullptr;
  }
};

// a - b c
KL_INLINE vf minus_product(vf a, float b, vf c) {
#if KL_HAS_AVX512
  return (vf)_mm512_fnmadd_ps(_mm512_set1_ps(b), (__m512)c, (__m512)a);
#else
  return a - splat(b) * c;
#endif
}

// Rows of z and of o of one chunk, at one head and column.
template <class T>
struct Columns {
  const T* value;
  T* o;
  int64_t stride;  // from a token to the next
  int rows, lanes;
};

// Equations (2) and (3) for one vector of columns: everything between the products with the state. The solution stays
// in registers where there are enough.
template <bool kErases, class T>
KL_INLINE void solve_columns(const float* N, const float* P, const float* strength, const float* read_e,
                             const float* read_q, const Columns<T>& at, float* written) {
  vf r[kChunk];
#pragma GCC unroll 16
  for (int i = 0; i < kChunk; ++i) {
    r[i] = vf{};
    if (i >= at.rows) continue;
    const vf z = load_lanes(at.value + i * at.stride, at.lanes) * splat(strength[i]);
    r[i] = kErases ? z - load(read_e + i * kBlock) : z;
  }
  if (kErases) {
#pragma GCC unroll 16
    for (int j = 0; j < kChunk; ++j) {
#pragma GCC unroll 16
      for (int i = j + 1; i < kChunk; ++i) r[i] = minus_product(r[i], N[i * kChunk + j], r[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kChunk; ++i) store(written + i * kBlock, r[i]);
#pragma GCC unroll 16
  for (int i = 0; i < kChunk; ++i) {
    if (i >= at.rows) break;
    vf o = load(read_q + i * kBlock);
#pragma GCC unroll 16
    for (int j = 0; j <= i; ++j) o = fma(splat(P[i * kChunk + j]), r[j], o);
    store_lanes(at.o + i * at.stride, o, at.lanes);
  }
}

// The rows of a chunk that the products run over: whole tiles of 8 rows.
KL_INLINE int tile_rows(int rows) { return static_cast<int>(round_up(rows, 8)); }

// q~, e~ and the whole decay of (1).
void decay_all(const Source& source, Workspace& space) {
#if KL_HAS_DOT
  if (space.dots) {
    decay_queries(source, space.terms, space.total, space.rounded, space.rounded + kChunk * padded(source.K));
    return;
  }
#endif
  decay_queries(source, space.terms, space.total);
}

// read_e = e~ S and read_q = q~ S for block `index` of the workspace.
KL_INLINE void read_block(const Source& source, Workspace& space, int64_t index, int rows, float* read_e, float* read_q,
                          Fetch& fetch) {
  const int64_t Kp = padded(source.K);
#if KL_HAS_DOT
  if (space.dots) {
    const uint32_t* pairs = space.pairs + index * pair_words(source.K);
    if (source.erases()) dot_product(space.rounded, Kp, pairs, Kp, rows, read_e, fetch);
    dot_product(space.rounded + kChunk * Kp, Kp, pairs, Kp, rows, read_q, fetch);
    return;
  }
#endif
  const float* state = space.state + index * block_floats(source.K);
  if (source.erases()) product(space.terms.e, Kp, state, source.K, rows, read_e, fetch);
  product(space.terms.q, Kp, state, source.K, rows, read_q, fetch);
}

// (4) for a block.
KL_INLINE void update_block(const Source& source, Workspace& space, int64_t index, int rows, Fetch& fetch) {
  const int64_t Kp = padded(source.K);
  float* state = space.state + index * block_floats(source.K);
#if KL_HAS_DOT
  if (space.dots) {
    const KeepPairs keep{space.pairs + index * pair_words(source.K)};
    update(space.terms.k, Kp, space.written, rows, space.total, Kp, state, fetch, keep);
    return;
  }
#endif
  update(space.terms.k, Kp, space.written, rows, space.total, Kp, state, fetch);
}

// One column block of a chunk: block `index` of the workspace, which begins at `column`.
template <class T>
void advance_block(const Call& call, Workspace& space, int64_t token, int rows, int64_t head, int64_t column,
                   int64_t index, Fetch& fetch) {
  const Source& source = call.source;
  const int64_t V = source.V, stride = source.HV * V;
  float* read_e = space.read_out;
  float* read_q = space.read_out + kChunk * kBlock;
  const bool erases = source.erases();
  read_block(source, space, index, tile_rows(rows), read_e, read_q, fetch);
  for (int64_t c = 0; c < kBlock && column + c < V; c += kLanes) {
    const int64_t from = token * stride + head * V + column + c;
    const Columns<T> at{static_cast<const T*>(source.value.data) + from, static_cast<T*>(call.o) + from, stride, rows,
                        static_cast<int>(std::min<int64_t>(kLanes, V - column - c))};
    if (erases) {
      solve_columns<true>(space.N, space.P, space.terms.strength, read_e + c, read_q + c, at, space.written + c);
    } else {
      solve_columns<false>(space.N, space.P, space.terms.strength, read_e + c, read_q + c, at, space.written + c);
    }
  }
  update_block(source, space, index, rows, fetch);
}

// A sequence, value heads [first_head, last_head), column blocks [first_block, last_block).
struct Item {
  int64_t sequence, first_head, last_head, first_block, last_block;
};

// Sweeps an item. Its heads take turns chunk by chunk: their tokens lie beside each other, pages apart from one token
// to the next, so that a page is looked up once for all of them.
template <class T>
class Sweep {
 public:
  Sweep(const Call& call, const Item& item)
      : call_(call),
        source_(call.source),
        item_(item),
        start_(call.layout.start(item.sequence)),
        length_(call.layout.length(item.sequence)),
        space_(call.source, (item.last_head - item.first_head) * (item.last_block - item.first_block)) {}

  void run() {
    const float* initial = call_.initial ? call_.initial + item_.sequence * source_.HV * state_floats() : nullptr;
    each_block([&](int64_t head, int64_t block, float* state) {
      pack_block(initial ? initial + head * state_floats() : nullptr, source_.K, source_.V, block, state);
#if KL_HAS_DOT
      if (space_.dots) make_pairs(state, source_.K, space_.pairs + index(head, block) * pair_words(source_.K));
#endif
    });
    for (int64_t t = 0; t < length_; t += kChunk) {
      if (call_.boundaries && t % kSegment == 0) {
        write_states(call_.boundaries, call_.first_segment[item_.sequence] + t / kSegment);
      }
      for (int64_t head = item_.first_head; head < item_.last_head; ++head) advance(t, head);
    }
    write_states(call_.final_state, item_.sequence);
  }

 private:
  int64_t state_floats() const { return source_.K * source_.V; }
  int rows_at(int64_t t) const {
    return static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(kChunk, length_ - t)));
  }
  // Number of a block in the workspace.
  int64_t index(int64_t head, int64_t block) const {
    return (head - item_.first_head) * (item_.last_block - item_.first_block) + block - item_.first_block;
  }
  template <class F>
  void each_block(const F& f) {
    for (int64_t head = item_.first_head; head < item_.last_head; ++head) {
      for (int64_t block = item_.first_block; block < item_.last_block; ++block) {
        f(head, block, space_.state + index(head, block) * block_floats(source_.K));
      }
    }
  }
  // Row `row` of to [.., HV, K, V] takes the states.
  void write_states(float* to, int64_t row) {
    each_block([&](int64_t head, int64_t block, float* state) {
      unpack_block(state, source_.K, source_.V, block, to + (row * source_.HV + head) * state_floats());
    });
  }
  // Tokens [t, t + kChunk) of a head; fetches what comes after.
  void advance(int64_t t, int64_t head) {
    const int rows = rows_at(t);
    const bool last = head + 1 == item_.last_head;
    const int64_t next = last ? t + kChunk : t, next_head = last ? item_.first_head : head + 1;
    load_terms(source_, start_ + t, rows, head, space_.terms);
    scores(source_, space_.terms, space_.N, space_.P);
    decay_all(source_, space_);
    const int64_t steps = (source_.erases() ? 2 : 1) * product_steps(tile_rows(rows)) + update_steps(padded(source_.K));
    Fetch fetch(source_, start_ + next, rows_at(next), next_head, call_.o,
                steps * (item_.last_block - item_.first_block));
    for (int64_t block = item_.first_block; block < item_.last_block; ++block) {
      advance_block<T>(call_, space_, start_ + t, rows, head, block * kBlock, index(head, block), fetch);
    }
  }

  const Call& call_;
  const Source& source_;
  const Item item_;
  const int64_t start_, length_;
  Workspace space_;
};

// Numbers of the sequences, longest first.
void order_sequences(const Layout& layout, int64_t* order) {
  std::iota(order, order + layout.N, int64_t{0});
  if (!layout.offsets) return;
  std::stable_sort(order, order + layout.N,
                   [&](int64_t a, int64_t b) { return layout.length(a) > layout.length(b); });
}

// How many heads of a sequence an item takes: a divisor of HV, such that their states stay in the second-level cache
// and no thread waits long for another.
int64_t heads_together(const Source& source, int64_t pairs) {
  const int64_t floats = padded(source.K) * round_up(source.V, kBlock), threads = num_threads();
  for (int64_t heads = std::min(kMostHeads, source.HV); heads > 1; --heads) {
    const int64_t teams = pairs / heads;
    const bool balanced = teams % threads == 0 || teams >= 8 * threads;
    if (source.HV % heads == 0 && heads * floats <= kMostStateFloats && balanced) return heads;
  }
  return 1;
}

void run(Call& call) {
  const Source& source = call.source;
  const int64_t N = call.layout.N, pairs = N * source.HV, blocks = ceil_div(source.V, kBlock);
  Scratch<int64_t> first(N), order(N);
  first_segments(call.layout, first);
  call.first_segment = first;
  order_sequences(call.layout, order);
  if (pairs == 0 || blocks == 0) return;
  const int64_t heads = heads_together(source, pairs), teams = pairs / heads;
  const int64_t groups = std::min(blocks, ceil_div(num_threads(), teams)), per_group = ceil_div(blocks, groups);
  parallel_for(teams * groups, [&](int64_t index) {
    const int64_t team = index / groups, block = index % groups * per_group, head = team * heads % source.HV;
    const Item item{order[team * heads / source.HV], head, head + heads, block, std::min(blocks, block + per_group)};
    if (item.first_block >= item.last_block) return;
    dispatch(source.value.type, [&](auto zero) { Sweep<decltype(zero)>(call, item).run(); });
  });
}

}  // namespace
}  // namespace delta
}  // namespace kl

// q, k [tokens, H, K], e [tokens, erase_heads, K] or null, z, o [tokens, HV, V], g [tokens, HV, K] or (scalar) [tokens,
// HV]; `types` holds a TypeBit for each. beta [tokens, HV] or null: e = beta k, and z is to be multiplied by beta.
// offsets [N + 1] or null: N sequences of T tokens. boundaries may be null.
KL_EXPORT int64_t kl_delta_rule_forward(const void* q, const void* k, const void* e, const void* z, const void* g,
                                        const void* beta, const float* initial, const int64_t* offsets, void* o,
                                        float* final_state, float* boundaries, int64_t types, int64_t N, int64_t T,
                                        int64_t H, int64_t HV, int64_t K, int64_t V, int64_t erase_heads,
                                        int64_t scalar_decay, int64_t pre, double scale) {
  using namespace kl::delta;
  const Source source =
      plain_source(q, k, e, z, g, beta, types, H, HV, K, V, erase_heads, scalar_decay != 0, pre != 0, scale);
  Call call{source, Layout{offsets, N, T}, initial, o, final_state, boundaries, nullptr};
  run(call);
  return 0;
}

// Raw q, k [tokens, H, K], v, o [tokens, HV, V], gate logits [tokens, HV, K], beta logits [tokens, HV], A_log [HV] or
// null, dt_bias [HV, K] or null; lower_bound: 0 for the softplus gate.
KL_EXPORT int64_t kl_kda_core_forward(const void* q, const void* k, const void* v, const void* gate, const void* beta,
                                      const float* A_log, const float* dt_bias, const float* initial,
                                      const int64_t* offsets, void* o, float* final_state, float* boundaries,
                                      int64_t types, int64_t N, int64_t T, int64_t H, int64_t HV, int64_t K, int64_t V,
                                      double lower_bound, double beta_scale, double scale) {
  using namespace kl::delta;
  const Source source = core_source(q, k, v, gate, beta, A_log, dt_bias, types, H, HV, K, V, lower_bound, beta_scale,
                                    scale);
  Call call{source, Layout{offsets, N, T}, initial, o, final_state, boundaries, nullptr};
  run(call);
  return 0;
}
