// cuBLAS thinks in columns: a row-major [A, B] matrix is its [B, A], and a row-major product L @ R its R' @ L'.

#include "products.h"

#include <cublas_v2.h>

namespace klear {
namespace {

// Partial sums of a product that is split over its inner dimension stay in float32 too.
class ExactReductions {
 public:
  explicit ExactReductions(cublasHandle_t handle) : handle_(handle) {
    cublasGetMathMode(handle_, &before_);
    cublasSetMathMode(handle_, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH |
                                                         CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
  }
  ~ExactReductions() { cublasSetMathMode(handle_, before_); }
  ExactReductions(const ExactReductions&) = delete;
  ExactReductions& operator=(const ExactReductions&) = delete;

 private:
  cublasHandle_t handle_;
  cublasMath_t before_ = CUBLAS_DEFAULT_MATH;
};

struct Operand {
  const void* data;
  cublasOperation_t operation;
  int64_t stride;
};

// out[rows, columns] = scale * left @ right + keep * out, all column-major.
const char* product(void* handle, int rows, int columns, int inner, float scale, const Operand& left,
                    const Operand& right, float keep, float* out, int64_t stride) {
  if (rows == 0 || columns == 0) return nullptr;
  const auto blas = static_cast<cublasHandle_t>(handle);
  const ExactReductions exact(blas);
  const cublasStatus_t status = cublasGemmEx(
      blas, left.operation, right.operation, rows, columns, inner, &scale, left.data, CUDA_R_16BF, int(left.stride),
      right.data, CUDA_R_16BF, int(right.stride), &keep, out, CUDA_R_32F, int(stride), CUBLAS_COMPUTE_32F,
      CUBLAS_GEMM_DEFAULT);
  return status == CUBLAS_STATUS_SUCCESS ? nullptr : cublasGetStatusString(status);
}

}  // namespace

const char* logits_product(void* handle, const HeadShape& shape, const void* hidden, const void* weight, float scale,
                           float* rows) {
  return product(handle, shape.words, shape.tokens, shape.hidden_size, scale,
                 {weight, CUBLAS_OP_T, shape.hidden_size}, {hidden, CUBLAS_OP_N, shape.hidden_size}, 0.0f, rows,
                 shape.stride);
}

const char* hidden_product(void* handle, const HeadShape& shape, const void* exponentials, const void* weight,
                           float* out) {
  return product(handle, shape.hidden_size, shape.tokens, shape.words, 1.0f,
                 {weight, CUBLAS_OP_N, shape.hidden_size}, {exponentials, CUBLAS_OP_N, 2 * shape.stride}, 0.0f, out,
                 shape.hidden_size);
}

const char* add_weight_product(void* handle, const HeadShape& shape, const void* exponentials,
                               const void* scaled_hidden, float* gradient) {
  return product(handle, shape.hidden_size, shape.words, shape.tokens, 1.0f,
                 {scaled_hidden, CUBLAS_OP_N, shape.hidden_size}, {exponentials, CUBLAS_OP_T, 2 * shape.stride}, 1.0f,
                 gradient, shape.hidden_size);
}

}  // namespace klear
