// One row of logits is read from memory once, kept in the registers of up to eight thread blocks while its maximum
// and its sums are found, and written back once, as bfloat16 exponentials over its own first half.
//
// The blocks of a row form a Hopper thread block cluster. Each pushes its maximum into the shared memory of all of
// them, and one cluster barrier later every thread knows the maximum of the row. The same barrier says that the
// whole row has been read, so that it may be overwritten. Sums leave per block; the caller adds the few of a row.
//
// The file is free of torch, and of CUDA but for <simt.cuh>, which has a stand-in that runs kernels on a CPU.

#include "row_pass.h"

#include <simt.cuh>

namespace klear {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

struct Shared {
  float warp_max[kWarps];
  float block_max[kMaxBlocks];  // written by the blocks of the cluster, each its own entry
  float warp_sums[kWarps][kPartials];
};

SIMT_DEVICE float warp_max(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = simt::larger(value, simt::shuffle_xor(value, mask));
  return value;
}

SIMT_DEVICE float warp_sum(float value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += simt::shuffle_xor(value, mask);
  return value;
}

// kVectors: groups of four words that a thread holds. Two blocks fit a multiprocessor: one loads while one computes.
template <int kVectors, bool kWrite>
SIMT_KERNEL(kThreads, 2)
void row_pass(RowPass pass) {
  const int thread = simt::thread(), warp = thread / kWarp, lane = thread % kWarp;
  const int blocks = simt::cluster_blocks(), block = simt::cluster_rank();
  const int64_t row = simt::cluster_index();
  Shared& shared = simt::shared<Shared>();
  // A block's shared memory may be written from outside only after it has started.
  simt::cluster_arrive();

  char* address = static_cast<char*>(pass.rows) + row * pass.stride * int64_t(sizeof(float));
  const int vectors = (pass.words + 3) / 4, per_block = (vectors + blocks - 1) / blocks;
  const int first = block * per_block + thread;
  const int last = simt::smaller(vectors, (block + 1) * per_block);

  float z[kVectors][4];
  float top = -simt::infinity();
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int vector = first + k * kThreads;
    if (vector < last) {
      simt::load4(address + int64_t(vector) * 16, z[k]);
    } else {
      for (int i = 0; i < 4; ++i) z[k][i] = -simt::infinity();
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((first + k * kThreads) * 4 + i >= pass.words) z[k][i] = -simt::infinity();
      top = simt::larger(top, z[k][i]);
    }
  }
  top = warp_max(top);
  if (lane == 0) shared.warp_max[warp] = top;
  simt::block_sync();
  simt::cluster_wait();
  if (thread < blocks) {
    float largest = shared.warp_max[0];
    for (int w = 1; w < kWarps; ++w) largest = simt::larger(largest, shared.warp_max[w]);
    simt::store_in_peer(&shared.block_max[block], thread, largest);
  }
  simt::cluster_arrive();
  simt::cluster_wait();
  float m = shared.block_max[0];
  for (int b = 1; b < blocks; ++b) m = simt::larger(m, shared.block_max[b]);

  const int64_t label = pass.labels[row];
  float sums[kPartials] = {0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int vector = first + k * kThreads;
    if (vector >= last) continue;
    float exponentials[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = vector * 4 + i;
      const float gap = z[k][i] - m;
      const bool is_top = z[k][i] == m && column < pass.words;
      const float e = is_top ? 1.0f : simt::exponential(gap);
      exponentials[i] = e;
      sums[kCount] += is_top ? 1.0f : 0.0f;
      sums[kRest] += is_top ? 0.0f : e;  // NaN included, so that it is seen
      sums[kWeighted] += e > 0.0f ? e * gap : 0.0f;
      if (column == label) pass.label_gap[row] = gap;
    }
    if (kWrite) simt::store4_bfloat16(address + int64_t(vector) * 8, exponentials);
  }

  for (int s = 0; s < kPartials; ++s) {
    sums[s] = warp_sum(sums[s]);
    if (lane == 0) shared.warp_sums[warp][s] = sums[s];
  }
  simt::block_sync();
  if (thread < kPartials) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += shared.warp_sums[w][thread];
    pass.partials[(row * blocks + block) * kPartials + thread] = sum;
  }
  if (block == 0 && thread == 0) {
    pass.row_max[row] = m;
    if (label < 0 || label >= pass.words) pass.label_gap[row] = 0.0f;
  }
}

template <int kVectors>
const char* launch(const RowPass& pass, int blocks, void* stream) {
  return pass.write ? simt::launch(&row_pass<kVectors, true>, pass, pass.num_rows, blocks, kThreads, stream)
                    : simt::launch(&row_pass<kVectors, false>, pass, pass.num_rows, blocks, kThreads, stream);
}

}  // namespace

int row_pass_blocks(int words) {
  if (words < 1) return 0;
  for (int blocks = 1; blocks <= kMaxBlocks; blocks *= 2) {
    if (((words + 3) / 4 + blocks - 1) / blocks <= kMaxVectors * kThreads) return blocks;
  }
  return 0;
}

const char* launch_row_pass(const RowPass& pass, void* stream) {
  const int blocks = row_pass_blocks(pass.words);
  if (blocks == 0) return "words: the row pass takes 1 to 163,840 in a shard";
  if (pass.stride % 4 != 0 || pass.stride < pass.words) return "stride: must be a multiple of 4 and hold the words";
  if (reinterpret_cast<uintptr_t>(pass.rows) % 16 != 0) return "rows: must be 16-byte aligned";
  if (pass.num_rows * blocks > INT32_MAX) return "rows: too many for one launch";
  if (pass.num_rows == 0) return nullptr;
  const int per_block = ((pass.words + 3) / 4 + blocks - 1) / blocks;
  const int vectors = (per_block + kThreads - 1) / kThreads;
  if (vectors <= 2) return launch<2>(pass, blocks, stream);
  if (vectors <= 4) return launch<4>(pass, blocks, stream);
  if (vectors <= 6) return launch<6>(pass, blocks, stream);
  if (vectors <= 8) return launch<8>(pass, blocks, stream);
  return launch<kMaxVectors>(pass, blocks, stream);
}

}  // namespace klear
