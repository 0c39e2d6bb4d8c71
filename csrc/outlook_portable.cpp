// 16-byte vectors are what every 64-bit processor has (SSE2, NEON); also the entry points and the choice among the sets.
#define VOLO_ISA portable
#define VOLO_VECTOR_BYTES 16
#define VOLO_VECTORS_HELD 1
#include "gelu_impl.h"
#include "outlook_attention_impl.h"
#include "self_attention_impl.h"

namespace {

int64_t best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

template <class Kernel, class Call, class... Scale>
auto run(Kernel* portable, Kernel* avx2, Kernel* avx512, const Call& call, Scale... scale) {
  static const int64_t best = best_isa();
  const int64_t isa = call.isa < best ? call.isa : best;
  if (isa == 2) return avx512(call, scale...);
  if (isa == 1) return avx2(call, scale...);
  return portable(call, scale...);
}

#if defined(__x86_64__)
#define VOLO_ALL(NAME) volo::portable::NAME, volo::avx2::NAME, volo::avx512::NAME
#else
#define VOLO_ALL(NAME) volo::portable::NAME, volo::portable::NAME, volo::portable::NAME
#endif

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int64_t volo_interface_version() { return kInterfaceVersion; }

__attribute__((visibility("default"))) int64_t volo_best_isa() { return best_isa(); }

__attribute__((visibility("default"))) int volo_outlook_forward(const OutlookCall* call, double scale) {
  return run(VOLO_ALL(outlook_forward), *call, scale);
}

__attribute__((visibility("default"))) int volo_outlook_backward(const OutlookCall* call, double scale) {
  return run(VOLO_ALL(outlook_backward), *call, scale);
}

__attribute__((visibility("default"))) int volo_attention_forward(const AttentionCall* call, double scale) {
  return run(VOLO_ALL(attention_forward), *call, scale);
}

__attribute__((visibility("default"))) int volo_attention_backward(const AttentionCall* call, double scale) {
  return run(VOLO_ALL(attention_backward), *call, scale);
}

__attribute__((visibility("default"))) void volo_gelu_backward(const GeluCall* call) {
  run(VOLO_ALL(gelu_backward), *call);
}
}
