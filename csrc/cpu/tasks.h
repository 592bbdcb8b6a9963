// What work is cut into and how the parts are put together again: tasks for threads, buffers, sums in double, the merge of moments.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "loops.h"

namespace normops {

constexpr int64_t kGrain = 32768;  // elements below which a thread is not worth waking

template <typename F>
void parallel(int64_t tasks, int64_t elements_per_task, const F& task) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_task));
  auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(i);
  };
  if (tasks <= grain)
    range(0, tasks);
  else
    torch::stable::parallel_for(0, tasks, grain, range);
}

// whether one task per unit (group or sample) keeps all threads busy
inline bool enough(int64_t units, int64_t elements_per_unit) {
  if (units * elements_per_unit <= kGrain) return true;
  const int64_t threads = torch::stable::get_num_threads();
  return units >= 4 * threads || units % threads == 0;
}

template <typename E>
using Buffer = std::unique_ptr<E[]>;
template <typename E>
Buffer<E> buffer(int64_t size) {
  return Buffer<E>(new E[size]);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kKept = 1 << 20;  // elements: 4 MB in float for each thread

// A place for dt between the two passes of a unit of n elements, where memory is cheaper than the activation a second time
template <typename A>
Buffer<A> keep(Activation activation, int64_t n) {
  constexpr Activation costly[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::tanh, Activation::sigmoid};
  const bool worth = std::find(std::begin(costly), std::end(costly), activation) != std::end(costly);
  return worth && n <= kKept ? buffer<A>(n) : nullptr;
}

// `count` disjoint sets, `stride` apart in memory: Chan's formula for all at once, relative to the first mean
inline Moments merge(const Moments* sets, int64_t count, int64_t stride) {
  double total = 0, mean = 0, m2 = 0;
  for (int64_t i = 0; i < count * stride; i += stride) {
    total += sets[i].count;
    mean += sets[i].count * (sets[i].mean - sets[0].mean);
  }
  mean = sets[0].mean + mean / total;
  for (int64_t i = 0; i < count * stride; i += stride) {
    const double delta = sets[i].mean - mean;
    m2 += sets[i].m2 + sets[i].count * delta * delta;
  }
  return {total, mean, m2};
}

// sums in double, four at a time: one addition waits for the one before
template <typename F>
double sum_over(int64_t n, const F& term) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; k++) sums[k] += term(i + k);
  for (; i < n; i++) sums[0] += term(i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
template <typename A>
double sum_of(const A* values, int64_t n) {
  return sum_over(n, [&](int64_t i) { return static_cast<double>(values[i]); });
}
template <typename A>
double dot(const A* a, const A* b, int64_t n) {
  return sum_over(n, [&](int64_t i) { return static_cast<double>(a[i]) * static_cast<double>(b[i]); });
}

constexpr int64_t kRun = 128;  // lines summed in A; longer sums continue in double

// totals[i] = what f(sums, first line, lines) adds to sums[i], over runs of lines
template <typename A, typename F>
void sum_runs(double* totals, int64_t n, int64_t lines, const F& f) {
  auto sums = buffer<A>(n);
  for (int64_t begin = 0; begin < lines; begin += kRun) {
    std::fill_n(sums.get(), n, A(0));
    f(sums.get(), begin, std::min(kRun, lines - begin));
    for (int64_t i = 0; i < n; i++) totals[i] = begin ? totals[i] + sums[i] : sums[i];
  }
}

}  // namespace normops
