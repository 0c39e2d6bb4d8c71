// Vectors of the instruction set at hand and the exponential function on them: the compilers' generic vectors, so that one
// text serves every set. Included once per set, VOLO_ISA and VOLO_VECTOR_BYTES being defined; everything lives in a
// namespace of that set and nothing comes from a shared inline function: the linker must never take AVX-512 code for a
// processor that has none.
#pragma once

#include <cstdint>
#include <cstring>

#define VOLO_INLINE inline __attribute__((always_inline))

namespace volo {
namespace VOLO_ISA {
namespace {

struct Bf16 {
  uint16_t bits;
};

template <class A>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int count = VOLO_VECTOR_BYTES / 4;
  typedef float Vec __attribute__((vector_size(VOLO_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(VOLO_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(VOLO_VECTOR_BYTES / 2)));
};

template <>
struct Lanes<double> {
  static constexpr int count = VOLO_VECTOR_BYTES / 8;
  typedef double Vec __attribute__((vector_size(VOLO_VECTOR_BYTES)));
};

template <class A>
using Vec = typename Lanes<A>::Vec;
using Bits = Lanes<float>::Bits;
using Half = Lanes<float>::Half;

VOLO_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}

VOLO_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}

VOLO_INLINE Vec<float> load(const Bf16* p) {
  Half h;
  memcpy(&h, p, sizeof h);
  return (Vec<float>)(__builtin_convertvector(h, Bits) << 16);
}

VOLO_INLINE void store(float* p, Vec<float> v) { memcpy(p, &v, sizeof v); }

VOLO_INLINE void store(double* p, Vec<double> v) { memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; the addend cannot carry a number into NaN, and a NaN keeps a mantissa bit.
VOLO_INLINE void store(Bf16* p, Vec<float> v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits nan = (bits >> 16) | 0x40u;
  const Half h = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Half);
  memcpy(p, &h, sizeof h);
}

// The first `n` elements, 0 behind them.
template <class A, class T>
VOLO_INLINE Vec<A> load_part(const T* p, int64_t n) {
  T part[Lanes<A>::count] = {};
  memcpy(part, p, n * sizeof(T));
  return load(part);
}

template <class T, class V>
VOLO_INLINE void store_part(T* p, V v, int64_t n) {
  T part[sizeof(V) / sizeof(v[0])];
  store(part, v);
  memcpy(p, part, n * sizeof(T));
}

template <class A>
VOLO_INLINE A sum_lanes(Vec<A> v) {
  constexpr int W = Lanes<A>::count;
  A part[W];
  store(part, v);
  for (int step = W / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) part[l] += part[l + step];
  return part[0];
}

// ---- exponential ----

// x * scale as a power of two, the factor in two floats: the exponent is then exact to less than its last place.
struct Exponent {
  float high, low;
  explicit Exponent(double scale) {
    const double log2e = 1.4426950408889634 * scale;
    high = (float)log2e;
    low = (float)(log2e - high);
  }
};

constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
constexpr uint32_t kRoundingBits = 0x4b400000u;
constexpr uint32_t kPlainExponent = 35;  // |exponent| <= 35: no maximum need be subtracted for exp to stay harmless

// 2^r for |r| <= 1/2, relative error 2e-9 before rounding.
VOLO_INLINE Vec<float> exp2_fraction(Vec<float> r) {
  Vec<float> p = r * 0.00015353362f + 0.0013398874f;
  p = p * r + 0.009618437f;
  p = p * r + 0.055503324f;
  p = p * r + 0.24022648f;
  p = p * r + 0.69314718f;
  return p * r + 1.0f;
}

// exp(x * scale) where the exponent is moderate; `widest` keeps the largest shifted exponent seen, NaN and infinity included.
VOLO_INLINE Vec<float> exp_plain(Vec<float> x, Exponent e, Bits& widest) {
  const Vec<float> shifted = x * e.high + kRoundingShift;
  const Vec<float> n = shifted - kRoundingShift;
  const Vec<float> r = x * e.low + (x * e.high - n);
  const Bits exponent = (Bits)shifted - (kRoundingBits - kPlainExponent);
  widest = exponent > widest ? exponent : widest;
  return (Vec<float>)((Bits)exp2_fraction(r) + ((Bits)shifted << 23));
}

// exp(x) for x <= 0 or NaN; 0 from where the result would be denormal.
VOLO_INLINE Vec<float> exp_negative(Vec<float> x, Exponent e) {
  const Vec<float> lowest = (Vec<float>){} - 87.0f;
  const Vec<float> safe = x < lowest ? lowest : x;
  const Vec<float> shifted = safe * e.high + kRoundingShift;
  const Vec<float> n = shifted - kRoundingShift;
  const Vec<float> r = safe * e.low + (safe * e.high - n);
  const Vec<float> result = (Vec<float>)((Bits)exp2_fraction(r) + ((Bits)shifted << 23));
  return x < lowest ? (Vec<float>){} : result;
}

VOLO_INLINE float widen(float x) { return x; }
VOLO_INLINE double widen(double x) { return x; }
VOLO_INLINE float widen(Bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

}  // namespace
}  // namespace VOLO_ISA
}  // namespace volo
