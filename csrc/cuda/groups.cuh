// Group and batch norm on the GPU, a block for a statistic: all positions of D channels of one sample. T is the dtype of x, dx, residual and
// dresidual; Y that of y and dy; A the one to compute in. split.cuh has what is too large for a block.
//
//   group_fwd                       y and stats
//   group_bwd -> parameter_grads    all gradients; channels first only
//
// A block of group_fwd holds x in shared memory, of one group or of several, if those need no more than a warp; one of group_bwd dt and x_hat of a
// group. Beside that it has a table of weight and bias, since V neighbours may belong to several channels.
//
// Element (n, c, s) is at (n*C + c)*S + s, or channels last at (n*S + s)*C + c. Sums are (2, N, C): sum_dt, sum_dt_x_hat. Stats are (3, N, G).
//
// Batch norm of contiguous x is also a group norm of one sample, channels last: samples are positions, and the S positions of a channel are the
// channels of a group, which have one weight (`per_weight` = D). Neighbours in memory stay neighbours there, whatever S is.
#pragma once

#include "elementwise.cuh"

namespace normops {

// Whose neighbours V are: of one channel; of several channels, where groups are contiguous; of as many channels as they are, channels last.
enum class Run : int { plane, group, last };

struct Group {  // of this block, or of this team of threads
  int64_t n, base;  // its sample; offset of its first element
  int g;

  __device__ Group(const Problem& p, int64_t statistic, bool last) : n(statistic / p.G), g(static_cast<int>(statistic % p.G)) {
    base = n * p.C * p.S + static_cast<int64_t>(g) * p.D * (last ? 1 : p.S);
  }
};

template <typename A>
struct Affine {  // weight and bias of a channel
  A weight, bias;
};

// those of the D channels of a group, by `lanes` threads
template <typename A>
__device__ __forceinline__ void read_vectors(Affine<A>* vectors, Problem p, const Group& group, int lane, int lanes) {
  p.go_to(group.n);
  for (int d = lane; d < p.D; d += lanes) {
    A weight[1], bias[1];
    p.weight.read(weight, group.g * p.D + d, A(1), p.per_weight);
    p.bias.read(bias, group.g * p.D + d, A(0), p.per_weight);
    vectors[d] = {weight[0], bias[0]};
  }
}

// channels of the V neighbours from element e of a group on, `inner` of which lie together: D where RUN is last, else S
template <Run RUN, int V, int K, typename A>
__device__ __forceinline__ void channels_at(Channel<A> (&channels)[K], const Affine<A>* vectors, const Stats<A>& stats, int e, int inner) {
  int d = RUN == Run::last ? e % inner : e / inner, s = e % inner;
#pragma unroll
  for (int k = 0; k < K; k++) {
    const Affine<A> own = vectors[d];
    channels[k] = {stats.mean, stats.rstd, -stats.mean_lo * stats.rstd, own.weight, own.bias};
    if (RUN == Run::last) d++;
    if (RUN != Run::group || ++s < inner) continue;
    s = 0;
    d++;
  }
}

// `lanes` threads for each statistic; more than 32 are the whole block
template <typename T, typename Y, int V, Run RUN>
__global__ void __launch_bounds__(kThreads, kResident) group_fwd_kernel(Problem p, int64_t statistics, int lanes, double eps, const T* x,
                                                                        const T* residual, Y* y, Saved<Accumulator<T>> stats, Running running) {
  using A = Accumulator<T>;
  constexpr bool LAST = RUN == Run::last;
  constexpr int K = RUN == Run::plane ? 1 : V;
  const int lane = threadIdx.x % lanes, team = threadIdx.x / lanes, teams = blockDim.x / lanes, inner = LAST ? p.D : static_cast<int>(p.S);
  const int elements = p.D * static_cast<int>(p.S), vectors = elements / V;
  const int64_t statistic = static_cast<int64_t>(blockIdx.x) * teams + team;
  const bool inside = statistic < statistics;  // beyond there is nothing to do but to take part in sums
  const Group group(p, inside ? statistic : 0, LAST);
  const int count = inside ? rounds(vectors, lane, lanes) : 0;
  const auto offset = [&](int r) {
    const int i = lane + r * lanes;
    return group.base + (LAST ? static_cast<int64_t>(i / (p.D / V)) * p.C + i % (p.D / V) * V : static_cast<int64_t>(i) * V);
  };
  Vec<T, V>* held = reinterpret_cast<Vec<T, V>*>(shared_memory) + threadIdx.x;
  Affine<A>* table = reinterpret_cast<Affine<A>*>(held - threadIdx.x + static_cast<int64_t>(rounds(vectors, 0, lanes)) * blockDim.x) + team * p.D;

#pragma unroll 4
  for (int r = 0; r < count; r++) held[r * blockDim.x] = load<V>(x + offset(r));
  if (inside) read_vectors(table, p, group, lane, lanes);
  const A first[1] = {static_cast<A>(x[group.base])};
  Chunk<A> all[1];
  moments(all, held, count, blockDim.x, first, elements, true, [&](auto& value) { team_sum<false>(value, lanes); });
  const Moments m{static_cast<double>(elements), all[0].lo, all[0].m2};
  const Stats<A> own = finish<A>(all[0].hi, m, eps);
  if (inside && lane == 0) {
    stats.set(statistic, own);
    running.update(statistic, own, m);
  }
  if (!y) return;
#pragma unroll 1
  for (int r = 0; r < count; r++) {
    Channel<A> channels[K];
    channels_at<RUN, V>(channels, table, own, (lane + r * lanes) * V, inner);
    const int64_t at = offset(r);
    forward(y + at, held[r * blockDim.x], residual ? reinterpret_cast<const Vec<T, V>*>(residual + at) : nullptr, channels, p);
  }
}

// `lanes` threads add up what belongs to one channel; more than 32 are the whole block
template <typename T, typename Y, int V, Run RUN>
__global__ void __launch_bounds__(kThreads, kResident)
    group_bwd_kernel(Problem p, int lanes, Backward<Accumulator<T>, T, Y> b, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  constexpr int K = RUN == Run::plane ? 1 : V;
  const int S = static_cast<int>(p.S), elements = p.D * S, count = rounds(elements / V, threadIdx.x, blockDim.x);
  const int lane = threadIdx.x % lanes, team = threadIdx.x / lanes, teams = blockDim.x / lanes;
  const Group group(p, blockIdx.x, false);
  const Stats<A> own = b.stats.get(blockIdx.x);
  A *held_dt = reinterpret_cast<A*>(shared_memory), *held_x_hat = held_dt + elements;
  Affine<A>* table = reinterpret_cast<Affine<A>*>(held_x_hat + elements);
  read_vectors(table, p, group, threadIdx.x, blockDim.x);
  __syncthreads();

  const auto at = [&](int r) { return (threadIdx.x + r * blockDim.x) * V; };
#pragma unroll 1
  for (int r = 0; r < count; r++) {
    const int64_t offset = group.base + at(r);
    Channel<A> channels[K];
    channels_at<RUN, V>(channels, table, own, at(r), S);
    Vec<A, V> dt, x_hat;
    b.gradient(dt.at, x_hat.at, load<V>(b.dy + offset), load<V>(b.x + offset),
               b.residual ? reinterpret_cast<const Vec<T, V>*>(b.residual + offset) : nullptr, channels, p);
    store(held_dt + at(r), dt);
    store(held_x_hat + at(r), x_hat);
  }
  __syncthreads();
  double total[2] = {};
  for (int d = team; d - team < p.D; d += teams) {  // as often for every thread: they sum together
    A both[2] = {};
    if (d < p.D) {
#pragma unroll 4
      for (int s = lane; s < S; s += lanes) {
        const A dt = held_dt[d * S + s];
        both[0] += dt;
        both[1] = fma_(dt, held_x_hat[d * S + s], both[1]);
      }
    }
    team_sum<false>(both, lanes);
    if (lane || d >= p.D) continue;
    const int64_t i = group.n * p.C + group.g * p.D + d;
    sums[i] = both[0];
    sums[p.N * p.C + i] = both[1];
#pragma unroll
    for (int j = 0; j < 2; j++) total[j] += static_cast<double>(table[d].weight) * both[j];
  }
  if (!b.dx && !b.dresidual) return;
  block_sum(total, 1);
  A c2[1], c3[1];
  c2[0] = -own.rstd * static_cast<A>(total[1] / elements);
  c3[0] = -own.rstd * static_cast<A>(total[0] / elements);
#pragma unroll 1
  for (int r = 0; r < count; r++) {
    Channel<A> channels[K];
    channels_at<RUN, V>(channels, table, own, at(r), S);
    const Vec<A, V> dt = load<V>(held_dt + at(r)), x_hat = load<V>(held_x_hat + at(r));
    b.write(group.base + at(r), dt.at, x_hat.at, channels, c2, c3);
  }
}

}  // namespace normops
