// Group normalization on the CPU: moments -> fold -> apply, and sums -> fold -> apply backward, over tasks for one or many threads.
//
// A task is a whole group (channels first) or a whole sample (channels last) when there are enough of them: its second pass then hits the cache.
// Otherwise the three steps run one after the other, each over blocks of all groups. Blocks have a fixed size and are merged in index order, in
// double: the results do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "loops.h"

namespace normops {

struct Shape {
  int64_t N, C, S, G;
  bool channels_last;
  int64_t D() const { return C / G; }
  int64_t n() const { return D() * S; }  // elements of a group
};

template <typename A>
struct Affine {  // per channel, or per sample and channel
  const A *weight, *bias;
  int64_t stride;  // from one sample to the next: 0 or C
};

constexpr int64_t kGrain = 32768;  // elements below which a thread is not worth waking

template <typename F>
void parallel(int64_t tasks, int64_t elements_per_task, const F& task) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_task));
  auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(i);
  };
  if (tasks <= grain)
    range(0, tasks);
  else
    torch::stable::parallel_for(0, tasks, grain, range);
}

// whether one task per unit (group or sample) keeps all threads busy
inline bool enough(int64_t units, int64_t elements_per_unit) {
  if (units * elements_per_unit <= kGrain) return true;
  const int64_t threads = torch::stable::get_num_threads();
  return units >= 4 * threads || units % threads == 0;
}

template <typename E>
using Buffer = std::unique_ptr<E[]>;
template <typename E>
Buffer<E> buffer(int64_t size) {
  return Buffer<E>(new E[size]);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `count` blocks of `size` elements each (the last one shorter, `total` in all), `stride` apart in memory
inline Moments merge_blocks(const Moments* blocks, int64_t count, int64_t stride) {
  double total = 0, mean = 0, m2 = 0;
  for (int64_t b = 0; b < count; b++) {
    total += blocks[b * stride].count;
    mean += blocks[b * stride].count * (blocks[b * stride].mean - blocks[0].mean);
  }
  mean = blocks[0].mean + mean / total;
  for (int64_t b = 0; b < count; b++) {
    const double delta = blocks[b * stride].mean - mean;
    m2 += blocks[b * stride].m2 + blocks[b * stride].count * delta * delta;
  }
  return {total, mean, m2};
}

template <typename T>
class GroupNorm {
 public:
  using A = Acc<T>;

  GroupNorm(Shape shape, const T* x, const T* residual, Affine<A> affine, Options<A> options)
      : s(shape), x(x), residual(residual), affine(affine), options(options) {}

  void forward(T* y, A* saved, double eps) {
    auto owned = saved ? nullptr : buffer<A>(3 * s.N * s.G);
    stats = saved ? saved : owned.get();
    if (s.channels_last)
      forward_columns(y, eps);
    else
      forward_rows(y, eps);
  }

  // sums: (2, N, C): sum dt*x_hat, sum dt
  void backward(T* dx, T* dt, A* sums, const T* dy, A* saved) {
    stats = saved;
    if (s.channels_last)
      backward_columns(dx, dt, sums, dy);
    else
      backward_rows(dx, dt, sums, dy);
  }

 private:
  const Shape s;
  const T *x, *residual;
  const Affine<A> affine;
  const Options<A> options;
  A* stats = nullptr;  // (3, N, G)
  const Loops<T>& loop = loops<T>();

  const T* shifted(const T* p, int64_t offset) const { return p ? p + offset : nullptr; }
  T* shifted(T* p, int64_t offset) const { return p ? p + offset : nullptr; }

  void save(int64_t group, const Moments& moments, double eps) {
    const int64_t groups = s.N * s.G;
    const Stats<A> result = finish<A>(moments, eps);
    stats[group] = result.mean;
    stats[groups + group] = result.mean_lo;
    stats[2 * groups + group] = result.rstd;
  }

  Coefficients<A> coefficients(int64_t group) const {
    const int64_t groups = s.N * s.G;
    const A rstd = stats[2 * groups + group];
    return {stats[group], rstd, -stats[groups + group] * rstd, 1, 0, 0, 0, 0};
  }

  // c2 and c3 of a group from the sums of its channels
  Coefficients<A> backward_coefficients(int64_t group, const A* sums) const {
    Coefficients<A> at = coefficients(group);
    const int64_t first = group * s.D();
    const A* weight = affine.weight + (group / s.G) * affine.stride + first % s.C;
    double sum_g_xhat = 0, sum_g = 0;
    for (int64_t d = 0; d < s.D(); d++) {
      sum_g_xhat += static_cast<double>(weight[d]) * sums[first + d];
      sum_g += static_cast<double>(weight[d]) * sums[s.N * s.C + first + d];
    }
    at.c2 = static_cast<A>(-at.rstd * sum_g_xhat / s.n());
    at.c3 = static_cast<A>(-at.rstd * sum_g / s.n());
    return at;
  }

  // ---- channels first: a group is contiguous, a channel is a row ----

  static constexpr int64_t kPiece = 32768;    // elements of a group that one apply step covers
  static constexpr int64_t kColumns = 1024;   // the same when S == 1: channels whose coefficients are laid out as vectors

  int64_t piece() const { return s.S == 1 ? kColumns : kPiece; }

  Moments chunk_moments(int64_t group, int64_t chunk) const {
    const int64_t begin = chunk * kChunk;
    return loop.moments(x + group * s.n() + begin, std::min(kChunk, s.n() - begin));
  }

  // f(offset in the tensor, length, channel (n*C + c)) for the rows that elements [begin, end) of a group consist of
  template <typename F>
  void rows_between(int64_t group, int64_t begin, int64_t end, const F& f) const {
    while (begin < end) {
      const int64_t channel = begin / s.S, stop = std::min(end, (channel + 1) * s.S);
      f(group * s.n() + begin, stop - begin, group * s.D() + channel);
      begin = stop;
    }
  }

  Coefficients<A> with_affine(Coefficients<A> at, int64_t channel) const {  // channel is n*C + c
    const int64_t i = (channel / s.C) * affine.stride + channel % s.C;
    at.weight = affine.weight[i];
    at.bias = affine.bias[i];
    at.c1 = at.rstd * at.weight;
    return at;
  }

  // S == 1: the channels [begin, begin + count) of a group, coefficients as vectors in `storage`
  Coefficients<const A*> as_columns(const Coefficients<A>& at, int64_t group, int64_t begin, int64_t count, A (*storage)[kColumns]) const {
    const int64_t i = (group / s.G) * affine.stride + (group * s.D()) % s.C + begin;
    const A *weight = affine.weight + i, *bias = affine.bias + i;
    for (int64_t c = 0; c < count; c++) {
      storage[0][c] = at.mean;
      storage[1][c] = at.rstd;
      storage[2][c] = at.offset;
      storage[3][c] = at.rstd * weight[c];
      storage[4][c] = at.c2;
      storage[5][c] = at.c3;
    }
    return {storage[0], storage[1], storage[2], weight, bias, storage[3], storage[4], storage[5]};
  }

  void apply_piece(T* y, const Coefficients<A>& at, int64_t group, int64_t index) const {
    const int64_t begin = index * piece(), end = std::min(begin + piece(), s.n());
    if (s.S == 1) {
      A storage[6][kColumns];
      const int64_t offset = group * s.n() + begin;
      const auto columns = as_columns(at, group, begin, end - begin, storage);
      return loop.columns({y + offset, x + offset, shifted(residual, offset), columns}, 1, end - begin, 0, options);
    }
    rows_between(group, begin, end, [&](int64_t offset, int64_t length, int64_t channel) {
      loop.row({y + offset, x + offset, shifted(residual, offset), with_affine(at, channel)}, length, options);
    });
  }

  void forward_rows(T* y, double eps) {
    const int64_t groups = s.N * s.G, chunks = ceil_div(s.n(), kChunk), pieces = ceil_div(s.n(), piece());
    if (enough(groups, s.n())) {
      return parallel(groups, s.n(), [&](int64_t group) {
        Moments few[16];
        auto many = chunks > 16 ? buffer<Moments>(chunks) : nullptr;
        Moments* blocks = many ? many.get() : few;
        for (int64_t chunk = 0; chunk < chunks; chunk++) blocks[chunk] = chunk_moments(group, chunk);
        save(group, merge_blocks(blocks, chunks, 1), eps);
        const auto at = coefficients(group);
        for (int64_t index = pieces; index-- > 0;) apply_piece(y, at, group, index);  // backwards: the end is still in the cache
      });
    }
    auto blocks = buffer<Moments>(groups * chunks);
    parallel(groups * chunks, kChunk, [&](int64_t i) { blocks[i] = chunk_moments(i / chunks, i % chunks); });
    for (int64_t group = 0; group < groups; group++) save(group, merge_blocks(&blocks[group * chunks], chunks, 1), eps);
    parallel(groups * pieces, piece(), [&](int64_t i) {
      i = groups * pieces - 1 - i;
      apply_piece(y, coefficients(i / pieces), i / pieces, i % pieces);
    });
  }

  // sums over elements [begin, begin + kChunk) of a channel
  void sum_block(A* out, const T* dy, int64_t channel, int64_t begin) const {
    const int64_t offset = channel * s.S + begin;
    const auto at = with_affine(coefficients(channel / s.D()), channel);
    loop.row_sums(out, {nullptr, nullptr, dy + offset, x + offset, shifted(residual, offset), at}, std::min(kChunk, s.S - begin), options);
  }

  void sum_channel(A* sums, const A* blocks, int64_t count, int64_t channel) const {
    double sum_dt = 0, sum_dt_xhat = 0;
    for (int64_t b = 0; b < count; b++) {
      sum_dt += blocks[2 * b];
      sum_dt_xhat += blocks[2 * b + 1];
    }
    sums[channel] = static_cast<A>(sum_dt_xhat);
    sums[s.N * s.C + channel] = static_cast<A>(sum_dt);
  }

  // S == 1: the sums are the products themselves
  void sum_piece(A* sums, const T* dy, int64_t group, int64_t index) const {
    const int64_t begin = index * kColumns, count = std::min(kColumns, s.n() - begin), offset = group * s.n() + begin;
    A storage[6][kColumns];
    const auto columns = as_columns(coefficients(group), group, begin, count, storage);
    std::fill_n(sums + offset, count, A(0));
    std::fill_n(sums + s.N * s.C + offset, count, A(0));
    loop.column_sums(sums + s.N * s.C + offset, sums + offset, {nullptr, nullptr, dy + offset, x + offset, shifted(residual, offset), columns},
                     1, count, 0, options);
  }

  void backward_piece(T* dx, T* dt, const T* dy, const Coefficients<A>& at, int64_t group, int64_t index) const {
    const int64_t begin = index * piece(), end = std::min(begin + piece(), s.n());
    if (s.S == 1) {
      A storage[6][kColumns];
      const int64_t offset = group * s.n() + begin;
      const auto columns = as_columns(at, group, begin, end - begin, storage);
      return loop.column_backward({shifted(dx, offset), shifted(dt, offset), dy + offset, x + offset, shifted(residual, offset), columns}, 1,
                                  end - begin, 0, options);
    }
    rows_between(group, begin, end, [&](int64_t offset, int64_t length, int64_t channel) {
      loop.row_backward(
          {shifted(dx, offset), shifted(dt, offset), dy + offset, x + offset, shifted(residual, offset), with_affine(at, channel)}, length, options);
    });
  }

  void backward_rows(T* dx, T* dt, A* sums, const T* dy) {
    const int64_t groups = s.N * s.G, pieces = ceil_div(s.n(), piece()), blocks = ceil_div(s.S, kChunk);
    const bool apply = dx || dt;
    if (enough(groups, s.n())) {
      return parallel(groups, s.n(), [&](int64_t group) {
        if (s.S == 1) {
          for (int64_t index = 0; index < pieces; index++) sum_piece(sums, dy, group, index);
        } else {
          for (int64_t channel = group * s.D(); channel < (group + 1) * s.D(); channel++) {
            double sum_dt = 0, sum_dt_xhat = 0;
            for (int64_t b = 0; b < blocks; b++) {
              A part[2];
              sum_block(part, dy, channel, b * kChunk);
              sum_dt += part[0];
              sum_dt_xhat += part[1];
            }
            sums[channel] = static_cast<A>(sum_dt_xhat);
            sums[s.N * s.C + channel] = static_cast<A>(sum_dt);
          }
        }
        if (!apply) return;
        const auto at = backward_coefficients(group, sums);
        for (int64_t index = pieces; index-- > 0;) backward_piece(dx, dt, dy, at, group, index);
      });
    }
    if (s.S == 1) {
      parallel(groups * pieces, kColumns, [&](int64_t i) { sum_piece(sums, dy, i / pieces, i % pieces); });
    } else {
      auto parts = buffer<A>(2 * s.N * s.C * blocks);
      parallel(s.N * s.C * blocks, std::min(s.S, kChunk), [&](int64_t i) { sum_block(&parts[2 * i], dy, i / blocks, i % blocks * kChunk); });
      for (int64_t channel = 0; channel < s.N * s.C; channel++) sum_channel(sums, &parts[2 * channel * blocks], blocks, channel);
    }
    if (!apply) return;
    auto at = buffer<Coefficients<A>>(groups);
    for (int64_t group = 0; group < groups; group++) at[group] = backward_coefficients(group, sums);
    parallel(groups * pieces, piece(), [&](int64_t i) {
      i = groups * pieces - 1 - i;
      backward_piece(dx, dt, dy, at[i / pieces], i / pieces, i % pieces);
    });
  }

  // ---- channels last: a block of pixels with all channels ----

  int64_t block_pixels() const { return std::max<int64_t>(32, 16384 / s.C); }  // what is read twice fits the L2 cache
  int64_t sum_pixels() const { return std::max<int64_t>(128, 65536 / s.C); }   // sums per block are few beside what they sum

  // moments of all groups over one block of pixels
  void block_moments(Moments* out, int64_t sample, int64_t block, A* scratch) const {
    const int64_t begin = block * block_pixels(), pixels = std::min(block_pixels(), s.S - begin);
    const T* start = x + (sample * s.S + begin) * s.C;
    const double count = static_cast<double>(pixels) * s.D();
    A *center = scratch, *sums = scratch + s.C, *squares = scratch + 2 * s.C;
    for (int64_t c = 0; c < s.C; c++) center[c] = load<1>(start + c);
    std::fill_n(sums, s.C, A(0));
    loop.column_moments(sums, nullptr, start, center, pixels, s.C, s.C);
    for (int64_t group = 0; group < s.G; group++) {
      double total = 0;
      for (int64_t c = group * s.D(); c < (group + 1) * s.D(); c++) total += static_cast<double>(sums[c]) + static_cast<double>(center[c]) * pixels;
      std::fill_n(center + group * s.D(), s.D(), static_cast<A>(total / count));
    }
    std::fill_n(sums, 2 * s.C, A(0));
    loop.column_moments(sums, squares, start, center, pixels, s.C, s.C);
    for (int64_t group = 0; group < s.G; group++) {
      double low = 0, m2 = 0;
      for (int64_t c = group * s.D(); c < (group + 1) * s.D(); c++) {
        low += sums[c];
        m2 += squares[c];
      }
      const A middle = center[group * s.D()];
      if (std::isinf(m2)) m2 = wide_squares(start + group * s.D(), middle, pixels);
      low /= count;
      out[group] = {count, static_cast<double>(middle) + low, std::max(m2 - low * low * count, m2 * 0)};
    }
  }

  double wide_squares(const T* start, A middle, int64_t pixels) const {  // float squares overflowed
    double m2 = 0;
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t d = 0; d < s.D(); d++) {
        const double deviation = static_cast<double>(load<1>(start + p * s.C + d)) - static_cast<double>(middle);
        m2 += deviation * deviation;
      }
    return m2;
  }

  // vectors over channels for one sample; c1, c2, c3 only where sums are given
  Coefficients<const A*> sample_coefficients(int64_t sample, const A* sums, A* storage) const {
    for (int64_t group = 0; group < s.G; group++) {
      const auto at = sums ? backward_coefficients(sample * s.G + group, sums) : coefficients(sample * s.G + group);
      const int64_t begin = group * s.D();
      const A values[] = {at.mean, at.rstd, at.offset, at.c2, at.c3};
      for (int64_t k = 0; k < (sums ? 5 : 3); k++) std::fill_n(storage + k * s.C + begin, s.D(), values[k]);
    }
    const A* weight = affine.weight + sample * affine.stride;
    if (sums)
      for (int64_t c = 0; c < s.C; c++) storage[5 * s.C + c] = storage[s.C + c] * weight[c];
    return {storage, storage + s.C, storage + 2 * s.C, weight, affine.bias + sample * affine.stride, storage + 5 * s.C, storage + 3 * s.C,
            storage + 4 * s.C};
  }

  void apply_block(T* y, const Coefficients<const A*>& at, int64_t sample, int64_t block) const {
    const int64_t begin = block * block_pixels(), pixels = std::min(block_pixels(), s.S - begin), offset = (sample * s.S + begin) * s.C;
    loop.columns({y + offset, x + offset, shifted(residual, offset), at}, pixels, s.C, s.C, options);
  }

  void forward_columns(T* y, double eps) {
    const int64_t blocks = ceil_div(s.S, block_pixels()), block_size = block_pixels() * s.C;
    auto fold = [&](int64_t sample, const Moments* parts) {
      for (int64_t group = 0; group < s.G; group++) save(sample * s.G + group, merge_blocks(parts + group, blocks, s.G), eps);
    };
    if (enough(s.N, s.S * s.C)) {
      return parallel(s.N, s.S * s.C, [&](int64_t sample) {
        auto parts = buffer<Moments>(blocks * s.G);
        auto storage = buffer<A>(3 * s.C);
        for (int64_t block = 0; block < blocks; block++) block_moments(&parts[block * s.G], sample, block, storage.get());
        fold(sample, parts.get());
        const auto at = sample_coefficients(sample, nullptr, storage.get());
        for (int64_t block = blocks; block-- > 0;) apply_block(y, at, sample, block);
      });
    }
    auto parts = buffer<Moments>(s.N * blocks * s.G);
    parallel(s.N * blocks, block_size, [&](int64_t i) {
      auto scratch = buffer<A>(3 * s.C);
      block_moments(&parts[i * s.G], i / blocks, i % blocks, scratch.get());
    });
    auto storage = buffer<A>(s.N * 3 * s.C);
    auto at = buffer<Coefficients<const A*>>(s.N);
    for (int64_t sample = 0; sample < s.N; sample++) {
      fold(sample, &parts[sample * blocks * s.G]);
      at[sample] = sample_coefficients(sample, nullptr, &storage[sample * 3 * s.C]);
    }
    parallel(s.N * blocks, block_size, [&](int64_t i) {
      i = s.N * blocks - 1 - i;
      apply_block(y, at[i / blocks], i / blocks, i % blocks);
    });
  }

  void sum_pixels_block(A* parts, const T* dy, const Coefficients<const A*>& at, int64_t sample, int64_t block) const {
    const int64_t begin = block * sum_pixels(), pixels = std::min(sum_pixels(), s.S - begin), offset = (sample * s.S + begin) * s.C;
    std::fill_n(parts, 2 * s.C, A(0));
    loop.column_sums(parts + s.C, parts, {nullptr, nullptr, dy + offset, x + offset, shifted(residual, offset), at}, pixels, s.C, s.C, options);
  }

  void fold_sums(A* sums, const A* parts, int64_t blocks, int64_t sample) const {
    for (int64_t k = 0; k < 2; k++)
      for (int64_t c = 0; c < s.C; c++) {
        double total = 0;
        for (int64_t b = 0; b < blocks; b++) total += parts[(2 * b + k) * s.C + c];
        sums[(k * s.N + sample) * s.C + c] = static_cast<A>(total);
      }
  }

  void backward_block(T* dx, T* dt, const T* dy, const Coefficients<const A*>& at, int64_t sample, int64_t block) const {
    const int64_t begin = block * block_pixels(), pixels = std::min(block_pixels(), s.S - begin), offset = (sample * s.S + begin) * s.C;
    loop.column_backward({shifted(dx, offset), shifted(dt, offset), dy + offset, x + offset, shifted(residual, offset), at}, pixels, s.C, s.C,
                         options);
  }

  void backward_columns(T* dx, T* dt, A* sums, const T* dy) {
    const int64_t blocks = ceil_div(s.S, block_pixels()), sum_blocks = ceil_div(s.S, sum_pixels());
    const bool apply = dx || dt;
    if (enough(s.N, s.S * s.C)) {
      return parallel(s.N, s.S * s.C, [&](int64_t sample) {
        auto storage = buffer<A>(6 * s.C), parts = buffer<A>(sum_blocks * 2 * s.C);
        const auto forward_at = sample_coefficients(sample, nullptr, storage.get());
        for (int64_t block = 0; block < sum_blocks; block++) sum_pixels_block(&parts[block * 2 * s.C], dy, forward_at, sample, block);
        fold_sums(sums, parts.get(), sum_blocks, sample);
        if (!apply) return;
        const auto at = sample_coefficients(sample, sums, storage.get());
        for (int64_t block = blocks; block-- > 0;) backward_block(dx, dt, dy, at, sample, block);
      });
    }
    auto storage = buffer<A>(s.N * 6 * s.C), parts = buffer<A>(s.N * sum_blocks * 2 * s.C);
    auto at = buffer<Coefficients<const A*>>(s.N);
    for (int64_t sample = 0; sample < s.N; sample++) at[sample] = sample_coefficients(sample, nullptr, &storage[sample * 6 * s.C]);
    parallel(s.N * sum_blocks, sum_pixels() * s.C, [&](int64_t i) {
      sum_pixels_block(&parts[i * 2 * s.C], dy, at[i / sum_blocks], i / sum_blocks, i % sum_blocks);
    });
    for (int64_t sample = 0; sample < s.N; sample++) {
      fold_sums(sums, &parts[sample * sum_blocks * 2 * s.C], sum_blocks, sample);
      if (apply) at[sample] = sample_coefficients(sample, sums, &storage[sample * 6 * s.C]);
    }
    if (!apply) return;
    parallel(s.N * blocks, block_pixels() * s.C, [&](int64_t i) {
      i = s.N * blocks - 1 - i;
      backward_block(dx, dt, dy, at[i / blocks], i / blocks, i % blocks);
    });
  }
};

}  // namespace normops
