// The inner loops, one per access pattern, behind a table of function pointers. loops.inc defines them once per instruction set.
//
// rows:    one channel of one sample, contiguous in memory: the coefficients are scalars
// columns: a block of pixels with all channels (or the channels of a group), channels contiguous: the coefficients are vectors over channels
#pragma once

#include "vec.h"

#include "../algebra.h"

namespace normops {

constexpr int64_t kChunk = 4096;  // elements of a row whose moments or sums are taken at once: 16 KB in float, half of an L1 cache

// P is the scalar type A for rows, const A* for columns
template <typename P>
struct Coefficients {
  P mean, rstd, offset, weight, bias;  // x_hat = (x - mean)*rstd + offset, t = x_hat*weight + bias
  P c1, c2, c3;                        // dx = c1*dt + c2*x_hat + c3
};

template <typename A>
struct Options {
  Activation activation;
  A slope;
};

template <typename T, typename P>
struct Apply {  // y = act(t)
  T* y;
  const T *x, *residual;
  Coefficients<P> at;
};

template <typename T, typename P>
struct ApplyBackward {  // dx and, where wanted, dt
  T *dx, *dt;
  const T *dy, *x, *residual;
  Coefficients<P> at;
};

template <typename T>
struct Loops {
  using A = Acc<T>;
  Moments (*moments)(const T* x, int64_t n);  // n <= kChunk
  void (*row)(const Apply<T, A>&, int64_t n, Options<A>);
  void (*row_sums)(A* sums, const ApplyBackward<T, A>&, int64_t n, Options<A>);  // sum dt, sum dt*x_hat
  void (*row_backward)(const ApplyBackward<T, A>&, int64_t n, Options<A>);
  // sums over pixels per channel of x - center, and of its square unless `squares` is null
  void (*column_moments)(A* sums, A* squares, const T* x, const A* center, int64_t pixels, int64_t channels, int64_t stride);
  void (*columns)(const Apply<T, const A*>&, int64_t pixels, int64_t channels, int64_t stride, Options<A>);
  void (*column_sums)(A* sum_dt, A* sum_dt_xhat, const ApplyBackward<T, const A*>&, int64_t pixels, int64_t channels, int64_t stride, Options<A>);
  void (*column_backward)(const ApplyBackward<T, const A*>&, int64_t pixels, int64_t channels, int64_t stride, Options<A>);
};

template <typename T>
const Loops<T>& loops();  // the widest instruction set that this machine has

}  // namespace normops
