// Exported functions for packed weights (linear.h): sizes, packing, products of any number of rows.

#include "linear.h"

namespace kl {
namespace {

// Rows whose operands are made at a time, and panels a task takes for them: few rows read the weight once, so pieces of
// it are what the threads share.
template <class X, class Epilogue>
void multiply(const PackedWeight& w, const X* x, int64_t M, int64_t begin, int64_t end, const Epilogue& epilogue) {
  if (M == 0 || begin >= end) return;
  const gemm::Matrix<X> rows{x, w.inputs};
  const int64_t blocks = ceil_div(M, gemm::kRowBlock), height = ceil_div(M, blocks);
  const int64_t bytes = operand_bytes(w, height);
  const Scratch<std::byte> operands(static_cast<size_t>(round_up(bytes, 64) * blocks));
  parallel_for(blocks, [&](int64_t block) {
    make_operands(w, rows, block * height, std::min(height, M - block * height), operands + block * round_up(bytes, 64));
  });
  const int64_t tasks = num_threads() == 1 ? 1 : 4 * num_threads();
  const int64_t width = round_up(ceil_div(end - begin, ceil_div(tasks, blocks)), 4);
  const int64_t pieces = ceil_div(end - begin, width);
  parallel_for(blocks * pieces, [&](int64_t task) {
    const int64_t block = task / pieces, first = block * height, panel = begin + task % pieces * width;
    linear_rows(w, operands + block * round_up(bytes, 64), std::min(height, M - first), panel,
                std::min(end, panel + width), [&](int64_t row, int64_t of, vf lower, vf upper) {
                  epilogue(first + row, of, lower, upper);
                });
  });
}

}  // namespace
}  // namespace kl

using namespace kl;

// bytes[0] <- the size of a packed weight of that kind (0 float32, 1 bfloat16, 2 int8, 3 int4).
KL_EXPORT int64_t kl_linear_packed_bytes(int64_t kind, int64_t outputs, int64_t inputs, int64_t* bytes) {
  *bytes = packed_bytes(kind, outputs, inputs);
  return 0;
}

KL_EXPORT int64_t kl_linear_pack(int64_t kind, const void* weight, int64_t outputs, int64_t inputs, int64_t weight_type,
                                 void* packed) {
  dispatch(weight_type, [&](auto zero) {
    pack_weight(kind, static_cast<const decltype(zero)*>(weight), outputs, inputs, packed);
  });
  return 0;
}

// y [M, N] <- x [M, K] weight^T + bias, for rows of x and y behind each other. bias is float32 or null.
KL_EXPORT int64_t kl_linear_packed(int64_t kind, const void* packed, const float* bias, const void* x, void* y, int64_t M,
                                   int64_t N, int64_t K, int64_t x_type, int64_t y_type) {
  const PackedWeight w{packed, kind, N, K};
  dispatch(x_type, [&](auto x_zero) {
    dispatch(y_type, [&](auto y_zero) {
      using Y = decltype(y_zero);
      const auto* const rows = static_cast<const decltype(x_zero)*>(x);
      if (bias == nullptr) {
        multiply(w, rows, M, 0, gemm::panels(N), gemm::Store<Y>{static_cast<Y*>(y), N, N});
      } else {
        multiply(w, rows, M, 0, gemm::panels(N), gemm::StoreBiased<Y, float>{static_cast<Y*>(y), N, N, bias});
      }
    });
  });
  return 0;
}

// weight [N, K] in float32 as the packed one stands for it.
KL_EXPORT int64_t kl_linear_unpack(int64_t kind, const void* packed, float* weight, int64_t N, int64_t K) {
  const PackedWeight w{packed, kind, N, K};
  const int64_t length = panel_bytes(kind, K);
  parallel_for(gemm::panels(N), [&](int64_t panel) {
    const Scratch<float> values(static_cast<size_t>(round_up(K, 2) * gemm::kPanel));
    const auto* const data = reinterpret_cast<const float*>(static_cast<const char*>(packed) + panel * length);
    if (w.is_integer()) WidenedPanels{w}.fill(panel, 0, K, reinterpret_cast<uint32_t*>(values.get()));
    for (int64_t c = 0; c < std::min<int64_t>(gemm::kPanel, N - panel * gemm::kPanel); ++c) {
      for (int64_t k = 0; k < K; ++k) {
        const float* const at = (w.is_integer() ? values.get() : data) + k * gemm::kPanel + c;
        const auto* const pair = reinterpret_cast<const bf16*>(data) + (k / 2 * gemm::kPanel + c) * 2;
        weight[(panel * gemm::kPanel + c) * K + k] = kind == kWeightBFloat16 ? to_float(pair[k % 2]) : *at;
      }
    }
  });
  return 0;
}
