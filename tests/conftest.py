"""The marks of folders; what all workers share; Triton's interpreter, made exact; what "quickly" means on a machine."""

import contextlib
import fcntl
import gc
import os
import pathlib
import time

import numpy as np
import pytest
import torch

# Kernels are compiled or interpreted according to what this says when triton is imported. Without a GPU: interpreted.
_before = os.environ.get("TRITON_INTERPRET")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from es_kernels import noise  # noqa: E402
from es_kernels.backends import reference, triton  # noqa: E402, F401

# Inductor finds out which vector instructions there are by compiling programs, for 5 s; no test looks at its speed.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

# The same examples in every run, and no database beside the sources. The environment of vLLM has no hypothesis.
with contextlib.suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile("same", derandomize=True, database=None)
    hypothesis.settings.load_profile("same")

# Programs that tests start decide for themselves.
if _before is None:
    os.environ.pop("TRITON_INTERPRET", None)

# What `pytest` leaves out unless -m asks for it: all of a folder.
MARKED = {pathlib.Path(__file__).parent / name: name for name in ("gpu", "distributed", "vllm", "llm")}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        # An address differs between the workers of pytest-xdist, which must find the same tests.
        assert " at 0x" not in item.nodeid, f"{item.nodeid}: give its parameters ids"
        for folder in MARKED.keys() & item.path.parents:
            item.add_marker(MARKED[folder])


@pytest.fixture(scope="module")
def little_garbage():
    """For code that collects garbage, as transformers' continuous batching does twice a call, and a benchmark before
    each group: over all that torch and transformers have loaded that takes 0.3 s. What is frozen is not looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make) -> a folder that make(folder) has filled: by one of pytest-xdist's workers, for all."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def once(name, make):
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def within():
    """`with within(5): ...`: takes no more of this process's CPU time than five rounds of a loop of a million additions
    (15 ms each on a fast core). What a machine does besides, or how fast it is, changes nothing: what is to be caught
    takes a hundred times as long."""

    def a_round():
        start = time.process_time()
        sum(range(1_000_000))
        return time.process_time() - start

    first = a_round()

    @contextlib.contextmanager
    def rounds(n):
        start = time.process_time()
        yield
        spent = time.process_time() - start
        # A core that is slower by now takes longer for the loop, too
        assert spent <= n * first or spent <= n * a_round(), f"{spent:.2f} s of CPU time"

    return rounds


@pytest.fixture
def exact_interpreter(monkeypatch):
    """Replaces what Triton's interpreter computes otherwise than a GPU: fma (rounded twice up to triton 3.7) and the
    casts from float32 to bfloat16 (3.6 to 3.9 truncate) and float16 (a signalling NaN stays one)."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if interpreter.triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("triton 3.6 turns arrays of one element into ints, which NumPy 2.4 refuses")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # it imports more of triton when it runs
    builder, cast = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.cast_impl
    formats = {interpreter.tl.bfloat16: 1, interpreter.tl.float16: 2}

    def create_fma(self, x, y, z):
        assert x.data.dtype == y.data.dtype == z.data.dtype == np.float32
        return interpreter.TensorHandle(noise.fma(x.data, y.data, z.data), z.dtype.scalar)

    def cast_impl(self, source, target):
        if source.dtype.scalar == interpreter.tl.float32 and target.scalar in formats:
            bits = reference.store(source.data, formats[target.scalar])
            return interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(target)), target.scalar)
        return cast(self, source, target)

    # Its interpreter patches triton.language before each call of a device function: a quarter of the time. Once a
    # launch is enough, for nothing takes the patches back before its end.
    launch, patch_lang, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, {}

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_lang_once(function):
        module = id(function.__globals__)
        if module not in patched:
            patched[module] = patch_lang(function)
        return patched[module]

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang_once)
    monkeypatch.setattr(builder, "create_fma", create_fma)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)
