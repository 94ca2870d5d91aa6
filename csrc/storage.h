// float32 from and to the storage formats, to nearest even and stochastically, on the bits. 16-bit formats sit in the
// low half of a u32 lane. The GPU has instructions for rounding to nearest and uses them (cuda.cu); these bodies serve
// the rest.
#pragma once
#include "lanes.h"

namespace es {

constexpr uint32_t kMagnitude = 0x7FFFFFFFu, kInf = 0x7F800000u;

ES_FN f32 from_bf16(u32 h) { return float_of(h << 16); }

ES_FN f32 from_f16(u32 h) {
  u32 magnitude = h & 0x7FFFu;
  f32 x = float_of(magnitude << 13) * 0x1p112f;  // rebias the exponent; exact, subnormals included
  u32 bits = select(magnitude >= 0x7C00u, (magnitude << 13) | kInf, bits_of(x));
  return float_of(bits | ((h & 0x8000u) << 16));
}

ES_FN u32 to_f32(f32 x) {
  u32 u = bits_of(x);
  return select((u & kMagnitude) > kInf, u32{} + 0x7FC00000u, u);
}

ES_FN u32 to_bf16_nearest(f32 x) {
  u32 u = bits_of(x);
  return select((u & kMagnitude) > kInf, u32{} + 0x7FC0u, (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

// r: 16 random bits. inf + r stays inf, since its fraction is 0.
ES_FN u32 to_bf16_stochastic(f32 x, u32 r) {
  u32 u = bits_of(x);
  return select((u & kMagnitude) > kInf, u32{} + 0x7FC0u, (u + r) >> 16);
}

// Normal results by integer arithmetic on the bits (rebiased, clamped to inf), results under 2^-14 by `subnormal`.
ES_FN u32 finish_f16(u32 u, u32 normal_sum, u32 subnormal) {
  u32 magnitude = u & kMagnitude;
  u32 h = (normal_sum >> 13) - (112u << 10);
  h = select(h > 0x7C00u, u32{} + 0x7C00u, h);
  h = select(magnitude < 0x38800000u, subnormal, h);
  h = h | ((u >> 16) & 0x8000u);
  return select(magnitude > kInf, u32{} + 0x7E00u, h);
}

ES_FN u32 to_f16_nearest(f32 x) {
  u32 u = bits_of(x), magnitude = u & kMagnitude;
  // 0.5 has an ulp of 2^-24, the spacing of f16 subnormals: the addition rounds, to even.
  u32 subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  return finish_f16(u, magnitude + 0xFFFu + ((u >> 13) & 1u), subnormal);
}

// The magnitude in f16 ulps is n + f; up if floor(f 2^16) + r >= 2^16. A normal has 13 bits of f, so r >> 3 decides.
ES_FN u32 to_f16_stochastic(f32 x, u32 r) {
  u32 u = bits_of(x), magnitude = u & kMagnitude;
  u32 small = select(magnitude < 0x38800000u, magnitude, u32{});
  return finish_f16(u, magnitude + (r >> 3), (truncate_to_unsigned(float_of(small) * 0x1p40f) + r) >> 16);
}

}  // namespace es
