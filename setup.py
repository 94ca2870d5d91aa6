"""Builds the two libraries of the C ABI, if the compilers are there. Needs neither torch nor Python headers.

g++ (or CXX) makes libes_cpu.so, nvcc libes_cuda.so; without a compiler the wheel is pure and the reference and Triton backends serve.
ES_KERNELS_CUDA=auto|0|1: build the CUDA library if nvcc is found, never, or else fail. ES_KERNELS_CUDA_ARCHS: "80 90 100 120" by default.
"""

import os
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = pathlib.Path(__file__).parent
CSRC = ROOT / "csrc"
HEADERS = sorted(map(str, [*CSRC.glob("*.h")]))

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"]
ISAS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]


def cxx():
    return shutil.which(os.environ.get("CXX", "g++"))


def nvcc():
    if "CUDA_HOME" in os.environ:
        return shutil.which("nvcc", path=os.environ["CUDA_HOME"] + "/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def wanted_extensions():
    choice = os.environ.get("ES_KERNELS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"ES_KERNELS_CUDA is auto, 0 or 1, not {choice!r}")
    if choice == "1" and not nvcc():
        sys.exit("ES_KERNELS_CUDA=1, but nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    names = (["cpu"] if cxx() else []) + (["cuda"] if choice != "0" and cxx() and nvcc() else [])
    for name, missing in (("cpu", "C++ compiler (g++ or CXX)"), ("cuda", "nvcc")):
        if name not in names:
            print(f"es_kernels: no libes_{name}.so will be built" + ("" if name == "cuda" and choice == "0" else f": {missing} was not found"))
    return [Extension(f"es_kernels.libes_{name}", [], depends=HEADERS) for name in names]


class Build(build_ext):
    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"  # a plain shared library: one for every Python

    def build_extension(self, ext):
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = pathlib.Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        (self.build_cpu if ext.name.endswith("cpu") else self.build_cuda)(target, temp)

    def build_cpu(self, target, temp):
        objects = {temp / f"{isa}.o": [*flags, f"-DES_ISA={isa}", str(CSRC / "cpu_simd.cpp")] for isa, flags in ISAS.items()}
        objects[temp / "cpu.o"] = [str(CSRC / "cpu.cpp")]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda item: self.run_tool([cxx(), *CXX_FLAGS, "-c", *item[1], "-o", str(item[0])]), objects.items()))
        self.run_tool([cxx(), "-shared", "-static-libgcc", "-static-libstdc++", *map(str, objects), "-o", str(target), "-pthread"])

    def build_cuda(self, target, temp):
        archs = os.environ.get("ES_KERNELS_CUDA_ARCHS", "80 90 100 120").split()
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs] + [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
        self.run_tool([nvcc(), *NVCC_FLAGS, *code, "-shared", "-ccbin", cxx(), str(CSRC / "cuda.cu"), "-o", str(target)])

    def run_tool(self, command):
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)

    def copy_extensions_to_source(self):
        # In place (editable installs, `make build`): a half-written library must never be found.
        for ext in self.extensions:
            built, final = pathlib.Path(self.get_ext_fullpath_in_build(ext)), ROOT / self.get_ext_filename(ext.name)
            shutil.copy(built, f"{final}.new")
            os.replace(f"{final}.new", final)

    def get_ext_fullpath_in_build(self, ext):
        return os.path.join(self.build_lib, self.get_ext_filename(ext.name))


class Wheel(bdist_wheel):
    def get_tag(self):
        # The libraries know nothing of Python's ABI; without them the wheel is pure.
        return ("py3", "none", "linux_x86_64" if self.distribution.has_ext_modules() else "any")


class Dist(Distribution):
    def has_ext_modules(self):
        return bool(self.ext_modules)


setup(distclass=Dist, ext_modules=wanted_extensions(), cmdclass={"build_ext": Build, "bdist_wheel": Wheel})
