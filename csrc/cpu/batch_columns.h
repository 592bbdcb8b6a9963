// Batch normalization of columns: rows of all channels, each with D contiguous columns. Channels last a row is a position and D = 1; channels first
// it is a sample and D = S, where planes are too short for loops of their own.
//
// The steps run one after the other over runs of rows. What runs leave is added in their order, in double.
#pragma once

#include <atomic>

#include "group_norm.h"

namespace normops {

template <typename T>
class BatchColumns : GroupNorm<T> {
  using Base = GroupNorm<T>;
  using Base::affine, Base::backward_from, Base::forward_from, Base::frozen, Base::leaves_dt, Base::linear, Base::loop, Base::options, Base::s,
      Base::saved, Base::x;

 public:
  using A = Acc<T>;
  using Base::means;

  BatchColumns(const Base& common, bool channels_last)
      : Base(common), D(channels_last ? 1 : s.S), rows(channels_last ? s.N * s.S : s.N), columns(s.C * D) {}

  void forward(T* y, double eps) const {
    auto storage = buffer<A>(7 * columns);
    if (!frozen) {
      guess(storage.get());
      if (!scan(storage.get(), eps)) scan(storage.get(), eps);
    }
    if (!y) return;
    const Columns<A> at = vectors(false, storage.get());
    over_runs(false, [&](int64_t first, int64_t count) {
      loop.columns(forward_from(y, first * columns, at), count, columns, options);
    });
  }

  // sums: (2, C): sum dt*x_hat, sum dt
  void backward(T* dx, T* dt, A* sums, const T* dy) const {
    const bool leave = leaves_dt(dx, dt);
    auto storage = buffer<A>(7 * columns);
    const Columns<A> at = vectors(true, storage.get());
    const auto partial = sums_of_runs([&](A* out, int64_t first, int64_t count) {
      const auto from = backward_from(frozen ? dx : nullptr, frozen || leave ? dt : nullptr, dy, first * columns, at, nullptr);
      loop.column_sums(out, out + columns, from, count, columns, options);
    });
    fold(partial.get(), [&](int64_t c, double sum_dt_xhat, double sum_dt) {
      sums[c] = static_cast<A>(sum_dt_xhat);
      sums[s.C + c] = static_cast<A>(sum_dt);
    });
    if (frozen || (!dx && !dt)) return;
    set_means(sums, storage.get());
    const Base second = leave ? linear() : Base(*this);
    over_runs(false, [&](int64_t first, int64_t count) {
      const auto from = second.backward_from(dx, leave ? nullptr : dt, leave ? dt : dy, first * columns, at, nullptr);
      loop.column_backward(from, count, columns, second.options);
    });
  }

 private:
  const int64_t D, rows, columns;
  const int64_t runs = ceil_div(rows, kRun);

  template <typename F>
  void over_runs(bool forwards, const F& f) const {
    parallel(runs, kRun * columns, [&](int64_t i) {
      const int64_t first = (forwards ? i : runs - 1 - i) * kRun;  // the end is still in the cache
      f(first, std::min(kRun, rows - first));
    });
  }

  template <typename F>
  Buffer<A> sums_of_runs(const F& add) const {  // (runs, 2, columns)
    auto partial = buffer<A>(runs * 2 * columns);
    over_runs(true, [&](int64_t first, int64_t count) {
      A* sums = &partial[first / kRun * 2 * columns];
      std::fill_n(sums, 2 * columns, A(0));
      add(sums, first, count);
    });
    return partial;
  }

  // f(channel, its first sum, its second)
  template <typename F>
  void fold(const A* partial, const F& f) const {
    constexpr int64_t kBlock = 64;
    parallel(ceil_div(s.C, kBlock), runs * kBlock * D, [&](int64_t block) {
      const int64_t begin = block * kBlock, channels = std::min(kBlock, s.C - begin), n = channels * D;
      auto totals = buffer<double>(2 * n);
      for (int64_t k = 0; k < 2; k++) {
        double* total = &totals[k * n];
        std::fill_n(total, n, 0.0);
        for (int64_t run = 0; run < runs; run++) {
          const A* sums = partial + (run * 2 + k) * columns + begin * D;
          for (int64_t i = 0; i < n; i++) total[i] += sums[i];
        }
      }
      for (int64_t i = 0; i < channels; i++) f(begin + i, of_channel(totals.get(), i), of_channel(&totals[n], i));
    });
  }

  template <typename E>
  double of_channel(const E* values, int64_t c) const {
    return D == 1 ? values[c] : sum_of(values + c * D, D);
  }

  void spread(A* values) const {  // from channels to their columns
    if (D > 1)
      for (int64_t c = s.C; c-- > 0;) std::fill_n(values + c * D, D, A(values[c]));
  }

  // centers near the means: those of the first rows
  void guess(A* center) const {
    const int64_t count = std::min(rows, ceil_div(16, D));
    auto sums = buffer<A>(columns);
    std::fill_n(sums.get(), columns, A(0));
    for (int64_t c = 0; c < s.C; c++) center[c] = load<1>(x + c * D);
    spread(center);
    loop.column_moments(sums.get(), nullptr, x, center, count, columns, columns);
    const double inverse = 1.0 / static_cast<double>(count * D);
    for (int64_t c = 0; c < s.C; c++) center[c] = static_cast<A>(center[c * D] + of_channel(sums.get(), c) * inverse);
    spread(center);
  }

  // Saves the statistics. Where a center proves bad the mean becomes the center, and false asks for another pass.
  bool scan(A* center, double eps) const {
    const auto partial = sums_of_runs([&](A* sums, int64_t first, int64_t count) {
      loop.column_moments(sums, sums + columns, x + first * columns, center, count, columns, columns);
    });
    const double n = static_cast<double>(s.n()), inverse = 1 / n;
    std::atomic<bool> good = true;
    fold(partial.get(), [&](int64_t c, double sum, double m2) {
      const A middle = center[c * D];
      const double low = sum * inverse;
      if (std::isinf(m2)) m2 = wide_squares(c, middle);
      m2 -= low * sum;
      saved().save(c, middle, {n, low, m2 < 0 ? 0 : m2}, n, eps);
      if (!(low * sum > kBadGuess * m2)) return;
      std::fill_n(center + c * D, D, static_cast<A>(middle + low));
      good = false;
    });
    return good;
  }

  double wide_squares(int64_t c, A middle) const {  // float squares overflowed
    double m2 = 0;
    for (int64_t row = 0; row < rows; row++)
      for (int64_t d = 0; d < D; d++) {
        const double deviation = static_cast<double>(load<1>(x + row * columns + c * D + d)) - static_cast<double>(middle);
        m2 += deviation * deviation;
      }
    return m2;
  }

  // in storage (7, columns): what needs no sums, three of them in forward
  Columns<A> vectors(bool backward, A* storage) const {
    A* v[7];
    for (int64_t k = 0; k < 7; k++) v[k] = storage + k * columns;
    const SavedStats<A> stats = saved();
    for (int64_t c = 0; c < s.C; c++) {
      const Statistic<A> at = statistic(Stats<A>{stats.data[c], stats.data[s.C + c], stats.data[2 * s.C + c]});
      v[0][c] = at.mean;
      v[1][c] = at.rstd * affine.weight[c];
      v[2][c] = at.offset * affine.weight[c] + affine.bias[c];
      if (!backward) continue;
      v[3][c] = at.rstd;
      v[4][c] = at.offset;
      v[5][c] = v[6][c] = 0;
    }
    for (int64_t k = 0; k < (backward ? 7 : 3); k++) spread(v[k]);
    return {v[0], v[1], v[2], v[3], v[4], v[5], v[6]};
  }

  void set_means(const A* sums, A* storage) const {  // c2 and c3
    const A* rstd = saved().data + 2 * s.C;
    const double inverse = 1.0 / static_cast<double>(s.n());
    for (int64_t k = 0; k < 2; k++) {
      A* out = storage + (5 + k) * columns;
      for (int64_t c = 0; c < s.C; c++) out[c] = static_cast<A>(-rstd[c] * (static_cast<double>(affine.weight[c]) * sums[k * s.C + c] * inverse));
      spread(out);
    }
  }
};

}  // namespace normops
