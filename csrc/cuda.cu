// The CUDA side of the C ABI: thin kernels over the bodies of add_noise.h and fingerprint.h.
//
// One launch serves the whole table. The grid is persistent: a block of threads takes every gridDim-th tile of units
// and walks the segments that lie in it. A thread computes a noise block (8 values) at a time, several in flight. What
// costs: 10 Philox rounds are 36 instructions a block, box_muller 25 a pair, so about 17 a value; memory traffic at
// full rate leaves room for about 31 (2 + 2 B a value on an H200). So the inner loops count instructions: round keys
// sit in uniform registers (one seed) or arrive by six 128-bit shared-memory loads (more), and NaNs, which are rare,
// are looked for once in 16 values.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>

#include "add_noise.h"
#include "es_kernels.h"
#include "fingerprint.h"
#include "segments.h"

namespace {

using namespace es;

constexpr int kThreads = 256;
constexpr int kLargestTile = 8192;  // units, 65536 values
constexpr int kSeedsAtATime = 128;  // in shared memory

struct Arguments {
  const Segment* segments;
  int64_t n_segments, n_units, n_seeds;
  const uint64_t* seeds;          // device memory, or nullptr: host_seeds
  const float* coefs;             // device memory, or nullptr: host_coefs
  const uint64_t* rounding_seed;  // device memory, or nullptr: host_rounding_seed
  uint64_t host_rounding_seed;
  float decay;
  int32_t tile;  // units
  float host_coefs[ES_CUDA_HOST_SEEDS];
  uint64_t host_seeds[ES_CUDA_HOST_SEEDS];
  // Of the noise of segments that have a width:
  int32_t rank;
  float scale;        // 1 / sqrt(rank)
  int32_t ranks;      // of a seed in a round: low_rank
  int32_t per_round;  // seeds
  uint32_t inverse;   // i * inverse >> 16 == i / ranks for i < 4096
};

// ---- 8 values of one dtype, to and from 128-bit registers ----

// Addresses come out of memory as integers, so the compiler must be told that they are global: ld and st without a
// state space cost a check each. (Without __CUDA_ARCH__ this file runs on the CPU: tests/es_kernels/cuda_on_cpu.)
__device__ __forceinline__ uint4 load_global(const uint4* p) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p)));
  return v;
#else
  return *p;
#endif
}

__device__ __forceinline__ void store_global(uint4* p, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(x), "r"(y), "r"(z),
               "r"(w)
               : "memory");
#else
  *p = {x, y, z, w};
#endif
}

// a, and of f32 b, hold them.
__device__ __forceinline__ void unpack(int32_t dtype, const uint4& a, const uint4& b, f32 v[8]) {
  uint32_t w[4] = {a.x, a.y, a.z, a.w};
  if (dtype == kF32) {
    v[0] = float_of(a.x), v[1] = float_of(a.y), v[2] = float_of(a.z), v[3] = float_of(a.w);
    v[4] = float_of(b.x), v[5] = float_of(b.y), v[6] = float_of(b.z), v[7] = float_of(b.w);
  } else if (dtype == kBF16) {
    for (int i = 0; i < 4; i++) v[2 * i] = float_of(w[i] << 16), v[2 * i + 1] = float_of(w[i] & 0xFFFF0000u);
  } else {
    for (int i = 0; i < 4; i++) {
      float2 f = __half22float2(*reinterpret_cast<const __half2*>(&w[i]));
      v[2 * i] = f.x, v[2 * i + 1] = f.y;
    }
  }
}

__device__ __forceinline__ void unpack(int32_t dtype, const uint4* p, f32 v[8]) {
  const uint4 a = load_global(p);
  if (dtype == kF32) unpack(dtype, a, load_global(p + 1), v);
  else unpack(dtype, a, a, v);
}

// The instructions that round to nearest, and float arithmetic itself, make NaNs of their own (7FFF, 7FFFFFFF); the
// contract has one NaN. A sum is NaN if any term is, so a sum over the values (packed, where the format allows it)
// tells whether to look closer.
__device__ __forceinline__ bool maybe_nan(const f32 v[8]) {
  f32 s = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  return !(s == s);
}

template <class Pair>
__device__ __forceinline__ bool maybe_nan(const uint32_t w[4]) {
  const Pair* p = reinterpret_cast<const Pair*>(w);
  Pair s = __hadd2(__hadd2(p[0], p[1]), __hadd2(p[2], p[3]));
  return !__hbeq2(s, s);
}

__device__ __forceinline__ uint32_t low_halves(uint32_t even, uint32_t odd) { return __byte_perm(even, odd, 0x5410); }

template <bool STOCHASTIC>
__device__ __forceinline__ void pack(int32_t dtype, f32 v[8], const u32 r[8], uint4* p) {
  uint32_t w[4];
  if (dtype == kF32) {
    if (maybe_nan(v))
      for (int j = 0; j < 8; j++) v[j] = float_of(to_f32(v[j]));
    store_global(p + 1, bits_of(v[4]), bits_of(v[5]), bits_of(v[6]), bits_of(v[7]));
    for (int i = 0; i < 4; i++) w[i] = bits_of(v[i]);
  } else if (STOCHASTIC) {
    for (int i = 0; i < 4; i++)
      w[i] = dtype == kBF16
                 ? low_halves(to_bf16_stochastic(v[2 * i], r[2 * i]), to_bf16_stochastic(v[2 * i + 1], r[2 * i + 1]))
                 : low_halves(to_f16_stochastic(v[2 * i], r[2 * i]), to_f16_stochastic(v[2 * i + 1], r[2 * i + 1]));
  } else if (dtype == kBF16) {
    for (int i = 0; i < 4; i++) {
      __nv_bfloat162 h = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
      w[i] = *reinterpret_cast<uint32_t*>(&h);
    }
    if (maybe_nan<__nv_bfloat162>(w))
      for (int i = 0; i < 4; i++) w[i] = low_halves(to_bf16_nearest(v[2 * i]), to_bf16_nearest(v[2 * i + 1]));
  } else {
    for (int i = 0; i < 4; i++) {
      __half2 h = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
      w[i] = *reinterpret_cast<uint32_t*>(&h);
    }
    if (maybe_nan<__half2>(w))
      for (int i = 0; i < 4; i++) w[i] = low_halves(to_f16_nearest(v[2 * i]), to_f16_nearest(v[2 * i + 1]));
  }
  store_global(p, w[0], w[1], w[2], w[3]);
}

// ---- one unit of any segment: where it is, masked loads and stores ----

struct Unit {
  uint64_t block;
  int64_t row, col;  // of lane 0; col may be negative, or past the row's end
  int from, to;      // the lanes that belong to the row; none if from >= to
};

__device__ __forceinline__ Unit locate(const Segment& s, int64_t u) {
  Unit unit;
  unit.row = s.rows == 1 ? 0 : u / s.units_per_row;
  u -= unit.row * s.units_per_row;
  uint64_t first = s.first + unit.row * s.index_stride;
  unit.block = (first >> 3) + u;
  unit.col = 8 * u - (int64_t)(first & 7);
  unit.from = unit.col < 0 ? (int)-unit.col : 0;
  unit.to = s.cols - unit.col < 8 ? (int)(s.cols - unit.col) : 8;
  return unit;
}

__device__ __forceinline__ BlockId block_id(uint64_t block, uint64_t stream, uint32_t domain) {
  return {(uint32_t)block, (uint32_t)(block >> 32) | domain << 29, (uint32_t)stream, (uint32_t)(stream >> 32)};
}

__device__ __forceinline__ void load_unit(const Segment& s, const Unit& unit, uint64_t address, int64_t stride,
                                          int32_t dtype, f32 v[8]) {
  const int size = dtype_size(dtype);
  const char* p = (const char*)address + (unit.row * stride + unit.col) * size;
  if (s.vector_path) {
    unpack(dtype, (const uint4*)p, v);
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; j++) {
    v[j] = 0;
    if (j < unit.from || j >= unit.to) continue;
    if (dtype == kF32) v[j] = ((const float*)p)[j];
    else if (dtype == kBF16) v[j] = from_bf16(((const uint16_t*)p)[j]);
    else v[j] = from_f16(((const uint16_t*)p)[j]);
  }
}

template <bool STOCHASTIC>
__device__ __forceinline__ void store_lanes(int32_t dtype, int from, int to, const f32 v[8], const u32 r[8], char* p) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    if (j < from || j >= to) continue;
    if (dtype == kF32) ((uint32_t*)p)[j] = to_f32(v[j]);
    else if (dtype == kBF16) ((uint16_t*)p)[j] = STOCHASTIC ? to_bf16_stochastic(v[j], r[j]) : to_bf16_nearest(v[j]);
    else ((uint16_t*)p)[j] = STOCHASTIC ? to_f16_stochastic(v[j], r[j]) : to_f16_nearest(v[j]);
  }
}

template <bool STOCHASTIC>
__device__ __forceinline__ void store_unit(const Segment& s, const Unit& unit, f32 v[8], const u32 r[8]) {
  char* p = (char*)s.out + (unit.row * s.out_stride + unit.col) * dtype_size(s.out_dtype);
  if (s.vector_path) pack<STOCHASTIC>(s.out_dtype, v, r, (uint4*)p);
  else store_lanes<STOCHASTIC>(s.out_dtype, unit.from, unit.to, v, r, p);
}

// ---- the walk over tiles and segments ----

// Calls body(segment, lo, hi) with the units [lo, hi) of each segment that this block of threads has to do.
template <class Body>
__device__ __forceinline__ void for_each_piece(const Segment* segments, int64_t n_segments, int64_t n_units,
                                               int32_t tile_units, Body body) {
  int64_t i = 0;
  for (int64_t tile = (int64_t)blockIdx.x * tile_units; tile < n_units; tile += (int64_t)gridDim.x * tile_units) {
    const int64_t tile_end = tile + tile_units < n_units ? tile + tile_units : n_units;
    if (i == 0) {  // the first tile: binary search; from there on segments only advance
      int64_t n = n_segments;
      while (n > 0) {
        int64_t half = n / 2;
        if (segments[i + half].unit_end <= tile) i += half + 1, n -= half + 1;
        else n = half;
      }
    }
    while (segments[i].unit_end <= tile) i++;
    for (int64_t at = tile; at < tile_end;) {
      const Segment& s = segments[i];
      const int64_t start = i == 0 ? 0 : segments[i - 1].unit_end, end = s.unit_end < tile_end ? s.unit_end : tile_end;
      body(s, at - start, end - start);
      at = end;
      if (at < tile_end) i++;
    }
  }
}

// ---- the walk over a piece of whole, aligned blocks ----

struct Place {
  BlockId id;
  const uint4* base;
  uint4* out;
};

__host__ __device__ constexpr int vectors(int32_t dtype) { return dtype == kF32 ? 2 : 1; }  // of 16 bytes a block

// Over one row a thread's next block is a constant distance on.
template <uint32_t DOMAIN, int32_t OUT, int32_t BASE>
class OneRow {
  Place place;

 public:
  static constexpr bool kOneRow = true;
  __device__ __forceinline__ OneRow(const Segment& s, int64_t lo) : place{block_id(s.first >> 3, s.stream, DOMAIN)} {
    place.id.low += (uint32_t)lo + threadIdx.x;  // does not carry: EsSegment
    place.base = (const uint4*)s.base + (lo + threadIdx.x) * vectors(BASE),
    place.out = (uint4*)s.out + (lo + threadIdx.x) * vectors(OUT);
  }
  __device__ __forceinline__ Place at(int k) const {
    return {{place.id.low + k * kThreads, place.id.high, place.id.stream_low, place.id.stream_high},
            place.base + k * kThreads * vectors(BASE),
            place.out + k * kThreads * vectors(OUT)};
  }
  __device__ __forceinline__ void advance(int n) { place = at(n); }
};

// Whether Rows can hold the strides.
__device__ __forceinline__ bool fits_rows(const Segment& s) {
  return s.index_stride < 1ull << 35 && s.base_stride < 1 << 30 && s.out_stride < 1 << 30;
}

// Over several it counts row and unit on from those of its first block: a division each would cost 10 instructions a
// value.
template <uint32_t DOMAIN, int32_t OUT, int32_t BASE>
class Rows {
  uint64_t block, base, out, stream;               // where the piece's first row begins
  uint32_t block_stride, base_stride, out_stride;  // blocks, bytes, bytes
  uint32_t units_per_row, row, unit, row_step, unit_step;

 public:
  static constexpr bool kOneRow = false;
  __device__ __forceinline__ Rows(const Segment& s, int64_t lo) {
    const int64_t first = lo / s.units_per_row;
    block = (s.first + first * s.index_stride) >> 3, stream = s.stream;
    base_stride = s.base_stride * dtype_size(BASE), base = s.base + first * base_stride;
    out_stride = s.out_stride * dtype_size(OUT), out = s.out + first * out_stride;
    block_stride = s.index_stride >> 3, units_per_row = s.units_per_row;
    unit = (uint32_t)(lo - first * units_per_row) + threadIdx.x;
    row = unit / units_per_row, unit -= row * units_per_row;
    row_step = kThreads / units_per_row, unit_step = kThreads % units_per_row;
  }
  __device__ __forceinline__ Place at(int) const {
    return {block_id(block + (uint64_t)row * block_stride + unit, stream, DOMAIN),
            (const uint4*)(base + (uint64_t)row * base_stride) + unit * vectors(BASE),
            (uint4*)(out + (uint64_t)row * out_stride) + unit * vectors(OUT)};
  }
  __device__ __forceinline__ void advance(int) {
    row += row_step, unit += unit_step;
    if (unit >= units_per_row) unit -= units_per_row, row++;
  }
};

// A seed, ready for use: in registers, or in shared memory.
struct alignas(16) Seed {
  RoundKeys<10> keys;
  float coef;
  uint32_t padding[3];
};

// b <- b + coef * noise, as one fma.
__device__ __forceinline__ void add_seed(const BlockId& at, const Seed& seed, f32 b[8]) {
  f32 noise[8];
  noise_block(at, seed.keys, noise);
  fma_block(seed.coef, noise, b);
}

// ---- none, one or two seeds from the host, no decay: restore, perturb, swap ----

// A thread's blocks in flight. With two seeds they share the loads of the keys.
__host__ __device__ constexpr int perturb_blocks(int64_t seeds) { return seeds == 1 ? 2 : 4; }

// Calls some(n) for a thread's share of `units`: for BLOCKS of them at once, then for one after the other.
template <int BLOCKS, class Some>
__device__ __forceinline__ void in_blocks(int64_t units, Some some) {
  int left = (int)units - (int)threadIdx.x;  // a tile has few
#pragma unroll 1
  for (; left > (BLOCKS - 1) * kThreads; left -= BLOCKS * kThreads) some(std::integral_constant<int, BLOCKS>());
  if constexpr (BLOCKS > 1) {
#pragma unroll 1
    for (; left > 0; left -= kThreads) some(std::integral_constant<int, 1>());
  }
}

// Units [lo, hi) of a segment of whole, aligned blocks: loads first.
template <bool STOCHASTIC, int SEEDS, int32_t OUT, int32_t BASE, template <uint32_t, int32_t, int32_t> class Walk>
__device__ __forceinline__ void perturb_vectors(const Segment& s, int64_t lo, int64_t hi, const Seed* seeds,
                                                const RoundKeys<10>& rounding_keys) {
  Walk<kNoise, OUT, BASE> walk(s, lo);
  auto some = [&](auto count) {
    constexpr int n = decltype(count)::value;
    f32 b[n][8];
#pragma unroll
    for (int k = 0; k < n; k++) unpack(BASE, walk.at(k).base, b[k]);
    if constexpr (SEEDS == 2) {
      const Seed first = seeds[0];
#pragma unroll
      for (int k = 0; k < n; k++) {
        f32 acc[8] = {};
        add_seed(walk.at(k).id, first, acc);
        add_block(b[k], acc);
      }
    }
    Seed last;
    if constexpr (SEEDS > 0) last = seeds[SEEDS - 1];
#pragma unroll
    for (int k = 0; k < n; k++) {
      const Place at = walk.at(k);
      if constexpr (SEEDS > 0) add_seed(at.id, last, b[k]);
      u32 r[8];
      if (STOCHASTIC && OUT != kF32) rounding_thresholds(at.id, rounding_keys, r);
      pack<STOCHASTIC>(OUT, b[k], r, at.out);
    }
    walk.advance(n);
  };
  // With two blocks at once Rows spills in the kernel for one seed.
  in_blocks<walk.kOneRow ? perturb_blocks(SEEDS) : 1>(hi - lo, some);
}

// The same for the segment's dtypes; false if there is no such kernel: all pairs for restore, swap and Rows would
// double the library, so those have the pairs that models and their bases have.
template <bool STOCHASTIC, int SEEDS, template <uint32_t, int32_t, int32_t> class Walk>
__device__ __forceinline__ bool perturb_of_dtypes(const Segment& s, int64_t lo, int64_t hi, const Seed* seeds,
                                                  const RoundKeys<10>& rounding_keys) {
  constexpr bool all_pairs = SEEDS == 1 && Walk<kNoise, kF32, kF32>::kOneRow;
  switch (s.out_dtype * 3 + s.base_dtype) {
#define ES_CASE(OUT, BASE)                                                                               \
  case OUT * 3 + BASE:                                                                                   \
    if constexpr (all_pairs || BASE == OUT || BASE == kF32)                                              \
      return perturb_vectors<STOCHASTIC, SEEDS, OUT, BASE, Walk>(s, lo, hi, seeds, rounding_keys), true; \
    break;
    // clang-format off
    ES_CASE(kF32, kF32) ES_CASE(kF32, kBF16) ES_CASE(kF32, kF16) ES_CASE(kBF16, kF32) ES_CASE(kBF16, kBF16)
    ES_CASE(kBF16, kF16) ES_CASE(kF16, kF32) ES_CASE(kF16, kBF16) ES_CASE(kF16, kF16)
    // clang-format on
#undef ES_CASE
  }
  return false;
}

// Blocks of threads that a multiprocessor should hold. One seed: 48 registers on sm_80 and sm_90, where the round keys
// fit the uniform registers; sm_100 and sm_120 would spill, and get 64.
template <int SEEDS>
constexpr int perturb_residents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
  return SEEDS == 2 ? 2 : 5;
#else
  return SEEDS == 2 ? 2 : 4;
#endif
}

template <bool STOCHASTIC, int SEEDS>
__global__ void __launch_bounds__(kThreads, perturb_residents<SEEDS>()) perturb(const __grid_constant__ Arguments a) {
  const RoundKeys<10> rounding_keys(a.host_rounding_seed);
  __shared__ Seed shared[2];
  Seed one;
  const Seed* seeds = SEEDS == 1 ? &one : shared;
  if constexpr (SEEDS == 1) one.keys = RoundKeys<10>(a.host_seeds[0]), one.coef = a.host_coefs[0];
  if constexpr (SEEDS == 2) {
    if (threadIdx.x < 2)
      shared[threadIdx.x].keys = RoundKeys<10>(a.host_seeds[threadIdx.x]),
      shared[threadIdx.x].coef = a.host_coefs[threadIdx.x];
    __syncthreads();
  }
  for_each_piece(a.segments, a.n_segments, a.n_units, a.tile, [&](const Segment& s, int64_t lo, int64_t hi) {
    if (s.vector_path && s.rows == 1 && perturb_of_dtypes<STOCHASTIC, SEEDS, OneRow>(s, lo, hi, seeds, rounding_keys))
      return;
    if (s.vector_path && fits_rows(s) && perturb_of_dtypes<STOCHASTIC, SEEDS, Rows>(s, lo, hi, seeds, rounding_keys))
      return;
#pragma unroll 1
    for (int64_t u = lo + threadIdx.x; u < hi; u += kThreads) {
      const Unit unit = locate(s, u);
      const BlockId id = block_id(unit.block, s.stream, kNoise);
      f32 b[8];
      load_unit(s, unit, s.base, s.base_stride, s.base_dtype, b);
      if constexpr (SEEDS == 2) {
        f32 acc[8] = {};
        add_seed(id, seeds[0], acc);
        add_block(b, acc);
      }
      if constexpr (SEEDS > 0) add_seed(id, seeds[SEEDS - 1], b);
      u32 r[8];
      if (STOCHASTIC) rounding_thresholds(id, rounding_keys, r);
      store_unit<STOCHASTIC>(s, unit, b, r);
    }
  });
}

// ---- any number of seeds, from the host or the device; decay and anchor: update ----

constexpr int kUpdateBlocks = 4;  // a thread's in flight: they share the keys

// Fills `shared` with the seeds from `from` on; how many they are.
__device__ __forceinline__ int fetch_seeds(const Arguments& a, int64_t from, Seed* shared) {
  const int n = (int)(a.n_seeds - from < kSeedsAtATime ? a.n_seeds - from : kSeedsAtATime);
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    shared[i].keys = RoundKeys<10>(a.seeds ? a.seeds[from + i] : a.host_seeds[from + i]);
    shared[i].coef = a.coefs ? a.coefs[from + i] : a.host_coefs[from + i];
  }
  __syncthreads();
  return n;
}

template <bool STOCHASTIC>
__device__ __forceinline__ RoundKeys<10> rounding_keys_of(const Arguments& a) {
  return RoundKeys<10>(STOCHASTIC ? (a.rounding_seed ? *a.rounding_seed : a.host_rounding_seed) : 0);
}

// Units [lo, hi) of a segment of full noise, BLOCKS of a thread at once. `shared` holds the seeds, if they fit.
template <bool STOCHASTIC, int BLOCKS>
__device__ __forceinline__ void update_piece(const Arguments& a, const Segment& s, int64_t lo, int64_t hi, Seed* shared,
                                             int& n, const RoundKeys<10>& rounding_keys) {
#pragma unroll 1
  for (int64_t at = lo; at < hi; at += BLOCKS * kThreads) {
    f32 acc[BLOCKS][8];
    BlockId id[BLOCKS];
#pragma unroll
    for (int k = 0; k < BLOCKS; k++) {
      id[k] = block_id(locate(s, at + k * kThreads + threadIdx.x).block, s.stream, kNoise);
      for (int j = 0; j < 8; j++) acc[k][j] = 0;
    }
    // acc <- base, decayed, (+ acc): what the last seed's noise is added to.
    auto add_base = [&] {
#pragma unroll
      for (int k = 0; k < BLOCKS; k++) {
        const int64_t u = at + k * kThreads + threadIdx.x;
        if (u >= hi) continue;
        const Unit unit = locate(s, u);
        f32 b[8];
        load_unit(s, unit, s.base, s.base_stride, s.base_dtype, b);
        if (a.decay != 0) {
          f32 anchor[8] = {};
          if (s.anchor) load_unit(s, unit, s.anchor, s.anchor_stride, s.anchor_dtype, anchor);
          decay_block(b, anchor, a.decay);
        }
        if (a.n_seeds > 1) add_block(b, acc[k]);
        for (int j = 0; j < 8; j++) acc[k][j] = b[j];
      }
    };
    auto add_to_all = [&](const Seed& seed) {
      const Seed local = seed;
#pragma unroll
      for (int k = 0; k < BLOCKS; k++) add_seed(id[k], local, acc[k]);
    };
    for (int64_t from = 0; from < a.n_seeds; from += kSeedsAtATime) {
      if (a.n_seeds > kSeedsAtATime) n = fetch_seeds(a, from, shared);
      const int plain = from + n == a.n_seeds ? n - 1 : n;
#pragma unroll 1
      for (int i = 0; i < plain; i++) add_to_all(shared[i]);
    }
    add_base();
    if (a.n_seeds > 0) add_to_all(shared[n - 1]);
#pragma unroll
    for (int k = 0; k < BLOCKS; k++) {
      const int64_t u = at + k * kThreads + threadIdx.x;
      if (u >= hi) continue;
      u32 r[8];
      if (STOCHASTIC) rounding_thresholds(id[k], rounding_keys, r);
      store_unit<STOCHASTIC>(s, locate(s, u), acc[k], r);
    }
  }
}

template <bool STOCHASTIC>
__global__ void __launch_bounds__(kThreads, 2) update(const __grid_constant__ Arguments a) {
  __shared__ Seed shared[kSeedsAtATime];
  int n = fetch_seeds(a, 0, shared);
  const RoundKeys<10> rounding_keys = rounding_keys_of<STOCHASTIC>(a);
  for_each_piece(a.segments, a.n_segments, a.n_units, a.tile, [&](const Segment& s, int64_t lo, int64_t hi) {
    update_piece<STOCHASTIC, kUpdateBlocks>(a, s, lo, hi, shared, n, rounding_keys);
  });
}

// ---- noise of low rank: the same on the tiles of matrices ----
//
// A term of the noise is c * L of a row times R of a column: one of a seed for each of its ranks. A block of threads
// draws the factors of some terms for the rows and columns of its tile into shared memory, and each thread adds the
// terms, in order, to its 8 rows of 8 columns, in registers. A factor serves 128 elements, so an element costs little
// more than its fma.
//
// A perturbation loads the base first, an update before its last seed. Each has a kernel: where one does both, it moves
// the values between registers.

// At a time, at most. An update shares the costs of a round among more; 8 are all terms of a perturbation of rank 8.
__host__ __device__ constexpr int terms(bool update) { return update ? 16 : 8; }

// Row or column 8 i + j lies at place 4 i + j for j < 4, else 64 + 4 i + j - 4: so the threads of a warp, each with its
// eight, read neighbouring 16 bytes.
struct Factors {
  alignas(16) f32 of[terms(true)][2][kTile];  // c * L and R
};
__device__ __forceinline__ int place_of(int i) { return (i >> 3) * 4 + (i & 3) + (i & 4) * (kTile / 8); }

// The tile at hand, in shared memory.
struct Tile {
  int64_t row, col;  // of its first element, in the segment
  uint32_t whole;    // kTile x kTile elements, in whole, aligned blocks
  uint32_t blocks;   // of both sides
  // The normals that are L of its rows and R of its columns: index of the first, indices from one row or column to the
  // next. Of consecutive rows they are consecutive, unless a round has only some ranks of a seed; then, and where the
  // segment has every n-th row of the matrix, each row has its own blocks, and block i is i / kTile of row i % kTile.
  struct alignas(16) Side {
    uint64_t first, step, stream;
    uint32_t domain, blocks, row_mask, row_bits;  // 0, 0: consecutive
  } side[2];
  // At rank 1 each side is 16 whole blocks from `start` on, except at odd places: one for each lane of a warp.
  uint32_t by_lane;
  alignas(16) BlockId start[2];
};

// Goes through the tiles of a piece of a segment. One thread does, since three divisions are many instructions.
struct TileWalk {
  int64_t row, col, rows, cols;
  int32_t vector_path;
  uint64_t first_row, row_step, first_col, stream;  // of the matrix

  __device__ __forceinline__ void begin(const Segment& s, int64_t lo) {
    const int64_t at = lo / kTileUnits, tiles = s.units_per_row / kTileUnits, tile_row = at / tiles;
    row = tile_row * kTile, col = (at - tile_row * tiles) * kTile, rows = s.rows, cols = s.cols;
    vector_path = s.vector_path, stream = s.stream;
    first_row = s.first / s.width, first_col = s.first - first_row * s.width;
    row_step = s.rows > 1 ? s.index_stride / s.width : 1;
  }
  __device__ __forceinline__ void next(int rank, int ranks, Tile& tile) {
    tile.row = row, tile.col = col;
    tile.whole = vector_path && row + kTile <= rows && col + kTile <= cols;
    tile.by_lane = rank == 1;
    const uint64_t lines[2] = {first_row + row * row_step, first_col + col}, steps[2] = {row_step, 1};
    for (int i = 0; i < 2; i++) {
      const uint64_t first = lines[i] * rank;
      const bool by_row = rank > ranks || steps[i] != 1;
      const int of_row = (ranks + (rank % 8 ? 14 : 7)) / 8, together = (int)kTile / 8 * rank + (first % 8 != 0);
      Tile::Side& side = tile.side[i];
      side.first = first, side.step = steps[i] * rank, side.stream = stream, side.domain = (i ? kRight : kLeft) << 29;
      side.blocks = by_row ? (int)kTile * of_row : together;
      side.row_mask = by_row ? kTile - 1 : 0, side.row_bits = by_row ? 7 : 0;
      tile.start[i] = block_id(first >> 3, stream, i ? kRight : kLeft);
      tile.by_lane &= !by_row && first % 8 == 0 && tile.start[i].low <= UINT32_MAX - kTile / 8;
    }
    tile.blocks = tile.side[0].blocks + tile.side[1].blocks;
    col += kTile;
    if (col >= cols) col = 0, row += kTile;
  }
};

// What of the terms is in shared memory at a time: the q of [q, q + ranks) of some seeds.
struct Round {
  int seed, seeds, q, ranks;
};

static_assert(kTile == 1 << 7 && 2 * kTile / 8 == 32, "row_bits; by_lane");

// threadIdx.x; asked anew on sm_80, which else keeps what follows from it in registers, and spills.
__device__ __forceinline__ uint32_t this_thread() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return threadIdx.x;
#endif
}

// What `thread` of 32 * terms() draws: a block of threads stands for them in turn.
__device__ __forceinline__ void draw_factors(const Arguments& a, const Tile& tile, const Round& round,
                                             const Seed* seeds, uint32_t thread, Factors& factors) {
  const uint32_t of_seed = thread / 32 * a.inverse >> 16;  // a seed's threads are as many warps as its ranks
  if ((int)of_seed >= round.seeds) return;
  const Seed seed = seeds[(uint32_t)round.seed % kSeedsAtATime + of_seed];
  const float c = seed.coef * a.scale;
  const uint32_t lefts = tile.side[0].blocks;
  uint32_t i = thread - of_seed * a.ranks * 32;
#pragma unroll 1
  do {
    const bool right = i >= lefts;
    const Tile::Side side = tile.side[right];
    const uint32_t at = right ? i - lefts : i, row = at & side.row_mask, block = at >> side.row_bits;
    const uint64_t first = side.first + row * side.step + round.q, id = (first >> 3) + block;
    f32 v[8];
    noise_block(
        {(uint32_t)id, (uint32_t)(id >> 32) | side.domain, (uint32_t)side.stream, (uint32_t)(side.stream >> 32)},
        seed.keys, v);
    for (int j = 0; j < 8; j++) v[j] = v[j] * (right ? 1.0f : c);
    f32* to = factors.of[of_seed * a.ranks][right];
    const bool by_row = side.row_mask != 0;
    const int from = 8 * block - (int)(first & 7), end = by_row ? round.ranks : (int)kTile * a.rank;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int k = from + j, element = by_row ? row : k * a.inverse >> 16, q = by_row ? k : k - element * a.rank;
      if (k >= 0 && k < end) to[q * 2 * kTile + place_of(element)] = v[j];
    }
    i += a.ranks * 32;
  } while (i < tile.blocks);
}

// The same for a tile that is drawn by_lane: a warp draws the factors of a seed.
__device__ __forceinline__ void draw_by_lane(const Tile& tile, const Round& round, const Seed* seeds,
                                             Factors& factors) {
  const uint32_t thread = this_thread(), lane = thread % (kTile / 8), right = thread / (kTile / 8) % 2;
#pragma unroll 1
  for (int i = thread / 32; i < round.seeds; i += kThreads / 32) {
    const Seed seed = seeds[(uint32_t)round.seed % kSeedsAtATime + i];
    BlockId id = tile.start[right];
    id.low += lane;
    f32 v[8];
    noise_block(id, seed.keys, v);
    const float c = right ? 1.0f : seed.coef;
    for (int j = 0; j < 8; j++) v[j] = v[j] * c;
    float4* to = (float4*)factors.of[i][right] + lane;
    to[0] = {v[0], v[1], v[2], v[3]}, to[kTile / 8] = {v[4], v[5], v[6], v[7]};
  }
}

// x <- x + c L R^T of one term, in 8 rows of 8 columns.
__device__ __forceinline__ void add_term(const f32 term[2][kTile], f32 x[8][8]) {
  f32 left[8], right[8];
  auto eight = [](const f32* factor, int i, f32 v[8]) {
    const float4 low = ((const float4*)factor)[i], high = ((const float4*)factor)[kTile / 8 + i];
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  };
  eight(term[0], threadIdx.x / 16, left);
  eight(term[1], threadIdx.x % 16, right);
#pragma unroll
  for (int i = 0; i < 8; i++) fma_block(left[i], right, x[i]);
}

// Else the compiler does the additions of all formats once, behind their branches, where all terms have to be in
// registers.
__device__ __forceinline__ void stay(f32& sum) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(sum));
#endif
}

// x <- base, or base, decayed, + x: of 8 whole, aligned blocks.
template <int32_t BASE, bool ADD>
__device__ __forceinline__ void load_base(const Arguments& a, const Segment& s, int64_t row, int64_t col, f32 x[8][8]) {
  const char* p = (const char*)s.base + (row * s.base_stride + col) * dtype_size(BASE);
  const int64_t stride = s.base_stride * dtype_size(BASE);
  constexpr int kVectors = vectors(BASE), kRows = ADD ? 4 / kVectors : 8;  // in flight
#pragma unroll
  for (int from = 0; from < 8; from += kRows) {
    uint4 raw[kRows][kVectors];
#pragma unroll
    for (int i = 0; i < kRows; i++, p += stride)
      for (int v = 0; v < kVectors; v++) raw[i][v] = load_global((const uint4*)p + v);
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      f32 b[8];
      unpack(BASE, raw[i][0], raw[i][kVectors - 1], b);
      if (ADD && a.decay != 0) {
        f32 anchor[8] = {};
        const int64_t offset = (row + from + i) * s.anchor_stride + col;
        if (s.anchor) unpack(BASE, (const uint4*)(s.anchor + offset * dtype_size(BASE)), anchor);
        decay_block(b, anchor, a.decay);
      }
      for (int j = 0; j < 8; j++) {
        x[from + i][j] = ADD ? x[from + i][j] + b[j] : b[j];
        stay(x[from + i][j]);
      }
    }
  }
}

template <bool ADD>
__device__ __forceinline__ void load_base(const Arguments& a, const Segment& s, int64_t row, int64_t col, f32 x[8][8]) {
  if (s.base_dtype == kF32) load_base<kF32, ADD>(a, s, row, col, x);
  else if (s.base_dtype == kBF16) load_base<kBF16, ADD>(a, s, row, col, x);
  else load_base<kF16, ADD>(a, s, row, col, x);
}

// 8 whole, aligned blocks of 16 bits, to nearest: NaNs, which conversion makes 7FFF, are looked for once.
template <int32_t OUT>
__device__ __forceinline__ void store_nearest(const Segment& s, int64_t row, int64_t col, const f32 x[8][8]) {
  using Pair = std::conditional_t<OUT == kBF16, __nv_bfloat162, __half2>;
  uint32_t w[8][4];
  Pair sums[4];
#pragma unroll
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 4; j++) {
      Pair pair;
      if constexpr (OUT == kBF16) pair = __floats2bfloat162_rn(x[i][2 * j], x[i][2 * j + 1]);
      else pair = __floats2half2_rn(x[i][2 * j], x[i][2 * j + 1]);
      sums[j] = i ? __hadd2(sums[j], pair) : pair;
      w[i][j] = *reinterpret_cast<uint32_t*>(&pair);
    }
  const Pair sum = __hadd2(__hadd2(sums[0], sums[1]), __hadd2(sums[2], sums[3]));
  if (!__hbeq2(sum, sum)) {
    constexpr uint32_t nan = OUT == kBF16 ? 0x7FC0 : 0x7E00;
#pragma unroll
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < 4; j++) {
        const uint32_t low = w[i][j] & 0xFFFFu, high = w[i][j] >> 16;
        w[i][j] = low_halves(low == 0x7FFF ? nan : low, high == 0x7FFF ? nan : high);
      }
  }
  char* p = (char*)s.out + (row * s.out_stride + col) * dtype_size(OUT);
#pragma unroll
  for (int i = 0; i < 8; i++, p += s.out_stride * dtype_size(OUT))
    store_global((uint4*)p, w[i][0], w[i][1], w[i][2], w[i][3]);
}

template <bool STOCHASTIC, int32_t OUT>
__device__ __forceinline__ void store_vectors(const Segment& s, int64_t row, int64_t col,
                                              const RoundKeys<10>& rounding_keys, f32 x[8][8]) {
  if constexpr (!STOCHASTIC && OUT != kF32) return store_nearest<OUT>(s, row, col, x);
  char* p = (char*)s.out + (row * s.out_stride + col) * dtype_size(OUT);
  const int64_t stride = s.out_stride * dtype_size(OUT);
  uint64_t index = s.first + row * s.index_stride + col;
#pragma unroll
  for (int i = 0; i < 8; i++, p += stride, index += s.index_stride) {
    u32 r[8];
    if (STOCHASTIC && OUT != kF32) rounding_thresholds(block_id(index >> 3, s.stream, kNoise), rounding_keys, r);
    pack<STOCHASTIC>(OUT, x[i], r, (uint4*)p);
  }
}

// The thresholds of the 8 elements from `index` on, which lie in two blocks.
__device__ __forceinline__ void thresholds_from(uint64_t index, uint64_t stream, const RoundKeys<10>& keys, u32 r[8]) {
  u32 w[9];
  for (int i = 0; i < 2; i++) {
    const BlockId id = block_id((index >> 3) + i, stream, kRounding);
    random_words(id.low, id.high, id.stream_low, id.stream_high, keys, w + 4 * i);
  }
  w[8] = 0;
  if (index & 4)
    for (int i = 0; i < 6; i++) w[i] = w[i + 2];
  if (index & 2)
    for (int i = 0; i < 5; i++) w[i] = w[i + 1];
  if (index & 1)
    for (int i = 0; i < 4; i++) w[i] = w[i] >> 16 | w[i + 1] << 16;
  for (int i = 0; i < 4; i++) r[2 * i] = w[i] & 0xFFFFu, r[2 * i + 1] = w[i] >> 16;
}

// Calls body(unit, x[0]) for the 8 rows of a thread at an edge, or of elements that are not aligned. x turns by a row
// each time, since registers have no index.
template <class Body>
__device__ __forceinline__ void for_each_row(const Segment& s, int64_t row, int64_t col, f32 x[8][8], Body body) {
#pragma unroll 1
  for (int i = 0; i < 8; i++, row++) {
    f32 first[8];
    for (int j = 0; j < 8; j++) first[j] = x[0][j];
    if (row < s.rows && col < s.cols) body(Unit{0, row, col, 0, s.cols - col < 8 ? (int)(s.cols - col) : 8}, first);
#pragma unroll
    for (int k = 0; k < 7; k++)
      for (int j = 0; j < 8; j++) x[k][j] = x[k + 1][j];
    for (int j = 0; j < 8; j++) x[7][j] = first[j];
  }
}

template <bool STOCHASTIC, bool UPDATE>
__device__ __forceinline__ void low_rank_tile(const Arguments& a, const Segment& s, const Tile& tile, Seed* seeds,
                                              Factors factors[2]) {
  auto row = [&] { return tile.row + this_thread() / 16 * 8; };
  auto col = [&] { return tile.col + this_thread() % 16 * 8; };
  auto inside = [&] { return tile.whole || (s.vector_path && row() + 8 <= s.rows && col() + 8 <= s.cols); };
  f32 x[8][8];
#pragma unroll
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) x[i][j] = UPDATE ? 0.0f : -0.0f;  // -0 changes no bit of the base

  auto same_anchor = [&] { return !s.anchor || s.anchor_dtype == s.base_dtype; };
  auto add_base = [&] {  // decayed
    if (inside() && (a.decay == 0 || (UPDATE && same_anchor()))) {
      load_base<UPDATE>(a, s, row(), col(), x);
      return;
    }
    for_each_row(s, row(), col(), x, [&](const Unit& unit, f32 v[8]) {
      f32 b[8], anchor[8] = {};
      load_unit(s, unit, s.base, s.base_stride, s.base_dtype, b);
      if (a.decay != 0) {
        if (s.anchor) load_unit(s, unit, s.anchor, s.anchor_stride, s.anchor_dtype, anchor);
        decay_block(b, anchor, a.decay);
      }
      add_block(v, b);
    });
  };
  int turn = 0;                            // a tile begins behind a barrier
  auto add_seeds = [&](int seed, int n) {  // in rounds of at most a.ranks ranks
    Round round = {seed, n, 0, 0};
#pragma unroll 1
    for (; round.q < a.rank; round.q += round.ranks) {
      round.ranks = a.rank - round.q < a.ranks ? a.rank - round.q : a.ranks;
      Factors& f = factors[turn];
      turn ^= 1;  // so that one barrier does: who draws into it next has seen all threads leave it
      if (tile.by_lane) {
        draw_by_lane(tile, round, seeds, f);
      } else {
#pragma unroll 1
        for (uint32_t thread = threadIdx.x; thread < 32 * terms(UPDATE); thread += kThreads)
          draw_factors(a, tile, round, seeds, thread, f);
      }
      __syncthreads();
      const int drawn = round.seeds * round.ranks;
      if (drawn == terms(UPDATE)) {
#pragma unroll
        for (int i = 0; i < terms(UPDATE); i++) add_term(f.of[i], x);
      } else {
#pragma unroll 1
        for (int i = 0; i < drawn; i++) add_term(f.of[i], x);
      }
    }
  };

  const int n_seeds = (int)a.n_seeds;
  if constexpr (UPDATE) {
    int n;
#pragma unroll 1
    for (int seed = 0; seed < n_seeds; seed += n) {
      n = n_seeds - 1 - seed < a.per_round ? n_seeds - 1 - seed : a.per_round;
      if (n == 0) add_base(), n = 1;  // the last seed
      if (n_seeds > kSeedsAtATime && seed % kSeedsAtATime == 0) fetch_seeds(a, seed, seeds);
      add_seeds(seed, n);
    }
  } else {
    add_base();
    add_seeds(0, n_seeds);
  }

  const RoundKeys<10> rounding_keys = rounding_keys_of<STOCHASTIC>(a);
  if (!inside()) {
    for_each_row(s, row(), col(), x, [&](const Unit& unit, f32 v[8]) {
      u32 r[8];
      if (STOCHASTIC) thresholds_from(s.first + unit.row * s.index_stride + unit.col, s.stream, rounding_keys, r);
      store_unit<STOCHASTIC>(s, unit, v, r);
    });
  } else if (s.out_dtype == kF32) store_vectors<STOCHASTIC, kF32>(s, row(), col(), rounding_keys, x);
  else if (s.out_dtype == kBF16) store_vectors<STOCHASTIC, kBF16>(s, row(), col(), rounding_keys, x);
  else store_vectors<STOCHASTIC, kF16>(s, row(), col(), rounding_keys, x);
}

// UPDATE: two seeds or more; else one, or none.
template <bool STOCHASTIC, bool UPDATE>
__global__ void __launch_bounds__(kThreads, 2) low_rank(const __grid_constant__ Arguments a) {
  __shared__ Seed shared[kSeedsAtATime];
  __shared__ Factors factors[2];
  __shared__ TileWalk walk;
  __shared__ Tile tiles[2];
  fetch_seeds(a, 0, shared);
  int turn = 0;
  for_each_piece(a.segments, a.n_segments, a.n_units, a.tile, [&](const Segment& s, int64_t lo, int64_t hi) {
    if (s.width == 0) {
      int n = (int)(a.n_seeds < kSeedsAtATime ? a.n_seeds : kSeedsAtATime);
      update_piece<STOCHASTIC, 1>(a, s, lo, hi, shared, n, rounding_keys_of<STOCHASTIC>(a));
      return;
    }
    if (threadIdx.x == 0) walk.begin(s, lo);
#pragma unroll 1
    for (int left = (int)(hi - lo); left > 0; left -= kTileUnits) {
      if (threadIdx.x == 0) walk.next(a.rank, a.ranks, tiles[turn]);
      __syncthreads();
      low_rank_tile<STOCHASTIC, UPDATE>(a, s, tiles[turn], shared, factors);
      turn ^= 1;  // some threads may still be at the tile
    }
  });
}

// The factors themselves, a block a thread at a time.
__global__ void __launch_bounds__(kThreads) write_factors(const __grid_constant__ Arguments a, const Factor* factors,
                                                          int64_t n_factors, char* out, int32_t dtype) {
  for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < a.n_units * a.n_seeds;
       i += (int64_t)gridDim.x * kThreads) {
    const int64_t seed = i / a.n_units, unit = i - seed * a.n_units;
    const Factor* f = factors;
    for (int64_t n = n_factors; n > 0;) {
      const int64_t half = n / 2;
      if (f[half].unit_end <= unit) f += half + 1, n -= half + 1;
      else n = half;
    }
    const int64_t block = f == factors ? unit : unit - f[-1].unit_end, left = f->count - 8 * block;
    f32 v[8];
    noise_block(block_id(block, f->stream, (uint32_t)f->domain),
                RoundKeys<10>(a.seeds ? a.seeds[seed] : a.host_seeds[seed]), v);
    char* p = out + (a.n_seeds * f->offset + seed * f->count + 8 * block) * dtype_size(dtype);
    if ((uint64_t)p % 16 == 0 && left >= 8) pack<false>(dtype, v, nullptr, (uint4*)p);
    else store_lanes<false>(dtype, 0, left < 8 ? (int)left : 8, v, nullptr, p);
  }
}

// ---- fingerprint ----

// What 8 elements add, of 2 x 16 bytes (f32) or one.
template <bool WIDE>
__device__ __forceinline__ uint64_t fingerprint_block(const BlockId& id, const RoundKeys<kFingerprintRounds>& keys,
                                                      const uint4 words[1 + WIDE]) {
  u32 bits[8], k[8], m[8];
  for (int i = 0; i <= WIDE; i++) {
    const uint32_t w[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
    for (int j = 0; j < 4; j++)
      if constexpr (WIDE) bits[4 * i + j] = w[j];
      else bits[2 * j] = w[j] & 0xFFFFu, bits[2 * j + 1] = w[j] >> 16;
  }
  fingerprint_keys(id, keys, k, m);
  uint64_t sum = 0;
  for (int j = 0; j < 8; j++) sum += (uint64_t)(bits[j] + k[j]) * m[j];
  return sum;
}

constexpr int kFingerprintBlocks = 4;  // a thread's in flight, 64 bytes; of f32 half as many

// Units [lo, hi) of a segment of whole, aligned blocks.
template <int32_t OUT, template <uint32_t, int32_t, int32_t> class Walk>
__device__ __forceinline__ uint64_t fingerprint_vectors(const Segment& s, int64_t lo, int64_t hi,
                                                        const RoundKeys<kFingerprintRounds>& keys) {
  constexpr int kVectors = vectors(OUT);
  Walk<kFingerprint, OUT, OUT> walk(s, lo);
  uint64_t sum = 0;
  auto some = [&](auto count) {
    constexpr int n = decltype(count)::value;
    uint4 words[n][kVectors];
#pragma unroll
    for (int k = 0; k < n; k++)
      for (int v = 0; v < kVectors; v++) words[k][v] = load_global(walk.at(k).out + v);
#pragma unroll
    for (int k = 0; k < n; k++) sum += fingerprint_block<OUT == kF32>(walk.at(k).id, keys, words[k]);
    walk.advance(n);
  };
  in_blocks<walk.kOneRow ? kFingerprintBlocks / kVectors : 1>(hi - lo, some);
  return sum;
}

__global__ void __launch_bounds__(kThreads, 5) fingerprint(const Segment* segments, int64_t n_segments, int64_t n_units,
                                                           int32_t tile, unsigned long long* result) {
  uint64_t sum = 0;
  for_each_piece(segments, n_segments, n_units, tile, [&](const Segment& s, int64_t lo, int64_t hi) {
    const RoundKeys<kFingerprintRounds> keys(s.out_dtype);
    if (s.vector_path && s.rows == 1) {
      sum += s.out_dtype == kF32 ? fingerprint_vectors<kF32, OneRow>(s, lo, hi, keys)
                                 : fingerprint_vectors<kBF16, OneRow>(s, lo, hi, keys);
      return;
    }
    if (s.vector_path && fits_rows(s)) {
      sum += s.out_dtype == kF32 ? fingerprint_vectors<kF32, Rows>(s, lo, hi, keys)
                                 : fingerprint_vectors<kBF16, Rows>(s, lo, hi, keys);
      return;
    }
    const int size = dtype_size(s.out_dtype);
#pragma unroll 1
    for (int64_t i = lo + threadIdx.x; i < hi; i += kThreads) {
      const Unit unit = locate(s, i);
      const char* p = (const char*)s.out + (unit.row * s.out_stride + unit.col) * size;
      u32 k[8], m[8];
      fingerprint_keys(block_id(unit.block, s.stream, kFingerprint), keys, k, m);
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (j >= unit.from && j < unit.to) {
          uint32_t b = s.out_dtype == kF32 ? ((const uint32_t*)p)[j] : ((const uint16_t*)p)[j];
          sum += (uint64_t)(b + k[j]) * m[j];
        }
    }
  });
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  if (threadIdx.x % 32 == 0) atomicAdd(result, sum);
}

// ---- host side ----

thread_local std::string error;

int failed(const char* what, cudaError_t status) {
  cudaGetLastError();  // a sticky-less error must not surface in the caller's next call
  error = std::string(what) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status);
  return (int)status;
}

int refused(const std::string& why) {
  error = why;
  return (int)cudaErrorInvalidValue;
}

// Makes `device` current for one scope. cudaSetDevice makes a context where there is none, of some 500 MB: so it is
// called only to change the device, and to change it back.
struct OnDevice {
  int previous = -1;
  cudaError_t status;
  explicit OnDevice(int device) {
    int current;
    status = cudaGetDevice(&current);
    if (status != cudaSuccess || current == device) return;
    status = cudaSetDevice(device);
    if (status == cudaSuccess) previous = current;
  }
  ~OnDevice() {
    if (previous >= 0) cudaSetDevice(previous);
  }
};

// `grid` blocks of threads, at most as many as the device holds at once, take the tiles in turn. A small table has
// small tiles, each block of threads its share in whole rounds of a thread's `blocks` in flight, so that it fills the
// device too: at 2^20 values tiles of 65536 would keep 16 of an H100's 132 multiprocessors busy. From kLargestTile a
// block of threads on (43 million values for one seed there) tiles grow no further.
struct Launch {
  int32_t tile;
  unsigned grid;
};

template <class Kernel>
cudaError_t plan(Kernel kernel, int blocks, int device, int64_t n_units, Launch* launch) {
  int multiprocessors = 0, resident = 0;
  cudaError_t status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0);
  const int64_t at_once = (int64_t)multiprocessors * std::max(resident, 1), round = blocks * kThreads;
  if (status != cudaSuccess) return status;
  // Of one unit or more; n_units itself may be near 2^63
  launch->tile = (int32_t)std::min<int64_t>(kLargestTile, ((n_units - 1) / (at_once * round) + 1) * round);
  launch->grid = (unsigned)std::min(at_once, (n_units - 1) / launch->tile + 1);
  return status;
}

}  // namespace

extern "C" {

int es_cuda_abi(void) { return ES_ABI; }

const char* es_cuda_error(void) { return error.c_str(); }

int es_cuda_versions(int* driver, int* runtime, int* devices) {
  *driver = *runtime = *devices = 0;
  cudaError_t status = cudaDriverGetVersion(driver);
  if (status == cudaSuccess) status = cudaRuntimeGetVersion(runtime);
  if (status == cudaSuccess) status = cudaGetDeviceCount(devices);
  return status == cudaSuccess ? 0 : failed("no usable CUDA device", status);
}

int es_cuda_capability(void) {
  const int archs[] = {__CUDA_ARCH_LIST__};  // of nvcc, ascending: 800 for compute_80; setup.py embeds PTX of the first
  return archs[0] / 10;
}

int es_cuda_add_noise(const Segment* segments, int64_t n_segments, int64_t n_units, const uint64_t* seeds,
                      int seeds_on_device, const float* coefs, int coefs_on_device, int64_t n_seeds, float decay,
                      const uint64_t* rounding_seed, int rounding_seed_on_device, int noise_rank, int device,
                      void* stream) {
  if (n_segments < 0 || n_units < 0 || n_seeds < 0) return refused("a count is negative");
  if (n_units && !(segments && n_segments)) return refused("segments are missing");
  if (n_seeds && (!seeds || !coefs)) return refused("seeds or coefs are missing");
  if (n_seeds > ES_CUDA_HOST_SEEDS && !(seeds_on_device && coefs_on_device))
    return refused("more than " + std::to_string(ES_CUDA_HOST_SEEDS) + " seeds must be in device memory");
  if (noise_rank < 0 || noise_rank > kMaxRank) return refused("noise_rank is 0 to " + std::to_string(kMaxRank));
  if (!n_units) return 0;
  Arguments a = {};
  a.segments = segments, a.n_segments = n_segments, a.n_units = n_units, a.n_seeds = n_seeds, a.decay = decay;
  if (seeds_on_device) a.seeds = seeds;
  else std::copy(seeds, seeds + n_seeds, a.host_seeds);
  if (coefs_on_device) a.coefs = coefs;
  else std::copy(coefs, coefs + n_seeds, a.host_coefs);
  if (rounding_seed && rounding_seed_on_device) a.rounding_seed = rounding_seed;
  else if (rounding_seed) a.host_rounding_seed = *rounding_seed;

  const bool all_on_host = !seeds_on_device && !coefs_on_device && !a.rounding_seed;
  using Kernel = void (*)(Arguments);
  static const Kernel few[] = {perturb<false, 0>, perturb<false, 1>, perturb<false, 2>};
  const bool simple = all_on_host && decay == 0;
  Kernel kernel = rounding_seed ? update<true> : update<false>;
  int blocks = kUpdateBlocks;
  if (simple && !rounding_seed && n_seeds <= 2) kernel = few[n_seeds], blocks = perturb_blocks(n_seeds);
  if (simple && rounding_seed && n_seeds == 1) kernel = perturb<true, 1>, blocks = perturb_blocks(1);
  if (noise_rank) {
    if (n_seeds > INT32_MAX) return refused("too many seeds");
    const bool many = n_seeds > 1;
    const int at_once = terms(many);
    a.rank = noise_rank, a.scale = (float)(1 / std::sqrt((double)noise_rank));
    a.ranks = std::min(noise_rank, at_once), a.per_round = at_once;
    while (a.per_round * a.ranks > at_once) a.per_round /= 2;  // a power of two: rounds end where kSeedsAtATime do
    a.inverse = ((1 << 16) + a.ranks - 1) / a.ranks;
    static const Kernel by_rounding[2][2] = {{low_rank<false, false>, low_rank<false, true>},
                                             {low_rank<true, false>, low_rank<true, true>}};
    kernel = by_rounding[rounding_seed != nullptr][many], blocks = kTileUnits / kThreads;
  }
  OnDevice scope(device);
  if (scope.status != cudaSuccess) return failed("cannot use the CUDA device", scope.status);
  Launch launch;
  cudaError_t status = plan(kernel, blocks, device, n_units, &launch);
  if (status != cudaSuccess) return failed("cannot plan the launch", status);
  a.tile = launch.tile;
  void* arguments[] = {&a};
  status = cudaLaunchKernel(kernel, launch.grid, kThreads, arguments, 0, (cudaStream_t)stream);
  return status == cudaSuccess ? 0 : failed("the launch failed", status);
}

int es_cuda_factors(const Factor* factors, int64_t n_factors, int64_t n_units, const uint64_t* seeds,
                    int seeds_on_device, int64_t n_seeds, void* out, int dtype, int device, void* stream) {
  if (n_factors < 0 || n_units < 0 || n_seeds < 0) return refused("a count is negative");
  if (n_units && n_seeds && !(factors && n_factors && seeds && out))
    return refused("factors, seeds or out are missing");
  if (n_seeds > ES_CUDA_HOST_SEEDS && !seeds_on_device)
    return refused("more than " + std::to_string(ES_CUDA_HOST_SEEDS) + " seeds must be in device memory");
  if (dtype < kF32 || dtype > kF16) return refused("dtype is none of ES_F32, ES_BF16, ES_F16");
  if (n_seeds && n_units > INT64_MAX / n_seeds) return refused("units times seeds are more than 64 bits hold");
  if (!n_units || !n_seeds) return 0;
  Arguments a = {};
  a.n_units = n_units, a.n_seeds = n_seeds;
  if (seeds_on_device) a.seeds = seeds;
  else std::copy(seeds, seeds + n_seeds, a.host_seeds);
  OnDevice scope(device);
  if (scope.status != cudaSuccess) return failed("cannot use the CUDA device", scope.status);
  Launch launch;
  cudaError_t status = plan(write_factors, 1, device, n_units * n_seeds, &launch);
  if (status != cudaSuccess) return failed("cannot plan the launch", status);
  void* arguments[] = {&a, &factors, &n_factors, &out, &dtype};
  status = cudaLaunchKernel(write_factors, launch.grid, kThreads, arguments, 0, (cudaStream_t)stream);
  return status == cudaSuccess ? 0 : failed("the launch failed", status);
}

int es_cuda_fingerprint(const Segment* segments, int64_t n_segments, int64_t n_units, uint64_t* result, int device,
                        void* stream) {
  if (n_segments < 0 || n_units < 0) return refused("a count is negative");
  if (n_units && !(segments && n_segments)) return refused("segments are missing");
  if (!result) return refused("the result has no address");
  if (!n_units) return 0;
  OnDevice scope(device);
  if (scope.status != cudaSuccess) return failed("cannot use the CUDA device", scope.status);
  Launch launch;
  cudaError_t status = plan(fingerprint, kFingerprintBlocks, device, n_units, &launch);
  if (status != cudaSuccess) return failed("cannot plan the launch", status);
  void* arguments[] = {&segments, &n_segments, &n_units, &launch.tile, &result};
  status = cudaLaunchKernel(fingerprint, launch.grid, kThreads, arguments, 0, (cudaStream_t)stream);
  return status == cudaSuccess ? 0 : failed("the launch failed", status);
}

}  // extern "C"
