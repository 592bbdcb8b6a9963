// The mathematics that the CPU and the CUDA kernels share: activations with their derivatives, and the merging of moments.
//
//   x_hat = (x - mean)*rstd - mean_lo*rstd       t = x_hat*weight + bias (+ residual)       y = act(t)
//   dt    = dy*act'(t)                            dx = (rstd*weight)*dt + c2*x_hat + c3
//   c2 = -rstd/n * sum over the group of weight*dt*x_hat                  c3 = -rstd/n * sum over the group of weight*dt
//
// Every function is a template over the type A that it computes in: a float or double, or a vector of them on the CPU, for which
// exp_(x), tanh_(x), logistic_(x) and erf_(x, exp(-x*x)) are declared before this file is included.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define NORMOPS_INLINE __host__ __device__ __forceinline__
#else
#define NORMOPS_INLINE inline __attribute__((always_inline))
#endif

namespace normops {

// the order of reference.ACTIVATIONS in normops/reference.py
enum class Activation : int { none, relu, leaky_relu, silu, gelu, gelu_tanh, tanh, sigmoid, hardswish };

// Of `count` elements: the mean, counted from a base that is close to all means at hand, and the sum of squared deviations from the mean.
// Doubles, so that sums of float squares cannot overflow.
struct Moments {
  double count, mean, m2;
};

// Chan's merge of two disjoint sets
NORMOPS_INLINE Moments merge(const Moments& a, const Moments& b) {
  double count = a.count + b.count;
  double delta = b.mean - a.mean;
  return {count, a.mean + delta * (b.count / count), a.m2 + b.m2 + delta * delta * (a.count * b.count / count)};
}

template <typename A>
struct Stats {  // what is saved: the mean as two numbers, and 1/std
  A mean, mean_lo, rstd;
};

template <typename A>
NORMOPS_INLINE Stats<A> finish(double base, const Moments& m, double eps) {
  const A mean = static_cast<A>(base + m.mean);
  return {mean, static_cast<A>((base - static_cast<double>(mean)) + m.mean), static_cast<A>(1.0 / sqrt(m.m2 / m.count + eps))};
}

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kGeluCubic = 0.044715;

#define A_(value) static_cast<S>(value)

// act(t); S is the scalar type of A
template <typename S, typename A>
NORMOPS_INLINE A activate(Activation kind, A t, S slope) {
  const A zero{}, one = zero + A_(1);  // comparisons are written so that NaN stays NaN
  switch (kind) {
    case Activation::none: return t;
    case Activation::relu: return t < zero ? zero : t;
    case Activation::leaky_relu: return t > zero ? t : t * slope;
    case Activation::silu: return t * logistic_(t);
    case Activation::gelu: return t * (A_(0.5) + A_(0.5) * erf_(t * A_(kSqrtHalf), exp_(A_(-0.5) * t * t)));
    case Activation::gelu_tanh: return A_(0.5) * t * (A_(1) + tanh_(A_(kSqrt2OverPi) * (t + A_(kGeluCubic) * t * t * t)));
    case Activation::tanh: return tanh_(t);
    case Activation::sigmoid: return logistic_(t);
    case Activation::hardswish: {
      A gate = t * A_(1.0 / 6) + A_(0.5);
      gate = gate < zero ? zero : gate;
      gate = gate > one ? one : gate;
      return t * gate;
    }
  }
  return t;
}

// act'(t)
template <typename S, typename A>
NORMOPS_INLINE A activate_grad(Activation kind, A t, S slope) {
  const A zero{}, one = zero + A_(1);
  switch (kind) {
    case Activation::none: return one;
    case Activation::relu: return t > zero ? one : zero;
    case Activation::leaky_relu: return t > zero ? one : one * slope;
    case Activation::silu: {
      A s = logistic_(t);
      return s * (A_(1) + t * (A_(1) - s));
    }
    case Activation::gelu: {
      A e = exp_(A_(-0.5) * t * t);
      return A_(0.5) + A_(0.5) * erf_(t * A_(kSqrtHalf), e) + t * (A_(kInvSqrt2Pi) * e);
    }
    case Activation::gelu_tanh: {
      A th = tanh_(A_(kSqrt2OverPi) * (t + A_(kGeluCubic) * t * t * t));
      A du = A_(kSqrt2OverPi) * (A_(1) + A_(3 * kGeluCubic) * t * t);
      return A_(0.5) * (A_(1) + th) + A_(0.5) * t * (A_(1) - th * th) * du;
    }
    case Activation::tanh: {
      A y = tanh_(t);
      return A_(1) - y * y;
    }
    case Activation::sigmoid: {
      A y = logistic_(t);
      return y * (A_(1) - y);
    }
    case Activation::hardswish: {
      A inside = t * A_(1.0 / 3) + A_(0.5);
      inside = t <= A_(-3) ? zero : inside;
      return t >= A_(3) ? one : inside;
    }
  }
  return one;
}

#undef A_

}  // namespace normops
