// Layer and RMS norm on the GPU: a statistic for the D channels of one position. T is the dtype of x, addend, total, dtotal, residual, dx and
// dresidual; Y that of y and dy; A the one to compute in.
//
//   row_fwd                           y, total and stats
//   row_bwd -> parameter_grads        all gradients
//
// Element (n, c, s) is at (n*C + c)*S + s. `lanes` threads share a row of D channels, S = 1: a part of a warp or the whole block. Or, ACROSS the rows
// of an image, G = 1: the `lanes` threads along s have V positions each, and the others of the block are along c. V neighbours belong to K
// statistics: one, or V where ACROSS; and to P channels: V, or one where ACROSS.
//
// row_fwd holds x in shared memory where it fits, else it reads it again from the cache, as row_bwd does. A block of row_bwd goes over `steps` rows
// (blocks of positions) that share weight and bias. It adds up dbias and dweight in shared memory, or where that is too small in its own row of
// the partials, (2, runs*chunks, C).
#pragma once

#include "elementwise.cuh"

namespace normops {

struct Rows {
  int lanes, steps;
  bool held;                 // in shared memory: x (forward), the sums of dbias and dweight (backward)
  int64_t blocks;            // of positions in a sample, one if not ACROSS
  int64_t samples;           // of a run: they share weight and bias
  int64_t chunks, partials;  // of a run, each is a block for each group; rows of partials
};

struct Line {  // what a thread has of a row, or of a block of positions
  int64_t n, statistic, first, start, step;  // offsets: of channel 0 of the group; of this thread's vectors
  int c, c_step, count;                      // the channel of its first vector, and from one to the next; how many vectors
};

// `part`: the group in the sample; where ACROSS, the block of positions. Beyond the last sample there is nothing to do but to take part in sums.
template <int V, bool ACROSS>
__device__ Line line_of(const Problem& p, int lanes, int64_t n, int64_t part) {
  const int lane = threadIdx.x % lanes, team = threadIdx.x / lanes, teams = blockDim.x / lanes;
  int64_t s = ACROSS ? (part * lanes + lane) * V : 0;
  const bool inside = n < p.N && s < p.S;
  if (!inside) n = part = s = 0;
  Line at;
  at.n = n;
  if (ACROSS) {
    at.statistic = n * p.S + s;
    at.first = n * p.C * p.S + s;
    at.c = team;
    at.c_step = teams;
    at.count = rounds(p.C, team, teams);
  } else {
    at.statistic = n * p.G + part;
    at.first = at.statistic * p.D;
    at.c = part * p.D + lane * V;
    at.c_step = lanes * V;
    at.count = rounds(p.D / V, lane, lanes);
  }
  at.start = at.first + (ACROSS ? at.c * p.S : lane * V);
  at.step = at.c_step * p.S;
  if (!inside) at.count = 0;
  return at;
}

template <int V, typename T>
__device__ __forceinline__ Vec<T, V> total_of(const T* x, const T* addend, int64_t offset) {
  using A = Accumulator<T>;
  Vec<T, V> total = load<V>(x + offset);
  if (!addend) return total;
  const Vec<T, V> other = load<V>(addend + offset);
#pragma unroll
  for (int v = 0; v < V; v++) total.at[v] = static_cast<T>(static_cast<A>(total.at[v]) + static_cast<A>(other.at[v]));
  return total;
}

template <typename T, typename Y, int V, bool ACROSS>
__global__ void __launch_bounds__(kThreads, kResident) row_fwd_kernel(Problem p, Rows rows, double eps, const T* x, const T* addend,
                                                                      const T* residual, T* total, Y* y, Saved<Accumulator<T>> stats) {
  using A = Accumulator<T>;
  constexpr int K = ACROSS ? V : 1, P = ACROSS ? 1 : V;
  const int lane = threadIdx.x % rows.lanes, team = threadIdx.x / rows.lanes, teams = blockDim.x / rows.lanes;
  const int64_t unit = ACROSS ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * teams + team, units = ACROSS ? rows.blocks : p.G;
  const Line at = line_of<V, ACROSS>(p, rows.lanes, unit / units, unit % units);
  p.go_to(at.n);

  Vec<T, V>* held = reinterpret_cast<Vec<T, V>*>(shared_memory) + threadIdx.x;
  if (rows.held || addend) {
#pragma unroll 4
    for (int r = 0; r < at.count; r++) {
      const int64_t offset = at.start + r * at.step;
      const Vec<T, V> value = total_of<V>(x, addend, offset);
      if (addend) store(total + offset, value);
      if (rows.held) held[r * blockDim.x] = value;
    }
  }
  const auto kept = rows.held ? held : reinterpret_cast<const Vec<T, V>*>((addend ? total : x) + at.start);
  const int64_t stride = rows.held ? blockDim.x : at.step / V;

  const Vec<T, K> x_first = total_of<K>(x, addend, at.first);
  A first[K];
#pragma unroll
  for (int k = 0; k < K; k++) first[k] = static_cast<A>(x_first.at[k]);
  Chunk<A> all[K];
  moments(all, kept, at.count, stride, first, p.D, stats.centered, [&](auto& value) { team_sum<ACROSS>(value, rows.lanes); });
  Stats<A> own[K];
#pragma unroll
  for (int k = 0; k < K; k++) {
    own[k] = finish<A>(all[k].hi, {static_cast<double>(p.D), all[k].lo, all[k].m2}, eps);
    if (at.count && (ACROSS ? team : lane) == 0) stats.set(at.statistic + k, own[k]);
  }
  for (int r = 0; r < at.count; r++) {
    Channel<A> channels[V];
    read_channels<P>(channels, p, at.c + r * at.c_step, [&](int v) { return own[v % K]; });
    forward(y, kept[r * stride], residual, at.start + r * at.step, channels, p);
  }
}

template <typename T, typename Y, int V, bool ACROSS>
__global__ void __launch_bounds__(kThreads, kResident)
    row_bwd_kernel(Problem p, Rows rows, Backward<Accumulator<T>, T, Y> b, Accumulator<T>* partial) {
  using A = Accumulator<T>;
  constexpr int K = ACROSS ? V : 1, P = ACROSS ? 1 : V;
  const int lane = threadIdx.x % rows.lanes, team = threadIdx.x / rows.lanes, teams = ACROSS ? 1 : blockDim.x / rows.lanes;
  const int g = blockIdx.x % p.G;
  const int64_t chunk = blockIdx.x / p.G, run = chunk / rows.chunks, begin = chunk % rows.chunks * rows.steps * teams;

  // the sums of this block, a row of D for each team: of dbias, and `next` further those of dweight
  A* out = partial + chunk * p.C + g * p.D;
  const int64_t width = static_cast<int64_t>(teams) * p.D, next = rows.held ? width : rows.partials * p.C;
  A* sums = rows.held ? reinterpret_cast<A*>(shared_memory) : out;
  if (partial) {
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) sums[i] = sums[next + i] = 0;
    __syncthreads();
  }
  A* own_sums = sums + (ACROSS ? 0 : team * p.D);

  for (int step = 0; step < rows.steps; step++) {
    const int64_t unit = begin + (ACROSS ? step : step * teams + team), sample = ACROSS ? unit / rows.blocks : unit;
    const int64_t n = sample < rows.samples ? run * rows.samples + sample : p.N;
    const Line at = line_of<V, ACROSS>(p, rows.lanes, n, ACROSS ? unit % rows.blocks : g);
    p.go_to(at.n);
    Stats<A> own[K];
#pragma unroll
    for (int k = 0; k < K; k++) own[k] = b.stats.get(at.statistic + k);
    const auto gradient = [&](A(&dt)[V], A(&x_hat)[V], Channel<A>(&channels)[V], int r) {
      read_channels<P>(channels, p, at.c + r * at.c_step, [&](int v) { return own[v % K]; });
      b.gradient(dt, x_hat, at.start + r * at.step, channels, p);
    };

    A sum_g[K] = {}, sum_g_x_hat[K] = {};
    const int count = ACROSS ? rounds(p.C, 0, blockDim.x / rows.lanes) : at.count;  // as often for every thread where they sum together
    for (int r = 0; r < count; r++) {
      A dt[V] = {}, dt_x_hat[V] = {};
      if (r < at.count) {
        Channel<A> channels[V];
        gradient(dt, dt_x_hat, channels, r);
#pragma unroll
        for (int v = 0; v < V; v++) {
          dt_x_hat[v] *= dt[v];
          sum_g[v % K] = fma_(channels[v].weight, dt[v], sum_g[v % K]);
          sum_g_x_hat[v % K] = fma_(channels[v].weight, dt_x_hat[v], sum_g_x_hat[v % K]);
        }
      }
      if (!partial) continue;
      A* to = own_sums + at.c - g * p.D + r * at.c_step;
      if constexpr (ACROSS) {
        A both[2] = {};
#pragma unroll
        for (int v = 0; v < V; v++) {
          both[0] += dt[v];
          both[1] += dt_x_hat[v];
        }
        line_sum(both, rows.lanes);
        if (lane == 0 && r < at.count) {
          to[0] += both[0];
          to[next] += both[1];
        }
      } else {
        Vec<A, V> sum_dt = load<V>(to), sum_dt_x_hat = load<V>(to + next);
#pragma unroll
        for (int v = 0; v < V; v++) {
          sum_dt.at[v] += dt[v];
          sum_dt_x_hat.at[v] += dt_x_hat[v];
        }
        store(to, sum_dt);
        store(to + next, sum_dt_x_hat);
      }
    }
    if (!b.dx && !b.dresidual) continue;
    team_sum<ACROSS>(sum_g, rows.lanes);
    team_sum<ACROSS>(sum_g_x_hat, rows.lanes);
    A c2[K], c3[K];
#pragma unroll
    for (int k = 0; k < K; k++) {
      c2[k] = -own[k].rstd * (sum_g_x_hat[k] / static_cast<A>(p.D));
      c3[k] = b.stats.centered ? -own[k].rstd * (sum_g[k] / static_cast<A>(p.D)) : 0;
    }
    for (int r = 0; r < at.count; r++) {
      A dt[V], x_hat[V];
      Channel<A> channels[V];
      gradient(dt, x_hat, channels, r);
      b.write(at.start + r * at.step, dt, x_hat, channels, c2, c3);
    }
  }
  if (!partial || !rows.held) return;
  __syncthreads();
  for (int d = threadIdx.x; d < p.D; d += blockDim.x) {
    double sum_dt = 0, sum_dt_x_hat = 0;
    for (int t = 0; t < teams; t++) {
      sum_dt += sums[t * p.D + d];
      sum_dt_x_hat += sums[next + t * p.D + d];
    }
    out[d] = static_cast<A>(sum_dt);
    out[rows.partials * p.C + d] = static_cast<A>(sum_dt_x_hat);
  }
}

}  // namespace normops
