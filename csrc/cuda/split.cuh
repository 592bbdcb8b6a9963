// Group and batch norm on the GPU, tile by tile: one statistic for all positions of D channels, of one sample or (`together` = N, D = 1) of all of
// them. T is the dtype of x, dx, residual and dresidual; Y that of y and dy; A the one to compute in.
//
//   moments -> fold_moments -> apply_fwd                     y and stats; statistics that are given need apply_fwd alone
//   sums -> fold_sums -> apply_bwd -> parameter_grads        all gradients; with given statistics sums writes dx too,
//                                                            with given statistics and means apply_bwd does
//   sums -> fold_channels -> apply_bwd                       the same where a statistic has one channel of all samples
//
// A tile is `positions` positions of one channel, for a team of `lanes` threads along s; or, where LAST (channels last), of lanes*V channels, for the
// whole block: `lanes` threads along c, the others along s. V neighbours belong to K channels: V where LAST, otherwise one.
//
// A launch covers some channels of some samples. Where x does not fit L2 but what shares statistics does, all kernels go over as much as fits, and
// then over the next: waves, whose second reading comes from L2. It is in the reverse order of the first, so that what L2 still holds is met first,
// and lets go of what it has read and written.
//
// Element (n, c, s) is at (n*C + c)*S + s, or at (n*S + s)*C + c where LAST. Partials are a Chunk for each (N, tiles, C), or sum_dt and
// sum_dt_x_hat: (2, N, tiles, C). Sums are (2, N, C), stats (3, N, G), or (3, 1, G) where all samples have the same, means like them:
// mean(g*x_hat) and mean(g), g = weight*dt.
#pragma once

#include "elementwise.cuh"

namespace normops {

struct Split {
  int lanes, positions, channel_blocks;
  int64_t tiles, blocks, statistics;
  int64_t n, samples;  // what a launch covers: samples n, ..., n + samples - 1,
  int c, channels;     // and channels c, ...
  bool again, kept;    // reads x for the second time; may leave in L2 what it reads and writes

  // the statistic of this block of a fold
  __device__ __forceinline__ int64_t statistic(const Problem& p) const {
    const unsigned groups = channels / p.D;
    return (n / p.together + blockIdx.x / groups) * p.G + c / p.D + blockIdx.x % groups;
  }
};

struct Place {
  int64_t n, tile, first, start, step;  // offsets: of the first element of channel c in the tile; of this thread's vectors
  int c, count, elements;               // its first channel; how many vectors; elements of each channel in the tile
  bool owner;                           // writes what the team has reduced
};

template <bool LAST, int V>
__device__ Place place(const Problem& p, const Split& split) {
  const int lane = threadIdx.x % split.lanes, team = threadIdx.x / split.lanes, teams = blockDim.x / split.lanes;
  const unsigned block = split.again ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  Place at;
  bool inside;
  if (LAST) {
    const unsigned row = block / split.channel_blocks;
    at.c = split.c + (block % split.channel_blocks * split.lanes + lane) * V;
    at.n = split.n + row / split.tiles;
    at.tile = row % split.tiles;
    inside = at.c < split.c + split.channels;
  } else {
    const int64_t unit = static_cast<int64_t>(block) * teams + team, line = unit / split.tiles;
    at.c = split.c + line % split.channels;
    at.n = split.n + line / split.channels;
    at.tile = unit % split.tiles;
    inside = at.n < split.n + split.samples;
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

// dt and x_hat of this thread's vectors, each once: body(offset, dt, x_hat)
template <int V, int K, typename A, typename T, typename Y, typename Body>
__device__ __forceinline__ void gradients(const Backward<A, T, Y>& b, const Place& at, const Channel<A> (&channels)[K], const Problem& p, bool kept,
                                          Body body) {
  Vec<Y, V>* dy = reinterpret_cast<Vec<Y, V>*>(shared_memory) + threadIdx.x;
  Vec<T, V>*x = reinterpret_cast<Vec<T, V>*>(dy - threadIdx.x + kAheadBackward * kThreads) + threadIdx.x, *added = x + kAheadBackward * kThreads;
  ahead<kAheadBackward>(
      at.count,
      [&](int k, int r) {
        const int64_t offset = at.start + r * at.step;
        fetch(&x[k * kThreads], b.x + offset, kept);
        fetch(&dy[k * kThreads], b.dy + offset, kept);
        if (b.residual) fetch(&added[k * kThreads], b.residual + offset, kept);
      },
      [&](int k, int r) {
        A dt[V] = {}, x_hat[V];
        b.gradient(dt, x_hat, dy[k * kThreads], x[k * kThreads], b.residual ? added + k * kThreads : nullptr, channels, p);
        body(at.start + r * at.step, dt, x_hat);
      });
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
  const int64_t statistic = split.statistic(p), start = statistic / p.G * p.together * tiles * p.C + statistic % p.G * p.D;
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
  stats.set(statistic, own);
  running.update(statistic, own, m);
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
  Vec<T, V>*held = reinterpret_cast<Vec<T, V>*>(shared_memory) + threadIdx.x, *added = held + kAhead * kThreads;
  ahead<kAhead>(
      at.count,
      [&](int k, int r) {
        fetch(&held[k * kThreads], x + at.start + r * at.step, split.kept);
        if (residual) fetch(&added[k * kThreads], residual + at.start + r * at.step, split.kept);
      },
      [&](int k, int r) {
        forward(y + at.start + r * at.step, held[k * kThreads], residual ? added + k * kThreads : nullptr, channels, p, split.kept);
      });
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
  const A zero[V] = {};
  gradients<V>(b, at, channels, p, split.kept, [&](int64_t offset, const A(&dt)[V], const A(&x_hat)[V]) {
    if (frozen) b.write(offset, dt, zero, channels, zero, zero, split.kept);
#pragma unroll
    for (int v = 0; v < V; v++) {
      sum_dt[v % K] += dt[v];
      sum_dt_x_hat[v % K] = fma_(dt[v], x_hat[v], sum_dt_x_hat[v % K]);
    }
  });
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
  const int64_t statistic = split.statistic(p), n = statistic / p.G, channels = p.N * p.C, size = channels * split.tiles;
  const int lane = threadIdx.x % 32;
  double all[2] = {};
  p.go_to(n);
  for (int d = threadIdx.x / 32; d < p.D; d += kThreads / 32) {
    const int c = static_cast<int>(statistic % p.G) * p.D + d;
    double total[2] = {}, weight[1];
    for (int64_t tile = lane; tile < split.tiles; tile += 32) {
      const int64_t i = (n * split.tiles + tile) * p.C + c;
      total[0] += partial[i];
      total[1] += partial[size + i];
    }
    line_sum(total, 32);
    if (lane) continue;
    p.weight.read(weight, c, 1.0);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      sums[j * channels + n * p.C + c] = static_cast<A>(total[j]);
      all[j] += weight[0] * total[j];
    }
  }
  if (!means) return;
  block_sum(all, 1);
  if (threadIdx.x) return;
  const double elements = static_cast<double>(p.D) * p.S;
  means[statistic] = static_cast<A>(all[1] / elements);
  means[p.N * p.G + statistic] = static_cast<A>(all[0] / elements);
}

// a block per statistic that has one channel of all samples: the means, and dbias and dweight unless EACH sample has its own
template <typename A, bool EACH>
__global__ void __launch_bounds__(kThreads, kResident)
    fold_channels_kernel(Problem p, Split split, const A* partial, Values dbias, Values dweight, A* means) {
  const unsigned tiles = split.tiles;
  const int64_t statistic = split.statistic(p);
  const int c = static_cast<int>(statistic) * p.D, count = rounds(p.N * tiles * p.D, threadIdx.x, kThreads);
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
    if (dweight.data) dweight.set(statistic, total[0]);
    if (dbias.data) dbias.set(statistic, total[1]);
  }
  if (!means) return;
  const double scale = (EACH ? 1.0 : weight[0]) / (static_cast<double>(p.N) * p.S * p.D);
  means[statistic] = static_cast<A>(scale * total[0]);
  means[p.G + statistic] = static_cast<A>(scale * total[1]);
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
  gradients<V>(b, at, channels, p, split.kept,
               [&](int64_t offset, const A(&dt)[V], const A(&x_hat)[V]) { b.write(offset, dt, x_hat, channels, c2, c3, split.kept); });
}

}  // namespace normops
