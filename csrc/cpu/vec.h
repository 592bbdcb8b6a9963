// Vectors of floats or doubles (GCC/Clang vector extensions: the compiler splits what is wider than the machine), loads and stores that convert
// 16-bit types, and the transcendental functions that algebra.h asks for. Lane count 1 is a plain scalar.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define NORMOPS_ALWAYS inline __attribute__((always_inline))

namespace normops {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;  // what T is computed in

template <typename E, int W>
struct VecOf {
  typedef E type __attribute__((vector_size(sizeof(E) * W)));
};
template <typename E>
struct VecOf<E, 1> {
  typedef E type;
};
template <typename E, int W>
using Vec = typename VecOf<E, W>::type;

template <typename V>
constexpr auto scalar_of() {
  if constexpr (std::is_floating_point_v<V>) {
    return V{};
  } else {
    V v{};
    return v[0];
  }
}
template <typename V>
using Scalar = decltype(scalar_of<V>());
template <typename V>
constexpr int kLanes = sizeof(V) / sizeof(Scalar<V>);

template <typename To, typename From>
NORMOPS_ALWAYS To bitcast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename To, typename From>
NORMOPS_ALWAYS To convert(From from) {
  if constexpr (std::is_arithmetic_v<From>)
    return static_cast<To>(from);
  else
    return __builtin_convertvector(from, To);
}

template <int W, typename T>
NORMOPS_ALWAYS Vec<Acc<T>, W> load(const T* p) {
  if constexpr (std::is_floating_point_v<T>) {
    Vec<T, W> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  } else {
    using U = Vec<uint32_t, W>;
    Vec<uint16_t, W> packed;
    std::memcpy(&packed, p, sizeof(packed));
    U bits = convert<U>(packed);
    if constexpr (std::is_same_v<T, BFloat16>) return bitcast<Vec<float, W>>(U(bits << 16));
    // half: the exponent is rebiased by a multiplication, which also normalizes subnormals; infinity and NaN keep an exponent of ones
    U magnitude = (bits & 0x7fffu) << 13;
    U value = bitcast<U>(Vec<float, W>(bitcast<Vec<float, W>>(magnitude) * 0x1p112f));
    value = magnitude >= (0x7c00u << 13) ? value | 0x7f800000u : value;
    return bitcast<Vec<float, W>>(U(value | ((bits & 0x8000u) << 16)));
  }
}

template <typename T, typename V>
NORMOPS_ALWAYS void store(T* p, V v) {
  if constexpr (std::is_floating_point_v<T>) {
    std::memcpy(p, &v, sizeof(v));
  } else {  // round to nearest even
    constexpr int W = kLanes<V>;
    using U = Vec<uint32_t, W>;
    U bits = bitcast<U>(v), rounded;
    if constexpr (std::is_same_v<T, BFloat16>) {
      rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      rounded = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
    } else {
      U magnitude = bits & 0x7fffffffu;
      U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
      U small = bitcast<U>(V(bitcast<V>(magnitude) + 0.5f)) - 0x3f000000u;  // subnormal halves: the float adder rounds at 2^-24
      rounded = magnitude < 0x38800000u ? small : normal;
      rounded = magnitude >= 0x477ff000u ? rounded * 0u + 0x7c00u : rounded;
      rounded = magnitude > 0x7f800000u ? rounded * 0u + 0x7e00u : rounded;
      rounded = rounded | ((bits >> 16) & 0x8000u);
    }
    auto packed = convert<Vec<uint16_t, W>>(rounded);
    std::memcpy(p, &packed, sizeof(packed));
  }
}

template <typename V>
NORMOPS_ALWAYS Scalar<V> sum_lanes(V v) {  // a tree: log2(lanes) additions in a row
  if constexpr (kLanes<V> == 1) {
    return v;
  } else {
    struct Halves {
      Vec<Scalar<V>, kLanes<V> / 2> low, high;
    } halves = bitcast<Halves>(v);
    return sum_lanes(Vec<Scalar<V>, kLanes<V> / 2>(halves.low + halves.high));
  }
}

// 0 for the first `skip` lanes, 1 for the others
template <typename V>
NORMOPS_ALWAYS V mask_from(int64_t skip) {
  using I = std::conditional_t<sizeof(Scalar<V>) == 8, int64_t, int32_t>;
  const V one = V{} + 1;
  if constexpr (kLanes<V> == 1) {
    return skip > 0 ? V{} : one;
  } else {
    Vec<I, kLanes<V>> lane;
    for (int i = 0; i < kLanes<V>; i++) lane[i] = i;
    return lane < static_cast<I>(skip) ? V{} : one;
  }
}

// ---- transcendental functions: float by polynomials (about 2 ulp), double by the C library ----

template <typename V>
constexpr bool kIsDouble = std::is_same_v<Scalar<V>, double>;

template <typename V, typename F>
NORMOPS_ALWAYS V lanewise(V v, F f) {
  if constexpr (kLanes<V> == 1)
    return f(v);
  else
    for (int i = 0; i < kLanes<V>; i++) v[i] = f(v[i]);
  return v;
}

template <typename V>
NORMOPS_ALWAYS V exp_(V x) {
  if constexpr (kIsDouble<V>) {
    return lanewise(x, [](double e) { return std::exp(e); });
  } else {
    using U = Vec<uint32_t, kLanes<V>>;
    const V low = V{} - 80.0f, high = V{} + 80.0f;  // beyond, the callers are at their limits; products stay normal numbers
    x = x < low ? low : x;
    x = x > high ? high : x;
    V shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5*2^23: the sum's last bits are the nearest integer of x*log2(e)
    V k = shifted - 12582912.0f;
    V r = x - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;  // ln(2) in two parts
    V p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * bitcast<V>(U((bitcast<U>(shifted) + 127u) << 23));
  }
}

template <typename V>
NORMOPS_ALWAYS V logistic_(V x) {
  return Scalar<V>(1) / (Scalar<V>(1) + exp_(V(-x)));
}

template <typename V>
NORMOPS_ALWAYS V abs_(V x) {
  return x < V{} ? -x : x;
}

template <typename V>
NORMOPS_ALWAYS V tanh_(V x) {
  if constexpr (kIsDouble<V>) {
    return lanewise(x, [](double e) { return std::tanh(e); });
  } else {  // an odd minimax polynomial near zero, where the other form cancels
    V a = abs_(x), z = x * x;
    V p = z * -0.0061125873f + 0.0210095532f;
    p = p * z - 0.0538539141f;
    p = p * z + 0.1333279312f;
    p = p * z - 0.3333332837f;
    V near = x * (p * z) + x;
    V far = 1.0f - 2.0f / (exp_(V(a * 2.0f)) + 1.0f);
    far = x < V{} ? -far : far;
    return a < V{} + 0.625f ? near : far;
  }
}

template <typename V>
NORMOPS_ALWAYS V erf_(V x, V exp_minus_square) {
  if constexpr (kIsDouble<V>) {
    return lanewise(x, [](double e) { return std::erf(e); });
  } else {  // minimax: x*P(x^2) below 1, 1 - exp(-x^2)*Q(1/(1+|x|)) above
    V a = abs_(x), z = x * x;
    V p = z * 7.8538578e-05f - 0.00080101925f;
    p = p * z + 0.0051883277f;
    p = p * z - 0.0268538110f;
    p = p * z + 0.1128358543f;
    p = p * z - 0.3761262596f;
    p = p * z + 1.1283791065f;
    V s = 1.0f / (1.0f + a);
    V q = s * -0.1505834460f + 0.8585059643f;
    q = q * s - 1.4485430717f;
    q = q * s + 0.6945307255f;
    q = q * s + 0.4835969806f;
    q = q * s + 0.5725819468f;
    q = q * s - 0.0003644574f;
    V far = 1.0f - exp_minus_square * q;
    far = x < V{} ? -far : far;
    return a < V{} + 1.0f ? x * p : far;
  }
}

}  // namespace normops
