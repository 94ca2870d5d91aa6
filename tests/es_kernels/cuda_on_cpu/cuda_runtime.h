// As much of CUDA as csrc/cuda.cu uses, so that g++ builds it into a library that runs its kernels on the CPU: one
// device (or as many as a test says) of 3 multiprocessors, whose memory is the host's. What that shows: which thread
// touches which element in which order, masks, tiles, the walk over segments, barriers, calls of the runtime. What it
// cannot show: PTX and SASS, speed, memory ordering.
//
// A block's threads are fibers. They run one after the other from barrier to barrier, forwards and backwards in turn,
// so that what depends on their order gives two results. A barrier that some threads reach and others do not aborts.
#pragma once
#define __CUDACC__  // lanes.h: one lane
#define __CUDA_ARCH_LIST__ 800
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <xmmintrin.h>

#include <functional>
#include <memory>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

struct uint3 {
  unsigned x, y, z;
};
typedef uint3 dim3;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// ---- a grid of blocks of fibers ----

namespace cuda_on_cpu {

inline uint3 thread_index, block_index, grid_dimension;

class Block {
 public:
  static Block* current;

  Block(unsigned n, std::function<void()> body) : fibers(n), body(std::move(body)) {
    current = this;
    for (unsigned i = 0; i < n; i++) {
      Fiber& f = fibers[i];
      f.stack.reset(new char[kStack]);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = kStack, f.context.uc_link = &scheduler;
      makecontext(&f.context, enter, 0);
    }
    bool backwards = false;
    for (unsigned running = n; running; backwards = !backwards) {
      unsigned ended = 0;
      for (unsigned i = 0; i < n; i++) {
        thread_index = {backwards ? n - 1 - i : i, 0, 0};
        swapcontext(&scheduler, &fibers[thread_index.x].context);
        ended += fibers[thread_index.x].ended;
      }
      if (ended && ended < running)
        fprintf(stderr, "%u of %u threads reached a barrier\n", running - ended, running), abort();
      running -= ended;
    }
  }

  void barrier() { swapcontext(&fibers[thread_index.x].context, &scheduler); }

  uint64_t exchange(uint64_t value, unsigned with) {
    fibers[thread_index.x].exchanged = value;
    barrier();
    value = fibers[with].exchanged;
    barrier();
    return value;
  }

 private:
  static constexpr size_t kStack = 1 << 17;
  struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    uint64_t exchanged;
    bool ended = false;
  };
  static void enter() {
    current->body();
    current->fibers[thread_index.x].ended = true;
  }
  std::vector<Fiber> fibers;
  std::function<void()> body;
  ucontext_t scheduler;
};
inline Block* Block::current;

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define gridDim cuda_on_cpu::grid_dimension

inline void __syncthreads() { cuda_on_cpu::Block::current->barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return (T)cuda_on_cpu::Block::current->exchange((uint64_t)value, threadIdx.x ^ mask);
}

template <class T, class U>
void atomicAdd(T* p, U value) {
  *p += value;
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= (uint32_t)(uint8_t)(bytes >> 8 * (selector >> 4 * i & 7)) << 8 * i;
  return result;
}

// ---- the runtime ----

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
typedef void* cudaStream_t;

// What tests set, and what they look at: test_cuda_on_cpu.py.
struct CudaOnCpu {
  int devices, multiprocessors, current_device;
  int set_device_calls, device_of_launch;
  int64_t grid_of_launch;
};
extern "C" __attribute__((visibility("default"), used)) inline CudaOnCpu cuda_on_cpu_state = {1, 3, 0, 0, -1, 0};

inline const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t) { return "no description"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_on_cpu_state.current_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  cuda_on_cpu_state.set_device_calls++;
  if (device < 0 || device >= cuda_on_cpu_state.devices) return cudaErrorInvalidDevice;
  cuda_on_cpu_state.current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = cuda_on_cpu_state.devices, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = cuda_on_cpu_state.multiprocessors, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

namespace cuda_on_cpu {
template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(A*)arguments[I]...);
}
}  // namespace cuda_on_cpu

template <class... A>
cudaError_t cudaLaunchKernel(void (*kernel)(A...), unsigned grid, unsigned threads, void** arguments, size_t,
                             cudaStream_t) {
  const unsigned state = _mm_getcsr();
  _mm_setcsr(0x1F80);  // a GPU knows nothing of the host's flush to zero
  gridDim = {grid, 1, 1};
  cuda_on_cpu_state.grid_of_launch = grid, cuda_on_cpu_state.device_of_launch = cuda_on_cpu_state.current_device;
  for (unsigned b = 0; b < grid; b++) {
    blockIdx = {b, 0, 0};
    cuda_on_cpu::Block(threads, [=] { cuda_on_cpu::call(kernel, arguments, std::index_sequence_for<A...>()); });
  }
  _mm_setcsr(state);
  return cudaSuccess;
}
