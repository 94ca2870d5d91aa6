// The fingerprint: a sum over elements, so any order and any sharding give the same value. One Philox call makes the
// keys of a block; an element costs one 32 x 32 -> 64 product. One changed element always changes the sum (a multiplier
// is odd, so not 0 mod 2^64).
#pragma once
#include "noise.h"

namespace es {

constexpr int kFingerprintRounds = 7;

struct BlockId;

// Lane j of a block adds (u32)(bits + k[j]) * m[j] mod 2^64.
template <class Id>
ES_FN void fingerprint_keys(const Id& id, const RoundKeys<kFingerprintRounds>& keys, u32 k[8], u32 m[8]) {
  u32 w[4];
  random_words(id.low, id.high, id.stream_low, id.stream_high, keys, w);
  for (int j = 0; j < 4; j++) {
    k[j] = w[(j + 1) & 3], k[j + 4] = w[(j + 2) & 3];
    m[j] = w[j] | 1u, m[j + 4] = ((w[j] << 16) | (w[j] >> 16)) | 1u;
  }
}

}  // namespace es
