// The operators normops_CUDA::group_norm_fwd and group_norm_bwd: which kernels run on which sizes, their workspace, their launches.
#include <Python.h>

#include "groups.cuh"
#include "launch.cuh"

namespace normops {
namespace {

// Sizes by reasoning, not by measurement. They depend on the shape alone, so that the order of the sums does too.
constexpr int64_t kHeldBytes = 32 << 10;   // x of a block in shared memory: several blocks fit on one SM of every GPU since sm_80
constexpr int64_t kGroupBytes = 32 << 10;  // x of a group up to here: one block for it, at most kHeldBytes
constexpr int64_t kLastBytes = 1 << 20;    // ... channels last only if all of x is below this: one launch with short reads beats three
constexpr int64_t kVectorsPerThread = 2;   // group kernels: fewer threads rather than less than this for each
constexpr int64_t kBlocks = 2048;          // split kernels: longer tiles rather than more blocks; 16 for each SM of an H200
constexpr int64_t kMaxSteps = 64;          // ... but no thread goes over more vectors

// `width` elements at a time, at most `max_steps` of them for each thread
Split split_of(const Problem& p, bool last, int width, int64_t max_steps) {
  const int64_t across = (last ? p.C : p.S) / width, vectors = p.N * p.C * p.S / width;
  Split split;
  split.lanes = power_of_two(across, 1, 32);
  if (last && across > 8) {  // whole lines of 128 bytes, with the fewest threads beyond C
    for (int lanes = 16; lanes >= 8; lanes /= 2) {
      if (ceil_div(across, lanes) * lanes < ceil_div(across, split.lanes) * split.lanes) split.lanes = lanes;
    }
  }
  const int64_t positions = last ? kThreads / split.lanes : split.lanes * width;
  int64_t steps = 1;
  while (steps < max_steps && steps * positions < p.S && vectors > kBlocks * kThreads * steps) steps *= 2;
  split.positions = static_cast<int>(steps * positions);
  split.tiles = ceil_div(p.S, split.positions);
  split.channel_blocks = static_cast<int>(last ? ceil_div(across, split.lanes) : 1);
  split.blocks = last ? p.N * split.tiles * split.channel_blocks : ceil_div(p.N * p.C * split.tiles, kThreads / split.lanes);
  return split;
}

// Where one position has all in common with the others but x: samples are positions, of channels last.
bool fold_samples(Problem& p, bool frozen, int64_t stats_rows, std::initializer_list<const OptionalTensor*> vectors) {
  const auto shared = [&](const OptionalTensor* vector) { return vector_rows(*vector, p.C) == 1; };
  if (!frozen || p.S > 1 || stats_rows > 1 || !std::all_of(vectors.begin(), vectors.end(), shared)) return false;
  std::swap(p.N, p.S);
  return true;
}

void group_norm_fwd(OptionalTensor y, OptionalTensor stats, Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, int64_t N,
                    int64_t C, int64_t num_groups, bool channels_last, bool frozen, double eps, int64_t activation, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Launcher launch(x);
  Problem p = problem_of(x, weight, bias, N, C, num_groups, 0, activation, negative_slope);
  const bool folded = fold_samples(p, frozen, stats ? stats->numel() / (3 * num_groups) : 1, {&weight, &bias});
  with_types(x.scalar_type(), (y ? *y : x).scalar_type(), [&](auto t, auto u) {
    using T = decltype(t);
    using Y = decltype(u);
    using A = Accumulator<T>;
    const T *in = static_cast<const T*>(x.data_ptr()), *added = data<const T>(residual);
    Y* out = data<Y>(y);
    const int64_t groups = p.N * p.G, n = p.D * p.S, bytes = n * sizeof(T);
    Saved<A> saved{data<A>(stats), frozen ? stats->numel() / 3 : groups, true};
    const bool last = folded || (channels_last && p.S > 1);
    const bool by_group = !frozen && bytes <= kGroupBytes && (!last || groups * bytes <= kLastBytes);
    with_width<Y>(!last ? p.S : by_group ? p.D : p.C, {in, added, out, p.weight.data, p.bias.data}, last, [&](auto width, auto is_last) {
      constexpr int V = width();
      constexpr bool LAST = is_last();
      if (by_group) {
        const int threads = power_of_two(ceil_div(n, V * kVectorsPerThread), 32, kThreads);
        return launch(group_fwd_kernel<T, Y, V, LAST>, groups, 1, threads, bytes, p, eps, in, added, out, saved);
      }
      const int64_t bytes_per_step = kThreads * V * sizeof(T);
      const Split split = split_of(p, LAST, V, std::min(kMaxSteps, kHeldBytes / bytes_per_step));
      const auto apply = [&] { launch(apply_fwd_kernel<T, Y, V, LAST>, split.blocks, 1, kThreads, 0, p, split, in, added, saved, out); };
      if (frozen) return apply();
      const int64_t steps = ceil_div(split.positions, LAST ? kThreads / split.lanes : split.lanes * V), chunks = p.N * split.tiles * p.C;
      Workspace workspace(x, chunks * sizeof(Chunk<A>) + 8 * (stats ? 0 : 3 * groups));
      Chunk<A>* partial = workspace.take<Chunk<A>>(chunks);
      if (!stats) saved.data = workspace.take<A>(3 * groups);
      launch(moments_kernel<T, V, LAST>, split.blocks, 1, kThreads, steps * bytes_per_step, p, split, in, partial);
      launch(fold_moments_kernel<A>, groups, 1, kThreads, 0, p, split, eps, partial, saved);
      if (y) apply();
    });
  });
}

void group_norm_bwd(OptionalTensor dx, OptionalTensor dweight, OptionalTensor dbias, OptionalTensor dresidual, Tensor dy, Tensor x, Tensor stats,
                    OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, int64_t N, int64_t C, int64_t num_groups, bool channels_last,
                    bool frozen, int64_t activation, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Launcher launch(x);
  Problem p = problem_of(x, weight, bias, N, C, num_groups, 0, activation, negative_slope);
  const bool folded = fold_samples(p, frozen, stats.numel() / (3 * num_groups), {&weight, &bias});
  with_types(x.scalar_type(), dy.scalar_type(), [&](auto t, auto u) {
    using T = decltype(t);
    using Y = decltype(u);
    using A = Accumulator<T>;
    const bool last = folded || (channels_last && p.S > 1);
    const Saved<A> saved{static_cast<A*>(stats.data_ptr()), stats.numel() / 3, true};
    const Backward<A, T, Y> b = backward<A, T, Y>(p, dx, dresidual, dy, {}, x, residual, saved);
    const int64_t channels = p.N * p.C, groups = p.N * p.G;
    const bool parameters = dweight || dbias, reduced = parameters || (dx && !frozen);
    with_width<Y>(last ? p.C : p.S, {b.dx, b.dresidual, b.dy, b.x, b.residual, p.weight.data, p.bias.data}, last, [&](auto width, auto is_last) {
      constexpr int V = width();
      constexpr bool LAST = is_last();
      if constexpr (!LAST) {
        if (!frozen && reduced && p.D * p.S * static_cast<int64_t>(sizeof(T)) <= kGroupBytes) {
          const int threads = power_of_two(ceil_div(p.D * p.S, V * kVectorsPerThread), 32, kThreads);
          const int lanes = p.S / V >= threads ? threads : power_of_two(p.S / V, 1, 32);
          Workspace workspace(x, 8 * 2 * channels);
          A* sums = workspace.take<A>(2 * channels);
          launch(group_bwd_kernel<T, Y, V>, groups, 1, threads, 0, p, lanes, b, sums);
          if (parameters) parameter_grads(launch, sums, p.N, p.C, dweight, dbias);
          return;
        }
      }
      const Split split = split_of(p, LAST, V, kMaxSteps);
      Workspace workspace(x, reduced ? 8 * (2 * channels * split.tiles + 2 * channels + 2 * groups) : 0);
      const auto take = [&](int64_t count, bool wanted) { return wanted ? workspace.take<A>(count) : nullptr; };
      A *partial = take(2 * channels * split.tiles, reduced), *sums = take(2 * channels, reduced), *c2c3 = take(2 * groups, reduced && !frozen);
      if (reduced || frozen) launch(sums_kernel<T, Y, V, LAST>, split.blocks, 1, kThreads, 0, p, split, b, frozen, partial);
      if (reduced) launch(fold_sums_kernel<A>, groups, 1, kThreads, 0, p, split, partial, b.stats, sums, c2c3);
      if (!frozen && (dx || dresidual)) launch(apply_bwd_kernel<T, Y, V, LAST>, split.blocks, 1, kThreads, 0, p, split, b, c2c3);
      if (parameters) parameter_grads(launch, sums, p.N, p.C, dweight, dbias);
    });
  });
}

}  // namespace
}  // namespace normops

STABLE_TORCH_LIBRARY_FRAGMENT(normops_CUDA, m) {
  m.def(
      "group_norm_fwd(Tensor(a!)? y, Tensor(b!)? stats, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int N, int C, int num_groups, "
      "bool channels_last, bool frozen, float eps, int activation, float negative_slope) -> ()");
  m.def(
      "group_norm_bwd(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dresidual, Tensor dy, Tensor x, Tensor stats, "
      "Tensor? weight, Tensor? bias, Tensor? residual, int N, int C, int num_groups, bool channels_last, bool frozen, int activation, "
      "float negative_slope) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(normops_CUDA, CUDA, m) {
  m.impl("group_norm_fwd", TORCH_BOX(&normops::group_norm_fwd));
  m.impl("group_norm_bwd", TORCH_BOX(&normops::group_norm_bwd));
}

// an importable module, although loading it as a library is all that is needed
PyMODINIT_FUNC PyInit__CUDA() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_CUDA", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
