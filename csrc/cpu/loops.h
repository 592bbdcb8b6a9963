// The inner loops, one per access pattern, behind a table of function pointers. loops.inc defines them once per instruction set.
//
// rows:    channels of one group, each contiguous in memory: the coefficients of a row are scalars
// columns: pixels with all their channels contiguous: the coefficients are vectors over channels
// line:    one pixel's channels of one group: the statistics are scalars, weight and bias vectors
#pragma once

#include "vec.h"

#include "../algebra.h"

namespace normops {

constexpr int64_t kChunk = 4096;  // elements whose moments are taken at once: 16 KB in float, held in the L1 cache for the second look
constexpr int64_t kSample = 256;  // elements whose mean is the first guess
constexpr double kBadGuess = 4;   // a center further from the mean than two standard deviations would cost digits of the variance

// x_hat = (x - mean)*rstd + offset, t = x_hat*weight + bias = (x - mean)*a + b, dx = a*dt + c2*x_hat + c3
template <typename A>
struct Rows {
  A mean, rstd, offset, c2, c3;
  const A *weight, *bias;  // of the first row
};
template <typename A>
struct Columns {
  const A *mean, *a, *b, *rstd, *offset, *c2, *c3;  // vectors over channels
};

template <typename A>
struct Options {
  Activation activation;
  A slope;
};

template <typename T, typename Coefficients>
struct Forward {  // y = act(t)
  T* y;
  const T *x, *residual;
  Coefficients at;
};

template <typename T, typename Coefficients>
struct Backward {  // dx and, where wanted, dt
  T *dx, *dt;
  const T *dy, *x, *residual;
  Coefficients at;
  Acc<T>* kept;  // unless null: the sums leave dt here, and the backward pass takes it from here
};

template <typename T>
struct Loops {
  using A = Acc<T>;
  // of n <= kChunk elements, the mean counted from `center`: a guess when it is `known`, else set here
  Moments (*moments)(const T* x, int64_t n, A& center, bool known);
  void (*rows)(const Forward<T, Rows<A>>&, int64_t rows, int64_t length, Options<A>);
  void (*row_sums)(A* sum_dt_xhat, A* sum_dt, const Backward<T, Rows<A>>&, int64_t rows, int64_t length, Options<A>);  // per row
  void (*row_backward)(const Backward<T, Rows<A>>&, int64_t rows, int64_t length, Options<A>);
  void (*line)(const Forward<T, Rows<A>>&, int64_t channels, Options<A>);
  void (*line_sums)(A* sum_dt_xhat, A* sum_dt, const Backward<T, Rows<A>>&, int64_t channels, Options<A>);  // per channel
  void (*line_backward)(const Backward<T, Rows<A>>&, int64_t channels, Options<A>);
  // adds to sums per channel of x - center, and of its square unless `squares` is null
  void (*column_moments)(A* sums, A* squares, const T* x, const A* center, int64_t pixels, int64_t channels);
  void (*columns)(const Forward<T, Columns<A>>&, int64_t pixels, int64_t channels, Options<A>);
  void (*column_sums)(A* sum_dt_xhat, A* sum_dt, const Backward<T, Columns<A>>&, int64_t pixels, int64_t channels, Options<A>);  // adds
  void (*column_backward)(const Backward<T, Columns<A>>&, int64_t pixels, int64_t channels, Options<A>);
};

template <typename T>
const Loops<T>& loops();  // for the widest instruction set that this machine has

}  // namespace normops
