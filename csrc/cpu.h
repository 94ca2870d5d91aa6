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

// What a thread needs for noise of low rank: the factors of a run of columns of a row of tiles, one term (one seed and
// q) after the other, and sums. Reads may begin 7 elements before a row of them and end 8 lanes after it.
struct LowRankScratch {
  static constexpr int64_t kTerms = 32;  // of several seeds, added in one go: those of 128 rows and columns take 32 KB
  static constexpr int64_t kColumns = 4 * kTile;  // that have sums, 270 KB: they fit in the L2 cache
  static constexpr int64_t kPad = 16, kEnd = 128;
  static constexpr int64_t kStride = kColumns + kPad;  // no power of two: terms lie in different sets of the L1 cache
  static constexpr int64_t kMostTerms = 2 * kMaxRank, kMost = kMostTerms * kStride;
  alignas(64) float left[kMostTerms * kTile];  // c L
  alignas(64) float right[kPad + kMost + kEnd];
  alignas(64) float sums[kPad + kTile * kStride + kEnd];  // acc
  alignas(64) float drawn[kMost / 2 + kEnd];              // normals in the order of their indices
};

#define ES_DECLARE_ISA(isa)                                                                                           \
  namespace isa {                                                                                                     \
  void add_noise(const Segment& s, const Operation& op, int64_t unit, int64_t unit_end);                              \
  void add_low_rank(const Segment& s, const Operation& op, int64_t unit, int64_t unit_end, LowRankScratch& mine);     \
  void factor(const Factor& f, const RoundKeys<10>* keys, int64_t n_seeds, int64_t unit, int64_t unit_end, void* out, \
              int32_t dtype);                                                                                         \
  uint64_t fingerprint(const Segment& s, int64_t unit, int64_t unit_end);                                             \
  }
// ES_ISAS(X), of the command line, is X(avx512) X(avx2) X(baseline): those that this library has, best first
// (setup.py).
ES_ISAS(ES_DECLARE_ISA)

}  // namespace es
