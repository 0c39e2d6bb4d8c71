// Outlook attention and its gradient, included once per instruction set with VOLO_ISA, VOLO_VECTOR_BYTES and
// VOLO_VECTORS_HELD defined. Everything lives in a namespace of that set and nothing comes from a shared inline
// function: the linker must never take AVX-512 code for a processor that has none.
//
// What makes it fast. Nothing is unfolded. A thread owns a band of output rows and walks its windows in order; of each
// window it takes the softmax of the logits (contiguous for all heads, hence dense vectors), holds the K*K values of a
// head in registers while the K*K queries stream past, and adds the sums where they belong, in rows that are still in
// the cache. A row of logits belongs to exactly one output token, so bands share no work in the forward pass except at
// their borders the loads of the values, and no two threads write to one place. Every token receives its windows in
// the same order whatever the bands, so results do not depend on the number of threads.
//
// Inputs are read and sums are written where they are, if they can be. A head_dim that does not fill whole vectors is
// *padded* in scratch. Sums of bfloat16 stay in float until they are complete: they (and padded ones) grow in a *ring*
// of K rows, and leave it with their last term.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "outlook_attention.h"
#include "vectors.h"

namespace volo {
namespace VOLO_ISA {
namespace {

// ---- softmax ----

// Largest of a row times scale; exp of the rest relative to it. For logits too wide for exp_plain, and for masks of -inf.
template <class T>
void exp_shifted(const T* logits, int64_t rows, int64_t length, double scale, float* e) {
  constexpr int W = Lanes<float>::count;
  const float factor = (float)scale;
  for (int64_t r = 0; r < rows; ++r) {
    float largest = widen(logits[r * length]) * factor;
    for (int64_t k = 0; k < length; ++k) {
      const float x = widen(logits[r * length + k]) * factor;
      e[r * length + k] = x;
      if (x > largest) largest = x;
    }
    for (int64_t k = 0; k < length; ++k) e[r * length + k] -= largest;
  }
  const Exponent natural(1.0);
  for (int64_t i = 0; i < rows * length; i += W) store(e + i, exp_negative(load(e + i), natural));
}

template <class T>
VOLO_INLINE void exponentials(const T* logits, int64_t rows, int64_t length, double scale, float* e) {
  constexpr int W = Lanes<float>::count;
  const int64_t n = rows * length;
  if (length == 1) {  // the softmax is one, not a number times its inverse; NaN for NaN and infinities
    for (int64_t i = 0; i < n; ++i) e[i] = widen(logits[i]) - widen(logits[i]) + 1.0f;
    return;
  }
  const Exponent exponent(scale);
  Bits widest = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) store(e + i, exp_plain(load(logits + i), exponent, widest));
  if (i < n) store(e + i, exp_plain(load_part<float>(logits + i, n - i), exponent, widest));
  uint32_t largest = 0;
  for (int l = 0; l < W; ++l) largest = widest[l] > largest ? widest[l] : largest;
  if (__builtin_expect(largest > 2 * kPlainExponent, 0)) exp_shifted(logits, rows, length, scale, e);
}

VOLO_INLINE void exponentials(const double* logits, int64_t rows, int64_t length, double scale, double* e) {
  for (int64_t r = 0; r < rows; ++r) {
    double largest = logits[r * length] * scale;
    for (int64_t k = 1; k < length; ++k) {
      const double x = logits[r * length + k] * scale;
      if (x > largest) largest = x;
    }
    for (int64_t k = 0; k < length; ++k) e[r * length + k] = exp(logits[r * length + k] * scale - largest);
  }
}

// Sums of the rows of x. Rows of nine are shorter than a vector: sums of three neighbours, then of three such sums,
// taken at all positions at once, cost four additions a vector; every ninth is one that is wanted. `scratch` is as large
// as x, and may be x.
template <int KK, class A>
VOLO_INLINE void row_sums(const A* x, int64_t rows, int64_t length, A* scratch, A* sums) {
  constexpr int W = Lanes<A>::count;
  if constexpr (KK == 9) {
    const int64_t n = rows * 9;
    for (int64_t i = 0; i < n; i += W) store(scratch + i, load(x + i) + load(x + i + 1) + load(x + i + 2));
    for (int64_t i = 0; i < n; i += W)
      store(scratch + i, load(scratch + i) + load(scratch + i + 3) + load(scratch + i + 6));
    for (int64_t r = 0; r < rows; ++r) sums[r] = scratch[r * 9];
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      const A* row = x + r * length;
      Vec<A> total = {};
      int64_t k = 0;
      for (; k + W <= length; k += W) total += load(row + k);
      A sum = sum_lanes<A>(total);
      for (; k < length; ++k) sum += row[k];
      sums[r] = sum;
    }
  }
}

// e = exp(scale * logits - something of the row), inverse = 1 / its row sums: the softmax is their product, which nobody forms.
template <int KK, class T, class A>
VOLO_INLINE void softmax_rows(const T* logits, int64_t rows, int64_t length, double scale, A* e, A* scratch, A* inverse) {
  constexpr int W = Lanes<A>::count;
  exponentials(logits, rows, length, scale, e);
  row_sums<KK>(e, rows, length, scratch, inverse);
  for (int64_t r = 0; r < rows; r += W) store(inverse + r, (A)1 / load(inverse + r));
}

// ---- products ----

// Where the sums of the tokens of a window go, [KK] each.
template <class T, class A>
struct Places {
  A** sums;     // they grow here; null: this token is not wanted
  T** results;  // with a ring: here once they are complete, null before that
  bool* fresh;  // nothing has been added yet
};

// Adds `term` to elements d.. of token o. `room`: elements up to the end of the token.
template <bool kRing, bool kPadded, class T, class A>
VOLO_INLINE void add(const Places<T, A>& places, int64_t o, int64_t d, int64_t room, Vec<A> term) {
  constexpr int W = Lanes<A>::count;
  A* place = places.sums[o] + d;
  if (!places.fresh[o]) term += load(place);
  if constexpr (kRing) {
    if (T* result = places.results[o]) {
      if (kPadded && room < W)
        store_part(result + d, term, room);
      else
        store(result + d, term);
      return;
    }
  }
  store(place, term);
}

// sums[o] += inverse[o] * sum over i of weight(o, i) * in[i], NV vectors wide, for the tokens that are wanted. weight is
// [KK, KK], or its transpose, which needs no inverse.
template <int NV, bool kTransposed, bool kRing, bool kPadded, class S, class T, class A>
VOLO_INLINE void mix_nine(const S* const* in, const A* weight, const A* inverse, const Places<T, A>& places, int64_t d,
                          int64_t head_dim) {
  constexpr int W = Lanes<A>::count;
  Vec<A> held[9][NV];
  for (int i = 0; i < 9; ++i)
    for (int v = 0; v < NV; ++v) held[i][v] = load(in[i] + d + v * W);
  for (int o = 0; o < 9; ++o) {
    if (places.sums[o] == nullptr) continue;
    Vec<A> sum[NV];
    for (int v = 0; v < NV; ++v) sum[v] = held[0][v] * weight[kTransposed ? o : o * 9];
    for (int i = 1; i < 9; ++i)
      for (int v = 0; v < NV; ++v) sum[v] += held[i][v] * weight[kTransposed ? i * 9 + o : o * 9 + i];
    for (int v = 0; v < NV; ++v)
      add<kRing, kPadded>(places, o, d + v * W, head_dim - d - v * W, kTransposed ? sum[v] : sum[v] * inverse[o]);
  }
}

template <int NV, bool kTransposed, bool kRing, bool kPadded, class S, class T, class A>
VOLO_INLINE void mix_any(const S* const* in, const A* weight, const A* inverse, const Places<T, A>& places,
                         int64_t length, int64_t d, int64_t head_dim) {
  constexpr int W = Lanes<A>::count;
  constexpr int kAtOnce = 4;
  const int64_t along = kTransposed ? length : 1, across = kTransposed ? 1 : length;
  for (int64_t o = 0; o < length; o += kAtOnce) {
    const int64_t count = length - o < kAtOnce ? length - o : kAtOnce;
    Vec<A> sum[kAtOnce][NV] = {};
    const A* w[kAtOnce];
    for (int64_t q = 0; q < kAtOnce; ++q) w[q] = weight + (o + (q < count ? q : 0)) * across;
    for (int64_t i = 0; i < length; ++i)
      for (int v = 0; v < NV; ++v) {
        const Vec<A> x = load(in[i] + d + v * W);
        for (int q = 0; q < kAtOnce; ++q) sum[q][v] += x * w[q][i * along];
      }
    for (int64_t q = 0; q < count; ++q) {
      if (places.sums[o + q] == nullptr) continue;
      for (int v = 0; v < NV; ++v)
        add<kRing, kPadded>(places, o + q, d + v * W, head_dim - d - v * W,
                            kTransposed ? sum[q][v] : sum[q][v] * inverse[o + q]);
    }
  }
}

template <int KK, bool kTransposed, bool kRing, bool kPadded, class S, class T, class A>
VOLO_INLINE void mix(const S* const* in, const A* weight, const A* inverse, const Places<T, A>& places, int64_t length,
                     int64_t head_dim) {
  constexpr int W = Lanes<A>::count, NV = VOLO_VECTORS_HELD;
  const int64_t width = (head_dim + W - 1) / W * W;
  int64_t d = 0;
  if constexpr (KK == 9) {
    for (; d + NV * W <= width; d += NV * W)
      mix_nine<NV, kTransposed, kRing, kPadded>(in, weight, inverse, places, d, head_dim);
    for (; d < width; d += W) mix_nine<1, kTransposed, kRing, kPadded>(in, weight, inverse, places, d, head_dim);
  } else {
    for (; d + NV * W <= width; d += NV * W)
      mix_any<NV, kTransposed, kRing, kPadded>(in, weight, inverse, places, length, d, head_dim);
    for (; d < width; d += W) mix_any<1, kTransposed, kRing, kPadded>(in, weight, inverse, places, length, d, head_dim);
  }
}

// Pairwise sums within 16-byte groups (kWithin) or of whole groups: a holds the first half of the items, b the second.
template <class A, bool kWithin, int kOdd, int... I>
VOLO_INLINE Vec<A> every_other(Vec<A> a, Vec<A> b, std::integer_sequence<int, I...>) {
  constexpr int W = Lanes<A>::count, G = 16 / sizeof(A), L = W / G;
  if constexpr (kWithin) {
    // Of each group: the even (odd) elements of a, then those of b.
    return __builtin_shufflevector(a, b, ((I % G) * 2 % G + kOdd + I / G * G + ((I % G) * 2 >= G ? W : 0))...);
  } else {
    return __builtin_shufflevector(
        a, b, ((I / G) * 2 % (L > 1 ? L : 1) * G + kOdd * G + I % G + ((I / G) * 2 >= L ? W : 0))...);
  }
}

// Lane l of the result is the sum of the lanes of leaf(kFirst + l), for N = W; for a smaller N the sums are partial.
// A tree of W - 1 additions instead of W separate reductions.
template <class A, int N, int kFirst, class Leaf>
VOLO_INLINE Vec<A> sums_of(Leaf& leaf) {
  if constexpr (N == 1) {
    return leaf(std::integral_constant<int, kFirst>{});
  } else {
    const Vec<A> a = sums_of<A, N / 2, kFirst>(leaf);
    const Vec<A> b = sums_of<A, N / 2, kFirst + N / 2>(leaf);
    constexpr bool kWithin = N <= 16 / (int)sizeof(A);
    using All = std::make_integer_sequence<int, Lanes<A>::count>;
    return every_other<A, kWithin, 0>(a, b, All{}) + every_other<A, kWithin, 1>(a, b, All{});
  }
}

template <class A, class Leaf, int... kBlock>
VOLO_INLINE void store_all_sums(A* to, Leaf& leaf, std::integer_sequence<int, kBlock...>) {
  constexpr int W = Lanes<A>::count;
  (store(to + kBlock * W, sums_of<A, W, kBlock * W>(leaf)), ...);
}

// dots[q, k] = sum over d of grads[q][d] * keys[k][d]; grads is [9, NV * W] in scratch.
template <int NV, class T, class A>
VOLO_INLINE void dots_nine(const A* grads, const T* const* keys, A* dots) {
  constexpr int W = Lanes<A>::count;
  Vec<A> held[9][NV];
  for (int k = 0; k < 9; ++k)
    for (int v = 0; v < NV; ++v) held[k][v] = load(keys[k] + v * W);
  auto leaf = [&](auto n) __attribute__((always_inline)) {
    constexpr int q = n / 9, k = n % 9;
    Vec<A> sum = load(grads + q * NV * W) * held[k][0];
    for (int v = 1; v < NV; ++v) sum += load(grads + (q * NV + v) * W) * held[k][v];
    return sum;
  };
  store_all_sums(dots, leaf, std::make_integer_sequence<int, 81 / W>{});
  for (int n = 81 / W * W; n < 81; ++n) dots[n] = sum_lanes<A>(leaf(std::integral_constant<int, 80>{}));
}

// The same for any size. length is a square, and the fourth power of an odd number leaves 1 when divided by 16, that of
// an even one 0: at most one product is left over.
template <class T, class A>
VOLO_INLINE void dots_any(const A* grads, const T* const* keys, int64_t length, int64_t width, A* dots) {
  constexpr int W = Lanes<A>::count;
  int64_t q = 0, k = 0;
  auto leaf = [&](auto) __attribute__((always_inline)) {
    const A* g = grads + q * width;
    const T* x = keys[k];
    Vec<A> sum = load(g) * load(x);
    for (int64_t d = W; d < width; d += W) sum += load(g + d) * load(x + d);
    if (++k == length) k = 0, ++q;
    return sum;
  };
  int64_t n = 0;
  for (; n + W <= length * length; n += W) store(dots + n, sums_of<A, W, 0>(leaf));
  for (; n < length * length; ++n) dots[n] = sum_lanes<A>(leaf(std::integral_constant<int, 0>{}));
}

template <int KK, class T, class A>
VOLO_INLINE void dot_products(const A* grads, const T* const* keys, int64_t length, int64_t width, A* dots) {
  constexpr int W = Lanes<A>::count;
  if constexpr (KK == 9) {
    if (width == W) return dots_nine<1>(grads, keys, dots);
    if (width == 2 * W) return dots_nine<2>(grads, keys, dots);
    if (width == 4 * W) return dots_nine<4>(grads, keys, dots);
  }
  dots_any(grads, keys, length, width, dots);
}

// ---- one call ----

// What a thread needs besides inputs and outputs; a few windows' worth.
template <class T, class A>
struct Scratch {
  A *e, *inverse, *sums;              // [heads of a group, KK, KK], [heads of a group, KK], as e
  T *zeros, *padded;                  // [width], [KK, width]
  A* ring;                            // [K, columns of tokens, heads of a group, width]
  A *grads, *dots;                    // [KK, width], as e
  A* totals;                          // as inverse
  const T** in;                       // [KK] where the values of a window are
  const A** grad_rows;                // [KK] where the rows of `grads` are
  Places<T, A> out;                   // where its sums go
  int64_t *in_at, *grad_at;           // [KK] offsets of its tokens, -1 outside
  int64_t *sum_at, *result_at;        // [KK] offsets of its sums and of its results, -1 for none

  char* base;
  size_t used = 0;

  template <class P>
  void take(P*& field, int64_t count) {
    field = base ? reinterpret_cast<P*>(base + used) : nullptr;
    used += (count * sizeof(P) + 63) / 64 * 64;
  }
};

template <class T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};

int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

template <class T, int KK, bool kPadded, bool kBackward>
struct Engine {
  using A = typename Sum<T>::type;
  static constexpr bool kRing = kPadded || !std::is_same<T, A>::value;
  static constexpr int W = Lanes<A>::count;

  const OutlookCall& c;
  const double scale;
  const int64_t K = c.kernel, length = K * K;
  const int64_t width = (c.head_dim + W - 1) / W * W;
  // Windows that leave tokens out between or behind them: those tokens are zero.
  const bool gaps = c.stride > K || (c.rows - 1) * c.stride - c.padding + K < c.height ||
                    (c.columns - 1) * c.stride - c.padding + K < c.width;
  int64_t group = c.heads;  // heads that share a pass over the windows
  int64_t threads = 1;

  Engine(const OutlookCall& call, double factor) : c(call), scale(factor) {
    // Softmax and ring of a group stay well inside the first-level cache, and there is work for every thread.
    const int64_t a_head = length * length * (int64_t)sizeof(A);
    const int64_t ring_of_head = kRing ? K * c.width * width * (int64_t)sizeof(A) : 0;
    while (group > 1 && (group * a_head > 16384 || group * ring_of_head > 98304 ||
                         c.batch * c.height * ceil_div(c.heads, group) < 4 * c.threads))
      group = (group + 1) / 2;
    share_out();
    // On a small input fewer heads at a time, if that keeps the scratch under a percent of the unfolded values.
    const int64_t fastest = group;
    while (group > 1 && takes_too_much()) {
      group = (group + 1) / 2;
      share_out();
    }
    if (takes_too_much()) {
      group = fastest;
      share_out();
    }
  }

  void share_out() {
    const int64_t units = c.batch * ceil_div(c.heads, group) * c.height;
    threads = c.threads < units ? c.threads : units;
    if (threads < 1) threads = 1;
  }

  bool takes_too_much() const {
    Scratch<T, A> measured;
    const int64_t unfolded = c.batch * c.rows * c.columns * length * c.heads * c.head_dim * (int64_t)sizeof(T);
    return 100 * threads * (int64_t)lay_out(measured, nullptr) > unfolded;
  }

  size_t lay_out(Scratch<T, A>& s, char* base) const {
    s.base = base;
    s.used = 0;
    // Whole vectors are read and written at any row: a vector of room behind each, two behind what is summed sideways.
    s.take(s.e, group * length * length + 2 * W);
    s.take(s.sums, group * length * length + 2 * W);
    s.take(s.inverse, group * length + W);
    s.take(s.zeros, width);
    s.take(s.padded, kPadded ? length * width : 0);
    s.take(s.ring, kRing ? K * c.width * group * width : 0);
    s.take(s.grads, kBackward ? length * width : 0);
    s.take(s.dots, kBackward ? group * length * length + 2 * W : 0);
    s.take(s.totals, kBackward ? group * length + W : 0);
    s.take(s.in, length);
    s.take(s.grad_rows, kBackward ? length : 0);
    s.take(s.out.sums, length);
    s.take(s.out.results, length);
    s.take(s.out.fresh, length);
    s.take(s.in_at, length);
    s.take(s.grad_at, length);
    s.take(s.sum_at, length);
    s.take(s.result_at, length);
    return s.used;
  }

  int run() const {
    Scratch<T, A> measured;
    const size_t bytes = lay_out(measured, nullptr);
    if (c.scratch_bytes != nullptr) {
      *c.scratch_bytes = bytes * threads;
      return 0;
    }
    if (c.batch * c.height * c.width * c.heads * c.head_dim == 0) return 0;
    if (gaps) memset(c.result, 0, c.batch * c.height * c.width * c.heads * c.head_dim * sizeof(T));
    char* memory = static_cast<char*>(aligned_alloc(64, bytes * threads));
    if (memory == nullptr) return 1;
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
    work(memory + bytes * omp_get_thread_num(), omp_get_thread_num(), omp_get_num_threads());
#else
    work(memory, 0, 1);
#endif
    free(memory);
    return 0;
  }

  // The share of a thread: a run of rows, counted through the groups of heads and the pictures.
  void work(char* memory, int64_t thread, int64_t of) const {
    Scratch<T, A> s;
    lay_out(s, memory);
    memset(s.zeros, 0, width * sizeof(T));
    for (int64_t q = 0; q < length && kBackward; ++q) s.grad_rows[q] = s.grads + q * width;
    const int64_t groups = ceil_div(c.heads, group);
    const int64_t total = c.batch * groups * c.height;
    int64_t at = total * thread / of;
    const int64_t end = total * (thread + 1) / of;
    while (at < end) {
      const int64_t y = at % c.height, unit = at / c.height;
      const int64_t rows = c.height - y < end - at ? c.height - y : end - at;
      const int64_t head = unit % groups * group;
      const int64_t heads = c.heads - head < group ? c.heads - head : group;
      band(s, unit / groups, head, heads, y, y + rows);
      at += rows;
    }
  }

  // Rows [top, bottom) of the result for `heads` heads of one picture.
  void band(Scratch<T, A>& s, int64_t picture, int64_t head, int64_t heads, int64_t top, int64_t bottom) const {
    const int64_t before = top + c.padding - K;  // the first window that reaches `top` is one that starts behind this row
    const int64_t first = before < 0 ? 0 : before / c.stride + 1;
    const int64_t end = (bottom - 1 + c.padding) / c.stride + 1;
    for (int64_t i = first; i < end && i < c.rows; ++i)
      for (int64_t j = 0; j < c.columns; ++j) window(s, picture, head, heads, top, bottom, i, j);
  }

  // Window (i, j): what it adds to rows [top, bottom), and in the backward pass the gradient of its logits, if its first
  // row inside the picture is one of them.
  void window(Scratch<T, A>& s, int64_t picture, int64_t head, int64_t heads, int64_t top, int64_t bottom, int64_t i,
              int64_t j) const {
    const int64_t y0 = c.stride * i - c.padding, x0 = c.stride * j - c.padding;
    const int64_t first_row = y0 > 0 ? y0 : 0;
    const bool owner = first_row >= top && first_row < bottom;
    for (int64_t a = 0, q = 0; a < K; ++a) {
      const int64_t y = y0 + a;
      for (int64_t b = 0; b < K; ++b, ++q) {
        const int64_t x = x0 + b;
        const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
        const bool wanted = inside && y >= top && y < bottom;
        s.in_at[q] = inside ? y * c.value_strides[1] + x * c.value_strides[2] : -1;
        if constexpr (kBackward) s.grad_at[q] = inside ? y * c.grad_out_strides[1] + x * c.grad_out_strides[2] : -1;
        const int64_t result_at = ((picture * c.height + y) * c.width + x) * c.heads * c.head_dim + head * c.head_dim;
        s.out.fresh[q] = (a + c.stride >= K || i == 0) && (b + c.stride >= K || j == 0);
        if constexpr (kRing) {
          const bool complete = (a < c.stride || i == c.rows - 1) && (b < c.stride || j == c.columns - 1);
          s.sum_at[q] = wanted ? (y % K * c.width + x) * heads * width : -1;
          s.result_at[q] = complete ? result_at : -1;
        } else {
          s.sum_at[q] = wanted ? result_at : -1;
        }
      }
    }

    const T* logits = static_cast<const T*>(c.logits) + picture * c.logits_strides[0] + i * c.logits_strides[1] +
                      j * c.logits_strides[2] + head * c.logits_strides[3];
    int64_t from = 0, to = length;  // rows of logits that are wanted
    if (!kBackward) {
      if (top > y0) from = (top - y0) * K;
      if (bottom < y0 + K) to = (bottom - y0) * K;
    }
    if (from == 0 && to == length && c.logits_strides[3] == length * length) {
      softmax_rows<KK>(logits, heads * length, length, scale, s.e, s.sums, s.inverse);
    } else {
      for (int64_t n = 0; n < heads; ++n)
        softmax_rows<KK>(logits + n * c.logits_strides[3] + from * length, to - from, length, scale,
                         s.e + (n * length + from) * length, s.sums, s.inverse + n * length + from);
    }

    const T* values = static_cast<const T*>(c.value) + picture * c.value_strides[0] + head * c.value_strides[3];
    for (int64_t n = 0; n < heads; ++n) {
      gather(s, values + n * c.value_strides[3]);
      T* result = static_cast<T*>(c.result) + n * c.head_dim;
      for (int64_t q = 0; q < length; ++q) {
        if constexpr (kRing) {
          s.out.sums[q] = s.sum_at[q] < 0 ? nullptr : s.ring + n * width + s.sum_at[q];
          s.out.results[q] = s.result_at[q] < 0 ? nullptr : result + s.result_at[q];
        } else {
          s.out.sums[q] = s.sum_at[q] < 0 ? nullptr : result + s.sum_at[q];
        }
      }
      const A *e = s.e + n * length * length, *inverse = s.inverse + n * length;
      if constexpr (kBackward) {
        scale_grads(s, inverse, picture, head + n);
        mix<KK, true, kRing, kPadded>(s.grad_rows, e, inverse, s.out, length, c.head_dim);
        if (owner) dot_products<KK>(s.grads, s.in, length, width, s.dots + n * length * length);
      } else {
        mix<KK, false, kRing, kPadded>(s.in, e, inverse, s.out, length, c.head_dim);
      }
    }
    if (kBackward && owner)
      write_grad_logits(s, heads * length,
                        (((picture * c.rows + i) * c.columns + j) * c.heads + head) * length * length);
  }

  // Pointers to the tokens of a window for one head, copied and padded where they do not fill whole vectors.
  VOLO_INLINE void gather(const Scratch<T, A>& s, const T* source) const {
    for (int64_t q = 0; q < length; ++q) {
      if (s.in_at[q] < 0) {
        s.in[q] = s.zeros;
      } else if constexpr (!kPadded) {
        s.in[q] = source + s.in_at[q];
      } else {
        T* place = s.padded + q * width;
        memcpy(place, source + s.in_at[q], c.head_dim * sizeof(T));
        memset(place + c.head_dim, 0, (width - c.head_dim) * sizeof(T));
        s.in[q] = place;
      }
    }
  }

  // With P the softmax, G the gradient of the output and g = G / (sum of the row):
  //   dV[k] = sum over q of P[q,k] G[q] = sum of e[q,k] g[q]
  //   dP[q,k] = G[q] . V[k],  dlogits = scale * P (dP - sum over k of P dP) = scale * e (g.V - D / sum),  D = sum over k of e g.V
  VOLO_INLINE void scale_grads(const Scratch<T, A>& s, const A* inverse, int64_t picture, int64_t head) const {
    const T* grad = static_cast<const T*>(c.grad_out) + picture * c.grad_out_strides[0] + head * c.grad_out_strides[3];
    for (int64_t q = 0; q < length; ++q) {
      A* place = s.grads + q * width;
      if (s.grad_at[q] < 0) {
        for (int64_t d = 0; d < width; d += W) store(place + d, Vec<A>{});
        continue;
      }
      const T* p = grad + s.grad_at[q];
      int64_t d = 0;
      for (; d + W <= c.head_dim; d += W) store(place + d, load(p + d) * inverse[q]);
      if (kPadded) store(place + d, load_part<A>(p + d, c.head_dim - d) * inverse[q]);
    }
  }

  VOLO_INLINE void write_grad_logits(const Scratch<T, A>& s, int64_t rows, int64_t at) const {
    const int64_t n = rows * length;
    T* to = static_cast<T*>(c.grad_logits) + at;
    const A factor = (A)scale;
    for (int64_t m = 0; m < n; m += W) store(s.sums + m, load(s.e + m) * load(s.dots + m));
    row_sums<KK>(s.sums, rows, length, s.sums, s.totals);
    // A row is written in whole vectors; what spills over is overwritten by the next one.
    for (int64_t r = 0; r < rows; ++r) {
      const A shared = s.totals[r] * s.inverse[r];
      for (int64_t m = r * length; m < (r + 1) * length; m += W) {
        const Vec<A> grad = load(s.e + m) * (load(s.dots + m) - shared) * factor;
        if (m + W <= n)
          store(to + m, grad);
        else
          store_part(to + m, grad, n - m);
      }
    }
  }
};

template <class T, int KK, bool kBackward>
int run_engine(const OutlookCall& call, double scale) {
  if (call.head_dim % Lanes<typename Sum<T>::type>::count == 0)
    return Engine<T, KK, false, kBackward>(call, scale).run();
  return Engine<T, KK, true, kBackward>(call, scale).run();
}

template <bool kBackward>
int run(const OutlookCall& call, double scale) {
  const bool three = call.kernel == 3;
  if (call.dtype == 0)
    return three ? run_engine<float, 9, kBackward>(call, scale) : run_engine<float, 0, kBackward>(call, scale);
  if (call.dtype == 1)
    return three ? run_engine<Bf16, 9, kBackward>(call, scale) : run_engine<Bf16, 0, kBackward>(call, scale);
  return run_engine<double, 0, kBackward>(call, scale);
}

}  // namespace

int outlook_forward(const OutlookCall& call, double scale) { return run<false>(call, scale); }

int outlook_backward(const OutlookCall& call, double scale) { return run<true>(call, scale); }

}  // namespace VOLO_ISA
}  // namespace volo
