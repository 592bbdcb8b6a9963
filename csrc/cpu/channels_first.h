// Group normalization, channels first: a group is contiguous, its channels are planes. Batch normalization: the planes are those of a channel.
#pragma once

#include "group_norm.h"

namespace normops {

template <typename T>
class ChannelsFirst : GroupNorm<T> {
  using Base = GroupNorm<T>;
  using Base::affine, Base::backward_from, Base::coefficients, Base::D, Base::fold_parts, Base::forward_from, Base::frozen, Base::leaves_dt,
      Base::linear, Base::loop, Base::options, Base::residual, Base::s, Base::save, Base::saved, Base::x;

 public:
  using A = Acc<T>;
  using Base::means;

  explicit ChannelsFirst(const Base& common) : Base(common) {}

  void forward(T* y, double eps) const {
    const int64_t steps = s.groups() * pieces.count;
    auto apply_all = [&](bool forwards) {
      parallel(steps, s.n() / pieces.count, [&](int64_t i) {
        if (!forwards) i = steps - 1 - i;  // the end is still in the cache
        apply_piece(y, of(i / pieces.count), i / pieces.count, i % pieces.count);
      });
    };
    if (s.n() <= kChunk) {
      return parallel(s.samples() * blocks, together * s.n(), [&](int64_t task) {
        const Block b = block(task);
        const int64_t offset = b.group * apart;
        loop.groups({shifted(y, offset), nullptr, x + offset, nullptr, shifted(residual, offset), affine.weight + b.channel,
                     affine.bias + b.channel, D, D, saved(), frozen == 1 ? b.group % s.G : b.group, eps, frozen > 0},
                    b.groups, apart, all, options);
      });
    }
    if (frozen) return apply_all(true);
    const int64_t count = chunks.count;
    if (enough(s.groups(), s.n())) {
      return parallel(s.groups(), s.n(), [&](int64_t group) {
        Moments few[16];
        auto many = count > 16 ? buffer<Moments>(count) : nullptr;
        Moments* sets = many ? many.get() : few;
        A center;
        for (int64_t chunk = 0; chunk < count; chunk++) sets[chunk] = chunk_moments(group, chunk, center);
        save(group, center, sets, count, 1, eps);
        if (!y) return;
        const Group<A> at = of(group);
        for (int64_t index = pieces.count; index-- > 0;) apply_piece(y, at, group, index);
      });
    }
    auto sets = buffer<Moments>(s.groups() * count);
    auto centers = buffer<A>(s.groups());
    for (int64_t group = 0; group < s.groups(); group++) sets[group * count] = chunk_moments(group, 0, centers[group]);
    parallel(s.groups() * (count - 1), kChunk, [&](int64_t i) {
      const int64_t group = i / (count - 1), chunk = i % (count - 1) + 1;
      sets[group * count + chunk] = chunk_moments(group, chunk, centers[group]);
    });
    for (int64_t group = 0; group < s.groups(); group++) save(group, centers[group], &sets[group * count], count, 1, eps);
    if (y) apply_all(false);
  }

  // sums: (2, samples, C): sum dt*x_hat, sum dt
  void backward(T* dx, T* dt, A* sums, const T* dy) const {
    const bool apply = (dx || dt) && !frozen, leave = leaves_dt(dx, dt);
    const ChannelsFirst second(leave ? linear() : Base(*this));
    const T* second_dy = leave ? dt : dy;
    T *first_dx = frozen ? dx : nullptr, *first_dt = frozen || leave ? dt : nullptr, *second_dt = leave ? nullptr : dt;
    const T* later = s.batch && s.S <= kFetched ? dx : nullptr;
    auto several = sets > 1 ? buffer<A>(sets * 2 * s.sums()) : nullptr;
    A* partial = several ? several.get() : sums;
    auto fold = [&](int64_t group) {
      if (several)
        for (int64_t k = 0; k < 2; k++) fold_parts(sums + k * s.sums() + group * D, partial + k * s.sums() + group * D, D, sets, 2 * s.sums());
    };
    if (!frozen && s.n() <= kChunk) {
      return parallel(s.samples() * blocks, together * s.n(), [&](int64_t task) {
        const Block b = block(task);
        const auto kept = apply && !leave ? keep<A>(options.activation, s.n()) : nullptr;
        const Group<A> at{{}, affine.weight + b.channel, affine.bias + b.channel};
        auto planes = backward_from(dx, dt, dy, b.group * apart, at, kept.get());
        planes.later = shifted(later, b.group * apart);
        A* own = sums + b.group * D;
        loop.groups_backward({planes, saved(), b.group, own, own + s.sums(), leave}, b.groups, apart, all, options);
      });
    }
    if (!frozen && enough(s.groups(), s.n())) {
      return parallel(s.groups(), s.n(), [&](int64_t group) {
        const auto kept = apply && !leave ? keep<A>(options.activation, s.n()) : nullptr;
        for (int64_t index = 0; index < pieces.count; index++) sum_piece(nullptr, first_dt, partial, dy, group, index, kept.get(), later);
        fold(group);
        if (!apply) return;
        const Group<A> at = of(group, sums);
        for (int64_t index = pieces.count; index-- > 0;) second.backward_piece(dx, second_dt, second_dy, at, group, index, kept.get());
      });
    }
    const int64_t steps = s.groups() * pieces.count, step_size = s.n() / pieces.count;
    parallel(steps, step_size, [&](int64_t i) { sum_piece(first_dx, first_dt, partial, dy, i / pieces.count, i % pieces.count, nullptr); });
    for (int64_t group = 0; group < s.groups(); group++) fold(group);
    if (!apply) return;
    auto at = buffer<Group<A>>(s.groups());
    for (int64_t group = 0; group < s.groups(); group++) at[group] = of(group, sums);
    parallel(steps, step_size, [&](int64_t i) {
      const int64_t group = (steps - 1 - i) / pieces.count;
      second.backward_piece(dx, second_dt, second_dy, at[group], group, (steps - 1 - i) % pieces.count, nullptr);
    });
  }

 private:
  static constexpr int64_t kPiece = 16384;
  static constexpr int64_t kFetched = 512;  // in planes of a batch up to this, the place of dx is fetched: prefetchers follow long ones

  struct Piece {  // elements [begin, begin + length) of `count` planes from `plane` on; several planes are whole
    int64_t plane, count, begin, length, part;
    int64_t offset(const Planes& all) const { return plane * all.stride + begin; }
    Planes planes(const Planes& all) const { return {count, length, all.stride, all.step}; }
  };
  struct Cut {  // planes in pieces of about `size` elements: parts of one plane, or several planes
    const Planes all;
    const int64_t size;
    const int64_t parts = ceil_div(all.length, size);  // of one plane
    const int64_t together = std::max<int64_t>(1, size / all.length);
    const int64_t count = ceil_div(all.count, together) * parts;

    Piece operator[](int64_t index) const {
      const int64_t part = parts > 1 ? index % parts : 0, plane = (parts > 1 ? index / parts : index) * together, begin = part * size;
      return {plane, std::min(together, all.count - plane), begin, std::min(size, all.length - begin), part};
    }
  };

  const Planes all = s.batch ? Planes{s.N, s.S, s.C * s.S, 0} : Planes{D, s.S, s.S, 1};  // of one group
  const int64_t apart = s.batch ? s.S : s.n();                                           // elements from one group to the next
  const Cut chunks{all.joined(), kChunk}, pieces{all, kPiece};
  const int64_t sets = s.batch ? pieces.count : pieces.parts;  // of sums: from pieces of the same channel

  const int64_t together = std::clamp<int64_t>(2 * kChunk / s.n(), 1, s.G);  // small groups that are one task
  const int64_t blocks = ceil_div(s.G, together);                            // of them in a sample
  struct Block {
    int64_t group, groups, channel;  // channel: of the vectors
  };
  Block block(int64_t index) const {
    const int64_t sample = index / blocks, first = index % blocks * together;
    return {sample * s.G + first, std::min(together, s.G - first), sample * affine.stride + first * D};
  }

  Group<A> of(int64_t group, const A* sums = nullptr) const { return coefficients(group / s.G, group % s.G, sums); }

  Group<A> from_plane(Group<A> at, int64_t plane) const {
    at.weight += plane * all.step;
    at.bias += plane * all.step;
    return at;
  }

  Moments chunk_moments(int64_t group, int64_t chunk, A& center) const {  // the first chunk sets the center that the others take as a guess
    const Piece p = chunks[chunk];
    return loop.moments(x + group * apart + p.offset(chunks.all), p.planes(chunks.all), center, chunk > 0);
  }

  void apply_piece(T* y, const Group<A>& at, int64_t group, int64_t index) const {
    const Piece p = pieces[index];
    loop.planes(forward_from(y, group * apart + p.offset(all), from_plane(at, p.plane)), p.planes(all), options);
  }

  Backward<T, Group<A>> backward_of(T* dx, T* dt, const T* dy, const Group<A>& at, int64_t group, const Piece& p, A* kept) const {
    return backward_from(dx, dt, dy, group * apart + p.offset(all), from_plane(at, p.plane), shifted(kept, p.plane * s.S + p.begin));
  }

  // sums of a piece, into (sets, 2, samples, C)
  void sum_piece(T* dx, T* dt, A* sums, const T* dy, int64_t group, int64_t index, A* kept, const T* later = nullptr) const {
    const Piece p = pieces[index];
    auto planes = backward_of(dx, dt, dy, of(group), group, p, kept);
    planes.later = shifted(later, group * apart + p.offset(all));
    A* sum_dt_xhat = sums + (s.batch ? index : p.part) * 2 * s.sums() + group * D + p.plane * all.step;
    loop.plane_sums(sum_dt_xhat, sum_dt_xhat + s.sums(), planes, p.planes(all), options);
  }

  void backward_piece(T* dx, T* dt, const T* dy, const Group<A>& at, int64_t group, int64_t index, A* kept) const {
    const Piece p = pieces[index];
    loop.plane_backward(backward_of(dx, dt, dy, at, group, p, kept), p.planes(all), options);
  }
};

}  // namespace normops
