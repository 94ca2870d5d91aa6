// The operation on one block of 8 elements, in the contract's order (es_kernels.h). `b`, `acc` and `noise` hold lane
// 0..7 of the block.
#pragma once
#include "noise.h"
#include "storage.h"

namespace es {

// What tells one block from another, ready for Philox.
struct BlockId {
  philox_word low, high, stream_low, stream_high;
};

ES_FN void noise_block(const BlockId& id, const RoundKeys<10>& keys, f32 noise[8]) {
  u32 w[4];
  random_words(id.low, id.high, id.stream_low, id.stream_high, keys, w);
  for (int i = 0; i < 4; i++) box_muller(w[i], noise[2 * i], noise[2 * i + 1]);
}

// The 16 random bits of every lane for stochastic rounding.
ES_FN void rounding_thresholds(const BlockId& id, const RoundKeys<10>& keys, u32 r[8]) {
  u32 w[4];
  random_words(id.low, id.high ^ ((uint32_t)kRounding << 29), id.stream_low, id.stream_high, keys, w);
  for (int i = 0; i < 4; i++) r[2 * i] = w[i] & 0xFFFFu, r[2 * i + 1] = w[i] >> 16;
}

ES_FN void decay_block(f32 b[8], const f32 anchor[8], float decay) {
  for (int j = 0; j < 8; j++) b[j] = fma(-decay, b[j] - anchor[j], b[j]);
}

ES_FN void add_block(f32 b[8], const f32 acc[8]) {
  for (int j = 0; j < 8; j++) b[j] = b[j] + acc[j];
}

ES_FN void fma_block(float coef, const f32 noise[8], f32 b[8]) {
  for (int j = 0; j < 8; j++) b[j] = fma(coef, noise[j], b[j]);
}

}  // namespace es
