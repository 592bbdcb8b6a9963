// Group norm on the GPU: the mathematics, and types, sums and moments for the kernels. n = D*S elements per group, D = C/G channels, S positions.
//
//   moments   K = first element; hi = K + mean(x - K); lo = mean(x - hi); M2 = sum (x - hi)^2 - n*lo^2; sets merge by Chan, in a fixed order
//   forward   x_hat = fma(x - mean, rstd, -mean_lo*rstd)     t = x_hat*weight + bias (+ residual)     y = act(t)
//   backward  dt = dy*act'(t)      sums per (n, c): sum_dt, sum_dt_x_hat      P, Q = sum over the group of weight*sum_dt, weight*sum_dt_x_hat
//             dx = (rstd*weight)*dt + c2*x_hat + c3       c2 = -rstd*Q/n       c3 = -rstd*P/n       dresidual = dt
//
// Element (n, c, s) is at (n*C + c)*S + s, or at (n*S + s)*C + c where LAST (channels last). Two ways to go over them:
//
//   group kernels   one block per group, which is held in shared memory (forward) or read again from the cache (backward)
//   split kernels   partial moments or sums per tile, a fold with one block per group, then the elementwise pass, tile by tile.
//                   A tile is `positions` positions of one channel, for a team of `lanes` threads along s; or, where LAST, of lanes*V channels,
//                   for the whole block: `lanes` threads along c, the others along s.
//
// A thread reads and writes V neighbours at a time (16 bytes, or V = 1). They belong to K channels: V where LAST, otherwise one.
// Sums run in an order that depends on the shape alone: no atomics, the same bits on every run.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace normops {

__device__ __forceinline__ float exp_(float t) { return expf(t); }
__device__ __forceinline__ double exp_(double t) { return exp(t); }
__device__ __forceinline__ float tanh_(float t) { return tanhf(t); }
__device__ __forceinline__ double tanh_(double t) { return tanh(t); }
__device__ __forceinline__ float logistic_(float t) { return __fdividef(1.0f, 1.0f + expf(-t)); }
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

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T at[V];
};

template <int V, typename T>
__device__ __forceinline__ Vec<T, V> load(const T* p) {
  return *reinterpret_cast<const Vec<T, V>*>(p);
}

template <typename T, int V>
__device__ __forceinline__ void store(T* p, const Vec<T, V>& value) {
  *reinterpret_cast<Vec<T, V>*>(p) = value;
}

struct Parameter {  // weight or bias, (C,) or (N, C), in any dtype, or absent
  const void* data;
  ScalarType dtype;
  int64_t stride;  // from sample to sample: 0 or C

  // those of channels c, c + 1, ... of sample n
  template <int K, typename A>
  __device__ void read(A (&values)[K], int64_t n, int64_t c, A absent) const {
    const int64_t i = n * stride + c;
    const auto from = [&](auto typed) {
#pragma unroll
      for (int k = 0; k < K; k++) values[k] = static_cast<A>(typed[i + k]);
    };
    if (!data) {
#pragma unroll
      for (int k = 0; k < K; k++) values[k] = absent;
      return;
    }
    switch (dtype) {
      case ScalarType::Half: return from(static_cast<const Half*>(data));
      case ScalarType::BFloat16: return from(static_cast<const BFloat16*>(data));
      case ScalarType::Double: return from(static_cast<const double*>(data));
      default: return from(static_cast<const float*>(data));
    }
  }
};

struct Gradient {  // dweight or dbias, summed over `rows` samples; or not wanted
  void* data;
  ScalarType dtype;
  int64_t rows, columns;

  __device__ void set(int64_t i, double value) const {
    switch (dtype) {
      case ScalarType::Half: static_cast<Half*>(data)[i] = static_cast<Half>(static_cast<float>(value)); break;
      case ScalarType::BFloat16: static_cast<BFloat16*>(data)[i] = static_cast<BFloat16>(static_cast<float>(value)); break;
      case ScalarType::Double: static_cast<double*>(data)[i] = value; break;
      default: static_cast<float*>(data)[i] = static_cast<float>(value);
    }
  }
};

struct Problem {
  int64_t N, S;
  int C, G, D;
  Parameter weight, bias;
  Activation activation;
  double slope;
};

struct Split {
  int lanes, positions, channel_blocks;
  int64_t tiles, blocks;
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

// over the threads that share a tile; lanes > 32 is one line for the whole block
template <bool LAST, int K, typename A>
__device__ void team_sum(A (&value)[K], int lanes) {
  if (LAST) return block_sum(value, lanes);
  if (lanes > 32) return block_sum(value, 1);
  line_sum(value, lanes);
}

struct Place {
  int64_t n, tile, first, start, step;  // offsets: of the first element of channel c in the tile; of this thread's vectors
  int c, count, elements;               // its first channel; how many vectors; elements of each channel in the tile
  bool owner;                           // writes what the team has reduced
};

__device__ __forceinline__ int rounds(int64_t items, int first, int step) { return items > first ? (items - first + step - 1) / step : 0; }

template <bool LAST, int V>
__device__ Place place(const Problem& p, const Split& split) {
  const int lane = threadIdx.x % split.lanes, team = threadIdx.x / split.lanes, teams = blockDim.x / split.lanes;
  Place at;
  bool inside;
  if (LAST) {
    const int64_t block = blockIdx.x / split.channel_blocks;
    at.c = (blockIdx.x % split.channel_blocks * split.lanes + lane) * V;
    at.n = block / split.tiles;
    at.tile = block % split.tiles;
    inside = at.c < p.C;
  } else {
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * teams + team, line = unit / split.tiles;
    at.c = line % p.C;
    at.n = line / p.C;
    at.tile = unit % split.tiles;
    inside = at.n < p.N;
  }
  if (!inside) at.n = at.tile = at.c = 0;  // nothing to do, but it takes part in the sums
  const int64_t s = at.tile * split.positions, left = p.S - s;
  at.elements = left < split.positions ? left : split.positions;
  at.first = LAST ? (at.n * p.S + s) * p.C + at.c : (at.n * p.C + at.c) * p.S + s;
  at.start = at.first + (LAST ? static_cast<int64_t>(team) * p.C : lane * V);
  at.step = LAST ? static_cast<int64_t>(teams) * p.C : split.lanes * V;
  at.count = !inside ? 0 : LAST ? rounds(at.elements, team, teams) : rounds(at.elements / V, lane, split.lanes);
  at.owner = inside && (LAST ? team : lane) == 0;
  return at;
}

template <typename A>
struct Chunk {  // moments of some elements of a group: the mean is hi + lo; m2 in double, so that it cannot overflow
  A hi, lo;
  double m2;
};

// Of `elements` elements for each of K channels. This thread has the vectors held[0], held[stride], ...; `sum` sums over the threads.
template <int K, typename A, typename T, int V, typename Sum>
__device__ void moments(Chunk<A> (&out)[K], const Vec<T, V>* held, int count, int stride, const A (&first)[K], int elements, Sum sum) {
  A hi[K] = {}, lo[K] = {}, squares[K] = {}, scaled[K] = {};
  const auto each = [&](auto body) {
#pragma unroll 4
    for (int r = 0; r < count; r++) {
      const Vec<T, V> x = held[r * stride];
#pragma unroll
      for (int v = 0; v < V; v++) body(v % K, static_cast<A>(x.at[v]));
    }
  };
  each([&](int k, A x) { hi[k] += x - first[k]; });
  sum(hi);
#pragma unroll
  for (int k = 0; k < K; k++) hi[k] = first[k] + hi[k] / static_cast<A>(elements);
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
    lo[k] /= static_cast<A>(elements);
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

}  // namespace normops
