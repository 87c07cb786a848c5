// Integer weights of linear.h: quantising them, quantising rows, widening, and the micro-kernel of int8 dot products.

#include "linear.h"

#include <utility>

namespace kl {
namespace {

using gemm::kPanel;
using gemm::kStep;

// Words of four neighbours in k that a group holds, and rows of words that they take in memory: int4 keeps word i in the
// lower halves of the bytes of row i, and word i + kGroup / 8 in the upper ones.
constexpr int kGroupWords = kGroup / 4;
constexpr uint32_t kLowerHalves = 0x0f0f0f0f;

// What makes a quotient unsigned.
constexpr int32_t zero_of(int64_t kind) { return kind == kWeightInt4 ? 8 : 128; }

// --- quantising weights

float round_scale(float scale) { return to_float(to_bf16(scale)); }

int32_t quotient(float w, float inverse, int32_t least, int32_t most) {
  const float q = std::nearbyint(w * inverse);
  return q <= static_cast<float>(least) ? least : q >= static_cast<float>(most) ? most : static_cast<int32_t>(q);
}

float squared_error(const float* w, float scale) {
  const float inverse = 1 / scale;
  float error = 0;
  for (int i = 0; i < kGroup; ++i) {
    const float miss = w[i] - scale * static_cast<float>(quotient(w[i], inverse, -8, 7));
    error += miss * miss;
  }
  return error;
}

// The scale of a group: int8 spreads the largest value to 127. int4 tries a few that put the largest value between -8.2
// and -6.2, or 6.2 and 7.2, and keeps the one with the least squared error.
float group_scale(int64_t kind, const float* w) {
  float largest = 0;
  for (int i = 0; i < kGroup; ++i) {
    if (std::fabs(w[i]) > std::fabs(largest)) largest = w[i];
  }
  if (kind == kWeightInt8) return round_scale(std::fabs(largest) / 127);
  constexpr float kTries[] = {-8, -8.2f, -7.8f, -7.6f, -7.4f, -7.2f, -7, -6.6f, -6.2f, 7, 7.2f, 6.6f, 6.2f};
  float best = round_scale(largest / kTries[0]), least = -1;
  for (const float to : kTries) {
    const float scale = round_scale(largest / to);
    if (scale == 0 || !std::isfinite(1 / scale)) continue;
    const float error = squared_error(w, scale);
    if (least < 0 || error < least) {
      best = scale;
      least = error;
    }
  }
  return best;
}

// One group of one column into the group's bytes.
void pack_group(int64_t kind, const float* w, int64_t column, uint8_t* group) {
  const float scale = group_scale(kind, w);
  const float inverse = scale == 0 || !std::isfinite(1 / scale) ? 0 : 1 / scale;
  const int32_t zero = zero_of(kind), most = kind == kWeightInt4 ? 7 : 127, least = kind == kWeightInt4 ? -8 : -127;
  for (int i = 0; i < kGroup; ++i) {
    const auto q = static_cast<uint8_t>(quotient(w[i], inverse, least, most) + zero);
    const int word = i / 4;
    if (kind == kWeightInt8) {
      group[(word * kPanel + column) * 4 + i % 4] = q;
    } else {
      constexpr int kHalf = kGroupWords / 2;
      uint8_t& byte = group[(word % kHalf * kPanel + column) * 4 + i % 4];
      byte = static_cast<uint8_t>(word < kHalf ? q : byte | q << 4);
    }
  }
  auto* const scales = reinterpret_cast<bf16*>(group + group_bytes(kind)) - kPanel;
  scales[column] = to_bf16(scale);
}

template <class T>
void pack_integer_panel(int64_t kind, const T* weight, int64_t outputs, int64_t inputs, int64_t panel, uint8_t* out) {
  for (int64_t g = 0; g < groups_of(inputs); ++g, out += group_bytes(kind)) {
    for (int64_t column = 0; column < kPanel; ++column) {
      const int64_t n = panel * kPanel + column;
      float w[kGroup] = {};
      if (n < outputs) {
        for (int64_t i = 0; i < std::min(kGroup, inputs - g * kGroup); ++i) {
          w[i] = to_float(weight[n * inputs + g * kGroup + i]);
        }
      }
      pack_group(kind, w, column, out);
    }
  }
}

// --- quantising rows

// One group of a row: kGroup values to int8, with their scale and the start of their sum. A value that is not finite
// makes the scale NaN, and so every sum it enters.
template <class T>
void quantise_group(const T* x, int64_t count, int32_t zero, int8_t* out, float* scale, int32_t* start) {
  vf values[kGroup / kLanes];
  vf largest{}, taint{};
  for (int i = 0; i < kGroup / kLanes; ++i) {
    const int64_t left = count - i * kLanes;
    values[i] = left <= 0 ? vf{} : load_lanes(x + i * kLanes, static_cast<int>(std::min<int64_t>(left, kLanes)));
    largest = max(largest, abs(values[i]));
    taint += values[i] * splat(0.0f);
  }
  float most = 0;
  for (int lane = 0; lane < kLanes; ++lane) most = std::max(most, largest[lane]);
  const float inverse = most > 0 ? 127 / most : 0;
  int32_t total = 0;
  for (int i = 0; i < kGroup / kLanes; ++i) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the lowest bits.
    const vi q = (vi)(fma(inverse, values[i], splat(12582912.0f))) - splat_int(0x4b400000);
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    const Bytes bytes = __builtin_convertvector(q, Bytes);
    __builtin_memcpy(out + i * kLanes, &bytes, sizeof bytes);
    for (int lane = 0; lane < kLanes; ++lane) total += bytes[lane];
  }
  *scale = most / 127 + sum(taint);
  *start = -zero * total;
}

template <class T, class Index>
void quantise_rows(const PackedWeight& w, const gemm::Matrix<T, Index>& x, int64_t first, int64_t rows, void* out) {
  const gemm::PackedRows tiles(nullptr, rows, gemm::Along::kRow);
  const Int8Layout layout(w.inputs);
  const int32_t zero = zero_of(w.kind);
  for (int64_t t = 0; t < tiles.tiles; ++t) {
    const int64_t begin = tiles.first_row(t), height = tiles.first_row(t + 1) - begin;
    const Int8Tile tile = layout.tile(out, begin, height);
    for (int64_t r = 0; r < height; ++r) {
      const T* const row = x.row(first + begin + r);
      for (int64_t g = 0; g < layout.groups; ++g) {
        const int64_t word = g * kGroupWords;
        auto* const words = const_cast<uint32_t*>(tile.words) + word / kStep * height * kStep + r * kStep + word % kStep;
        quantise_group(row + g * kGroup, std::min(kGroup, w.inputs - g * kGroup), zero, reinterpret_cast<int8_t*>(words),
                       const_cast<float*>(tile.scales) + g * height + r, const_cast<int32_t*>(tile.starts) + g * height + r);
      }
    }
  }
}

// --- products

// Bytes of a line of the caches, and groups that memory is asked for ahead of its use.
constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 8;

#if KL_HAS_DOT
// Each row of words of a group in turn, as unsigned bytes.
template <int kKind, int kVectors>
KL_INLINE void load_group_words(const uint8_t* const (&b)[kVectors / 2], int word, __m512i (&out)[kVectors]) {
  constexpr int kHalf = kGroupWords / 2;
  const int row = kKind == kWeightInt4 ? word % kHalf : word;
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    out[v] = _mm512_loadu_si512(b[v / 2] + (row * kPanel + v % 2 * kLanes) * 4);
    if (kKind == kWeightInt4) {
      if (word >= kHalf) out[v] = _mm512_srli_epi32(out[v], 4);
      out[v] = _mm512_and_si512(out[v], _mm512_set1_epi32(kLowerHalves));
    }
  }
}

template <int kKind, int kRows, int kAtOnce>
void int8_product(const Int8Tile& a, const uint8_t* b, int64_t b_stride, int64_t groups, float* c) {
  constexpr int kVectors = 2 * kAtOnce;
  // Low tiles keep the float32 sums in registers as well; the order of operations is the same.
  constexpr bool kInRegisters = kRows * kVectors <= 12;
  vf kept[kInRegisters ? kRows : 1][kInRegisters ? kVectors : 1] = {};
  if (!kInRegisters) std::fill(c, c + kRows * kVectors * kLanes, 0.0f);
  const uint8_t* each[kAtOnce];
  for (int p = 0; p < kAtOnce; ++p) each[p] = b + p * b_stride;
  const uint32_t* words = a.words;
  for (int64_t g = 0; g < groups; ++g) {
    // Few rows are as fast as memory is read. int4 takes so many instructions a byte that the processor looks ahead too
    // little by itself; int8 is read faster without help.
    if (kKind == kWeightInt4 && kRows <= 2) {
#pragma GCC unroll 4
      for (int p = 0; p < kAtOnce; ++p) {
#pragma GCC unroll 32
        for (int64_t line = 0; line < group_bytes(kKind); line += kLine) {
          __builtin_prefetch(each[p] + kAhead * group_bytes(kKind) + line);
        }
      }
    }
    __m512i sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_set1_epi32(a.starts[g * kRows + r]);
    }
#pragma GCC unroll 8
    for (int word = 0; word < kGroupWords; ++word) {
      __m512i right[kVectors];
      load_group_words<kKind>(each, word, right);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512i left = _mm512_set1_epi32(static_cast<int>(words[r * kStep + word]));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], right[v], left);
      }
    }
    // Two groups make a step.
    words += g % 2 == 0 ? kGroupWords : kRows * kStep - kGroupWords;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const vf scale = load(reinterpret_cast<const bf16*>(each[v / 2] + group_bytes(kKind)) - kPanel + v % 2 * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const vf sum = splat(a.scales[g * kRows + r]) * (vf)_mm512_cvtepi32_ps(sums[r][v]);
        if constexpr (kInRegisters) {
          kept[r][v] = fma(sum, scale, kept[r][v]);
        } else {
          float* const to = c + (r * kVectors + v) * kLanes;
          store(to, fma(sum, scale, load(to)));
        }
      }
    }
    for (int p = 0; p < kAtOnce; ++p) each[p] += group_bytes(kKind);
  }
  if constexpr (kInRegisters) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) store(c + (r * kVectors + v) * kLanes, kept[r][v]);
    }
  }
}

using Product = void (*)(const Int8Tile&, const uint8_t*, int64_t, int64_t, float*);

// By height and panels at once (1, 2, 4); null where the registers do not suffice.
struct Table {
  Product of[gemm::kTileRows + 1][3];
};

template <int kKind, int kRows, int kLog>
constexpr void enter(Table& table) {
  if constexpr ((1 << kLog) <= int8_panels_at_once(kRows)) table.of[kRows][kLog] = int8_product<kKind, kRows, 1 << kLog>;
}

template <int kKind, int... kRow>
constexpr Table make_table(std::integer_sequence<int, kRow...>) {
  Table table{};
  (enter<kKind, kRow + 1, 0>(table), ...);
  (enter<kKind, kRow + 1, 1>(table), ...);
  (enter<kKind, kRow + 1, 2>(table), ...);
  return table;
}

template <int kKind>
constexpr Table kTable = make_table<kKind>(std::make_integer_sequence<int, gemm::kTileRows>());
#endif

}  // namespace

void int8_tile_product(int64_t kind, int rows, int at_once, const Int8Tile& a, const uint8_t* b, int64_t b_stride,
                       int64_t groups, float* c) {
#if KL_HAS_DOT
  const Table& table = kind == kWeightInt4 ? kTable<kWeightInt4> : kTable<kWeightInt8>;
  table.of[rows][at_once / 2](a, b, b_stride, groups, c);
#else
  static_cast<void>(kind), static_cast<void>(rows), static_cast<void>(at_once), static_cast<void>(a);
  static_cast<void>(b), static_cast<void>(b_stride), static_cast<void>(groups), static_cast<void>(c);
#endif
}

// A word of a float32 panel is one value of k; blocks begin at a group because kBlock and its parts are whole groups.
void WidenedPanels::fill(int64_t panel, int64_t word_begin, int64_t word_end, uint32_t* out) const {
  const auto* const data = static_cast<const uint8_t*>(weight.data) + panel * panel_bytes(weight.kind, weight.inputs);
  const vi zero = splat_int(zero_of(weight.kind));
  for (int64_t k = word_begin; k < word_end; ++k, out += kPanel) {
    const uint8_t* const group = data + k / kGroup * group_bytes(weight.kind);
    const auto* const scales = reinterpret_cast<const bf16*>(group + group_bytes(weight.kind)) - kPanel;
    const int64_t word = k % kGroup / 4;
    const bool is_int4 = weight.kind == kWeightInt4;
    const int64_t row = is_int4 ? word % (kGroupWords / 2) : word;
    const int shift = static_cast<int>(8 * (k % 4) + (is_int4 && word >= kGroupWords / 2 ? 4 : 0));
    for (int v = 0; v < 2; ++v) {
      vi q;
      __builtin_memcpy(&q, group + (row * kPanel + v * kLanes) * 4, sizeof q);
      q = ((q >> shift) & (is_int4 ? 0x0f : 0xff)) - zero;
      store(reinterpret_cast<float*>(out) + v * kLanes, __builtin_convertvector(q, vf) * load(scales + v * kLanes));
    }
  }
}

int64_t panel_bytes(int64_t kind, int64_t inputs) {
  switch (kind) {
    case kWeightFloat32: return kPanel * gemm::words<float>(inputs) * 4;
    case kWeightBFloat16: return kPanel * gemm::words<bf16>(inputs) * 4;
    default: return groups_of(inputs) * group_bytes(kind);
  }
}

int64_t packed_bytes(int64_t kind, int64_t outputs, int64_t inputs) {
  return gemm::panels(outputs) * panel_bytes(kind, inputs);
}

template <class T>
void pack_weight(int64_t kind, const T* weight, int64_t outputs, int64_t inputs, void* out) {
  if (kind <= kWeightBFloat16) {
    dispatch(kind, [&](auto zero) {
      gemm::pack_weights<decltype(zero)>(gemm::Matrix<T>{weight, inputs}, gemm::Along::kRow, outputs, inputs,
                                         static_cast<uint32_t*>(out));
    });
    return;
  }
  parallel_for(gemm::panels(outputs), [&](int64_t panel) {
    pack_integer_panel(kind, weight, outputs, inputs, panel,
                       static_cast<uint8_t*>(out) + panel * panel_bytes(kind, inputs));
  });
}

int64_t operand_bytes(const PackedWeight& w, int64_t rows) {
  if (takes_int8_rows(w)) return rows * Int8Layout(w.inputs).row_bytes();
  return 4 * (w.kind == kWeightBFloat16 ? gemm::packed_row_words<bf16>(rows, w.inputs)
                                        : gemm::packed_row_words<float>(rows, w.inputs));
}

template <class T, class Index>
void make_operands(const PackedWeight& w, const gemm::Matrix<T, Index>& x, int64_t first, int64_t rows, void* out) {
  if (takes_int8_rows(w)) {
    quantise_rows(w, x, first, rows, out);
  } else if (w.kind == kWeightBFloat16) {
    gemm::pack_rows<bf16>(x, gemm::Along::kRow, first, rows, w.inputs, static_cast<uint32_t*>(out));
  } else {
    gemm::pack_rows<float>(x, gemm::Along::kRow, first, rows, w.inputs, static_cast<uint32_t*>(out));
  }
}

template void pack_weight<float>(int64_t, const float*, int64_t, int64_t, void*);
template void pack_weight<bf16>(int64_t, const bf16*, int64_t, int64_t, void*);
template void make_operands(const PackedWeight&, const gemm::Matrix<float>&, int64_t, int64_t, void*);
template void make_operands(const PackedWeight&, const gemm::Matrix<bf16>&, int64_t, int64_t, void*);
template void make_operands(const PackedWeight&, const gemm::Matrix<float, int32_t>&, int64_t, int64_t, void*);
template void make_operands(const PackedWeight&, const gemm::Matrix<bf16, int32_t>&, int64_t, int64_t, void*);

}  // namespace kl
