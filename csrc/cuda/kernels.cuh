// Group norm on the GPU: the kernels. T is the dtype of x, dx, residual and dresidual; Y that of y and dy; A the one to compute in.
//
//   group_fwd                                  y and stats, a block per group
//   moments -> fold_moments -> apply_fwd       the same, split
//   group_bwd -> parameter_grads               all gradients, a block per group; channels first only
//   sums -> fold_sums -> apply_bwd -> parameter_grads        the same, split
//
// Partials are a Chunk for each (N, tiles, C), or sum_dt and sum_dt_x_hat: (2, N, tiles, C).
// Sums are (2, N, C), stats (3, N, G), c2 and c3 (2, N, G).
#pragma once

#include "elementwise.cuh"

namespace normops {

alignas(16) extern __shared__ double shared_memory[];  // for vectors of 16 bytes

template <typename T, typename Y, int V, bool LAST>
__global__ void __launch_bounds__(kThreads) group_fwd_kernel(Problem p, double eps, const T* x, const T* residual, Y* y, Accumulator<T>* stats) {
  using A = Accumulator<T>;
  constexpr int K = LAST ? V : 1;
  Vec<T, V>* held = reinterpret_cast<Vec<T, V>*>(shared_memory);
  const int64_t n = blockIdx.x / p.G;
  const int g = blockIdx.x % p.G, inner = (LAST ? p.D : p.S) / V, vectors = (LAST ? p.S : p.D) * inner;
  const int64_t base = n * p.C * p.S + g * p.D * (LAST ? 1 : p.S);
  const auto offset = [&](int i) { return base + (LAST ? static_cast<int64_t>(i / inner) * p.C + i % inner * V : static_cast<int64_t>(i) * V); };

#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) held[i] = load<V>(x + offset(i));
  const A first[1] = {static_cast<A>(x[base])};
  Chunk<A> all[1];
  const int count = rounds(vectors, threadIdx.x, blockDim.x);
  moments(all, held + threadIdx.x, count, blockDim.x, first, vectors * V, [](auto& value) { block_sum(value, 1); });
  const Stats<A> own = finish<A>(all[0].hi, {static_cast<double>(vectors) * V, all[0].lo, all[0].m2}, eps);
  if (stats && threadIdx.x == 0) {
    stats[blockIdx.x] = own.mean;
    stats[gridDim.x + blockIdx.x] = own.mean_lo;
    stats[2 * gridDim.x + blockIdx.x] = own.rstd;
  }
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const int c = g * p.D + (LAST ? i % inner * V : i / inner);
    Channel<A> channels[K];
    read_channels(channels, p, n, c, [&](int) { return own; });
    forward(y, held[i], residual, offset(i), channels, p);
  }
}

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(kThreads) moments_kernel(Problem p, Split split, const T* x, Chunk<Accumulator<T>>* partial) {
  using A = Accumulator<T>;
  constexpr int K = LAST ? V : 1;
  Vec<T, V>* held = reinterpret_cast<Vec<T, V>*>(shared_memory) + threadIdx.x;
  const Place at = place<LAST, V>(p, split);
#pragma unroll 4
  for (int r = 0; r < at.count; r++) held[r * kThreads] = load<V>(x + at.start + r * at.step);
  A first[K];
#pragma unroll
  for (int k = 0; k < K; k++) first[k] = static_cast<A>(x[at.first + k]);
  Chunk<A> chunks[K];
  moments(chunks, held, at.count, kThreads, first, at.elements, [&](auto& value) { team_sum<LAST>(value, split.lanes); });
  if (!at.owner) return;
#pragma unroll
  for (int k = 0; k < K; k++) partial[(at.n * split.tiles + at.tile) * p.C + at.c + k] = chunks[k];
}

template <typename A>
__global__ void __launch_bounds__(kThreads) fold_moments_kernel(Problem p, Split split, double eps, const Chunk<A>* partial, A* stats) {
  static __shared__ Moments scratch[kThreads];
  const int64_t n = blockIdx.x / p.G, start = n * split.tiles * p.C + blockIdx.x % p.G * p.D;
  const double base = partial[start].hi;
  Moments m{0, 0, 0};
  for (int64_t j = threadIdx.x; j < split.tiles * p.D; j += kThreads) {
    const int64_t tile = j / p.D, left = p.S - tile * split.positions;
    const Chunk<A> chunk = partial[start + tile * p.C + j % p.D];
    const Moments next{static_cast<double>(left < split.positions ? left : split.positions), (chunk.hi - base) + chunk.lo, chunk.m2};
    m = m.count ? merge(m, next) : next;
  }
  scratch[threadIdx.x] = m;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half && scratch[threadIdx.x + half].count) scratch[threadIdx.x] = merge(scratch[threadIdx.x], scratch[threadIdx.x + half]);
  }
  if (threadIdx.x) return;
  const Stats<A> own = finish<A>(base, scratch[0], eps);
  stats[blockIdx.x] = own.mean;
  stats[gridDim.x + blockIdx.x] = own.mean_lo;
  stats[2 * gridDim.x + blockIdx.x] = own.rstd;
}

template <typename T, typename Y, int V, bool LAST>
__global__ void __launch_bounds__(kThreads)
    apply_fwd_kernel(Problem p, Split split, const T* x, const T* residual, const Accumulator<T>* stats, Y* y) {
  using A = Accumulator<T>;
  constexpr int K = LAST ? V : 1;
  const Place at = place<LAST, V>(p, split);
  if (!at.count) return;
  Channel<A> channels[K];
  read_channels(channels, p, stats, at.n, at.c);
  for (int r = 0; r < at.count; r++) {
    const int64_t offset = at.start + r * at.step;
    forward(y, load<V>(x + offset), residual, offset, channels, p);
  }
}

// `lanes` threads for each channel of the group; more than 32 are the whole block
template <typename T, typename Y, int V>
__global__ void __launch_bounds__(kThreads) group_bwd_kernel(Problem p, int lanes, Backward<Accumulator<T>, T, Y> b, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  const int64_t n = blockIdx.x / p.G;
  const int g = blockIdx.x % p.G, lane = threadIdx.x % lanes, teams = blockDim.x / lanes;
  const auto line = [&](int d) {
    Place at;
    at.c = g * p.D + d;
    at.start = (n * p.C + at.c) * p.S + lane * V;
    at.step = lanes * V;
    at.count = rounds(p.S / V, lane, lanes);
    return at;
  };
  for (int d = threadIdx.x / lanes; d - static_cast<int>(threadIdx.x) / lanes < p.D; d += teams) {  // as often for every thread: they sum together
    A sum_dt[1] = {}, sum_dt_x_hat[1] = {};
    if (d < p.D) {
      const Place at = line(d);
      Channel<A> channels[1];
      read_channels(channels, p, b.stats, n, at.c);
      b.template sum<V>(sum_dt, sum_dt_x_hat, at, channels, p);
    }
    team_sum<false>(sum_dt, lanes);
    team_sum<false>(sum_dt_x_hat, lanes);
    if (lane == 0 && d < p.D) {
      sums[n * p.C + g * p.D + d] = sum_dt[0];
      sums[(p.N + n) * p.C + g * p.D + d] = sum_dt_x_hat[0];
    }
  }
  __syncthreads();
  A c2[1], c3[1];
  coefficients(c2[0], c3[0], p, b.stats, sums, n, g);
  if (!b.dx && !b.dresidual) return;
  for (int d = threadIdx.x / lanes; d < p.D; d += teams) {
    const Place at = line(d);
    Channel<A> channels[1];
    read_channels(channels, p, b.stats, n, at.c);
    b.template apply<V>(at, channels, c2, c3, p);
  }
}

template <typename T, typename Y, int V, bool LAST>
__global__ void __launch_bounds__(kThreads) sums_kernel(Problem p, Split split, Backward<Accumulator<T>, T, Y> b, Accumulator<T>* partial) {
  using A = Accumulator<T>;
  constexpr int K = LAST ? V : 1;
  const Place at = place<LAST, V>(p, split);
  Channel<A> channels[K];
  read_channels(channels, p, b.stats, at.n, at.c);
  A sum_dt[K] = {}, sum_dt_x_hat[K] = {};
  b.template sum<V>(sum_dt, sum_dt_x_hat, at, channels, p);
  team_sum<LAST>(sum_dt, split.lanes);
  team_sum<LAST>(sum_dt_x_hat, split.lanes);
  if (!at.owner) return;
  const int64_t i = (at.n * split.tiles + at.tile) * p.C + at.c, size = p.N * split.tiles * p.C;
#pragma unroll
  for (int k = 0; k < K; k++) {
    partial[i + k] = sum_dt[k];
    partial[size + i + k] = sum_dt_x_hat[k];
  }
}

// a block per group, a warp per channel of it
template <typename A>
__global__ void __launch_bounds__(kThreads) fold_sums_kernel(Problem p, Split split, const A* partial, const A* stats, A* sums, A* c2c3) {
  const int64_t n = blockIdx.x / p.G, size = p.N * split.tiles * p.C;
  const int g = blockIdx.x % p.G, lane = threadIdx.x % 32;
  for (int d = threadIdx.x / 32; d < p.D; d += kThreads / 32) {
    const int c = g * p.D + d;
    double total[2] = {};
    for (int64_t tile = lane; tile < split.tiles; tile += 32) {
      const int64_t i = (n * split.tiles + tile) * p.C + c;
      total[0] += partial[i];
      total[1] += partial[size + i];
    }
    line_sum(total, 32);
    if (lane == 0) {
      sums[n * p.C + c] = static_cast<A>(total[0]);
      sums[(p.N + n) * p.C + c] = static_cast<A>(total[1]);
    }
  }
  __syncthreads();
  A c2, c3;
  coefficients(c2, c3, p, stats, sums, n, g);
  if (threadIdx.x) return;
  c2c3[blockIdx.x] = c2;
  c2c3[gridDim.x + blockIdx.x] = c3;
}

template <typename T, typename Y, int V, bool LAST>
__global__ void __launch_bounds__(kThreads) apply_bwd_kernel(Problem p, Split split, Backward<Accumulator<T>, T, Y> b, const Accumulator<T>* c2c3) {
  using A = Accumulator<T>;
  constexpr int K = LAST ? V : 1;
  const Place at = place<LAST, V>(p, split);
  if (!at.count) return;
  Channel<A> channels[K];
  read_channels(channels, p, b.stats, at.n, at.c);
  A c2[K] = {}, c3[K] = {};
#pragma unroll
  for (int k = 0; k < K; k++) {
    if (!b.dx) continue;
    const int64_t group = at.n * p.G + (at.c + k) / p.D;
    c2[k] = c2c3[group];
    c3[k] = c2c3[p.N * p.G + group];
  }
  b.template apply<V>(at, channels, c2, c3, p);
}

// dbias (blockIdx.y = 0) and dweight (1): the sums per sample and channel, over the samples
template <typename A>
__global__ void __launch_bounds__(kThreads) parameter_grads_kernel(const A* sums, int64_t size, Gradient dbias, Gradient dweight) {
  const Gradient out = blockIdx.y ? dweight : dbias;
  if (!out.data) return;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  double total[1] = {};
  if (c < out.columns) {
#pragma unroll 4
    for (int64_t n = threadIdx.x / 32; n < out.rows; n += kThreads / 32) total[0] += sums[blockIdx.y * size + n * out.columns + c];
  }
  block_sum(total, 32);
  if (threadIdx.x < 32 && c < out.columns) out.set(c, total[0]);
}

}  // namespace normops
