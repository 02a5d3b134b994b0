// What a kernel needs of the machine, on a Hopper GPU (compute capability 9.0).
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define SIMT_DEVICE __device__ __forceinline__
#define SIMT_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)

namespace simt {

SIMT_DEVICE int thread() { return int(threadIdx.x); }

SIMT_DEVICE int cluster_blocks() {
  uint32_t value;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(value));
  return int(value);
}

SIMT_DEVICE int cluster_rank() {
  uint32_t value;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(value));
  return int(value);
}

SIMT_DEVICE int64_t cluster_index() {
  uint32_t value;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(value));
  return int64_t(value);
}

template <typename T>
SIMT_DEVICE T& shared() {
  __shared__ T storage;
  return storage;
}

SIMT_DEVICE void block_sync() { __syncthreads(); }

// Release and acquire: what a block wrote before its arrival, in global memory too, is seen after the wait.
// Without `.aligned`, which would want every warp converged: threads come here from a branch.
SIMT_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
SIMT_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

SIMT_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Write `value` where `own` points to, but in the shared memory of the block of that rank.
SIMT_DEVICE void store_in_peer(float* own, int rank, float value) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(own));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

// Read once, so kept out of L1. Volatile: the compiler may not read again after the row has been overwritten.
SIMT_DEVICE void load4(const void* address, float (&out)[4]) {
  asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(out[0]), "=f"(out[1]), "=f"(out[2]), "=f"(out[3])
               : "l"(address)
               : "memory");
}

SIMT_DEVICE void store4_bfloat16(void* address, const float (&values)[4]) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(values[0], values[1]);
  const __nv_bfloat162 high = __floats2bfloat162_rn(values[2], values[3]);
  uint2 packed;
  packed.x = *reinterpret_cast<const uint32_t*>(&low);
  packed.y = *reinterpret_cast<const uint32_t*>(&high);
  *reinterpret_cast<uint2*>(address) = packed;
}

SIMT_DEVICE float exponential(float value) { return expf(value); }
SIMT_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
SIMT_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
SIMT_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// Start `clusters` clusters of `blocks` blocks; returns null, or CUDA's words for what is wrong.
template <typename Argument>
const char* launch(void (*kernel)(Argument), const Argument& argument, int64_t clusters, int blocks, int threads,
                   void* stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(blocks);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(clusters * blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, argument);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace simt
