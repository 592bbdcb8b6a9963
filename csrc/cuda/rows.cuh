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
// A row, or a block of positions, is worked on in pieces of `width` channels. Steps: a block of row_fwd goes over all pieces of its rows twice, the
// last one first in the second reading, since it is still in shared memory (whole); or rows are long and few, and each piece has a block of its own:
//
//   row_fwd (parts) -> fold_moments -> row_fwd (apply)      row_bwd (parts) -> row_bwd (apply) -> parameter_grads
//
// A block of row_bwd goes over `steps` rows (blocks of positions) that share weight and bias, while the next one is on its way to shared memory. It
// adds up dbias and dweight in shared memory, or where that is too small in its own row of the partials, (2, runs*chunks, C).
#pragma once

#include "elementwise.cuh"

namespace normops {

enum class Step : int { whole, parts, apply };

struct Rows {
  int lanes, steps, width, pieces;
  int count;                 // vectors of a thread in a piece, at most
  Step step;
  bool held, staged;         // backward, in shared memory: the sums of dbias and dweight, sum_bytes; x and dy
  int sum_bytes;
  int64_t blocks;            // of positions in a sample, one if not ACROSS
  int64_t samples;           // of a run: they share weight and bias
  int64_t chunks, partials;  // of a run, each is a block for each group; rows of partials
};

struct Line {  // what a thread has of a piece
  int64_t n, statistic, first, start, step;  // offsets: of the first channel; of this thread's vectors
  int c, c_step, count, elements;            // the channel of its first vector, and from one to the next; how many vectors; channels of the piece
};

// `part`: the group in the sample; where ACROSS, the block of positions. Beyond the last sample there is nothing to do but to take part in sums.
template <int V, bool ACROSS>
__device__ Line line_of(const Problem& p, const Rows& rows, int64_t n, int64_t part, int piece) {
  const int lanes = rows.lanes, lane = threadIdx.x % lanes, team = threadIdx.x / lanes, teams = blockDim.x / lanes, skipped = piece * rows.width;
  int64_t s = ACROSS ? (part * lanes + lane) * V : 0;
  const bool inside = n < p.N && s < p.S;
  if (!inside) n = part = s = 0;
  Line at;
  at.n = n;
  at.elements = p.D - skipped < rows.width ? p.D - skipped : rows.width;
  if (ACROSS) {
    at.statistic = n * p.S + s;
    at.first = (n * p.C + skipped) * p.S + s;
    at.c = skipped + team;
    at.c_step = teams;
    at.count = rounds(at.elements, team, teams);
  } else {
    at.statistic = n * p.G + part;
    at.first = at.statistic * p.D + skipped;
    at.c = part * p.D + skipped + lane * V;
    at.c_step = lanes * V;
    at.count = rounds(at.elements / V, lane, lanes);
  }
  at.start = at.first + (ACROSS ? team * p.S : lane * V);
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

// one block more than usual: it fits the registers, and none of them waits for the next row
template <typename T, typename Y, int V, bool ACROSS>
__global__ void __launch_bounds__(kThreads, ACROSS ? kResident : kResident + 1)
    row_fwd_kernel(Problem p, Rows rows, double eps, const T* x, const T* addend, const T* residual, T* total, Y* y, Saved<Accumulator<T>> stats,
                   Chunk<Accumulator<T>>* partial) {
  using A = Accumulator<T>;
  constexpr int K = ACROSS ? V : 1, P = ACROSS ? 1 : V;
  const int lane = threadIdx.x % rows.lanes, team = threadIdx.x / rows.lanes, teams = ACROSS ? 1 : blockDim.x / rows.lanes;
  const bool whole = rows.step == Step::whole;
  const int begin = whole ? 0 : blockIdx.x % rows.pieces, end = whole ? rows.pieces : begin + 1;
  const int64_t unit = static_cast<int64_t>(whole ? blockIdx.x : blockIdx.x / rows.pieces) * teams + (ACROSS ? 0 : team);
  const int64_t units = ACROSS ? rows.blocks : p.G;
  Vec<T, V>* held = reinterpret_cast<Vec<T, V>*>(shared_memory) + threadIdx.x;
  const auto line = [&](int piece) { return line_of<V, ACROSS>(p, rows, unit / units, unit % units, piece); };
  const auto read = [&](const Line& at, const T* from, const T* other) {
#pragma unroll 4
    for (int r = 0; r < at.count; r++) {
      const int64_t offset = at.start + r * at.step;
      const Vec<T, V> value = total_of<V>(from, other, offset);
      if (other) store(total + offset, value, true);
      held[r * blockDim.x] = value;
    }
  };

  Stats<A> own[K];
  if (rows.step != Step::apply) {
    Moments all[K] = {};
    A origin[K] = {};
    for (int piece = begin; piece < end; piece++) {
      const Line at = line(piece);
      read(at, x, addend);
      const Vec<T, K> x_first = total_of<K>(x, addend, at.first);
      A first[K];
#pragma unroll
      for (int k = 0; k < K; k++) first[k] = static_cast<A>(x_first.at[k]);
      Chunk<A> here[K];
      moments(here, held, at.count, blockDim.x, first, at.elements, stats.centered, [&](auto& value) { team_sum<ACROSS>(value, rows.lanes); });
      if (rows.step == Step::parts && at.count && lane == 0) partial[(at.n * rows.pieces + piece) * p.G + unit % units] = here[0];
#pragma unroll
      for (int k = 0; k < K; k++) {
        if (piece == begin) origin[k] = here[k].hi;
        const Moments m{static_cast<double>(at.elements), (static_cast<double>(here[k].hi) - origin[k]) + here[k].lo, here[k].m2};
        all[k] = piece == begin ? m : merge(all[k], m);
      }
    }
    if (rows.step == Step::parts) return;
    const Line at = line(0);
#pragma unroll
    for (int k = 0; k < K; k++) {
      own[k] = finish<A>(origin[k], all[k], eps);
      if (at.count && (ACROSS ? team : lane) == 0) stats.set(at.statistic + k, own[k]);
    }
  }
  for (int piece = end - 1; piece >= begin; piece--) {
    const Line at = line(piece);
    if (piece < end - 1 || !whole) read(at, addend ? total : x, nullptr);
    if (!whole) own[0] = stats.get(at.statistic);
    p.go_to(at.n);
#pragma unroll 1
    for (int r = 0; r < at.count; r++) {
      const int64_t offset = at.start + r * at.step;
      Channel<A> channels[V];
      read_channels<P>(channels, p, at.c + r * at.c_step, [&](int v) { return own[v % K]; });
      forward(y + offset, held[r * blockDim.x], residual ? reinterpret_cast<const Vec<T, V>*>(residual + offset) : nullptr, channels, p);
    }
  }
}

template <typename T, typename Y, int V, bool ACROSS>
__global__ void __launch_bounds__(kThreads, kResident)
    row_bwd_kernel(Problem p, Rows rows, Backward<Accumulator<T>, T, Y> b, Accumulator<T>* partial, Accumulator<T>* means) {
  using A = Accumulator<T>;
  constexpr int K = ACROSS ? V : 1, P = ACROSS ? 1 : V;
  const int lane = threadIdx.x % rows.lanes, team = threadIdx.x / rows.lanes, teams = ACROSS ? 1 : blockDim.x / rows.lanes;
  const int piece = blockIdx.x % rows.pieces, g = blockIdx.x / rows.pieces % p.G, skipped = piece * rows.width;
  const int width = p.D - skipped < rows.width ? p.D - skipped : rows.width;
  const int64_t chunk = blockIdx.x / rows.pieces / p.G, run = chunk / rows.chunks, begin = chunk % rows.chunks * rows.steps * teams;

  // the sums of this block, a row for each team: of dbias, and `next` further those of dweight
  A* out = partial + chunk * p.C + g * p.D + skipped;
  const int64_t size = static_cast<int64_t>(teams) * width, next = rows.held ? size : rows.partials * p.C;
  A* sums = rows.held ? reinterpret_cast<A*>(shared_memory) : out;
  if (partial) {
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) sums[i] = sums[next + i] = 0;
    __syncthreads();
  }
  A* own_sums = sums + (ACROSS ? 0 : team * width);
  const int stage = rows.count * blockDim.x;  // vectors; two stages of dy, then two of x
  Vec<Y, V>* staged_dy = reinterpret_cast<Vec<Y, V>*>(reinterpret_cast<char*>(shared_memory) + rows.sum_bytes) + threadIdx.x;
  Vec<T, V>* staged_x = reinterpret_cast<Vec<T, V>*>(staged_dy - threadIdx.x + 2 * stage) + threadIdx.x;

  const auto line = [&](int step) {
    const int64_t unit = begin + (ACROSS ? step : step * teams + team), sample = ACROSS ? unit / rows.blocks : unit;
    const int64_t n = sample < rows.samples ? run * rows.samples + sample : p.N;
    return line_of<V, ACROSS>(p, rows, n, ACROSS ? unit % rows.blocks : g, piece);
  };
  const auto fetch_line = [&](int k, int step) {
    if (!rows.staged) return;
    const Line at = line(step);
#pragma unroll 2
    for (int r = 0; r < at.count; r++) {
      fetch(staged_x + k * stage + r * blockDim.x, b.x + at.start + r * at.step, true);
      fetch(staged_dy + k * stage + r * blockDim.x, b.dy + at.start + r * at.step, true);
    }
  };
  ahead<2>(rows.steps, fetch_line, [&](int k, int step) {
    const Line at = line(step);
    p.go_to(at.n);
    Stats<A> own[K];
#pragma unroll
    for (int i = 0; i < K; i++) own[i] = b.stats.get(at.statistic + i);
    const auto gradient = [&](A(&dt)[V], A(&x_hat)[V], Channel<A>(&channels)[V], int r) {
      const int64_t offset = at.start + r * at.step;
      const auto dy = rows.staged ? staged_dy + k * stage + r * blockDim.x : reinterpret_cast<const Vec<Y, V>*>(b.dy + offset);
      const auto x = rows.staged ? staged_x + k * stage + r * blockDim.x : reinterpret_cast<const Vec<T, V>*>(b.x + offset);
      read_channels<P>(channels, p, at.c + r * at.c_step, [&](int v) { return own[v % K]; });
      b.gradient(dt, x_hat, *dy, *x, b.residual ? reinterpret_cast<const Vec<T, V>*>(b.residual + offset) : nullptr, channels, p);
    };

    A sum_g[K] = {}, sum_g_x_hat[K] = {};
    const int most = ACROSS ? rounds(at.elements, 0, blockDim.x / rows.lanes) : at.count;  // as often for every thread where they sum together
#pragma unroll 1
    for (int r = 0; r < (rows.step == Step::apply ? 0 : most); r++) {
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
      A* to = own_sums + at.c - g * p.D - skipped + r * at.c_step;
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
    if (!b.dx && !b.dresidual) return;
    const int64_t part = at.statistic * rows.pieces, parts = b.stats.count * rows.pieces;
    if (rows.step == Step::apply) {
      for (int i = lane; i < rows.pieces; i += rows.lanes) {
        sum_g_x_hat[0] += means[part + i];
        sum_g[0] += means[parts + part + i];
      }
    }
    team_sum<ACROSS>(sum_g, rows.lanes);
    team_sum<ACROSS>(sum_g_x_hat, rows.lanes);
    if (rows.step == Step::parts) {
      if (at.count && lane == 0) {
        means[part + piece] = sum_g_x_hat[0];
        means[parts + part + piece] = sum_g[0];
      }
      return;
    }
    A c2[K], c3[K];
#pragma unroll
    for (int i = 0; i < K; i++) {
      c2[i] = -own[i].rstd * (sum_g_x_hat[i] / static_cast<A>(p.D));
      c3[i] = b.stats.centered ? -own[i].rstd * (sum_g[i] / static_cast<A>(p.D)) : 0;
    }
#pragma unroll 1
    for (int r = 0; r < at.count; r++) {
      A dt[V] = {}, x_hat[V];
      Channel<A> channels[V];
      gradient(dt, x_hat, channels, r);
      b.write(at.start + r * at.step, dt, x_hat, channels, c2, c3);
    }
  });
  if (!partial || !rows.held) return;
  __syncthreads();
  for (int d = threadIdx.x; d < width; d += blockDim.x) {
    double sum_dt = 0, sum_dt_x_hat = 0;
    for (int t = 0; t < teams; t++) {
      sum_dt += sums[t * width + d];
      sum_dt_x_hat += sums[next + t * width + d];
    }
    out[d] = static_cast<A>(sum_dt);
    out[rows.partials * p.C + d] = static_cast<A>(sum_dt_x_hat);
  }
}

}  // namespace normops
