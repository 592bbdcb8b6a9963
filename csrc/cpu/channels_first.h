// Group normalization, channels first: a group is contiguous, its channels are planes.
#pragma once

#include "group_norm.h"

namespace normops {

template <typename T>
class ChannelsFirst : GroupNorm<T> {
  using Base = GroupNorm<T>;
  using Base::affine, Base::backward_from, Base::coefficients, Base::D, Base::fold_parts, Base::forward_from, Base::frozen, Base::loop, Base::options,
      Base::residual, Base::s, Base::save, Base::saved, Base::x;

 public:
  using A = Acc<T>;

  explicit ChannelsFirst(const Base& common) : Base(common) {}

  void forward(T* y, double eps) const {
    const int64_t chunks = ceil_div(s.n(), kChunk), steps = s.groups() * pieces;
    auto apply_all = [&](bool forwards) {
      parallel(steps, s.n() / pieces, [&](int64_t i) {
        if (!forwards) i = steps - 1 - i;  // the end is still in the cache
        apply_piece(y, of(i / pieces), i / pieces, i % pieces);
      });
    };
    if (frozen) return apply_all(true);
    if (chunks == 1) {
      return parallel(s.N * blocks, together * s.n(), [&](int64_t task) {
        const Block b = block(task);
        const int64_t offset = b.group * s.n();
        loop.groups({shifted(y, offset), nullptr, x + offset, nullptr, shifted(residual, offset), affine.weight + b.channel,
                     affine.bias + b.channel, D, D, saved(), b.group, eps},
                    b.groups, D, s.S, options);
      });
    }
    if (enough(s.groups(), s.n())) {
      return parallel(s.groups(), s.n(), [&](int64_t group) {
        Moments few[16];
        auto many = chunks > 16 ? buffer<Moments>(chunks) : nullptr;
        Moments* sets = many ? many.get() : few;
        A center;
        for (int64_t chunk = 0; chunk < chunks; chunk++) sets[chunk] = chunk_moments(group, chunk, center);
        save(group, center, sets, chunks, 1, eps);
        if (!y) return;
        const Group<A> at = of(group);
        for (int64_t index = pieces; index-- > 0;) apply_piece(y, at, group, index);
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
    if (y) apply_all(false);
  }

  // sums: (2, N, C): sum dt*x_hat, sum dt
  void backward(T* dx, T* dt, A* sums, const T* dy) const {
    const bool apply = (dx || dt) && !frozen;
    auto several = parts > 1 ? buffer<A>(parts * 2 * s.N * s.C) : nullptr;
    A* partial = several ? several.get() : sums;
    auto fold = [&](int64_t group) {
      if (several)
        for (int64_t k = 0; k < 2; k++) fold_parts(sums + k * s.N * s.C + group * D, partial + k * s.N * s.C + group * D, D, parts, 2 * s.N * s.C);
    };
    if (!frozen && s.n() <= kChunk) {
      return parallel(s.N * blocks, together * s.n(), [&](int64_t task) {
        const Block b = block(task);
        const auto kept = apply ? keep<A>(options.activation, s.n()) : nullptr;
        const Group<A> at{{}, affine.weight + b.channel, affine.bias + b.channel};
        const auto planes = backward_from(dx, dt, dy, b.group * s.n(), at, kept.get());
        A* own = sums + b.group * D;
        loop.groups_backward({planes, saved(), b.group, own, own + s.N * s.C}, b.groups, D, s.S, options);
      });
    }
    if (!frozen && enough(s.groups(), s.n())) {
      return parallel(s.groups(), s.n(), [&](int64_t group) {
        const auto kept = apply ? keep<A>(options.activation, s.n()) : nullptr;
        for (int64_t index = 0; index < pieces; index++) sum_piece(nullptr, nullptr, partial, dy, group, index, kept.get());
        fold(group);
        if (!apply) return;
        const Group<A> at = of(group, sums);
        for (int64_t index = pieces; index-- > 0;) backward_piece(dx, dt, dy, at, group, index, kept.get());
      });
    }
    const int64_t steps = s.groups() * pieces, step_size = s.n() / pieces;
    parallel(steps, step_size,
             [&](int64_t i) { sum_piece(frozen ? dx : nullptr, frozen ? dt : nullptr, partial, dy, i / pieces, i % pieces, nullptr); });
    for (int64_t group = 0; group < s.groups(); group++) fold(group);
    if (!apply) return;
    auto at = buffer<Group<A>>(s.groups());
    for (int64_t group = 0; group < s.groups(); group++) at[group] = of(group, sums);
    parallel(steps, step_size, [&](int64_t i) {
      const int64_t group = (steps - 1 - i) / pieces;
      backward_piece(dx, dt, dy, at[group], group, (steps - 1 - i) % pieces, nullptr);
    });
  }

 private:
  static constexpr int64_t kPiece = 16384;
  const int64_t parts = ceil_div(s.S, kPiece);  // of one channel
  const int64_t planes_per_piece = std::max<int64_t>(1, kPiece / s.S);
  const int64_t pieces = ceil_div(D, planes_per_piece) * parts;  // of one group

  const int64_t together = std::clamp<int64_t>(2 * kChunk / s.n(), 1, s.G);  // small groups that are one task
  const int64_t blocks = ceil_div(s.G, together);                            // of them in a sample
  struct Block {
    int64_t group, groups, channel;  // channel: of the vectors
  };
  Block block(int64_t index) const {
    const int64_t sample = index / blocks, first = index % blocks * together;
    return {sample * s.G + first, std::min(together, s.G - first), sample * affine.stride + first * D};
  }

  struct Piece {  // elements [begin, begin + length) of `planes` channels from `channel` on; several planes are whole
    int64_t channel, planes, begin, length, part;
    int64_t offset(const Shape& s, int64_t group) const { return (group * s.D() + channel) * s.S + begin; }
  };
  Piece piece(int64_t index) const {
    const int64_t part = parts > 1 ? index % parts : 0, channel = (parts > 1 ? index / parts : index) * planes_per_piece, begin = part * kPiece;
    return {channel, std::min(planes_per_piece, D - channel), begin, std::min(kPiece, s.S - begin), part};
  }

  Group<A> of(int64_t group, const A* sums = nullptr) const { return coefficients(group / s.G, group % s.G, sums); }

  static Group<A> from_channel(Group<A> at, int64_t channel) {
    at.weight += channel;
    at.bias += channel;
    return at;
  }

  Moments chunk_moments(int64_t group, int64_t chunk, A& center) const {  // the first chunk sets the center that the others take as a guess
    const int64_t begin = chunk * kChunk;
    return loop.moments(x + group * s.n() + begin, std::min(kChunk, s.n() - begin), center, chunk > 0);
  }

  void apply_piece(T* y, const Group<A>& at, int64_t group, int64_t index) const {
    const Piece p = piece(index);
    loop.planes(forward_from(y, p.offset(s, group), from_channel(at, p.channel)), p.planes, p.length, options);
  }

  // sums of a piece, into (parts, 2, N, C)
  void sum_piece(T* dx, T* dt, A* sums, const T* dy, int64_t group, int64_t index, A* kept) const {
    const Piece p = piece(index);
    const int64_t offset = p.offset(s, group);
    const auto planes = backward_from(dx, dt, dy, offset, from_channel(of(group), p.channel), shifted(kept, offset - group * s.n()));
    A* sum_dt_xhat = sums + p.part * 2 * s.N * s.C + group * D + p.channel;
    loop.plane_sums(sum_dt_xhat, sum_dt_xhat + s.N * s.C, planes, p.planes, p.length, options);
  }

  void backward_piece(T* dx, T* dt, const T* dy, const Group<A>& at, int64_t group, int64_t index, A* kept) const {
    const Piece p = piece(index);
    const int64_t offset = p.offset(s, group);
    const auto planes = backward_from(dx, dt, dy, offset, from_channel(at, p.channel), shifted(kept, offset - group * s.n()));
    loop.plane_backward(planes, p.planes, p.length, options);
  }
};

}  // namespace normops
