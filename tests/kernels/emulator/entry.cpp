// The launchers behind a C interface for ctypes, and a plain loop in the place of cuBLAS's product.

#include <cublas_v2.h>

#include <cstring>

#include "products.h"
#include "row_pass.h"

namespace {

cublasMath_t math_mode = CUBLAS_DEFAULT_MATH;

float widened(const void* data, int64_t index) {
  uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  *mode = math_mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t mode) {
  math_mode = mode;
  return CUBLAS_STATUS_SUCCESS;
}

const char* cublasGetStatusString(cublasStatus_t) { return "invalid value"; }

// As documented: C = alpha op(A) op(B) + beta C, column-major; C is not read where beta is 0.
cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
                            const void* alpha, const void* A, cudaDataType Atype, int lda, const void* B,
                            cudaDataType Btype, int ldb, const void* beta, void* C, cudaDataType Ctype, int ldc,
                            cublasComputeType_t, cublasGemmAlgo_t) {
  const bool fits = lda >= (transa == CUBLAS_OP_N ? m : k) && ldb >= (transb == CUBLAS_OP_N ? k : n) && ldc >= m;
  const bool types = Atype == CUDA_R_16BF && Btype == CUDA_R_16BF && Ctype == CUDA_R_32F;
  const bool exact = math_mode == CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
  if (!fits || !types || !exact) return CUBLAS_STATUS_INVALID_VALUE;
  const float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0.0;
      for (int64_t p = 0; p < k; ++p) {
        sum += double(widened(A, transa == CUBLAS_OP_N ? i + p * lda : p + i * lda)) *
               widened(B, transb == CUBLAS_OP_N ? p + j * ldb : j + p * ldb);
      }
      float& out = static_cast<float*>(C)[i + j * ldc];
      out = float(scale * sum) + (keep == 0.0f ? 0.0f : keep * out);
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}

extern "C" {

int row_pass_blocks(int words) { return klear::row_pass_blocks(words); }

const char* row_pass(void* rows, int64_t stride, int64_t num_rows, int words, const int64_t* labels, float* row_max,
                     float* label_gap, float* partials, int write) {
  return klear::launch_row_pass({rows, stride, num_rows, words, labels, row_max, label_gap, partials, write != 0},
                                nullptr);
}

const char* logits_product(int tokens, int hidden_size, int words, int64_t stride, const void* hidden,
                           const void* weight, float scale, float* rows) {
  return klear::logits_product(nullptr, {tokens, hidden_size, words, stride}, hidden, weight, scale, rows);
}

const char* hidden_product(int tokens, int hidden_size, int words, int64_t stride, const void* exponentials,
                           const void* weight, float* out) {
  return klear::hidden_product(nullptr, {tokens, hidden_size, words, stride}, exponentials, weight, out);
}

const char* add_weight_product(int tokens, int hidden_size, int words, int64_t stride, const void* exponentials,
                               const void* scaled_hidden, float* gradient) {
  return klear::add_weight_product(nullptr, {tokens, hidden_size, words, stride}, exponentials, scaled_hidden,
                                   gradient);
}

}  // extern "C"
