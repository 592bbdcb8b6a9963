// Group and batch norm on the GPU: one statistic for all positions of D channels, of one sample or (`together` = N, D = 1) of all of them.
// T is the dtype of x, dx, residual and dresidual; Y that of y and dy; A the one to compute in.
//
//   group_fwd                                  y and stats, a block per statistic
//   moments -> fold_moments -> apply_fwd       the same, split; statistics that are given need apply_fwd alone
//   group_bwd -> parameter_grads               all gradients, a block per statistic; channels first only
//   sums -> fold_sums -> apply_bwd -> parameter_grads        the same, split; with given statistics sums writes dx too,
//                                                            with given statistics and means apply_bwd does
//   sums -> fold_channels -> apply_bwd                       the same where a statistic has one channel of all samples
//
// A block of group_fwd holds its group in shared memory, one of group_bwd reads it again from the cache. The split kernels go tile by tile:
// `positions` positions of one channel, for a team of `lanes` threads along s; or, where LAST (channels last), of lanes*V channels, for the
// whole block: `lanes` threads along c, the others along s. V neighbours belong to K channels: V where LAST, otherwise one.
//
// Element (n, c, s) is at (n*C + c)*S + s, or at (n*S + s)*C + c where LAST. Partials are a Chunk for each (N, tiles, C), or sum_dt and
// sum_dt_x_hat: (2, N, tiles, C). Sums are (2, N, C), stats (3, N, G), or (3, 1, G) where all samples have the same, means like them:
// mean(g*x_hat) and mean(g), g = weight*dt.
//
// Batch norm of contiguous x is also a group norm of one sample, channels last: samples are positions, and the S positions of a channel are the
// channels of a group, which have one weight (`per_weight` = D). Neighbours in memory stay neighbours there, whatever S is.
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

template <typename A>
__device__ __forceinline__ int64_t statistic_of(const Problem& p, const Saved<A>& stats, int64_t n, int c) {
  return (stats.count == p.G ? 0 : n * p.G) + c / p.D;
}

// channels c, c + 1, ... of sample n, which p is at
template <int K, typename A>
__device__ __forceinline__ void read_channels(Channel<A> (&channels)[K], const Problem& p, const Saved<A>& stats, int64_t n, int c) {
  read_channels<K>(channels, p, c, [&](int k) { return stats.get(statistic_of(p, stats, n, c + k)); }, p.per_weight);
}

struct Plane {  // all positions of a channel
  int64_t n;
  int c;
};

// the i-th of those with the statistic of this block
__device__ __forceinline__ Plane plane_of(const Problem& p, int i) {
  return {blockIdx.x / p.G * p.together + i / p.D, static_cast<int>(blockIdx.x % p.G) * p.D + i % p.D};
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

// the means of this block's statistic from the sums of its planes, for every thread
template <typename A>
__device__ void means_of(A (&means)[2], Problem p, const A* sums) {
  const int planes = static_cast<int>(p.together) * p.D;
  double total[2] = {};
  for (int i = threadIdx.x; i < planes; i += blockDim.x) {
    const Plane at = plane_of(p, i);
    double weight[1];
    p.go_to(at.n);
    p.weight.read(weight, at.c, 1.0);
    total[0] += weight[0] * sums[(p.N + at.n) * p.C + at.c];
    total[1] += weight[0] * sums[at.n * p.C + at.c];
  }
  block_sum(total, 1);
#pragma unroll
  for (int i = 0; i < 2; i++) means[i] = static_cast<A>(total[i] / (static_cast<double>(planes) * p.S));
}

template <typename T, typename Y, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, kResident)
    group_fwd_kernel(Problem p, double eps, const T* x, const T* residual, Y* y, Saved<Accumulator<T>> stats, Running running) {
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
  const Moments m{static_cast<double>(vectors) * V, all[0].lo, all[0].m2};
  const Stats<A> own = finish<A>(all[0].hi, m, eps);
  if (threadIdx.x == 0) {
    stats.set(blockIdx.x, own);
    running.update(blockIdx.x, own, m);
  }
  if (!y) return;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    const int c = g * p.D + (LAST ? i % inner * V : i / inner);
    Channel<A> channels[K];
    const auto stats_of = [&](int) { return own; };
    if (p.per_weight > 1) {
      read_channels<1>(channels, p, g, stats_of);
    } else {
      read_channels<K>(channels, p, c, stats_of);
    }
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
    fold_moments_kernel(Problem p, Split split, double eps, const Chunk<A>* partial, Saved<A> stats, Running running) {
  const unsigned tiles = split.tiles;
  const int count = rounds(p.together * tiles * p.D, threadIdx.x, kThreads);
  const int64_t start = blockIdx.x / p.G * p.together * tiles * p.C + blockIdx.x % p.G * p.D;
  const double base = partial[start].hi, n = static_cast<double>(p.together) * p.D * p.S;
  const auto sum = [&](auto term) {
    double total[1] = {};
#pragma unroll 4
    for (int r = 0; r < count; r++) {
      const unsigned i = threadIdx.x + r * kThreads, row = i / p.D;
      const int64_t left = p.S - static_cast<int64_t>(row % tiles) * split.positions;
      const Chunk<A> chunk = partial[start + static_cast<int64_t>(row) * p.C + i % p.D];
      total[0] += term(static_cast<double>(left < split.positions ? left : split.positions), (chunk.hi - base) + chunk.lo, chunk.m2);
    }
    block_sum(total, 1);
    return total[0];
  };
  const double mean = sum([](double count, double mean, double) { return count * mean; }) / n;
  const double m2 = sum([&](double count, double other, double m2) { return m2 + count * (other - mean) * (other - mean); });
  if (threadIdx.x) return;
  const Moments m{n, mean, m2};
  const Stats<A> own = finish<A>(base, m, eps);
  stats.set(blockIdx.x, own);
  running.update(blockIdx.x, own, m);
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

// `lanes` threads for each plane; more than 32 are the whole block
template <typename T, typename Y, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    group_bwd_kernel(Problem p, int lanes, Backward<Accumulator<T>, T, Y> b, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  const int lane = threadIdx.x % lanes, team = threadIdx.x / lanes, teams = blockDim.x / lanes, planes = static_cast<int>(p.together) * p.D;
  const auto go_to = [&](int i, Channel<A>(&channels)[1]) {
    const Plane plane = plane_of(p, i);
    Place at;
    at.n = plane.n;
    at.c = plane.c;
    at.start = (at.n * p.C + at.c) * p.S + lane * V;
    at.step = lanes * V;
    at.count = rounds(p.S / V, lane, lanes);
    p.go_to(at.n);
    read_channels(channels, p, b.stats, at.n, at.c);
    return at;
  };
  for (int i = team; i - team < planes; i += teams) {  // as often for every thread: they sum together
    A sum_dt[1] = {}, sum_dt_x_hat[1] = {};
    Channel<A> channels[1];
    Place at;
    if (i < planes) {
      at = go_to(i, channels);
      add_up<V>(sum_dt, sum_dt_x_hat, b, at, channels, p, false);
    }
    team_sum<false>(sum_dt, lanes);
    team_sum<false>(sum_dt_x_hat, lanes);
    if (lane == 0 && i < planes) {
      sums[at.n * p.C + at.c] = sum_dt[0];
      sums[(p.N + at.n) * p.C + at.c] = sum_dt_x_hat[0];
    }
  }
  __syncthreads();
  A means[2];
  means_of(means, p, sums);
  if (!b.dx && !b.dresidual) return;
  for (int i = team; i < planes; i += teams) {
    Channel<A> channels[1];
    const Place at = go_to(i, channels);
    apply<V>(b, at, channels, {-channels[0].rstd * means[0]}, {-channels[0].rstd * means[1]}, p);
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

// a block per group, a warp per channel of it; no means where statistics are given
template <typename A>
__global__ void __launch_bounds__(kThreads, kResident) fold_sums_kernel(Problem p, Split split, const A* partial, A* sums, A* means) {
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
  if (!means) return;
  __syncthreads();
  A own[2];
  means_of(own, p, sums);
  if (threadIdx.x) return;
  means[blockIdx.x] = own[0];
  means[gridDim.x + blockIdx.x] = own[1];
}

// a block per statistic that has one channel of all samples: the means, and dbias and dweight unless EACH sample has its own
template <typename A, bool EACH>
__global__ void __launch_bounds__(kThreads, kResident)
    fold_channels_kernel(Problem p, Split split, const A* partial, Values dbias, Values dweight, A* means) {
  const unsigned tiles = split.tiles;
  const int c = blockIdx.x * p.D, count = rounds(p.N * tiles * p.D, threadIdx.x, kThreads);
  const int64_t size = p.N * tiles * p.C;
  double total[2] = {}, weight[1];
  p.weight.read(weight, c, 1.0, p.per_weight);
#pragma unroll 4
  for (int r = 0; r < count; r++) {
    const unsigned i = threadIdx.x + r * kThreads, row = i / p.D;
    const A* from = partial + static_cast<int64_t>(row) * p.C + c + i % p.D;
    if (EACH) {
      p.go_to(row / tiles);
      p.weight.read(weight, c, 1.0);
    }
    total[0] += EACH ? weight[0] * from[size] : from[size];
    total[1] += EACH ? weight[0] * from[0] : from[0];
  }
  block_sum(total, 1);
  if (threadIdx.x) return;
  if (!EACH) {
    if (dweight.data) dweight.set(blockIdx.x, total[0]);
    if (dbias.data) dbias.set(blockIdx.x, total[1]);
  }
  if (!means) return;
  const double scale = (EACH ? 1.0 : weight[0]) / (static_cast<double>(p.N) * p.S * p.D);
  means[blockIdx.x] = static_cast<A>(scale * total[0]);
  means[gridDim.x + blockIdx.x] = static_cast<A>(scale * total[1]);
}

template <typename T, typename Y, int V, bool LAST>
__global__ void __launch_bounds__(kThreads, kResident)
    apply_bwd_kernel(Problem p, Split split, Backward<Accumulator<T>, T, Y> b, const Accumulator<T>* means) {
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
    if (!means) continue;
    const int64_t i = statistic_of(p, b.stats, at.n, at.c + k);
    c2[k] = -channels[k].rstd * means[i];
    c3[k] = -channels[k].rstd * means[b.stats.count + i];
  }
  apply<V>(b, at, channels, c2, c3, p);
}

}  // namespace normops
