// Normalization of rows on the CPU: a statistic for the D consecutive channels of a group of a sample (layer norm, RMS norm).
//
// A task is a block of samples: each row is finished while it is in the cache, and backward the block sums the gradients of weight and bias. Where
// rows are long and few, the steps run one after the other over chunks of rows. Blocks and chunks have a fixed size and are merged in index order, in
// double: the results do not depend on the number of threads.
#pragma once

#include <numeric>

#include "loops.h"
#include "tasks.h"

namespace normops {

struct RowShape {
  int64_t N, C, S, G;  // S: positions, in across_norm.h
  bool centered;
  int64_t shared;  // so many consecutive samples have the same weight and bias
  int64_t D() const { return C / G; }
};

template <typename A>
struct RowVector {  // weight or bias
  const A* data;
  int64_t samples;  // that share a row
  int64_t row;      // elements of a row; 0: one chunk of equal values serves all
  const A* at(int64_t sample, int64_t channel) const { return row ? data + sample / samples * row + channel : data; }
  int64_t step(int64_t channels) const { return row ? channels : 0; }
};

template <typename A>
struct RowAffine {
  RowVector<A> weight, bias;
};

template <typename T>
class RowNorm {
 public:
  using A = Acc<T>;

  RowNorm(const RowShape& shape, const T* x, const T* residual, const RowAffine<A>& affine, Options<A> options, A* stats)
      : s(shape), x(x), residual(residual), affine(affine), options(options), stats{stats, s.N * s.G, s.centered} {}

  void forward(T* y, T* total, const T* addend, double eps) const {
    if (D <= kChunk) {
      return parallel(blocks(), block_samples * s.C, [&](int64_t index) {
        const auto [sample, samples] = block(index);
        const int64_t at = sample * s.C;
        loop.rows({y + at, shifted(total, at), x + at, shifted(addend, at), shifted(residual, at), affine.weight.at(sample, 0),
                   affine.bias.at(sample, 0), affine.weight.step(D), affine.bias.step(D), stats, sample * s.G, eps},
                  samples, s.G, D, options);
      });
    }
    forward_long(y, total, addend, eps);
  }

  int64_t blocks() const { return s.N / s.shared * ceil_div(s.shared, block_samples); }

  // dweight, dbias: null or (blocks, C), sums over the samples of each block
  void backward(T* dx, T* dt, A* dweight, A* dbias, const T* dy, const T* dtotal) const {
    const RowsBackward<T> all{dx, dt, dy, x, residual, dtotal, nullptr, nullptr, nullptr, dweight, dbias, s.C, {}};
    if (chunks > 1 && !enough(blocks(), block_samples * s.C)) return backward_in_steps(all);
    parallel(blocks(), block_samples * s.C, [&](int64_t index) {
      const auto kept = dx || dt ? keep<A>(options.activation, (chunks > 1 ? 1 : kTogether) * s.C) : nullptr;
      clear(all, index, 0, s.C);
      if (chunks > 1) return backward_long(all, index, kept.get());
      const auto [sample, samples] = block(index);
      const auto rows = from(all, index, sample, 0, 0, kept.get());
      loop.rows_backward({rows, affine.weight.step(D), affine.bias.step(D), stats, sample * s.G}, samples, s.G, D, options);
    });
  }

 private:
  struct Sums {  // of weight*dt*x_hat and weight*dt
    double g_xhat, g;
  };

  const RowShape s;
  const T *x, *residual;
  const RowAffine<A> affine;
  const Options<A> options;
  const SavedStats<A> stats;
  const Loops<T>& loop = loops<T>();

  const int64_t D = s.D();
  const int64_t chunks = ceil_div(D, kChunk);  // of a row
  // Samples of a block: about kGrain/2 elements, and 64 tasks where that makes blocks larger; not so many that float sums over them lose digits
  const int64_t block_samples = std::min(
      s.shared, std::clamp<int64_t>(std::max(kGrain / 2 / s.C, std::min<int64_t>(128, s.N * chunks / 64)) / kTogether * kTogether, kTogether, 512));

  struct Block {
    int64_t sample, samples;
  };
  Block block(int64_t index) const {
    const int64_t each = ceil_div(s.shared, block_samples), begin = index % each * block_samples;
    return {index / each * s.shared + begin, std::min(block_samples, s.shared - begin)};
  }

  // ---- rows of more than kChunk elements ----

  int64_t length(int64_t chunk) const { return std::min(kChunk, D - chunk * kChunk); }

  const T* add_chunk(T* total, const T* addend, int64_t offset, int64_t n) const {  // what is normalized
    if (!addend) return x + offset;
    loop.add(total + offset, x + offset, addend + offset, n);
    return total + offset;
  }

  Moments chunk_moments(T* total, const T* addend, int64_t row, int64_t chunk, A& center) const {  // the first chunk sets the center
    const T* start = add_chunk(total, addend, row * D + chunk * kChunk, length(chunk));
    if (s.centered) return loop.moments(start, {1, length(chunk), 0, 0}, center, chunk > 0);
    center = 0;
    return {static_cast<double>(length(chunk)), 0, loop.squares(start, length(chunk))};
  }

  void forward_chunk(T* y, const T* normalized, const Statistic<A>& at, int64_t row, int64_t chunk) const {
    const int64_t offset = row * D + chunk * kChunk, sample = row / s.G, channel = row % s.G * D + chunk * kChunk;
    const Group<A> group{at, affine.weight.at(sample, channel), affine.bias.at(sample, channel)};
    loop.row({y + offset, normalized + offset, shifted(residual, offset), group}, length(chunk), options);
  }

  Statistic<A> save(int64_t row, A center, const Moments* sets, double eps) const {
    const Stats<A> own = finish<A>(static_cast<double>(center), merge(sets, chunks, 1), eps);
    stats.set(row, own);
    return statistic(own);
  }

  void forward_long(T* y, T* total, const T* addend, double eps) const {
    const int64_t rows = s.N * s.G;
    const T* normalized = addend ? total : x;
    if (enough(rows, D)) {
      return parallel(rows, D, [&](int64_t row) {
        auto sets = buffer<Moments>(chunks);
        A center;
        for (int64_t chunk = 0; chunk < chunks; chunk++) sets[chunk] = chunk_moments(total, addend, row, chunk, center);
        const Statistic<A> at = save(row, center, sets.get(), eps);
        for (int64_t chunk = chunks; chunk-- > 0;) forward_chunk(y, normalized, at, row, chunk);
      });
    }
    auto sets = buffer<Moments>(rows * chunks);
    auto centers = buffer<A>(rows);
    auto at = buffer<Statistic<A>>(rows);
    for (int64_t row = 0; row < rows; row++) sets[row * chunks] = chunk_moments(total, addend, row, 0, centers[row]);
    parallel(rows * (chunks - 1), kChunk, [&](int64_t i) {
      const int64_t row = i / (chunks - 1), chunk = i % (chunks - 1) + 1;
      A center = centers[row];
      sets[row * chunks + chunk] = chunk_moments(total, addend, row, chunk, center);
    });
    for (int64_t row = 0; row < rows; row++) at[row] = save(row, centers[row], &sets[row * chunks], eps);
    parallel(rows * chunks, kChunk, [&](int64_t i) {
      i = rows * chunks - 1 - i;  // the end is still in the cache
      forward_chunk(y, normalized, at[i / chunks], i / chunks, i % chunks);
    });
  }

  void clear(const RowsBackward<T>& all, int64_t index, int64_t channel, int64_t n) const {
    for (A* sums : {all.dweight, all.dbias})
      if (sums) std::fill_n(sums + index * s.C + channel, n, A(0));
  }

  // the rows of `all` from this sample, group and chunk on
  RowsBackward<T> from(RowsBackward<T> all, int64_t index, int64_t sample, int64_t group, int64_t chunk, A* kept) const {
    const int64_t channel = group * D + chunk * kChunk;
    all.dweight = shifted(all.dweight, index * s.C);
    all.dbias = shifted(all.dbias, index * s.C);
    all.weight = affine.weight.at(sample, channel);
    all.bias = affine.bias.at(sample, channel);
    all.kept = kept;
    return all.from(sample * s.C + channel, channel, 0, 0);
  }

  Sums sum_chunk(const RowsBackward<T>& all, int64_t index, int64_t row, int64_t chunk, A* kept) const {
    RowsBackward<T> a = from(all, index, row / s.G, row % s.G, chunk, kept);
    a.at[0] = statistic(stats.get(row));
    Sums sums;
    loop.row_sums(a, length(chunk), options, sums.g_xhat, sums.g);
    return sums;
  }

  Statistic<A> folded(const Sums* sums, int64_t row) const {
    Statistic<A> at = statistic(stats.get(row));
    Sums total{0, 0};
    for (int64_t chunk = 0; chunk < chunks; chunk++) total = {total.g_xhat + sums[chunk].g_xhat, total.g + sums[chunk].g};
    set_sums(at, total.g_xhat / D, total.g / D, s.centered);
    return at;
  }

  void apply_chunk(const RowsBackward<T>& all, const Statistic<A>& at, int64_t row, int64_t chunk, A* kept) const {
    RowsBackward<T> a = from(all, 0, row / s.G, row % s.G, chunk, kept);
    a.at[0] = at;
    loop.row_backward(a, length(chunk), options);
  }

  // a block of long rows
  void backward_long(const RowsBackward<T>& all, int64_t index, A* kept) const {
    const auto [sample, samples] = block(index);
    auto sums = buffer<Sums>(chunks);
    for (int64_t row = sample * s.G; row < (sample + samples) * s.G; row++) {
      for (int64_t chunk = 0; chunk < chunks; chunk++) sums[chunk] = sum_chunk(all, index, row, chunk, kept);
      if (!all.dx && !all.dt) continue;
      const Statistic<A> at = folded(sums.get(), row);
      for (int64_t chunk = chunks; chunk-- > 0;) apply_chunk(all, at, row, chunk, kept);
    }
  }

  // few long rows: all sums, then all gradients, over chunks
  void backward_in_steps(const RowsBackward<T>& all) const {
    const int64_t tasks = blocks() * s.G * chunks, size = block_samples * kChunk;
    auto over_rows = [&](int64_t task, const auto& f) {  // f(row, chunk)
      const int64_t group = task / chunks % s.G;
      const auto [sample, samples] = block(task / chunks / s.G);
      for (int64_t i = sample; i < sample + samples; i++) f(i * s.G + group, task % chunks);
    };
    auto sums = buffer<Sums>(s.N * s.G * chunks);
    parallel(tasks, size, [&](int64_t task) {
      const int64_t index = task / chunks / s.G, begin = task % chunks * kChunk;
      clear(all, index, task / chunks % s.G * D + begin, std::min(kChunk, D - begin));
      over_rows(task, [&](int64_t row, int64_t chunk) { sums[row * chunks + chunk] = sum_chunk(all, index, row, chunk, nullptr); });
    });
    if (!all.dx && !all.dt) return;
    auto at = buffer<Statistic<A>>(s.N * s.G);
    for (int64_t row = 0; row < s.N * s.G; row++) at[row] = folded(&sums[row * chunks], row);
    parallel(tasks, size, [&](int64_t task) {  // the end is still in the cache
      over_rows(tasks - 1 - task, [&](int64_t row, int64_t chunk) { apply_chunk(all, at[row], row, chunk, nullptr); });
    });
  }
};

}  // namespace normops
