// The plain C interface of self-attention on a CPU; see outlook_attention.h for why it is plain.
#pragma once

#include <cstdint>

// One call, every field 64 bits wide, in the order that src/volo/ops/cpu_kernel.py fills. Strides count elements; whatever
// has no stride here is contiguous.
struct AttentionCall {
  int64_t dtype;    // 0 float32, 1 bfloat16
  int64_t isa;      // 0 portable, 1 AVX2, 2 AVX-512; lowered to what the binary and the processor have
  int64_t threads;  // as many OpenMP threads at most
  int64_t batch, tokens, heads, head_dim;
  const void* qkv;         // [batch, tokens, 3, heads, head_dim]: queries, keys, values
  int64_t qkv_strides[2];  // of batch and tokens
  void* result;            // forward: [batch, tokens, heads, head_dim]; backward: the gradient of `qkv`, contiguous
  // Backward only:
  const void* grad_out;  // shape of the forward result
  int64_t grad_out_strides[2];
  // Not null: compute nothing, write here how many bytes of scratch all threads together would take.
  int64_t* scratch_bytes;
};

namespace volo {

// Both return 0, or 1 when there was no memory for the scratch of the threads.
#define VOLO_DECLARE(ISA)                                           \
  namespace ISA {                                                   \
  int attention_forward(const AttentionCall& call, double scale);   \
  int attention_backward(const AttentionCall& call, double scale);  \
  }
VOLO_DECLARE(portable)
#if defined(__x86_64__)
VOLO_DECLARE(avx2)
VOLO_DECLARE(avx512)
#endif
#undef VOLO_DECLARE

}  // namespace volo
