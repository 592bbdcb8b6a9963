// The operators group_norm_fwd and _bwd, batch_norm_fwd and _bwd of normops_CUDA: which kernels run on which sizes, their workspace, their launches.
#include <Python.h>

#include "groups.cuh"
#include "launch.cuh"
#include "split.cuh"

#include <numeric>

namespace normops {
namespace {

// Sizes by reasoning, not by measurement. What the order of the sums depends on depends on the shape alone; only waves depend on the GPU.
constexpr int64_t kHeldBytes = 32 << 10;   // x of a block of moments in shared memory: several blocks fit on one SM of every GPU since sm_80
constexpr int64_t kGroupBytes = 64 << 10;  // what a block holds of a statistic: x, backward dt and x_hat; beside that a table of kTableBytes
constexpr int64_t kTableBytes = 8 << 10;   // ... weight and bias of its channels: so that a block fits on every GPU since sm_80, three on an H200
constexpr int64_t kLastBytes = 1 << 20;    // ... channels last only if all of x is below this: one launch with short reads beats three
constexpr int64_t kOddBytes = 4 << 20;     // ... or this, where a plane of batch norm is no multiple of 16 bytes: one element at a time
constexpr int64_t kVectorsPerThread = 2;   // group kernels: fewer threads rather than less than this for each
constexpr int64_t kSmallBlocks = 512;      // ... and several small groups in a block only beyond as many blocks; 4 for each SM of an H200
constexpr int64_t kBlocks = 2048;          // split kernels: longer tiles rather than more blocks; 16 for each SM of an H200
constexpr int64_t kMaxSteps = 64;          // ... but no thread goes over more vectors
constexpr int64_t kSmallPlane = 256;       // batch norm: positions below which neighbours are taken across channels; a warp has no 32 vectors in one
constexpr int64_t kWaveBytes = 24 << 20;   // waves of at least as much: less is read twice from the memory of an H200 in the time of two launches

// `width` elements at a time, at most `max_steps` of them for each thread
Split split_of(const Problem& p, bool last, int width, int64_t max_steps) {
  const int64_t across = (last ? p.C : p.S) / width, vectors = p.N * p.C * p.S / width;
  Split split{};
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
  STD_TORCH_CHECK(p.together * p.D * split.tiles <= INT_MAX, "normops: too many elements share a statistic");
  return split;
}

// what of L2 is there for a second reading: from two thirds on it begins to miss
int64_t cache_budget(const Tensor& x) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, x.get_device_index()));
  return static_cast<int64_t>(bytes) * 65 / 100;
}

// body(part) for parts of the split that share no statistics and fit the budget; `size` bytes of an element are read, and if `twice` then again. Only
// for all at once where everything fits, or where what shares statistics does not, or is too little.
template <typename Body>
void in_waves(const Problem& p, Split split, bool last, int width, int64_t size, int64_t budget, bool twice, Body body) {
  const int64_t rows = p.N / p.together, channel = p.together * p.S * size, step = last ? std::lcm<int64_t>(split.lanes * width, p.D) : p.D;
  const auto share = [](int64_t count, int64_t most) { return ceil_div(count, ceil_div(count, most)); };  // parts of about the same size
  int64_t samples = rows, channels = p.C;
  split.kept = rows * p.C * channel <= budget;
  if (twice && !split.kept) {
    if (p.C * channel <= budget) {
      samples = share(rows, budget / (p.C * channel));
    } else if (step * channel <= budget) {
      samples = 1;
      channels = step * share(ceil_div(p.C, step), budget / (step * channel));
    }
    if (samples * channels * channel < kWaveBytes) {
      samples = rows;
      channels = p.C;
    }
  }
  for (int64_t n = 0; n < rows; n += samples) {
    for (int64_t c = 0; c < p.C; c += channels) {
      split.n = n * p.together;
      split.samples = std::min(samples, rows - n) * p.together;
      split.c = static_cast<int>(c);
      split.channels = static_cast<int>(std::min(channels, p.C - c));
      split.channel_blocks = static_cast<int>(last ? ceil_div(split.channels, split.lanes * width) : 1);
      const int64_t units = split.samples * split.tiles;
      split.blocks = last ? units * split.channel_blocks : ceil_div(units * split.channels, kThreads / split.lanes);
      split.statistics = split.samples / p.together * split.channels / p.D;
      body(split);
    }
  }
}

Split first_reading(Split split) {  // which leaves what it reads to the second
  split.kept = true;
  return split;
}

Split second_reading(Split split) {
  split.again = true;
  return split;
}

struct View {  // of x, for the kernels
  Problem p;
  bool last, by_group;  // channels last; a block for each statistic
};

// whether a statistic is left to one block, which holds `size` bytes of an element
bool fits_block(const Problem& p, bool last, int64_t size) {
  const int64_t plane = p.S * size, most = last ? kLastBytes : p.together > 1 && plane % 16 != 0 ? kOddBytes : INT64_MAX;
  return p.together * p.D * plane <= kGroupBytes && p.D * sizeof(Affine<float>) <= kTableBytes && p.N * p.C * plane <= most;
}

// what group_bwd holds of an element: dt and x_hat, in float or double
int64_t held_backward(int64_t size) { return 2 * std::max<int64_t>(size, sizeof(float)); }

bool shared(const Problem& p) { return p.weight.samples == p.N && p.bias.samples == p.N; }

View view_of_groups(Problem p, bool channels_last, bool backward, bool frozen, int64_t stats_rows, int64_t size) {
  if (frozen && p.S == 1 && stats_rows == 1 && shared(p)) {  // positions have all in common but x: samples are positions, of channels last
    std::swap(p.N, p.S);
    return {p, true, false};
  }
  const bool last = channels_last && p.S > 1;
  return {p, last, !frozen && !(backward && last) && fits_block(p, last, backward ? held_backward(size) : size)};
}

// Batch norm as a group norm of one sample where vectors are shared: with channels last always; otherwise (groups.cuh) in forward for a block
// for each channel, and where a channel has few positions.
View view_of_batch(Problem p, bool channels_last, bool backward, int64_t size) {
  if (channels_last && shared(p)) {
    p.S *= p.N;
    p.N = 1;
    return {p, true, !backward && fits_block(p, true, size)};
  }
  const bool last = channels_last && p.S > 1;
  p.together = p.N;
  const bool by_group = !last && (p.N == 1 || !backward) && fits_block(p, false, backward ? held_backward(size) : size);
  if (last || p.N == 1 || !shared(p) || p.C * p.S > INT_MAX / 2 || (!by_group && p.S >= kSmallPlane)) return {p, last, by_group && p.N == 1};
  p.per_weight = p.D = static_cast<int>(p.S);
  p.C *= p.D;
  p.S = p.N;
  p.N = p.together = 1;
  return {p, true, by_group};
}

// body(Width<V>{}, run) for a block that holds contiguous groups, or those of few channels of each position
template <typename Y, typename Body>
void with_run(const View& view, std::initializer_list<const void*> pointers, Body body) {
  const Problem& p = view.p;
  if (view.last) return with_width<Y>(p.D, pointers, true, [&](auto width, auto) { body(width, std::integral_constant<Run, Run::last>{}); });
  with_width<Y>(p.D * p.S, pointers, p.S * sizeof(Y) % 16 == 0, [&](auto width, auto whole) {
    body(width, std::integral_constant<Run, whole() || width() == 1 ? Run::plane : Run::group>{});
  });
}

void run_fwd(const View& view, bool frozen, double eps, const Running& running, const OptionalTensor& y, const OptionalTensor& stats, const Tensor& x,
             const OptionalTensor& residual) {
  const Problem& p = view.p;
  const Launcher launch(x);
  with_types(x.scalar_type(), (y ? *y : x).scalar_type(), [&](auto t, auto u) {
    using T = decltype(t);
    using Y = decltype(u);
    using A = Accumulator<T>;
    const T *in = static_cast<const T*>(x.data_ptr()), *added = data<const T>(residual);
    Y* out = data<Y>(y);
    const int64_t statistics = p.N / p.together * p.G, n = p.together * p.D * p.S;
    Saved<A> saved{data<A>(stats), frozen ? stats->numel() / 3 : statistics, true};
    if (view.by_group) {
      return with_run<Y>(view, {in, added, out}, [&](auto width, auto run) {
        constexpr int V = width();
        const int lanes = power_of_two(ceil_div(n, V * kVectorsPerThread), 1, kThreads);
        const int threads = lanes > 32 ? lanes : power_of_two(lanes * ceil_div(statistics, kSmallBlocks), 32, kThreads), teams = threads / lanes;
        const int64_t shared = ceil_div(n / V, lanes) * threads * V * sizeof(T) + teams * p.D * sizeof(Affine<A>);
        launch(group_fwd_kernel<T, Y, V, run()>, ceil_div(statistics, teams), 1, threads, shared, p, statistics, lanes, eps, in, added, out, saved,
               running);
      });
    }
    with_width<Y>(view.last ? p.C : p.S, {in, added, out, p.weight.data, p.bias.data}, view.last, [&](auto width, auto is_last) {
      constexpr int V = width();
      constexpr bool LAST = is_last();
      const int64_t bytes_per_step = kThreads * V * sizeof(T);
      const Split split = split_of(p, LAST, V, std::min(kMaxSteps, kHeldBytes / bytes_per_step));
      const auto apply = [&](const Split& part) {
        launch(apply_fwd_kernel<T, Y, V, LAST>, part.blocks, 1, kThreads, kAhead * bytes_per_step * (added ? 2 : 1), p, part, in, added, saved, out);
      };
      const int64_t budget = cache_budget(x);
      if (frozen) return in_waves(p, split, LAST, V, sizeof(T), budget, false, apply);
      const int64_t steps = ceil_div(split.positions, LAST ? kThreads / split.lanes : split.lanes * V), chunks = p.N * split.tiles * p.C;
      Workspace workspace(x, chunks * sizeof(Chunk<A>) + 8 * (stats ? 0 : 3 * statistics));
      Chunk<A>* partial = workspace.take<Chunk<A>>(chunks);
      if (!stats) saved.data = workspace.take<A>(3 * statistics);
      in_waves(p, split, LAST, V, sizeof(T), budget, y.has_value(), [&](const Split& part) {
        launch(moments_kernel<T, V, LAST>, part.blocks, 1, kThreads, steps * bytes_per_step, p, part, in, partial);
        launch(fold_moments_kernel<A>, part.statistics, 1, kThreads, 0, p, part, eps, partial, saved, running);
        if (y) apply(second_reading(part));
      });
    });
  });
}

void run_bwd(const View& view, bool frozen, const OptionalTensor& means, const OptionalTensor& dx, const OptionalTensor& dweight,
             const OptionalTensor& dbias, const OptionalTensor& dresidual, const Tensor& dy, const Tensor& x, const Tensor& stats,
             const OptionalTensor& residual) {
  const Problem& p = view.p;
  const Launcher launch(x);
  with_types(x.scalar_type(), dy.scalar_type(), [&](auto t, auto u) {
    using T = decltype(t);
    using Y = decltype(u);
    using A = Accumulator<T>;
    const int64_t channels = p.N * p.C, statistics = p.N / p.together * p.G;
    const Saved<A> saved{static_cast<A*>(stats.data_ptr()), frozen ? stats.numel() / 3 : statistics, true};
    const Backward<A, T, Y> b = backward<A, T, Y>(p, dx, dresidual, dy, {}, x, residual, saved);
    const bool parameters = dweight || dbias, reduced = parameters || (dx && !frozen), at_once = frozen && !means;
    if (view.by_group && reduced) {
      return with_run<Y>(view, {b.dx, b.dresidual, b.dy, b.x, b.residual}, [&](auto width, auto run) {
        constexpr int V = width();
        const int64_t elements = p.D * p.S;
        const int threads = power_of_two(ceil_div(elements, V * kVectorsPerThread), 32, kThreads);
        const int lanes = p.S / kVectorsPerThread >= threads ? threads : power_of_two(p.S / kVectorsPerThread, 1, 32);
        Workspace workspace(x, 8 * 2 * channels);
        A* sums = workspace.take<A>(2 * channels);
        const int64_t shared = elements * 2 * sizeof(A) + p.D * sizeof(Affine<A>);
        if constexpr (run() != Run::last) launch(group_bwd_kernel<T, Y, V, run()>, statistics, 1, threads, shared, p, lanes, b, sums);
        if (parameters) parameter_grads(launch, sums, p.N, p.C, dweight, dbias);
      });
    }
    const std::initializer_list<const void*> pointers = {b.dx, b.dresidual, b.dy, b.x, b.residual, p.weight.data, p.bias.data};
    with_width<Y>(view.last ? p.C : p.S, pointers, view.last, [&](auto width, auto is_last) {
      constexpr int V = width();
      constexpr bool LAST = is_last();
      const Split split = split_of(p, LAST, V, kMaxSteps);
      const int64_t rows = p.N * split.tiles, held = kAheadBackward * kThreads * V * (sizeof(Y) + sizeof(T) * (b.residual ? 2 : 1));
      Workspace workspace(x, reduced ? 8 * (2 * rows * p.C + 2 * channels + 2 * statistics) : 0);
      const auto take = [&](int64_t count, bool wanted) { return wanted ? workspace.take<A>(count) : nullptr; };
      A *partial = take(2 * rows * p.C, reduced), *own = take(2 * statistics, reduced && !frozen), *sums = take(2 * channels, reduced);
      const bool by_channel = p.together == p.N && p.D == p.per_weight;
      const bool each = p.N > p.weight.samples || p.N > p.bias.samples;  // sample has its own vectors
      const auto fold = each ? fold_channels_kernel<A, true> : fold_channels_kernel<A, false>;
      const A* all = means ? data<const A>(means) : own;
      const bool again = !at_once && (dx || dresidual);
      in_waves(p, split, LAST, V, sizeof(T) + sizeof(Y), cache_budget(x), reduced && again, [&](const Split& part) {
        if (reduced || at_once) {
          launch(sums_kernel<T, Y, V, LAST>, part.blocks, 1, kThreads, held, p, again ? first_reading(part) : part, b, at_once,
                 partial);
        }
        if (reduced && by_channel) {
          launch(fold, part.statistics, 1, kThreads, 0, p, part, partial, values(dbias), values(dweight), own);
        } else if (reduced) {
          launch(fold_sums_kernel<A>, part.statistics, 1, kThreads, 0, p, part, partial, sums, own);
        }
        if (again) launch(apply_bwd_kernel<T, Y, V, LAST>, part.blocks, 1, kThreads, held, p, second_reading(part), b, all);
      });
      if (!parameters) return;
      if (!by_channel) return parameter_grads(launch, sums, p.N, p.C, dweight, dbias);
      if (each) parameter_grads(launch, partial, rows, p.C, dweight, dbias);
    });
  });
}

void group_norm_fwd(OptionalTensor y, OptionalTensor stats, Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, int64_t N,
                    int64_t C, int64_t num_groups, bool channels_last, bool frozen, double eps, int64_t activation, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Problem p = problem_of(x, weight, bias, N, C, num_groups, 0, activation, negative_slope);
  const View view = view_of_groups(p, channels_last, false, frozen, stats ? stats->numel() / (3 * num_groups) : 1, x.element_size());
  run_fwd(view, frozen, eps, {}, y, stats, x, residual);
}

void group_norm_bwd(OptionalTensor dx, OptionalTensor dweight, OptionalTensor dbias, OptionalTensor dresidual, Tensor dy, Tensor x, Tensor stats,
                    OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, OptionalTensor means, int64_t N, int64_t C,
                    int64_t num_groups, bool channels_last, bool frozen, int64_t activation, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Problem p = problem_of(x, weight, bias, N, C, num_groups, 0, activation, negative_slope);
  const View view = view_of_groups(p, channels_last, true, frozen, stats.numel() / (3 * num_groups), x.element_size());
  run_bwd(view, frozen, means, dx, dweight, dbias, dresidual, dy, x, stats, residual);
}

void batch_norm_fwd(OptionalTensor y, Tensor stats, OptionalTensor running_mean, OptionalTensor running_var, Tensor x, OptionalTensor weight,
                    OptionalTensor bias, OptionalTensor residual, int64_t N, int64_t C, bool channels_last, double momentum, double eps,
                    int64_t activation, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Problem p = problem_of(x, weight, bias, N, C, C, 0, activation, negative_slope);
  const View view = view_of_batch(p, channels_last, false, x.element_size());
  const Values unbiased{static_cast<char*>(stats.data_ptr()) + 3 * C * stats.element_size(), stats.scalar_type()};
  run_fwd(view, false, eps, {unbiased, values(running_mean), values(running_var), momentum}, y, stats, x, residual);
}

void batch_norm_bwd(OptionalTensor dx, OptionalTensor dweight, OptionalTensor dbias, OptionalTensor dresidual, Tensor dy, Tensor x, Tensor stats,
                    OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, int64_t N, int64_t C, bool channels_last,
                    int64_t activation, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Problem p = problem_of(x, weight, bias, N, C, C, 0, activation, negative_slope);
  const View view = view_of_batch(p, channels_last, true, x.element_size());
  run_bwd(view, false, {}, dx, dweight, dbias, dresidual, dy, x, stats, residual);
}

}  // namespace
}  // namespace normops

STABLE_TORCH_LIBRARY_FRAGMENT(normops_CUDA, m) {
  m.def(
      "group_norm_fwd(Tensor(a!)? y, Tensor(b!)? stats, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int N, int C, int num_groups, "
      "bool channels_last, bool frozen, float eps, int activation, float negative_slope) -> ()");
  m.def(
      "group_norm_bwd(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dresidual, Tensor dy, Tensor x, Tensor stats, "
      "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? means, int N, int C, int num_groups, bool channels_last, bool frozen, "
      "int activation, float negative_slope) -> ()");
  m.def(
      "batch_norm_fwd(Tensor(a!)? y, Tensor(b!) stats, Tensor(c!)? running_mean, Tensor(d!)? running_var, Tensor x, Tensor? weight, Tensor? bias, "
      "Tensor? residual, int N, int C, bool channels_last, float momentum, float eps, int activation, float negative_slope) -> ()");
  m.def(
      "batch_norm_bwd(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dresidual, Tensor dy, Tensor x, Tensor stats, "
      "Tensor? weight, Tensor? bias, Tensor? residual, int N, int C, bool channels_last, int activation, float negative_slope) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(normops_CUDA, CUDA, m) {
  m.impl("group_norm_fwd", TORCH_BOX(&normops::group_norm_fwd));
  m.impl("group_norm_bwd", TORCH_BOX(&normops::group_norm_bwd));
  m.impl("batch_norm_fwd", TORCH_BOX(&normops::batch_norm_fwd));
  m.impl("batch_norm_bwd", TORCH_BOX(&normops::batch_norm_bwd));
}

// an importable module, although loading it as a library is all that is needed
PyMODINIT_FUNC PyInit__CUDA() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_CUDA", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
