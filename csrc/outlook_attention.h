// The plain C interface of the CPU kernels: no PyTorch, no Python, so one binary serves every version of both.
#pragma once

#include <cstdint>

// One call. Every field is 64 bits wide, so that a caller can fill it as an array of 64-bit integers; the order is the
// contract with src/volo/ops/cpu_kernel.py and `kInterfaceVersion` changes with it.
// Strides count elements. The last dimension of `value` and `grad_out` and the last two of `logits` are contiguous;
// what is written (`result`, `grad_logits`) is contiguous throughout.
struct OutlookCall {
  int64_t dtype;    // 0 float32, 1 bfloat16, 2 float64
  int64_t isa;      // 0 portable, 1 AVX2, 2 AVX-512; lowered to what the binary and the processor have
  int64_t threads;  // as many OpenMP threads at most
  int64_t batch, height, width, heads, head_dim;
  int64_t rows, columns;  // windows, downwards and across
  int64_t kernel, stride, padding;
  const void* value;   // [batch, height, width, heads, head_dim]
  const void* logits;  // [batch, rows, columns, heads, kernel^2, kernel^2]
  void* result;        // forward: the output; backward: the gradient of `value`. Shape of `value`
  int64_t value_strides[4];
  int64_t logits_strides[4];
  // Backward only:
  const void* grad_out;  // shape of `value`
  int64_t grad_out_strides[4];
  void* grad_logits;  // shape of `logits`
  // Not null: compute nothing, write here how many bytes of scratch all threads together would take.
  int64_t* scratch_bytes;
};

// Of this struct, of AttentionCall in self_attention.h and of GeluCall in gelu.h.
constexpr int64_t kInterfaceVersion = 4;

namespace volo {

// Both return 0, or 1 when there was no memory for the scratch of the threads.
#define VOLO_DECLARE(ISA)                                       \
  namespace ISA {                                               \
  int outlook_forward(const OutlookCall& call, double scale);   \
  int outlook_backward(const OutlookCall& call, double scale);  \
  }
VOLO_DECLARE(portable)
#if defined(__x86_64__)
VOLO_DECLARE(avx2)
VOLO_DECLARE(avx512)
#endif
#undef VOLO_DECLARE

}  // namespace volo
