// Group norm on the GPU: one statistic for all positions of D channels. T is the dtype of x, dx, residual and dresidual; Y that of y and dy;
// A the one to compute in.
//
//   group_fwd                                  y and stats, a block per group
//   moments -> fold_moments -> apply_fwd       the same, split; statistics that are given need apply_fwd alone
//   group_bwd -> parameter_grads               all gradients, a block per group; channels first only
//   sums -> fold_sums -> apply_bwd -> parameter_grads        the same, split; with given statistics sums writes dx too
//
// A block of group_fwd holds its group in shared memory, one of group_bwd reads it again from the cache. The split kernels go tile by tile:
// `positions` positions of one channel, for a team of `lanes` threads along s; or, where LAST (channels last), of lanes*V channels, for the
// whole block: `lanes` threads along c, the others along s. V neighbours belong to K channels: V where LAST, otherwise one.
//
// Element (n, c, s) is at (n*C + c)*S + s, or at (n*S + s)*C + c where LAST. Partials are a Chunk for each (N, tiles, C), or sum_dt and
// sum_dt_x_hat: (2, N, tiles, C). Sums are (2, N, C), stats (3, N, G), or (3, 1, G) where they are given for all samples, c2 and c3 (2, N, G).
#pragma once

#include "elementwise.cuh"

namespace normops {

struct Split {
  int lanes, positions, channel_blocks;
  int64_t tiles, blocks;
};

struct Place {
  int64_t n, tile, first, start, step;  // offsets: of the first element of channel c in the tile; of this thread's vectors
  int c, count, elements;               // its first channel; how many vectors; elements of each channel in the tile
  bool owner;                           // writes what the team has reduced
};

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

// channels c, c + 1, ... of sample n, which p is at
template <int K, typename A>
__device__ __forceinline__ void read_channels(Channel<A> (&channels)[K], const Problem& p, const Saved<A>& stats, int64_t n, int c) {
  const int64_t sample = stats.count == p.G ? 0 : n * p.G;
  read_channels<K>(channels, p, c, [&](int k) { return stats.get(sample + (c + k) / p.D); });
}

// adds up sum_dt and sum_dt_x_hat of this thread's vectors; writes dx and dresidual too where that needs no sums
template <int V, int K, typename A, typename T, typename Y>
__device__ void add_up(A (&sum_dt)[K], A (&sum_dt_x_hat)[K], const Backward<A, T, Y>& b, const Place& at, const Channel<A> (&channels)[K],
                       const Problem& p, bool frozen) {
  const A zero[V] = {};
  for (int r = 0; r < at.count; r++) {
    const int64_t offset = at.start + r * at.step;
    A dt[V], x_hat[V];
    b.gradient(dt, x_hat, offset, channels, p);
    if (frozen) b.write(offset, dt, zero, channels, zero, zero);
#pragma unroll
    for (int v = 0; v < V; v++) {
      sum_dt[v % K] += dt[v];
      sum_dt_x_hat[v % K] = fma_(dt[v], x_hat[v], sum_dt_x_hat[v % K]);
    }
  }
}

template <int V, int K, typename A, typename T, typename Y>
__device__ void apply(const Backward<A, T, Y>& b, const Place& at, const Channel<A> (&channels)[K], const A (&c2)[K], const A (&c3)[K],
                      const Problem& p) {
  for (int r = 0; r < at.count; r++) {
    const int64_t offset = at.start + r * at.step;
    A dt[V], x_hat[V];
    b.gradient(dt, x_hat, offset, channels, p);
    b.write(offset, dt, x_hat, channels, c2, c3);
  }
}

// c2 and c3 of a group from the sums of its channels, for every thread of the block
template <typename A>
__device__ void coefficients(A& c2, A& c3, const Problem& p, const Saved<A>& stats, const A* sums, int64_t n, int g) {
  double total[2] = {};
  for (int d = threadIdx.x; d < p.D; d += blockDim.x) {
    const int c = g * p.D + d;
    double weight[1];
    p.weight.read(weight, c, 1.0);
    total[0] += weight[0] * sums[n * p.C + c];
    total[1] += weight[0] * sums[(p.N + n) * p.C + c];
  }
  block_sum(total, 1);
  const double scale = -static_cast<double>(stats.get(n * p.G + g).rstd) / (static_cast<double>(p.D) * p.S);
  c3 = static_cast<A>(scale * total[0]);
  c2 = static_cast<A>(scale * total[1]);
}

template <typename T, typename Y, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, kResident)
    group_fwd_kernel(Problem p, double eps, const T* x, const T* residual, Y* y, Saved<Accumulator<T>> stats) {
  using A = Accumulator<T>;
  constexpr int K = LAST ? V : 1;
  Vec<T, V>* held = reinterpret_cast<Vec<T, V>*>(shared_memory);
  const int64_t n = blockIdx.x / p.G;
  const int g = blockIdx.x % p.G, inner = (LAST ? p.D : p.S) / V, vectors = (LAST ? p.S : p.D) * inner;
  const int64_t base = n * p.C * p.S + g * p.D * (LAST ? 1 : p.S);
  p.go_to(n);
  const auto offset = [&](int i) { return base + (LAST ? static_cast<int64_t>(i / inner) * p.C + i % inner * V : static_cast<int64_t>(i) * V); };

#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) held[i] = load<V>(x + offset(i));
  const A first[1] = {static_cast<A>(x[base])};
  Chunk<A> all[1];
  const int count = rounds(vectors, threadIdx.x, blockDim.x);
  moments(all, held + threadIdx.x, count, blockDim.x, first, vectors * V, true, [](auto& value) { block_sum(value, 1); });
  const Stats<A> own = finish<A>(all[0].hi, {static_cast<double>(vectors) * V, all[0].lo, all[0].m2}, eps);
  if (threadIdx.x == 0) stats.set(blockIdx.x, own);
  if (!y) return;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const int c = g * p.D + (LAST ? i % inner * V : i / inner);
    Channel<A> channels[K];
    read_channels<K>(channels, p, c, [&](int) { return own; });
    forward(y, held[i], residual, offset(i), channels, p);
  }
}

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, kResident) moments_kernel(Problem p, Split split, const T* x, Chunk<Accumulator<T>>* partial) {
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
  moments(chunks, held, at.count, kThreads, first, at.elements, true, [&](auto& value) { team_sum<LAST>(value, split.lanes); });
  if (!at.owner) return;
#pragma unroll
  for (int k = 0; k < K; k++) partial[(at.n * split.tiles + at.tile) * p.C + at.c + k] = chunks[k];
}

template <typename A>
__global__ void __launch_bounds__(kThreads, kResident)
    fold_moments_kernel(Problem p, Split split, double eps, const Chunk<A>* partial, Saved<A> stats) {
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
  if (threadIdx.x == 0) stats.set(blockIdx.x, finish<A>(base, scratch[0], eps));
}

template <typename T, typename Y, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, kResident)
    apply_fwd_kernel(Problem p, Split split, const T* x, const T* residual, Saved<Accumulator<T>> stats, Y* y) {
  using A = Accumulator<T>;
  constexpr int K = LAST ? V : 1;
  const Place at = place<LAST, V>(p, split);
  if (!at.count) return;
  p.go_to(at.n);
  Channel<A> channels[K];
  read_channels(channels, p, stats, at.n, at.c);
  for (int r = 0; r < at.count; r++) {
    const int64_t offset = at.start + r * at.step;
    forward(y, load<V>(x + offset), residual, offset, channels, p);
  }
}

// `lanes` threads for each channel of the group; more than 32 are the whole block
template <typename T, typename Y, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    group_bwd_kernel(Problem p, int lanes, Backward<Accumulator<T>, T, Y> b, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  const int64_t n = blockIdx.x / p.G;
  p.go_to(n);
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
      add_up<V>(sum_dt, sum_dt_x_hat, b, at, channels, p, false);
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
    apply<V>(b, at, channels, c2, c3, p);
  }
}

template <typename T, typename Y, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, kResident)
    sums_kernel(Problem p, Split split, Backward<Accumulator<T>, T, Y> b, bool frozen, Accumulator<T>* partial) {
  using A = Accumulator<T>;
  constexpr int K = LAST ? V : 1;
  const Place at = place<LAST, V>(p, split);
  p.go_to(at.n);
  Channel<A> channels[K];
  read_channels(channels, p, b.stats, at.n, at.c);
  A sum_dt[K] = {}, sum_dt_x_hat[K] = {};
  add_up<V>(sum_dt, sum_dt_x_hat, b, at, channels, p, frozen);
  if (!partial) return;
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

// a block per group, a warp per channel of it; no c2 and c3 where statistics are given
template <typename A>
__global__ void __launch_bounds__(kThreads, kResident) fold_sums_kernel(Problem p, Split split, const A* partial, Saved<A> stats, A* sums, A* c2c3) {
  p.go_to(blockIdx.x / p.G);
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
  if (!c2c3) return;
  __syncthreads();
  A c2, c3;
  coefficients(c2, c3, p, stats, sums, n, g);
  if (threadIdx.x) return;
  c2c3[blockIdx.x] = c2;
  c2c3[gridDim.x + blockIdx.x] = c3;
}

template <typename T, typename Y, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, kResident)
    apply_bwd_kernel(Problem p, Split split, Backward<Accumulator<T>, T, Y> b, const Accumulator<T>* c2c3) {
  using A = Accumulator<T>;
  constexpr int K = LAST ? V : 1;
  const Place at = place<LAST, V>(p, split);
  if (!at.count) return;
  p.go_to(at.n);
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
  apply<V>(b, at, channels, c2, c3, p);
}

}  // namespace normops
