"""The kernels, each with one thing changed: what tune.py builds, counts and times against what ships.

A variant is an exact replacement in csrc/ (CUDA) or of the backend's constants (Triton), and what it is expected to do,
written before it was measured. Names joined by " + " apply together. A test applies every one, so that they follow the
sources.
"""

import shutil
import subprocess
from typing import NamedTuple

from bench import ROOT

PERTURB, UPDATE, FEW, FINGERPRINT = "perturb", "update", "swap and restore", "fingerprint"
EVERY = (PERTURB, UPDATE, FEW, FINGERPRINT)


class Variant(NamedTuple):
    expected: str
    touches: tuple  # which operations can differ from what ships
    edits: tuple = ()  # (file of csrc, text, its replacement); the text occurs once
    same_bits: bool = True  # False: a floor, never to be shipped


def _loads(modifier):
    return ("cuda.cu", "ld.global.v4.u32", f"ld.global.{modifier}.v4.u32")


def _stores(modifier):
    return ("cuda.cu", "st.global.v4.u32", f"st.global.{modifier}.v4.u32")


_F32_STORES = """    store_global(p + 1, bits_of(v[4]), bits_of(v[5]), bits_of(v[6]), bits_of(v[7]));
    for (int i = 0; i < 4; i++) w[i] = bits_of(v[i]);
"""
# Neighbours exchange halves, so that one store of the warp fills whole sectors of 32 bytes: first those of its even
# threads, then of its odd ones.
_WHOLE_SECTORS = """    if (__activemask() == 0xFFFFFFFFu) {
      const bool odd = threadIdx.x & 1;
      for (int i = 0; i < 4; i++) {
        const float mine = odd ? v[i] : v[i + 4], theirs = __shfl_xor_sync(0xFFFFFFFFu, mine, 1);
        if (odd) v[i] = theirs;
        else v[i + 4] = theirs;
      }
      store_global(odd ? p - 1 : p, bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3]));
      store_global(odd ? p + 1 : p + 2, bits_of(v[4]), bits_of(v[5]), bits_of(v[6]), bits_of(v[7]));
      return;
    }
"""

CUDA = {
    "no noise": Variant(
        "the floor: the same reads and writes; what ships should reach 95 % of it with f32 weights or base, its swap "
        "70 % of a copy",
        (PERTURB, FEW),
        (
            (
                "add_noise.h",
                "  for (int i = 0; i < 4; i++) box_muller(w[i], noise[2 * i], noise[2 * i + 1]);",
                "  for (int i = 0; i < 8; i++) noise[i] = 1.0f;",
            ),
        ),
        same_bits=False,
    ),
    "no keys": Variant(
        "the floor of the fingerprint: it reads and adds up; what ships should reach 90 % of it",
        (FINGERPRINT,),
        (
            (
                "fingerprint.h",
                "    m[j] = w[j] | 1u, m[j + 4] = ((w[j] << 16) | (w[j] >> 16)) | 1u;",
                "    k[j] = k[j + 4] = 0, m[j] = m[j + 4] = 1;",
            ),
        ),
        same_bits=False,
    ),
    "evict-first stores": Variant(
        "nothing reads the result soon, but the L2 is small beside it either way: within 1 %",
        EVERY[:3],
        (_stores("cs"),),
    ),
    "evict-first loads": Variant("as above", EVERY, (_loads("cs"),)),
    "evict-first loads and stores": Variant(
        "as above, 1 % where both streams share the L2", EVERY, (_loads("cs"), _stores("cs"))
    ),
    "loads past L1": Variant(
        "bf16: none; f32: slower, the second half of a sector then comes from the L2",
        EVERY,
        (_loads("L1::no_allocate"),),
    ),
    "whole sectors a store": Variant(
        "f32 only: half as many partial writes to the L2 for 2 instructions a value; up to 5 % if its write port binds",
        (PERTURB, UPDATE, FEW),
        (("cuda.cu", _F32_STORES, _WHOLE_SECTORS + _F32_STORES),),
    ),
    "a tile of 2048 units": Variant(
        "four times the walks over segments; a shorter tail, so faster below 2^24 values only",
        EVERY,
        (("cuda.cu", "kLargestTile = 8192", "kLargestTile = 2048"),),
    ),
    "a tile of 32768 units": Variant(
        "fewer walks, a longer tail: slower below 2^27 values",
        EVERY,
        (("cuda.cu", "kLargestTile = 8192", "kLargestTile = 32768"),),
    ),
    "no persistent grid": Variant(
        "each block of threads searches its segment once: 2 % slower on tables, no tail of unequal rounds",
        EVERY,
        (
            (
                "cuda.cu",
                "std::min(at_once, (n_units - 1) / launch->tile + 1)",
                "((n_units - 1) / launch->tile + 1)",
            ),
        ),
    ),
    "128 threads": Variant(
        "the same occupancy in smaller parts: within 1 %",
        EVERY,
        (
            ("cuda.cu", "kThreads = 256", "kThreads = 128"),
            ("cuda.cu", "return SEEDS == 2 ? 2 : 5;", "return SEEDS == 2 ? 4 : 10;"),
            ("cuda.cu", "__launch_bounds__(kThreads, 2) update", "__launch_bounds__(kThreads, 4) update"),
            ("cuda.cu", "__launch_bounds__(kThreads, 5) fingerprint", "__launch_bounds__(kThreads, 10) fingerprint"),
        ),
    ),
    "perturb: 1 block a thread": Variant(
        "16 bytes a thread in flight instead of 32: slower, unless warps hide it",
        (PERTURB,),
        (("cuda.cu", "seeds == 1 ? 2 : 4;", "seeds == 1 ? 1 : 4;"),),
    ),
    "perturb: 3 blocks a thread": Variant(
        "fewer loop instructions for more registers (spills?)",
        (PERTURB,),
        (("cuda.cu", "seeds == 1 ? 2 : 4;", "seeds == 1 ? 3 : 4;"),),
    ),
    "perturb: 4 blocks a thread, 64 registers": Variant(
        "64 bytes a thread in flight, 4 blocks of threads instead of 5",
        (PERTURB,),
        (
            ("cuda.cu", "seeds == 1 ? 2 : 4;", "4;"),
            ("cuda.cu", "return SEEDS == 2 ? 2 : 5;", "return SEEDS == 2 ? 2 : 4;"),
        ),
    ),
    "perturb: 64 registers": Variant(
        "a fifth fewer warps: slower if latency binds",
        (PERTURB, FEW),
        (("cuda.cu", "return SEEDS == 2 ? 2 : 5;", "return SEEDS == 2 ? 2 : 4;"),),
    ),
    "perturb: 40 registers": Variant(
        "a fifth more warps for 0.4 instructions a value",
        (PERTURB, FEW),
        (("cuda.cu", "return SEEDS == 2 ? 2 : 5;", "return SEEDS == 2 ? 2 : 6;"),),
    ),
    "swap and restore: 3 blocks a thread, 80 registers": Variant(
        "half as many warps more for 0.6 instructions a value: faster if latency binds",
        (FEW,),
        (
            ("cuda.cu", "seeds == 1 ? 2 : 4;", "seeds == 1 ? 2 : 3;"),
            ("cuda.cu", "return SEEDS == 2 ? 2 : 5;", "return SEEDS == 2 ? 3 : 5;"),
        ),
    ),
    "swap and restore: 2 blocks a thread, 64 registers": Variant(
        "twice the warps for 2.6 instructions a value: slower",
        (FEW,),
        (
            ("cuda.cu", "seeds == 1 ? 2 : 4;", "2;"),
            ("cuda.cu", "return SEEDS == 2 ? 2 : 5;", "return SEEDS == 2 ? 4 : 5;"),
        ),
    ),
    "update: 2 blocks a thread, 80 registers": Variant(
        "half as many warps more, twice the loads of keys: 19.4 instructions a normal, so 2 % slower unless latency "
        "binds",
        (UPDATE,),
        (
            ("cuda.cu", "kUpdateBlocks = 4;", "kUpdateBlocks = 2;"),
            ("cuda.cu", "__launch_bounds__(kThreads, 2) update", "__launch_bounds__(kThreads, 3) update"),
        ),
    ),
    "update: 3 blocks a thread, 80 registers": Variant(
        "half as many warps more, a third more loads of keys",
        (UPDATE,),
        (
            ("cuda.cu", "kUpdateBlocks = 4;", "kUpdateBlocks = 3;"),
            ("cuda.cu", "__launch_bounds__(kThreads, 2) update", "__launch_bounds__(kThreads, 3) update"),
        ),
    ),
    "update: 1 block of threads a multiprocessor": Variant(
        "8 blocks a thread and all registers: fewer loads of keys, too few warps; slower",
        (UPDATE,),
        (
            ("cuda.cu", "kUpdateBlocks = 4;", "kUpdateBlocks = 8;"),
            ("cuda.cu", "__launch_bounds__(kThreads, 2) update", "__launch_bounds__(kThreads, 1) update"),
        ),
    ),
    "fingerprint: 128 bytes a thread": Variant(
        "twice the bytes in flight for more registers",
        (FINGERPRINT,),
        (
            ("cuda.cu", "kFingerprintBlocks = 4;", "kFingerprintBlocks = 8;"),
            ("cuda.cu", "__launch_bounds__(kThreads, 5) fingerprint", "__launch_bounds__(kThreads, 3) fingerprint"),
        ),
    ),
    "fingerprint: 32 bytes a thread": Variant(
        "half the bytes in flight, 8 blocks of threads instead of 5",
        (FINGERPRINT,),
        (
            ("cuda.cu", "kFingerprintBlocks = 4;", "kFingerprintBlocks = 2;"),
            ("cuda.cu", "__launch_bounds__(kThreads, 5) fingerprint", "__launch_bounds__(kThreads, 8) fingerprint"),
        ),
    ),
}

TOGETHER = ["whole sectors a store + perturb: 64 registers"]  # alone it spills


class TritonVariant(NamedTuple):
    expected: str
    constants: dict  # of es_kernels.backends.triton


TRITON = {
    "256 units, 8 warps": TritonVariant(
        "a unit a thread: half the bytes in flight, 26.4 instead of 23.6 instructions on a prototype; slower",
        {"_WARPS": 8},
    ),
    "512 units": TritonVariant("four units a thread: more in flight, spills likely", {"_UNITS": 512}),
    "128 units": TritonVariant("a unit a thread in blocks of 128: slower", {"_UNITS": 128}),
    "128 units, 2 warps": TritonVariant("what ships in smaller programs: within 1 %", {"_UNITS": 128, "_WARPS": 2}),
    "512 units, 8 warps": TritonVariant("what ships in larger programs: within 1 %", {"_UNITS": 512, "_WARPS": 8}),
    "16 programs a processor": TritonVariant("a longer tail", {"_PROGRAMS": 16}),
    "256 programs a processor": TritonVariant("more searches, a shorter tail: within 1 %", {"_PROGRAMS": 256}),
    "64 registers": TritonVariant(
        "a third more warps to hide the loads that ptxas moved behind the noise: faster unless it spills",
        {"maxnreg": 64},
    ),
    "96 registers": TritonVariant("more room, fewer warps: slower", {"maxnreg": 96}),
}


def parts(name, variants):
    """The variants that a name joins."""
    missing = [part for part in name.split(" + ") if part not in variants]
    if missing:
        raise SystemExit(f"there is no variant {missing[0]!r}; there are {', '.join(variants)}")
    return [variants[part] for part in name.split(" + ")]


def sources(name, folder):
    """Writes csrc with a variant's edits into a folder. ValueError if a text that it replaces is not there exactly
    once."""
    shutil.copytree(ROOT / "csrc", folder, dirs_exist_ok=True)
    for variant in parts(name, CUDA) if name else ():
        for file, text, replacement in variant.edits:
            path = folder / file
            content = path.read_text()
            if content.count(text) != 1:
                raise ValueError(
                    f"variant {name!r}: {text!r} stands {content.count(text)} times in {file}: it must follow the "
                    "sources"
                )
            path.write_text(content.replace(text, replacement))


def build(name, folder, arch, flags):
    """Compiles csrc/cuda.cu with a variant's edits (none: "") for one architecture; returns the library's path."""
    sources(name, folder / "csrc")
    library = folder / "libes_cuda.so"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *flags, gencode, "-shared", folder / "csrc/cuda.cu", "-o", library]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"variant {name!r} does not compile: {run.stderr.strip()[-2000:]}")
    return library
