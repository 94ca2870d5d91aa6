"""Contract: libes_cuda.so, built wherever nvcc is, loads on a machine without a GPU or a driver, refuses bad arguments
with a code and a message, reports CUDA's own words, and is passed over by one clear line. What it computes is checked
in tests/gpu."""

import ctypes
import types

import pytest
import torch

import es_kernels
from es_kernels import native
from es_kernels.backends import cuda

if native.why_not("cuda"):
    pytest.skip(native.why_not("cuda"), allow_module_level=True)

SEED, COEF = (ctypes.c_uint64 * 1)(1), (ctypes.c_float * 1)(1.0)
SOMEWHERE = ctypes.create_string_buffer(256)  # an address that is never read before the refusal
GOOD = dict(
    segments=SOMEWHERE,
    n_segments=1,
    n_units=1,
    seeds=SEED,
    seeds_on_device=0,
    coefs=COEF,
    coefs_on_device=0,
    n_seeds=1,
    decay=0.0,
    rounding_seed=None,
    rounding_seed_on_device=0,
    noise_rank=0,
)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


def call(**changes):
    library = cuda._library()
    status = library.es_cuda_add_noise(*{**GOOD, **changes}.values(), 0, None)
    return status, library.es_cuda_error().decode()


def test_abi_is_the_one_that_python_expects():
    assert native.load("cuda").es_cuda_abi() == native.ABI


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_seeds=-1), "a count is negative"),
        (dict(n_units=-1), "a count is negative"),
        (dict(n_segments=-1), "a count is negative"),
        (dict(segments=None), "segments are missing"),
        (dict(n_segments=0), "segments are missing"),
        (dict(seeds=None), "seeds or coefs are missing"),
        (dict(coefs=None), "seeds or coefs are missing"),
        (dict(n_seeds=129), "more than 128 seeds must be in device memory"),
        (dict(noise_rank=-1), "noise_rank is 0 to 64"),
        (dict(noise_rank=65), "noise_rank is 0 to 64"),
    ],
)
def test_bad_arguments_are_refused(changes, words):
    status, error = call(**changes)
    assert status != 0 and words in error


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_factors=-1), "a count is negative"),
        (dict(n_units=-1), "a count is negative"),
        (dict(n_seeds=-1), "a count is negative"),
        (dict(factors=None), "factors, seeds or out are missing"),
        (dict(n_factors=0), "factors, seeds or out are missing"),
        (dict(seeds=None), "factors, seeds or out are missing"),
        (dict(out=None), "factors, seeds or out are missing"),
        (dict(n_seeds=129), "more than 128 seeds must be in device memory"),
        (dict(dtype=3), "dtype is none of"),
        (dict(n_units=2**62, n_seeds=2), "units times seeds are more than 64 bits hold"),
    ],
)
def test_bad_arguments_of_factors_are_refused(changes, words):
    library = cuda._library()
    good = dict(factors=SOMEWHERE, n_factors=1, n_units=1, seeds=SEED, on_device=0, n_seeds=1, out=SOMEWHERE, dtype=0)
    assert library.es_cuda_factors(*{**good, **changes}.values(), 0, None) != 0
    assert words in library.es_cuda_error().decode()


def test_nothing_to_do_needs_no_gpu():
    assert call(n_units=0)[0] == 0


def test_fingerprint_needs_a_result():
    library = cuda._library()
    assert library.es_cuda_fingerprint(SOMEWHERE, 1, 1, None, 0, None) != 0
    assert "the result has no address" in library.es_cuda_error().decode()


@without_gpu
def test_an_error_comes_back_with_cudas_words():
    status, error = call()
    assert status in (35, 100)  # cudaErrorInsufficientDriver, cudaErrorNoDevice
    assert "cudaError" in error
    with pytest.raises(RuntimeError, match="cudaError"):
        native.check(status, cuda._library().es_cuda_error)


@without_gpu
def test_unavailable_in_one_line():
    why = cuda.unavailable(torch.device("cuda"))
    assert why and "\n" not in why


@pytest.mark.parametrize(
    "versions, words",
    [
        ((0, 0, 0), "no NVIDIA driver"),
        ((12080, 13000, 1), "the driver supports CUDA 12, libes_cuda.so needs 13"),
        ((13010, 13000, 0), "no device"),
        ((13010, 13000, 2), None),
    ],
)
def test_driver_problems(monkeypatch, versions, words):
    monkeypatch.setattr(cuda, "versions", lambda: versions)
    why = cuda._driver_problem.__wrapped__()
    assert why is None if words is None else words in why


@pytest.mark.parametrize(
    "capability, served",
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 3), True), ((13, 0), True)],
)
def test_a_gpu_older_than_the_library_is_not_served(monkeypatch, capability, served):
    """Older than any code in it: newer ones run its PTX."""
    monkeypatch.setattr(native, "_load", lambda name: (types.SimpleNamespace(es_cuda_capability=lambda: 80), None))
    monkeypatch.setattr(cuda, "_library", lambda: native.load("cuda"))
    monkeypatch.setattr(cuda, "_driver_problem", lambda: None)
    monkeypatch.setattr(cuda, "_capability_problem", cuda._capability_problem.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    why = cuda.unavailable(torch.device("cuda", 0))
    if served:
        assert why is None
    else:
        for words in (
            "Tesla T4 has compute capability 7.5",
            "built for 8.0 and newer",
            "ES_KERNELS_CUDA_ARCHS=75",
            "triton",
        ):
            assert words in why


def test_an_old_driver_leaves_the_next_backend(monkeypatch):
    from es_kernels.backends import choose, triton

    monkeypatch.setattr(cuda, "unavailable", lambda device: "the driver is old")
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    assert choose(torch.device("cuda")) is triton
    monkeypatch.setattr(triton, "unavailable", lambda device: "no triton")
    with pytest.raises(RuntimeError, match="cuda: the driver is old; triton: no triton"):
        choose(torch.device("cuda"))
    with (
        es_kernels.backend("cuda"),
        pytest.raises(RuntimeError, match="cuda backend was asked for, but the driver is old"),
    ):
        choose(torch.device("cuda"))
