// Group norm on the GPU: what is done to each element, V neighbours of K channels at a time, and the coefficients for it.
#pragma once

#include "device.cuh"

namespace normops {

template <typename A>
struct Channel {
  A mean, rstd, shift, weight, bias;  // shift = -mean_lo*rstd

  __device__ A x_hat(A x) const { return fma_(x - mean, rstd, shift); }
};

template <typename A>
__device__ Stats<A> saved(const Problem& p, const A* stats, int64_t group) {
  const int64_t groups = p.N * p.G;
  return {stats[group], stats[groups + group], stats[2 * groups + group]};
}

// channels c, c + 1, ... of sample n; stats_of(k) are those of the group of channel c + k
template <int K, typename A, typename StatsOf>
__device__ __forceinline__ void read_channels(Channel<A> (&channels)[K], const Problem& p, int64_t n, int c, StatsOf stats_of) {
  A weight[K], bias[K];
  p.weight.read(weight, n, c, A(1));
  p.bias.read(bias, n, c, A(0));
#pragma unroll
  for (int k = 0; k < K; k++) {
    const Stats<A> stats = stats_of(k);
    channels[k] = {stats.mean, stats.rstd, -stats.mean_lo * stats.rstd, weight[k], bias[k]};
  }
}

template <int K, typename A>
__device__ __forceinline__ void read_channels(Channel<A> (&channels)[K], const Problem& p, const A* stats, int64_t n, int c) {
  read_channels(channels, p, n, c, [&](int k) { return saved(p, stats, n * p.G + (c + k) / p.D); });
}

// body(constant) with the activation as a constant, so that it is chosen once per vector
template <typename Body>
__device__ __forceinline__ void with_activation(Activation activation, Body body) {
#define NORMOPS_CASE(name) \
  case Activation::name: return body(std::integral_constant<Activation, Activation::name>{})
  switch (activation) {
    NORMOPS_CASE(none);
    NORMOPS_CASE(relu);
    NORMOPS_CASE(leaky_relu);
    NORMOPS_CASE(silu);
    NORMOPS_CASE(gelu);
    NORMOPS_CASE(gelu_tanh);
    NORMOPS_CASE(tanh);
    NORMOPS_CASE(sigmoid);
    NORMOPS_CASE(hardswish);
  }
#undef NORMOPS_CASE
}

// t of V neighbours
template <typename A, int K, typename T, int V>
__device__ __forceinline__ void affine(A (&t)[V], A (&x_hat)[V], const Vec<T, V>& x, const T* residual, int64_t offset,
                                       const Channel<A> (&channels)[K]) {
  Vec<T, V> added{};
  if (residual) added = load<V>(residual + offset);
#pragma unroll
  for (int v = 0; v < V; v++) {
    const Channel<A>& ch = channels[v % K];
    x_hat[v] = ch.x_hat(static_cast<A>(x.at[v]));
    t[v] = fma_(x_hat[v], ch.weight, ch.bias);
    if (residual) t[v] += static_cast<A>(added.at[v]);
  }
}

template <typename A, int K, typename T, typename Y, int V>
__device__ __forceinline__ void forward(Y* y, const Vec<T, V>& x, const T* residual, int64_t offset, const Channel<A> (&channels)[K],
                                        const Problem& p) {
  A t[V], x_hat[V];
  affine(t, x_hat, x, residual, offset, channels);
  Vec<Y, V> out;
  with_activation(p.activation, [&](auto activation) {
#pragma unroll
    for (int v = 0; v < V; v++) out.at[v] = static_cast<Y>(activate(activation.value, t[v], static_cast<A>(p.slope)));
  });
  store(y + offset, out);
}

// dt and x_hat of V neighbours
template <typename A, int K, typename T, typename Y, int V>
__device__ __forceinline__ void gradient(A (&dt)[V], A (&x_hat)[V], const Y* dy, const T* x, const T* residual, int64_t offset,
                                         const Channel<A> (&channels)[K], const Problem& p) {
  const Vec<Y, V> upstream = load<V>(dy + offset);
  A t[V];
  affine(t, x_hat, load<V>(x + offset), residual, offset, channels);
  with_activation(p.activation, [&](auto activation) {
#pragma unroll
    for (int v = 0; v < V; v++) dt[v] = static_cast<A>(upstream.at[v]) * activate_grad(activation.value, t[v], static_cast<A>(p.slope));
  });
}

template <typename A, typename T, typename Y>
struct Backward {  // what the backward kernels read and write; dx and dresidual may be null
  T *dx, *dresidual;
  const Y* dy;
  const T *x, *residual;
  const A* stats;

  // sum_dt and sum_dt_x_hat of this thread's vectors
  template <int V, int K>
  __device__ void sum(A (&sum_dt)[K], A (&sum_dt_x_hat)[K], const Place& at, const Channel<A> (&channels)[K], const Problem& p) const {
    for (int r = 0; r < at.count; r++) {
      A dt[V], x_hat[V];
      gradient(dt, x_hat, dy, x, residual, at.start + r * at.step, channels, p);
#pragma unroll
      for (int v = 0; v < V; v++) {
        sum_dt[v % K] += dt[v];
        sum_dt_x_hat[v % K] = fma_(dt[v], x_hat[v], sum_dt_x_hat[v % K]);
      }
    }
  }

  template <int V, int K>
  __device__ void apply(const Place& at, const Channel<A> (&channels)[K], const A (&c2)[K], const A (&c3)[K], const Problem& p) const {
    for (int r = 0; r < at.count; r++) {
      const int64_t offset = at.start + r * at.step;
      A dt[V], x_hat[V];
      gradient(dt, x_hat, dy, x, residual, offset, channels, p);
      Vec<T, V> out;
#pragma unroll
      for (int v = 0; v < V; v++) out.at[v] = static_cast<T>(dt[v]);
      if (dresidual) store(dresidual + offset, out);
      if (!dx) continue;
#pragma unroll
      for (int v = 0; v < V; v++) {
        const int k = v % K;
        out.at[v] = static_cast<T>(fma_(channels[k].rstd * channels[k].weight, dt[v], fma_(c2[k], x_hat[v], c3[k])));
      }
      store(dx + offset, out);
    }
  }
};

// c2 and c3 of a group from the sums of its channels, for every thread of the block. sums: (2, N, C)
template <typename A>
__device__ void coefficients(A& c2, A& c3, const Problem& p, const A* stats, const A* sums, int64_t n, int g) {
  double total[2] = {};
  for (int d = threadIdx.x; d < p.D; d += blockDim.x) {
    const int c = g * p.D + d;
    double weight[1];
    p.weight.read(weight, n, c, 1.0);
    total[0] += weight[0] * sums[n * p.C + c];
    total[1] += weight[0] * sums[(p.N + n) * p.C + c];
  }
  block_sum(total, 1);
  const double scale = -static_cast<double>(saved(p, stats, n * p.G + g).rstd) / (static_cast<double>(p.D) * p.S);
  c3 = static_cast<A>(scale * total[0]);
  c2 = static_cast<A>(scale * total[1]);
}

}  // namespace normops
