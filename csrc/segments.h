// The parameter table: the structs of the C ABI (es_kernels.h) by their names here. NumPy and Triton lay them out by
// hand (es_kernels/segment.py, low_rank.py).
#pragma once
#include <stdint.h>

#include "es_kernels.h"

namespace es {

using Segment = EsSegment;
using Factor = EsFactor;
static_assert(sizeof(Segment) == 128 && sizeof(Factor) == 40, "as Python lays them out");

constexpr int32_t kF32 = ES_F32, kBF16 = ES_BF16, kF16 = ES_F16;
constexpr int64_t kTile = ES_TILE, kTileUnits = kTile * kTile / 8;
constexpr int kMaxRank = ES_MAX_RANK;

inline
#ifdef __CUDACC__
    __host__ __device__
#endif
    int dtype_size(int32_t dtype) {
  return dtype == kF32 ? 4 : 2;
}

}  // namespace es
