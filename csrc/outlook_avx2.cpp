#if defined(__x86_64__)
#define VOLO_ISA avx2
#define VOLO_VECTOR_BYTES 32
#define VOLO_VECTORS_HELD 1  // 9 keys of one vector each leave room for the sums in 16 registers
#include "gelu_impl.h"
#include "outlook_attention_impl.h"
#include "self_attention_impl.h"
#endif
