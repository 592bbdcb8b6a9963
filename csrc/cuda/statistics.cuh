// Analytic normalization on the GPU: moments of activations, and weights whose outputs have a given mean and standard deviation.
//
//   forward    m = sum W*mean     q = sum W^2*var     r = scale/sqrt(q + eps)     out = r*W     out_bias = bias - m*r
//   backward   dr = <dout, W> - dbias*m     dm = dstats[0] - dbias*r     dq = dstats[1] - r/(2*(q + eps))*dr
//              of_weight = r*dout + mean*dm + 2*var*W*dq     of_scale = dr/sqrt(q + eps)
//              of_mean = sum W*dm     of_var = sum W^2*dq, over the rows and taps of an input
//
//   activation_moments                                  the six values
//   weight_fwd                                          out, out_bias and stats
//   weight_rows -> weight_columns -> parameter_grads    all gradients
//
// W has a row of n = inputs*taps elements for each output, `rows` of them for each group. Element e of a row of group g belongs to input
// g*inputs + e/taps, or with `last` (channels last) g*inputs + e%inputs. Sums are in double for all dtypes of W: products of floats may leave their
// range, and beside the reading of W the arithmetic is little.
#pragma once

#include "../maps.h"
#include "device.cuh"

namespace normops {

// ---- activations ----

struct Nodes {  // an argument of the kernel, and so in constant memory
  double legendre[2 * maps::kPanel];
};

struct Team {  // `step` threads of a warp integrate together
  const double* legendre;
  int first, step;

  __device__ void share(maps::Integral& sum) const {
    double all[] = {sum.weight, sum.d, sum.square, sum.first, sum.second, sum.slope, sum.bend};
    line_sum(all, step);
    sum = {sum.here, all[0], all[1], all[2], all[3], all[4], all[5], all[6]};
  }
};

// out: the six values, each for n elements. One thread for an element, or a warp: its threads take the same branches.
__global__ void __launch_bounds__(kThreads, kResident)
    activation_moments_kernel(double* out, const double* mean, const double* var, int64_t n, int lanes, Map map, double first, double second,
                              const __grid_constant__ Nodes nodes) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  const int lane = threadIdx.x % lanes;
  if (i >= n) return;
  const Mapped k = moments(map, mean[i], var[i], first, second, Team{nodes.legendre, lane, lanes});
  if (lane) return;
  const double values[] = {k.m, k.variance, k.m_mu, k.m_v, k.v_mu, k.v_v};
#pragma unroll
  for (int j = 0; j < 6; j++) out[j * n + i] = values[j];
}

// ---- weights ----

struct Weights {
  int64_t outputs;
  int n, inputs, taps, groups, rows;  // elements of a row; inputs and rows of a group
  bool last;

  // body(v, input of the group, tap) for V neighbours of a row, from element e on
  template <int V, typename Body>
  __device__ __forceinline__ void each(int e, Body body) const {
    const int run = last ? inputs : taps;
    int outer = e / run, inner = e % run;
#pragma unroll
    for (int v = 0; v < V; v++) {
      body(v, last ? inner : outer, last ? outer : inner);
      if (++inner < run) continue;
      inner = 0;
      outer++;
    }
  }
};

template <typename T>
__device__ __forceinline__ double wide(T value) {
  return static_cast<double>(static_cast<Accumulator<T>>(value));
}

struct Row {  // what a team of `lanes` threads has at once
  int64_t o;
  int lane, count;  // vectors of this thread, lane, lane + lanes, ...
  bool owner;       // writes what the team has summed up

  __device__ Row(const Weights& s, int lanes, int V) : lane(threadIdx.x % lanes) {
    o = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
    const bool inside = o < s.outputs;  // beyond there is nothing to do but to take part in sums
    if (!inside) o = 0;
    count = inside ? rounds(s.n / V, lane, lanes) : 0;
    owner = inside && lane == 0;
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    weight_fwd_kernel(Weights s, int lanes, bool hold, double eps, const T* weight, const double* mean, const double* var, Parameter scale,
                      Parameter bias, T* out, T* out_bias, double* stats) {
  using A = Accumulator<T>;
  const Row row(s, lanes, V);
  const int64_t start = row.o * s.n + row.lane * V, step = lanes * V;
  Vec<T, V>* held = reinterpret_cast<Vec<T, V>*>(shared_memory) + threadIdx.x;
  if (hold) {
#pragma unroll 4
    for (int r = 0; r < row.count; r++) held[r * blockDim.x] = load<V>(weight + start + r * step);
  }
  const auto kept = hold ? held : reinterpret_cast<const Vec<T, V>*>(weight + start);  // not held: a row that needs the whole block
  const int64_t group = row.o / s.rows * s.inputs;
  double sums[2] = {};  // m and q
#pragma unroll 2
  for (int r = 0; r < row.count; r++) {
    const Vec<T, V> w = kept[r * blockDim.x];
    s.each<V>((row.lane + r * lanes) * V, [&](int v, int input, int) {
      const double value = wide(w.at[v]);
      sums[0] = fma(value, mean[group + input], sums[0]);
      sums[1] = fma(value * var[group + input], value, sums[1]);
    });
  }
  team_sum<false>(sums, lanes);
  double gain[1], shift[1];
  scale.read(gain, row.o, 1.0);
  bias.read(shift, row.o, 0.0);
  gain[0] /= sqrt(sums[1] + eps);
  if (row.owner) {
    out_bias[row.o] = static_cast<T>(static_cast<A>(shift[0] - sums[0] * gain[0]));
    stats[row.o] = sums[0];
    stats[s.outputs + row.o] = sums[1];
  }
  const A factor = static_cast<A>(gain[0]);
#pragma unroll 4
  for (int r = 0; r < row.count; r++) {
    Vec<T, V> w = kept[r * blockDim.x];
#pragma unroll
    for (int v = 0; v < V; v++) w.at[v] = static_cast<T>(static_cast<A>(w.at[v]) * factor);
    store(out + start + r * step, w);
  }
}

struct RowGradient {  // of a row, for all of its elements
  double gain, dm, dq;
};

struct Upstream {  // what weight_rows reads of each output
  const double *dbias, *dstats, *stats;
  Parameter scale;
  double eps;
};

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    weight_rows_kernel(Weights s, int lanes, Upstream up, const T* dout, const T* weight, double* of_scale, RowGradient* gradients) {
  const Row row(s, lanes, V);
  const int64_t start = row.o * s.n + row.lane * V, step = lanes * V;
  double dot[1] = {};
#pragma unroll 4
  for (int r = 0; r < row.count; r++) {
    const Vec<T, V> d = load<V>(dout + start + r * step), w = load<V>(weight + start + r * step);
#pragma unroll
    for (int v = 0; v < V; v++) dot[0] = fma(wide(d.at[v]), wide(w.at[v]), dot[0]);
  }
  team_sum<false>(dot, lanes);
  if (!row.owner) return;
  const int64_t o = row.o;
  double gain[1];
  up.scale.read(gain, o, 1.0);
  const double rstd = 1 / sqrt(up.stats[s.outputs + o] + up.eps), r = gain[0] * rstd, dr = dot[0] - up.dbias[o] * up.stats[o];
  of_scale[o] = dr * rstd;
  gradients[o] = {r, up.dstats[o] - up.dbias[o] * r, up.dstats[s.outputs + o] - 0.5 * r * rstd * rstd * dr};
}

// A thread has V neighbours of a row in all rows of a chunk. partial: the sums of W*dm, then those of W^2*dq, (2, chunks, taps, groups*inputs)
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kResident)
    weight_columns_kernel(Weights s, int together, int chunks, const RowGradient* __restrict__ gradients, const T* __restrict__ dout,
                          const T* __restrict__ weight, const double* mean, const double* var, T* __restrict__ of_weight, double* partial) {
  using A = Accumulator<T>;
  const int chunk = blockIdx.x % chunks, width = s.n / V;
  const int64_t column = static_cast<int64_t>(blockIdx.x / chunks) * blockDim.x + threadIdx.x, g = column / width;
  if (g >= s.groups) return;
  const int e = static_cast<int>(column % width) * V, begin = chunk * together, count = s.rows - begin < together ? s.rows - begin : together;
  const int64_t first = g * s.rows + begin, channels = static_cast<int64_t>(s.groups) * s.inputs;
  double mu[V], twice[V], of_mean[V] = {}, of_var[V] = {};
  s.each<V>(e, [&](int v, int input, int) {
    mu[v] = mean[g * s.inputs + input];
    twice[v] = 2 * var[g * s.inputs + input];
  });
#pragma unroll 2
  for (int k = 0; k < count; k++) {
    const int64_t offset = (first + k) * s.n + e;
    const Vec<T, V> d = load<V>(dout + offset), w = load<V>(weight + offset);
    const RowGradient row = gradients[first + k];
    Vec<T, V> out;
#pragma unroll
    for (int v = 0; v < V; v++) {
      const double value = wide(w.at[v]), along = value * row.dq;
      of_mean[v] = fma(value, row.dm, of_mean[v]);
      of_var[v] = fma(value, along, of_var[v]);
      out.at[v] = static_cast<T>(static_cast<A>(fma(row.gain, wide(d.at[v]), fma(mu[v], row.dm, twice[v] * along))));
    }
    store(of_weight + offset, out);
  }
  s.each<V>(e, [&](int v, int input, int tap) {
    double* to = partial + (static_cast<int64_t>(chunk) * s.taps + tap) * channels + g * s.inputs + input;
    to[0] = of_mean[v];
    to[channels * s.taps * chunks] = of_var[v];
  });
}

}  // namespace normops
