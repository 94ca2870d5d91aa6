// Contract under test: threads may call the C ABI at the same time, each on tables of its own, with one base that all
// of them read. Each gets what it gets alone, bit for bit, and its own error text. ThreadSanitizer sees what they
// share.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <thread>
#include <vector>

#include "es_kernels.h"
#include "noise.h"
#include "segments.h"

namespace {

constexpr int kCallers = 4, kRounds = 3, kThreads = 3;
// Full noise and low rank of this many elements and seeds are each work for all kThreads.
constexpr int64_t kRows = 512, kCols = 512, kElements = kRows * kCols;
constexpr int kSeeds = 4, kRank = 16;
const uint64_t kSeedList[kSeeds] = {1, 2, 3, 4};
const float kCoefs[kSeeds] = {0.5f, -1, 2, 0.25f};

void require(bool holds, const char* what) {
  if (!holds) fprintf(stderr, "broken: %s: %s\n", what, es_cpu_error()), abort();
}

// bfloat16 out of a float32 base: a vector, or a matrix for noise of low rank.
es::Segment table(std::vector<uint16_t>& out, const std::vector<float>& base, uint64_t stream, bool matrix) {
  es::Segment s = {};
  s.out = (uint64_t)out.data(), s.base = (uint64_t)base.data();
  s.rows = matrix ? kRows : 1, s.cols = s.out_stride = s.base_stride = s.index_stride = matrix ? kCols : kElements;
  s.out_dtype = es::kBF16, s.base_dtype = es::kF32, s.stream = stream, s.width = matrix ? kCols : 0;
  s.units_per_row = matrix ? kCols / es::kTile * es::kTileUnits : kElements / 8;
  s.unit_end = (matrix ? kRows / es::kTile : 1) * s.units_per_row;
  return s;
}

struct Caller {
  std::vector<uint16_t> full = std::vector<uint16_t>(kElements), low_rank = full;
  std::vector<float> factors = std::vector<float>(kSeeds * kElements);
  uint64_t fingerprint = 0;

  void call(const std::vector<float>& base, uint64_t stream) {
    const es::Segment vector = table(full, base, stream, false), matrix = table(low_rank, base, stream, true);
    const es::Factor factor = {0, kElements, stream, es::kLeft, kElements / 8};
    const uint64_t rounding_seed = stream;
    require(!es_cpu_add_noise(&vector, 1, kSeedList, kCoefs, kSeeds, 0.125f, &rounding_seed, 0, kThreads, nullptr),
            "full noise");
    require(!es_cpu_add_noise(&matrix, 1, kSeedList, kCoefs, kSeeds, 0, nullptr, kRank, kThreads, nullptr),
            "noise of low rank");
    require(!es_cpu_factors(&factor, 1, kSeedList, kSeeds, factors.data(), es::kF32, kThreads, nullptr), "factors");
    require(!es_cpu_fingerprint(&vector, 1, &fingerprint, kThreads, nullptr), "fingerprint");
    const std::string name = "none" + std::to_string(stream);
    require(es_cpu_fingerprint(&vector, 1, &fingerprint, kThreads, name.c_str()), "an unknown instruction set");
    require(strstr(es_cpu_error(), (name + ";").c_str()), "a thread's own error text");
  }

  bool operator==(const Caller& other) const {
    return full == other.full && low_rank == other.low_rank && factors == other.factors &&
           fingerprint == other.fingerprint;
  }
};

}  // namespace

int main() {
  std::vector<float> base(kElements);
  for (int64_t i = 0; i < kElements; i++) base[i] = sinf((float)i);
  std::vector<Caller> alone(kCallers), together(kCallers);
  for (int i = 0; i < kCallers; i++) alone[i].call(base, i);
  for (int round = 0; round < kRounds; round++) {
    std::vector<std::thread> threads;
    for (int i = 0; i < kCallers; i++) threads.emplace_back([&, i] { together[i].call(base, i); });
    for (std::thread& thread : threads) thread.join();
    require(together == alone, "threads get what each gets alone");
  }
  printf("%d threads, %d rounds: the bits of each alone\n", kCallers, kRounds);
}
