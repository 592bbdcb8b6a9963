// Normalization over channels of channels-first images on the CPU: a statistic for every position, whose channels lie S apart.
//
// A task is a block of positions with all their channels, small enough to stay in the cache between its passes.
#pragma once

#include "row_norm.h"

namespace normops {

template <typename T>
class AcrossNorm {
 public:
  using A = Acc<T>;

  AcrossNorm(const RowShape& shape, const T* x, const T* residual, const RowAffine<A>& affine, Options<A> options, A* stats)
      : s(shape), x(x), residual(residual), affine(affine), options(options), stats{stats, s.N * s.S, s.centered} {}

  int64_t blocks() const { return s.N * blocks_per_sample; }

  void forward(T* y, T*, const T*, double eps) const {  // nothing is added
    parallel(blocks(), block_positions * s.C, [&](int64_t index) {
      const Block b = block(index);
      const Positions v(b.count);
      normalize(b, v, eps);
      loop.across({y + b.offset, x + b.offset, shifted(residual, b.offset), across(v, b.sample, 0)}, s.C, b.count, s.S, options);
    });
  }

  // dweight, dbias: null or (blocks, C), sums over the positions of each block
  void backward(T* dx, T* dt, A* dweight, A* dbias, const T* dy, const T*) const {
    parallel(blocks(), block_positions * s.C, [&](int64_t index) {
      const Block b = block(index);
      const Positions v(b.count);
      auto totals = buffer<double>(2 * b.count);
      for (int64_t i = 0; i < b.count; i++) v.set(i, stats.get(b.row + i));
      auto from = [&](int64_t channel) {
        const int64_t at = b.offset + channel * s.S;
        return Backward<T, Across<A>>{nullptr, nullptr, dy + at, x + at, shifted(residual, at), across(v, b.sample, channel), nullptr};
      };
      sum_runs<A>(totals.get(), 2 * b.count, s.C, [&](A* sums, int64_t first, int64_t channels) {
        const int64_t at = index * s.C + first;
        loop.across_sums(shifted(dweight, at), shifted(dbias, at), sums, sums + b.count, from(first), channels, b.count, s.S, options);
      });
      if (!dx && !dt) return;
      for (int64_t i = 0; i < b.count; i++) {
        Statistic<A> at{0, v.rstd[i], 0, 0, 0};
        set_sums(at, totals[i] / s.C, totals[b.count + i] / s.C, s.centered);
        v.c2[i] = at.c2;
        v.c3[i] = at.c3;
      }
      auto all = from(0);
      all.dx = shifted(dx, b.offset);
      all.dt = shifted(dt, b.offset);
      loop.across_backward(all, s.C, b.count, s.S, options);
    });
  }

 private:
  struct Positions {  // vectors over the positions of a block
    Buffer<A> storage;
    A *mean, *rstd, *offset, *c2, *c3;

    explicit Positions(int64_t n) : storage(buffer<A>(5 * n)), mean(storage.get()), rstd(mean + n), offset(rstd + n), c2(offset + n), c3(c2 + n) {}
    void set(int64_t i, const Stats<A>& own) const {
      const Statistic<A> at = statistic(own);
      mean[i] = at.mean;
      rstd[i] = at.rstd;
      offset[i] = at.offset;
    }
  };

  struct Block {
    int64_t sample, count, offset, row;  // elements before it, statistics before it
  };

  const RowShape s;
  const T *x, *residual;
  const RowAffine<A> affine;
  const Options<A> options;
  const SavedStats<A> stats;
  const Loops<T>& loop = loops<T>();

  // At most 512 KB of x (memory is read in runs of a block's width: the wider the better), 64 tasks where that leaves a few vectors to each,
  // and no narrow rest
  int64_t width() const {
    const int64_t fitting = (512 << 10) / static_cast<int64_t>(sizeof(T)) / s.C, spread = std::max<int64_t>(128, s.N * s.S / 64);
    const int64_t most = std::clamp<int64_t>(std::min(fitting, spread), 32, 512);
    return ceil_div(ceil_div(s.S, ceil_div(s.S, most)), 16) * 16;
  }
  const int64_t block_positions = width(), blocks_per_sample = ceil_div(s.S, block_positions);
  Block block(int64_t index) const {
    const int64_t sample = index / blocks_per_sample, first = index % blocks_per_sample * block_positions;
    return {sample, std::min(block_positions, s.S - first), sample * s.C * s.S + first, sample * s.S + first};
  }

  Across<A> across(const Positions& v, int64_t sample, int64_t channel) const {
    return {v.mean, v.rstd, v.offset, v.c2, v.c3, affine.weight.at(sample, channel), affine.bias.at(sample, channel)};
  }

  // Moments around a guess of the mean, the mean of the first channels, and again around the mean itself where the guess proves bad
  void normalize(const Block& b, const Positions& v, double eps) const {
    const T* start = x + b.offset;
    const double count = static_cast<double>(s.C);
    auto totals = buffer<double>(2 * b.count);
    auto center = buffer<A>(b.count);
    std::fill_n(center.get(), b.count, A(0));
    auto scan = [&] {
      sum_runs<A>(totals.get(), 2 * b.count, s.C, [&](A* sums, int64_t first, int64_t run) {
        loop.column_moments(sums, sums + b.count, start + first * s.S, center.get(), run, b.count, s.S);
      });
      bool good = true;
      for (int64_t i = 0; i < b.count; i++) {
        const double low = s.centered ? totals[i] / count : 0;
        double& m2 = totals[b.count + i];
        if (std::isinf(m2)) m2 = wide_squares(start + i, center[i]);
        m2 -= low * low * count;
        good = good && low * low * count <= kBadGuess * m2;
        totals[i] = low;
        m2 = m2 < 0 ? 0 : m2;
      }
      return good;
    };
    if (s.centered) {
      const int64_t few = std::min<int64_t>(s.C, 32);
      auto sums = buffer<A>(b.count);
      std::fill_n(sums.get(), b.count, A(0));
      for (int64_t i = 0; i < b.count; i++) center[i] = load<1>(start + i);
      loop.column_moments(sums.get(), nullptr, start, center.get(), few, b.count, s.S);
      for (int64_t i = 0; i < b.count; i++) center[i] += sums[i] / static_cast<A>(few);
    }
    if (!scan() && s.centered) {
      for (int64_t i = 0; i < b.count; i++) center[i] += static_cast<A>(totals[i]);
      scan();
    }
    for (int64_t i = 0; i < b.count; i++) {
      const Stats<A> own = finish<A>(static_cast<double>(center[i]), Moments{count, totals[i], totals[b.count + i]}, eps);
      stats.set(b.row + i, own);
      v.set(i, own);
    }
  }

  double wide_squares(const T* start, A middle) const {  // float squares overflowed
    double m2 = 0;
    for (int64_t c = 0; c < s.C; c++) {
      const double deviation = static_cast<double>(load<1>(start + c * s.S)) - static_cast<double>(middle);
      m2 += deviation * deviation;
    }
    return m2;
  }
};

}  // namespace normops
