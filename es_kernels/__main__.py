"""`python -m es_kernels [--json]`: what is installed, which backend serves which tensors and why, and a self-check of
about a second.

Exit code 0 if a backend serves CPU tensors (and CUDA tensors, where torch sees a GPU) and every available one gives the
golden vectors' bits; 1 otherwise. Every probe is guarded: what is broken is reported, in the words of what broke.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch

    import es_kernels

GOLDEN = pathlib.Path(__file__).parent / "golden.json"
_T = TypeVar("_T")
_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def _probe(function: Callable[[], _T]) -> _T | str:
    """What `function` returns, or one line about what it raised."""
    try:
        return function()
    except Exception as error:
        return f"unknown: {_words(error)}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ---- what is installed ----


def versions() -> dict[str, Any]:
    """Name -> version, "not installed", or "unknown: ..."."""
    import es_kernels

    result: dict[str, Any] = {
        "es_kernels": es_kernels.__version__,
        "noise": es_kernels.noise.VERSION,
        "python": platform.python_version(),
        "platform": _probe(platform.platform),
    }
    for package in ("numpy", "torch", "triton"):
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result[package] = "not installed"
        except Exception as error:
            result[package] = f"unknown: {_words(error)}"
    result["cuda of torch"] = _probe(lambda: __import__("torch").version.cuda or "none: a CPU or ROCm build")
    return result | _cuda()


def _cuda() -> dict[str, str]:
    """CUDA driver and runtime, as "13.0", and the number of devices, as our own library sees them."""
    from . import native

    def as_text(version: int) -> str:
        return f"{version // 1000}.{version % 1000 // 10}"

    try:
        numbers = [ctypes.c_int(0) for _ in range(3)]
        library = native.load("cuda")
        library.es_cuda_error.restype = ctypes.c_char_p
        failed = library.es_cuda_versions(*map(ctypes.byref, numbers))
        driver, runtime, count = (n.value for n in numbers)
        # Without a driver CUDA says that it is too old
        why = f" ({library.es_cuda_error().decode()})" if failed and driver else ""
        return {
            "cuda driver": as_text(driver) if driver else "none",
            "cuda runtime": as_text(runtime),
            "cuda devices": f"{count}{why}",
        }
    except Exception as error:
        return {"cuda driver": f"unknown: {_words(error)}"}


def devices() -> list[str]:
    """The kinds of device whose tensors are looked at: "cpu", and "cuda" where torch sees one."""
    import torch

    return ["cpu"] + ["cuda"] * bool(_probe(torch.cuda.is_available) is True)


def cpu() -> dict[str, Any]:
    """Instruction sets and threads of the CPU backend."""

    def isas() -> list[str]:
        from .backends import cpu

        return cpu.isas()

    import torch

    return {
        "instruction sets": _probe(isas),
        "ES_KERNELS_ISA": os.environ.get("ES_KERNELS_ISA") or "not set: the first of them",
        "threads": _probe(torch.get_num_threads),
    }


def backends() -> dict[str, dict[str, str | None]]:
    """Backend -> kind of device -> None (available) or why not."""
    import torch

    from . import backends

    def why(name: str, kind: str) -> str | None:
        try:
            return backends.unavailable(name, torch.device(kind))
        except Exception as error:
            return f"it is broken: {_words(error)}"

    return {name: {kind: why(name, kind) for kind in ("cpu", "cuda")} for name in backends.NAMES}


def active(kind: str) -> tuple[str | None, str | None]:
    """(name of the backend that serves this kind of device, None) or (None, why none does)."""
    from . import active_backend

    try:
        return active_backend(kind), None
    except Exception as error:
        return None, _words(error)


# ---- the self-check ----


def self_check(golden: dict[str, Any], device: str) -> None:
    """Compares the backend that now serves `device` with the golden vectors. Raises RuntimeError at the first that
    differs."""
    import numpy as np
    import torch

    import es_kernels

    storage = {"f32": np.uint32, "bf16": np.uint16, "f16": np.uint16}

    def tensor(entry: tuple[str, list[str]]) -> torch.Tensor:
        dtype, values = entry
        array = np.array([int(v, 16) for v in values], storage[dtype])
        return torch.from_numpy(array).view(getattr(torch, _DTYPES[dtype])).to(device)

    def bits(t: torch.Tensor) -> list[int]:
        return t.cpu().view(torch.int32 if t.element_size() == 4 else torch.int16).tolist()

    def table(name: str, t: torch.Tensor, first: str, width: int | None = None) -> es_kernels.ParamTable:
        whole = es_kernels.Segment(name, 1, t.numel(), first=int(first, 16), width=width)
        return es_kernels.ParamTable([es_kernels.NamedTensor(name, t, [whole])])

    for i, v in enumerate(golden["add_noise"] + golden["low_rank"]):
        expected, base = tensor(v["out"]), tensor(v["base"])
        anchor = None if v["anchor"] is None else {v["name"]: tensor(v["anchor"])}
        coefs = [_float(c) for c in v["coefs"]]
        width, noise_rank = v.get("width"), v.get("noise_rank", 0)
        options: dict[str, Any] = {"decay": _float(v["decay"]), "anchor": anchor, "noise_rank": noise_rank}
        if v["rounding_seed"] is not None:
            options |= {"rounding": "stochastic", "rounding_seed": int(v["rounding_seed"], 16)}
        seeds = [int(s, 16) for s in v["seeds"]]
        out = torch.zeros_like(expected)
        es_kernels.add_noise_(table(v["name"], out, v["first"], width), seeds, coefs, {v["name"]: base}, **options)
        _require(bits(out) == bits(expected), f"add_noise vector {i}: the bits differ")
        if base.dtype == out.dtype:
            es_kernels.add_noise_(table(v["name"], base, v["first"], width), seeds, coefs, **options)
            _require(bits(base) == bits(expected), f"add_noise vector {i}, in place: the bits differ")
    for i, v in enumerate(golden["normal"]):
        stream, first = int(v["stream"], 16), int(v["first"], 16)
        values = es_kernels.noise.normal(
            int(v["seed"], 16), stream, np.uint64(first) + np.arange(len(v["bits"]), dtype=np.uint64)
        )
        _require(
            values.view(np.uint32).tolist() == [int(b, 16) for b in v["bits"]],
            f"normal vector {i}: the definition differs",
        )
        if first == 0:  # a bare tensor starts at index 0; 0 + 1 * noise shows the noise itself
            out = torch.zeros(len(v["bits"]), device=device)
            es_kernels.add_noise_(out, int(v["seed"], 16), 1.0, stream=stream)
            _require(bits(out) == values.view(np.int32).tolist(), f"normal vector {i}: the bits differ")
    for i, v in enumerate(golden["factors"]):
        shapes = {v["name"]: (v["rows"], v["cols"])}
        pair = es_kernels.factors(shapes, int(v["seed"], 16), v["noise_rank"], device=device)[v["name"]]
        for side, factor in zip(("left", "right"), pair, strict=True):
            expected = tensor(("f32", v[side]))
            _require(bits(factor.flatten()) == bits(expected), f"factors vector {i}, {side}: the bits differ")
    for i, v in enumerate(golden["fingerprint"]):
        value = es_kernels.fingerprint(table(v["name"], tensor(v["tensor"]), v["first"]))
        _require(value == int(v["fingerprint"], 16), f"fingerprint vector {i} differs")


def _require(equal: bool, words: str) -> None:
    if not equal:
        raise RuntimeError(words)


def _float(hexadecimal: str) -> float:
    import numpy as np

    return float(np.array(int(hexadecimal, 16), np.uint32).view(np.float32))


class Check(NamedTuple):
    """The outcome of one self-check."""

    backend: str
    device: str  # the kind of it
    isa: str | None  # instruction set
    error: str | None
    seconds: float


def self_checks(available: dict[str, dict[str, str | None]]) -> list[Check]:
    """Of all backends that are available, as `backends` says, on every kind of device."""
    import es_kernels

    def check(name: str, kind: str, isa: str | None) -> Check:
        start, error = time.perf_counter(), None
        try:
            if isa:
                os.environ["ES_KERNELS_ISA"] = isa
            with es_kernels.backend(name):
                self_check(json.loads(GOLDEN.read_text()), kind)
        except Exception as raised:
            error = _words(raised)
        finally:
            if isa:
                del os.environ["ES_KERNELS_ISA"]
        return Check(name, kind, isa, error, round(time.perf_counter() - start, 3))

    results = []
    for name, reasons in available.items():
        for kind in devices():
            if reasons[kind] is None:
                # All instruction sets, unless the environment picked one: then the self-check is of that choice.
                sets = cpu()["instruction sets"] if name == "cpu" and not os.environ.get("ES_KERNELS_ISA") else None
                results += [check(name, kind, isa) for isa in (sets if isinstance(sets, list) else [None])]
    return results


def report() -> dict[str, Any]:
    """Everything, as JSON types. `ok` is the verdict."""
    known = backends()
    serves = {kind: active(kind) for kind in devices()}
    checks = self_checks(known)
    state = {
        kind: "available" if kind in serves else "ready, but torch sees no such device" for kind in ("cpu", "cuda")
    }
    return {
        "versions": versions(),
        "cpu": cpu(),
        "backends": {
            name: {kind: why or state[kind] for kind, why in reasons.items()} for name, reasons in known.items()
        },
        "ES_KERNELS_BACKEND": os.environ.get("ES_KERNELS_BACKEND"),
        "serves": {kind: name or f"none: {why}" for kind, (name, why) in serves.items()},
        "self_check": [c._asdict() for c in checks],
        "ok": all(name for name, _ in serves.values()) and all(c.error is None for c in checks),
    }


def _print(r: dict[str, Any]) -> None:
    for title in ("versions", "cpu"):
        for key, value in r[title].items():
            print(f"{key:18} {' '.join(value) if isinstance(value, list) else value}")
    for name, reasons in r["backends"].items():
        for kind, why in reasons.items():
            if kind == "cpu" or name != "cpu":
                print(f"backend {name:10} {kind:5} {why}")
    if r["ES_KERNELS_BACKEND"]:
        print(f"ES_KERNELS_BACKEND {r['ES_KERNELS_BACKEND']}")
    for kind, name in r["serves"].items():
        slow = " (SLOW: 100 ns a value and seed)" if name == "reference" else ""
        print(f"serves {kind + ' tensors':18}  {name}{slow}")
    for c in r["self_check"]:
        print(
            f"self-check {' '.join(filter(None, (c['backend'], c['device'], c['isa']))):22} "
            f"{c['error'] or 'equal to golden.json'} ({c['seconds']:.2f} s)"
        )
    print("OK" if r["ok"] else "FAILED")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m es_kernels", description="What is installed, which backend serves and why, and a self-check."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    r = report()
    print(json.dumps(r, indent=1)) if options.json else _print(r)
    return 0 if r["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
