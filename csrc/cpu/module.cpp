// The module normops._C: the four functions of a backend on memory that normops/cpu.py points to. Arguments are checked before; a plain C call with
// addresses costs a microsecond or two less than an operator behind the dispatcher.
#include "across_norm.h"
#include "channels_first.h"
#include "channels_last.h"
#include "row_norm.h"

#include <Python.h>

#include <exception>

namespace normops {

struct Parameter {  // weight or bias, or the place of its gradient
  void* data;
  int64_t dtype;  // the order of DTYPES in normops/cpu.py
  int64_t rows;   // of C elements
};

struct Call {  // what all functions have in common
  void *x, *residual, *stats;
  int64_t dtype;
  Parameter weight, bias;
  int64_t N, C, S, G;
  Activation activation;
  double negative_slope;
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

// Vectors of A
template <typename A>
const A* constant(A value, int64_t size, Buffer<A>& storage) {
  storage = buffer<A>(size);
  std::fill_n(storage.get(), size, value);
  return storage.get();
}
template <typename A>
const A* widened(const Parameter& parameter, int64_t C, A offset, Buffer<A>& storage) {
  const int64_t size = parameter.rows * C;
  const A* vector = nullptr;
  with_type(parameter.dtype, [&](auto zero) {
    using P = decltype(zero);
    const P* p = static_cast<const P*>(parameter.data);
    if constexpr (std::is_same_v<P, A>) {
      vector = p;
      if (offset == 0) return;
    }
    storage = buffer<A>(size);
    for (int64_t i = 0; i < size; i++) storage[i] = static_cast<A>(load<1>(p + i)) + offset;
    vector = storage.get();
  });
  return vector;
}

// the gradient of a parameter from (rows*count, C) sums in A, where `count` in a row belong to each of its rows
template <typename A>
void parameter_gradient(const Parameter& out, const A* sums, int64_t count, int64_t C) {
  if (!out.data) return;
  constexpr int64_t kBlock = 64;
  with_type(out.dtype, [&](auto zero) {
    using P = decltype(zero);
    P* p = static_cast<P*>(out.data);
    const int64_t blocks = ceil_div(C, kBlock);
    parallel(out.rows * blocks, count * kBlock, [&](int64_t task) {
      const int64_t row = task / blocks, first = task % blocks * kBlock, channels = std::min(kBlock, C - first);
      double totals[kBlock] = {};
      for (int64_t i = row * count; i < (row + 1) * count; i++)
        for (int64_t c = 0; c < channels; c++) totals[c] += sums[i * C + first + c];
      for (int64_t c = 0; c < channels; c++) store(p + row * C + first + c, static_cast<Acc<P>>(totals[c]));
    });
  });
}

// ---- the group pair ----

template <typename A>
struct GroupParameters {  // weight and bias, both per sample as soon as one of them is
  Buffer<A> weight_storage, bias_storage;
  Affine<A> affine;

  explicit GroupParameters(const Call& c) {
    const bool per_sample = std::max(c.weight.rows, c.bias.rows) > 1;
    affine.stride = per_sample ? c.C : 0;
    affine.weight = expanded(c.weight, A(1), per_sample ? c.N : 1, c.C, weight_storage);
    affine.bias = expanded(c.bias, A(0), per_sample ? c.N : 1, c.C, bias_storage);
  }

 private:
  static const A* expanded(const Parameter& parameter, A value, int64_t rows, int64_t C, Buffer<A>& storage) {
    if (!parameter.data) return constant(value, rows * C, storage);
    if (parameter.rows == rows) return widened(parameter, C, A(0), storage);
    Buffer<A> once;
    const A* vector = widened(parameter, C, A(0), once);
    storage = buffer<A>(rows * C);
    for (int64_t n = 0; n < rows; n++) std::copy_n(vector, C, &storage[n * C]);
    return storage.get();
  }
};

// f(ChannelsFirst<T> or ChannelsLast<T>) for the dtype of x
template <typename F>
void with_group_norm(Call c, bool channels_last, int64_t frozen, F&& f) {
  if (c.S == 1) channels_last = true;  // the same memory
  if (channels_last && frozen == 1 && std::max(c.weight.rows, c.bias.rows) == 1) {  // nothing tells one sample from another
    c.S *= c.N;
    c.N = 1;
  }
  with_type(c.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const GroupParameters<A> parameters(c);
    const auto own = c.stats ? nullptr : buffer<A>(3 * c.N * c.G);
    const GroupNorm<T> common{{c.N, c.C, c.S, c.G}, static_cast<const T*>(c.x), static_cast<const T*>(c.residual), parameters.affine,
                              {c.activation, static_cast<A>(c.negative_slope)}, c.stats ? static_cast<A*>(c.stats) : own.get(), frozen};
    if (channels_last)
      f(ChannelsLast<T>(common), common, zero);
    else
      f(ChannelsFirst<T>(common), common, zero);
  });
}

// ---- the row pair ----

template <typename A>
RowVector<A> row_vector(const Parameter& parameter, const Call& c, A value, A offset, Buffer<A>& storage) {
  if (parameter.data) return {widened(parameter, c.C, offset, storage), c.N / parameter.rows, c.C};
  const int64_t size = c.S > 1 ? c.C : std::min(c.C / c.G, kChunk);
  return {constant(value, size, storage), c.N, 0};
}

// f(RowNorm<T> or AcrossNorm<T>) for the dtype of x
template <typename F>
void with_row_norm(const Call& c, bool centered, double weight_offset, F&& f) {
  const int64_t shared = std::gcd(c.N / c.weight.rows, c.N / c.bias.rows);
  with_type(c.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    Buffer<A> weight, bias;
    const RowAffine<A> affine{row_vector(c.weight, c, A(1), static_cast<A>(weight_offset), weight), row_vector(c.bias, c, A(0), A(0), bias)};
    const RowShape shape{c.N, c.C, c.S, c.G, centered, shared};
    const Options<A> options{c.activation, static_cast<A>(c.negative_slope)};
    auto call = [&](auto norm) { f(norm, zero); };
    if (c.S > 1)
      call(AcrossNorm<T>(shape, static_cast<const T*>(c.x), static_cast<const T*>(c.residual), affine, options, static_cast<A*>(c.stats)));
    else
      call(RowNorm<T>(shape, static_cast<const T*>(c.x), static_cast<const T*>(c.residual), affine, options, static_cast<A*>(c.stats)));
  });
}

// ---- what Python calls ----

struct Arguments {  // positional, in the order of the calls in normops/cpu.py
  PyObject* const* next;

  void* pointer() { return PyLong_AsVoidPtr(*next++); }
  int64_t integer() { return PyLong_AsLongLong(*next++); }
  double real() { return PyFloat_AsDouble(*next++); }
  Parameter parameter() {
    void* data = pointer();
    const int64_t dtype = integer();
    return {data, dtype, integer()};
  }
  Call call() {
    void *x = pointer(), *residual = pointer(), *stats = pointer();
    const int64_t dtype = integer();
    const Parameter weight = parameter(), bias = parameter();
    const int64_t N = integer(), C = integer(), S = integer() / (N * C), G = integer();
    const auto activation = static_cast<Activation>(integer());
    return {x, residual, stats, dtype, weight, bias, N, C, S, G, activation, real()};
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
  if (!expect(count, 20)) return nullptr;
  Arguments arguments{args};
  void* y = arguments.pointer();
  const double eps = arguments.real();
  const Call c = arguments.call();
  const bool channels_last = arguments.integer() != 0;
  const int64_t frozen = arguments.integer();
  return run([&] {
    with_group_norm(c, channels_last, frozen, [&](const auto& norm, const auto&, auto zero) { norm.forward(static_cast<decltype(zero)*>(y), eps); });
  });
}

PyObject* group_norm_bwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 27)) return nullptr;
  Arguments arguments{args};
  void *dx = arguments.pointer(), *dresidual = arguments.pointer(), *dy = arguments.pointer();
  const Parameter dweight = arguments.parameter(), dbias = arguments.parameter();
  const Call c = arguments.call();
  const bool channels_last = arguments.integer() != 0;
  const int64_t frozen = arguments.integer();
  return run([&] {
    with_group_norm(c, channels_last, frozen, [&](const auto& norm, const auto& common, auto zero) {
      using T = decltype(zero);
      using A = Acc<T>;
      const int64_t N = common.s.N, size = N * c.C;
      auto sums = buffer<A>(2 * size);
      norm.backward(static_cast<T*>(dx), static_cast<T*>(dresidual), sums.get(), static_cast<const T*>(dy));
      parameter_gradient(dweight, sums.get(), N / dweight.rows, c.C);
      parameter_gradient(dbias, sums.get() + size, N / dbias.rows, c.C);
    });
  });
}

PyObject* row_norm_fwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 22)) return nullptr;
  Arguments arguments{args};
  void *y = arguments.pointer(), *total = arguments.pointer(), *addend = arguments.pointer();
  const double eps = arguments.real();
  const Call c = arguments.call();
  const bool centered = arguments.integer() != 0;
  const double weight_offset = arguments.real();
  return run([&] {
    with_row_norm(c, centered, weight_offset, [&](const auto& norm, auto zero) {
      using T = decltype(zero);
      norm.forward(static_cast<T*>(y), static_cast<T*>(total), static_cast<const T*>(addend), eps);
    });
  });
}

PyObject* row_norm_bwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 28)) return nullptr;
  Arguments arguments{args};
  void *dx = arguments.pointer(), *dresidual = arguments.pointer(), *dy = arguments.pointer(), *dtotal = arguments.pointer();
  const Parameter dweight = arguments.parameter(), dbias = arguments.parameter();
  const Call c = arguments.call();
  const bool centered = arguments.integer() != 0;
  const double weight_offset = arguments.real();
  return run([&] {
    with_row_norm(c, centered, weight_offset, [&](const auto& norm, auto zero) {
      using T = decltype(zero);
      using A = Acc<T>;
      const int64_t size = norm.blocks() * c.C;
      auto weight_sums = dweight.data ? buffer<A>(size) : nullptr, bias_sums = dbias.data ? buffer<A>(size) : nullptr;
      norm.backward(static_cast<T*>(dx), static_cast<T*>(dresidual), weight_sums.get(), bias_sums.get(), static_cast<const T*>(dy),
                    static_cast<const T*>(dtotal));
      parameter_gradient(dweight, weight_sums.get(), norm.blocks() / dweight.rows, c.C);
      parameter_gradient(dbias, bias_sums.get(), norm.blocks() / dbias.rows, c.C);
    });
  });
}

template <typename F>
PyMethodDef method(const char* name, F* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace normops

PyMODINIT_FUNC PyInit__C() {
  using namespace normops;
  static PyMethodDef methods[] = {method("group_norm_fwd", group_norm_fwd), method("group_norm_bwd", group_norm_bwd),
                                  method("row_norm_fwd", row_norm_fwd), method("row_norm_bwd", row_norm_bwd), {}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
