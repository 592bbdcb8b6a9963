// The module normops._C: group_norm_fwd and group_norm_bwd on memory that normops/backends.py points to. Arguments are checked there; a plain C
// call with addresses costs a microsecond or two less than an operator behind the dispatcher.
#include "group_norm.h"

#include <Python.h>

#include <exception>

namespace normops {

struct Parameter {  // weight or bias, or the place of its gradient
  void* data;
  int64_t dtype;  // the order of DTYPES in normops/backends.py
  bool per_sample;
};

template <typename F>
void with_type(int64_t dtype, F&& f) {
  switch (dtype) {
    case 0: return f(float{});
    case 1: return f(Half{});
    case 2: return f(BFloat16{});
    default: return f(double{});
  }
}

// A parameter as a vector of A; where there is none, `value` for every channel
template <typename A>
const A* widened(const Parameter& parameter, int64_t size, A value, Buffer<A>& storage) {
  if (!parameter.data) {
    storage = buffer<A>(size);
    std::fill_n(storage.get(), size, value);
    return storage.get();
  }
  const A* vector = nullptr;
  with_type(parameter.dtype, [&](auto zero) {
    using P = decltype(zero);
    const P* p = static_cast<const P*>(parameter.data);
    if constexpr (std::is_same_v<P, A>) {
      vector = p;
    } else {
      storage = buffer<A>(size);
      for (int64_t i = 0; i < size; i++) storage[i] = static_cast<A>(load<1>(p + i));
      vector = storage.get();
    }
  });
  return vector;
}

template <typename A>
struct Parameters {  // weight and bias, both per sample as soon as one of them is
  Buffer<A> weight_storage, bias_storage;
  Affine<A> affine;

  Parameters(const Parameter& weight, const Parameter& bias, const Shape& s) {
    affine.stride = weight.per_sample || bias.per_sample ? s.C : 0;
    affine.weight = expanded(weight, A(1), s, weight_storage);
    affine.bias = expanded(bias, A(0), s, bias_storage);
  }

 private:
  const A* expanded(const Parameter& parameter, A value, const Shape& s, Buffer<A>& storage) const {
    const int64_t rows = affine.stride ? s.N : 1;
    if (!parameter.data || parameter.per_sample || rows == 1) return widened(parameter, rows * s.C, value, storage);
    Buffer<A> once;
    const A* vector = widened(parameter, s.C, value, once);
    storage = buffer<A>(rows * s.C);
    for (int64_t n = 0; n < rows; n++) std::copy_n(vector, s.C, &storage[n * s.C]);
    return storage.get();
  }
};

struct Call {  // what forward and backward have in common
  void *x, *residual, *stats;
  int64_t dtype;
  Parameter weight, bias;
  Shape shape;
  int64_t activation;
  double negative_slope;
};

// f(GroupNorm<T>) for the dtype of x
template <typename F>
void with_norm(const Call& c, F&& f) {
  with_type(c.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const Parameters<A> parameters(c.weight, c.bias, c.shape);
    const Options<A> options{static_cast<Activation>(c.activation), static_cast<A>(c.negative_slope)};
    f(GroupNorm<T>(c.shape, static_cast<const T*>(c.x), static_cast<const T*>(c.residual), parameters.affine, options), zero);
  });
}

// the gradient of a parameter from the sums per sample and channel
template <typename A>
void parameter_gradient(const Parameter& out, const A* sums, const Shape& s) {
  if (!out.data) return;
  with_type(out.dtype, [&](auto zero) {
    using P = decltype(zero);
    P* p = static_cast<P*>(out.data);
    parallel(out.per_sample ? s.N : ceil_div(s.C, 64), out.per_sample ? s.C : 64 * s.N, [&](int64_t task) {
      if (out.per_sample) {
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

struct Arguments {  // positional, in the order of the calls in normops/backends.py
  PyObject* const* next;

  void* pointer() { return PyLong_AsVoidPtr(*next++); }
  int64_t integer() { return PyLong_AsLongLong(*next++); }
  double real() { return PyFloat_AsDouble(*next++); }
  Parameter parameter() {
    void* data = pointer();
    const int64_t dtype = integer();
    return {data, dtype, integer() == 2};
  }
  Call call() {
    void *x = pointer(), *residual = pointer(), *stats = pointer();
    const int64_t dtype = integer();
    const Parameter weight = parameter(), bias = parameter();
    const int64_t N = integer(), C = integer(), S = integer() / (N * C), G = integer();
    const bool channels_last = integer() != 0 && S > 1;
    const int64_t activation = integer();
    return {x, residual, stats, dtype, weight, bias, {N, C, S, G, channels_last}, activation, real()};
  }
};

// Run f without the interpreter's lock once the arguments are read
template <typename F>
PyObject* run(const F& f) {
  if (PyErr_Occurred()) return nullptr;
  const char* failure = nullptr;
  PyThreadState* state = PyEval_SaveThread();
  try {
    f();
  } catch (const std::exception&) {
    failure = "normops: out of memory, or a thread failed";
  }
  PyEval_RestoreThread(state);
  if (!failure) Py_RETURN_NONE;
  PyErr_SetString(PyExc_RuntimeError, failure);
  return nullptr;
}

bool expect(Py_ssize_t given, Py_ssize_t wanted) {
  if (given != wanted) PyErr_Format(PyExc_TypeError, "normops._C: expected %zd arguments, got %zd", wanted, given);
  return given == wanted;
}

PyObject* group_norm_fwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 19)) return nullptr;
  Arguments arguments{args};
  void* y = arguments.pointer();
  const double eps = arguments.real();
  const Call c = arguments.call();
  return run([&] {
    with_norm(c, [&](auto norm, auto zero) {
      using T = decltype(zero);
      norm.forward(static_cast<T*>(y), static_cast<Acc<T>*>(c.stats), eps);
    });
  });
}

PyObject* group_norm_bwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 26)) return nullptr;
  Arguments arguments{args};
  void *dx = arguments.pointer(), *dresidual = arguments.pointer(), *dy = arguments.pointer();
  const Parameter dweight = arguments.parameter(), dbias = arguments.parameter();
  const Call c = arguments.call();
  return run([&] {
    with_norm(c, [&](auto norm, auto zero) {
      using T = decltype(zero);
      using A = Acc<T>;
      auto sums = buffer<A>(2 * c.shape.N * c.shape.C);
      norm.backward(static_cast<T*>(dx), static_cast<T*>(dresidual), sums.get(), static_cast<const T*>(dy), static_cast<A*>(c.stats));
      parameter_gradient(dweight, sums.get(), c.shape);
      parameter_gradient(dbias, sums.get() + c.shape.N * c.shape.C, c.shape);
    });
  });
}

template <typename F>
PyMethodDef method(const char* name, F* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace normops

PyMODINIT_FUNC PyInit__C() {
  static PyMethodDef methods[] = {
      normops::method("group_norm_fwd", normops::group_norm_fwd), normops::method("group_norm_bwd", normops::group_norm_bwd), {}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
