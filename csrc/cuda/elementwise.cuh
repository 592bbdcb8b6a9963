// Norms on the GPU: what is done to each element, V neighbours of K channels at a time.
#pragma once

#include "device.cuh"

namespace normops {

template <typename A>
struct Channel {
  A mean, rstd, shift, weight, bias;  // shift = -mean_lo*rstd

  __device__ A x_hat(A x) const { return fma_(x - mean, rstd, shift); }
};

// channels c, c + 1, ... for k, k + P, ...; stats_of(k) are the statistics of the k-th of K
template <int P, int K, typename A, typename StatsOf>
__device__ __forceinline__ void read_channels(Channel<A> (&channels)[K], const Problem& p, int c, StatsOf stats_of, int per_weight = 1) {
  A weight[P], bias[P];
  p.weight.read(weight, c, A(1), per_weight);
  p.bias.read(bias, c, A(0), per_weight);
#pragma unroll
  for (int k = 0; k < K; k++) {
    const Stats<A> stats = stats_of(k);
    channels[k] = {stats.mean, stats.rstd, -stats.mean_lo * stats.rstd, weight[k % P], bias[k % P]};
  }
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

// t of V neighbours; `added` to it is a residual, or nothing
template <typename A, int K, typename T, int V>
__device__ __forceinline__ void affine(A (&t)[V], A (&x_hat)[V], const Vec<T, V>& x, const Vec<T, V>* added, const Channel<A> (&channels)[K]) {
#pragma unroll
  for (int v = 0; v < V; v++) {
    const Channel<A>& ch = channels[v % K];
    x_hat[v] = ch.x_hat(static_cast<A>(x.at[v]));
    t[v] = fma_(x_hat[v], ch.weight, ch.bias);
  }
  if (!added) return;
  const Vec<T, V> residual = *added;
#pragma unroll
  for (int v = 0; v < V; v++) t[v] += static_cast<A>(residual.at[v]);
}

template <typename A, int K, typename T, typename Y, int V>
__device__ __forceinline__ void forward(Y* y, Vec<T, V> x, const Vec<T, V>* added, const Channel<A> (&channels)[K], const Problem& p,
                                        bool kept = true) {
  A t[V], x_hat[V];
  affine(t, x_hat, x, added, channels);
  Vec<Y, V> out;
  with_activation(p.activation, [&](auto activation) {
#pragma unroll
    for (int v = 0; v < V; v++) out.at[v] = static_cast<Y>(activate(activation.value, t[v], static_cast<A>(p.slope)));
  });
  store(y, out, kept);
}

template <typename A, typename T, typename Y>
struct Backward {  // what the backward kernels read and write; dtotal, dx and dresidual may be null
  T *dx, *dresidual;
  const Y* dy;
  const T *dtotal, *x, *residual;
  Saved<A> stats;

  // dt and x_hat of V neighbours
  template <int V, int K>
  __device__ __forceinline__ void gradient(A (&dt)[V], A (&x_hat)[V], Vec<Y, V> upstream, Vec<T, V> value, const Vec<T, V>* added,
                                           const Channel<A> (&channels)[K], const Problem& p) const {
    A t[V];
    affine(t, x_hat, value, added, channels);
    with_activation(p.activation, [&](auto activation) {
#pragma unroll
      for (int v = 0; v < V; v++) dt[v] = static_cast<A>(upstream.at[v]) * activate_grad(activation.value, t[v], static_cast<A>(p.slope));
    });
  }

  // dx and dresidual of V neighbours, with the coefficients of M statistics
  template <int V, int K, int M>
  __device__ __forceinline__ void write(int64_t offset, const A (&dt)[V], const A (&x_hat)[V], const Channel<A> (&channels)[K], const A (&c2)[M],
                                        const A (&c3)[M], bool kept = true) const {
    Vec<T, V> out;
#pragma unroll
    for (int v = 0; v < V; v++) out.at[v] = static_cast<T>(dt[v]);
    if (dresidual) store(dresidual + offset, out, kept);
    if (!dx) return;
    Vec<T, V> added{};
    if (dtotal) added = load<V>(dtotal + offset);
#pragma unroll
    for (int v = 0; v < V; v++) {
      const Channel<A>& ch = channels[v % K];
      out.at[v] = static_cast<T>(fma_(ch.rstd * ch.weight, dt[v], fma_(c2[v % M], x_hat[v], c3[v % M])) + static_cast<A>(added.at[v]));
    }
    store(dx + offset, out, kept);
  }
};

}  // namespace normops
