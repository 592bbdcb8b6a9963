// The operators activation_moments_fwd, analytic_norm_weight_fwd and _bwd of normops_CUDA: how threads share rows, their workspace, their launches.
#include "launch.cuh"
#include "statistics.cuh"

namespace normops {
namespace {

// Sizes by reasoning, not by measurement. They depend on the shape alone, so that the order of the sums does too.
constexpr int64_t kThreadBytes = 32;        // of a row for each thread: two vectors
constexpr int64_t kWeightBytes = 32 << 10;  // rows in shared memory: several blocks fit on one SM of every GPU since sm_80
constexpr int kColumnWidth = 4;             // neighbours of a thread of weight_columns: more need too many registers
constexpr int64_t kTogether = 16;           // ... and its rows, at least: the fewer, the more partial sums
constexpr int64_t kMaxTogether = 256;       // ... at most
constexpr int64_t kColumnBlocks = 512;      // ... more rows rather than more blocks; 4 for each SM of an H200

double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

Weights weights_of(const Tensor& weight, int64_t outputs, int64_t taps, int64_t groups, bool channels_last) {
  const int64_t n = weight.numel() / outputs;
  STD_TORCH_CHECK(n <= INT_MAX && outputs <= INT_MAX, "normops: too many inputs or outputs");
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {outputs, narrow(n), narrow(n / taps), narrow(taps), narrow(groups), narrow(outputs / groups), channels_last};
}

struct Teams {
  int64_t lanes, threads, blocks;  // lanes of a row, threads of a block

  Teams(const Weights& s, int64_t element_size) {
    lanes = power_of_two(ceil_div(s.n * element_size, kThreadBytes), 1, kThreads);
    threads = lanes > 32 ? lanes : power_of_two(lanes * std::min<int64_t>(s.outputs, kThreads), 32, kThreads);
    blocks = ceil_div(s.outputs, threads / lanes);
  }
};

// body(T{}, Width<V>{}) with the dtype of a weight and how many of its elements a thread reads at once
template <typename Body>
void with_vectors(const Weights& s, ScalarType dtype, std::initializer_list<const void*> pointers, Body body) {
  with_types(dtype, dtype, [&](auto zero, auto) {
    using T = decltype(zero);
    with_width<T>(s.n, pointers, false, [&](auto width, auto) { body(zero, width); });
  });
}

void activation_moments_fwd(Tensor out, Tensor mean, Tensor var, int64_t function, double first, double second) {
  static const Nodes nodes = [] {
    Nodes made;
    maps::legendre(made.legendre);
    return made;
  }();
  const torch::stable::accelerator::DeviceGuard guard(mean.get_device_index());
  const Launcher launch(mean);
  const auto map = static_cast<Map>(function);
  const int64_t n = mean.numel(), lanes = quadrature(map) ? 32 : 1, threads = power_of_two(n * lanes, 32, kThreads);
  launch(activation_moments_kernel, ceil_div(n * lanes, threads), 1, threads, 0, doubles(out), doubles(mean), doubles(var), n, lanes, map, first,
         second, nodes);
}

void analytic_norm_weight_fwd(Tensor out, Tensor out_bias, Tensor stats, Tensor weight, Tensor mean, Tensor var, OptionalTensor scale,
                              OptionalTensor bias, int64_t outputs, int64_t taps, int64_t groups, bool channels_last, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Launcher launch(weight);
  const Weights s = weights_of(weight, outputs, taps, groups, channels_last);
  with_vectors(s, weight.scalar_type(), {weight.data_ptr(), out.data_ptr()}, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int V = width();
    const Teams teams(s, sizeof(T));
    const int64_t bytes = ceil_div(s.n / V, teams.lanes) * teams.threads * V * sizeof(T);
    const bool hold = bytes <= kWeightBytes;
    launch(weight_fwd_kernel<T, V>, teams.blocks, 1, teams.threads, hold ? bytes : 0, s, teams.lanes, hold, eps,
           static_cast<const T*>(weight.data_ptr()), doubles(mean), doubles(var), parameter(scale, 1, outputs, 0), parameter(bias, 1, outputs, 0),
           static_cast<T*>(out.data_ptr()), static_cast<T*>(out_bias.data_ptr()), doubles(stats));
  });
}

void analytic_norm_weight_bwd(Tensor of_weight, Tensor of_mean, Tensor of_var, Tensor of_scale, Tensor dout, Tensor dbias, Tensor dstats,
                              Tensor weight, Tensor mean, Tensor var, OptionalTensor scale, Tensor stats, int64_t outputs, int64_t taps,
                              int64_t groups, bool channels_last, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Launcher launch(weight);
  const Weights s = weights_of(weight, outputs, taps, groups, channels_last);
  with_vectors(s, weight.scalar_type(), {weight.data_ptr(), dout.data_ptr(), of_weight.data_ptr()}, [&](auto zero, auto width) {
    using T = decltype(zero);
    constexpr int V = width(), W = std::min(V, kColumnWidth);
    const T *upstream = static_cast<const T*>(dout.data_ptr()), *values = static_cast<const T*>(weight.data_ptr());
    const Teams teams(s, sizeof(T));
    const int64_t columns = s.n / W * groups, threads = power_of_two(columns, 32, kThreads), blocks = ceil_div(columns, threads);
    int64_t together = kTogether;
    while (together < kMaxTogether && blocks * ceil_div(s.rows, together) > kColumnBlocks) together *= 2;
    const int64_t chunks = ceil_div(s.rows, together), channels = s.inputs * groups, partials = chunks * taps;
    Workspace workspace(weight, sizeof(RowGradient) * outputs + 8 * 2 * partials * channels);
    RowGradient* gradients = workspace.take<RowGradient>(outputs);
    double* partial = workspace.take<double>(2 * partials * channels);
    const Upstream up{doubles(dbias), doubles(dstats), doubles(stats), parameter(scale, 1, outputs, 0), eps};
    launch(weight_rows_kernel<T, V>, teams.blocks, 1, teams.threads, 0, s, teams.lanes, up, upstream, values, doubles(of_scale), gradients);
    launch(weight_columns_kernel<T, W>, blocks * chunks, 1, threads, 0, s, together, chunks, gradients, upstream, values, doubles(mean),
           doubles(var), static_cast<T*>(of_weight.data_ptr()), partial);
    parameter_grads(launch, partial, partials, channels, of_var, of_mean);
  });
}

}  // namespace
}  // namespace normops

STABLE_TORCH_LIBRARY_FRAGMENT(normops_CUDA, m) {
  m.def("activation_moments_fwd(Tensor(a!) out, Tensor mean, Tensor var, int function, float first, float second) -> ()");
  m.def(
      "analytic_norm_weight_fwd(Tensor(a!) new, Tensor(b!) new_bias, Tensor(c!) stats, Tensor weight, Tensor mean, Tensor var, Tensor? scale, "
      "Tensor? bias, int outputs, int taps, int groups, bool channels_last, float eps) -> ()");
  m.def(
      "analytic_norm_weight_bwd(Tensor(a!) of_weight, Tensor(b!) of_mean, Tensor(c!) of_var, Tensor(d!) of_scale, Tensor dnew, Tensor dnew_bias, "
      "Tensor dstats, Tensor weight, Tensor mean, Tensor var, Tensor? scale, Tensor stats, int outputs, int taps, int groups, bool channels_last, "
      "float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(normops_CUDA, CUDA, m) {
  m.impl("activation_moments_fwd", TORCH_BOX(&normops::activation_moments_fwd));
  m.impl("analytic_norm_weight_fwd", TORCH_BOX(&normops::analytic_norm_weight_fwd));
  m.impl("analytic_norm_weight_bwd", TORCH_BOX(&normops::analytic_norm_weight_bwd));
}
