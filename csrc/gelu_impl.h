// The gradient of GELU, x Phi(x) with Phi the distribution function of the normal distribution, included once per
// instruction set like outlook_attention_impl.h.
//
// Both of its terms need exp(-x^2 / 2): the density is that, and Phi(-|x|) is that times a ratio (Mills') which varies
// slowly, so one exponential and one polynomial serve both and no case is told apart by a branch. Phi of a negative
// number keeps its relative accuracy, where 1 + erf cancels. (Forward PyTorch's erf is as fast, and is left alone.)

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "gelu.h"
#include "vectors.h"

namespace volo {
namespace VOLO_ISA {
namespace {

constexpr int64_t kSmallGelu = 32768;  // elements that are done before a second thread has woken

// exp(-x^2 / 2) and Phi(x). From |x| = 13.1 on, where they are denormal, they are 0, and 1 on the right; NaN comes out as
// any number: it comes back when x is multiplied.
struct Normal {
  Vec<float> exponential, distribution;
};

VOLO_INLINE Normal normal(Vec<float> x) {
  constexpr float kLargest = 13.1f;
  const Vec<float> zero = {};
  const Vec<float> size = (Vec<float>)((Bits)x & 0x7fffffffu);
  const Vec<float> a = size < kLargest ? size : zero + kLargest;

  // The square in two floats: of the first twelve bits it is exact, and the rest is small.
  const Vec<float> head = (Vec<float>)((Bits)a & 0xfffff000u);
  const Vec<float> square = head * head;
  const Vec<float> rest = (a - head) * (a + head);
  const Exponent e(-0.5);
  const Vec<float> shifted = square * e.high + kRoundingShift;
  const Vec<float> n = shifted - kRoundingShift;
  const Vec<float> r = square * e.low + rest * e.high + (square * e.high - n);
  const Vec<float> power = (Vec<float>)((Bits)exp2_fraction(r) + ((Bits)shifted << 23));
  const Vec<float> exponential = size < kLargest ? power : zero;

  // (a + 3) Phi(-a) exp(a^2 / 2) as a polynomial of s = (a - 3) / (a + 3): minimax for 0 <= a <= 13.25.
  const Vec<float> inverse = 1.0f / (a + 3.0f);
  const Vec<float> s = (a - 3.0f) * inverse;
  Vec<float> p = s * 4.43994776e-05f - 0.000217132168f;
  p = p * s - 0.000946552356f;
  p = p * s + 0.00102701697f;
  p = p * s + 0.00693973014f;
  p = p * s - 0.0104648044f;
  p = p * s - 0.0472587479f;
  p = p * s + 0.230017897f;
  p = p * s - 0.509332138f;
  p = p * s + 0.729083689f;
  const Vec<float> tail = p * inverse * exponential;
  return {exponential, x > zero ? 1.0f - tail : tail};
}

VOLO_INLINE Vec<float> gelu_gradient(Vec<float> x, Vec<float> grad_out) {
  constexpr float kDensityAtZero = 0.3989422804014327f;  // 1 / sqrt(2 pi)
  const Normal at = normal(x);
  return grad_out * (at.distribution + x * (at.exponential * kDensityAtZero));
}

template <class T>
void run_gelu_backward(const GeluCall& call, int64_t first, int64_t end) {
  constexpr int kLanes = Lanes<float>::count;
  const T *x = static_cast<const T*>(call.x), *grad_out = static_cast<const T*>(call.grad_out);
  T* grad_x = static_cast<T*>(call.grad_x);
  int64_t i = first;
  for (; i + kLanes <= end; i += kLanes) store(grad_x + i, gelu_gradient(load(x + i), load(grad_out + i)));
  if (i < end) {
    const int64_t n = end - i;
    store_part(grad_x + i, gelu_gradient(load_part<float>(x + i, n), load_part<float>(grad_out + i, n)), n);
  }
}

}  // namespace

void gelu_backward(const GeluCall& call) {
  const auto part = [&](int64_t thread, int64_t of) {
    constexpr int64_t kLine = 64;  // elements, at least a line of the cache: threads do not write into the same one
    const int64_t lines = (call.count + kLine - 1) / kLine;
    const int64_t first = lines * thread / of * kLine, end = lines * (thread + 1) / of * kLine;
    const int64_t last = end < call.count ? end : call.count;
    if (first >= last) return;
    if (call.dtype == 0)
      run_gelu_backward<float>(call, first, last);
    else
      run_gelu_backward<Bf16>(call, first, last);
  };
#if defined(_OPENMP)
  const int64_t threads = call.count < kSmallGelu || call.threads < 1 ? 1 : call.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  part(omp_get_thread_num(), omp_get_num_threads());
#else
  part(0, 1);
#endif
}

}  // namespace VOLO_ISA
}  // namespace volo
