// Makes calls of the C ABI for another process, which sends them through a pipe (emulator.py). Memory comes along, and
// goes back; the addresses in a call are places in it. Every call is made in a thread that rounds upward and flushes
// subnormals to zero, which must neither show in the result nor change.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "es_kernels.h"
#include "segments.h"

namespace {

struct Call {
  int64_t function, parts, part_bytes, seeds, rounding, out, bytes;
  uint64_t rounding_seed;
  float decay;
  int32_t noise_rank, dtype, threads;
};

template <class T>
std::vector<T> read(int64_t n) {
  std::vector<T> values(n);
  if (fread(values.data(), sizeof(T), n, stdin) != (size_t)n) exit(1);
  return values;
}

uint64_t floating_point_state() {
  uint64_t state;
  asm volatile("mrs %0, fpcr" : "=r"(state));
  return state;
}

}  // namespace

int main() {
  const uint64_t kUpward = 1 << 22, kFlush = 1 << 24;
  Call c;
  while (fread(&c, sizeof c, 1, stdin) == 1) {
    std::vector<char> parts = read<char>(c.parts * c.part_bytes);
    const std::vector<uint64_t> seeds = read<uint64_t>(c.seeds);
    const std::vector<float> coefs = read<float>(c.seeds);
    std::vector<char> space(c.bytes + 64);
    char* const memory = space.data() + (-(uintptr_t)space.data() & 63);
    if (fread(memory, 1, c.bytes, stdin) != (size_t)c.bytes) return 1;
    es::Segment* const segments = (es::Segment*)parts.data();
    const es::Factor* const factors = (es::Factor*)parts.data();
    if (c.part_bytes == sizeof(es::Segment)) {
      for (int64_t i = 0; i < c.parts; i++)
        for (uint64_t* address : {&segments[i].out, &segments[i].base, &segments[i].anchor})
          if (*address) *address += (uint64_t)memory;
    }
    const uint64_t* rounding = c.rounding ? &c.rounding_seed : nullptr;
    uint64_t result[2] = {1, 0};  // the error code, the fingerprint
    asm volatile("msr fpcr, %0" : : "r"(kUpward | kFlush));
    if (c.function == 0)
      result[0] = es_cpu_add_noise(segments, c.parts, seeds.data(), coefs.data(), c.seeds, c.decay, rounding,
                                   c.noise_rank, c.threads, nullptr);
    else if (c.function == 1)
      result[0] = es_cpu_factors(factors, c.parts, seeds.data(), c.seeds, memory + c.out, c.dtype, c.threads, nullptr);
    else result[0] = es_cpu_fingerprint(segments, c.parts, result + 1, c.threads, nullptr);
    const bool kept = floating_point_state() == (kUpward | kFlush);
    asm volatile("msr fpcr, %0" : : "r"(0L));
    std::string error = result[0] ? es_cpu_error() : kept ? "" : "the floating-point state changed";
    if (!kept) result[0] = 1;
    error.resize(256);
    fwrite(result, sizeof result, 1, stdout);
    fwrite(error.data(), error.size(), 1, stdout);
    fwrite(memory, 1, c.bytes, stdout);
    fflush(stdout);
  }
}
