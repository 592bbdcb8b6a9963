// Group normalization, channels last: blocks of pixels with all their channels, which are columns.
#pragma once

#include "group_norm.h"

namespace normops {

template <typename T>
class ChannelsLast : GroupNorm<T> {
  using Base = GroupNorm<T>;
  using Base::backward_from, Base::coefficients, Base::D, Base::fold_parts, Base::forward_from, Base::frozen, Base::loop, Base::options, Base::s,
      Base::save, Base::x;

 public:
  using A = Acc<T>;
  using Base::means;

  explicit ChannelsLast(const Base& common) : Base(common) {}

  void forward(T* y, double eps) const {
    auto fold = [&](int64_t sample, const Moments* sets, const A* center) {
      for (int64_t group = 0; group < s.G; group++) save(sample * s.G + group, center[group * D], sets + group, blocks, s.G, eps);
    };
    if (enough(s.N, s.S * s.C)) {
      return parallel(s.N, s.S * s.C, [&](int64_t sample) {
        auto storage = buffer<A>(7 * s.C);
        if (!frozen) {
          auto sets = buffer<Moments>(blocks * s.G);
          for (int64_t block = 0; block < blocks; block++) block_moments(&sets[block * s.G], sample, block, storage.get(), block > 0);
          fold(sample, sets.get(), storage.get());
        }
        if (!y) return;
        const auto at = sample_coefficients(sample, false, nullptr, storage.get());
        for (int64_t block = blocks; block-- > 0;) apply_block(y, at, sample, block);
      });
    }
    const int64_t steps = s.N * blocks, step_size = block_pixels * s.C;
    auto storage = buffer<A>(s.N * 7 * s.C);
    if (!frozen) {
      auto sets = buffer<Moments>(steps * s.G);
      parallel(s.N, step_size, [&](int64_t sample) { block_moments(&sets[sample * blocks * s.G], sample, 0, &storage[sample * 7 * s.C], false); });
      parallel(steps, step_size, [&](int64_t i) {
        if (i % blocks) block_moments(&sets[i * s.G], i / blocks, i % blocks, &storage[i / blocks * 7 * s.C], true);
      });
      for (int64_t sample = 0; sample < s.N; sample++) fold(sample, &sets[sample * blocks * s.G], &storage[sample * 7 * s.C]);
    }
    if (!y) return;
    auto at = buffer<Columns<A>>(s.N);
    for (int64_t sample = 0; sample < s.N; sample++) at[sample] = sample_coefficients(sample, false, nullptr, &storage[sample * 7 * s.C]);
    parallel(steps, step_size, [&](int64_t i) {
      i = steps - 1 - i;
      apply_block(y, at[i / blocks], i / blocks, i % blocks);
    });
  }

  // sums: (2, N, C): sum dt*x_hat, sum dt
  void backward(T* dx, T* dt, A* sums, const T* dy) const {
    const bool apply = (dx || dt) && !frozen;
    T *dx_with_sums = frozen ? dx : nullptr, *dt_with_sums = frozen ? dt : nullptr;
    auto fold = [&](int64_t sample, const double* partial) {
      for (int64_t k = 0; k < 2; k++) fold_parts(sums + (k * s.N + sample) * s.C, partial + k * s.C, s.C, blocks, 2 * s.C);
    };
    if (enough(s.N, s.S * s.C)) {
      return parallel(s.N, s.S * s.C, [&](int64_t sample) {
        auto storage = buffer<A>(7 * s.C);
        auto partial = buffer<double>(blocks * 2 * s.C);
        auto at = sample_coefficients(sample, true, nullptr, storage.get());
        const auto kept = apply ? keep<A>(options.activation, s.S * s.C) : nullptr;
        for (int64_t block = 0; block < blocks; block++)
          sum_block(dx_with_sums, dt_with_sums, &partial[block * 2 * s.C], dy, at, sample, block, kept.get());
        fold(sample, partial.get());
        if (!apply) return;
        at = sample_coefficients(sample, true, sums, storage.get());
        for (int64_t block = blocks; block-- > 0;) backward_block(dx, dt, dy, at, sample, block, kept.get());
      });
    }
    const int64_t steps = s.N * blocks, step_size = block_pixels * s.C;
    auto storage = buffer<A>(s.N * 7 * s.C);
    auto partial = buffer<double>(steps * 2 * s.C);
    auto at = buffer<Columns<A>>(s.N);
    for (int64_t sample = 0; sample < s.N; sample++) at[sample] = sample_coefficients(sample, true, nullptr, &storage[sample * 7 * s.C]);
    parallel(steps, step_size, [&](int64_t i) {
      sum_block(dx_with_sums, dt_with_sums, &partial[i * 2 * s.C], dy, at[i / blocks], i / blocks, i % blocks, nullptr);
    });
    for (int64_t sample = 0; sample < s.N; sample++) {
      fold(sample, &partial[sample * blocks * 2 * s.C]);
      if (apply) sample_coefficients(sample, true, sums, &storage[sample * 7 * s.C]);
    }
    if (!apply) return;
    parallel(steps, step_size, [&](int64_t i) {
      i = steps - 1 - i;
      backward_block(dx, dt, dy, at[i / blocks], i / blocks, i % blocks, nullptr);
    });
  }

 private:
  const int64_t block_pixels = std::max<int64_t>(kRun / 2, kGrain / s.C);
  const int64_t blocks = ceil_div(s.S, block_pixels);
  int64_t pixels_of(int64_t block) const { return std::min(block_pixels, s.S - block * block_pixels); }
  int64_t offset_of(int64_t sample, int64_t block) const { return (sample * s.S + block * block_pixels) * s.C; }

  // Moments of all groups over one block, the means counted from `center` (C, equal within a group): a guess when it is `known`, else set here to
  // the mean of the first pixels. Where the guess proves bad, the means themselves come from a pass of their own.
  void block_moments(Moments* out, int64_t sample, int64_t block, A* center, bool known) const {
    const int64_t pixels = pixels_of(block);
    const T* start = x + offset_of(sample, block);
    const double count = static_cast<double>(pixels) * D;
    auto totals = buffer<double>(2 * s.C);
    if (!known) guess(center, start, std::min(pixels, ceil_div(16, D)));
    auto scan = [&](const A* around) {  // whether no group is far from where it is thought to be
      sum_runs<A>(totals.get(), 2 * s.C, pixels, [&](A* sums, int64_t first, int64_t run) {
        loop.column_moments(sums, sums + s.C, start + first * s.C, around, run, s.C, s.C);
      });
      bool good = true;
      for (int64_t group = 0; group < s.G; group++) {
        const double low = sum_of(&totals[group * D], D) / count;
        double m2 = sum_of(&totals[s.C + group * D], D);
        if (std::isinf(m2)) m2 = wide_squares(start + group * D, around[group * D], pixels);
        m2 -= low * low * count;
        good = good && !(low * low * count > kBadGuess * m2);  // NaN is not known better by a second look
        out[group] = {count, low, m2 < 0 ? 0 : m2};
      }
      return good;
    };
    if (scan(center)) return;
    auto own = buffer<A>(s.C);
    for (int64_t group = 0; group < s.G; group++) std::fill_n(&own[group * D], D, static_cast<A>(center[group * D] + out[group].mean));
    scan(own.get());
    for (int64_t group = 0; group < s.G; group++) out[group].mean += static_cast<double>(own[group * D]) - static_cast<double>(center[group * D]);
  }

  void guess(A* center, const T* start, int64_t pixels) const {
    auto sums = buffer<A>(s.C);
    std::fill_n(sums.get(), s.C, A(0));
    for (int64_t c = 0; c < s.C; c++) center[c] = load<1>(start + c);
    loop.column_moments(sums.get(), nullptr, start, center, pixels, s.C, s.C);
    for (int64_t group = 0; group < s.G; group++) {
      double mean = 0;
      for (int64_t c = group * D; c < (group + 1) * D; c++) mean += center[c] + sums[c] / static_cast<double>(pixels);
      std::fill_n(center + group * D, D, static_cast<A>(mean / D));
    }
  }

  double wide_squares(const T* start, A middle, int64_t pixels) const {  // float squares overflowed
    double m2 = 0;
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t d = 0; d < D; d++) {
        const double deviation = static_cast<double>(load<1>(start + p * s.C + d)) - static_cast<double>(middle);
        m2 += deviation * deviation;
      }
    return m2;
  }

  // vectors over the channels of one sample in storage (7*C); forward needs three, c2 and c3 need sums
  Columns<A> sample_coefficients(int64_t sample, bool backward, const A* sums, A* storage) const {
    A* v[7];
    for (int64_t k = 0; k < 7; k++) v[k] = storage + k * s.C;
    for (int64_t group = 0; group < s.G; group++) {
      const Group<A> g = coefficients(sample, group, sums);
      for (int64_t d = 0; d < D; d++) {
        const int64_t c = group * D + d;
        v[0][c] = g.at.mean;
        v[1][c] = g.at.rstd * g.weight[d];
        v[2][c] = g.at.offset * g.weight[d] + g.bias[d];
        if (!backward) continue;
        v[3][c] = g.at.rstd;
        v[4][c] = g.at.offset;
        v[5][c] = g.at.c2;
        v[6][c] = g.at.c3;
      }
    }
    return {v[0], v[1], v[2], v[3], v[4], v[5], v[6]};
  }

  void apply_block(T* y, const Columns<A>& at, int64_t sample, int64_t block) const {
    loop.columns(forward_from(y, offset_of(sample, block), at), pixels_of(block), s.C, options);
  }

  void sum_block(T* dx, T* dt, double* out, const T* dy, const Columns<A>& at, int64_t sample, int64_t block, A* kept) const {  // out: (2, C)
    const int64_t start = offset_of(sample, block);
    sum_runs<A>(out, 2 * s.C, pixels_of(block), [&](A* sums, int64_t first, int64_t run) {
      const int64_t offset = start + first * s.C;
      const auto columns = backward_from(dx, dt, dy, offset, at, shifted(kept, offset - offset_of(sample, 0)));
      loop.column_sums(sums, sums + s.C, columns, run, s.C, options);
    });
  }

  void backward_block(T* dx, T* dt, const T* dy, const Columns<A>& at, int64_t sample, int64_t block, A* kept) const {
    const int64_t offset = offset_of(sample, block);
    loop.column_backward(backward_from(dx, dt, dy, offset, at, shifted(kept, offset - offset_of(sample, 0))), pixels_of(block), s.C, options);
  }
};

}  // namespace normops
