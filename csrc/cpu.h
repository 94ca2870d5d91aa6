// Between the CPU entry points (cpu.cpp) and the loops compiled per instruction set (cpu_simd.cpp).
#pragma once
#include "noise.h"
#include "segments.h"

namespace es {

// Everything of one call that does not depend on the segment.
struct Operation {
  const RoundKeys<10>* keys;
  const float* coefs;
  int64_t n_seeds;
  float decay;
  const RoundKeys<10>* rounding_keys;  // nullptr: to nearest
};

#define ES_DECLARE_ISA(isa)                                                              \
  namespace isa {                                                                        \
  void add_noise(const Segment& s, const Operation& op, int64_t unit, int64_t unit_end); \
  uint64_t fingerprint(const Segment& s, int64_t unit, int64_t unit_end);                \
  }
ES_DECLARE_ISA(avx512)
ES_DECLARE_ISA(avx2)
ES_DECLARE_ISA(baseline)

}  // namespace es
