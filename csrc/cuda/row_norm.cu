// The operators normops_CUDA::row_norm_fwd and row_norm_bwd: how threads share rows, their workspace, their launches.
#include "launch.cuh"
#include "rows.cuh"
#include "split.cuh"

#include <numeric>

namespace normops {
namespace {

// Sizes by reasoning, not by measurement. What the order of the sums depends on depends on the shape alone.
constexpr int64_t kRowBytes = 64 << 10;    // shared memory of a block, forward for x, backward for sums: one row up to here
constexpr int64_t kPieceBytes = 32 << 10;  // ... and for pieces of longer ones
constexpr int64_t kThreadBytes = 64;       // forward: x of a thread, so that two blocks have 32 KB on their way
constexpr int64_t kSumBytes = 128;         // backward: sums of a thread
constexpr int64_t kLineBytes = 64;         // across: no fewer positions side by side, lest reads fetch more than they use
constexpr int64_t kRowBlocks = 512;        // backward: more rows rather than more blocks, for fewer partial sums; 4 for each SM of an H200
constexpr int64_t kMaxRows = 256;          // ... but no thread adds up more
constexpr int64_t kFewRows = 64;           // as many rows leave half of an H200 idle: a block for each piece
constexpr int64_t kLongBytes = 256 << 10;  // ... if they are as long, so that it is worth two launches more
static_assert(kSumBytes * kThreads <= kRowBytes, "the sums of several rows are held");

struct Layout {
  Rows rows{};
  int64_t threads, teams;  // of a block; rows, or blocks of positions, that it has at once

  // V elements make up `bytes`; a channel takes `each` bytes of shared memory, a thread has `most` of them; `together` rows have work for one block
  Layout(const Problem& p, bool across, int V, int64_t bytes, int64_t each, int64_t most, int64_t together) {
    int64_t lanes, width = p.D;
    if (across) {
      lanes = power_of_two(ceil_div(p.S, V), 1, 32);
      while (lanes * bytes > kLineBytes && lanes * bytes * p.C > kPieceBytes) lanes /= 2;
      threads = power_of_two(lanes * p.C, 32, kThreads);
    } else {
      lanes = power_of_two(ceil_div(p.D * each, most), power_of_two(ceil_div(p.D, V), 1, 4), kThreads);
      threads = lanes > 32 ? lanes : power_of_two(lanes * std::min<int64_t>(together, kThreads), 32, kThreads);
      if (p.D * each > kRowBytes) width = kPieceBytes / each;
    }
    rows.lanes = static_cast<int>(lanes);
    rows.blocks = across ? ceil_div(p.S, lanes * V) : 1;
    teams = across ? 1 : threads / lanes;
    cut(p, across, V, width);
  }

  void cut(const Problem& p, bool across, int V, int64_t width) {
    rows.width = static_cast<int>(std::min<int64_t>(width, p.D));
    rows.pieces = static_cast<int>(ceil_div(p.D, rows.width));
    rows.count = static_cast<int>(across ? ceil_div(rows.width, threads / rows.lanes) : ceil_div(rows.width / V, rows.lanes));
  }
};

// body(Width<V>{}, across). Eight positions of a thread would take twice the shuffles of four, and too many registers.
template <typename Y, typename Body>
void with_row_width(const Problem& p, std::initializer_list<const void*> pointers, Body body) {
  if (p.S > 1) {
    with_width<Y, 4>(p.S, pointers, true, [&](auto width, auto) { body(width, std::true_type{}); });
  } else {
    with_width<Y>(p.D, pointers, false, [&](auto width, auto) { body(width, std::false_type{}); });
  }
}

void row_norm_fwd(Tensor y, OptionalTensor total, OptionalTensor stats, Tensor x, OptionalTensor addend, OptionalTensor weight, OptionalTensor bias,
                  OptionalTensor residual, int64_t N, int64_t C, int64_t num_groups, bool centered, double weight_offset, double eps,
                  int64_t activation, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Launcher launch(x);
  const Problem p = problem_of(x, weight, bias, N, C, num_groups, weight_offset, activation, negative_slope);
  with_types(x.scalar_type(), y.scalar_type(), [&](auto t, auto u) {
    using T = decltype(t);
    using Y = decltype(u);
    using A = Accumulator<T>;
    const T *in = static_cast<const T*>(x.data_ptr()), *other = data<const T>(addend), *added = data<const T>(residual);
    T* sum = data<T>(total);
    Y* out = static_cast<Y*>(y.data_ptr());
    const int64_t statistics = N * num_groups;
    Saved<A> saved{data<A>(stats), statistics * p.S, centered};
    with_row_width<Y>(p, {in, other, added, sum, out, p.weight.data, p.bias.data}, [&](auto width, auto is_across) {
      constexpr int V = width();
      constexpr bool ACROSS = is_across();
      Layout layout(p, ACROSS, V, V * sizeof(T), sizeof(T), kThreadBytes, statistics);
      if (ACROSS) layout.cut(p, true, V, kRowBytes / (layout.rows.lanes * V * sizeof(T)));
      Rows& rows = layout.rows;
      const int64_t shared = rows.count * layout.threads * V * sizeof(T), blocks = ceil_div(statistics * rows.blocks, layout.teams);
      const auto run = [&](Step step, Chunk<A>* partial) {
        rows.step = step;
        launch(row_fwd_kernel<T, Y, V, ACROSS>, step == Step::whole ? blocks : blocks * rows.pieces, 1, layout.threads, shared, p, rows, eps, in,
               other, added, sum, out, saved, partial);
      };
      if (ACROSS || rows.pieces == 1 || statistics > kFewRows || p.D * sizeof(T) < kLongBytes) return run(Step::whole, nullptr);
      Workspace workspace(x, statistics * rows.pieces * sizeof(Chunk<A>) + (stats ? 0 : 8 * 3 * statistics));
      Chunk<A>* partial = workspace.take<Chunk<A>>(statistics * rows.pieces);
      if (!stats) saved.data = workspace.take<A>(3 * statistics);
      Problem fold = p;  // groups of one channel, whose tiles are the pieces
      fold.C = p.G;
      fold.D = 1;
      fold.S = p.D;
      Split split{};
      split.positions = rows.width;
      split.tiles = rows.pieces;
      split.channels = p.G;
      run(Step::parts, partial);
      launch(fold_moments_kernel<A>, statistics, 1, kThreads, 0, fold, split, eps, partial, saved, Running{});
      run(Step::apply, nullptr);
    });
  });
}

void row_norm_bwd(OptionalTensor dx, OptionalTensor dweight, OptionalTensor dbias, OptionalTensor dresidual, Tensor dy, OptionalTensor dtotal,
                  Tensor x, Tensor stats, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, int64_t N, int64_t C,
                  int64_t num_groups, bool centered, double weight_offset, int64_t activation, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Launcher launch(x);
  const Problem p = problem_of(x, weight, bias, N, C, num_groups, weight_offset, activation, negative_slope);
  with_types(x.scalar_type(), dy.scalar_type(), [&](auto t, auto u) {
    using T = decltype(t);
    using Y = decltype(u);
    using A = Accumulator<T>;
    const Saved<A> saved{static_cast<A*>(stats.data_ptr()), N * num_groups * p.S, centered};
    const Backward<A, T, Y> b = backward<A, T, Y>(p, dx, dresidual, dy, dtotal, x, residual, saved);
    const bool parameters = dweight || dbias;
    const std::initializer_list<const void*> pointers = {b.dx, b.dresidual, b.dy, b.dtotal, b.x, b.residual, p.weight.data, p.bias.data};
    with_row_width<Y>(p, pointers, [&](auto width, auto is_across) {
      constexpr int V = width();
      constexpr bool ACROSS = is_across();
      const int64_t runs = std::lcm(vector_rows(weight, C), vector_rows(bias, C)), samples = N / runs, sum_bytes = 2 * sizeof(A);
      Layout layout(p, ACROSS, V, V * sizeof(T), sum_bytes, kSumBytes, samples);
      Rows& rows = layout.rows;
      rows.samples = samples;
      const int64_t units = ceil_div(samples * rows.blocks, layout.teams), each = num_groups * rows.pieces;
      rows.steps = 1;
      while (rows.steps < kMaxRows && runs * each * ceil_div(units, rows.steps) > kRowBlocks) rows.steps *= 2;
      rows.chunks = ceil_div(units, rows.steps);
      rows.partials = runs * rows.chunks;
      const int64_t sums = ceil_div(layout.teams * rows.width * sum_bytes, 16) * 16, parts = 2 * saved.count * rows.pieces;
      rows.held = sums <= kRowBytes;
      rows.sum_bytes = static_cast<int>(parameters && rows.held ? sums : 0);
      const int64_t staged = 2 * rows.count * layout.threads * V * (sizeof(T) + sizeof(Y));
      rows.staged = rows.sum_bytes + staged <= shared_memory_of(x);
      Workspace workspace(x, (parameters ? rows.partials * C * sum_bytes : 0) + (rows.pieces > 1 ? 8 * parts : 0));
      A* partial = parameters ? workspace.take<A>(2 * rows.partials * C) : nullptr;
      A* means = rows.pieces > 1 ? workspace.take<A>(parts) : nullptr;
      const auto run = [&](Step step, A* own) {
        rows.step = step;
        launch(row_bwd_kernel<T, Y, V, ACROSS>, rows.partials * each, 1, layout.threads, rows.sum_bytes + (rows.staged ? staged : 0), p, rows, b, own,
               means);
      };
      run(rows.pieces > 1 ? Step::parts : Step::whole, partial);
      if (rows.pieces > 1 && (dx || dresidual)) run(Step::apply, nullptr);
      if (parameters) parameter_grads(launch, partial, rows.partials, C, dweight, dbias);
    });
  });
}

}  // namespace
}  // namespace normops

STABLE_TORCH_LIBRARY_FRAGMENT(normops_CUDA, m) {
  m.def(
      "row_norm_fwd(Tensor(a!) y, Tensor(b!)? total, Tensor(c!)? stats, Tensor x, Tensor? addend, Tensor? weight, Tensor? bias, Tensor? residual, "
      "int N, int C, int num_groups, bool centered, float weight_offset, float eps, int activation, float negative_slope) -> ()");
  m.def(
      "row_norm_bwd(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dresidual, Tensor dy, Tensor? dtotal, Tensor x, "
      "Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, int N, int C, int num_groups, bool centered, float weight_offset, "
      "int activation, float negative_slope) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(normops_CUDA, CUDA, m) {
  m.impl("row_norm_fwd", TORCH_BOX(&normops::row_norm_fwd));
  m.impl("row_norm_bwd", TORCH_BOX(&normops::row_norm_bwd));
}
