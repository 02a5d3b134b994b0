// Runs a kernel on a CPU, one fiber per GPU thread, so that its very source can be tested without a GPU.
//
// Stands in for csrc/device/simt.cuh. Clusters run one after another; the threads of a cluster take turns, each running
// until it waits. Barriers and shuffles want the threads that the hardware wants; where all wait and none can go on,
// `launch` says so. What it cannot show: timing, memory ordering between barriers, the hardware's rounding of exp.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#define SIMT_DEVICE inline
#define SIMT_KERNEL(threads, blocks)

namespace simt {

constexpr int kWarpThreads = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = 8 << 10;

struct Barrier {
  int wanted = 0, arrived = 0;
  int64_t generation = 0;
  int64_t arrive() {
    const int64_t mine = generation;
    if (++arrived == wanted) {
      arrived = 0;
      ++generation;
    }
    return mine;
  }
};

// Entered once through `context`; from then on by _setjmp and _longjmp, which make no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  int block = 0, thread = 0;
  bool done = false;
  const Barrier* waits_for = nullptr;
  int64_t generation = 0;
  int64_t cluster_generation = 0;
};

struct Cluster {
  int64_t index = 0;
  int blocks = 0, threads = 0;
  Barrier cluster;
  std::vector<Barrier> block, warp;
  std::vector<std::vector<char>> shared;
  std::vector<float> exchange;  // one slot per thread
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  std::function<void()> body;
};

inline Cluster*& running() {
  static Cluster* cluster = nullptr;
  return cluster;
}

inline void suspend(Fiber& fiber) {
  if (_setjmp(fiber.jump) == 0) _longjmp(running()->scheduler, 1);
}

inline void resume(Fiber& fiber) {
  running()->current = &fiber;
  if (_setjmp(running()->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void wait(const Barrier& barrier, int64_t generation) {
  Fiber* fiber = running()->current;
  while (barrier.generation == generation) {
    fiber->waits_for = &barrier;
    fiber->generation = generation;
    suspend(*fiber);
  }
  fiber->waits_for = nullptr;
}

inline int thread() { return running()->current->thread; }
inline int cluster_blocks() { return running()->blocks; }
inline int cluster_rank() { return running()->current->block; }
inline int64_t cluster_index() { return running()->index; }

template <typename T>
T& shared() {
  static_assert(sizeof(T) <= kSharedBytes);
  return *reinterpret_cast<T*>(running()->shared[cluster_rank()].data());
}

inline void block_sync() {
  Barrier& barrier = running()->block[cluster_rank()];
  wait(barrier, barrier.arrive());
}

inline void cluster_arrive() { running()->current->cluster_generation = running()->cluster.arrive(); }
inline void cluster_wait() { wait(running()->cluster, running()->current->cluster_generation); }

inline float shuffle_xor(float value, int mask) {
  Cluster& cluster = *running();
  const int slot = cluster_rank() * cluster.threads + thread();
  Barrier& barrier = cluster.warp[slot / kWarpThreads];
  cluster.exchange[slot] = value;
  wait(barrier, barrier.arrive());
  const float other = cluster.exchange[slot ^ mask];
  wait(barrier, barrier.arrive());
  return other;
}

inline void store_in_peer(float* own, int rank, float value) {
  const auto offset = reinterpret_cast<char*>(own) - running()->shared[cluster_rank()].data();
  std::memcpy(running()->shared.at(rank).data() + offset, &value, sizeof(value));
}

inline void load4(const void* address, float (&out)[4]) { std::memcpy(out, address, sizeof(out)); }

inline uint16_t bfloat16(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store4_bfloat16(void* address, const float (&values)[4]) {
  uint16_t packed[4];
  for (int i = 0; i < 4; ++i) packed[i] = bfloat16(values[i]);
  std::memcpy(address, packed, sizeof(packed));
}

inline float exponential(float value) { return std::exp(value); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline int smaller(int a, int b) { return a < b ? a : b; }
inline float infinity() { return std::numeric_limits<float>::infinity(); }

inline void enter() {
  running()->body();
  running()->current->done = true;
  suspend(*running()->current);
}

// Let every thread run until all are done; false where all wait and none can go on.
inline bool run(Cluster& cluster) {
  for (;;) {
    bool all_done = true, moved = false;
    for (Fiber& fiber : cluster.fibers) {
      if (fiber.done) continue;
      all_done = false;
      if (fiber.waits_for != nullptr && fiber.waits_for->generation == fiber.generation) continue;
      moved = true;
      resume(fiber);
    }
    if (all_done) return true;
    if (!moved) return false;
  }
}

template <typename Argument>
const char* launch(void (*kernel)(Argument), const Argument& argument, int64_t clusters, int blocks, int threads, void*) {
  const int all = blocks * threads;
  const std::unique_ptr<char[]> stacks(new char[size_t(all) * kStackBytes]);
  for (int64_t index = 0; index < clusters; ++index) {
    Cluster cluster;
    cluster.index = index;
    cluster.blocks = blocks;
    cluster.threads = threads;
    cluster.cluster.wanted = all;
    cluster.block.resize(blocks);
    for (Barrier& barrier : cluster.block) barrier.wanted = threads;
    cluster.warp.resize(all / kWarpThreads);
    for (Barrier& barrier : cluster.warp) barrier.wanted = kWarpThreads;
    // 0xff: whatever is read before it is written is a NaN.
    cluster.shared.assign(blocks, std::vector<char>(kSharedBytes, char(0xff)));
    cluster.exchange.resize(all);
    cluster.fibers.resize(all);
    cluster.body = [&] { kernel(argument); };
    running() = &cluster;
    for (int i = 0; i < all; ++i) {
      Fiber& fiber = cluster.fibers[i];
      // The last block first, so that nothing works only because block 0 starts first.
      fiber.block = blocks - 1 - i / threads;
      fiber.thread = i % threads;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks.get() + size_t(i) * kStackBytes;
      fiber.context.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.context, enter, 0);
    }
    if (!run(cluster)) return "every thread waits at a barrier that the others have not reached";
  }
  return nullptr;
}

}  // namespace simt
