// The CPU side of the C ABI: argument checks, choice of instruction set, threads, floating-point state.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <exception>
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
  uint64_t (*fingerprint)(const Segment&, int64_t, int64_t);
};

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl"),
       avx512::add_noise, avx512::fingerprint},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::add_noise, avx2::fingerprint},
      {"baseline", true, baseline::add_noise, baseline::fingerprint},
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

// Calls work(segment, unit, unit_end, thread) over [0, unit_end of the last segment), cut evenly among threads.
template <class Work>
void parallel(const Segment* segments, int64_t n_segments, int64_t n_seeds, int threads, Work work) {
  const int64_t total = n_segments ? segments[n_segments - 1].unit_end : 0;
  threads =
      (int)std::max<int64_t>(1, std::min<int64_t>(threads, total * std::max<int64_t>(1, n_seeds) / kWorkPerThread));
  auto run = [&](int t) {
    IeeeState state;
    // Cuts at multiples of 16 units keep whole vectors together.
    auto cut = [&](int k) { return k == threads ? total : (int64_t)((__int128)total * k / threads) & ~int64_t(15); };
    int64_t unit = cut(t), end = cut(t + 1);
    const Segment* s = std::upper_bound(segments, segments + n_segments, unit,
                                        [](int64_t u, const Segment& x) { return u < x.unit_end; });
    for (; unit < end; s++) {
      const int64_t start = s == segments ? 0 : s[-1].unit_end, stop = std::min(end, s->unit_end);
      if (stop > unit) work(*s, unit - start, stop - start, t);
      unit = std::max(unit, stop);
    }
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

void check_segments(const Segment* segments, int64_t n_segments) {
  int64_t end = 0;
  for (int64_t i = 0; i < n_segments; i++) {
    const Segment& s = segments[i];
    auto bad = [&](const char* what) { throw std::invalid_argument("segment " + std::to_string(i) + ": " + what); };
    for (int32_t dtype : {s.out_dtype, s.base_dtype, s.anchor_dtype})
      if (dtype < kF32 || dtype > kF16) bad("unknown dtype");
    if (s.rows < 1 || s.cols < 1 || s.units_per_row < 1 || s.unit_end - end != s.rows * s.units_per_row)
      bad("rows, cols and units do not fit");
    if (!s.out || !s.base) bad("null address");
    end = s.unit_end;
  }
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
                     int64_t n_seeds, float decay, const uint64_t* rounding_seed, int threads, const char* isa_name) {
  return guarded([&] {
    const Isa& isa = find_isa(isa_name);
    const Segment* s = (const Segment*)segments;
    check_segments(s, n_segments);
    if (n_seeds < 0 || (n_seeds && (!seeds || !coefs))) throw std::invalid_argument("seeds or coefs are missing");
    std::vector<RoundKeys<10>> keys(n_seeds);
    for (int64_t i = 0; i < n_seeds; i++) keys[i] = RoundKeys<10>(seeds[i]);
    RoundKeys<10> rounding(rounding_seed ? *rounding_seed : 0);
    const Operation op = {keys.data(), coefs, n_seeds, decay, rounding_seed ? &rounding : nullptr};
    parallel(s, n_segments, n_seeds, threads,
             [&](const Segment& s, int64_t unit, int64_t end, int) { isa.add_noise(s, op, unit, end); });
  });
}

int es_cpu_fingerprint(const void* segments, int64_t n_segments, uint64_t* result, int threads, const char* isa_name) {
  return guarded([&] {
    const Isa& isa = find_isa(isa_name);
    check_segments((const Segment*)segments, n_segments);
    std::vector<uint64_t> sums(std::max(1, threads));
    parallel((const Segment*)segments, n_segments, 1, (int)sums.size(),
             [&](const Segment& s, int64_t unit, int64_t end, int t) { sums[t] += isa.fingerprint(s, unit, end); });
    *result = 0;
    for (uint64_t sum : sums) *result += sum;
  });
}

}  // extern "C"
