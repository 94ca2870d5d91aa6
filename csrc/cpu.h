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
  int rank;                            // of the noise of segments with a width; 0: there are none
};

// What a thread needs to add noise of low rank to the columns of a row of tiles, `kColumns` at a time. Every array is
// padded, since a vector may begin up to 7 elements before its row's first and ends where it ends.
struct LowRankScratch {
  // With several seeds the sums of these columns stay in the L2 cache, 270 KB, and L is made once for 4 tiles. A
  // perturbation has no sums: its columns, as many as it has room for R in the L1 cache, are rows of memory as long.
  static constexpr int64_t kColumns = 4 * kTile, kPerturbValues = 64 * kTile;
  static constexpr int64_t kTerms = 32;  // of several seeds, to be added in one go
  static constexpr int64_t kPad = 16, kStride = kColumns + kPad, kMost = kMaxRank * kStride;
  alignas(64) float left[kMaxRank * kTile];                   // c L, one term after the other
  alignas(64) float right[kPad + kMost + 8 * kPad];           // R, likewise
  alignas(64) float sums[kPad + kTile * kStride + 8 * kPad];  // acc
  alignas(64) float drawn[kMost + 16 * kPad];                 // normals in the order of their indices
};

#define ES_DECLARE_ISA(isa)                                                                                           \
  namespace isa {                                                                                                     \
  void add_noise(const Segment& s, const Operation& op, int64_t unit, int64_t unit_end);                              \
  void add_low_rank(const Segment& s, const Operation& op, int64_t unit, int64_t unit_end, LowRankScratch& mine);     \
  void factor(const Factor& f, const RoundKeys<10>* keys, int64_t n_seeds, int64_t unit, int64_t unit_end, void* out, \
              int32_t dtype);                                                                                         \
  uint64_t fingerprint(const Segment& s, int64_t unit, int64_t unit_end);                                             \
  }
ES_DECLARE_ISA(avx512)
ES_DECLARE_ISA(avx2)
ES_DECLARE_ISA(baseline)

}  // namespace es
