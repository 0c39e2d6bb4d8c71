// Calls the kernels on buffers that end where their tensors end, so that a memory checker sees every element too many:
//
//   c++ -std=c++17 -O1 -g -fopenmp -fsanitize=address,undefined -fno-sanitize-recover -Wno-psabi -c (each source, with
//   the flags that setup.py gives it); c++ -fopenmp -fsanitize=address,undefined *.o -o memcheck; ./memcheck
//
// `pytest -m slow tests/ops/test_cpu_kernel.py` does this. Gradients are compared between the instruction sets.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "gelu.h"
#include "outlook_attention.h"
#include "self_attention.h"

extern "C" int volo_outlook_forward(const OutlookCall* call, double scale);
extern "C" int volo_outlook_backward(const OutlookCall* call, double scale);
extern "C" int volo_attention_forward(const AttentionCall* call, double scale);
extern "C" int volo_attention_backward(const AttentionCall* call, double scale);
extern "C" void volo_gelu_backward(const GeluCall* call);
extern "C" int64_t volo_best_isa();

namespace {

struct Geometry {
  int64_t batch, height, width, heads, head_dim, kernel, stride, padding;
};

constexpr int64_t kBytes[] = {4, 2, 8};

// A tensor of random numbers in [-2, 2) (bfloat16: cut off), in memory of exactly its size.
std::vector<char> numbers(int64_t count, int64_t dtype, uint32_t& seed) {
  std::vector<char> memory(count * kBytes[dtype]);
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const double x = seed / 1073741824.0 - 2.0;
    const float f = (float)x;
    if (dtype == 0) memcpy(&memory[i * 4], &f, 4);
    if (dtype == 1) memcpy(&memory[i * 2], (const char*)&f + 2, 2);
    if (dtype == 2) memcpy(&memory[i * 8], &x, 8);
  }
  memory.shrink_to_fit();
  return memory;
}

double element(const std::vector<char>& memory, int64_t i, int64_t dtype) {
  double x = 0;
  float f = 0;
  if (dtype == 2) return memcpy(&x, &memory[i * 8], 8), x;
  if (dtype == 0)
    memcpy(&f, &memory[i * 4], 4);
  else
    memcpy((char*)&f + 2, &memory[i * 2], 2);
  return f;
}

double largest_difference(const std::vector<char>& a, const std::vector<char>& b, int64_t dtype) {
  double largest = 0;
  for (size_t i = 0; i < a.size() / kBytes[dtype]; ++i) {
    const double difference = std::fabs(element(a, i, dtype) - element(b, i, dtype));
    if (!(difference <= largest)) largest = difference;  // NaN counts
  }
  return largest;
}

bool check(const Geometry& g, int64_t dtype, int64_t threads) {
  uint32_t seed = 1;
  OutlookCall call = {};
  call.dtype = dtype;
  call.threads = threads;
  call.batch = g.batch, call.height = g.height, call.width = g.width, call.heads = g.heads, call.head_dim = g.head_dim;
  call.kernel = g.kernel, call.stride = g.stride, call.padding = g.padding;
  call.rows = (g.height + 2 * g.padding - g.kernel) / g.stride + 1;
  call.columns = (g.width + 2 * g.padding - g.kernel) / g.stride + 1;
  const int64_t window = g.kernel * g.kernel * g.kernel * g.kernel;
  const int64_t tokens = g.batch * g.height * g.width * g.heads * g.head_dim;
  const int64_t logit_count = g.batch * call.rows * call.columns * g.heads * window;
  const int64_t token_strides[] = {g.height * g.width * g.heads * g.head_dim, g.width * g.heads * g.head_dim,
                                   g.heads * g.head_dim, g.head_dim};
  const int64_t window_strides[] = {call.rows * call.columns * g.heads * window, call.columns * g.heads * window,
                                    g.heads * window, window};
  memcpy(call.value_strides, token_strides, sizeof token_strides);
  memcpy(call.grad_out_strides, token_strides, sizeof token_strides);
  memcpy(call.logits_strides, window_strides, sizeof window_strides);
  const auto value = numbers(tokens, dtype, seed), grad = numbers(tokens, dtype, seed);
  const auto logits = numbers(logit_count, dtype, seed);
  call.value = value.data(), call.logits = logits.data(), call.grad_out = grad.data();

  std::vector<char> first[3];
  for (int64_t isa = 0; isa <= volo_best_isa(); ++isa) {
    call.isa = isa;
    std::vector<char> results[3] = {numbers(tokens, dtype, seed), numbers(tokens, dtype, seed),
                                    numbers(logit_count, dtype, seed)};
    call.result = results[0].data();
    if (volo_outlook_forward(&call, 0.5)) return false;
    call.result = results[1].data();
    call.grad_logits = results[2].data();
    if (volo_outlook_backward(&call, 0.5)) return false;
    for (int r = 0; r < 3; ++r) {
      if (isa == 0) first[r] = results[r];
      if (!(largest_difference(first[r], results[r], dtype) <= (dtype == 1 ? 0.25 : 1e-4))) {
        std::printf("result %d of instruction set %d differs: dtype %d, kernel %d, stride %d, head_dim %d\n", r, (int)isa,
                    (int)dtype, (int)g.kernel, (int)g.stride, (int)g.head_dim);
        return false;
      }
    }
  }
  return true;
}

struct Sequence {
  int64_t batch, tokens, heads, head_dim;
};

bool check(const Sequence& q, int64_t dtype, int64_t threads) {
  uint32_t seed = 1;
  AttentionCall call = {};
  call.dtype = dtype;
  call.threads = threads;
  call.batch = q.batch, call.tokens = q.tokens, call.heads = q.heads, call.head_dim = q.head_dim;
  const int64_t width = q.heads * q.head_dim, count = q.batch * q.tokens * width;
  call.qkv_strides[0] = 3 * q.tokens * width, call.qkv_strides[1] = 3 * width;
  call.grad_out_strides[0] = q.tokens * width, call.grad_out_strides[1] = width;
  const auto qkv = numbers(3 * count, dtype, seed), grad = numbers(count, dtype, seed);
  call.qkv = qkv.data();
  std::vector<char> first[2];
  for (int64_t isa = 0; isa <= volo_best_isa(); ++isa) {
    call.isa = isa;
    std::vector<char> results[2] = {numbers(count, dtype, seed), numbers(3 * count, dtype, seed)};
    call.result = results[0].data();
    call.grad_out = nullptr;
    if (volo_attention_forward(&call, 0.25)) return false;
    call.result = results[1].data();
    call.grad_out = grad.data();
    if (volo_attention_backward(&call, 0.25)) return false;
    for (int r = 0; r < 2; ++r) {
      if (isa == 0) first[r] = results[r];
      if (!(largest_difference(first[r], results[r], dtype) <= (dtype == 1 ? 0.25 : 1e-3))) {
        std::printf("self-attention, result %d of instruction set %d differs: dtype %d, tokens %d, head_dim %d\n", r,
                    (int)isa, (int)dtype, (int)q.tokens, (int)q.head_dim);
        return false;
      }
    }
  }
  return true;
}

bool check(int64_t count, int64_t dtype, int64_t threads) {
  uint32_t seed = 1;
  const auto x = numbers(count, dtype, seed), grad = numbers(count, dtype, seed);
  GeluCall call = {};
  call.dtype = dtype, call.threads = threads, call.count = count;
  call.x = x.data(), call.grad_out = grad.data();
  std::vector<char> first;
  for (int64_t isa = 0; isa <= volo_best_isa(); ++isa) {
    call.isa = isa;
    std::vector<char> result = numbers(count, dtype, seed);
    call.grad_x = result.data();
    volo_gelu_backward(&call);
    if (isa == 0) first = result;
    if (!(largest_difference(first, result, dtype) <= (dtype == 1 ? 0.05 : 1e-5))) {
      std::printf("GELU of instruction set %d differs: dtype %d, count %d\n", (int)isa, (int)dtype, (int)count);
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  const Geometry geometries[] = {
      {1, 8, 8, 2, 32, 3, 2, 1},  {2, 7, 5, 3, 32, 3, 1, 1},  {1, 9, 9, 1, 16, 3, 2, 1}, {1, 5, 6, 2, 48, 3, 2, 0},
      {1, 6, 6, 2, 12, 3, 2, 2},  {2, 5, 5, 1, 1, 3, 1, 1},   {1, 9, 8, 2, 7, 5, 2, 2},  {1, 8, 9, 1, 64, 5, 3, 4},
      {1, 10, 9, 2, 20, 2, 3, 1}, {1, 4, 4, 1, 32, 1, 1, 0},  {1, 6, 7, 2, 9, 4, 2, 3},  {1, 12, 11, 1, 32, 3, 5, 1},
      {3, 1, 1, 1, 33, 3, 1, 1},  {1, 10, 10, 1, 8, 7, 1, 3}, {0, 4, 4, 1, 32, 3, 1, 1}, {1, 3, 3, 13, 32, 3, 2, 1},
  };
  int checked = 0;
  for (const Geometry& g : geometries)
    for (int64_t dtype = 0; dtype < 3; ++dtype)
      for (int64_t threads : {1, 3}) {
        if (!check(g, dtype, threads)) return 1;
        ++checked;
      }
  const Sequence sequences[] = {{1, 49, 2, 32}, {2, 7, 1, 20}, {1, 1, 3, 1}, {1, 33, 1, 48}, {1, 70, 1, 7}, {0, 4, 1, 8}};
  for (const Sequence& q : sequences)
    for (int64_t dtype = 0; dtype < 2; ++dtype)
      for (int64_t threads : {1, 5}) {
        if (!check(q, dtype, threads)) return 1;
        ++checked;
      }
  for (int64_t count : {0, 1, 15, 16, 63, 65, 1000, 40001})
    for (int64_t dtype = 0; dtype < 2; ++dtype)
      for (int64_t threads : {1, 3}) {
        if (!check(count, dtype, threads)) return 1;
        ++checked;
      }
  std::printf("%d cases\n", checked);
  return 0;
}
