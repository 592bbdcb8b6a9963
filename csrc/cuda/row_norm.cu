// The operators normops_CUDA::row_norm_fwd and row_norm_bwd: how threads share rows, their workspace, their launches.
#include "launch.cuh"
#include "rows.cuh"

#include <numeric>

namespace normops {
namespace {

// Sizes by reasoning, not by measurement. They depend on the shape alone, so that the order of the sums does too.
constexpr int64_t kRowBytes = 32 << 10;  // shared memory of a block: several blocks fit on one SM of every GPU since sm_80
constexpr int64_t kLineBytes = 64;       // across: no fewer positions side by side, lest reads fetch more than they use
constexpr int64_t kRowBlocks = 512;      // backward: more rows rather than more blocks, for fewer partial sums; 4 for each SM of an H200
constexpr int64_t kMaxRows = 256;        // ... but no thread adds up more

struct Layout {
  Rows rows{};
  int64_t threads, teams, count;  // of a block; rows, or blocks of positions, that it has at once; vectors of a thread

  // V elements make up `bytes`, the sums of a channel `sum_bytes`; no more than `together` rows have work for one block
  Layout(const Problem& p, bool across, int V, int64_t bytes, int64_t sum_bytes, int64_t together) {
    int64_t lanes;
    if (across) {
      lanes = power_of_two(ceil_div(p.S, V), 1, 32);
      while (lanes * bytes > kLineBytes && lanes * bytes * p.C > kRowBytes) lanes /= 2;
      threads = power_of_two(lanes * p.C, 32, kThreads);
    } else {
      lanes = power_of_two(ceil_div(p.D * sum_bytes, kRowBytes / kThreads), 1, kThreads);  // one row a block, or the sums of all fit
      threads = lanes > 32 ? lanes : power_of_two(lanes * std::min<int64_t>(together, kThreads), 32, kThreads);
    }
    rows.lanes = static_cast<int>(lanes);
    rows.blocks = across ? ceil_div(p.S, lanes * V) : 1;
    teams = across ? 1 : threads / lanes;
    count = across ? ceil_div(p.C, threads / lanes) : ceil_div(p.D / V, lanes);
  }
};

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
    const Saved<A> saved{data<A>(stats), N * num_groups * p.S, centered};
    const bool across = p.S > 1;
    with_width<Y>(across ? p.S : p.D, {in, other, added, sum, out, p.weight.data, p.bias.data}, across, [&](auto width, auto is_across) {
      constexpr int V = width();
      Layout layout(p, across, V, V * sizeof(T), 2 * sizeof(A), N * num_groups);
      const int64_t bytes = layout.count * layout.threads * V * sizeof(T);
      layout.rows.held = bytes <= kRowBytes;
      const int64_t blocks = ceil_div(N * num_groups * layout.rows.blocks, layout.teams);
      const int64_t shared = layout.rows.held ? bytes : 0;
      launch(row_fwd_kernel<T, Y, V, is_across()>, blocks, 1, layout.threads, shared, p, layout.rows, eps, in, other, added, sum, out, saved);
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
    const bool across = p.S > 1, parameters = dweight || dbias;
    const std::initializer_list<const void*> pointers = {b.dx, b.dresidual, b.dy, b.dtotal, b.x, b.residual, p.weight.data, p.bias.data};
    with_width<Y>(across ? p.S : p.D, pointers, across, [&](auto width, auto is_across) {
      constexpr int V = width();
      const int64_t runs = std::lcm(vector_rows(weight, C), vector_rows(bias, C)), samples = N / runs, sum_bytes = 2 * sizeof(A);
      Layout layout(p, across, V, V * sizeof(T), sum_bytes, samples);
      Rows& rows = layout.rows;
      rows.samples = samples;
      const int64_t units = ceil_div(samples * rows.blocks, layout.teams), bytes = layout.teams * p.D * sum_bytes;
      rows.steps = 1;
      while (rows.steps < kMaxRows && runs * num_groups * ceil_div(units, rows.steps) > kRowBlocks) rows.steps *= 2;
      rows.chunks = ceil_div(units, rows.steps);
      rows.partials = runs * rows.chunks;
      rows.held = bytes <= kRowBytes;
      Workspace workspace(x, parameters ? rows.partials * C * sum_bytes : 0);
      A* partial = parameters ? workspace.take<A>(2 * rows.partials * C) : nullptr;
      const int64_t shared = parameters && rows.held ? bytes : 0;
      launch(row_bwd_kernel<T, Y, V, is_across()>, rows.partials * num_groups, 1, layout.threads, shared, p, rows, b, partial);
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
