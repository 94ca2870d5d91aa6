// float16 pairs with the conversions and NaNs of the GPU's instructions.
#pragma once
#include "cuda_runtime.h"

struct __half2 {
  _Float16 x, y;
};

namespace cuda_on_cpu {
inline _Float16 to_f16(float f) {
  if (f == f) return (_Float16)f;
  const uint16_t nan = 0x7FFF;
  _Float16 h;
  memcpy(&h, &nan, 2);
  return h;
}
}  // namespace cuda_on_cpu

inline __half2 __floats2half2_rn(float x, float y) { return {cuda_on_cpu::to_f16(x), cuda_on_cpu::to_f16(y)}; }
inline float2 __half22float2(__half2 h) { return {(float)h.x, (float)h.y}; }
inline __half2 __hadd2(__half2 a, __half2 b) {
  return {cuda_on_cpu::to_f16((float)a.x + (float)b.x), cuda_on_cpu::to_f16((float)a.y + (float)b.y)};
}
inline bool __hbeq2(__half2 a, __half2 b) { return a.x == b.x && a.y == b.y; }
