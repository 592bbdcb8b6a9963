// The operators normops_CUDA::group_norm_fwd and group_norm_bwd: which kernels run on which sizes, their workspace, their launches.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <optional>

#include "kernels.cuh"

namespace normops {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Sizes by reasoning, not by measurement. They depend on the shape alone, so that the order of the sums does too.
constexpr int64_t kHeldBytes = 32 << 10;   // x of a block in shared memory: several blocks fit on one SM of every GPU since sm_80
constexpr int64_t kGroupBytes = 32 << 10;  // x of a group up to here: one block for it, at most kHeldBytes
constexpr int64_t kLastBytes = 1 << 20;    // ... channels last only if all of x is below this: one launch with short reads beats three
constexpr int64_t kVectorsPerThread = 2;   // group kernels: fewer threads rather than less than this for each
constexpr int64_t kBlocks = 2048;          // split kernels: longer tiles rather than more blocks; 16 for each SM of an H200
constexpr int64_t kMaxSteps = 64;          // ... but no thread goes over more vectors

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int power_of_two(int64_t at_least, int64_t low, int64_t high) {
  while (low < high && low < at_least) low *= 2;
  return static_cast<int>(low);
}

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

struct Launcher {
  cudaStream_t stream;

  explicit Launcher(const Tensor& x) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int rows, int64_t threads, int64_t shared, Arguments... arguments) const {
    STD_TORCH_CHECK(blocks <= INT_MAX, "group_norm: x is too large for one grid of blocks");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks), rows);
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

struct Workspace {  // torch's allocator keeps it from reuse on other streams
  Tensor tensor;
  char* next;

  Workspace(const Tensor& x, int64_t bytes) : tensor(allocate(x, ceil_div(bytes, 8))), next(static_cast<char*>(tensor.data_ptr())) {}

  template <typename A>
  A* take(int64_t count) {
    A* taken = reinterpret_cast<A*>(next);
    next += ceil_div(count * sizeof(A), 8) * 8;
    return taken;
  }

 private:
  static Tensor allocate(const Tensor& x, int64_t size) {
    int32_t device = 0;
    const int64_t stride = 1;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_float64(), device, x.get_device_index(), &handle));
    return Tensor(handle);
  }
};

template <typename T>
T* data(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

Parameter parameter(const OptionalTensor& tensor, int64_t C) {
  if (!tensor) return {nullptr, ScalarType::Float, 0};
  return {tensor->data_ptr(), tensor->scalar_type(), tensor->dim() == 2 ? C : 0};
}

Gradient gradient_of(const OptionalTensor& tensor, int64_t N, int64_t C) {
  if (!tensor) return {nullptr, ScalarType::Float, 0, 0};
  const bool per_sample = tensor->dim() == 2;
  return {tensor->data_ptr(), tensor->scalar_type(), per_sample ? 1 : N, per_sample ? N * C : C};
}

Problem problem_of(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, int64_t num_groups, int64_t activation, double slope) {
  const int64_t N = x.size(0), C = x.size(1);
  STD_TORCH_CHECK(C <= INT_MAX, "group_norm: too many channels");
  const int channels = static_cast<int>(C), groups = static_cast<int>(num_groups);
  const int64_t S = x.numel() / (N * C);
  return {N, S, channels, groups, channels / groups, parameter(weight, C), parameter(bias, C), static_cast<Activation>(activation), slope};
}

// body(T{}, Y{}) with the dtypes of x and y
template <typename Body>
void with_types(ScalarType x, ScalarType y, Body body) {
  const bool wide = y == ScalarType::Float;
  switch (x) {
    case ScalarType::Half: return wide ? body(Half{}, float{}) : body(Half{}, Half{});
    case ScalarType::BFloat16: return wide ? body(BFloat16{}, float{}) : body(BFloat16{}, BFloat16{});
    case ScalarType::Float: return body(float{}, float{});
    case ScalarType::Double: return body(double{}, double{});
    default: STD_TORCH_CHECK(false, "group_norm: unsupported dtype");
  }
}

template <int V>
using Width = std::integral_constant<int, V>;

// body(Width<V>{}, last): V elements make up 16 bytes of Y where `run` contiguous elements and all pointers allow it, otherwise V = 1.
// Two doubles at a time need too many registers, and gain little: a warp reads 256 bytes at once as it is.
template <typename Y, typename Body>
void with_width(int64_t run, std::initializer_list<const void*> pointers, bool last, Body body) {
  if constexpr (sizeof(Y) < sizeof(double)) {
    constexpr int kWide = 16 / sizeof(Y);
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (run % kWide == 0 && std::all_of(pointers.begin(), pointers.end(), aligned)) {
      return last ? body(Width<kWide>{}, std::true_type{}) : body(Width<kWide>{}, std::false_type{});
    }
  }
  return last ? body(Width<1>{}, std::true_type{}) : body(Width<1>{}, std::false_type{});
}

void group_norm_fwd(Tensor y, OptionalTensor stats, Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, int64_t num_groups,
                    bool channels_last, double eps, int64_t activation, double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Launcher launch(x);
  const Problem p = problem_of(x, weight, bias, num_groups, activation, negative_slope);
  with_types(x.scalar_type(), y.scalar_type(), [&](auto t, auto u) {
    using T = decltype(t);
    using Y = decltype(u);
    using A = Accumulator<T>;
    const T *in = static_cast<const T*>(x.data_ptr()), *added = data<const T>(residual);
    Y* out = static_cast<Y*>(y.data_ptr());
    A* saved = data<A>(stats);
    const int64_t n = p.D * p.S, bytes = n * sizeof(T);
    const bool last = channels_last && p.S > 1, by_group = bytes <= kGroupBytes && (!last || p.N * p.G * bytes <= kLastBytes);
    with_width<Y>(!last ? p.S : by_group ? p.D : p.C, {in, added, out}, last, [&](auto width, auto is_last) {
      constexpr int V = width();
      constexpr bool LAST = is_last();
      if (by_group) {
        const int threads = power_of_two(ceil_div(n, V * kVectorsPerThread), 32, kThreads);
        return launch(group_fwd_kernel<T, Y, V, LAST>, p.N * p.G, 1, threads, bytes, p, eps, in, added, out, saved);
      }
      const int64_t bytes_per_step = kThreads * V * sizeof(T);
      const Split split = split_of(p, LAST, V, std::min(kMaxSteps, kHeldBytes / bytes_per_step));
      const int64_t steps = ceil_div(split.positions, LAST ? kThreads / split.lanes : split.lanes * V), chunks = p.N * split.tiles * p.C;
      Workspace workspace(x, chunks * sizeof(Chunk<A>) + 8 * (saved ? 0 : 3 * p.N * p.G));
      Chunk<A>* partial = workspace.take<Chunk<A>>(chunks);
      A* folded = saved ? saved : workspace.take<A>(3 * p.N * p.G);
      launch(moments_kernel<T, V, LAST>, split.blocks, 1, kThreads, steps * bytes_per_step, p, split, in, partial);
      launch(fold_moments_kernel<A>, p.N * p.G, 1, kThreads, 0, p, split, eps, partial, folded);
      launch(apply_fwd_kernel<T, Y, V, LAST>, split.blocks, 1, kThreads, 0, p, split, in, added, folded, out);
    });
  });
}

void group_norm_bwd(OptionalTensor dx, OptionalTensor dweight, OptionalTensor dbias, OptionalTensor dresidual, Tensor dy, Tensor x, Tensor stats,
                    OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, int64_t num_groups, bool channels_last, int64_t activation,
                    double negative_slope) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Launcher launch(x);
  const Problem p = problem_of(x, weight, bias, num_groups, activation, negative_slope);
  with_types(x.scalar_type(), dy.scalar_type(), [&](auto t, auto u) {
    using T = decltype(t);
    using Y = decltype(u);
    using A = Accumulator<T>;
    const bool last = channels_last && p.S > 1;
    Backward<A, T, Y> b;
    b.dx = data<T>(dx);
    b.dresidual = data<T>(dresidual);
    b.dy = static_cast<const Y*>(dy.data_ptr());
    b.x = static_cast<const T*>(x.data_ptr());
    b.residual = p.activation == Activation::none ? nullptr : data<const T>(residual);
    b.stats = static_cast<const A*>(stats.data_ptr());
    const int64_t channels = p.N * p.C, groups = p.N * p.G;
    const bool reduced = dx || dweight || dbias;
    const auto parameter_grads = [&](const A* sums) {
      const Gradient bias_grad = gradient_of(dbias, p.N, p.C), weight_grad = gradient_of(dweight, p.N, p.C);
      const int64_t columns = std::max(bias_grad.columns, weight_grad.columns);
      if (columns) launch(parameter_grads_kernel<A>, ceil_div(columns, 32), 2, kThreads, 0, sums, channels, bias_grad, weight_grad);
    };
    with_width<Y>(last ? p.C : p.S, {b.dx, b.dresidual, b.dy, b.x, b.residual}, last, [&](auto width, auto is_last) {
      constexpr int V = width();
      constexpr bool LAST = is_last();
      if constexpr (!LAST) {
        if (reduced && p.D * p.S * static_cast<int64_t>(sizeof(T)) <= kGroupBytes) {
          const int threads = power_of_two(ceil_div(p.D * p.S, V * kVectorsPerThread), 32, kThreads);
          const int lanes = p.S / V >= threads ? threads : power_of_two(p.S / V, 1, 32);
          Workspace workspace(x, 8 * 2 * channels);
          A* sums = workspace.take<A>(2 * channels);
          launch(group_bwd_kernel<T, Y, V>, groups, 1, threads, 0, p, lanes, b, sums);
          return parameter_grads(sums);
        }
      }
      const Split split = split_of(p, LAST, V, kMaxSteps);
      Workspace workspace(x, reduced ? 8 * (2 * channels * split.tiles + 2 * channels + 2 * groups) : 0);
      A *partial = workspace.take<A>(2 * channels * split.tiles), *sums = workspace.take<A>(2 * channels), *c2c3 = workspace.take<A>(2 * groups);
      if (reduced) {
        launch(sums_kernel<T, Y, V, LAST>, split.blocks, 1, kThreads, 0, p, split, b, partial);
        launch(fold_sums_kernel<A>, groups, 1, kThreads, 0, p, split, partial, b.stats, sums, c2c3);
      }
      if (dx || dresidual) launch(apply_bwd_kernel<T, Y, V, LAST>, split.blocks, 1, kThreads, 0, p, split, b, c2c3);
      if (reduced) parameter_grads(sums);
    });
  });
}

}  // namespace
}  // namespace normops

STABLE_TORCH_LIBRARY(normops_CUDA, m) {
  m.def(
      "group_norm_fwd(Tensor(a!) y, Tensor(b!)? stats, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, "
      "bool channels_last, float eps, int activation, float negative_slope) -> ()");
  m.def(
      "group_norm_bwd(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dresidual, Tensor dy, Tensor x, Tensor stats, "
      "Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, bool channels_last, int activation, float negative_slope) -> ()");
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
