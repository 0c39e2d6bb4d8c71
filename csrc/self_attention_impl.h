// Self-attention over a few hundred tokens and its gradient, included once per instruction set like
// outlook_attention_impl.h.
//
// What makes it fast at this size. Queries, keys and values are read where the projection left them and the result is
// written as the next projection wants it: nothing is permuted in memory. A thread owns one head of one picture, whose
// keys and values fit into the second-level cache as floats; against them it takes a block of queries at a time, so the
// rows of the softmax are whole when they are needed, no running maximum is corrected, and the backward pass needs
// neither the result nor a log-sum of the forward pass. Every product is one micro-kernel that keeps its sums in
// registers. Heads are independent: results do not depend on the number of threads.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "self_attention.h"
#include "vectors.h"

namespace volo {
namespace VOLO_ISA {
namespace {

// ---- products ----

// Rows and vectors of sums that a micro-kernel holds: they, a row of vectors and a factor fill the registers.
constexpr int kRows = VOLO_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kVectors = VOLO_VECTOR_BYTES == 64 ? 3 : 2;
constexpr int kLanes = Lanes<float>::count;
constexpr int64_t kQueries = 32;  // queries of a block, a multiple of kRows

// A factor of a product in scratch: element (r, k) lies at data[r * row + k * step].
struct Factor {
  const float* data;
  int64_t row, step;
};

// to[r, :] = sum over k of a(r, k) * b[k, :] for kRows rows, NV vectors wide.
template <int NV, bool kAdd>
VOLO_INLINE void micro(const Factor& a, const float* b, int64_t b_row, int64_t depth, float* to, int64_t to_row) {
  Vec<float> sum[kRows][NV];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < NV; ++v) sum[r][v] = kAdd ? load(to + r * to_row + v * kLanes) : Vec<float>{};
  const float* factors = a.data;
  for (int64_t k = 0; k < depth; ++k, b += b_row, factors += a.step) {
    Vec<float> x[NV];
    for (int v = 0; v < NV; ++v) x[v] = load(b + v * kLanes);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < NV; ++v) sum[r][v] += x[v] * factors[r * a.row];
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < NV; ++v) store(to + r * to_row + v * kLanes, sum[r][v]);
}

// to[rows, columns] = (kAdd: +=) a[rows, depth] b[depth, columns]. Rows are padded to kRows and columns to vectors, in
// `a` and `to` alike. Columns outside: a panel of b stays in the first-level cache while the rows stream past.
template <bool kAdd>
void multiply(Factor a, const float* b, int64_t b_row, int64_t rows, int64_t depth, int64_t columns, float* to,
              int64_t to_row) {
  for (int64_t c = 0; c < columns;) {
    const int64_t left = (columns - c + kLanes - 1) / kLanes;
    const int64_t vectors = left < kVectors ? left : kVectors;
    for (int64_t r = 0; r < rows; r += kRows) {
      const Factor at = {a.data + r * a.row, a.row, a.step};
      float* place = to + r * to_row + c;
      if (vectors == 1)
        micro<1, kAdd>(at, b + c, b_row, depth, place, to_row);
      else if (vectors == 2 || kVectors == 2)
        micro<2, kAdd>(at, b + c, b_row, depth, place, to_row);
      else
        micro<kVectors, kAdd>(at, b + c, b_row, depth, place, to_row);
    }
    c += vectors * kLanes;
  }
}

// ---- softmax ----

// x = exp(x - its largest), with zeros behind `length`; returns the sum.
VOLO_INLINE float exponentials_of_row(float* x, int64_t length, int64_t padded) {
  Vec<float> largest = load_part<float>(x, length < kLanes ? length : kLanes);
  for (int64_t l = length; l < kLanes; ++l) largest[l] = x[0];
  int64_t i = kLanes;
  for (; i + kLanes <= length; i += kLanes) {
    const Vec<float> v = load(x + i);
    largest = v > largest ? v : largest;
  }
  float top = largest[0];
  for (int l = 1; l < kLanes; ++l) top = largest[l] > top ? largest[l] : top;
  for (; i < length; ++i) top = x[i] > top ? x[i] : top;

  const Exponent natural(1.0);
  Vec<float> total = {};
  for (i = 0; i + kLanes <= length; i += kLanes) {
    const Vec<float> e = exp_negative(load(x + i) - top, natural);
    store(x + i, e);
    total += e;
  }
  if (i < length) {
    float part[kLanes];
    store(part, exp_negative(load(x + i) - top, natural));
    for (int64_t l = length - i; l < kLanes; ++l) part[l] = 0.0f;
    store(x + i, load(part));
    total += load(part);
    i += kLanes;
  }
  for (; i < padded; i += kLanes) store(x + i, Vec<float>{});
  return sum_lanes<float>(total);
}

// ---- one call ----

// What a thread needs: the head at hand, and a block of queries.
struct AttentionScratch {
  float *keys_across, *values_across;  // [head_dim, padded tokens]
  float *keys, *values;                // [padded tokens, width]
  float *queries, *grads;              // [kQueries, width], the queries times scale
  float *weights, *slopes;             // [kQueries, padded tokens]: softmax, gradient of its logits
  float* sums;                         // [kQueries, width]
  float *grad_keys, *grad_values;      // as keys
};

template <class T, bool kBackward>
struct Attention {
  const AttentionCall& c;
  const float scale;
  const int64_t D = c.head_dim, N = c.tokens;
  const int64_t width = (D + kLanes - 1) / kLanes * kLanes;
  const int64_t padded = (N + kLanes - 1) / kLanes * kLanes;  // a multiple of kRows too
  int64_t parts = 1;                                          // of the queries of a head
  int64_t threads = 1;

  Attention(const AttentionCall& call, double factor) : c(call), scale((float)factor) {
    static_assert(kLanes % kRows == 0 && kQueries % kRows == 0, "tokens padded to vectors are padded to rows");
    const int64_t heads = c.batch * c.heads, blocks = (N + kQueries - 1) / kQueries;
    // Few heads: several threads share one, each with its own copy of keys and values. Not in the backward pass, where
    // they would add to the same gradients.
    if (!kBackward && heads > 0) parts = (c.threads + heads - 1) / heads;
    if (parts > blocks) parts = blocks;
    if (parts < 1) parts = 1;
    threads = c.threads < heads * parts ? c.threads : heads * parts;
    if (threads < 1) threads = 1;
  }

  int64_t lay_out(AttentionScratch& s, float* base) const {
    int64_t used = 0;
    const auto take = [&](float*& field, bool needed, int64_t count) {
      field = base ? base + used : nullptr;
      if (needed) used += (count + 15) / 16 * 16;
    };
    take(s.keys_across, true, D * padded);
    take(s.values_across, kBackward, D * padded);
    take(s.keys, kBackward, padded * width);
    take(s.values, !kBackward, padded * width);
    take(s.queries, true, kQueries * width);
    take(s.grads, kBackward, kQueries * width);
    take(s.weights, true, kQueries * padded);
    take(s.slopes, kBackward, kQueries * padded);
    take(s.sums, true, kQueries * width);
    take(s.grad_keys, kBackward, padded * width);
    take(s.grad_values, kBackward, padded * width);
    return used;
  }

  int run() const {
    AttentionScratch measured;
    const int64_t floats = lay_out(measured, nullptr);
    if (c.scratch_bytes != nullptr) {
      *c.scratch_bytes = floats * threads * (int64_t)sizeof(float);
      return 0;
    }
    if (c.batch * N * c.heads * D == 0) return 0;
    float* memory = static_cast<float*>(aligned_alloc(64, floats * threads * sizeof(float)));
    if (memory == nullptr) return 1;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
    work(memory + floats * omp_get_thread_num(), omp_get_thread_num(), omp_get_num_threads());
#else
    work(memory, 0, 1);
#endif
    free(memory);
    return 0;
  }

  void work(float* memory, int64_t thread, int64_t of) const {
    AttentionScratch s;
    lay_out(s, memory);
    const int64_t total = c.batch * c.heads * parts, blocks = (N + kQueries - 1) / kQueries;
    for (int64_t at = total * thread / of; at < total * (thread + 1) / of; ++at) {
      const int64_t part = at % parts, head = at / parts % c.heads, picture = at / parts / c.heads;
      const T* qkv = static_cast<const T*>(c.qkv) + picture * c.qkv_strides[0] + head * D;
      const T *queries = qkv, *keys = qkv + c.heads * D, *values = qkv + 2 * c.heads * D;
      pack_across(keys, s.keys_across);
      if constexpr (kBackward) {
        pack_across(values, s.values_across);
        pack(keys, c.qkv_strides[1], N, 1.0f, s.keys);
        memset(s.grad_keys, 0, padded * width * sizeof(float));
        memset(s.grad_values, 0, padded * width * sizeof(float));
      } else {
        pack(values, c.qkv_strides[1], N, 1.0f, s.values);
      }
      const int64_t first = blocks * part / parts * kQueries, end = blocks * (part + 1) / parts * kQueries;
      for (int64_t q = first; q < end && q < N; q += kQueries) {
        const int64_t rows = N - q < kQueries ? N - q : kQueries;
        pack(queries + q * c.qkv_strides[1], c.qkv_strides[1], rows, scale, s.queries);
        if constexpr (kBackward)
          backward_block(s, picture, head, q, rows);
        else
          forward_block(s, picture, head, q, rows);
      }
      if constexpr (kBackward) {
        T* grad = static_cast<T*>(c.result) + (picture * N * 3 * c.heads + head) * D;
        unpack(s.grad_keys, N, 1.0f, grad + c.heads * D, 3 * c.heads * D);
        unpack(s.grad_values, N, 1.0f, grad + 2 * c.heads * D, 3 * c.heads * D);
      }
    }
  }

  void forward_block(const AttentionScratch& s, int64_t picture, int64_t head, int64_t q, int64_t rows) const {
    multiply<false>({s.queries, width, 1}, s.keys_across, padded, rows, D, N, s.weights, padded);
    float inverse[kQueries];
    for (int64_t r = 0; r < rows; ++r) inverse[r] = 1.0f / exponentials_of_row(s.weights + r * padded, N, padded);
    multiply<false>({s.weights, padded, 1}, s.values, width, rows, N, D, s.sums, width);
    T* to = static_cast<T*>(c.result) + ((picture * N + q) * c.heads + head) * D;
    for (int64_t r = 0; r < rows; ++r) unpack(s.sums + r * width, 1, inverse[r], to + r * c.heads * D, 0);
  }

  // With P the softmax and G the gradient of the result:
  //   dV = P^T G,  dP = G V^T,  dS = P (dP - sum over keys of P dP),  dQ = scale dS K,  dK = dS^T (scale Q)
  void backward_block(const AttentionScratch& s, int64_t picture, int64_t head, int64_t q, int64_t rows) const {
    const T* grad_out = static_cast<const T*>(c.grad_out) + picture * c.grad_out_strides[0] + head * D;
    pack(grad_out + q * c.grad_out_strides[1], c.grad_out_strides[1], rows, 1.0f, s.grads);
    multiply<false>({s.queries, width, 1}, s.keys_across, padded, rows, D, N, s.weights, padded);
    multiply<false>({s.grads, width, 1}, s.values_across, padded, rows, D, N, s.slopes, padded);
    for (int64_t r = 0; r < rows; ++r) {
      float *p = s.weights + r * padded, *slope = s.slopes + r * padded;
      const float inverse = 1.0f / exponentials_of_row(p, N, padded);
      Vec<float> total = {};
      for (int64_t i = 0; i < padded; i += kLanes) {
        const Vec<float> weight = load(p + i) * inverse;
        store(p + i, weight);
        total += weight * load(slope + i);
      }
      const float shared = sum_lanes<float>(total);
      for (int64_t i = 0; i < padded; i += kLanes) store(slope + i, load(p + i) * (load(slope + i) - shared));
    }
    multiply<true>({s.weights, 1, padded}, s.grads, width, N, rows, D, s.grad_values, width);
    multiply<true>({s.slopes, 1, padded}, s.queries, width, N, rows, D, s.grad_keys, width);
    multiply<false>({s.slopes, padded, 1}, s.keys, width, rows, N, D, s.sums, width);
    T* to = static_cast<T*>(c.result) + ((picture * N + q) * 3 * c.heads + head) * D;
    unpack(s.sums, rows, scale, to, 3 * c.heads * D);
  }

  // [rows, D] of T to [rows, width] of float times factor; zeros behind D, and up to the next multiple of kRows below.
  void pack(const T* from, int64_t stride, int64_t rows, float factor, float* to) const {
    for (int64_t r = 0; r < rows; ++r, from += stride, to += width) {
      int64_t d = 0;
      for (; d + kLanes <= D; d += kLanes) store(to + d, load(from + d) * factor);
      if (d < D) store(to + d, load_part<float>(from + d, D - d) * factor);
    }
    for (; rows % kRows; ++rows, to += width) memset(to, 0, width * sizeof(float));
  }

  // [rows, width] of float times factor to [rows, D] of T.
  void unpack(const float* from, int64_t rows, float factor, T* to, int64_t stride) const {
    for (int64_t r = 0; r < rows; ++r, from += width, to += stride) {
      int64_t d = 0;
      for (; d + kLanes <= D; d += kLanes) store(to + d, load(from + d) * factor);
      if (d < D) store_part(to + d, load(from + d) * factor, D - d);
    }
  }

  // Keys or values [N, D] of T to [D, padded] of float, zeros behind N.
  void pack_across(const T* from, float* to) const {
    for (int64_t first = 0; first < padded; first += kLanes) {
      float tile[kLanes][kLanes];
      for (int64_t d = 0; d < D; d += kLanes) {
        const int64_t wide = D - d < kLanes ? D - d : kLanes;
        for (int64_t n = 0; n < kLanes; ++n) {
          const T* row = from + (first + n) * c.qkv_strides[1] + d;
          if (first + n >= N)
            store(tile[n], Vec<float>{});
          else if (wide == kLanes)
            store(tile[n], load(row));
          else
            store(tile[n], load_part<float>(row, wide));
        }
        for (int64_t l = 0; l < wide; ++l)
          for (int64_t n = 0; n < kLanes; ++n) to[(d + l) * padded + first + n] = tile[n][l];
      }
    }
  }
};

template <bool kBackward>
int run_attention(const AttentionCall& call, double scale) {
  if (call.dtype == 0) return Attention<float, kBackward>(call, scale).run();
  return Attention<Bf16, kBackward>(call, scale).run();
}

}  // namespace

int attention_forward(const AttentionCall& call, double scale) { return run_attention<false>(call, scale); }

int attention_backward(const AttentionCall& call, double scale) { return run_attention<true>(call, scale); }

}  // namespace VOLO_ISA
}  // namespace volo
