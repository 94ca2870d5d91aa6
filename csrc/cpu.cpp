// The CPU side of the C ABI: argument checks, choice of instruction set, threads, floating-point state.
//
// Nothing here needs the C++ runtime: no exceptions, std::string or std::thread. Linked in statically, that of GCC 12
// asks for symbols of glibc 2.36; the library promises to load where it is 2.28 (docs/install.md).
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu.h"
#include "es_kernels.h"

// glibc 2.34 gave these another version, though they did not change: ask for the one that all have.
#ifdef __GLIBC__
#ifdef __x86_64__
#define ES_OLDEST "GLIBC_2.2.5"
#else
#define ES_OLDEST "GLIBC_2.17"
#endif
__asm__(".symver pthread_create, pthread_create@" ES_OLDEST);
__asm__(".symver pthread_join, pthread_join@" ES_OLDEST);
#endif

namespace {

using namespace es;

thread_local char error[256];

// Sets the text of es_cpu_error(); returns the error code.
__attribute__((format(printf, 1, 2))) int refuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error, sizeof error, format, arguments);
  va_end(arguments);
  return 1;
}

struct Free {
  void operator()(void* p) const { free(p); }
};
template <class T>
using Array = std::unique_ptr<T[], Free>;

// Memory for n of T, uninitialized; null if there is none to be had.
template <class T>
Array<T> allocate(int64_t n) {
  void* p;
  size_t bytes;
  if (__builtin_mul_overflow(n, sizeof(T), &bytes) || posix_memalign(&p, 64, bytes)) p = nullptr;
  return Array<T>((T*)p);
}

#ifdef __aarch64__
bool runs_neon() { return true; }  // Advanced SIMD is part of the architecture
#else
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool runs_baseline() { return true; }
#endif

struct Isa {
  const char* name;
  bool (*supported)();
  void (*add_noise)(const Segment&, const Operation&, int64_t, int64_t);
  void (*add_low_rank)(const Segment&, const Operation&, int64_t, int64_t, LowRankScratch&);
  void (*factor)(const Factor&, const RoundKeys<10>*, int64_t, int64_t, int64_t, void*, int32_t);
  uint64_t (*fingerprint)(const Segment&, int64_t, int64_t);
};

#define ES_ENTRY(isa) {#isa, runs_##isa, isa::add_noise, isa::add_low_rank, isa::factor, isa::fingerprint},
constexpr Isa kIsas[] = {ES_ISAS(ES_ENTRY)};

// es_cpu_isas(), made when the library is loaded.
const struct Names {
  char text[64] = "";
  Names() {
    for (const Isa& isa : kIsas)
      if (isa.supported()) strcat(strcat(text, *text ? " " : ""), isa.name);
  }
} names;

// Null, after refuse(), if this processor has no such instruction set; name null: the best one.
const Isa* find_isa(const char* name) {
  for (const Isa& isa : kIsas)
    if (isa.supported() && (!name || !strcmp(name, isa.name))) return &isa;
  refuse("this processor has no instruction set named %s; it has %s", name, names.text);
  return nullptr;
}

// Round to nearest, no flush to zero, no denormals-are-zero, all exceptions masked, whatever the host program has set.
struct IeeeState {
#ifdef __aarch64__
  uint64_t saved;
  IeeeState() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    set(0);
  }
  ~IeeeState() { set(saved); }
  static void set(uint64_t state) { __asm__ volatile("msr fpcr, %0" : : "r"(state) : "memory"); }
#else
  unsigned saved = _mm_getcsr();
  IeeeState() { _mm_setcsr(0x1F80); }
  ~IeeeState() { _mm_setcsr(saved); }
#endif
};

// Starting a thread takes 20 to 130 us; a unit about 5 ns a seed.
constexpr int64_t kWorkPerThread = 1 << 15;  // units times seeds

// How many of the caller's threads are worth their start. The work of a table of any numbers is counted in 128 bits.
int worthwhile(int threads, __int128 unit_seeds) {
  return (int)std::max<__int128>(1, std::min<__int128>(threads, unit_seeds / kWorkPerThread));
}

template <class Part>
int64_t units(const Part* parts, int64_t n_parts) {
  return n_parts ? parts[n_parts - 1].unit_end : 0;
}

// Calls work(part, unit, unit_end, thread) over [0, unit_end of the last part), cut evenly among threads: first the
// units below tile_end, at whole tiles, then the others, which take another time.
template <class Part, class Work>
void parallel(const Part* parts, int64_t n_parts, int64_t tile_end, int threads, Work work) {
  const int64_t total = units(parts, n_parts);
  // The share of thread t of the units [from, to), in whole grains but for the last one.
  auto share = [&](int t, int64_t from, int64_t to, int64_t grain) {
    auto cut = [&](int k) {
      return k == threads ? to : from + (int64_t)((__int128)(to - from) * k / threads) / grain * grain;
    };
    int64_t unit = cut(t), end = cut(t + 1);
    const Part* p =
        std::upper_bound(parts, parts + n_parts, unit, [](int64_t u, const Part& x) { return u < x.unit_end; });
    for (; unit < end; p++) {
      const int64_t start = p == parts ? 0 : p[-1].unit_end, stop = std::min(end, p->unit_end);
      if (stop > unit) work(*p, unit - start, stop - start, t);
      unit = std::max(unit, stop);
    }
  };
  auto run = [&](int t) {
    IeeeState state;
    share(t, 0, tile_end, kTileUnits);
    share(t, tile_end, total, 16);  // keeps whole vectors together
  };
  struct Thread {
    decltype(run)* body;
    int t;
    pthread_t id;
    static void* start(void* self) {
      (*((Thread*)self)->body)(((Thread*)self)->t);
      return nullptr;
    }
  };
  const Array<Thread> pool = allocate<Thread>(threads);
  int started = 1;  // of the shares: that of this thread is the first
  for (; pool && started < threads; started++) {
    Thread* const thread = &pool[started];
    *thread = {&run, started, {}};
    if (pthread_create(&thread->id, nullptr, Thread::start, thread)) break;
  }
  run(0);
  for (int t = started; t < threads; t++) run(t);  // no more threads to be had: do the rest here
  for (int t = 1; t < started; t++) pthread_join(pool[t].id, nullptr);
}

int64_t tiles(int64_t elements) { return elements / kTile + (elements % kTile != 0); }

// Whether `unit_end` lies rows * units_per_row after `end`, and 64 bits hold that.
bool ends_at(int64_t unit_end, int64_t end, int64_t rows, int64_t units_per_row) {
  int64_t units;
  return !__builtin_mul_overflow(rows, units_per_row, &units) && !__builtin_add_overflow(end, units, &end) &&
         unit_end == end;
}

// Whether the units of a row are the noise blocks that a row touches at most, or as many as its columns ever can.
bool covers_rows(const Segment& s) {
  uint64_t head = 0;  // where in its first block a row begins
  for (uint64_t row = 0; row < 8 && row < (uint64_t)s.rows; row++)
    head = std::max(head, (s.first + row * s.index_stride) % 8);
  const uint64_t units = s.units_per_row, cols = s.cols;
  return units >= (head + cols + 7) / 8 && units <= (cols + 14) / 8;
}

// Returns where the units of the segments with a width end, or -1, after refuse().
int64_t check_segments(const Segment* segments, int64_t n_segments, int noise_rank) {
  if (n_segments < 0 || (n_segments && !segments)) return -(int64_t)refuse("segments are missing");
  int64_t end = 0, tile_end = 0;
  for (int64_t i = 0; i < n_segments; i++) {
    const Segment& s = segments[i];
    auto bad = [&](const char* what) { return -(int64_t)refuse("segment %lld: %s", (long long)i, what); };
    for (int32_t dtype : {s.out_dtype, s.base_dtype, s.anchor_dtype})
      if (dtype < kF32 || dtype > kF16) return bad("unknown dtype");
    if (s.width < 0 || (s.width && !noise_rank)) return bad("a width is for noise of low rank");
    const int64_t rows = s.width ? tiles(s.rows) : s.rows;
    if (s.rows < 1 || s.cols < 1 || !ends_at(s.unit_end, end, rows, s.units_per_row) || (!s.width && !covers_rows(s)))
      return bad("rows, cols and units do not fit");
    if (!s.out || !s.base) return bad("null address");
    if (s.width) {
      const uint64_t width = s.width;
      if (end != tile_end) return bad("a width after a segment without one");
      if (s.units_per_row / kTileUnits != tiles(s.cols) || s.units_per_row % kTileUnits ||
          s.first % width + s.cols > width || (s.rows > 1 && s.index_stride % width))
        return bad("rows, cols, units and width do not fit");
      tile_end = s.unit_end;
    }
    end = s.unit_end;
  }
  return tile_end;
}

// Returns 0, or the error code.
int check_factors(const Factor* factors, int64_t n_factors) {
  if (n_factors < 0 || (n_factors && !factors)) return refuse("factors are missing");
  int64_t end = 0;
  for (int64_t i = 0; i < n_factors; i++) {
    const Factor& f = factors[i];
    auto bad = [&](const char* what) { return refuse("factor %lld: %s", (long long)i, what); };
    if (f.offset < 0 || f.offset % 8 || f.count < 0 || !ends_at(f.unit_end, end, 1, f.count / 8 + (f.count % 8 != 0)))
      return bad("offset, count and units do not fit");
    if (f.domain != kLeft && f.domain != kRight) return bad("its domain is that of L or of R");
    end = f.unit_end;
  }
  return 0;
}

Array<RoundKeys<10>> round_keys(const uint64_t* seeds, int64_t n_seeds) {
  Array<RoundKeys<10>> keys = allocate<RoundKeys<10>>(n_seeds);
  for (int64_t i = 0; keys && i < n_seeds; i++) keys[i] = RoundKeys<10>(seeds[i]);
  return keys;
}

}  // namespace

extern "C" {

int es_cpu_abi(void) { return ES_ABI; }

const char* es_cpu_error(void) { return error; }

const char* es_cpu_isas(void) { return names.text; }

int es_cpu_add_noise(const Segment* segments, int64_t n_segments, const uint64_t* seeds, const float* coefs,
                     int64_t n_seeds, float decay, const uint64_t* rounding_seed, int noise_rank, int threads,
                     const char* isa_name) {
  const Isa* const isa = find_isa(isa_name);
  if (!isa) return 1;
  if (noise_rank < 0 || noise_rank > kMaxRank) return refuse("noise_rank is 0 to 64");
  const int64_t tile_end = check_segments(segments, n_segments, noise_rank);
  if (tile_end < 0) return 1;
  if (n_seeds < 0 || (n_seeds && (!seeds || !coefs))) return refuse("seeds or coefs are missing");
  // A term of noise of low rank takes a 16th of a full one, what is done once a unit as long as one.
  threads = worthwhile(threads, (__int128)tile_end * (1 + (__int128)n_seeds * noise_rank / 16) +
                                    (__int128)(units(segments, n_segments) - tile_end) * std::max<int64_t>(1, n_seeds));
  const Array<RoundKeys<10>> keys = round_keys(seeds, n_seeds);
  const Array<LowRankScratch> scratch = allocate<LowRankScratch>(tile_end ? threads : 0);
  if (!keys || !scratch) return refuse("out of memory");
  const RoundKeys<10> rounding(rounding_seed ? *rounding_seed : 0);
  const Operation op = {keys.get(), coefs, n_seeds, decay, rounding_seed ? &rounding : nullptr, noise_rank};
  parallel(segments, n_segments, tile_end, threads, [&](const Segment& s, int64_t unit, int64_t end, int t) {
    if (s.width) isa->add_low_rank(s, op, unit, end, scratch[t]);
    else isa->add_noise(s, op, unit, end);
  });
  return 0;
}

int es_cpu_factors(const Factor* factors, int64_t n_factors, const uint64_t* seeds, int64_t n_seeds, void* out,
                   int dtype, int threads, const char* isa_name) {
  const Isa* const isa = find_isa(isa_name);
  if (!isa) return 1;
  if (n_seeds < 0 || (n_seeds && !seeds)) return refuse("seeds are missing");
  if (dtype < kF32 || dtype > kF16) return refuse("unknown dtype");
  if (check_factors(factors, n_factors)) return 1;
  const __int128 unit_seeds = (__int128)units(factors, n_factors) * n_seeds;
  if (!out && unit_seeds) return refuse("out is missing");
  const Array<RoundKeys<10>> keys = round_keys(seeds, n_seeds);
  if (!keys) return refuse("out of memory");
  parallel(factors, n_factors, 0, worthwhile(threads, unit_seeds),
           [&](const Factor& f, int64_t unit, int64_t end, int) {
             isa->factor(f, keys.get(), n_seeds, unit, end, out, dtype);
           });
  return 0;
}

int es_cpu_fingerprint(const Segment* segments, int64_t n_segments, uint64_t* result, int threads,
                       const char* isa_name) {
  const Isa* const isa = find_isa(isa_name);
  if (!isa) return 1;
  if (check_segments(segments, n_segments, 0) < 0) return 1;
  if (!result) return refuse("the result has no address");
  std::atomic<uint64_t> sum{0};
  parallel(segments, n_segments, 0, worthwhile(threads, units(segments, n_segments)),
           [&](const Segment& s, int64_t unit, int64_t end, int) { sum += isa->fingerprint(s, unit, end); });
  *result = sum;
  return 0;
}

}  // extern "C"
