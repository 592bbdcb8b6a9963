// Group normalization on the CPU: moments -> fold -> apply, and sums -> fold -> apply backward, over tasks for one or many threads.
//
// A task is a whole group (channels first) or a whole sample (channels last) when there are enough of them: its second pass then hits the cache.
// Otherwise the three steps run one after the other, each over pieces of all groups. Pieces have a fixed size and are merged in index order, in
// double: the results do not depend on the number of threads.
#pragma once

#include "loops.h"
#include "tasks.h"

namespace normops {

struct Shape {
  int64_t N, C, S, G;
  bool channels_last;
  int64_t D() const { return C / G; }
  int64_t n() const { return D() * S; }  // elements of a group
  int64_t groups() const { return N * G; }
};

template <typename A>
struct Affine {  // per channel, or per sample and channel
  const A *weight, *bias;
  int64_t stride;  // from one sample to the next: 0 or C
};

constexpr int64_t kKept = 1 << 20;  // elements: 4 MB in float for each thread

template <typename T>
class GroupNorm {
 public:
  using A = Acc<T>;

  GroupNorm(Shape shape, const T* x, const T* residual, Affine<A> affine, Options<A> options)
      : s(shape), x(x), residual(residual), affine(affine), options(options) {}

  void forward(T* y, A* saved, double eps) {
    auto owned = saved ? nullptr : buffer<A>(3 * s.groups());
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

  template <typename P>
  static P* shifted(P* p, int64_t offset) {
    return p ? p + offset : nullptr;
  }

  template <typename C>
  Forward<T, C> forward_from(T* y, int64_t offset, const C& at) const {
    return {y + offset, x + offset, shifted(residual, offset), at};
  }
  template <typename C>
  Backward<T, C> backward_from(T* dx, T* dt, const T* dy, int64_t offset, const C& at, A* kept) const {  // kept: for this offset already
    return {shifted(dx, offset), shifted(dt, offset), dy + offset, x + offset, shifted(residual, offset), at, kept};
  }

  // A place for dt between the two passes of a unit of n elements, where memory is cheaper than the activation a second time
  Buffer<A> keep(int64_t n) const {
    constexpr Activation costly[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::tanh, Activation::sigmoid};
    const bool worth = std::find(std::begin(costly), std::end(costly), options.activation) != std::end(costly);
    return worth && n <= kKept ? buffer<A>(n) : nullptr;
  }

  // the means of `sets` are counted from `base`
  void save(int64_t group, A base, const Moments* sets, int64_t count, int64_t stride, double eps) {
    const Stats<A> result = finish<A>(static_cast<double>(base), merge(sets, count, stride), eps);
    stats[group] = result.mean;
    stats[s.groups() + group] = result.mean_lo;
    stats[2 * s.groups() + group] = result.rstd;
  }

  int64_t parameter(int64_t group) const { return (group / s.G) * affine.stride + (group % s.G) * s.D(); }  // index of the first channel's

  Rows<A> coefficients(int64_t group) const {
    const A rstd = stats[2 * s.groups() + group];
    const int64_t first = parameter(group);
    return {stats[group], rstd, -stats[s.groups() + group] * rstd, 0, 0, affine.weight + first, affine.bias + first};
  }

  // c2 and c3 too, from the sums of the group's channels
  Rows<A> coefficients(int64_t group, const A* sums) const {
    Rows<A> at = coefficients(group);
    const A *sum_dt_xhat = sums + group * s.D(), *sum_dt = sum_dt_xhat + s.N * s.C;
    const double n = static_cast<double>(s.n());
    at.c2 = static_cast<A>(-at.rstd * dot(at.weight, sum_dt_xhat, s.D()) / n);
    at.c3 = static_cast<A>(-at.rstd * dot(at.weight, sum_dt, s.D()) / n);
    return at;
  }

  // ---- channels first: a group is contiguous, its channels are rows; with S == 1 it is a line ----

  static constexpr int64_t kPiece = 16384;

  struct Piece {  // elements [begin, begin + length) of `rows` channels from `channel` on; several rows are whole
    int64_t channel, rows, begin, length, part;
    int64_t offset(const Shape& s, int64_t group) const { return (group * s.D() + channel) * s.S + begin; }
  };
  int64_t parts() const { return ceil_div(s.S, kPiece); }  // of one channel
  int64_t rows_per_piece() const { return std::max<int64_t>(1, kPiece / s.S); }
  int64_t pieces() const { return ceil_div(s.D(), rows_per_piece()) * parts(); }  // of one group
  Piece piece(int64_t index) const {
    const int64_t part = index % parts(), channel = index / parts() * rows_per_piece(), begin = part * kPiece;
    return {channel, std::min(rows_per_piece(), s.D() - channel), begin, std::min(kPiece, s.S - begin), part};
  }

  static Rows<A> from_channel(Rows<A> at, int64_t channel) {
    at.weight += channel;
    at.bias += channel;
    return at;
  }

  Moments chunk_moments(int64_t group, int64_t chunk, A& center) const {  // the first chunk sets the center that the others take as a guess
    const int64_t begin = chunk * kChunk;
    return loop.moments(x + group * s.n() + begin, std::min(kChunk, s.n() - begin), center, chunk > 0);
  }

  void apply_piece(T* y, const Rows<A>& group_at, int64_t group, int64_t index) const {
    const Piece p = piece(index);
    const auto rows = forward_from(y, p.offset(s, group), from_channel(group_at, p.channel));
    if (s.S == 1)
      loop.line(rows, p.rows, options);
    else
      loop.rows(rows, p.rows, p.length, options);
  }

  void forward_rows(T* y, double eps) {
    const int64_t chunks = ceil_div(s.n(), kChunk);
    if (enough(s.groups(), s.n())) {
      return parallel(s.groups(), s.n(), [&](int64_t group) {
        Moments few[16];
        auto many = chunks > 16 ? buffer<Moments>(chunks) : nullptr;
        Moments* sets = many ? many.get() : few;
        A center;
        for (int64_t chunk = 0; chunk < chunks; chunk++) sets[chunk] = chunk_moments(group, chunk, center);
        save(group, center, sets, chunks, 1, eps);
        const Rows<A> at = coefficients(group);
        for (int64_t index = pieces(); index-- > 0;) apply_piece(y, at, group, index);  // backwards: the end is still in the cache
      });
    }
    auto sets = buffer<Moments>(s.groups() * chunks);
    auto centers = buffer<A>(s.groups());
    for (int64_t group = 0; group < s.groups(); group++) sets[group * chunks] = chunk_moments(group, 0, centers[group]);
    parallel(s.groups() * (chunks - 1), kChunk, [&](int64_t i) {
      const int64_t group = i / (chunks - 1), chunk = i % (chunks - 1) + 1;
      sets[group * chunks + chunk] = chunk_moments(group, chunk, centers[group]);
    });
    for (int64_t group = 0; group < s.groups(); group++) save(group, centers[group], &sets[group * chunks], chunks, 1, eps);
    const int64_t steps = s.groups() * pieces();
    parallel(steps, s.n() / pieces(), [&](int64_t i) {
      const int64_t group = (steps - 1 - i) / pieces();
      apply_piece(y, coefficients(group), group, (steps - 1 - i) % pieces());
    });
  }

  // sums of a piece, into (parts, 2, N, C)
  void sum_piece(A* sums, const T* dy, int64_t group, int64_t index, A* kept) const {
    const Piece p = piece(index);
    const int64_t offset = p.offset(s, group);
    const auto rows = backward_from(nullptr, nullptr, dy, offset, from_channel(coefficients(group), p.channel), shifted(kept, offset - group * s.n()));
    A* sum_dt_xhat = sums + p.part * 2 * s.N * s.C + group * s.D() + p.channel;
    A* sum_dt = sum_dt_xhat + s.N * s.C;
    if (s.S == 1)
      loop.line_sums(sum_dt_xhat, sum_dt, rows, p.rows, options);
    else
      loop.row_sums(sum_dt_xhat, sum_dt, rows, p.rows, p.length, options);
  }

  void backward_piece(T* dx, T* dt, const T* dy, const Rows<A>& group_at, int64_t group, int64_t index, A* kept) const {
    const Piece p = piece(index);
    const int64_t offset = p.offset(s, group);
    const auto rows = backward_from(dx, dt, dy, offset, from_channel(group_at, p.channel), shifted(kept, offset - group * s.n()));
    if (s.S == 1)
      loop.line_backward(rows, p.rows, options);
    else
      loop.row_backward(rows, p.rows, p.length, options);
  }

  void backward_rows(T* dx, T* dt, A* sums, const T* dy) {
    const bool apply = dx || dt;
    auto several = parts() > 1 ? buffer<A>(parts() * 2 * s.N * s.C) : nullptr;
    A* partial = several ? several.get() : sums;
    auto fold = [&](int64_t group) {
      if (several)
        for (int64_t k = 0; k < 2; k++) fold_parts(sums + k * s.N * s.C + group * s.D(), partial + k * s.N * s.C + group * s.D(), s.D(), parts(), 2 * s.N * s.C);
    };
    if (enough(s.groups(), s.n())) {
      return parallel(s.groups(), s.n(), [&](int64_t group) {
        const auto kept = apply ? keep(s.n()) : nullptr;
        for (int64_t index = 0; index < pieces(); index++) sum_piece(partial, dy, group, index, kept.get());
        fold(group);
        if (!apply) return;
        const Rows<A> at = coefficients(group, sums);
        for (int64_t index = pieces(); index-- > 0;) backward_piece(dx, dt, dy, at, group, index, kept.get());
      });
    }
    const int64_t steps = s.groups() * pieces(), step_size = s.n() / pieces();
    parallel(steps, step_size, [&](int64_t i) { sum_piece(partial, dy, i / pieces(), i % pieces(), nullptr); });
    for (int64_t group = 0; group < s.groups(); group++) fold(group);
    if (!apply) return;
    auto at = buffer<Rows<A>>(s.groups());
    for (int64_t group = 0; group < s.groups(); group++) at[group] = coefficients(group, sums);
    parallel(steps, step_size, [&](int64_t i) {
      const int64_t group = (steps - 1 - i) / pieces();
      backward_piece(dx, dt, dy, at[group], group, (steps - 1 - i) % pieces(), nullptr);
    });
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

  // ---- channels last: blocks of pixels with all their channels ----

  static constexpr int64_t kRun = 128;  // pixels summed in A; longer sums continue in double
  int64_t block_pixels() const { return std::max<int64_t>(kRun / 2, kGrain / s.C); }
  int64_t blocks() const { return ceil_div(s.S, block_pixels()); }
  int64_t pixels_of(int64_t block) const { return std::min(block_pixels(), s.S - block * block_pixels()); }
  int64_t offset_of(int64_t sample, int64_t block) const { return (sample * s.S + block * block_pixels()) * s.C; }

  // totals[i] = what f(sums, first pixel, pixels) adds to sums[i], over runs of pixels
  template <typename F>
  static void sum_runs(double* totals, int64_t n, int64_t pixels, const F& f) {
    auto sums = buffer<A>(n);
    for (int64_t begin = 0; begin < pixels; begin += kRun) {
      std::fill_n(sums.get(), n, A(0));
      f(sums.get(), begin, std::min(kRun, pixels - begin));
      for (int64_t i = 0; i < n; i++) totals[i] = begin ? totals[i] + sums[i] : sums[i];
    }
  }

  // Moments of all groups over one block, the means counted from `center` (C, equal within a group): a guess when it is `known`, else set here to
  // the mean of the first pixel. Where the guess proves bad, the means themselves come from a pass of their own.
  void block_moments(Moments* out, int64_t sample, int64_t block, A* center, bool known) const {
    const int64_t pixels = pixels_of(block), D = s.D();
    const T* start = x + offset_of(sample, block);
    const double count = static_cast<double>(pixels) * D;
    auto totals = buffer<double>(2 * s.C);
    if (!known) {
      for (int64_t group = 0; group < s.G; group++) {
        double sum = 0;
        for (int64_t c = group * D; c < (group + 1) * D; c++) sum += load<1>(start + c);
        std::fill_n(center + group * D, D, static_cast<A>(sum / D));
      }
    }
    auto scan = [&](const A* around) {  // whether no group is far from where it is thought to be
      sum_runs(totals.get(), 2 * s.C, pixels, [&](A* sums, int64_t first, int64_t run) {
        loop.column_moments(sums, sums + s.C, start + first * s.C, around, run, s.C);
      });
      bool good = true;
      for (int64_t group = 0; group < s.G; group++) {
        const double low = sum_of(&totals[group * D], D) / count;
        double m2 = sum_of(&totals[s.C + group * D], D);
        if (std::isinf(m2)) m2 = wide_squares(start + group * D, around[group * D], pixels);
        m2 -= low * low * count;
        good = good && low * low * count <= kBadGuess * m2;
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

  double wide_squares(const T* start, A middle, int64_t pixels) const {  // float squares overflowed
    double m2 = 0;
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t d = 0; d < s.D(); d++) {
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
      const Rows<A> at = sums ? coefficients(sample * s.G + group, sums) : coefficients(sample * s.G + group);
      const int64_t begin = group * s.D();
      std::fill_n(v[0] + begin, s.D(), at.mean);
      for (int64_t d = 0; d < s.D(); d++) {
        v[1][begin + d] = at.rstd * at.weight[d];
        v[2][begin + d] = at.offset * at.weight[d] + at.bias[d];
      }
      if (!backward) continue;
      const A values[] = {at.rstd, at.offset, at.c2, at.c3};
      for (int64_t k = 0; k < 4; k++) std::fill_n(v[3 + k] + begin, s.D(), values[k]);
    }
    return {v[0], v[1], v[2], v[3], v[4], v[5], v[6]};
  }

  void apply_block(T* y, const Columns<A>& at, int64_t sample, int64_t block) const {
    loop.columns(forward_from(y, offset_of(sample, block), at), pixels_of(block), s.C, options);
  }

  void forward_columns(T* y, double eps) {
    auto fold = [&](int64_t sample, const Moments* sets, const A* center) {
      for (int64_t group = 0; group < s.G; group++) save(sample * s.G + group, center[group * s.D()], sets + group, blocks(), s.G, eps);
    };
    if (enough(s.N, s.S * s.C)) {
      return parallel(s.N, s.S * s.C, [&](int64_t sample) {
        auto sets = buffer<Moments>(blocks() * s.G);
        auto storage = buffer<A>(7 * s.C);
        for (int64_t block = 0; block < blocks(); block++) block_moments(&sets[block * s.G], sample, block, storage.get(), block > 0);
        fold(sample, sets.get(), storage.get());
        const auto at = sample_coefficients(sample, false, nullptr, storage.get());
        for (int64_t block = blocks(); block-- > 0;) apply_block(y, at, sample, block);
      });
    }
    const int64_t steps = s.N * blocks(), step_size = block_pixels() * s.C;
    auto sets = buffer<Moments>(steps * s.G);
    auto storage = buffer<A>(s.N * 7 * s.C);
    parallel(s.N, step_size, [&](int64_t sample) { block_moments(&sets[sample * blocks() * s.G], sample, 0, &storage[sample * 7 * s.C], false); });
    parallel(steps, step_size, [&](int64_t i) {
      if (i % blocks()) block_moments(&sets[i * s.G], i / blocks(), i % blocks(), &storage[i / blocks() * 7 * s.C], true);
    });
    auto at = buffer<Columns<A>>(s.N);
    for (int64_t sample = 0; sample < s.N; sample++) {
      fold(sample, &sets[sample * blocks() * s.G], &storage[sample * 7 * s.C]);
      at[sample] = sample_coefficients(sample, false, nullptr, &storage[sample * 7 * s.C]);
    }
    parallel(steps, step_size, [&](int64_t i) {
      i = steps - 1 - i;
      apply_block(y, at[i / blocks()], i / blocks(), i % blocks());
    });
  }

  void sum_block(double* out, const T* dy, const Columns<A>& at, int64_t sample, int64_t block, A* kept) const {  // out: (2, C)
    const int64_t start = offset_of(sample, block);
    sum_runs(out, 2 * s.C, pixels_of(block), [&](A* sums, int64_t first, int64_t run) {
      const int64_t offset = start + first * s.C;
      const auto columns = backward_from(nullptr, nullptr, dy, offset, at, shifted(kept, offset - offset_of(sample, 0)));
      loop.column_sums(sums, sums + s.C, columns, run, s.C, options);
    });
  }

  void backward_block(T* dx, T* dt, const T* dy, const Columns<A>& at, int64_t sample, int64_t block, A* kept) const {
    const int64_t offset = offset_of(sample, block);
    loop.column_backward(backward_from(dx, dt, dy, offset, at, shifted(kept, offset - offset_of(sample, 0))), pixels_of(block), s.C, options);
  }

  void backward_columns(T* dx, T* dt, A* sums, const T* dy) {
    const bool apply = dx || dt;
    auto fold = [&](int64_t sample, const double* partial) {
      for (int64_t k = 0; k < 2; k++) fold_parts(sums + (k * s.N + sample) * s.C, partial + k * s.C, s.C, blocks(), 2 * s.C);
    };
    if (enough(s.N, s.S * s.C)) {
      return parallel(s.N, s.S * s.C, [&](int64_t sample) {
        auto storage = buffer<A>(7 * s.C);
        auto partial = buffer<double>(blocks() * 2 * s.C);
        auto at = sample_coefficients(sample, true, nullptr, storage.get());
        const auto kept = apply ? keep(s.S * s.C) : nullptr;
        for (int64_t block = 0; block < blocks(); block++) sum_block(&partial[block * 2 * s.C], dy, at, sample, block, kept.get());
        fold(sample, partial.get());
        if (!apply) return;
        at = sample_coefficients(sample, true, sums, storage.get());
        for (int64_t block = blocks(); block-- > 0;) backward_block(dx, dt, dy, at, sample, block, kept.get());
      });
    }
    const int64_t steps = s.N * blocks(), step_size = block_pixels() * s.C;
    auto storage = buffer<A>(s.N * 7 * s.C);
    auto partial = buffer<double>(steps * 2 * s.C);
    auto at = buffer<Columns<A>>(s.N);
    for (int64_t sample = 0; sample < s.N; sample++) at[sample] = sample_coefficients(sample, true, nullptr, &storage[sample * 7 * s.C]);
    parallel(steps, step_size, [&](int64_t i) { sum_block(&partial[i * 2 * s.C], dy, at[i / blocks()], i / blocks(), i % blocks(), nullptr); });
    for (int64_t sample = 0; sample < s.N; sample++) {
      fold(sample, &partial[sample * blocks() * 2 * s.C]);
      if (apply) sample_coefficients(sample, true, sums, &storage[sample * 7 * s.C]);
    }
    if (!apply) return;
    parallel(steps, step_size, [&](int64_t i) {
      i = steps - 1 - i;
      backward_block(dx, dt, dy, at[i / blocks()], i / blocks(), i % blocks(), nullptr);
    });
  }
};

}  // namespace normops
