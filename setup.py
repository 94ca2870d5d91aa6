"""Builds the two libraries of the C ABI, if the compilers are there. Needs neither torch nor Python headers.

g++ (or CXX) makes libes_cpu.so for x86-64 or aarch64, nvcc libes_cuda.so; without a compiler the wheel is pure and the
reference and Triton backends serve. ES_KERNELS_CUDA=auto|0|1: build the CUDA library if nvcc is found and can, never,
or else fail. ES_KERNELS_CUDA_ARCHS="80 90": for these architectures; by default for those of CUDA_ARCHS that nvcc
knows. PTX of the oldest and of the newest comes along, so every GPU from the oldest on is served.

ES_KERNELS_URL=https://...: the repository's address, of which the metadata's links are made; without it they are
README's own, relative ones.
"""

import email
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70 it was wheel's; `make build` makes no wheel and does without
    bdist_wheel = None

ROOT = pathlib.Path(__file__).parent
CSRC = ROOT / "csrc"

CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-psabi",
]
# The instruction sets of libes_cpu.so, best first. What the compiler cannot do is left out, but for the last.
ISAS = {
    "x86_64": {
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
        "avx2": ["-mavx2", "-mfma"],
        "baseline": [],
    },
    "aarch64": {"neon": []},
}
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-cudart=static",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "--threads=0",
]
CUDA_ARCHS = ["80", "90", "100", "120"]


def cxx():
    """The command of the C++ compiler, in words: CXX may be "ccache g++". None if there is none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    name, *rest = asked or ["g++"]
    path = shutil.which(name)
    if asked and not path:
        sys.exit(f"CXX={os.environ['CXX']!r}: {name} was not found")
    return [path, *rest] if path else None


def cxx_target():
    """What the C++ compiler builds for, as "x86_64-linux-gnu"; it may be a cross compiler."""
    run = subprocess.run([*cxx(), "-dumpmachine"], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"{shlex.join(cxx())} -dumpmachine failed, as it says above")
    return run.stdout.strip()


def cxx_machine():
    return cxx_target().split("-")[0]


def nvcc():
    if "CUDA_HOME" in os.environ:
        return shutil.which("nvcc", path=os.environ["CUDA_HOME"] + "/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_archs():
    """The architectures to build for. Raises RuntimeError if nvcc knows none of CUDA_ARCHS; one asked for that it does
    not know ends the build."""
    known = re.findall(
        r"^sm_(\d+)\s*$",
        subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True).stdout,
        re.MULTILINE,
    )
    asked = os.environ.get("ES_KERNELS_CUDA_ARCHS", "").split()
    if not all(arch.isdigit() for arch in asked):
        sys.exit(
            f"ES_KERNELS_CUDA_ARCHS={' '.join(asked)!r}: give plain numbers, as 90; what is built for 90a no other GPU "
            "runs, its PTX neither"
        )
    unknown = [arch for arch in asked or CUDA_ARCHS if arch not in known]
    if unknown:
        named = [", ".join(f"sm_{arch}" for arch in archs) for archs in (unknown, known)]
        words = f"{nvcc()} knows no {named[0]}, only {named[1] or 'none'}"
        if asked:
            sys.exit(f"ES_KERNELS_CUDA_ARCHS={' '.join(asked)!r}: {words}")
        if unknown == CUDA_ARCHS:
            raise RuntimeError(words)
        print(f"es_kernels: {words}: newer GPUs compile the library's PTX when they first load it")
    return sorted((arch for arch in asked or CUDA_ARCHS if arch not in unknown), key=int)


def cuda_choice():
    return os.environ.get("ES_KERNELS_CUDA", "auto")


def wanted_extensions():
    choice = cuda_choice()
    if choice not in ("auto", "0", "1"):
        sys.exit(f"ES_KERNELS_CUDA is auto, 0 or 1, not {choice!r}")
    if choice == "1" and not nvcc():
        sys.exit("ES_KERNELS_CUDA=1, but nvcc was not found: install the CUDA toolkit or set CUDA_HOME")
    if choice == "1" and not cxx():
        sys.exit("ES_KERNELS_CUDA=1, but nvcc needs a C++ compiler, and none was found: install g++ or set CXX")
    machine = cxx_machine() if cxx() else None
    names = (["cpu"] if machine in ISAS else []) + (["cuda"] if choice != "0" and cxx() and nvcc() else [])
    missing = {
        "cpu": f"it is for x86-64 and aarch64, not {machine}" if machine else "no C++ compiler (g++ or CXX) was found",
        "cuda": "nvcc was not found",
    }
    if choice == "0":
        missing["cuda"] = "ES_KERNELS_CUDA=0"
    for name in missing:
        if name not in names:
            print(f"es_kernels: no libes_{name}.so will be built: {missing[name]}")
    return [Extension(f"es_kernels.libes_{name}", []) for name in names]


class Build(build_ext):
    def build_extensions(self):
        for ext in list(self.extensions):
            try:
                self.build_extension(ext)
            except (subprocess.CalledProcessError, RuntimeError) as error:
                if not ext.name.endswith("cuda") or cuda_choice() != "auto":
                    raise
                self.go_on_without(ext, error)

    def go_on_without(self, ext, error):
        """One library less; of an older build none stays in place, where it would pass for this one."""
        why = f"{error.cmd[0]} failed, as it says above" if isinstance(error, subprocess.CalledProcessError) else error
        print(
            f"es_kernels: WARNING: no libes_cuda.so was built: {why}. The triton backend serves GPUs without it. "
            "ES_KERNELS_CUDA=1 makes this an error."
        )
        self.extensions.remove(ext)
        pathlib.Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        if self.in_place:
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    def run(self):
        self.in_place = self.inplace  # setuptools builds elsewhere first and copies then
        super().run()
        if self.extensions and not self.in_place:
            include = pathlib.Path(self.build_lib, "es_kernels/include")
            include.mkdir(parents=True, exist_ok=True)
            shutil.copy(CSRC / "es_kernels.h", include)  # for callers from C

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"  # a plain shared library: one for every Python

    def build_extension(self, ext):
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temp = pathlib.Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        (self.build_cpu if ext.name.endswith("cpu") else self.build_cuda)(target, temp)

    def build_cpu(self, target, temp):
        isas = ISAS[cxx_machine()]

        def compiled(source, name, *flags):
            made = str(temp / f"{name}.o")
            self.run_tool([*cxx(), *CXX_FLAGS, *flags, "-c", str(CSRC / source), "-o", made])
            return made

        def compiled_isa(isa):
            try:
                return compiled("cpu_simd.cpp", isa, f"-DES_ISA={isa}", f"-DES_ISAS(X)=X({isa})", *isas[isa])
            except subprocess.CalledProcessError:
                if isa == list(isas)[-1]:
                    raise
                return None

        with ThreadPoolExecutor(2) as pool:
            objects = dict(zip(isas, pool.map(compiled_isa, isas), strict=True))
        left_out = [isa for isa, made in objects.items() if made is None]
        if left_out:
            print(
                f"es_kernels: WARNING: libes_cpu.so was built without {' and '.join(left_out)}: {shlex.join(cxx())} "
                "failed, as it says above. It is slower and gives the same bits."
            )
        table = "".join(f"X({isa})" for isa in isas if isa not in left_out)
        linked = [made for made in objects.values() if made]
        linked += [compiled("cpu.cpp", "cpu", f"-DES_ISAS(X)={table}"), compiled("tensors.cpp", "tensors")]
        # Before glibc 2.34 threads are in a library of their own, which a newer one does not ask for by itself.
        threads = [] if "musl" in cxx_target() else ["-Wl,--no-as-needed,-l:libpthread.so.0"]
        # The compiler adds the C++ runtime, which nothing needs (cpu.cpp): as-needed leaves it out.
        self.run_tool(
            [*cxx(), "-shared", "-static-libgcc", *linked, "-o", str(target), "-pthread", *threads, "-Wl,--as-needed"]
        )

    def build_cuda(self, target, temp):
        archs = nvcc_archs()
        ptx = {a: f"[sm_{a},compute_{a}]" for a in (archs[0], archs[-1])}
        code = [f"-gencode=arch=compute_{a},code={ptx.get(a, f'sm_{a}')}" for a in archs]
        compiler = [word for word in cxx() if not word.startswith("-")][-1]  # nvcc takes no more: g++ of "ccache g++"
        self.run_tool(
            [nvcc(), *NVCC_FLAGS, *code, "-shared", "-ccbin", compiler, str(CSRC / "cuda.cu"), "-o", str(target)]
        )

    def run_tool(self, command):
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True)

    def copy_extensions_to_source(self):
        # In place (editable installs, `make build`): a half-written library must never be found.
        for ext in self.extensions:
            built, final = pathlib.Path(self.get_ext_fullpath_in_build(ext)), ROOT / self.get_ext_filename(ext.name)
            shutil.copy(built, f"{final}.new")
            os.replace(f"{final}.new", final)

    def get_ext_fullpath_in_build(self, ext):
        return os.path.join(self.build_lib, self.get_ext_filename(ext.name))


def described():
    """What the metadata has to say and to link: of README, or in a source distribution of its PKG-INFO."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    urls = {"Paper": "https://arxiv.org/abs/2509.24372"}
    if (ROOT / "PKG-INFO").exists():
        info = email.message_from_string((ROOT / "PKG-INFO").read_text(encoding="utf-8"))
        text = info.get_payload().strip() + "\n"
        urls = dict(line.split(", ", 1) for line in info.get_all("Project-URL"))
    url = os.environ.get("ES_KERNELS_URL", "").rstrip("/")
    if url:
        source = (ROOT / "es_kernels/__init__.py").read_text(encoding="utf-8")
        tag = "v" + re.search('^__version__ = "(.+)"', source, re.MULTILINE)[1]

        def absolute(link):  # one to a file: neither to https://... nor to a #heading
            image, text, target = link.groups()
            return f"{image}{text}({url}/{'raw' if image else 'blob'}/{tag}/{target}"

        text = re.sub(r"(!?)(\[[^\[\]]*\])\(([^()\s#:]+)(?=[)#])", absolute, text)
        urls["Repository"] = url
        urls["Documentation"] = f"{url}/tree/{tag}/docs"
        urls["Changelog"] = f"{url}/blob/{tag}/CHANGELOG.md"
        urls["Issues"] = f"{url}/issues"
    return {"long_description": text, "long_description_content_type": "text/markdown", "project_urls": urls}


class Dist(Distribution):
    def has_ext_modules(self):
        return bool(self.ext_modules)

    def parse_config_files(self, *args, **kwargs):
        # `setup.py build_ext` (make build) needs nothing of pyproject.toml, whose license field a setuptools before 77
        # refuses.
        if "build_ext" in self.script_args:
            self.packages = []  # none are looked for
        else:
            super().parse_config_files(*args, **kwargs)


commands = {"build_ext": Build}
if bdist_wheel:

    class Wheel(bdist_wheel):
        def get_tag(self):
            # The libraries know nothing of Python's ABI; without them the wheel is pure.
            where = "any"
            if self.plat_name_supplied:
                where = self.plat_name
            elif self.distribution.has_ext_modules():
                where = f"{sysconfig.get_platform().rpartition('-')[0]}-{cxx_machine()}"
            return ("py3", "none", re.sub("[^a-z0-9]", "_", where))

    commands["bdist_wheel"] = Wheel

setup(distclass=Dist, ext_modules=wanted_extensions(), cmdclass=commands, **described())
