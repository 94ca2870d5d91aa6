// The noise, version 1. Line by line the same as es_kernels/noise.py, which defines it; NOISE.md is the page to
// re-implement it from.
#pragma once
#include "lanes.h"

namespace es {

enum Domain : uint32_t { kNoise = 0, kSeeds = 1, kFingerprint = 2, kLeft = 3, kRounding = 4, kRight = 5 };

constexpr float kLog[4] = {2.0364969f, -3.5937726f, 1.8323295f, -0.27228412f};
constexpr float kLogSlope = -2.1457672e-07f;
constexpr uint32_t kRsqrtSeed = 0x5EDBD221u;
constexpr float kRsqrt = 1.1556236f;
constexpr float kCos[4] = {1.8363578f, -3.3855894e-08f, 1.03152155e-16f, -9.48053e-26f};
constexpr float kSin[3] = {0.0003504429f, -2.0631862e-12f, 2.599999e-21f};

// The round keys of one seed: round i xors k[2 i] and k[2 i + 1].
template <int ROUNDS>
struct RoundKeys {
  uint32_t k[2 * ROUNDS];
  ES_FN RoundKeys() {}
  ES_FN explicit RoundKeys(uint64_t seed) {
    for (int i = 0; i < ROUNDS; i++) {
      k[2 * i] = (uint32_t)seed + i * 0x9E3779B9u;
      k[2 * i + 1] = (uint32_t)(seed >> 32) + i * 0xBB67AE85u;
    }
  }
};

template <int ROUNDS>
ES_FN void philox4x32(philox_word c[4], const RoundKeys<ROUNDS>& keys) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int i = 0; i < ROUNDS; i++) {
    philox_word high0, low0, high1, low1;
    multiply_wide(0xD2511F53u, c[0], high0, low0);
    multiply_wide(0xCD9E8D57u, c[2], high1, low1);
    c[0] = high1 ^ c[1] ^ keys.k[2 * i];
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ keys.k[2 * i + 1];
    c[3] = low0;
  }
}

// The four random words of a noise block. `low` and `high` are the halves of the block number, `high` with the domain
// on top.
template <int ROUNDS>
ES_FN void random_words(philox_word low, philox_word high, philox_word stream_low, philox_word stream_high,
                        const RoundKeys<ROUNDS>& keys, u32 words[4]) {
  philox_word c[4] = {low, high, stream_low, stream_high};
  philox4x32(c, keys);
  for (int i = 0; i < 4; i++) words[i] = lanes_of(c[i]);
}

// One random word -> a pair of normals. Bits 31..14: radius; 13..1: angle over the half circle; 0: sign of the pair.
ES_FN void box_muller(u32 w, f32& x, f32& y) {
  // u in (0, 1) as a float whose value is 2^32 u; its exponent and fraction, together one integer, are log2 u up to
  // 0.09.
  u32 f = bits_of(unsigned_to_float(and_or(w, 0xFFFFC000u, 0x2000u)));
  f32 log = signed_to_float(f - 0x4F800000u);
  f32 m = float_of(and_or(f, 0x007FFFFFu, 0x3F800000u));
  f32 v = fma(fma(fma(kLog[3], m, kLog[2]), m, kLog[1]), m, kLog[0]);
  v = fma(log, kLogSlope, v);  // -log2 u > 0, up to a factor
  // r = sqrt(2 ln 2 v), up to a factor that kCos and kSin carry: the bit-trick seed of 1 / sqrt(v), then one
  // Newton-like step.
  f32 s = float_of(kRsqrtSeed - funnel_right_1(w, bits_of(v)));
  f32 a = v * s;
  f32 r = a * fma(-a, s, kRsqrt);
  f32 t = float_of(and_or(w, 0x3FFEu, 0x4B000000u)) - 8396799.0f;  // 2^23 + 8191
  f32 z = t * t;
  f32 x_over_r = fma(fma(fma(kCos[3], z, kCos[2]), z, kCos[1]), z, kCos[0]);
  f32 y_over_rt = fma(fma(kSin[2], z, kSin[1]), z, kSin[0]);
  x = r * x_over_r;
  y = (r * t) * y_over_rt;
}

}  // namespace es
