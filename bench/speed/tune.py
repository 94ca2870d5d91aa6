"""Every variant of the kernels (variants.py) against what ships, one change at a time.

    python -m bench.speed.tune                           on any machine -> bench/results/variants.json
    python -m bench.speed.tune --device cuda --out DIR   on a GPU -> DIR/variants-GPU.json, in about 4 minutes
    python -m bench.speed.tune --only "no noise" "evict-first stores + whole sectors a store"

Without a GPU it counts instructions, registers and spills on sm_90; with one it takes the time too.
Each is built for the GPU's architecture, must give the bits of what ships (but for the floors, which make no noise),
and is timed in turn with it and with a copy, on tensors that fill the GPU: so a ratio is of the same minutes of the
same machine. What wins is written into csrc/ by hand, and what lost into docs/develop/facts.md.
"""

import argparse
import ast
import contextlib
import ctypes
import json
import os
import pathlib
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch

import es_kernels
from bench import RESULTS
from bench.common import environment
from bench.common.operations import DTYPES, Operation, right
from bench.common.timing import Variant, interleave
from bench.instructions import static_analysis
from bench.speed import variants
from es_finetune.runs.files import write_atomically
from es_kernels import ParamTable
from es_kernels.backends import cuda, triton

ELEMENTS = 1 << 28
# Each with what a variant must touch to be timed on it.
OPERATIONS = {
    Operation("perturb", "bf16", "f32"): variants.PERTURB,  # the default
    Operation("perturb", "bf16"): variants.PERTURB,
    Operation("perturb", "f32"): variants.PERTURB,
    Operation("update", "f32", None, 30): variants.UPDATE,  # the default
    Operation("update", "bf16", None, 30, True): variants.UPDATE,
    Operation("swap", "bf16", None, 2): variants.FEW,
    Operation("restore", "bf16", "f32", 0): variants.FEW,
    Operation("fingerprint", "bf16"): variants.FINGERPRINT,
    Operation("fingerprint", "f32"): variants.FINGERPRINT,
}
SHIPPED = "as shipped"


def nvcc_flags():
    """Those of setup.py, which cannot be imported."""
    tree = ast.parse((variants.ROOT / "setup.py").read_text())
    return next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "NVCC_FLAGS"
    )


def build_all(names, arch, folder):
    """{name: library}, SHIPPED among them; in parallel."""

    def build(name):
        return variants.build("" if name == SHIPPED else name, folder / str(names.index(name)), arch, nvcc_flags())

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(names, pool.map(build, names), strict=True))


def counts(name, library, arch):
    """Rows of static_analysis.py of the operations that are timed."""
    wanted = {operation.kernel for operation, group in OPERATIONS.items() if name == SHIPPED or group in _touches(name)}
    keep = ("kernel", "instructions_per_value", "registers", "spill_bytes")
    rows = [row for row in static_analysis.cuda_kernels(f"sm_{arch}", library) if row["kernel"] in wanted]
    return [{"variant": name} | {key: row[key] for key in keep} for row in rows]


@contextlib.contextmanager
def using(library=None, constants=()):
    """Calls of the cuda backend go to another build; those of the triton backend take other constants ("maxnreg" is an
    option of its launches)."""
    constants = dict(constants)
    options = {key: constants.pop(key) for key in list(constants) if key not in _KEYS}
    with contextlib.ExitStack() as stack:
        if library is not None:
            stack.enter_context(mock.patch.object(cuda, "_library", lambda: library))
        stack.enter_context(mock.patch.multiple(triton, **constants) if constants else contextlib.nullcontext())
        stack.enter_context(
            mock.patch.object(triton, "_OPTIONS", triton._OPTIONS | {"num_warps": triton._WARPS} | options)
        )
        yield


# Of Triton's constants; what else a variant names is an option of its launches
_KEYS = ("_UNITS", "_WARPS", "_PROGRAMS")


class Tensors:
    """What is timed: live weights and a base of each kind, drawn once."""

    def __init__(self, elements, device):
        self.device = device
        self.start = {
            name: torch.empty(elements, dtype=dtype, device=device).normal_(0, 0.02)
            for name, dtype in DTYPES.items()
            if name != "f16"
        }
        self.out = {name: t.clone() for name, t in self.start.items()}
        self.base = self.start["f32"].flip(0)

    def call(self, operation):
        """The operation, ready to run under the backend in force."""
        return operation.on(
            ParamTable({"w": self.out[operation.out]}),
            ParamTable({"w": self.base}) if operation.base else None,
            self.device,
        )

    def bits(self, operation, call):
        """A fingerprint, by what ships, of what one call makes of the weights as they were drawn."""
        self.out[operation.out].copy_(self.start[operation.out])
        made = call()
        return int(made) if operation.what == "fingerprint" else es_kernels.fingerprint({"w": self.out[operation.out]})


def measure(backend, settings, same_bits, touches, tensors, rounds=9):
    """Yields the rows of one backend, operation by operation. settings: {name: arguments of using()}, SHIPPED first."""
    for operation, group in OPERATIONS.items():
        timed, expected = {}, None
        for name, setting in settings.items():
            if name != SHIPPED and group not in touches(name):
                continue
            try:
                with using(**setting), es_kernels.backend(backend):
                    small = not same_bits(name) or right(operation, tensors.device, backend)
                    call = tensors.call(operation)
                    bits = tensors.bits(operation, call)
            except RuntimeError as error:  # a launch that asks for too much
                yield {
                    "backend": backend,
                    "variant": name,
                    "operation": operation.label,
                    "error": str(error).splitlines()[0],
                }
                continue
            expected = bits if name == SHIPPED else expected
            if same_bits(name) and not (small and bits == expected):
                yield {"backend": backend, "variant": name, "operation": operation.label, "error": "wrong bits"}
                continue
            timed[name] = Variant(lambda k, call=call, setting=setting: _run(backend, setting, call))
        if SHIPPED not in timed:  # nothing to compare with
            continue
        out, start = tensors.out[operation.out], tensors.start[operation.out]
        timings = interleave(
            {"copy": Variant(lambda k, out=out, start=start: out.copy_(start)), **timed},
            tensors.device,
            rounds,
        )
        copy = 2 * out.numel() * out.element_size() / timings["copy"].median
        shipped = timings[SHIPPED].median
        for name in timed:
            t, moved = timings[name], operation.bytes_per_value * out.numel()
            row = {
                "backend": backend,
                "variant": name,
                "operation": operation.label,
                "seconds": t.median,
                "p20": t.p20,
                "p80": t.p80,
                "sm_mhz": t.sm_mhz,
            }
            row |= {"times_shipped": t.median / shipped, "share_of_copy": moved / t.median / copy}
            row |= {"normals_per_s": out.numel() * operation.seeds / t.median} if operation.what == "update" else {}
            yield row


def _run(backend, setting, call):
    with using(**setting), es_kernels.backend(backend):
        call()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["none", "cuda"], default="cuda" if torch.cuda.is_available() else "none")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result file")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help='variants, of CUDA or of Triton; "A + B" applies both'
    )
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = args.only or [*variants.CUDA, *variants.TOGETHER, *variants.TRITON]
    of_triton = [name for name in wanted if name.split(" + ")[0] in variants.TRITON]
    of_cuda = [name for name in wanted if name not in of_triton]
    for names, table in ((of_cuda, variants.CUDA), (of_triton, variants.TRITON)):
        for name in names:
            variants.parts(name, table)  # says which are unknown, before anything is built
    facts = environment.describe("cuda" if args.device == "cuda" else "cpu")
    arch = facts["capability"].removeprefix("sm_") if args.device == "cuda" else "90"
    report = {
        "machine": facts,
        "arch": f"sm_{arch}",
        "expected": {name: v.expected for t in (variants.CUDA, variants.TRITON) for name, v in t.items()},
    }
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        libraries = build_all([SHIPPED, *of_cuda], arch, pathlib.Path(folder))
        print(f"{len(libraries)} builds in {time.monotonic() - start:.0f} s", flush=True)
        report["counts"] = [row for name, library in libraries.items() for row in counts(name, library, arch)]
        path = args.out / ("variants.json" if args.device == "none" else f"variants-{environment.slug(facts)}.json")
        if args.device == "none":
            _print(report["counts"])
        else:
            report["rows"] = []
            tensors = Tensors(args.elements, "cuda")
            loaded = {
                name: {"library": cuda.declared(ctypes.CDLL(str(library)))} for name, library in libraries.items()
            }
            constants = {SHIPPED: {}} | {name: {"constants": _joined(name)} for name in of_triton}
            for backend, settings, same_bits, touches in (
                (
                    "cuda",
                    loaded,
                    lambda name: name == SHIPPED or all(v.same_bits for v in variants.parts(name, variants.CUDA)),
                    _touches,
                ),
                # Triton compiles each variant for every operation, seconds each: only those with something to gain.
                ("triton", constants, lambda name: True, lambda name: (variants.PERTURB, variants.UPDATE)),
            ):
                why = es_kernels.backends.unavailable(backend, torch.device("cuda"))
                if why:
                    print(f"{backend}: not measured, {why}", file=sys.stderr)
                    continue
                for row in measure(backend, settings, same_bits, touches, tensors):
                    print(_line(row), flush=True)
                    report["rows"].append(row)
                    # What was measured stays if the rest is cut off
                    write_atomically(path, json.dumps(report, indent=1) + "\n")
    write_atomically(path, json.dumps(report, indent=1) + "\n")


def _line(row):
    about = (
        row.get("error")
        or f"{row['seconds'] * 1e3:8.3f} ms  {row['times_shipped']:6.3f} x  {row['share_of_copy']:.1%} of a copy"
    )
    return f"{row['backend']:7} {row['operation']:32} {row['variant']:48} {about}"


def _touches(name):
    return {group for variant in variants.parts(name, variants.CUDA) for group in variant.touches}


def _joined(name):
    return {key: value for variant in variants.parts(name, variants.TRITON) for key, value in variant.constants.items()}


def _print(rows):
    for row in rows:
        resources = f"{row['registers']:3} registers  {row['spill_bytes']:4} B spilled"
        print(f"{row['variant']:48} {row['kernel']:24} {row['instructions_per_value']:6.2f} a value  {resources}")


if __name__ == "__main__":
    main()
