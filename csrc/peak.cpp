// What the machine can do at best, for other measurements to be held against: multiply-adds that depend on nothing but
// registers, and reading memory once, in order.

#include "common.h"
#include "simd.h"

namespace kl {
namespace {

// Chains of dependent operations that run beside each other: enough to cover the latency, few enough to stay in registers.
constexpr int kChains = KL_HAS_AVX512 ? 24 : 12;
constexpr int64_t kReadBlock = int64_t{1} << 16;

// x <- a x + b on every lane of every chain; tends to b / (1 - a), so no value becomes denormal or infinite.
float fma_chains(int64_t rounds, float a, float b) {
  vf x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = splat(static_cast<float>(c));
  const vf factor = splat(a), term = splat(b);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) x[c] = fma(factor, x[c], term);
  }
  vf total{};
  for (int c = 0; c < kChains; ++c) total += x[c];
  return sum(total);
}

#if KL_HAS_DOT
// x <- x + a0 b0 + a1 b1 on every lane of every chain.
float dot_chains(int64_t rounds, float a, float b) {
  __m512 x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = _mm512_set1_ps(static_cast<float>(c));
  const __m512bh left = _mm512_cvtne2ps_pbh(_mm512_set1_ps(a), _mm512_set1_ps(a));
  const __m512bh right = _mm512_cvtne2ps_pbh(_mm512_set1_ps(b), _mm512_set1_ps(b));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) x[c] = _mm512_dpbf16_ps(x[c], left, right);
  }
  vf total{};
  for (int c = 0; c < kChains; ++c) total += (vf)x[c];
  return sum(total);
}

// x <- x + four products of bytes on every lane of every chain. As instructions: from the intrinsic, compilers make
// ones with copies around them.
constexpr int kByteChains = 12;
float int8_chains(int64_t rounds, float a, float b) {
  const __m512i left = _mm512_set1_epi8(static_cast<char>(a)), right = _mm512_set1_epi8(static_cast<char>(b));
  __m512i x0 = left, x1 = left, x2 = left, x3 = left, x4 = left, x5 = left;
  __m512i y0 = left, y1 = left, y2 = left, y3 = left, y4 = left, y5 = left;
  for (int64_t round = 0; round < rounds; ++round) {
    __asm__(
        "vpdpbusd %13, %12, %0\n\tvpdpbusd %13, %12, %1\n\tvpdpbusd %13, %12, %2\n\tvpdpbusd %13, %12, %3\n\t"
        "vpdpbusd %13, %12, %4\n\tvpdpbusd %13, %12, %5\n\tvpdpbusd %13, %12, %6\n\tvpdpbusd %13, %12, %7\n\t"
        "vpdpbusd %13, %12, %8\n\tvpdpbusd %13, %12, %9\n\tvpdpbusd %13, %12, %10\n\tvpdpbusd %13, %12, %11"
        : "+v"(x0), "+v"(x1), "+v"(x2), "+v"(x3), "+v"(x4), "+v"(x5), "+v"(y0), "+v"(y1), "+v"(y2), "+v"(y3),
          "+v"(y4), "+v"(y5)
        : "v"(left), "v"(right));
  }
  const __m512i x = _mm512_add_epi32(_mm512_add_epi32(_mm512_add_epi32(x0, x1), _mm512_add_epi32(x2, x3)),
                                     _mm512_add_epi32(x4, x5));
  const __m512i y = _mm512_add_epi32(_mm512_add_epi32(_mm512_add_epi32(y0, y1), _mm512_add_epi32(y2, y3)),
                                     _mm512_add_epi32(y4, y5));
  return sum(__builtin_convertvector((vi)_mm512_add_epi32(x, y), vf));
}
#endif

}  // namespace
}  // namespace kl

// Run `rounds` of float32 multiply-adds on each of `items` threads; flop[0] is how many operations that was, an add and
// a multiply counting two. sink [items] takes what they computed. a and b must not be known to the compiler.
KL_EXPORT int64_t kl_peak_fma_f32(int64_t items, int64_t rounds, double a, double b, float* sink, double* flop) {
  kl::parallel_for(items, [&](int64_t item) {
    sink[item] = kl::fma_chains(rounds, static_cast<float>(a), static_cast<float>(b));
  });
  *flop = 2.0 * kl::kChains * kl::kLanes * static_cast<double>(items) * static_cast<double>(rounds);
  return 0;
}

// The same with products of pairs of bfloat16; 0 operations where the level has no instruction for them.
KL_EXPORT int64_t kl_peak_dot_bf16(int64_t items, int64_t rounds, double a, double b, float* sink, double* flop) {
#if KL_HAS_DOT
  kl::parallel_for(items, [&](int64_t item) {
    sink[item] = kl::dot_chains(rounds, static_cast<float>(a), static_cast<float>(b));
  });
  *flop = 4.0 * kl::kChains * kl::kLanes * static_cast<double>(items) * static_cast<double>(rounds);
#else
  static_cast<void>(rounds);
  for (int64_t item = 0; item < items; ++item) sink[item] = static_cast<float>(a * b);
  *flop = 0;
#endif
  return 0;
}

// The same with products of quadruples of bytes.
KL_EXPORT int64_t kl_peak_dot_i8(int64_t items, int64_t rounds, double a, double b, float* sink, double* flop) {
#if KL_HAS_DOT
  kl::parallel_for(items, [&](int64_t item) {
    sink[item] = kl::int8_chains(rounds, static_cast<float>(a), static_cast<float>(b));
  });
  *flop = 8.0 * kl::kByteChains * kl::kLanes * static_cast<double>(items) * static_cast<double>(rounds);
#else
  static_cast<void>(rounds);
  for (int64_t item = 0; item < items; ++item) sink[item] = static_cast<float>(a * b);
  *flop = 0;
#endif
  return 0;
}

// Read `count` floats once; sink [ceil(count / 16384)] takes a sum for each block. A block is read as kStreams pieces side
// by side, because a processor fetches ahead within a page only.
KL_EXPORT int64_t kl_peak_read(const float* data, int64_t count, float* sink) {
  constexpr int64_t kBlock = kl::kReadBlock / static_cast<int64_t>(sizeof(float)), kStreams = 8;
  constexpr int64_t kPiece = kBlock / kStreams, kAhead = 1024;
  kl::parallel_ranges(count, kBlock, [&](int64_t begin, int64_t end) {
    kl::vf sums[kStreams] = {};
    int64_t i = begin;
    if (end - begin == kBlock) {
      for (int64_t at = 0; at < kPiece; at += kl::kLanes) {
        for (int64_t s = 0; s < kStreams; ++s) {
          const float* x = data + begin + s * kPiece + at;
          __builtin_prefetch(x + kAhead);
          sums[s] += kl::load(x);
        }
      }
      i = end;
    }
    float total = 0;
    for (const kl::vf& x : sums) total += kl::sum(x);
    for (; i < end; ++i) total += data[i];
    sink[begin / kBlock] = total;
  });
  return 0;
}
