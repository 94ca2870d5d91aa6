// The CPU operation over a range of units of one segment, compiled once for every instruction set (setup.py): ES_ISA
// names it. W consecutive noise blocks lie across the W lanes; their 8 W values are transposed to memory order for the
// arithmetic.
#include "add_noise.h"
#include "cpu.h"
#include "fingerprint.h"

namespace es {
namespace {

constexpr int W = ES_LANES;

// Which of W consecutive blocks a lane holds: the order that makes the transposition cheapest (two in-register stages
// and one across). A u64 keeps the even lanes and the odd lanes apart.
#if ES_LANES == 16
#define ES_MM(op) _mm512_##op
typedef __m512 floats;
typedef __m512d doubles;
constexpr u64_half kEven = {0, 8, 1, 9, 2, 10, 3, 11}, kOdd = {4, 12, 5, 13, 6, 14, 7, 15};
#elif ES_LANES == 8
#define ES_MM(op) _mm256_##op
typedef __m256 floats;
typedef __m256d doubles;
constexpr u64_half kEven = {0, 2, 4, 6}, kOdd = {1, 3, 5, 7};
#else
#ifdef __aarch64__
#define ES_MM(op) neon_##op
#define neon_unpacklo_ps vzip1q_f32
#define neon_unpackhi_ps vzip2q_f32
#define neon_unpacklo_pd vzip1q_f64
#define neon_unpackhi_pd vzip2q_f64
typedef float32x4_t floats;
typedef float64x2_t doubles;
#else
#define ES_MM(op) _mm_##op
typedef __m128 floats;
typedef __m128d doubles;
#endif
constexpr u64_half kEven = {0, 2}, kOdd = {1, 3};
#endif

ES_FN BlockId block_id(u64 blocks, uint64_t stream, uint32_t domain) {
  return {low_word(blocks), high_word(blocks) ^ (domain << 29), word((uint32_t)stream), word((uint32_t)(stream >> 32))};
}

ES_FN BlockId block_id(uint64_t block, uint64_t stream, uint32_t domain) {
  return block_id(u64{block + kEven, block + kOdd}, stream, domain);
}

// lane-major v[j][lane] -> memory order: value j of block n at 8 n + j.
ES_FN void transpose(f32 v[8]) {
  f32 q[8];  // q[k], q[k + 4]: in 128-bit quarter L the values 0..3 and 4..7 of the block in lane 4 L + k
  for (int half = 0; half < 8; half += 4) {
    const floats a = (floats)v[half], b = (floats)v[half + 1], c = (floats)v[half + 2], d = (floats)v[half + 3];
    const doubles ab = (doubles)ES_MM(unpacklo_ps)(a, b), AB = (doubles)ES_MM(unpackhi_ps)(a, b);
    const doubles cd = (doubles)ES_MM(unpacklo_ps)(c, d), CD = (doubles)ES_MM(unpackhi_ps)(c, d);
    q[half] = (f32)ES_MM(unpacklo_pd)(ab, cd), q[half + 1] = (f32)ES_MM(unpackhi_pd)(ab, cd);
    q[half + 2] = (f32)ES_MM(unpacklo_pd)(AB, CD), q[half + 3] = (f32)ES_MM(unpackhi_pd)(AB, CD);
  }
  for (int k = 0; k < 4; k++) {
#if ES_LANES == 16
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    v[2 * k] = (f32)_mm512_permutex2var_pd((doubles)q[k], low, (doubles)q[k + 4]);
    v[2 * k + 1] = (f32)_mm512_permutex2var_pd((doubles)q[k], high, (doubles)q[k + 4]);
#elif ES_LANES == 8
    v[k] = (f32)_mm256_permute2f128_ps((floats)q[k], (floats)q[k + 4], 0x20);
    v[k + 4] = (f32)_mm256_permute2f128_ps((floats)q[k], (floats)q[k + 4], 0x31);
#else
    v[2 * k] = q[k], v[2 * k + 1] = q[k + 4];
#endif
  }
}

ES_FN void transpose(u32 v[8]) {
  f32 x[8];
  memcpy(x, v, sizeof x);
  transpose(x);
  memcpy(v, x, sizeof x);
}

typedef uint16_t u16 __attribute__((vector_size(2 * W)));

// 8 W elements to and from float registers, in memory order.
ES_FN void load_bits(const void* p, int32_t dtype, u32 v[8]) {
  if (dtype == kF32) {
    memcpy(v, p, 8 * sizeof(u32));
  } else {
    u16 h[8];
    memcpy(h, p, sizeof h);
    for (int j = 0; j < 8; j++) v[j] = __builtin_convertvector(h[j], u32);
  }
}

ES_FN void load(const void* p, int32_t dtype, f32 v[8]) {
  u32 h[8];
  load_bits(p, dtype, h);
  for (int j = 0; j < 8; j++) v[j] = dtype == kF32 ? float_of(h[j]) : dtype == kBF16 ? from_bf16(h[j]) : from_f16(h[j]);
}

ES_FN void store(void* p, int32_t dtype, const f32 v[8], const u32* r) {
  if (dtype == kF32) {
    u32 u[8];
    for (int j = 0; j < 8; j++) u[j] = to_f32(v[j]);
    memcpy(p, u, sizeof u);
    return;
  }
  u16 h[8];
  for (int j = 0; j < 8; j++) {
    u32 u = dtype == kBF16 ? (r ? to_bf16_stochastic(v[j], r[j]) : to_bf16_nearest(v[j]))
                           : (r ? to_f16_stochastic(v[j], r[j]) : to_f16_nearest(v[j]));
    h[j] = __builtin_convertvector(u, u16);
  }
  memcpy(p, h, sizeof h);
}

// The weights, decayed, and their rounding: the two ends of the contract's arithmetic.
ES_FN void load_decayed(const Segment& s, const Operation& op, const char* base, const char* anchor, f32 b[8]) {
  load(base, s.base_dtype, b);
  if (op.decay != 0) {
    f32 a[8] = {};
    if (anchor) load(anchor, s.anchor_dtype, a);
    decay_block(b, a, op.decay);
  }
}

ES_FN void store_rounded(const Segment& s, const Operation& op, const BlockId& id, char* out, const f32 b[8]) {
  if (op.rounding_keys && s.out_dtype != kF32) {
    u32 r[8];
    rounding_thresholds(id, *op.rounding_keys, r);
    transpose(r);
    store(out, s.out_dtype, b, r);
  } else {
    store(out, s.out_dtype, b, nullptr);
  }
}

// The contract's arithmetic on 8 W elements in memory. The weights are loaded last, so that the noise has the
// registers.
ES_FN void add_noise_lanes(const Segment& s, const Operation& op, uint64_t block, char* out, const char* base,
                           const char* anchor) {
  BlockId id = block_id(block, s.stream, kNoise);
  f32 acc[8], noise[8], b[8];
  const int64_t last = op.n_seeds - 1;
  if (last > 0) {
    for (int j = 0; j < 8; j++) acc[j] = f32{};
    for (int64_t i = 0; i < last; i++) {
      noise_block(id, op.keys[i], noise);
      fma_block(op.coefs[i], noise, acc);
    }
    transpose(acc);
  }
  if (last >= 0) {
    noise_block(id, op.keys[last], noise);
    transpose(noise);
  }
  load_decayed(s, op, base, anchor, b);
  if (last > 0) add_block(b, acc);
  if (last >= 0) fma_block(op.coefs[last], noise, b);
  store_rounded(s, op, id, out, b);
}

// Calls whole(block, element) for runs of W whole blocks of a row, and part(block, element, from, to) where only the
// values [from, to) of the 8 W that start at `block` belong to the row; `element` is the row element that value 0 would
// be.
template <class Whole, class Part>
ES_FN void for_each_run(const Segment& s, int64_t unit, int64_t unit_end, Whole whole, Part part) {
  while (unit < unit_end) {
    int64_t row = unit / s.units_per_row, u = unit - row * s.units_per_row;
    int64_t u_end = u + (unit_end - unit);
    if (u_end > s.units_per_row) u_end = s.units_per_row;
    unit += u_end - u;
    uint64_t row_first = s.first + row * s.index_stride;
    int64_t head = row_first & 7;  // element c of the row is value head + c of the row's first block
    for (; u < u_end; u += W) {
      int64_t from = u == 0 ? head : 0, to = 8 * (u_end - u < W ? u_end - u : W);
      if (to > head + s.cols - 8 * u) to = head + s.cols - 8 * u;
      if (to <= from) break;
      uint64_t block = (row_first >> 3) + u;
      if (from == 0 && to == 8 * W) whole(block, row, 8 * u - head);
      else part(block, row, 8 * u - head, from, to);
    }
  }
}

// Calls lanes(block, row, element, out, base, anchor) for every 8 W values of which some belong to the units.
template <class Lanes>
ES_FN void for_each_lanes(const Segment& s, int64_t unit, int64_t unit_end, Lanes lanes) {
  const int so = dtype_size(s.out_dtype), sb = dtype_size(s.base_dtype), sa = dtype_size(s.anchor_dtype);
  char* const out = (char*)s.out;
  const char *const base = (const char*)s.base, *const anchor = (const char*)s.anchor;
  for_each_run(
      s, unit, unit_end,
      [&](uint64_t block, int64_t row, int64_t c) {
        lanes(block, row, c, out + so * (row * s.out_stride + c), base + sb * (row * s.base_stride + c),
              anchor ? anchor + sa * (row * s.anchor_stride + c) : nullptr);
      },
      [&](uint64_t block, int64_t row, int64_t c, int64_t from, int64_t to) {
        // The same lanes on a padded copy; only [from, to) is read and written.
        char o[32 * W], b[32 * W] = {}, a[32 * W] = {};
        const int64_t n = to - from;
        memcpy(b + sb * from, base + sb * (row * s.base_stride + c + from), sb * n);
        if (anchor) memcpy(a + sa * from, anchor + sa * (row * s.anchor_stride + c + from), sa * n);
        lanes(block, row, c, o, b, anchor ? a : nullptr);
        memcpy(out + so * (row * s.out_stride + c + from), o + so * from, so * n);
      });
}

// ---- noise of low rank ----

typedef LowRankScratch Scratch;
constexpr int64_t kBand = 32;  // rows

ES_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

ES_FN f32 load_lanes(const float* p) {
  f32 x;
  memcpy(&x, p, sizeof x);
  return x;
}

// Draws the part of a factor that belongs to n rows (or columns) of the matrix, `step` apart from `first` on, and lays
// it out by terms: to[q * stride + k] = scale * normal(index (first + k * step) * rank + q).
void draw(const Segment& s, uint32_t domain, const RoundKeys<10>& keys, int rank, uint64_t first, uint64_t step,
          int64_t n, float scale, float* drawn, float* to, int64_t stride) {
  // Runs of consecutive indices: one of all rows, or one for each.
  const int64_t runs = step == 1 ? 1 : n, rows = n / runs;
  const int64_t head = runs == 1 ? first * rank & 7 : 7, blocks = (head + rows * rank + 7) >> 3;  // of a run
  for (int64_t k = 0; k < runs * blocks; k += W) {
    u64 id;
    if (runs == 1) {
      const uint64_t block = (first * rank >> 3) + k;
      id = {block + kEven, block + kOdd};
    } else {
      auto block = [&](int64_t k) { return ((first + k / blocks * step) * rank >> 3) + k % blocks; };
      for (int lane = 0; lane < W / 2; lane++)
        id.even[lane] = block(k + kEven[lane]), id.odd[lane] = block(k + kOdd[lane]);
    }
    f32 noise[8];
    noise_block(block_id(id, s.stream, domain), keys, noise);
    transpose(noise);
    memcpy(drawn + 8 * k, noise, sizeof noise);
  }
  for (int64_t run = 0; run < runs; run++) {
    const float* x = drawn + 8 * blocks * run + ((first + run * step) * rank & 7);
    float* y = to + run * rows;
    if (rank == 1) {
      for (int64_t k = 0; k < rows; k++) y[k] = scale * x[k];
      continue;
    }
    for (int64_t from = 0; from < rows; from += 16)  // a cache line of `to` at a time
      for (int q = 0; q < rank; q++)
        for (int64_t k = from; k < least(from + 16, rows); k++) y[q * stride + k] = scale * x[k * rank + q];
  }
}

// Brings the memory of 8 W elements of a row nearer. The processor does not see pieces of rows coming: without, on a
// matrix of 4096 x 4096, a perturbation at rank 8 takes 1.8 times as long, an update of 30 members at rank 1 1.1.
ES_FN void prefetch(uint64_t address, int32_t dtype, uint64_t element) {
  address += dtype_size(dtype) * element;
  for (int k = 0; k < 8 * W * dtype_size(dtype); k += 64) __builtin_prefetch((const char*)(address + k));
}
ES_FN void prefetch_base(const Segment& s, int64_t row, int64_t c) {
  prefetch(s.base, s.base_dtype, (uint64_t)row * s.base_stride + c);
}
ES_FN void prefetch_both(const Segment& s, int64_t row, int64_t c) {
  prefetch_base(s, row, c);
  if (s.out != s.base) prefetch(s.out, s.out_dtype, (uint64_t)row * s.out_stride + c);
}

// Keeps x in a register: the compiler would load it again in every fma, 18 loads for 16 of them instead of 10.
ES_FN f32 in_register(f32 x) {
#if ES_LANES == 16
  asm("" : "+v"(x));
#endif
  return x;
}

// Registers that hold sums in add_terms, half of those that there are.
#if defined(__aarch64__) || ES_LANES == 16
constexpr int kSums = 16;
#else
constexpr int kSums = 8;
#endif

// The V W columns of add_terms from c on.
template <int V>
ES_FN void add_terms_strip(const Segment& s, const float* left, const float* right, int64_t stride, int64_t terms,
                           bool fresh, float* sums, const Segment* next, int64_t c) {
  constexpr int kRows = kSums / V;
  for (int64_t row = 0; row < s.rows; row += kRows) {
    for (int i = 0; next && i < kRows; i++) prefetch_both(*next, row + i, c);
    f32 x[kRows][V];
    float* const sum = sums + row * Scratch::kStride + c;
    for (int i = 0; i < kRows; i++)
      for (int j = 0; j < V; j++) x[i][j] = fresh ? f32{} : load_lanes(sum + i * Scratch::kStride + j * W);
    for (int64_t t = 0; t < terms; t++) {
      f32 l[kRows];
      for (int i = 0; i < kRows; i++) l[i] = splat(left[t * kTile + row + i]);
      for (int j = 0; j < V; j++) {
        const f32 r = in_register(load_lanes(right + t * stride + c + j * W));
        for (int i = 0; i < kRows; i++) x[i][j] = fma(l[i], r, x[i][j]);
      }
    }
    for (int i = 0; i < kRows; i++)
      for (int j = 0; j < V; j++) memcpy(sum + i * Scratch::kStride + j * W, &x[i][j], sizeof x[i][j]);
  }
}

// sums += left * right, term by term, or from 0 on where they are fresh, for the rows and columns of s, while the
// memory of `next` comes nearer.
void add_terms(const Segment& s, const float* left, const float* right, int64_t stride, int64_t terms, bool fresh,
               float* sums, const Segment* next) {
  int64_t c = 0;
  for (; s.cols - c > 4 * W; c += 8 * W) add_terms_strip<8>(s, left, right, stride, terms, fresh, sums, next, c);
  if (c < s.cols) add_terms_strip<4>(s, left, right, stride, terms, fresh, sums, next, c);
}

// The rows and columns [row, row + rows), [col, col + cols) of a segment, as far as it has them. `row` may lie past its
// last one, where memory is read ahead: the address may be any.
ES_FN Segment rectangle(const Segment& s, uint64_t row, int64_t rows, int64_t col, int64_t cols) {
  Segment part = s;
  part.rows = least(rows, s.rows - row);
  part.cols = least(cols, s.cols - col);
  part.first += row * s.index_stride + col;
  part.out += dtype_size(s.out_dtype) * (row * s.out_stride + col);
  part.base += dtype_size(s.base_dtype) * (row * s.base_stride + col);
  if (s.anchor) part.anchor += dtype_size(s.anchor_dtype) * (row * s.anchor_stride + col);
  part.units_per_row = (part.cols + 14) / 8;
  return part;
}

// The contract's arithmetic on a segment of at most kTile rows and so many columns that their factors fit in a Scratch,
// a row of R taking `stride`. has_right: R is there from the call before.
void add_low_rank_run(const Segment& s, const Operation& op, int64_t stride, bool has_right, Scratch& mine) {
  const int rank = op.rank;
  const float scale = (float)(1 / __builtin_sqrt((double)rank));
  const int64_t last = op.n_seeds - 1;
  float *const left = mine.left, *const right = mine.right + Scratch::kPad, *const sums = mine.sums + Scratch::kPad;
  int64_t terms = 0;
  auto draw_seed = [&](int64_t i) {
    const uint64_t width = s.width, row = s.first / width, col = s.first % width;
    const uint64_t step = s.rows > 1 ? s.index_stride / width : 1;
    draw(s, kLeft, op.keys[i], rank, row, step, s.rows, op.coefs[i] * scale, mine.drawn, left + terms * kTile, kTile);
    if (!has_right) draw(s, kRight, op.keys[i], rank, col, 1, s.cols, 1, mine.drawn, right + terms * stride, stride);
  };
  bool fresh = true;
  for (int64_t i = 0; i < last; i++) {
    if (terms && terms + rank > Scratch::kTerms) {
      add_terms(s, left, right, stride, terms, fresh, sums, nullptr);
      fresh = false, terms = 0;
    }
    draw_seed(i);
    terms += rank;
  }
  if (last >= 0) draw_seed(last);
  // With sums a band of rows at a time, so that the memory that is read ahead stays in the cache
  const int64_t rows = last > 0 ? kBand : kTile, cols = last > 0 ? Scratch::kColumns : s.cols;
  const bool whole = s.cols == s.base_stride;
  for (int64_t row = 0; row < s.rows; row += rows)
    for (int64_t col = 0; col < s.cols; col += cols) {
      const Segment part = rectangle(s, row, rows, col, cols);
      const float *l = left + row, *r = right + col;
      float* const acc = sums + row * Scratch::kStride;
      const bool turn = col + cols >= s.cols;
      const Segment next = rectangle(s, turn ? row + rows : row, rows, turn ? 0 : col + cols, cols);
      if (last > 0) add_terms(part, l, r, stride, terms, fresh, acc, &next);
      l += terms * kTile, r += terms * stride;
      for_each_lanes(part, 0, part.rows * part.units_per_row,
                     [&](uint64_t block, int64_t row, int64_t c, char* out, const char* base, const char* anchor) {
                       f32 b[8];
                       if (last <= 0 && whole) prefetch_base(part, row, c + Scratch::kColumns);
                       if (last <= 0 && !whole) prefetch_both(part, row + 2, c);
                       load_decayed(s, op, base, anchor, b);
                       if (last > 0)
                         for (int j = 0; j < 8; j++) b[j] = b[j] + load_lanes(acc + row * Scratch::kStride + c + j * W);
                       for (int q = 0; last >= 0 && q < rank; q++) {
                         const f32 x = splat(l[q * kTile + row]);
                         for (int j = 0; j < 8; j++) b[j] = fma(x, load_lanes(r + q * stride + c + j * W), b[j]);
                       }
                       store_rounded(s, op, block_id(block, s.stream, kNoise), out, b);
                     });
    }
}

}  // namespace

void ES_ISA::add_noise(const Segment& s, const Operation& op, int64_t unit, int64_t unit_end) {
  for_each_lanes(s, unit, unit_end,
                 [&](uint64_t block, int64_t, int64_t, char* out, const char* base, const char* anchor) {
                   add_noise_lanes(s, op, block, out, base, anchor);
                 });
}

void ES_ISA::add_low_rank(const Segment& s, const Operation& op, int64_t unit, int64_t unit_end, Scratch& mine) {
  const int64_t tiles_per_row = s.units_per_row / kTileUnits, begin = unit / kTileUnits, end = unit_end / kTileUnits;
  // Where R of all seeds fits, it is drawn once for all rows. The columns of a run are those of which it fits, in 32 KB
  // of the L1 cache for a perturbation, which reads it for every row, in 256 KB of the L2 cache for more seeds.
  const int64_t terms = op.n_seeds * op.rank;
  const bool one = op.n_seeds <= 1, fits = one || terms <= Scratch::kTerms + op.rank;
  const int64_t most = (one ? 8192 / op.rank : fits ? 65536 / terms : Scratch::kColumns) / kTile;
  for (int64_t run = 0; run < tiles_per_row; run += most) {
    int64_t from = 0, to = 0;
    for (int64_t i = begin / tiles_per_row; i * tiles_per_row < end; i++) {
      const int64_t first = i * tiles_per_row, from_above = from, to_above = to;
      from = run < begin - first ? begin - first : run;
      to = least(run + most, least(tiles_per_row, end - first));
      if (from >= to) continue;
      const Segment part = rectangle(s, i * kTile, kTile, from * kTile, (to - from) * kTile);
      const bool has_right = fits && from == from_above && to == to_above;
      add_low_rank_run(part, op, most * kTile + Scratch::kPad, has_right, mine);
    }
  }
}

void ES_ISA::factor(const Factor& f, const RoundKeys<10>* keys, int64_t n_seeds, int64_t unit, int64_t unit_end,
                    void* out, int32_t dtype) {
  const int size = dtype_size(dtype);
  for (int64_t i = 0; i < n_seeds; i++)
    for (int64_t u = unit; u < unit_end; u += W) {
      f32 noise[8];
      noise_block(block_id(u, f.stream, f.domain), keys[i], noise);
      transpose(noise);
      char values[32 * W];
      store(values, dtype, noise, nullptr);
      const int64_t n = least(8 * W, least(8 * (unit_end - u), f.count - 8 * u));
      memcpy((char*)out + size * (n_seeds * f.offset + i * f.count + 8 * u), values, size * n);
    }
}

uint64_t ES_ISA::fingerprint(const Segment& s, int64_t unit, int64_t unit_end) {
  const int size = dtype_size(s.out_dtype);
  const RoundKeys<kFingerprintRounds> keys(s.out_dtype);
  uint64_t sum = 0;
  auto add = [&](uint64_t block, const char* p, int64_t from, int64_t to) {
    u32 bits[8], k[8], m[8];
    load_bits(p, s.out_dtype, bits);
    BlockId id = block_id(block, s.stream, kFingerprint);
    fingerprint_keys(id, keys, k, m);
    transpose(k), transpose(m);
    for (int j = 0; j < 8; j++) bits[j] += k[j];
    const uint32_t *x = (const uint32_t*)bits, *y = (const uint32_t*)m;
    for (int64_t i = from; i < to; i++) sum += (uint64_t)x[i] * y[i];
  };
  for_each_run(
      s, unit, unit_end,
      [&](uint64_t block, int64_t row, int64_t c) {
        add(block, (const char*)s.out + size * (row * s.out_stride + c), 0, 8 * W);
      },
      [&](uint64_t block, int64_t row, int64_t c, int64_t from, int64_t to) {
        char o[32 * W] = {};
        memcpy(o + size * from, (const char*)s.out + size * (row * s.out_stride + c + from), size * (to - from));
        add(block, o, from, to);
      });
  return sum;
}

}  // namespace es
