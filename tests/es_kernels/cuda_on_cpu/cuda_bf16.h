// bfloat16 pairs with the conversions and NaNs of the GPU's instructions.
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};

namespace cuda_on_cpu {
inline float from_bf16(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline uint16_t to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return 0x7FFF;
  return (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
}  // namespace cuda_on_cpu

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {cuda_on_cpu::to_bf16(x), cuda_on_cpu::to_bf16(y)};
}
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) {
  using namespace cuda_on_cpu;
  return {to_bf16(from_bf16(a.x) + from_bf16(b.x)), to_bf16(from_bf16(a.y) + from_bf16(b.y))};
}
inline bool __hbeq2(__nv_bfloat162 a, __nv_bfloat162 b) {
  using namespace cuda_on_cpu;
  return from_bf16(a.x) == from_bf16(b.x) && from_bf16(a.y) == from_bf16(b.y);
}
