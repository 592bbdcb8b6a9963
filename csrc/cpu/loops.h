// The inner loops, one per access pattern, behind a table of function pointers. loops.inc defines them once per instruction set.
//
// planes:  channels of one group, each contiguous in memory: the coefficients of a plane are scalars
// columns: pixels with all their channels contiguous: the coefficients are vectors over channels
// rows:    consecutive channels that share a statistic: the statistics are scalars, weight and bias vectors
// weights: rows of a weight, with vectors over the elements of a row
// across:  positions with a statistic each over channels `stride` apart: the statistics are vectors over positions, weight and bias scalars
#pragma once

#include "vec.h"

#include "../algebra.h"

namespace normops {

constexpr int64_t kChunk = 4096;  // elements whose moments are taken at once: 16 KB in float, held in the L1 cache for the second look
constexpr int64_t kSample = 256;  // elements whose mean is the first guess
constexpr double kBadGuess = 4;   // a center further from the mean than two standard deviations would cost digits of the variance
constexpr int kTogether = 4;      // rows that share what they load of weight and bias and what they add to the sums of their gradients

template <typename P>
NORMOPS_ALWAYS P* shifted(P* p, int64_t offset) {
  return p ? p + offset : nullptr;
}

// x_hat = (x - mean)*rstd + offset, t = x_hat*weight + bias = (x - mean)*a + b, dx = a*dt + c2*x_hat + c3
template <typename A>
struct Statistic {
  A mean, rstd, offset, c2, c3;
};
template <typename A>
NORMOPS_ALWAYS Statistic<A> statistic(const Stats<A>& s) {
  return {s.mean, s.rstd, -s.mean_lo * s.rstd, 0, 0};
}

// c2 and c3 from the sums of weight*dt*x_hat and of weight*dt, times 1/n
template <typename A>
NORMOPS_ALWAYS void set_sums(Statistic<A>& s, double g_xhat, double g, bool centered) {
  s.c2 = static_cast<A>(-s.rstd * g_xhat);
  s.c3 = centered ? static_cast<A>(-s.rstd * g) : 0;
}

struct Planes {           // of what shares a statistic
  int64_t count, length;  // contiguous elements of each
  int64_t stride;         // elements from one plane to the next
  int64_t step;           // the same in weight, bias and sums: 1, or 0 where all planes are one channel's, which has one sum

  NORMOPS_ALWAYS int64_t n() const { return count * length; }
  NORMOPS_ALWAYS int64_t channels() const { return step ? count : 1; }
  NORMOPS_ALWAYS Planes joined() const { return stride == length ? Planes{1, n(), n(), step} : *this; }
};

template <typename A>
struct Group {  // planes and rows
  Statistic<A> at;
  const A *weight, *bias;  // of the first channel
};
template <typename A>
struct Columns {
  const A *mean, *a, *b, *rstd, *offset, *c2, *c3;  // vectors over channels
};
template <typename A>
struct Across {
  const A *mean, *rstd, *offset, *c2, *c3;  // vectors over positions
  const A *weight, *bias;                   // of the first channel
};

template <typename A>
struct SavedStats {  // of rows: mean, mean_lo, rstd; of rows that are not centered only rstd
  A* data;
  int64_t count;
  bool centered;
  A* variance = nullptr;  // unbiased, where wanted

  NORMOPS_ALWAYS Stats<A> get(int64_t i) const {
    if (!centered) return {0, 0, data[i]};
    return {data[i], data[count + i], data[2 * count + i]};
  }
  NORMOPS_ALWAYS void set(int64_t i, const Stats<A>& s) const {
    if (!data) return;
    if (centered) {
      data[i] = s.mean;
      data[count + i] = s.mean_lo;
    }
    data[(centered ? 2 * count : 0) + i] = s.rstd;
  }
  // of the moments of n elements around `base`, which may be divided by n already
  NORMOPS_ALWAYS Stats<A> save(int64_t i, double base, const Moments& m, double n, double eps) const {
    const Stats<A> s = finish<A>(base, m, eps);
    set(i, s);
    if (variance) variance[i] = static_cast<A>(m.m2 / m.count * (n > 1 ? n / (n - 1) : 1));
    return s;
  }
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
  T *dx, *dt;      // where the loops of the sums find them, they store what needs no sums: dt, and dx = a*dt
  const T *dy, *x, *residual;
  Coefficients at;
  Acc<T>* kept;              // unless null: the sums leave dt here, and the backward pass takes it from here
  bool given = false;        // c2 and c3 are known to the loops of the sums: their dx is whole
  const T* later = nullptr;  // where dx will go, if the sums are to fetch it
};

template <typename T>
struct WholeRows {  // from x, or from total = x + addend; and whole groups of planes
  using A = Acc<T>;
  T *y, *total;
  const T *x, *addend, *residual;
  const A *weight, *bias;          // of the first row
  int64_t weight_step, bias_step;  // from one group to the next
  SavedStats<A> stats;
  int64_t first;  // index of the first row's statistics
  double eps;
  bool given = false;  // the statistics are
};

template <typename T>
struct RowsBackward {
  using A = Acc<T>;
  T *dx, *dt;
  const T *dy, *x, *residual, *dtotal;
  const A *weight, *bias;
  A *kept, *dweight, *dbias;  // sums over rows are added to dweight and dbias
  int64_t step;               // elements from one row to the next
  Statistic<A> at[kTogether];

  NORMOPS_ALWAYS RowsBackward from(int64_t offset, int64_t channel, int64_t weight_offset, int64_t bias_offset) const {
    return {shifted(dx, offset),      shifted(dt, offset),        dy + offset, x + offset, shifted(residual, offset), shifted(dtotal, offset),
            weight + weight_offset,   bias + bias_offset,         shifted(kept, channel), shifted(dweight, channel), shifted(dbias, channel),
            step,                     {}};
  }
};

template <typename T>
struct WholeRowsBackward {
  RowsBackward<T> rows;            // the first, of a sample
  int64_t weight_step, bias_step;  // from one group to the next
  SavedStats<Acc<T>> stats;
  int64_t first;
};

template <typename T>
struct WholeGroupsBackward {
  Backward<T, Group<Acc<T>>> planes;  // of the first group
  SavedStats<Acc<T>> stats;
  int64_t first;
  Acc<T>*sum_dt_xhat, *sum_dt;  // per plane, or per group
  bool leaves_dt;               // as in GroupNorm
};

template <typename T>
struct WeightRows {
  T *out, *new_bias;
  const T* weight;
  const Acc<T>*mean, *var;                // per element of a row, for each group
  const double *input_mean, *input_var;  // the same per input: every `run` elements, again and again
  const double *scale, *bias;            // per row, as what follows
  double *m, *q;
  double eps;
  int64_t n, group, inputs, run;  // elements of a row, rows and inputs of a group
};

template <typename T>
struct WeightRowsBackward {
  T* of_weight;
  const T *dnew, *weight;
  double *of_mean, *of_var;  // per element of a row, for each group; added to
  const double *mean, *var;
  double* of_scale;  // per row, as what follows
  const double *dbias, *dm, *dq, *scale, *m, *q;
  double eps;
  int64_t n, group;
};

template <typename T>
struct Loops {
  using A = Acc<T>;

  // of at most kChunk elements, the mean counted from `center`: a guess when it is `known`, else set here
  Moments (*moments)(const T* x, const Planes&, A& center, bool known);
  double (*squares)(const T* x, int64_t n);
  void (*add)(T* total, const T* x, const T* addend, int64_t n);

  void (*planes)(const Forward<T, Group<A>>&, const Planes&, Options<A>);
  void (*plane_sums)(A* sum_dt_xhat, A* sum_dt, const Backward<T, Group<A>>&, const Planes&, Options<A>);
  void (*plane_backward)(const Backward<T, Group<A>>&, const Planes&, Options<A>);

  // of at most kChunk elements each, `apart` elements from one group to the next
  void (*groups)(const WholeRows<T>&, int64_t groups, int64_t apart, const Planes&, Options<A>);
  void (*groups_backward)(const WholeGroupsBackward<T>&, int64_t groups, int64_t apart, const Planes&, Options<A>);

  // adds to sums per channel of x - center, and of its square unless `squares` is null; pixels are `stride` apart
  void (*column_moments)(A* sums, A* squares, const T* x, const A* center, int64_t pixels, int64_t channels, int64_t stride);
  void (*columns)(const Forward<T, Columns<A>>&, int64_t pixels, int64_t channels, Options<A>);
  void (*column_sums)(A* sum_dt_xhat, A* sum_dt, const Backward<T, Columns<A>>&, int64_t pixels, int64_t channels, Options<A>);  // adds
  void (*column_backward)(const Backward<T, Columns<A>>&, int64_t pixels, int64_t channels, Options<A>);

  void (*rows)(const WholeRows<T>&, int64_t samples, int64_t groups, int64_t n, Options<A>);  // n <= kChunk
  void (*rows_backward)(const WholeRowsBackward<T>&, int64_t samples, int64_t groups, int64_t n, Options<A>);
  void (*row)(const Forward<T, Group<A>>&, int64_t n, Options<A>);
  void (*row_sums)(const RowsBackward<T>&, int64_t n, Options<A>, double& sum_g_xhat, double& sum_g);  // of one row
  void (*row_backward)(const RowsBackward<T>&, int64_t n, Options<A>);

  void (*across)(const Forward<T, Across<A>>&, int64_t channels, int64_t positions, int64_t stride, Options<A>);
  // adds the sums of weight*dt*x_hat and of weight*dt to those per position
  void (*across_sums)(A* sum_dt_xhat, A* sum_dt, A* sum_g_xhat, A* sum_g, const Backward<T, Across<A>>&, int64_t channels, int64_t positions,
                      int64_t stride, Options<A>);
  void (*across_backward)(const Backward<T, Across<A>>&, int64_t channels, int64_t positions, int64_t stride, Options<A>);

  void (*weights)(const WeightRows<T>&, int64_t row, int64_t rows);
  void (*weights_backward)(const WeightRowsBackward<T>&, int64_t row, int64_t rows);
};

template <typename T>
const Loops<T>& loops();  // for the widest instruction set that this machine has

}  // namespace normops
