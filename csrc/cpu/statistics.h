// Analytic normalization on the CPU: moments of activations, and weights whose outputs have a given mean and standard deviation.
//
// A task is a block of rows of a weight. Blocks have a fixed size and their sums over rows are merged in index order, in double: the results do not
// depend on the number of threads.
#pragma once

#include <array>

#include "../maps.h"
#include "loops.h"
#include "tasks.h"

namespace normops {

// out: the six values, each for n elements
inline void activation_moments(double* out, const double* mean, const double* var, int64_t n, Map map, double first, double second) {
  static const auto nodes = [] {
    std::array<double, 2 * maps::kPanel> values;
    maps::legendre(values.data());
    return values;
  }();
  parallel(n, quadrature(map) ? 1024 : 64, [&](int64_t i) {  // an element costs as much as so many elements of a norm
    const Mapped k = moments(map, mean[i], var[i], first, second, nodes.data());
    const double values[] = {k.m, k.variance, k.m_mu, k.m_v, k.v_mu, k.v_v};
    for (int j = 0; j < 6; j++) out[j * n + i] = values[j];
  });
}

constexpr int64_t kBlock = 32;

struct WeightShape {
  int64_t outputs, inputs, taps, groups;  // inputs of a group
  bool channels_last;
  int64_t run = channels_last ? 1 : taps;  // elements with one input
  int64_t n = inputs * taps, group = outputs / groups;  // elements of a row, rows of a group

  // A task is a part of a group, the more rows the fewer vectors to merge, or some whole groups.
  int64_t block = group < kBlock ? kBlock / group * group : std::max(kBlock, ceil_div(group / 64, kTogether) * kTogether);
  int64_t blocks = ceil_div(group, block);  // of a group

  // f(block in its group, first row, rows)
  template <typename F>
  void over_blocks(const F& f) const {
    const int64_t tasks = blocks > 1 ? groups * blocks : ceil_div(outputs, block);
    parallel(tasks, block * n, [&](int64_t task) {
      const int64_t begin = task % blocks * block;
      const int64_t row = blocks > 1 ? task / blocks * group + begin : task * block;
      f(task % blocks, row, std::min(block, blocks > 1 ? group - begin : outputs - row));
    });
  }

  int64_t element(int64_t input, int64_t tap) const { return channels_last ? tap * inputs + input : input * taps + tap; }

  template <typename E>
  const E* over_elements(const double* vector, Buffer<E>& storage) const {  // a vector of inputs
    if constexpr (std::is_same_v<E, double>)
      if (taps == 1) return vector;
    storage = buffer<E>(groups * n);
    E* p = storage.get();
    if (run > 1) {
      for (int64_t input = 0; input < groups * inputs; input++)
        for (int64_t tap = 0; tap < taps; tap++) *p++ = static_cast<E>(vector[input]);
    } else {
      for (int64_t i = 0; i < groups * taps; i++, p += inputs) std::copy_n(vector + i / taps * inputs, inputs, p);
    }
    return storage.get();
  }
};

template <typename T>
void analytic_norm_weight(const WeightShape& s, WeightRows<T> all) {
  Buffer<Acc<T>> mean, var;
  all.n = s.n;
  all.group = s.group;
  all.inputs = s.inputs;
  all.run = s.run;
  all.mean = s.over_elements(all.input_mean, mean);
  all.var = s.over_elements(all.input_var, var);
  s.over_blocks([&](int64_t, int64_t row, int64_t rows) { loops<T>().weights(all, row, rows); });
}

template <typename T>
void analytic_norm_weight_backward(const WeightShape& s, WeightRowsBackward<T> all) {
  Buffer<double> mean, var;
  double* const out[] = {all.of_mean, all.of_var};
  const int64_t size = s.groups * s.n;
  const auto sums = buffer<double>(s.blocks * 2 * size);
  all.n = s.n;
  all.group = s.group;
  all.mean = s.over_elements(all.mean, mean);
  all.var = s.over_elements(all.var, var);
  s.over_blocks([&](int64_t index, int64_t row, int64_t rows) {
    WeightRowsBackward<T> a = all;
    a.of_mean = &sums[2 * index * size];
    a.of_var = a.of_mean + size;
    const int64_t first = row / s.group * s.n, elements = ceil_div(rows, s.group) * s.n;
    for (double* part : {a.of_mean, a.of_var}) std::fill_n(part + first, elements, 0.0);
    loops<T>().weights_backward(a, row, rows);
  });
  parallel(s.groups * s.inputs, 2 * s.blocks * s.taps, [&](int64_t channel) {
    const double* first = &sums[channel / s.inputs * s.n];
    for (int which = 0; which < 2; which++, first += size) {
      double total = 0;
      for (int64_t index = 0; index < s.blocks; index++)
        for (int64_t tap = 0; tap < s.taps; tap++) total += first[2 * index * size + s.element(channel % s.inputs, tap)];
      out[which][channel] = total;
    }
  });
}

}  // namespace normops
