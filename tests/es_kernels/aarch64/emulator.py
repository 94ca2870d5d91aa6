"""libes_cpu.so for aarch64, called here: cross-compiled by setup.py, run by qemu-user in another process (driver.cpp),
which gets the memory that a call may touch, and nothing else."""

import ctypes
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np

from es_kernels.low_rank import FACTOR
from es_kernels.segment import SEGMENT, SIZES

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
_GUARD, _ERROR = 64, 256
ADD_NOISE, FACTORS, FINGERPRINT = range(3)


def compile_driver(folder):
    """`driver`, in `folder`, and the library that setup.py makes for it."""
    build = [sys.executable, "setup.py", "--quiet", "build_ext", f"--build-lib={folder}", f"--build-temp={folder}/temp"]
    subprocess.run(build, cwd=ROOT, env={**os.environ, "CXX": COMPILER, "ES_KERNELS_CUDA": "0"}, check=True)
    library = folder / "es_kernels/libes_cpu.so"
    command = [COMPILER, "-std=c++17", "-O1", "-I", ROOT / "csrc", HERE / "driver.cpp", library]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-o", folder / "driver"], check=True)


def _bytes_at(address, size):
    return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)


class Memory:
    """The bytes of `spans`, pairs of (address, size), in one array, with guards between them. An address keeps its
    place within a cache line."""

    def __init__(self, spans):
        self.runs, end = [], 0  # [address, size]: spans that touch are one
        for address, size in sorted(spans):
            if address <= end:
                end = max(end, address + size)
                self.runs[-1][1] = end - self.runs[-1][0]
            else:
                self.runs.append([address, size])
                end = address + size
        self.places, place = [], 0
        for address, size in self.runs:
            place = -(-(place + _GUARD) // 64) * 64 + address % 64
            self.places.append(place)
            place += size
        self.image = np.full(place + _GUARD, 0xA5, np.uint8)
        self.outside = np.ones(len(self.image), bool)
        for (address, size), at in zip(self.runs, self.places, strict=True):
            self.image[at : at + size] = _bytes_at(address, size)
            self.outside[at : at + size] = False

    def place(self, address):
        i = np.searchsorted([run[0] for run in self.runs], address, "right") - 1
        return self.places[i] + address - self.runs[i][0]

    def put_back(self, image):
        assert (image[self.outside] == 0xA5).all(), "memory between the tensors was written"
        for (address, size), at in zip(self.runs, self.places, strict=True):
            ctypes.memmove(address, image[at : at + size].tobytes(), size)


class Library:
    """What es_kernels.backends.cpu calls of libes_cpu.so."""

    def __init__(self, folder):
        # Debian puts the libraries of another architecture there.
        command = [QEMU, "-L", "/usr/aarch64-linux-gnu", folder / "driver"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.error = b""

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(60) == 0

    def es_cpu_error(self):
        return self.error

    def es_cpu_add_noise(
        self, segments, n_segments, seeds, coefs, n_seeds, decay, rounding_seed, noise_rank, threads, isa
    ):
        rounding = None if rounding_seed is None else ctypes.c_uint64.from_address(rounding_seed).value
        return self._on_segments(
            ADD_NOISE, segments, n_segments, threads, seeds, coefs, n_seeds, decay, rounding, noise_rank
        )[0]

    def es_cpu_fingerprint(self, segments, n_segments, result, threads, isa):
        status, value = self._on_segments(FINGERPRINT, segments, n_segments, threads)
        ctypes.c_uint64.from_address(result).value = value
        return status

    def es_cpu_factors(self, factors, n_factors, seeds, n_seeds, out, dtype, threads, isa):
        table = _bytes_at(factors, n_factors * FACTOR.itemsize).view(FACTOR)
        end = max((int(f["offset"]) * n_seeds + int(f["count"]) * n_seeds for f in table), default=0)
        memory = Memory([(out, end * SIZES[dtype])])
        return self._call(FACTORS, table, memory, threads, seeds, None, n_seeds, out=memory.place(out), dtype=dtype)[0]

    def _on_segments(self, function, segments, n_segments, threads, *options):
        table = _bytes_at(segments, n_segments * SEGMENT.itemsize).view(SEGMENT).copy()
        spans = []
        for s in table:
            for what in ("out", "base", "anchor"):
                if s[what]:
                    elements = (int(s["rows"]) - 1) * int(s[f"{what}_stride"]) + int(s["cols"])
                    spans.append((int(s[what]), elements * SIZES[s[f"{what}_dtype"]]))
        memory = Memory(spans)
        for s in table:
            for what in ("out", "base", "anchor"):
                if s[what]:
                    s[what] = memory.place(int(s[what]))
        return self._call(function, table, memory, threads, *options)

    def _call(
        self, function, table, memory, threads, seeds=None, coefs=None, n_seeds=0, decay=0.0, rounding=None,
        noise_rank=0, out=0, dtype=0,
    ):  # fmt: skip
        head = struct.pack(
            "<7qQf3i", function, len(table), table.itemsize, n_seeds, rounding is not None, out, len(memory.image),
            rounding or 0, decay, noise_rank, dtype, threads,
        )  # fmt: skip
        values = ctypes.string_at(seeds, 8 * n_seeds) if n_seeds else b""
        values += ctypes.string_at(coefs, 4 * n_seeds) if coefs and n_seeds else bytes(4 * n_seeds)
        self.process.stdin.write(head + table.tobytes() + values + memory.image.tobytes())
        self.process.stdin.flush()
        answer = self.process.stdout.read(16 + _ERROR + len(memory.image))
        status, result = struct.unpack_from("<2Q", answer)
        self.error = answer[16 : 16 + _ERROR].rstrip(b"\0")
        memory.put_back(np.frombuffer(answer, np.uint8, offset=16 + _ERROR))
        return status, result
