// The three products of the fused head on bfloat16 operands with float32 sums, by cuBLAS. Row-major matrices.
#pragma once

#include <cstdint>

namespace klear {

// A head of C tokens, H hidden, V words. `rows` is the [C, stride] float32 buffer of the row pass; once exponentials
// stand in it, they are a [C, V] bfloat16 matrix with a stride of 2 * stride elements.
struct HeadShape {
  int tokens;
  int hidden_size;
  int words;
  int64_t stride;
};

// Each returns null, or what is wrong. `handle` is a cublasHandle_t whose stream is set.

// rows = scale * hidden @ weight^T; hidden [C, H] and weight [V, H] in bfloat16.
const char* logits_product(void* handle, const HeadShape& shape, const void* hidden, const void* weight, float scale,
                           float* rows);

// out = exponentials @ weight; out [C, H] in float32.
const char* hidden_product(void* handle, const HeadShape& shape, const void* exponentials, const void* weight,
                           float* out);

// gradient += exponentials^T @ scaled_hidden; gradient [V, H] in float32, scaled_hidden [C, H] in bfloat16.
const char* add_weight_product(void* handle, const HeadShape& shape, const void* exponentials,
                               const void* scaled_hidden, float* gradient);

}  // namespace klear
