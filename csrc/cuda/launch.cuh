// What the operators share: the types of their arguments, a workspace, launches. For the host.
#pragma once

#include "elementwise.cuh"  // first: where <bit> stands before torch's bfloat16, that calls functions of the host

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <optional>

namespace normops {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int power_of_two(int64_t at_least, int64_t low, int64_t high) {
  while (low < high && low < at_least) low *= 2;
  return static_cast<int>(low);
}

constexpr int64_t kGranted = 40 << 10;  // of shared memory, beside up to 8 KB of static: more than 48 KB must be asked for

struct Launcher {
  cudaStream_t stream;

  explicit Launcher(const Tensor& x) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int rows, int64_t threads, int64_t shared, Arguments... arguments) const {
    STD_TORCH_CHECK(blocks <= INT_MAX, "normops: x is too large for one grid of blocks");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks), rows);
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    if (shared > kGranted) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    }
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// that a block may ask for, beside what kernels have of static
inline int64_t shared_memory_of(const Tensor& x) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index()));
  return bytes - (8 << 10);
}

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

Values values(const OptionalTensor& tensor) {
  if (!tensor) return {nullptr, ScalarType::Float};
  return {tensor->data_ptr(), tensor->scalar_type()};
}

// rows of C elements in a weight or a bias
int64_t vector_rows(const OptionalTensor& vector, int64_t C) { return vector ? vector->numel() / C : 1; }

Parameter parameter(const OptionalTensor& vector, int64_t N, int64_t C, double offset) {
  return {values(vector), N / vector_rows(vector, C), offset, 0};
}

inline Problem problem_of(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, int64_t N, int64_t C, int64_t num_groups,
                          double offset, int64_t activation, double slope) {
  STD_TORCH_CHECK(C <= INT_MAX, "normops: too many channels");
  const int channels = static_cast<int>(C), groups = static_cast<int>(num_groups);
  const Parameter scale = parameter(weight, N, C, offset), shift = parameter(bias, N, C, 0);
  return {N, x.numel() / (N * C), 1, channels, groups, channels / groups, 1, scale, shift, static_cast<Activation>(activation), slope};
}

// what a backward kernel reads and writes; without an activation no residual is read
template <typename A, typename T, typename Y>
Backward<A, T, Y> backward(const Problem& p, const OptionalTensor& dx, const OptionalTensor& dresidual, const Tensor& dy,
                           const OptionalTensor& dtotal, const Tensor& x, const OptionalTensor& residual, const Saved<A>& stats) {
  const T* added = p.activation == Activation::none ? nullptr : data<const T>(residual);
  const auto upstream = static_cast<const Y*>(dy.data_ptr());
  return {data<T>(dx), data<T>(dresidual), upstream, data<const T>(dtotal), static_cast<const T*>(x.data_ptr()), added, stats};
}

// dweight and dbias from `rows` partial sums of each, (2, rows, C)
template <typename A>
void parameter_grads(const Launcher& launch, const A* sums, int64_t rows, int64_t C, const OptionalTensor& dweight, const OptionalTensor& dbias) {
  const auto gradient = [&](const OptionalTensor& tensor) {
    return Gradient{values(tensor), rows / vector_rows(tensor, C), tensor ? tensor->numel() : 0, C};
  };
  const Gradient bias = gradient(dbias), weight = gradient(dweight);
  launch(parameter_grads_kernel<A>, ceil_div(std::max(bias.size, weight.size), 32), 2, kThreads, 0, sums, rows * C, bias, weight);
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
    default: STD_TORCH_CHECK(false, "normops: unsupported dtype");
  }
}

template <int V>
using Width = std::integral_constant<int, V>;

// body(Width<V>{}, flag): V elements, at most MOST, make up 16 bytes of Y where `run` contiguous elements and all pointers allow it, otherwise V = 1.
// Two doubles at a time need too many registers, and gain little: a warp reads 256 bytes at once as it is.
template <typename Y, int MOST = 8, typename Body>
void with_width(int64_t run, std::initializer_list<const void*> pointers, bool flag, Body body) {
  if constexpr (sizeof(Y) < sizeof(double)) {
    constexpr int kWide = std::min<int>(16 / sizeof(Y), MOST);
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    if (run % kWide == 0 && std::all_of(pointers.begin(), pointers.end(), aligned)) {
      return flag ? body(Width<kWide>{}, std::true_type{}) : body(Width<kWide>{}, std::false_type{});
    }
  }
  return flag ? body(Width<1>{}, std::true_type{}) : body(Width<1>{}, std::false_type{});
}

}  // namespace
}  // namespace normops
