// The module normops._C: the functions of a backend on memory that normops/cpu.py points to. Arguments are checked before; a plain C call with
// addresses costs a microsecond or two less than an operator behind the dispatcher.
#include "across_norm.h"
#include "batch_columns.h"
#include "channels_first.h"
#include "channels_last.h"
#include "row_norm.h"
#include "statistics.h"

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

  bool per_sample() const { return std::max(weight.rows, bias.rows) > 1; }
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

// ---- the group and the batch pair ----

template <typename A>
struct GroupParameters {  // weight and bias, both per sample as soon as one of them is
  Buffer<A> weight_storage, bias_storage;
  Affine<A> affine;

  explicit GroupParameters(const Call& c) {
    const bool per_sample = c.per_sample();
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

constexpr int64_t kShort = 16;  // planes of fewer elements are columns of their samples

struct Statistics {
  int64_t frozen;     // for how many samples they are given: 0, 1 or N
  const void* means;  // as in GroupNorm
  bool batch;         // they are of all samples
};

// f(BatchColumns<T>, ChannelsFirst<T> or ChannelsLast<T>) for the dtype of x
template <typename F>
void with_group_norm(Call c, bool channels_last, const Statistics& given, F&& f) {
  if (c.S == 1) channels_last = true;  // the same memory
  if (channels_last && given.frozen == 1 && !c.per_sample()) {  // nothing tells one sample from another
    c.S *= c.N;
    c.N = 1;
  }
  with_type(c.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    const GroupParameters<A> parameters(c);
    const auto own = c.stats ? nullptr : buffer<A>(3 * c.N * c.G);
    const GroupNorm<T> common{{c.N, c.C, c.S, c.G, given.batch}, static_cast<const T*>(c.x), static_cast<const T*>(c.residual), parameters.affine,
                              {c.activation, static_cast<A>(c.negative_slope)}, c.stats ? static_cast<A*>(c.stats) : own.get(), given.frozen,
                              static_cast<const A*>(given.means)};
    if (given.batch && (channels_last || c.S < kShort))
      f(BatchColumns<T>(common, channels_last), common, zero);
    else if (channels_last)
      f(ChannelsLast<T>(common), common, zero);
    else
      f(ChannelsFirst<T>(common), common, zero);
  });
}

void forward(const Call& c, bool channels_last, const Statistics& given, void* y, double eps) {
  if (given.batch && c.per_sample()) {  // as a frozen norm, once the statistics are there
    Call bare = c;
    bare.weight = bare.bias = {nullptr, 0, 1};
    forward(bare, channels_last, given, nullptr, eps);
    if (y) forward(c, channels_last, {1, nullptr, false}, y, eps);
    return;
  }
  with_group_norm(c, channels_last, given, [&](const auto& norm, const auto&, auto zero) { norm.forward(static_cast<decltype(zero)*>(y), eps); });
}

// over all samples, of weight*dt*x_hat and of weight*dt: (2, C)
template <typename A>
Buffer<A> batch_means(const A* sums, const Affine<A>& affine, const Shape& s) {
  auto means = buffer<A>(2 * s.C);
  for (int64_t i = 0; i < 2 * s.C; i++) {
    const int64_t c = i % s.C;
    double total = 0;
    for (int64_t n = 0; n < s.N; n++) total += static_cast<double>(affine.weight[n * affine.stride + c]) * sums[(i / s.C * s.N + n) * s.C + c];
    means[i] = static_cast<A>(total / (static_cast<double>(s.N) * s.S));
  }
  return means;
}

struct Gradients {
  void *dx, *dresidual, *dy;
  Parameter dweight, dbias;
};

void backward(const Call& c, bool channels_last, const Statistics& given, const Gradients& out) {
  const bool twice = given.batch && c.per_sample();  // as a frozen norm, for the sums and then with their means
  with_group_norm(c, channels_last, twice ? Statistics{1, nullptr, false} : given, [&](auto norm, const auto& common, auto zero) {
    using T = decltype(zero);
    const Shape& s = common.s;
    const T* dy = static_cast<const T*>(out.dy);
    T *dx = static_cast<T*>(out.dx), *dt = static_cast<T*>(out.dresidual);
    auto sums = buffer<Acc<T>>(2 * s.sums());
    norm.backward(twice ? nullptr : dx, twice ? nullptr : dt, sums.get(), dy);
    parameter_gradient(out.dweight, sums.get(), s.samples() / out.dweight.rows, s.C);
    parameter_gradient(out.dbias, sums.get() + s.sums(), s.samples() / out.dbias.rows, s.C);
    if (!twice || (!dx && !dt)) return;
    const auto means = batch_means(sums.get(), common.affine, s);
    norm.means = means.get();
    norm.backward(dx, dt, sums.get(), dy);
  });
}

struct Running {
  void *mean, *var;
  int64_t dtype;
};

// f(statistics of x, mean, var) in their types
template <typename F>
void with_running(const Call& c, const Running& running, const F& f) {
  with_type(running.dtype, [&](auto zero) {
    using P = decltype(zero);
    P *mean = static_cast<P*>(running.mean), *var = static_cast<P*>(running.var);
    if (c.dtype == 3)
      f(static_cast<double*>(c.stats), mean, var);
    else
      f(static_cast<float*>(c.stats), mean, var);
  });
}

void update(const Call& c, const Running& running, double momentum) {
  with_running(c, running, [&](const auto* stats, auto* mean, auto* var) {
    auto step = [&](auto* p, double value) {
      const double before = load<1>(p);
      store(p, static_cast<decltype(load<1>(p))>(before + momentum * (value - before)));
    };
    for (int64_t i = 0; i < c.C; i++) {
      step(mean + i, static_cast<double>(stats[i]) + stats[c.C + i]);
      step(var + i, stats[3 * c.C + i]);
    }
  });
}

void take(const Call& c, const Running& running, double eps) {  // as the statistics
  with_running(c, running, [&](auto* stats, const auto* mean, const auto* var) {
    using A = std::remove_pointer_t<decltype(stats)>;
    const SavedStats<A> saved{stats, c.C, true};
    for (int64_t i = 0; i < c.C; i++) saved.set(i, finish<A>(load<1>(mean + i), {1, 0, static_cast<double>(load<1>(var + i))}, eps));
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

// ---- statistics ----

const double* per_output(const Parameter& parameter, double value, int64_t outputs, Buffer<double>& storage) {
  return parameter.data ? widened(parameter, outputs, 0.0, storage) : constant(value, outputs, storage);
}

// ---- what Python calls ----

struct Arguments {  // positional, in the order of the calls in normops/cpu.py
  PyObject* const* next;

  void* pointer() { return PyLong_AsVoidPtr(*next++); }
  int64_t integer() { return PyLong_AsLongLong(*next++); }
  double real() { return PyFloat_AsDouble(*next++); }
  double* doubles() { return static_cast<double*>(pointer()); }
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
  WeightShape weight_shape() {
    const int64_t size = integer(), outputs = integer(), taps = integer(), groups = integer();
    return {outputs, size / (outputs * taps), taps, groups, integer() != 0};
  }
  Gradients gradients() {
    void *dx = pointer(), *dresidual = pointer(), *dy = pointer();
    const Parameter dweight = parameter();
    return {dx, dresidual, dy, dweight, parameter()};
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
  return run([&] { forward(c, channels_last, {frozen, nullptr, false}, y, eps); });
}

PyObject* group_norm_bwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 28)) return nullptr;
  Arguments arguments{args};
  const Gradients out = arguments.gradients();
  const void* means = arguments.pointer();
  const Call c = arguments.call();
  const bool channels_last = arguments.integer() != 0;
  const int64_t frozen = arguments.integer();
  return run([&] { backward(c, channels_last, {frozen, means, false}, out); });
}

PyObject* batch_norm_fwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 24)) return nullptr;
  Arguments arguments{args};
  void* y = arguments.pointer();
  const double eps = arguments.real(), momentum = arguments.real();
  Running running{arguments.pointer(), nullptr, arguments.integer()};
  running.var = arguments.pointer();
  const bool frozen = arguments.integer() != 0;
  const Call c = arguments.call();
  const bool channels_last = arguments.integer() != 0;
  return run([&] {
    if (frozen) take(c, running, eps);
    forward(c, channels_last, {frozen, nullptr, !frozen || c.S < kShort}, y, eps);  // frozen planes in the order of memory
    if (running.mean && !frozen) update(c, running, momentum);
  });
}

PyObject* batch_norm_bwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 27)) return nullptr;
  Arguments arguments{args};
  const Gradients out = arguments.gradients();
  const Call c = arguments.call();
  const bool channels_last = arguments.integer() != 0, frozen = arguments.integer() != 0;
  return run([&] { backward(c, channels_last, {frozen, nullptr, true}, out); });
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

PyObject* activation_moments_fwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 7)) return nullptr;
  Arguments arguments{args};
  double *out = arguments.doubles(), *mean = arguments.doubles(), *var = arguments.doubles();
  const int64_t n = arguments.integer();
  const auto map = static_cast<Map>(arguments.integer());
  const double first = arguments.real(), second = arguments.real();
  return run([&] { activation_moments(out, mean, var, n, map, first, second); });
}

PyObject* analytic_norm_weight_fwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 19)) return nullptr;
  Arguments arguments{args};
  void *out = arguments.pointer(), *new_bias = arguments.pointer(), *weight = arguments.pointer();
  const int64_t dtype = arguments.integer();
  const double *mean = arguments.doubles(), *var = arguments.doubles();
  double* stats = arguments.doubles();
  const Parameter scale = arguments.parameter(), bias = arguments.parameter();
  const WeightShape shape = arguments.weight_shape();
  const double eps = arguments.real();
  return run([&] {
    Buffer<double> scales, biases;
    const double *s = per_output(scale, 1, shape.outputs, scales), *b = per_output(bias, 0, shape.outputs, biases);
    with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      analytic_norm_weight<T>(shape, {static_cast<T*>(out), static_cast<T*>(new_bias), static_cast<const T*>(weight), nullptr, nullptr, mean, var, s,
                                      b, stats, stats + shape.outputs, eps, 0, 0, 0, 0});
    });
  });
}

PyObject* analytic_norm_weight_bwd(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 21)) return nullptr;
  Arguments arguments{args};
  void *of_weight = arguments.pointer(), *dnew = arguments.pointer(), *weight = arguments.pointer();
  const int64_t dtype = arguments.integer();
  double *of_mean = arguments.doubles(), *of_var = arguments.doubles(), *of_scale = arguments.doubles();
  const double *dbias = arguments.doubles(), *dstats = arguments.doubles(), *mean = arguments.doubles(), *var = arguments.doubles();
  const double* stats = arguments.doubles();
  const Parameter scale = arguments.parameter();
  const WeightShape shape = arguments.weight_shape();
  const double eps = arguments.real();
  return run([&] {
    Buffer<double> scales;
    const double* s = per_output(scale, 1, shape.outputs, scales);
    with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      analytic_norm_weight_backward<T>(shape, {static_cast<T*>(of_weight), static_cast<const T*>(dnew), static_cast<const T*>(weight), of_mean, of_var,
                                               mean, var, of_scale, dbias, dstats, dstats + shape.outputs, s, stats, stats + shape.outputs, eps, 0, 0});
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
                                  method("batch_norm_fwd", batch_norm_fwd), method("batch_norm_bwd", batch_norm_bwd),
                                  method("row_norm_fwd", row_norm_fwd), method("row_norm_bwd", row_norm_bwd),
                                  method("activation_moments_fwd", activation_moments_fwd),
                                  method("analytic_norm_weight_fwd", analytic_norm_weight_fwd),
                                  method("analytic_norm_weight_bwd", analytic_norm_weight_bwd), {}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
