// Contract under test: whatever a caller of the C ABI passes, a call that is refused writes nothing and says why; one
// that is accepted writes every element of its segments and nothing else, the same bits with every instruction set.
// Sanitizers see what it reads.
//
// The bytes of an input are a call. What the library cannot know is kept true: an address that is not null has memory
// behind it, of all rows and columns, and there are as many segments, seeds and coefficients as the call says. A
// segment whose rows and columns do not fit in the memory here gets no address, and must be refused.
//
// libFuzzer calls LLVMFuzzerTestOneInput (`make fuzz`). With ES_REPLAY main runs the inputs in a file, in hexadecimal,
// one a line.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "es_kernels.h"
#include "segments.h"

namespace {

using es::Factor;
using es::Segment;

constexpr int64_t kBytes = 1 << 13;         // of the memory of each role
constexpr int64_t kMostElements = 1 << 14;  // of a segment, so that a call takes no long
constexpr int kMostParts = 4, kMostSeeds = 5;

int accepted, refused;

void require(bool holds, const char* what) {
  if (!holds) fprintf(stderr, "broken: %s\n", what), abort();
}

struct Input {
  const uint8_t* data;
  size_t left;

  template <class T>
  T take() {
    T value = {};
    const size_t n = std::min(left, sizeof value);
    memcpy(&value, data, n);
    data += n, left -= n;
    return value;
  }
  bool flag() { return take<uint8_t>() & 1; }
  // Mostly small; else near where 64 bits, a tile or a block number ends, or anything.
  int64_t number() {
    static const int64_t edges[] = {0, 1, 8, es::kTile, es::kTileUnits, 1LL << 32, 1LL << 35, 1LL << 58, 1LL << 62};
    const uint8_t kind = take<uint8_t>();
    if (kind < 128) return kind;
    if (kind < 192) return take<uint16_t>() & 0x1FFF;
    if (kind < 224) return edges[kind % 9] - (kind & 1);
    if (kind < 232) return INT64_MAX - (kind & 7);
    if (kind < 240) return INT64_MIN + (kind & 7);
    if (kind < 244) return -(int64_t)take<uint8_t>();
    return take<int64_t>();
  }
  // Mostly one of 0..n - 1
  int small(int n) {
    const uint8_t kind = take<uint8_t>();
    return kind < 250 ? kind % n : kind < 253 ? n : take<int32_t>();
  }
};

// The memory of one role, of just that size, so that a sanitizer sees what lies beyond.
struct Memory {
  uint8_t* bytes = (uint8_t*)malloc(kBytes);
  ~Memory() { free(bytes); }
  void fill(uint64_t seed) {
    for (int64_t i = 0; i < kBytes; i += 8) {
      seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
      memcpy(bytes + i, &seed, 8);
    }
  }
};

// The address of rows x cols elements from byte `offset` on; null where they do not fit.
uint64_t place(const Memory& memory, int64_t offset, int64_t rows, int64_t cols, int64_t stride, int32_t dtype) {
  if (rows < 1 || cols < 1 || (__int128)rows * cols > kMostElements) return 0;
  const __int128 last = (__int128)(rows - 1) * stride;  // of the rows, where it begins
  const __int128 from = std::min<__int128>(last, 0), to = std::max<__int128>(last, 0) + cols;
  const int size = es::dtype_size(dtype);
  if (offset + from * size < 0 || offset + to * size > kBytes) return 0;
  return (uint64_t)memory.bytes + offset;
}

// The segment has an address and fields that may fit; whether they do, the library must find out.
Segment segment(Input& in, const Memory& out, const Memory& base, const Memory& anchor, int64_t end) {
  Segment s = {};
  const uint8_t flags = in.take<uint8_t>();
  const bool in_place = flags & 1, fit = flags & 2, one_row = flags & 4, matrix = flags & 8, plain = flags & 16;
  s.rows = one_row ? 1 : in.number(), s.cols = in.number();
  s.out_stride = plain ? s.cols : in.number();
  s.base_stride = in_place ? s.out_stride : in.number();
  s.anchor_stride = in.number();
  s.first = in.number(), s.index_stride = plain ? s.cols : in.number(), s.stream = in.take<uint8_t>();
  s.out_dtype = in.small(3), s.base_dtype = in_place ? s.out_dtype : in.small(3), s.anchor_dtype = in.small(3);
  if (matrix) {
    s.width = in.number();
    if (fit && s.width > 0) s.index_stride -= s.index_stride % s.width;
  }
  const auto tiles = [](int64_t n) { return n / es::kTile + (n % es::kTile != 0); };
  if (fit) {
    const uint64_t rows = s.width ? tiles(s.rows) : s.rows;
    s.units_per_row = s.width ? (uint64_t)tiles(s.cols) * es::kTileUnits : ((uint64_t)s.cols + 14) / 8;
    if (s.rows == 1 && !s.width) s.units_per_row = (s.first % 8 + s.cols + 7) / 8;
    s.unit_end = end + rows * s.units_per_row;
  } else {
    s.units_per_row = in.number(), s.unit_end = in.number();
  }
  const auto offset = [&] { return in.take<uint16_t>() % kBytes; };
  s.out = place(out, offset(), s.rows, s.cols, s.out_stride, s.out_dtype);
  s.base = in_place ? s.out : place(base, offset(), s.rows, s.cols, s.base_stride, s.base_dtype);
  if (in.flag()) s.anchor = place(anchor, offset(), s.rows, s.cols, s.anchor_stride, s.anchor_dtype);
  return s;
}

std::vector<const char*> isas() {
  static const std::string names = es_cpu_isas();
  static std::vector<std::string> each;
  if (each.empty())
    for (size_t at = 0, end; at < names.size(); at = end + 1)
      end = std::min(names.find(' ', at), names.size()), each.push_back(names.substr(at, end - at));
  std::vector<const char*> pointers;
  for (const std::string& name : each) pointers.push_back(name.c_str());
  return pointers;
}

int threads(Input& in) {
  static const int counts[] = {1, 1, 1, 2, 3, 0, -1, INT32_MIN, INT32_MAX};
  return counts[in.take<uint8_t>() % 9];
}

// The bytes of an output that a call may write.
struct Written {
  std::vector<bool> marks = std::vector<bool>(kBytes);
  bool twice = false;  // some of them

  void add(int64_t from, int64_t n) {
    for (int64_t i = from; i < from + n; i++) twice |= marks[i], marks[i] = true;
  }
  // Threads must not be given the same memory to write: the last one would win.
  int threads(int n) const { return twice ? 1 : n; }
};

// What a call returns and leaves of its output.
struct Result {
  int status;
  uint64_t number;
  std::vector<uint8_t> bytes;
};

// Runs call(isa) with every instruction set, each on an output filled in another way if `fresh` (nothing is read of
// it); holds the results against each other.
template <class Call>
void run(Memory& out, const Written& written, bool fresh, Call call) {
  uint8_t fill = 0x5A;
  const std::vector<uint8_t> start(out.bytes, out.bytes + kBytes);
  std::vector<Result> results;
  for (const char* isa : isas()) {
    memcpy(out.bytes, start.data(), kBytes);
    if (fresh) memset(out.bytes, fill = ~fill, kBytes);
    const std::vector<uint8_t> before(out.bytes, out.bytes + kBytes);
    Result r = {0, 0, {}};
    r.status = call(isa, &r.number);
    r.bytes.assign(out.bytes, out.bytes + kBytes);
    if (r.status) {
      require(*es_cpu_error(), "a refusal says why");
      require(r.bytes == before, "a refused call writes nothing");
      r.bytes.clear();
    }
    for (size_t i = 0; i < r.bytes.size(); i++) {
      if (!written.marks[i]) require(r.bytes[i] == before[i], "a call writes its elements alone"), r.bytes[i] = 0;
    }
    results.push_back(r);
    require(r.status == results[0].status, "every instruction set refuses the same");
    require(r.number == results[0].number, "every instruction set has the same fingerprint");
    require(r.bytes == results[0].bytes, "every instruction set writes the same bits, and every element");
  }
  (results[0].status ? refused : accepted)++;
}

void on_segments(Input& in, bool fingerprint) {
  Memory out, base, anchor;
  const uint64_t fill = in.take<uint8_t>() + 1;
  out.fill(fill), base.fill(fill * 3), anchor.fill(fill * 5);
  const int count = in.small(kMostParts + 1);
  const bool missing = in.take<uint8_t>() >= 250;
  std::vector<Segment> parts;
  bool in_place = false, null = false;
  for (int i = 0; i < (count < 0 ? 1 : std::min(count, kMostParts)); i++) {
    parts.push_back(segment(in, out, base, anchor, parts.empty() ? 0 : parts.back().unit_end));
    in_place |= parts.back().base == parts.back().out;
    null |= !parts.back().out || !parts.back().base;
  }
  const int64_t n = count < 0 ? count : (int64_t)parts.size();
  const Segment* const segments = missing ? nullptr : parts.data();

  Written written;
  for (const Segment& s : parts)
    for (int64_t row = 0; !null && !fingerprint && row < s.rows; row++) {
      const int size = es::dtype_size(s.out_dtype);
      const int64_t at = (int64_t)(s.out - (uint64_t)out.bytes) + row * s.out_stride * size;
      written.add(at, s.cols * size);
    }

  const int n_threads = written.threads(threads(in));
  const uint8_t which = in.take<uint8_t>();
  const bool must_refuse = n < 0 || null || (n > 0 && missing) || which >= 250;
  const char* const named = which >= 250 ? "an instruction set that no processor has, under a name that is longer than "
                                           "all that a message could hold, and which goes on, and on, and on, and on, "
                                           "and on, and on, and on, and on, and on, and on, and on, and on, and on"
                                         : nullptr;
  if (fingerprint) {
    const bool nowhere = in.take<uint8_t>() >= 250;
    run(out, written, false, [&](const char* isa, uint64_t* number) {
      const int status = es_cpu_fingerprint(segments, n, nowhere ? nullptr : number, n_threads, named ? named : isa);
      require(status || !(must_refuse || nowhere), "what must be refused is");
      return status;
    });
    return;
  }
  uint64_t seeds[kMostSeeds], rounding_seed = in.take<uint8_t>();
  float coefs[kMostSeeds];
  const int64_t n_seeds = std::min(in.small(kMostSeeds + 1), kMostSeeds);
  for (int64_t i = 0; i < n_seeds; i++) seeds[i] = in.take<uint16_t>(), coefs[i] = in.take<float>();
  const float decay = in.flag() ? in.take<float>() : 0;
  const int rank = in.small(66);
  const uint8_t options = in.take<uint8_t>();
  const bool rounding = options & 1, no_seeds = options >= 250, no_coefs = options >= 252;
  run(out, written, !in_place, [&](const char* isa, uint64_t*) {
    const int status =
        es_cpu_add_noise(segments, n, no_seeds ? nullptr : seeds, no_coefs ? nullptr : coefs, n_seeds, decay,
                         rounding ? &rounding_seed : nullptr, rank, n_threads, named ? named : isa);
    require(status || !(must_refuse || n_seeds < 0 || (n_seeds && no_seeds)), "what must be refused is");
    return status;
  });
}

void factors(Input& in) {
  Memory out;
  const int count = in.small(kMostParts + 1);
  const bool missing = in.take<uint8_t>() >= 250, no_out = in.take<uint8_t>() >= 250;
  const int dtype = in.small(3);
  uint64_t seeds[kMostSeeds];
  const int64_t n_seeds = std::min(in.small(kMostSeeds + 1), kMostSeeds);
  for (int64_t i = 0; i < n_seeds; i++) seeds[i] = in.take<uint16_t>();
  Written written;
  std::vector<Factor> parts;
  bool outside = false;
  for (int i = 0; i < (count < 0 ? 1 : std::min(count, kMostParts)); i++) {
    Factor f = {};
    const bool fit = in.flag();
    f.offset = (uint64_t)in.number() * (fit ? 8 : 1), f.count = in.number(), f.stream = in.take<uint8_t>();
    f.domain = in.small(6);
    if (fit) f.unit_end = (parts.empty() ? 0 : (uint64_t)parts.back().unit_end) + f.count / 8 + (f.count % 8 != 0);
    else f.unit_end = in.number();
    parts.push_back(f);
    const int64_t size = es::dtype_size(dtype), rows = std::max<int64_t>(n_seeds, 0);
    const __int128 from = (__int128)rows * f.offset * size, bytes = (__int128)rows * f.count * size;
    if (f.offset < 0 || f.count < 0 || from + bytes > kBytes) outside = true;
    else written.add((int64_t)from, (int64_t)bytes);
  }
  const int64_t n = count < 0 ? count : (int64_t)parts.size();
  void* const address = outside || no_out ? nullptr : out.bytes;
  const int n_threads = written.threads(threads(in));
  run(out, written, true, [&](const char* isa, uint64_t*) {
    return es_cpu_factors(missing ? nullptr : parts.data(), n, seeds, n_seeds, address, dtype, n_threads, isa);
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in = {data, size};
  switch (in.take<uint8_t>() % 4) {
    case 0:
      factors(in);
      break;
    case 1:
      on_segments(in, true);
      break;
    default:
      on_segments(in, false);
  }
  return 0;
}

#ifdef ES_REPLAY
int main(int, char** paths) {
  FILE* const file = fopen(paths[1], "r");
  require(file, paths[1]);
  std::vector<uint8_t> data;
  for (int c, half = -1; (c = fgetc(file)) != EOF;) {
    if (c == '\n') {
      LLVMFuzzerTestOneInput(data.data(), data.size());
      data.clear();
      continue;
    }
    const int digit = c <= '9' ? c - '0' : c - 'a' + 10;
    if (half < 0) half = digit;
    else data.push_back(half << 4 | digit), half = -1;
  }
  fclose(file);
  printf("%d calls accepted, %d refused\n", accepted, refused);
  require(accepted > 20 && refused > 20, "the inputs show calls of both kinds");
}
#endif
