// Products of rows with a weight [outputs, inputs] that was packed once: float32, bfloat16, or integers in groups.
//
// Integer weights are  w[n, k] = scale[n, g] q[n, k]  with groups g of kGroup neighbours in k, q in [-127, 127] (int8) or
// [-8, 7] (int4), and bfloat16 scales. With int8 dot products, rows are quantised too, as  x[m, k] = s[m, g] p[m, k]  with
// p in [-127, 127], and
//
//   y[m, n] = sum_g s[m, g] scale[n, g] (sum_{k in g} p[m, k] (q[n, k] + zero) - zero sum_{k in g} p[m, k])
//
// where zero makes q + zero unsigned, as the instruction wants it. Elsewhere q is widened and rows are float32.
//
// An output's bits depend on its row and its weights alone: one chain over the groups, for any number of rows.
#pragma once

#include "gemm.h"

namespace kl {

enum WeightKind : int64_t { kWeightFloat32 = 0, kWeightBFloat16 = 1, kWeightInt8 = 2, kWeightInt4 = 3 };

// Inputs that share a scale: a group of 32 is worth its 2 bytes at 4 bits, and gives int8 rows their precision.
constexpr int64_t kGroup = 32;

// A weight packed by pack_weight: panels of gemm::kPanel outputs.
struct PackedWeight {
  const void* data;
  int64_t kind;  // a WeightKind
  int64_t outputs, inputs;
  bool is_integer() const { return kind >= kWeightInt8; }
};

inline int64_t groups_of(int64_t inputs) { return ceil_div(inputs, kGroup); }
// Bytes of a group of a panel of integers: quotients, then scales.
constexpr int64_t group_bytes(int64_t kind) {
  return gemm::kPanel * (kGroup / (kind == kWeightInt4 ? 2 : 1) + static_cast<int64_t>(sizeof(bf16)));
}
// Bytes of one panel; panel p of a packed weight begins at data + p * panel_bytes.
int64_t panel_bytes(int64_t kind, int64_t inputs);
// Bytes that pack_weight fills; aligned to 64 they are read fastest.
int64_t packed_bytes(int64_t kind, int64_t outputs, int64_t inputs);
// Pack a contiguous weight [outputs, inputs] of type T (float or bf16) on the threads.
template <class T>
void pack_weight(int64_t kind, const T* weight, int64_t outputs, int64_t inputs, void* out);

// Whether rows that meet the weight are quantised to int8.
inline bool takes_int8_rows(const PackedWeight& w) { return KL_HAS_DOT && w.is_integer(); }
// Bytes of `rows` rows as operands of a weight: what make_operands fills. Align to 64.
int64_t operand_bytes(const PackedWeight& w, int64_t rows);
// Make `rows` rows of x, from row `first`, into operands: once for all weights of one kind that they meet. The result is
// for products of exactly that many rows.
template <class T, class Index>
void make_operands(const PackedWeight& w, const gemm::Matrix<T, Index>& x, int64_t first, int64_t rows, void* out);

// --- the product of int8 rows, defined in linear_int8.cpp

// A tile of quantised rows: words of four neighbours in k, in the layout of gemm.h, and for each group a scale and the
// start of the sum of each row, [groups][rows].
struct Int8Tile {
  const uint32_t* words;
  const float* scales;
  const int32_t* starts;
};

// Where the parts of a tile of quantised rows lie within its operands.
struct Int8Layout {
  explicit Int8Layout(int64_t inputs) : steps(ceil_div(inputs, 4 * gemm::kStep)), groups(groups_of(inputs)) {}
  int64_t steps, groups;
  // Bytes of a row with its scales and starts.
  int64_t row_bytes() const { return steps * gemm::kStep * 4 + groups * 8; }
  Int8Tile tile(const void* operands, int64_t first, int64_t rows) const {
    const auto* const words = reinterpret_cast<const uint32_t*>(static_cast<const char*>(operands) + first * row_bytes());
    const auto* const scales = reinterpret_cast<const float*>(words + rows * steps * gemm::kStep);
    return {words, scales, reinterpret_cast<const int32_t*>(scales + rows * groups)};
  }
};

// How many panels an int8 tile of so many rows takes at once: integer and float32 sums share the registers.
KL_INLINE constexpr int int8_panels_at_once(int64_t rows) { return rows == 1 ? 4 : rows <= gemm::kTileRows / 2 ? 2 : 1; }

// c [rows, at_once * kPanel] = the products of a tile with panels at b, b + b_stride, ...; at_once is 1, 2 or 4, at most
// int8_panels_at_once(rows).
void int8_tile_product(int64_t kind, int rows, int at_once, const Int8Tile& a, const uint8_t* b, int64_t b_stride,
                       int64_t groups, float* c);

// Panels of integers, widened to operands of gemm.h as they are needed.
struct WidenedPanels {
  PackedWeight weight;
  static constexpr bool kInPlace = false;
  void fill(int64_t panel, int64_t word_begin, int64_t word_end, uint32_t* out) const;
};

template <class Epilogue>
void int8_multiply(const PackedWeight& w, const void* operands, int64_t rows, int64_t panel_begin, int64_t panel_end,
                   const Epilogue& epilogue) {
  const gemm::PackedRows tiles(nullptr, rows, gemm::Along::kRow);
  const Int8Layout layout(w.inputs);
  const int64_t length = panel_bytes(w.kind, w.inputs);
  const int64_t most = int8_panels_at_once(tiles.first_row(1));
  const Scratch<float> sums(static_cast<size_t>(most * gemm::kTileRows * gemm::kPanel));
  for (int64_t panel = panel_begin, together; panel < panel_end; panel += together) {
    together = gemm::power_of_two(std::min(most, panel_end - panel));
    const auto* const b = static_cast<const uint8_t*>(w.data) + panel * length;
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t first = tiles.first_row(t), height = tiles.first_row(t + 1) - first;
      int8_tile_product(w.kind, static_cast<int>(height), static_cast<int>(together), layout.tile(operands, first, height),
                        b, length, layout.groups, sums);
      for (int64_t r = 0; r < height; ++r) {
        for (int64_t p = 0; p < together; ++p) {
          const float* const pair = sums + (r * together + p) * gemm::kPanel;
          epilogue(first + r, panel + p, load(pair), load(pair + kLanes));
        }
      }
    }
  }
}

// Products of operands made by make_operands with panels [panel_begin, panel_end): what one thread does. The epilogue is
// that of gemm::multiply: epilogue(row, panel, lower, upper), the sums of outputs from panel * gemm::kPanel on.
template <class Epilogue>
void linear_rows(const PackedWeight& w, const void* operands, int64_t rows, int64_t panel_begin, int64_t panel_end,
                 const Epilogue& epilogue) {
  if (rows == 0 || panel_begin >= panel_end) return;
  if (takes_int8_rows(w)) {
    int8_multiply(w, operands, rows, panel_begin, panel_end, epilogue);
    return;
  }
  const gemm::PackedRows a(static_cast<const uint32_t*>(operands), rows, gemm::Along::kRow);
  const auto* const data = static_cast<const uint32_t*>(w.data);
  const auto multiply = [&](auto op, const auto& panels) {
    gemm::multiply<decltype(op)>(a, panels, w.inputs, panel_begin, panel_end, epilogue);
  };
  if (w.kind == kWeightFloat32) {
    multiply(float{}, gemm::PackedPanels{data, gemm::kPanel * w.inputs});
  } else if (w.kind == kWeightBFloat16) {
    multiply(bf16{}, gemm::PackedPanels{data, gemm::kPanel * gemm::words<bf16>(w.inputs)});
  } else {
    multiply(float{}, WidenedPanels{w});
  }
}

}  // namespace kl
