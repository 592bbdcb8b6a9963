// The operators normops_C::group_norm_fwd and group_norm_bwd: what normops/backends.py calls on CPU tensors. Arguments are checked there.
#include "group_norm.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace normops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename F>
void with_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, "group_norm: unsupported dtype");
  }
}

template <typename T>
T* data(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// A parameter as vectors of A; where there is none, `value` for every channel
template <typename A>
const A* widened(const OptionalTensor& parameter, int64_t size, A value, Buffer<A>& storage) {
  if (parameter) {
    const A* same = nullptr;
    with_type(parameter->scalar_type(), [&](auto zero) {
      using P = decltype(zero);
      const P* p = static_cast<const P*>(parameter->data_ptr());
      if constexpr (std::is_same_v<P, A>) {
        same = p;
      } else {
        storage = buffer<A>(size);
        for (int64_t i = 0; i < size; i++) storage[i] = static_cast<A>(load<1>(p + i));
      }
    });
    if (same) return same;
  } else {
    storage = buffer<A>(size);
    std::fill_n(storage.get(), size, value);
  }
  return storage.get();
}

Shape shape_of(const Tensor& x, int64_t num_groups, bool channels_last) {
  const int64_t N = x.size(0), C = x.size(1), S = x.numel() / (N * C);
  return {N, C, S, num_groups, channels_last && S > 1};
}

template <typename A>
struct Parameters {  // weight and bias, both per sample as soon as one of them is
  Buffer<A> weight_storage, bias_storage;
  Affine<A> affine;

  Parameters(const OptionalTensor& weight, const OptionalTensor& bias, const Shape& s) {
    const bool weight_per_sample = weight && weight->dim() == 2, bias_per_sample = bias && bias->dim() == 2;
    affine.stride = weight_per_sample || bias_per_sample ? s.C : 0;
    affine.weight = expanded(weight, weight_per_sample, A(1), s, weight_storage);
    affine.bias = expanded(bias, bias_per_sample, A(0), s, bias_storage);
  }

 private:
  const A* expanded(const OptionalTensor& parameter, bool per_sample, A value, const Shape& s, Buffer<A>& storage) const {
    const int64_t rows = affine.stride ? s.N : 1;
    if (!parameter || per_sample || rows == 1) return widened(parameter, rows * s.C, value, storage);
    Buffer<A> once;
    const A* vector = widened(parameter, s.C, value, once);
    storage = buffer<A>(rows * s.C);
    for (int64_t n = 0; n < rows; n++) std::copy_n(vector, s.C, &storage[n * s.C]);
    return storage.get();
  }
};

void group_norm_fwd(Tensor y, OptionalTensor stats, Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual,
                    int64_t num_groups, bool channels_last, double eps, int64_t activation, double negative_slope) {
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Shape s = shape_of(x, num_groups, channels_last);
    const Parameters<A> parameters(weight, bias, s);
    const Options<A> options{static_cast<Activation>(activation), static_cast<A>(negative_slope)};
    GroupNorm<T>(s, static_cast<const T*>(x.data_ptr()), data<const T>(residual), parameters.affine, options)
        .forward(static_cast<T*>(y.data_ptr()), data<A>(stats), eps);
  });
}

// the gradient of a parameter from the sums per sample and channel
template <typename A>
void parameter_gradient(const OptionalTensor& out, const A* sums, const Shape& s) {
  if (!out) return;
  with_type(out->scalar_type(), [&](auto zero) {
    using P = decltype(zero);
    P* p = static_cast<P*>(out->data_ptr());
    const bool per_sample = out->dim() == 2;
    parallel(per_sample ? s.N : ceil_div(s.C, 64), per_sample ? s.C : 64 * s.N, [&](int64_t task) {
      if (per_sample) {
        for (int64_t i = task * s.C; i < (task + 1) * s.C; i++) store(p + i, static_cast<Acc<P>>(sums[i]));
        return;
      }
      const int64_t first = task * 64, count = std::min<int64_t>(64, s.C - first);
      double totals[64] = {};
      for (int64_t n = 0; n < s.N; n++)
        for (int64_t c = 0; c < count; c++) totals[c] += sums[n * s.C + first + c];
      for (int64_t c = 0; c < count; c++) store(p + first + c, static_cast<Acc<P>>(totals[c]));
    });
  });
}

void group_norm_bwd(OptionalTensor dx, OptionalTensor dweight, OptionalTensor dbias, OptionalTensor dresidual, Tensor dy, Tensor x, Tensor stats,
                    OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, int64_t num_groups, bool channels_last, int64_t activation,
                    double negative_slope) {
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Shape s = shape_of(x, num_groups, channels_last);
    const Parameters<A> parameters(weight, bias, s);
    const Options<A> options{static_cast<Activation>(activation), static_cast<A>(negative_slope)};
    auto sums = buffer<A>(2 * s.N * s.C);
    GroupNorm<T>(s, static_cast<const T*>(x.data_ptr()), data<const T>(residual), parameters.affine, options)
        .backward(data<T>(dx), data<T>(dresidual), sums.get(), static_cast<const T*>(dy.data_ptr()), static_cast<A*>(stats.data_ptr()));
    parameter_gradient(dweight, sums.get(), s);
    parameter_gradient(dbias, sums.get() + s.N * s.C, s);
  });
}

}  // namespace normops

STABLE_TORCH_LIBRARY(normops_C, m) {
  m.def(
      "group_norm_fwd(Tensor(a!) y, Tensor(b!)? stats, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, "
      "bool channels_last, float eps, int activation, float negative_slope) -> ()");
  m.def(
      "group_norm_bwd(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dresidual, Tensor dy, Tensor x, Tensor stats, "
      "Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, bool channels_last, int activation, float negative_slope) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(normops_C, CPU, m) {
  m.impl("group_norm_fwd", TORCH_BOX(&normops::group_norm_fwd));
  m.impl("group_norm_bwd", TORCH_BOX(&normops::group_norm_bwd));
}

// an importable module, although loading it as a library is all that is needed
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
