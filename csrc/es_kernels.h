/* es_kernels: the C ABI. This page is the manual for a caller from C, C++, Rust or JAX; NOISE.md defines the numbers.
 *
 * Two libraries export it: libes_cpu.so (es_cpu_*) and libes_cuda.so (es_cuda_*). Neither needs Python or torch. Every
 * function that can fail returns 0, or an error code whose text es_*_error() gives (thread-local, valid until the next
 * call of the thread). Nothing is written when an argument is refused.
 *
 * The operation, for every element of every segment:
 *
 *     b = base;   if decay != 0:  b = fma(-decay, b - (anchor or +0), b)
 *     acc = +0;   for i < n_seeds - 1:  acc = fma(coefs[i], noise(seeds[i]), acc);   if n_seeds > 1:  b = b + acc
 *     out = round(fma(coefs[n_seeds - 1], noise(seeds[n_seeds - 1]), b))             (n_seeds == 0:  out = round(b))
 *
 * With noise_rank r > 0, in segments that have a width, the fma of a seed becomes r of them, in order of q, with c =
 * coefs[i], for r > 1 times the float32 1 / sqrt(r):  x = fma(c * L[row, q], R[col, q], x). Such a table is made for
 * noise_rank > 0 alone, in its order (EsSegment); another has no widths.
 *
 * all in float32, rounded to nearest even, or stochastically when rounding_seed is not NULL. Any NaN is stored as
 * 7FC00000 / 7FC0 / 7E00.
 */
#ifndef ES_KERNELS_H
#define ES_KERNELS_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#define ES_API __attribute__((visibility("default")))

/* Changes whenever a signature, a struct or the noise changes; the Python side refuses a library of another value. */
#define ES_ABI 3
/* Seeds and coefs up to this many may be passed from host memory to es_cuda_add_noise. */
#define ES_CUDA_HOST_SEEDS 128

/* Of elements: in out_dtype, base_dtype, anchor_dtype, and the `dtype` of factors. */
enum { ES_F32 = 0, ES_BF16 = 1, ES_F16 = 2 };

/* rows x cols elements in memory that are the elements first + row * index_stride + col of one stream. Strides count
 * elements. Work is counted in units: a unit is the part of one row that lies in one noise block (8 indices that agree
 * above bit 3). Unit u of a segment is block u % units_per_row of row u / units_per_row; it may be empty where a row
 * touches fewer blocks than the most. In a segment of one row no block number crosses a multiple of 2^32: split it
 * there. */
typedef struct {
  uint64_t out, base, anchor; /* addresses of the first element; base == out in place, anchor 0: none */
  int64_t rows, cols;
  int64_t out_stride, base_stride, anchor_stride;
  uint64_t first, index_stride, stream;
  int64_t units_per_row;
  int64_t unit_end; /* units of this segment and all before it */
  int32_t out_dtype, base_dtype, anchor_dtype;
  int32_t vector_path; /* 1: every unit of every row is a whole block, aligned to 16 bytes in out, base and anchor */
  int64_t width;       /* of the matrix whose noise is of low rank; 0: full noise */
} EsSegment;

/* A segment with a width is a rectangle of its matrix: its element (row, col) is that of row first / width + row *
 * (index_stride / width) and column first % width + col. Its work is counted in tiles, each of ES_TILE rows and columns
 * (fewer at the edges) and ES_TILE * ES_TILE / 8 units, one row of tiles after the other: units_per_row are those of a
 * row of tiles. Such segments come first in a table, so a tile begins at a multiple of a tile's units. */
#define ES_TILE 128
#define ES_MAX_RANK 64

/* A factor of the noise of low rank of one matrix, L (domain 3) or R (domain 5), for N seeds: `count` normals each,
 * those of the stream from index 0 on, one seed after the other, from element N * offset of the output on. */
typedef struct {
  int64_t offset, count; /* offset is a multiple of 8 */
  uint64_t stream;
  int64_t domain;
  int64_t unit_end; /* noise blocks of one seed, of this factor and all before it */
} EsFactor;

/* ---- CPU ---- */
ES_API int es_cpu_abi(void);
ES_API const char* es_cpu_error(void);
/* The instruction sets that this processor can run, best first, separated by spaces: "avx512 avx2 baseline" or
 * "neon". */
ES_API const char* es_cpu_isas(void);
/* Segments and all arrays in host memory. At most `threads` threads; isa NULL: the best one. The calling thread's
 * floating-point state (rounding mode, flush-to-zero) is saved, set to IEEE, and restored. */
ES_API int es_cpu_add_noise(const EsSegment* segments, int64_t n_segments, const uint64_t* seeds, const float* coefs,
                            int64_t n_seeds, float decay, const uint64_t* rounding_seed, int noise_rank, int threads,
                            const char* isa);
/* The factors of noise of low rank, as `factors` lays them out in `out`: rounded to nearest. */
ES_API int es_cpu_factors(const EsFactor* factors, int64_t n_factors, const uint64_t* seeds, int64_t n_seeds, void* out,
                          int dtype, int threads, const char* isa);
/* *result = sum mod 2^64 over the elements of `out` (NOISE.md, "The fingerprint"). */
ES_API int es_cpu_fingerprint(const EsSegment* segments, int64_t n_segments, uint64_t* result, int threads,
                              const char* isa);

/* Getters of a tensor, by its handle, as torch's own C ABI has them: aoti_torch_get_* of
 * torch/csrc/inductor/aoti_torch/c/shim.h. 0: all is well. */
typedef struct {
  int32_t (*data_ptr)(void* tensor, void** address);
  int32_t (*dtype)(void* tensor, int32_t* dtype);
  int32_t (*dim)(void* tensor, int64_t* dim);
  int32_t (*sizes)(void* tensor, int64_t** sizes);
  int32_t (*strides)(void* tensor, int64_t** strides);
} EsTensorGetters;
/* The first of n tensors of which address, dtype, sizes or strides are not those in `words`; n if there is none. A
 * tensor takes 3 + 2 dim words; record != 0 writes them instead of comparing. */
ES_API int64_t es_cpu_first_changed(const EsTensorGetters* get, void* const* tensors, int64_t n, int64_t* words,
                                    int record);

/* ---- CUDA ---- */
ES_API int es_cuda_abi(void);
ES_API const char* es_cuda_error(void);
/* Fills driver and runtime version (CUDA's numbers, 13000 for 13.0; driver 0: none installed) and the number of
 * devices. */
ES_API int es_cuda_versions(int* driver, int* runtime, int* devices);
/* The least compute capability that is served, 80 for 8.0: machine code or PTX is there for every GPU from it on. */
ES_API int es_cuda_capability(void);
/* One launch, asynchronous on `stream`, on the device `device`, which is made current for the call if another one is.
 * (Going back makes a context on that other one if it has none yet: make `device` current yourself where that matters.)
 * `segments` is in device memory, n_units the unit_end of the last. seeds and coefs: in device memory if
 * seeds_on_device / coefs_on_device, else in host memory, read before the call returns, and then at most
 * ES_CUDA_HOST_SEEDS; rounding_seed NULL: nearest. */
ES_API int es_cuda_add_noise(const EsSegment* segments, int64_t n_segments, int64_t n_units, const uint64_t* seeds,
                             int seeds_on_device, const float* coefs, int coefs_on_device, int64_t n_seeds, float decay,
                             const uint64_t* rounding_seed, int rounding_seed_on_device, int noise_rank, int device,
                             void* stream);
/* As es_cpu_factors, one launch. `factors` and `out` are in device memory, n_units the unit_end of the last factor;
 * seeds as in es_cuda_add_noise. */
ES_API int es_cuda_factors(const EsFactor* factors, int64_t n_factors, int64_t n_units, const uint64_t* seeds,
                           int seeds_on_device, int64_t n_seeds, void* out, int dtype, int device, void* stream);
/* *result, in device memory, is increased by the fingerprint: zero it before. */
ES_API int es_cuda_fingerprint(const EsSegment* segments, int64_t n_segments, int64_t n_units, uint64_t* result,
                               int device, void* stream);

#ifdef __cplusplus
}
#endif
#endif
