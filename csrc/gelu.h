// The plain C interface of the gradient of GELU on a CPU; see outlook_attention.h for why it is plain.
#pragma once

#include <cstdint>

// One call, every field 64 bits wide, in the order that src/volo/ops/cpu_kernel.py fills. Everything is contiguous.
struct GeluCall {
  int64_t dtype;    // 0 float32, 1 bfloat16
  int64_t isa;      // 0 portable, 1 AVX2, 2 AVX-512; lowered to what the binary and the processor have
  int64_t threads;  // as many OpenMP threads at most
  int64_t count;    // elements of each tensor
  const void* x;
  const void* grad_out;
  void* grad_x;
};

namespace volo {

#define VOLO_DECLARE(ISA)                    \
  namespace ISA {                            \
  void gelu_backward(const GeluCall& call);  \
  }
VOLO_DECLARE(portable)
#if defined(__x86_64__)
VOLO_DECLARE(avx2)
VOLO_DECLARE(avx512)
#endif
#undef VOLO_DECLARE

}  // namespace volo
