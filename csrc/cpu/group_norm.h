// Group and batch normalization on the CPU: moments -> fold -> apply, and sums -> fold -> apply backward, over tasks for one or many threads.
//
// A group of batch norm is a channel of all samples. Channels last, and where planes are short, batch_columns.h takes it.
//
// A task is a whole group (channels first) or a whole sample (channels last) when there are enough of them: its second pass then hits the cache.
// Otherwise the three steps run one after the other, each over pieces of all groups. Pieces have a fixed size and are merged in index order, in
// double: the results do not depend on the number of threads. With frozen statistics the one pass that is left is over pieces.
//
// This file holds what the two layouts have in common.
#pragma once

#include "loops.h"
#include "tasks.h"

namespace normops {

struct Shape {
  int64_t N, C, S, G;
  bool batch;  // the statistics are of all samples, and G = C
  int64_t D() const { return C / G; }
  int64_t n() const { return (batch ? N : D()) * S; }  // elements of a group
  int64_t samples() const { return batch ? 1 : N; }    // that have statistics of their own
  int64_t groups() const { return samples() * G; }
  int64_t sums() const { return samples() * C; }
};

template <typename A>
struct Affine {  // per channel, or per sample and channel
  const A *weight, *bias;
  int64_t stride;  // from one sample to the next: 0 or C
};

template <typename T>
struct GroupNorm {
  using A = Acc<T>;

  Shape s;
  const T *x, *residual;
  Affine<A> affine;
  Options<A> options;
  A* stats;        // (3, samples, G), batch norm forward (4, 1, G), or given as (3, frozen, G)
  int64_t frozen;  // for how many samples statistics are given: 0, one for all, or N
  const A* means;  // null, or with frozen statistics (2, frozen, G): of weight*dt*x_hat and of weight*dt
  const int64_t D = s.D();
  const Loops<T>& loop = loops<T>();

  template <typename At>
  Forward<T, At> forward_from(T* y, int64_t offset, const At& at) const {
    return {y + offset, x + offset, shifted(residual, offset), at};
  }
  template <typename At>
  Backward<T, At> backward_from(T* dx, T* dt, const T* dy, int64_t offset, const At& at, A* kept) const {  // kept: for this offset already
    return {shifted(dx, offset), shifted(dt, offset), dy + offset, x + offset, shifted(residual, offset), at, kept, means != nullptr};
  }

  // Whether the sums leave dt where it is wanted, since it is not rounded there: the second pass then needs neither activation nor residual
  bool leaves_dt(const T* dx, const T* dt) const { return dx && dt && !frozen && std::is_same_v<T, A>; }

  GroupNorm linear() const {  // the norm of that second pass
    GroupNorm norm = *this;
    norm.residual = nullptr;
    norm.options.activation = Activation::none;
    return norm;
  }

  SavedStats<A> saved() const { return {stats, frozen ? frozen * s.G : s.groups(), true, s.batch ? stats + 3 * s.G : nullptr}; }

  // the means of `sets` are counted from `base`
  void save(int64_t group, A base, const Moments* sets, int64_t count, int64_t stride, double eps) const {
    saved().save(group, static_cast<double>(base), merge(sets, count, stride), static_cast<double>(s.n()), eps);
  }

  // of a group; c2 and c3 too where there are sums of its channels
  Group<A> coefficients(int64_t sample, int64_t index, const A* sums) const {
    const int64_t group = sample * s.G + index, first = sample * affine.stride + index * D;  // channel
    const int64_t at = frozen == 1 ? index : group;
    Group<A> g{statistic(saved().get(at)), affine.weight + first, affine.bias + first};
    if (means) set_sums(g.at, means[at], means[frozen * s.G + at], true);
    if (sums) {
      const A *sum_dt_xhat = sums + group * D, *sum_dt = sum_dt_xhat + s.sums();
      const double n = static_cast<double>(s.n());
      set_sums(g.at, dot(g.weight, sum_dt_xhat, D) / n, dot(g.weight, sum_dt, D) / n, true);
    }
    return g;
  }

  // out[i] = sum over `count` parts, `stride` apart
  template <typename E>
  static void fold_parts(A* out, const E* partial, int64_t n, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < n; i++) {
      double total = 0;
      for (int64_t part = 0; part < count; part++) total += partial[part * stride + i];
      out[i] = static_cast<A>(total);
    }
  }
};

}  // namespace normops
