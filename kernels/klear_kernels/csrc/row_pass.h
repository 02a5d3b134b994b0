// The row pass: what lies between the products of the fused head. See row_pass.cu.
#pragma once

#include <cstdint>

namespace klear {

// Words per thread block is kMaxVectors * 4 * kThreads at most, thread blocks per row (a cluster) 8 at most.
constexpr int kThreads = 512;
constexpr int kMaxVectors = 10;
constexpr int kMaxBlocks = 8;
constexpr int kMaxWords = kMaxBlocks * kMaxVectors * 4 * kThreads;  // 163,840

// Columns of `partials`.
constexpr int kRest = 0;      // sum of exp(z - m) over words below the maximum
constexpr int kCount = 1;     // words that reach the maximum
constexpr int kWeighted = 2;  // sum of exp(z - m) (z - m)
constexpr int kPartials = 3;

// Logits z of C rows, and what is written of them. All addresses are in device memory.
struct RowPass {
  // [C, stride] float32, 16-byte aligned, stride a multiple of 4. Where `write` is set, row i becomes
  // exp(z - m) in bfloat16, from the same address on: a [C, words] matrix whose stride is 2 * stride elements.
  void* rows;
  int64_t stride;
  int64_t num_rows;
  int words;              // columns that are words; the padding up to the stride is never read as a logit
  const int64_t* labels;  // [C] column of each row's label, or a negative number where it is not in this shard
  float* row_max;         // [C] m, the largest logit of the shard
  float* label_gap;       // [C] z_label - m; 0 where the label is not in this shard
  float* partials;        // [C, row_pass_blocks(words), kPartials]
  bool write;
};

// Thread blocks per row, or 0 where a row has too many words.
int row_pass_blocks(int words);

// Starts the pass on `stream` (a cudaStream_t); returns null, or what is wrong.
const char* launch_row_pass(const RowPass& pass, void* stream);

}  // namespace klear
