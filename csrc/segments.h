// The parameter table: plain structs, laid out the same in C++, CUDA, NumPy and Triton (es_kernels/segment.py).
#pragma once
#include <stdint.h>

namespace es {

enum Dtype : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

// rows x cols elements in memory that are the elements first + row * index_stride + col of one stream. Strides count
// elements. Work is counted in units: a unit is the part of one row that lies in one noise block (8 indices that agree
// above bit 3). Unit u of a segment is block u % units_per_row of row u / units_per_row; it may be empty where a row
// touches fewer blocks than the most. In a segment of one row no block number crosses a multiple of 2^32 (the table
// builder splits it there).
struct Segment {
  uint64_t out, base, anchor;  // addresses of the first element; base == out in place, anchor 0: none
  int64_t rows, cols;
  int64_t out_stride, base_stride, anchor_stride;
  uint64_t first, index_stride, stream;
  int64_t units_per_row;
  int64_t unit_end;  // units of this segment and all before it
  int32_t out_dtype, base_dtype, anchor_dtype;
  int32_t vector_path;  // 1: every unit of every row is a whole block, aligned to 16 bytes in out, base and anchor
  int64_t width;        // of the matrix whose noise is of low rank; 0: full noise
};
static_assert(sizeof(Segment) == 128, "es_kernels/segment.py lays it out by hand");

// A segment with a width is a rectangle of its matrix: its element (row, col) is that of row first / width + row *
// (index_stride / width) and column first % width + col. Its work is counted in tiles, each of kTile rows and columns
// (fewer at the edges) and kTileUnits units, one row of tiles after the other: units_per_row are those of a row of
// tiles. Such segments come first in a table, so a tile begins at a multiple of kTileUnits units.
constexpr int64_t kTile = 128, kTileUnits = kTile * kTile / 8;
constexpr int kMaxRank = 64;

// A factor of the noise of low rank of one matrix, L (domain kLeft) or R (kRight), for N seeds: `count` normals each,
// those of the stream from index 0 on, one seed after the other, from element N * offset of the output on.
struct Factor {
  int64_t offset, count;  // offset is a multiple of 8
  uint64_t stream;
  int64_t domain;
  int64_t unit_end;  // noise blocks of one seed, of this factor and all before it
};
static_assert(sizeof(Factor) == 40, "es_kernels/low_rank.py lays it out by hand");

inline
#ifdef __CUDACC__
    __host__ __device__
#endif
    int dtype_size(int32_t dtype) {
  return dtype == kF32 ? 4 : 2;
}

}  // namespace es
