// Norms on the GPU: types, sums and moments for the kernels. n = elements that share a statistic, D = C/G channels of a group, S positions.
//
//   moments   K = first element; hi = K + mean(x - K); lo = mean(x - hi); M2 = sum (x - hi)^2 - n*lo^2; sets merge by Chan, in a fixed order
//   forward   x_hat = fma(x - mean, rstd, -mean_lo*rstd)     t = x_hat*weight + bias (+ residual)     y = act(t)
//   backward  dt = dy*act'(t)     P, Q = sum of weight*dt, weight*dt*x_hat over what shares the statistic
//             dx = (rstd*weight)*dt + c2*x_hat + c3       c2 = -rstd*Q/n       c3 = -rstd*P/n       dresidual = dt
//   Not centered (RMS): hi = lo = c3 = 0. Given statistics: c2 = c3 = 0, or from given means P/n, Q/n.
//
// groups.cuh has a statistic for all positions of D channels, rows.cuh one for each position. A thread reads and writes V neighbours at a time
// (16 bytes, 8 across rows of 16 bits, or V = 1). Sums run in an order that depends on the shape alone: no atomics, the same bits on every run.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace normops {

#ifdef __CUDACC__  // one instruction each, to 2 ulp; subnormal numbers count as zero
__device__ __forceinline__ float exp2_(float t) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
}
__device__ __forceinline__ float reciprocal(float t) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
}

// Copies of 4, 8 or 16 bytes from global to shared memory that a thread does not wait for, until it waits for all groups but the last N.
template <int BYTES>
__device__ __forceinline__ void copy_ahead(void* to, const void* from, bool kept) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  uint64_t policy;
  if (kept) {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  }
  asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(BYTES), "l"(policy) : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif
__device__ __forceinline__ float exp_(float t) { return expf(t); }
__device__ __forceinline__ double exp_(double t) { return exp(t); }
__device__ __forceinline__ float tanh_(float t) { return tanhf(t); }
__device__ __forceinline__ double tanh_(double t) { return tanh(t); }
__device__ __forceinline__ float logistic_(float t) { return reciprocal(1.0f + exp2_(-1.4426950408889634f * t)); }
__device__ __forceinline__ double logistic_(double t) { return 1.0 / (1.0 + exp(-t)); }
__device__ __forceinline__ float erf_(float t, float) { return erff(t); }
__device__ __forceinline__ double erf_(double t, double) { return erf(t); }
__device__ __forceinline__ float fma_(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma_(double a, double b, double c) { return fma(a, b, c); }

}  // namespace normops

#include "../algebra.h"

namespace normops {

using c10::BFloat16;
using c10::Half;
using torch::headeronly::ScalarType;

constexpr int kThreads = 256;
constexpr int kResident = 2;  // blocks that an SM has room for: 128 registers a thread; left alone, ptxas spills to get below
constexpr int kAhead = 4, kAheadBackward = 3;  // vectors of each tensor that a thread waits for at once: two blocks have 32 to 48 KB on their way
alignas(16) extern __shared__ double shared_memory[];  // for vectors of 16 bytes

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vec {
  T at[V];
};

template <int BYTES>
using Word = std::conditional_t<BYTES == 16, uint4, std::conditional_t<BYTES == 8, uint2, std::conditional_t<BYTES == 4, unsigned, unsigned short>>>;

template <int V, typename T>
__device__ __forceinline__ Vec<T, V> load(const T* p) {
  return *reinterpret_cast<const Vec<T, V>*>(p);
}

template <typename T, int V>
__device__ __forceinline__ void store(T* p, const Vec<T, V>& value) {
  *reinterpret_cast<Vec<T, V>*>(p) = value;
}

// To global memory, at once. What is not `kept` in L2 is used for the last time, and what else is there shall stay.
template <typename T, int V>
__device__ __forceinline__ void store(T* p, const Vec<T, V>& value, bool kept) {
  using W = Word<sizeof(T) * V>;
  const W word = reinterpret_cast<const W&>(value);
  if (kept) {
    __stwb(reinterpret_cast<W*>(p), word);
  } else {
    __stcs(reinterpret_cast<W*>(p), word);
  }
}

// to shared memory
template <typename T, int V>
__device__ __forceinline__ void fetch(Vec<T, V>* to, const T* from, bool kept) {
  if constexpr (sizeof(T) * V < 4) {
    *to = load<V>(from);
  } else {
    copy_ahead<sizeof(T) * V>(to, from, kept);
  }
}

// body(k, r) for r = 0, ..., count - 1, k = r % U, while what `fetch`(k, r) of the next U - 1 has asked for is on its way to shared memory
template <int U, typename Fetch, typename Body>
__device__ __forceinline__ void ahead(int count, Fetch fetch, Body body) {
#pragma unroll 1
  for (int r = 0; r < U - 1; r++) {
    if (r < count) fetch(r, r);
    end_group();
  }
  int k = 0, next = U - 1;
#pragma unroll 1
  for (int r = 0; r < count; r++) {
    if (r + U - 1 < count) fetch(next, r + U - 1);
    end_group();
    wait_for_groups<U - 1>();
    body(k, r);
    next = k;
    k = k + 1 < U ? k + 1 : 0;
  }
}

struct Values {  // in any dtype, or none
  void* data;
  ScalarType dtype;

  // body(pointer)
  template <typename Body>
  __device__ void typed(Body body) const {
    switch (dtype) {
      case ScalarType::Half: return body(static_cast<Half*>(data));
      case ScalarType::BFloat16: return body(static_cast<BFloat16*>(data));
      case ScalarType::Double: return body(static_cast<double*>(data));
      default: return body(static_cast<float*>(data));
    }
  }
  __device__ void set(int64_t i, double value) const {
    typed([&](auto* p) {
      using T = std::remove_pointer_t<decltype(p)>;
      p[i] = static_cast<T>(static_cast<Accumulator<T>>(value));
    });
  }
  // old value + momentum*(value - old value)
  __device__ void move(int64_t i, double value, double momentum) const {
    double old = 0;
    typed([&](const auto* p) { old = static_cast<double>(p[i]); });
    set(i, old + momentum * (value - old));
  }
};

struct Parameter : Values {  // weight or bias, rows of C, or absent
  int64_t samples;           // to a row
  double offset;             // added to each
  int64_t start;             // where the row of the sample at hand begins

  // those of channels c, c + 1, ..., each of `channels` channels
  template <int K, typename A>
  __device__ __forceinline__ void read(A (&values)[K], int c, A absent, int channels = 1) const {
    if (!data) {
#pragma unroll
      for (int k = 0; k < K; k++) values[k] = absent;
      return;
    }
    typed([&](const auto* p) {
      if (channels > 1) {
#pragma unroll
        for (int k = 0; k < K; k++) values[k] = static_cast<A>(p[start + (c + k) / channels]);
      } else {
        const auto row = load<K>(p + start + c);
#pragma unroll
        for (int k = 0; k < K; k++) values[k] = static_cast<A>(row.at[k]);
      }
    });
#pragma unroll
    for (int k = 0; k < K; k++) values[k] += static_cast<A>(offset);
  }
};

struct Gradient : Values {  // dweight or dbias: of each row of C, the sum of `partials` of them; or not wanted
  int64_t partials, size, C;
};

template <typename A>
struct Saved {  // statistics: mean, mean_lo and rstd, `count` of each, or rstd alone; or not wanted
  A* data;
  int64_t count;
  bool centered;

  __device__ Stats<A> get(int64_t i) const {
    if (!centered) return {0, 0, data[i]};
    return {data[i], data[count + i], data[2 * count + i]};
  }
  __device__ void set(int64_t i, const Stats<A>& value) const {
    if (!data) return;
    data[i] = centered ? value.mean : value.rstd;
    if (!centered) return;
    data[count + i] = value.mean_lo;
    data[2 * count + i] = value.rstd;
  }
};

struct Running {  // what batch norm keeps besides statistics: the unbiased variance; running mean and variance, or none
  Values unbiased, mean, var;
  double momentum;

  template <typename A>
  __device__ void update(int64_t i, const Stats<A>& stats, const Moments& m) const {
    if (!unbiased.data) return;
    const double variance = m.count > 1 ? m.m2 / (m.count - 1) : 0;
    unbiased.set(i, variance);
    if (!mean.data) return;
    mean.move(i, static_cast<double>(stats.mean) + stats.mean_lo, momentum);
    var.move(i, variance, momentum);
  }
};

struct Problem {
  int64_t N, S, together;   // `together` samples share a statistic: 1, or N
  int C, G, D, per_weight;  // `per_weight` channels have the same weight and bias: 1, or D
  Parameter weight, bias;
  Activation activation;
  double slope;

  __device__ void go_to(int64_t n) {
    weight.start = n < weight.samples ? 0 : n / weight.samples * C;
    bias.start = n < bias.samples ? 0 : n / bias.samples * C;
  }
};

// over each run of `lanes` (<= 32) threads
template <int K, typename A>
__device__ void line_sum(A (&value)[K], int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < K; k++) value[k] += __shfl_xor_sync(0xffffffffu, value[k], offset);
  }
}

// over the threads of the block that have the same threadIdx.x % lanes, lanes <= 32
template <int K, typename A>
__device__ void block_sum(A (&value)[K], int lanes) {
  static __shared__ A scratch[K][kThreads];
  for (int offset = lanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int k = 0; k < K; k++) value[k] += __shfl_xor_sync(0xffffffffu, value[k], offset);
  }
  if (blockDim.x == 32) return;
#pragma unroll
  for (int k = 0; k < K; k++) scratch[k][threadIdx.x] = value[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; k++) {
    value[k] = 0;
    for (unsigned i = threadIdx.x % 32; i < blockDim.x; i += 32) value[k] += scratch[k][i];
  }
  __syncthreads();
}

// over `lanes` neighbours, more than 32 are the whole block; or, ACROSS, over the threads with the same lane
template <bool ACROSS, int K, typename A>
__device__ void team_sum(A (&value)[K], int lanes) {
  if (ACROSS) return block_sum(value, lanes);
  if (lanes > 32) return block_sum(value, 1);
  line_sum(value, lanes);
}

// how many of first, first + step, ... are below `items`
__device__ __forceinline__ int rounds(int64_t items, int first, int step) { return items > first ? (items - first + step - 1) / step : 0; }

template <typename A>
struct Chunk {  // moments of some elements of a group: the mean is hi + lo; m2 in double, so that it cannot overflow
  A hi, lo;
  double m2;
};

// Of `elements` elements for each of K statistics. This thread has the vectors held[0], held[stride], ...; `sum` sums over the threads.
// Not centered: about 0 instead of the mean.
template <int K, typename A, typename T, int V, typename Sum>
__device__ void moments(Chunk<A> (&out)[K], const Vec<T, V>* held, int count, int64_t stride, const A (&first)[K], int elements, bool centered,
                        Sum sum) {
  A hi[K] = {}, lo[K] = {}, squares[K] = {}, scaled[K] = {};
  const auto each = [&](auto body) {
#pragma unroll 4
    for (int r = 0; r < count; r++) {
      const Vec<T, V> x = held[r * stride];
#pragma unroll
      for (int v = 0; v < V; v++) body(v % K, static_cast<A>(x.at[v]));
    }
  };
  if (centered) {
    each([&](int k, A x) { hi[k] += x - first[k]; });
    sum(hi);
#pragma unroll
    for (int k = 0; k < K; k++) hi[k] = first[k] + hi[k] / static_cast<A>(elements);
  }
  each([&](int k, A x) {
    const A d = x - hi[k];
    lo[k] += d;
    squares[k] = fma_(d, d, squares[k]);
  });
  sum(lo);
  sum(squares);
  bool overflow = false;
#pragma unroll
  for (int k = 0; k < K; k++) {
    lo[k] = centered ? lo[k] / static_cast<A>(elements) : 0;
    out[k] = {hi[k], lo[k], squares[k] - static_cast<double>(elements) * lo[k] * lo[k]};
    overflow = overflow || !isfinite(squares[k]);
  }
  if (!__syncthreads_or(overflow)) return;
  each([&](int k, A x) {  // the squares of huge floats: again, of what is 2^-100 as large
    const A d = (x - hi[k]) * static_cast<A>(0x1p-100);
    scaled[k] = fma_(d, d, scaled[k]);
  });
  sum(scaled);
#pragma unroll
  for (int k = 0; k < K; k++) {
    if (!isfinite(squares[k])) out[k].m2 = scaled[k] * 0x1p200 - static_cast<double>(elements) * lo[k] * lo[k];
  }
}

// dbias (blockIdx.y = 0) and dweight (1) from the partial sums of both, (2, partials, C)
template <typename A>
__global__ void __launch_bounds__(kThreads, kResident) parameter_grads_kernel(const A* sums, int64_t size, Gradient dbias, Gradient dweight) {
  const Gradient out = blockIdx.y ? dweight : dbias;
  if (!out.data) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  double total[1] = {};
  if (i < out.size) {
    const A* from = sums + blockIdx.y * size + i / out.C * out.partials * out.C + i % out.C;
#pragma unroll 4
    for (int64_t n = threadIdx.x / 32; n < out.partials; n += kThreads / 32) total[0] += from[n * out.C];
  }
  block_sum(total, 32);
  if (threadIdx.x < 32 && i < out.size) out.set(i, total[0]);
}

}  // namespace normops
