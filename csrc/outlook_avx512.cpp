#if defined(__x86_64__)
#define VOLO_ISA avx512
#define VOLO_VECTOR_BYTES 64
#define VOLO_VECTORS_HELD 2  // 9 keys of two vectors each leave room for the sums in 32 registers
#include "gelu_impl.h"
#include "outlook_attention_impl.h"
#include "self_attention_impl.h"
#endif
