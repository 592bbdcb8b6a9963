// Runs the CUDA sources on the CPU: stands in for cuda_runtime.h when g++ compiles csrc/cuda/*.cu, unchanged, as C++.
//
// Blocks run one after another. The threads of a block are fibers that run until they meet a barrier (__syncthreads) or a warp operation
// (__shfl_xor_sync), and go on when all of their block or warp are there. A barrier that some threads never reach stops the program, with
// a message. An asynchronous copy takes place when it is waited for, no sooner. Shared memory and the workspace hold NaN at first. So this checks
// indices, masks, barriers, waiting and numerics; not memory ordering, not speed. The L2 is that of an H200, or as large as EMULATED_L2 says.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace normops {
alignas(16) inline double shared_memory[12672];  // 99 KiB, what a block may ask for on every GPU since sm_80
inline float exp2_(float t) { return std::exp2(t); }
inline float reciprocal(float t) { return 1 / t; }
template <int BYTES>
void copy_ahead(void* to, const void* from, bool);
inline void end_group();
template <int N>
void wait_for_groups();
}  // namespace normops

using std::isfinite;

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
template <typename Word>
void __stwb(Word* p, Word value) {
  *p = value;
}
template <typename Word>
void __stcs(Word* p, Word value) {
  *p = value;
}

namespace emulation {

constexpr unsigned kMaxThreads = 256;
enum class State { absent, running, at_block, at_warp, done };
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
struct Fiber {
  jmp_buf at;
  State state;
  std::deque<std::vector<Copy>> groups{1};  // of copies that nobody has waited for; the last one is open
  char stack[64 << 10];
};
inline std::vector<Fiber> fibers(kMaxThreads);
inline jmp_buf scheduler;
inline std::function<void()> body;
alignas(8) inline char exchanged[kMaxThreads][8];
inline bool vote, voted;
inline size_t granted = 40 << 10;  // dynamic shared memory that the next launch may have; beside it there may be 8 KiB of static

// back to the scheduler, until the state is `running` again
inline void wait(State state) {
  Fiber& self = fibers[threadIdx.x];
  self.state = state;
  if (!_setjmp(self.at)) _longjmp(scheduler, 1);
}

inline void live() {
  for (;;) {
    body();
    fibers[threadIdx.x].groups.assign(1, {});
    wait(State::done);
  }
}

// lets a thread run until it waits
inline void resume(unsigned t) {
  threadIdx.x = t;
  if (_setjmp(scheduler)) return;
  if (fibers[t].state != State::absent) _longjmp(fibers[t].at, 1);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibers[t].stack;
  context.uc_stack.ss_size = sizeof(fibers[t].stack);
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

// lets the threads from `begin` to `end` go on if all of them are in `state`
inline bool release(unsigned begin, unsigned end, State state) {
  for (unsigned t = begin; t < end; t++) {
    if (fibers[t].state != state) return false;
  }
  for (unsigned t = begin; t < end; t++) fibers[t].state = State::running;
  return true;
}

inline bool finished(unsigned threads) {
  for (unsigned t = 0; t < threads; t++) {
    if (fibers[t].state != State::done) return false;
  }
  return true;
}

inline void block() {
  const unsigned threads = blockDim.x;
  for (unsigned t = 0; t < threads; t++) resume(t);
  for (;;) {
    bool released = false;
    for (unsigned t = 0; t < threads; t += 32) released |= release(t, t + 32, State::at_warp);
    if (!released && finished(threads)) return;
    if (!released && release(0, threads, State::at_block)) {
      released = true;
      voted = vote;
      vote = false;
    }
    if (!released) {
      std::fprintf(stderr, "emulation: not all threads of a warp or block reach the same barrier\n");
      std::abort();
    }
    for (unsigned t = 0; t < threads; t++) {
      if (fibers[t].state == State::running) resume(t);
    }
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::at_block); }

inline int __syncthreads_or(int predicate) {
  emulation::vote |= predicate != 0;
  __syncthreads();
  const int result = emulation::voted;
  __syncthreads();
  return result;
}

template <typename A>
A __shfl_xor_sync(unsigned, A value, int offset) {
  std::memcpy(emulation::exchanged[threadIdx.x], &value, sizeof(A));
  emulation::wait(emulation::State::at_warp);
  std::memcpy(&value, emulation::exchanged[threadIdx.x ^ offset], sizeof(A));
  emulation::wait(emulation::State::at_warp);
  return value;
}

template <int BYTES>
void normops::copy_ahead(void* to, const void* from, bool) {
  emulation::fibers[threadIdx.x].groups.back().push_back({to, from, BYTES});
}

inline void normops::end_group() { emulation::fibers[threadIdx.x].groups.emplace_back(); }

template <int N>
void normops::wait_for_groups() {
  auto& groups = emulation::fibers[threadIdx.x].groups;
  for (; groups.size() > N + 1; groups.pop_front()) {
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

using cudaError_t = int;
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return 0; }

enum cudaDeviceAttr { cudaDevAttrL2CacheSize, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* cache = std::getenv("EMULATED_L2");
  *value = attribute != cudaDevAttrL2CacheSize ? sizeof(normops::shared_memory) : cache ? std::atoi(cache) : 60 << 20;
  return 0;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  emulation::granted = static_cast<size_t>(bytes);
  return 0;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

extern "C" {
inline __attribute__((visibility("default"))) int emulated_launches = 0;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const size_t granted = std::min(std::exchange(emulation::granted, 40 << 10), sizeof(normops::shared_memory));
  if (config->dynamicSmemBytes > granted || config->blockDim.x % 32 || config->blockDim.x > emulation::kMaxThreads) return 1;
  emulated_launches++;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulation::body = [&] { kernel(arguments...); };
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
      std::memset(normops::shared_memory, 0xff, sizeof(normops::shared_memory));
      emulation::block();
    }
  }
  return 0;
}

// what torch has for CUDA only, and for tensors on a GPU; and a workspace full of NaN
extern "C" {
inline AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t type, int32_t device,
                                        AtenTensorHandle* made) {
  static const auto torchs = reinterpret_cast<decltype(&aoti_torch_empty_strided)>(dlsym(RTLD_NEXT, "aoti_torch_empty_strided"));
  const AOTITorchError error = torchs(ndim, sizes, strides, dtype, type, device, made);
  void* data = nullptr;
  int64_t bytes = 0;
  if (error || aoti_torch_get_data_ptr(*made, &data) || aoti_torch_get_storage_size(*made, &bytes)) return 1;
  if (bytes) std::memset(data, 0xff, static_cast<size_t>(bytes));
  return 0;
}
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
inline AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
inline AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = error ? strdup("emulation: bad launch") : nullptr;
  return 0;
}
inline void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }
}
