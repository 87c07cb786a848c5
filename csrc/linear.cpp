// The linear layer  y = x weight^T + bias  and its gradients, on contiguous tensors:
//
//   y  [M, N] = x [M, K] weight[N, K]^T + bias [N]
//   dx [M, K] = dy [M, N] weight [N, K]
//   dw [N, K] = dy [M, N]^T x [M, K]
//   db [N]    = sum_m dy [m, :]
//
// The operands of the products are float32, or bfloat16 with float32 sums; a float32 tensor among bfloat16 operands is
// rounded while it is packed.

#include "gemm.h"

using namespace kl;

// op is the type of the operands; x_type, weight_type, y_type are those of the tensors. bias may be null.
KL_EXPORT int64_t kl_linear_forward(const void* x, const void* weight, const float* bias, void* y, int64_t M, int64_t N,
                                    int64_t K, int64_t op, int64_t x_type, int64_t weight_type, int64_t y_type) {
  dispatch(op, [&](auto op_zero) {
    dispatch(x_type, [&](auto x_zero) {
      dispatch(weight_type, [&](auto weight_zero) {
        dispatch(y_type, [&](auto y_zero) {
          using Op = decltype(op_zero);
          using X = decltype(x_zero);
          using W = decltype(weight_zero);
          using Y = decltype(y_zero);
          const gemm::Matrix<X> a{static_cast<const X*>(x), K};
          const gemm::Matrix<W> b{static_cast<const W*>(weight), K};
          const auto run = [&](const auto& epilogue) {
            gemm::gemm<Op>(a, gemm::Along::kRow, b, gemm::Along::kRow, M, N, K, epilogue);
          };
          if (bias == nullptr) {
            run(gemm::Store<Y>{static_cast<Y*>(y), N, N});
          } else {
            run(gemm::StoreBiased<Y, float>{static_cast<Y*>(y), N, N, bias});
          }
        });
      });
    });
  });
  return 0;
}

// dx from dy and weight.
KL_EXPORT int64_t kl_linear_backward_x(const void* dy, const void* weight, void* dx, int64_t M, int64_t N, int64_t K,
                                       int64_t op, int64_t dy_type, int64_t weight_type, int64_t dx_type) {
  dispatch(op, [&](auto op_zero) {
    dispatch(dy_type, [&](auto dy_zero) {
      dispatch(weight_type, [&](auto weight_zero) {
        dispatch(dx_type, [&](auto dx_zero) {
          using Op = decltype(op_zero);
          using DY = decltype(dy_zero);
          using W = decltype(weight_zero);
          using DX = decltype(dx_zero);
          gemm::gemm<Op>(gemm::Matrix<DY>{static_cast<const DY*>(dy), N}, gemm::Along::kRow,
                         gemm::Matrix<W>{static_cast<const W*>(weight), K}, gemm::Along::kColumn, M, K, N,
                         gemm::Store<DX>{static_cast<DX*>(dx), K, K});
        });
      });
    });
  });
  return 0;
}

// dw from dy and x.
KL_EXPORT int64_t kl_linear_backward_weight(const void* dy, const void* x, void* dw, int64_t M, int64_t N, int64_t K,
                                            int64_t op, int64_t dy_type, int64_t x_type, int64_t dw_type) {
  dispatch(op, [&](auto op_zero) {
    dispatch(dy_type, [&](auto dy_zero) {
      dispatch(x_type, [&](auto x_zero) {
        dispatch(dw_type, [&](auto dw_zero) {
          using Op = decltype(op_zero);
          using DY = decltype(dy_zero);
          using X = decltype(x_zero);
          using DW = decltype(dw_zero);
          gemm::gemm<Op>(gemm::Matrix<DY>{static_cast<const DY*>(dy), N}, gemm::Along::kColumn,
                         gemm::Matrix<X>{static_cast<const X*>(x), K}, gemm::Along::kColumn, N, K, M,
                         gemm::Store<DW>{static_cast<DW*>(dw), K, K});
        });
      });
    });
  });
  return 0;
}

// db [N], float32, from dy: every column one chain over the rows.
KL_EXPORT int64_t kl_linear_backward_bias(const void* dy, float* db, int64_t M, int64_t N, int64_t dy_type) {
  dispatch(dy_type, [&](auto zero) {
    using T = decltype(zero);
    const T* const rows = static_cast<const T*>(dy);
    parallel_ranges(N, 4 * kLanes, [&](int64_t begin, int64_t end) {
      std::fill(db + begin, db + end, 0.0f);
      for (int64_t m = 0; m < M; ++m) {
        for_lanes(end - begin, [&](int64_t i, int lanes) {
          store_lanes(db + begin + i, load_lanes(db + begin + i, lanes) + load_lanes(rows + m * N + begin + i, lanes), lanes);
        });
      }
    });
  });
  return 0;
}
