// Mean m and variance V of f(X) for X ~ N(mu, v), and their derivatives, for the activations of deep networks: of one element, in double.
//
// With s = sqrt(v), t = |mu|/s and the normal density phi and distribution Phi, all closed forms are made of
//
//   phi(t)      Phi(-t)      h = E max(0, x - t) = phi - t*Phi(-t)      r = Var max(0, x - t) = Phi(-t) - h*(t + h)
//
// each to its own relative precision. What has no closed form is integrated relative to f(mu), over x = mu + s*t; derivatives by Stein's identities:
//
//   dm/dmu = E f'      dm/dv = E f''/2      dV/dmu = 2*Cov(f, f')      dV/dv = E f'^2 + Cov(f, f'')
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define NORMOPS_HOST_DEVICE __host__ __device__ inline
#else
#define NORMOPS_HOST_DEVICE inline
#endif

namespace normops {

// the order of MAPS in normops/maps.py; those from sigmoid on are smooth
enum class Map : int {
  none, relu, leaky_relu, abs, hardtanh, relu6, hardsigmoid, hardswish, step, sign, square, exp, sin, elu, selu,
  sigmoid, tanh, silu, softplus, mish, gelu, gelu_tanh, erf
};

struct Mapped {
  double m, variance, m_mu, m_v, v_mu, v_v;
};

namespace maps {

constexpr double kInfinite = 40;  // standard deviations beyond which phi is 0, and an exponent to which 1 is nothing
constexpr double kReach = 8.5;    // standard deviations beyond which lies less than 2e-17
constexpr double kTiny = 1e-40;   // variances that are no more than this are taken as 0
constexpr int kPanel = 64;        // nodes between two kinks
constexpr int kHalf = 17;         // steps of the coarsest trapezoid rule on each side of mu
constexpr int kSteps = 8192;      // of the finest
constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588;
constexpr double kTwoOverSqrtPi = 1.12837916709551257390;

NORMOPS_HOST_DEVICE double least(double a, double b) { return a > b ? b : a; }  // NaN if a is

NORMOPS_HOST_DEVICE double density(double t) { return kInvSqrt2Pi * ::exp(-0.5 * t * t); }

struct Tail {
  double t, phi, beyond, h, r;  // beyond = Phi(-t)
};
NORMOPS_HOST_DEVICE Tail tail_of(double a) {
  const double t = least(::fabs(a), kInfinite), phi = density(t);
  if (t > 2) {
    // Phi(-t)/phi = 1/(t + k1), k1 = 1/(t + k2), k2 = 2/(t + 3/(t + 4/(t + ...))): in terms of these h and r do not cancel
    const int terms = 16 + static_cast<int>(300 / (t * t));
    double k2 = 0.5 * (::sqrt(t * t + 4 * terms) - t);
    for (int i = terms - 1; i > 1; i--) k2 = i / (t + k2);
    const double k1 = 1 / (t + k2), beyond = phi / (t + k1), h = k1 * beyond;
    return {t, phi, beyond, h, h * (k2 - h)};
  }
  const double beyond = 0.5 * ::erfc(t * kSqrtHalf), h = phi - t * beyond;
  return {t, phi, beyond, h, beyond - h * (t + h)};
}

// ---- closed forms ----

NORMOPS_HOST_DEVICE Mapped leaky_relu(double mu, double v, double slope) {
  const double s = ::sqrt(v), rest = 1 - slope;
  const Tail k = tail_of(mu / s);
  const bool up = mu > 0;
  const double below = up ? k.beyond : 1 - k.beyond, above = up ? 1 - k.beyond : k.beyond;
  const double g = up ? k.t + k.h : k.h, r = up ? above - g * k.h : k.r;  // of max(0, X)/s
  const double a_phi = (up ? k.t : -k.t) * k.phi;
  return {
      (up ? mu : slope * mu) + rest * s * k.h,
      v * (slope * slope + 2 * slope * rest * above + rest * rest * r),
      slope + rest * above,
      rest * k.phi / (2 * s),
      2 * rest * s * (slope * k.phi + rest * g * below),
      slope * slope + 2 * slope * rest * (above - 0.5 * a_phi) + rest * rest * (above - g * k.phi),
  };
}

NORMOPS_HOST_DEVICE Mapped absolute(double mu, double v) {
  const double s = ::sqrt(v), sign = mu < 0 ? -1 : 1;
  const Tail k = tail_of(mu / s);
  return {
      ::fabs(mu) + 2 * s * k.h,
      v * (1 - 4 * k.h * (k.t + k.h)),
      sign * (1 - 2 * k.beyond),
      k.phi / s,
      4 * s * sign * (k.t * k.beyond - k.h + 2 * k.h * k.beyond),
      1 - 2 * (k.t + 2 * k.h) * k.phi,
  };
}

// hardtanh: between the bounds as X + max(0, low - X) - max(0, X - high), beyond one as the bound and what reaches over it.
NORMOPS_HOST_DEVICE Mapped clipped(double mu, double v, double low, double high) {
  const double s = ::sqrt(v);
  const Tail l = tail_of((mu - low) / s), u = tail_of((high - mu) / s);
  double m, variance, inside;
  if (mu < low || mu > high) {
    const Tail &near = mu < low ? l : u, &far = mu < low ? u : l;
    const double over = s * (near.h - far.h);
    m = mu < low ? low + over : high - over;
    variance = near.r - far.r - 2 * far.h * (far.t - near.t + far.h - near.h);
    inside = near.beyond - far.beyond;
  } else {
    m = mu + s * (l.h - u.h);
    inside = 1 - l.beyond - u.beyond;
    variance = inside - l.t * l.h - u.t * u.h - (l.h - u.h) * (l.h - u.h);
  }
  return {
      m,
      v * variance,
      inside,
      (l.phi - u.phi) / (2 * s),
      2 * ((mu - m) * inside + s * (l.phi - u.phi)),
      inside + ((low - m) * l.phi - (high - m) * u.phi) / s,
  };
}

// 1 where X > 0, else 0
NORMOPS_HOST_DEVICE Mapped step(double mu, double v) {
  const double s = ::sqrt(v);
  const Tail k = tail_of(mu / s);
  const bool up = mu > 0;
  const double below = up ? k.beyond : 1 - k.beyond, above = up ? 1 - k.beyond : k.beyond;
  const double slope = v > kTiny ? k.phi / s : 0, bend = (up ? -k.t : k.t) * k.phi / (2 * v);
  return {above, k.beyond * (1 - k.beyond), slope, bend, slope * (below - above), bend * (below - above)};
}

NORMOPS_HOST_DEVICE Mapped sign(double mu, double v) {
  const Mapped k = step(mu, v);
  return {::erf(mu / ::sqrt(v) * kSqrtHalf), 4 * k.variance, 2 * k.m_mu, 2 * k.m_v, 4 * k.v_mu, 4 * k.v_v};
}

NORMOPS_HOST_DEVICE Mapped exponential(double mu, double v) {
  const double m = ::exp(mu + 0.5 * v), largest = ::exp(2 * (mu + v)), variance = -largest * ::expm1(-v);
  return {m, variance, m, 0.5 * m, 2 * variance, variance + largest};
}

NORMOPS_HOST_DEVICE Mapped sine(double mu, double v) {
  const double damp = ::exp(-0.5 * v), square = damp * damp, lost = -::expm1(-v), c = ::cos(mu), s = ::sin(mu);
  const double two = square * (c - s) * (c + s), both = lost + 2 * square * c * c;  // = 1 + two
  return {damp * s, 0.5 * lost * both, damp * c, -0.5 * damp * s, -2 * lost * square * s * c, 0.5 * (square * both - lost * two)};
}

// ---- by integration ----

struct Curve {
  double f, first, second;
};

NORMOPS_HOST_DEVICE Curve gated(double x, double gate, double first, double second) {  // x*gate
  return {x * gate, gate + x * first, 2 * first + x * second};
}

NORMOPS_HOST_DEVICE Curve logistic(double x) {
  if (x > kInfinite) return {1, 0, 0};
  const double n = ::exp(x), s = n / (1 + n), slope = s / (1 + n);
  return {s, slope, slope * (1 - n) / (1 + n)};
}

NORMOPS_HOST_DEVICE Curve elu(double x, double alpha, double scale) {
  if (x > 0) return {scale * x, scale, 0};
  const double growth = scale * alpha * ::exp(x);
  return {scale * alpha * ::expm1(x), growth, growth};
}

NORMOPS_HOST_DEVICE Curve curve(Map map, double x, double first, double second) {
  switch (map) {
    case Map::hardtanh:
      if (x <= first) return {first, 0, 0};
      if (x >= second) return {second, 0, 0};
      return {x, 1, 0};
    case Map::hardswish:
      if (x <= -3) return {0, 0, 0};
      if (x >= 3) return {x, 1, 0};
      return {x * (x + 3) / 6, x / 3 + 0.5, 1.0 / 3};
    case Map::elu: return elu(x, first, second);
    case Map::sigmoid: return logistic(x);
    case Map::tanh: {
      const double e = ::expm1(2 * least(::fabs(x), kInfinite)), n = e + 1, th = ::copysign(e / (n + 1), x), slope = 4 * n / ((n + 1) * (n + 1));
      return {th, slope, -2 * th * slope};
    }
    case Map::silu: {
      const Curve gate = logistic(x);
      return gated(x, gate.f, gate.first, gate.second);
    }
    case Map::softplus: {
      const Curve slope = logistic(x);
      return {x > kInfinite ? x : ::log1p(::exp(x)), slope.f, slope.first};
    }
    case Map::mish: {  // tanh(softplus(x)) is a fraction in exp(x)
      if (x > kInfinite) return {x, 1, 0};
      const double n = ::exp(x), d = n * (n + 2) + 2;
      return gated(x, n * (n + 2) / d, 4 * n * (n + 1) / (d * d), 4 * n * ((2 * n + 1) * d - 4 * n * (n + 1) * (n + 1)) / (d * d * d));
    }
    case Map::gelu: {
      const double phi = density(x), bounded = phi > 0 ? x : 0;
      return gated(x, 0.5 * ::erfc(-kSqrtHalf * x), phi, -bounded * phi);
    }
    case Map::gelu_tanh: {  // = x*logistic(w)
      const double cubic = 0.044715, t = x < -kInfinite ? -kInfinite : least(x, kInfinite);
      const double w = 2 * kSqrt2OverPi * (t + cubic * t * t * t), w1 = 2 * kSqrt2OverPi * (1 + 3 * cubic * t * t);
      const double w2 = 12 * kSqrt2OverPi * cubic * t;
      const Curve gate = logistic(w);
      return gated(x, gate.f, gate.first * w1, gate.second * w1 * w1 + gate.first * w2);
    }
    default: {  // erf
      const double slope = kTwoOverSqrtPi * ::exp(-x * x);
      return {::erf(x), slope, -2 * slope * x};
    }
  }
}

// Sums over nodes in one pass: f(mu) is the median of f(X) where f is monotone, at most a standard deviation from its mean, so that the differences
// below keep their digits.
struct Integral {
  double here, weight = 0, d = 0, square = 0, first = 0, second = 0, slope = 0, bend = 0;

  NORMOPS_HOST_DEVICE void add(double w, const Curve& c) {
    const double difference = c.f - here, part = w * difference;
    weight += w;
    d += part;
    square += part * difference;
    first += w * c.first;
    second += w * c.second;
    slope += part * c.first;
    bend += w * c.first * c.first + part * c.second;
  }
  NORMOPS_HOST_DEVICE Mapped moments() const {
    const double k = 1 / weight, shift = k * d, f1 = k * first, f2 = k * second;
    return {here + shift, k * square - shift * shift, f1, 0.5 * f2, 2 * (k * slope - shift * f1), k * bend - shift * f2};
  }
};

// Who integrates: one thread, which has all nodes from the first on. On the GPU several share them.
struct Alone {
  const double* legendre;
  static constexpr int first = 0, step = 1;
  NORMOPS_HOST_DEVICE void share(Integral&) const {}
};

// The trapezoid rule: its error falls exponentially in the distance of the nearest pole over the step.
template <typename Team>
NORMOPS_HOST_DEVICE Mapped smooth(Map map, double mu, double v, const Team& team) {
  // by map: the step in x that leaves an error of at most 1e-13 in all six; by the nearest pole, or where there is none by the width of f'
  static constexpr double widths[] = {0.42, 0.2, 0.4, 0.44, 0.22, 0.43, 0.34, 0.3};
  const double s = ::sqrt(v), width = widths[static_cast<int>(map) - static_cast<int>(Map::sigmoid)];
  const double wanted = kReach * s / width;
  const int half = wanted > kHalf ? static_cast<int>(least(::ceil(wanted), kSteps)) : kHalf;
  const Curve middle = curve(map, mu, 0, 0);
  const double step = kReach / half;
  Integral sum{middle.f};
  if (team.first == 0) sum.add(step * kInvSqrt2Pi, middle);
  for (int i = 1 + team.first; i <= half; i += team.step) {
    const double t = step * i, w = step * density(t);
    sum.add(w, curve(map, mu - s * t, 0, 0));
    sum.add(w, curve(map, mu + s * t, 0, 0));
  }
  team.share(sum);
  return sum.moments();
}

// kPanel nodes on [-1, 1], then their weights, by Newton's method on the Legendre polynomial.
inline void legendre(double* nodes) {
  for (int i = 0; i < kPanel; i++) {
    double x = ::cos(3.14159265358979323846 * (i + 0.75) / (kPanel + 0.5)), slope = 0;
    for (int iteration = 0; iteration < 8; iteration++) {
      double before = 1, value = x;
      for (int k = 2; k <= kPanel; k++) {
        const double next = ((2 * k - 1) * x * value - (k - 1) * before) / k;
        before = value;
        value = next;
      }
      slope = kPanel * (x * value - before) / (x * x - 1);
      x -= value / slope;
    }
    nodes[i] = x;
    nodes[kPanel + i] = 2 / ((1 - x * x) * slope * slope);
  }
}

// Gauss-Legendre between the kinks, where f'' has the jump of f' as a delta.
struct Kinks {
  double places[2], jumps[2];
};
NORMOPS_HOST_DEVICE Kinks kinks_of(Map map, double first, double second) {
  switch (map) {
    case Map::hardtanh: return {{first, second}, {1, -1}};
    case Map::hardswish: return {{-3, 3}, {-0.5, -0.5}};
    default: return {{-kInfinite, 0}, {0, second * (1 - first)}};  // elu: below -kInfinite nothing is left of exp
  }
}

template <typename Team>
NORMOPS_HOST_DEVICE Mapped kinked(Map map, double mu, double v, double first, double second, const Team& team) {
  const auto [places, jumps] = kinks_of(map, first, second);
  const double s = ::sqrt(v);
  Integral sum{curve(map, mu, first, second).f};
  double left = -kReach;
  for (int panel = 0; panel < 3; panel++) {
    double right = kReach;
    if (panel < 2) right = least((places[panel] - mu) / s, kReach);
    const double half = 0.5 * (right - left);
    if (half <= 0) continue;
    for (int i = team.first; i < kPanel; i += team.step) {
      const double t = left + half + half * team.legendre[i];
      sum.add(half * team.legendre[kPanel + i] * density(t), curve(map, mu + s * t, first, second));
    }
    left = right;
  }
  team.share(sum);
  Mapped found = sum.moments();
  for (int i = 0; i < 2; i++) {
    const double delta = jumps[i] * density((places[i] - mu) / s) / s;
    found.m_v += 0.5 * delta;
    found.v_v += delta * (curve(map, places[i], first, second).f - found.m);
  }
  return found;
}

constexpr double kWide = 10;  // times the distance of the bounds: there the closed form, in units of v, loses digits of what is left of the variance

template <typename Team>
NORMOPS_HOST_DEVICE Mapped hardtanh(double mu, double v, double low, double high, const Team& team) {
  return ::sqrt(v) > kWide * (high - low) ? kinked(Map::hardtanh, mu, v, low, high, team) : clipped(mu, v, low, high);
}

NORMOPS_HOST_DEVICE Mapped scaled(Mapped k, double scale) {  // of the base of scale*X + shift
  return {k.m, k.variance, scale * k.m_mu, scale * scale * k.m_v, scale * k.v_mu, scale * scale * k.v_v};
}

template <typename Team>
NORMOPS_HOST_DEVICE Mapped spread(Map map, double mu, double v, double first, double second, const Team& team) {  // v > 0
  switch (map) {
    case Map::none: return {mu, v, 1, 0, 0, 1};
    case Map::relu: return leaky_relu(mu, v, 0);
    case Map::leaky_relu: return leaky_relu(mu, v, first);
    case Map::abs: return absolute(mu, v);
    case Map::hardtanh: return hardtanh(mu, v, first, second, team);
    case Map::relu6: return hardtanh(mu, v, 0, 6, team);
    case Map::hardsigmoid: return scaled(hardtanh(mu / 6 + 0.5, v / 36, 0, 1, team), 1.0 / 6);
    case Map::step: return step(mu, v);
    case Map::sign: return sign(mu, v);
    case Map::square: return {mu * mu + v, 2 * v * (v + 2 * mu * mu), 2 * mu, 1, 8 * mu * v, 4 * (v + mu * mu)};
    case Map::exp: return exponential(mu, v);
    case Map::sin: return sine(mu, v);
    case Map::selu: return kinked(Map::elu, mu, v, 1.6732632423543772, 1.0507009873554805, team);
    case Map::elu:
    case Map::hardswish: return kinked(map, mu, v, first, second, team);
    default: return smooth(map, mu, v, team);
  }
}

}  // namespace maps

NORMOPS_HOST_DEVICE bool quadrature(Map map) { return map == Map::hardswish || map >= Map::elu; }

// first, second: the parameters of leaky_relu (slope), hardtanh (low, high) and elu (alpha, scale)
template <typename Team>
NORMOPS_HOST_DEVICE Mapped moments(Map map, double mu, double v, double first, double second, const Team& team) {
  const bool certain = v <= maps::kTiny;
  const Mapped k = maps::spread(map, mu, certain ? 1e-300 : v, first, second, team);
  if (!certain) return k;
  return {k.m, 0, k.m_mu, 0, 0, k.m_mu * k.m_mu};  // what has no limit, or an infinite one, is 0
}

// legendre: filled by maps::legendre
NORMOPS_HOST_DEVICE Mapped moments(Map map, double mu, double v, double first, double second, const double* legendre) {
  return moments(map, mu, v, first, second, maps::Alone{legendre});
}

}  // namespace normops
