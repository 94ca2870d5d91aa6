// The few primitive operations that the bodies in noise.h, storage.h, add_noise.h and fingerprint.h are written in, for
// one lane (a CUDA thread) and for W lanes (a SIMD register). A body is a template over these types, so there is one
// text of it, and the CPU and the GPU cannot drift apart. Every float operation here is one IEEE 754 operation;
// contraction is off in every build.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define ES_FN __host__ __device__ __forceinline__
#else
#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif
#define ES_FN inline __attribute__((always_inline))
#endif

namespace es {

#ifdef __CUDACC__

// One lane: u32 and f32 are the plain types.
typedef uint32_t u32;
typedef float f32;
typedef uint32_t philox_word;

ES_FN u32 bits_of(f32 x) {
  u32 u;
  memcpy(&u, &x, 4);
  return u;
}
ES_FN f32 float_of(u32 u) {
  f32 x;
  memcpy(&x, &u, 4);
  return x;
}
ES_FN f32 unsigned_to_float(u32 u) { return (f32)u; }
ES_FN f32 signed_to_float(u32 u) { return (f32)(int32_t)u; }
ES_FN f32 fma(f32 a, f32 b, f32 c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
ES_FN u32 truncate_to_unsigned(f32 x) { return (u32)x; }
ES_FN u32 select(bool condition, u32 yes, u32 no) { return condition ? yes : no; }

// (w & mask) | set in one LOP3. From the plain expression with two immediates ptxas makes two, since an instruction
// holds one: inline, it keeps the other in a register.
ES_FN u32 and_or(u32 w, u32 mask, u32 set) {
#ifdef __CUDA_ARCH__
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(w), "r"(mask), "r"(set));
  return d;
#else
  return (w & mask) | set;
#endif
}
// The low word of (high : low) >> 1.
ES_FN u32 funnel_right_1(u32 high, u32 low) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(low, high, 1);
#else
  return (high << 31) | (low >> 1);
#endif
}
ES_FN void multiply_wide(uint32_t m, philox_word a, philox_word& high, philox_word& low) {
  uint64_t p = (uint64_t)m * a;
  high = (uint32_t)(p >> 32);
  low = (uint32_t)p;
}
ES_FN u32 lanes_of(philox_word w) { return w; }

#else  // W lanes

#if defined(__AVX512F__)
#define ES_LANES 16
#elif defined(__AVX2__)
#define ES_LANES 8
#else
#define ES_LANES 4
#endif

typedef uint32_t u32 __attribute__((vector_size(4 * ES_LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * ES_LANES)));
typedef float f32 __attribute__((vector_size(4 * ES_LANES)));
typedef uint64_t u64_half __attribute__((vector_size(4 * ES_LANES)));  // W / 2 lanes of 64 bits

// 64-bit numbers in W lanes: those of the lanes 0, 2, 4 ... are in `even`.
struct u64 {
  u64_half even, odd;
};

// Philox multiplies 32 x 32 -> 64 bits.
#ifdef __aarch64__
typedef u32 philox_word;
#else
// AVX does so on the even lanes only. So a word of W blocks is held as two registers of W / 2 64-bit lanes; the upper
// halves are garbage that the multiplication ignores.
typedef u64 philox_word;
#endif

ES_FN u32 bits_of(f32 x) { return (u32)x; }
ES_FN f32 float_of(u32 u) { return (f32)u; }
ES_FN f32 signed_to_float(u32 u) { return __builtin_convertvector((i32)u, f32); }
// Exact for the callers' values, which have at most 24 significant bits.
ES_FN f32 unsigned_to_float(u32 u) {
#if defined(__AVX512F__)
  return (f32)_mm512_cvtepu32_ps((__m512i)u);
#elif defined(__aarch64__)
  return (f32)vcvtq_f32_u32((uint32x4_t)u);
#else
  return signed_to_float(u >> 16) * 65536.0f + signed_to_float(u & 0xFFFF);
#endif
}
ES_FN u32 truncate_to_unsigned(f32 x) { return (u32) __builtin_convertvector(x, i32); }  // x < 2^31
ES_FN u32 select(i32 condition, u32 yes, u32 no) { return ((u32)condition & yes) | (~(u32)condition & no); }

#if defined(__AVX512F__)
ES_FN f32 fma(f32 a, f32 b, f32 c) { return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__)
ES_FN f32 fma(f32 a, f32 b, f32 c) { return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__)
ES_FN f32 fma(f32 a, f32 b, f32 c) { return (f32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
// No FMA: the product is exact in double; the sum is rounded there, and once more by the cast. The two roundings differ
// from one only where the sum lands on a tie of float32: 29 zeros after a one, or anywhere below 2^-126, where ties are
// elsewhere. Those, one in 2^29, are rounded to odd first, so that the cast sees on which side of the tie the exact
// value lies (Boldo & Melquiond 2008).
struct doubles2 {
  __m128d low, high;  // of lanes 0, 1 and 2, 3
};
ES_FN doubles2 widen(f32 x) { return {_mm_cvtps_pd((__m128)x), _mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x))}; }

ES_FN __m128d sum_to_odd(__m128d p, __m128d c) {
  typedef int64_t i64 __attribute__((vector_size(16)));
  __m128d s = p + c, v = s - p;
  __m128d error = (p - (s - v)) + (c - v);  // p + c == s + error
  i64 inexact = (error != 0) & (error - error == 0), even = ((i64)s & 1) - 1;
  i64 step = 1 | ((error > 0) ^ (s > 0));  // away from zero, or -1 toward it
  return (__m128d)((i64)s + (inexact & even & step));
}
ES_FN f32 fma(f32 a, f32 b, f32 c) {
  doubles2 x = widen(a), y = widen(b), z = widen(c);
  doubles2 p = {x.low * y.low, x.high * y.high}, s = {p.low + z.low, p.high + z.high};
  i32 low = (i32)_mm_shuffle_ps((__m128)s.low, (__m128)s.high, 0x88),
      high = (i32)_mm_shuffle_ps((__m128)s.low, (__m128)s.high, 0xDD);
  i32 doubtful = ((low & 0x1FFFFFFF) == 0x10000000) | ((high & 0x7FF00000) < 0x38100000);
  if (__builtin_expect(_mm_movemask_ps((__m128)doubtful), 0))
    s = {sum_to_odd(p.low, z.low), sum_to_odd(p.high, z.high)};
  return (f32)_mm_movelh_ps(_mm_cvtpd_ps(s.low), _mm_cvtpd_ps(s.high));
}
#endif
// a in every lane; f32{} + a would lose the sign of -0.
ES_FN f32 splat(float a) { return a - f32{}; }
ES_FN f32 fma(float a, f32 b, f32 c) { return fma(splat(a), b, c); }
ES_FN f32 fma(f32 a, f32 b, float c) { return fma(a, b, splat(c)); }
ES_FN f32 fma(f32 a, float b, f32 c) { return fma(a, splat(b), c); }
ES_FN f32 fma(float a, f32 b, float c) { return fma(splat(a), b, splat(c)); }

ES_FN u32 and_or(u32 w, uint32_t mask, uint32_t set) { return (w & mask) | set; }
ES_FN u32 funnel_right_1(u32 high, u32 low) { return (high << 31) | (low >> 1); }

#ifdef __aarch64__
ES_FN void multiply_wide(uint32_t m, philox_word a, philox_word& high, philox_word& low) {
  const uint32x4_t x = (uint32x4_t)a;
  const uint32x4_t p = (uint32x4_t)vmull_n_u32(vget_low_u32(x), m), q = (uint32x4_t)vmull_high_n_u32(x, m);
  low = (u32)vuzp1q_u32(p, q), high = (u32)vuzp2q_u32(p, q);
}
ES_FN u32 lanes_of(philox_word w) { return w; }
ES_FN philox_word word(uint32_t w) { return u32{} + w; }
ES_FN philox_word low_word(u64 n) { return (u32)vtrn1q_u32((uint32x4_t)n.even, (uint32x4_t)n.odd); }
ES_FN philox_word high_word(u64 n) { return (u32)vtrn2q_u32((uint32x4_t)n.even, (uint32x4_t)n.odd); }
#else
ES_FN u64_half multiply_even(uint32_t m, u64_half a) {
#if defined(__AVX512F__)
  return (u64_half)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (u64_half)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (u64_half)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#endif
}
ES_FN void multiply_wide(uint32_t m, philox_word a, philox_word& high, philox_word& low) {
  low.even = multiply_even(m, a.even), low.odd = multiply_even(m, a.odd);
  high.even = low.even >> 32, high.odd = low.odd >> 32;
}
ES_FN philox_word operator^(philox_word a, philox_word b) { return {a.even ^ b.even, a.odd ^ b.odd}; }
ES_FN philox_word operator^(philox_word a, uint32_t b) { return {a.even ^ b, a.odd ^ b}; }
ES_FN u32 lanes_of(philox_word w) { return (u32)((w.even & 0xFFFFFFFF) | (w.odd << 32)); }
ES_FN philox_word word(uint32_t w) { return {u64_half{} + w, u64_half{} + w}; }
ES_FN philox_word low_word(u64 n) { return n; }
ES_FN philox_word high_word(u64 n) { return {n.even >> 32, n.odd >> 32}; }
#endif

#endif

}  // namespace es
