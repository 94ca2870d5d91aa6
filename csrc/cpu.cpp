// The CPU side of the C ABI: argument checks, choice of instruction set, threads, floating-point state.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu.h"
#include "es_kernels.h"

namespace {

using namespace es;

thread_local std::string error;

struct Isa {
  const char* name;
  bool supported;
  void (*add_noise)(const Segment&, const Operation&, int64_t, int64_t);
  void (*add_low_rank)(const Segment&, const Operation&, int64_t, int64_t, LowRankScratch&);
  void (*factor)(const Factor&, const RoundKeys<10>*, int64_t, int64_t, int64_t, void*, int32_t);
  uint64_t (*fingerprint)(const Segment&, int64_t, int64_t);
};

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       avx512::add_noise, avx512::add_low_rank, avx512::factor, avx512::fingerprint},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::add_noise, avx2::add_low_rank,
       avx2::factor, avx2::fingerprint},
      {"baseline", true, baseline::add_noise, baseline::add_low_rank, baseline::factor, baseline::fingerprint},
  };
  return all;
}

const Isa& find_isa(const char* name) {
  for (const Isa& isa : isas())
    if (isa.supported && (!name || !std::strcmp(name, isa.name))) return isa;
  throw std::invalid_argument(std::string("this processor has no instruction set named ") + name + "; it has " +
                              es_cpu_isas());
}

// Round to nearest, no flush to zero, no denormals-are-zero, all exceptions masked, whatever the host program has set.
struct IeeeState {
  unsigned saved = _mm_getcsr();
  IeeeState() { _mm_setcsr(0x1F80); }
  ~IeeeState() { _mm_setcsr(saved); }
};

// Starting a thread takes 20 to 130 us; a unit about 5 ns a seed.
constexpr int64_t kWorkPerThread = 1 << 15;  // units times seeds

template <class Part>
int64_t units(const Part* parts, int64_t n_parts) {
  return n_parts ? parts[n_parts - 1].unit_end : 0;
}

// Calls work(part, unit, unit_end, thread) over [0, unit_end of the last part), cut evenly among threads: first the
// units below tile_end, at whole tiles, then the others, which take another time.
template <class Part, class Work>
void parallel(const Part* parts, int64_t n_parts, int64_t tile_end, int64_t unit_seeds, int threads, Work work) {
  const int64_t total = units(parts, n_parts);
  threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, unit_seeds / kWorkPerThread));
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
  std::vector<std::thread> pool;
  try {
    for (int t = 1; t < threads; t++) pool.emplace_back(run, t);
    run(0);
  } catch (...) {  // no more threads to be had: do the rest here
    for (int t = (int)pool.size() + 1; t < threads; t++) run(t);
    run(0);
  }
  for (auto& thread : pool) thread.join();
}

template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
}

int64_t tiles(int64_t elements) { return elements / kTile + (elements % kTile != 0); }

// Returns where the units of the segments with a width end.
int64_t check_segments(const Segment* segments, int64_t n_segments, int noise_rank) {
  int64_t end = 0, tile_end = 0;
  for (int64_t i = 0; i < n_segments; i++) {
    const Segment& s = segments[i];
    auto bad = [&](const char* what) { throw std::invalid_argument("segment " + std::to_string(i) + ": " + what); };
    for (int32_t dtype : {s.out_dtype, s.base_dtype, s.anchor_dtype})
      if (dtype < kF32 || dtype > kF16) bad("unknown dtype");
    if (s.width < 0 || (s.width && !noise_rank)) bad("a width is for noise of low rank");
    const int64_t rows = s.width ? tiles(s.rows) : s.rows;
    if (s.rows < 1 || s.cols < 1 || s.units_per_row < 1 || s.unit_end - end != rows * s.units_per_row)
      bad("rows, cols and units do not fit");
    if (!s.out || !s.base) bad("null address");
    if (s.width) {
      const uint64_t width = s.width;
      if (end != tile_end) bad("a width after a segment without one");
      if (s.units_per_row != tiles(s.cols) * kTileUnits || s.first % width + s.cols > width ||
          (s.rows > 1 && s.index_stride % width))
        bad("rows, cols, units and width do not fit");
      tile_end = s.unit_end;
    }
    end = s.unit_end;
  }
  return tile_end;
}

void check_factors(const Factor* factors, int64_t n_factors) {
  int64_t end = 0;
  for (int64_t i = 0; i < n_factors; i++) {
    const Factor& f = factors[i];
    auto bad = [&](const char* what) { throw std::invalid_argument("factor " + std::to_string(i) + ": " + what); };
    if (f.offset < 0 || f.offset % 8 || f.count < 0 || f.unit_end - end != f.count / 8 + (f.count % 8 != 0))
      bad("offset, count and units do not fit");
    if (f.domain != kLeft && f.domain != kRight) bad("its domain is that of L or of R");
    end = f.unit_end;
  }
}

std::vector<RoundKeys<10>> round_keys(const uint64_t* seeds, int64_t n_seeds) {
  std::vector<RoundKeys<10>> keys(n_seeds);
  for (int64_t i = 0; i < n_seeds; i++) keys[i] = RoundKeys<10>(seeds[i]);
  return keys;
}

}  // namespace

extern "C" {

int es_cpu_abi(void) { return ES_ABI; }

const char* es_cpu_error(void) { return error.c_str(); }

const char* es_cpu_isas(void) {
  static const std::string names = [] {
    std::string s;
    for (const Isa& isa : isas())
      if (isa.supported) s += (s.empty() ? "" : " ") + std::string(isa.name);
    return s;
  }();
  return names.c_str();
}

int es_cpu_add_noise(const void* segments, int64_t n_segments, const uint64_t* seeds, const float* coefs,
                     int64_t n_seeds, float decay, const uint64_t* rounding_seed, int noise_rank, int threads,
                     const char* isa_name) {
  return guarded([&] {
    const Isa& isa = find_isa(isa_name);
    const Segment* s = (const Segment*)segments;
    if (noise_rank < 0 || noise_rank > kMaxRank) throw std::invalid_argument("noise_rank is 0 to 64");
    const int64_t tile_end = check_segments(s, n_segments, noise_rank);
    if (n_seeds < 0 || (n_seeds && (!seeds || !coefs))) throw std::invalid_argument("seeds or coefs are missing");
    const std::vector<RoundKeys<10>> keys = round_keys(seeds, n_seeds);
    const RoundKeys<10> rounding(rounding_seed ? *rounding_seed : 0);
    const Operation op = {keys.data(), coefs, n_seeds, decay, rounding_seed ? &rounding : nullptr, noise_rank};
    const std::unique_ptr<LowRankScratch[]> scratch(tile_end ? new LowRankScratch[std::max(1, threads)] : nullptr);
    // A term of noise of low rank takes a 16th of a full one, what is done once a unit as long as one.
    const int64_t unit_seeds =
        tile_end * (1 + n_seeds * noise_rank / 16) + (units(s, n_segments) - tile_end) * std::max<int64_t>(1, n_seeds);
    parallel(s, n_segments, tile_end, unit_seeds, threads, [&](const Segment& s, int64_t unit, int64_t end, int t) {
      if (s.width) isa.add_low_rank(s, op, unit, end, scratch[t]);
      else isa.add_noise(s, op, unit, end);
    });
  });
}

int es_cpu_factors(const void* factors, int64_t n_factors, const uint64_t* seeds, int64_t n_seeds, void* out, int dtype,
                   int threads, const char* isa_name) {
  return guarded([&] {
    const Isa& isa = find_isa(isa_name);
    const Factor* f = (const Factor*)factors;
    if (n_seeds < 0 || (n_seeds && !seeds)) throw std::invalid_argument("seeds are missing");
    if (dtype < kF32 || dtype > kF16) throw std::invalid_argument("unknown dtype");
    check_factors(f, n_factors);
    const int64_t unit_seeds = units(f, n_factors) * n_seeds;
    if (!out && unit_seeds) throw std::invalid_argument("out is missing");
    const std::vector<RoundKeys<10>> keys = round_keys(seeds, n_seeds);
    parallel(f, n_factors, 0, unit_seeds, threads, [&](const Factor& f, int64_t unit, int64_t end, int) {
      isa.factor(f, keys.data(), n_seeds, unit, end, out, dtype);
    });
  });
}

int es_cpu_fingerprint(const void* segments, int64_t n_segments, uint64_t* result, int threads, const char* isa_name) {
  return guarded([&] {
    const Isa& isa = find_isa(isa_name);
    check_segments((const Segment*)segments, n_segments, 0);
    std::vector<uint64_t> sums(std::max(1, threads));
    const Segment* s = (const Segment*)segments;
    parallel(s, n_segments, 0, units(s, n_segments), (int)sums.size(),
             [&](const Segment& s, int64_t unit, int64_t end, int t) { sums[t] += isa.fingerprint(s, unit, end); });
    *result = 0;
    for (uint64_t sum : sums) *result += sum;
  });
}

}  // extern "C"
