"""Writes the golden vectors and the numbers of the specification page, from the reference backend.

    python -m bench.noise.make_golden            write es_kernels/golden.json and the generated blocks of NOISE.md there
    python -m bench.noise.make_golden --check    write nothing; exit code 1 if one of the two would change

Integers of more than 32 bits do not survive every JSON reader, so all integers stand as hexadecimal strings.
"""

import argparse
import json
import pathlib
import re
import sys

import numpy as np
import torch

import es_kernels
from bench.common.operations import DTYPES
from bench.noise import fit_noise
from es_kernels import noise

PACKAGE = pathlib.Path(es_kernels.__file__).parent
_STORAGE = {"f32": np.uint32, "bf16": np.uint16, "f16": np.uint16}

# Random123's kat_vectors.
_RANDOM123 = (
    ((0, 0, 0, 0), (0, 0)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
)
# NaN with a payload, infinities, zeros, smallest and largest subnormals, largest normals, and ordinary weights.
HARD = {
    "f32": (
        0x7FC12345,
        0xFF800001,
        0x7F800000,
        0xFF800000,
        0x80000000,
        0x00000001,
        0x807FFFFF,
        0x7F7FFFFF,
        0x3F800000,
        0xBDCCCCCD,
        0x33000001,
    ),
    "bf16": (0x7FC1, 0xFF81, 0x7F80, 0xFF80, 0x8000, 0x0001, 0x807F, 0x7F7F, 0x3F80, 0xBDCD, 0x3301),
    "f16": (0x7E01, 0xFC01, 0x7C00, 0xFC00, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0x3C00, 0xAE66, 0x0042),
}


def tensor_of(bits, dtype):
    """Integers -> the tensor of dtype "f32" | "bf16" | "f16" with these bits."""
    return torch.from_numpy(np.array(bits, _STORAGE[dtype])).view(DTYPES[dtype])


def bits_of(tensor):
    integers = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return (tensor.view(integers).to(torch.int64) & ((1 << 8 * tensor.element_size()) - 1)).tolist()


def _hex(values, digits=0):
    return [f"0x{int(v):0{digits}x}" for v in values]


def _philox():
    calls = [(counter, key, rounds) for rounds in (7, 10) for counter, key in _RANDOM123]
    return [
        {
            "counter": _hex(counter),
            "key": _hex(key),
            "rounds": rounds,
            "words": _hex(noise.philox4x32(counter, key, rounds), 8),
        }
        for counter, key, rounds in calls
    ]


def _normals():
    cases = [
        (0, 0, 0, 16),
        (1, noise.stream_id("lm_head.weight"), 0, 16),
        (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, (1 << 64) - 8, 8),
        (0x0123456789ABCDEF, noise.stream_id("model.embed_tokens.weight"), 12345, 8),
        (42, noise.stream_id("w"), (1 << 32) - 4, 8),
        (42, noise.stream_id("w"), (1 << 35) - 4, 8),
    ]
    for seed, stream, first, count in cases:
        index = np.uint64(first) + np.arange(count, dtype=np.uint64)
        values = noise.normal(seed, stream, index)
        yield {"seed": hex(seed), "stream": hex(stream), "first": hex(first), "bits": _hex(values.view(np.uint32), 8)}


def _coefs(values):
    return _hex(np.array(values, np.float32).view(np.uint32), 8)


def _add_noise():
    seeds = [0x0123456789ABCDEF, 7, 0xFEDCBA9876543210]
    perturb, restore, swap, update = ([5], [1e-3]), ([], []), (seeds[:2], [-0.25, 0.25]), (seeds, [1e-3, -2.5e-4, 0.5])
    cases = []  # out dtype, base dtype, anchor dtype, (seeds, coefs), decay, rounding seed, first
    for out in DTYPES:
        for rounding_seed in (None, 0x8877665544332211):
            cases += [
                (out, out, None, perturb, 0.0, rounding_seed, 3),
                (out, "f32", None, update, 0.0, rounding_seed, (1 << 35) - 5),
                (out, "f32", "bf16", update, 0.0625, rounding_seed, 1 << 32),
                (out, "f32", None, swap, 0.0625, rounding_seed, (1 << 64) - 16),
                (out, "f32", None, restore, 0.0, rounding_seed, 0),
            ]
    for case in cases:
        yield _result(*case)


def _low_rank():
    """Runs of a matrix of `width` columns, which begin and end within its rows."""
    seeds = [0x0123456789ABCDEF, 7, 0xFEDCBA9876543210]
    perturb, update = ([5], [1e-3]), (seeds, [1e-3, -2.5e-4, 0.5])
    for rank, width, first in ((1, 7, 3), (2, 4, (1 << 32) - 6), (3, 1, 9), (8, 1 << 33, (1 << 35) - 5), (64, 5, 4)):
        case = {"noise_rank": rank, "width": width}
        yield case | _result("f32", "f32", None, perturb, 0.0, None, first, **case)
        yield case | _result("bf16", "f32", "bf16", update, 0.0625, 0x8877665544332211, first, **case)
        yield case | _result("f16", "f32", None, update, 0.0, None, first, **case)


def _result(out, base, anchor, seeds_and_coefs, decay, rounding_seed, first, noise_rank=0, width=None):
    seeds, coefs = seeds_and_coefs
    n = len(HARD[base])
    live, master = tensor_of([0] * n, out), tensor_of(HARD[base], base)
    anchored = None if anchor is None else tensor_of(HARD[anchor][::-1], anchor)
    table = es_kernels.ParamTable([("w", live, [es_kernels.Segment("w", 1, n, first=first, width=width)])])
    # Under a mapping whose values are tensors: the segments are the table's.
    es_kernels.add_noise_(
        table, seeds, coefs, {"w": master}, decay=decay, anchor=None if anchored is None else {"w": anchored},
        rounding="nearest" if rounding_seed is None else "stochastic", rounding_seed=rounding_seed,
        noise_rank=noise_rank,
    )  # fmt: skip
    return {
        "name": "w",
        "first": hex(first),
        "seeds": _hex(seeds),
        "coefs": _coefs(coefs),
        "decay": _coefs([decay])[0],
        "rounding_seed": None if rounding_seed is None else hex(rounding_seed),
        "base": [base, _hex(HARD[base])],
        "anchor": None if anchor is None else [anchor, _hex(HARD[anchor][::-1])],
        "out": [out, _hex(bits_of(live))],
    }


def _factors():
    for name, rows, cols, rank in (("w", 5, 3, 1), ("lm_head.weight", 2, 9, 3)):
        left, right = es_kernels.factors({name: (rows, cols)}, 0x0123456789ABCDEF, rank)[name]
        yield {
            "name": name,
            "rows": rows,
            "cols": cols,
            "noise_rank": rank,
            "seed": "0x123456789abcdef",
            "left": _hex(left.view(torch.int32).flatten().numpy().view(np.uint32), 8),
            "right": _hex(right.contiguous().view(torch.int32).flatten().numpy().view(np.uint32), 8),
        }


def _fingerprints():
    for dtype in DTYPES:
        for first in (0, 5, (1 << 35) - 5):
            t = tensor_of(HARD[dtype], dtype)
            table = es_kernels.ParamTable([("w", t, [es_kernels.Segment("w", 1, t.numel(), first=first)])])
            value = f"0x{es_kernels.fingerprint(table):016x}"
            yield {"name": "w", "first": hex(first), "tensor": [dtype, _hex(HARD[dtype])], "fingerprint": value}


def golden():
    """All golden vectors, as JSON types."""
    members = [
        (0, 0, 0, 0),
        (0, 0, 1, 0),
        (0, 1, 0, 0),
        (42, 3, 29, 1),
        (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 3),
    ]
    names = ("", "w", "lm_head.weight", "model.embed_tokens.weight", "größe.weight")
    with es_kernels.backend("reference"):
        return {
            "noise_version": noise.VERSION,
            "philox4x32": _philox(),
            "stream_id": {name: f"0x{noise.stream_id(name):016x}" for name in names},
            "member_seed": [
                {
                    "run_seed": hex(r),
                    "generation": g,
                    "member": m,
                    "purpose": p,
                    "seed": f"0x{noise.member_seed(r, g, m, p):016x}",
                }
                for r, g, m, p in members
            ],
            "normal": list(_normals()),
            "add_noise": list(_add_noise()),
            "low_rank": list(_low_rank()),
            "factors": list(_factors()),
            "fingerprint": list(_fingerprints()),
        }


def as_text(vectors):
    """One vector a line."""
    lines = []
    for key, value in vectors.items():
        if isinstance(value, list):
            value = "[\n" + ",\n".join("  " + json.dumps(v) for v in value) + "\n ]"
        else:
            value = json.dumps(value, ensure_ascii=False)
        lines.append(f' "{key}": {value}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


# ---- the generated blocks of NOISE.md ----


def _constants():
    lines = ["```python"]
    for name in ("LOG", "LOG_SLOPE", "RSQRT_SEED", "RSQRT", "COS", "SIN"):
        value = getattr(noise, name)
        if name == "RSQRT_SEED":
            lines.append(f"{name} = 0x{value:08X}")
            continue
        floats = np.atleast_1d(np.array(value, np.float32))
        bits = [f"0x{b:08X}" for b in floats.view(np.uint32)]
        shown = bits[0] if np.ndim(value) == 0 else f"({', '.join(bits)})"
        lines.append(f"{name} = {shown}  # {', '.join(repr(float(str(f))) for f in floats)}")
    return "\n".join([*lines, "```"])


def _quality():
    figures = fit_noise.quality()
    return "\n".join(
        [
            "| over all 2^32 words, the worse of x and y | |",
            "| --- | --- |",
            *(f"| {name} | {value:.3g} |" for name, value in figures.items()),
        ]
    )


def _vectors(vectors):
    lines = ["```"]
    lines += [
        f"philox4x32 {v['rounds']:2} {' '.join(v['counter'])} | {' '.join(v['key'])} -> {' '.join(v['words'])}"
        for v in vectors["philox4x32"][3:]
    ]
    lines += [
        f"stream_id {json.dumps(name, ensure_ascii=False)} -> {value}" for name, value in vectors["stream_id"].items()
    ]
    lines += [
        f"member_seed {v['run_seed']}, generation {v['generation']}, member {v['member']}, purpose {v['purpose']} -> "
        f"{v['seed']}"
        for v in vectors["member_seed"]
    ]
    for v in vectors["normal"]:
        values = np.array([int(b, 16) for b in v["bits"][:4]], np.uint32).view(np.float32)
        lines.append(
            f"normal seed {v['seed']}, stream {v['stream']}, index {v['first']} and on -> {' '.join(v['bits'][:4])} "
            f"({' '.join(map(str, values))})"
        )
    for v in vectors["add_noise"]:
        if v["base"][0] == "f32" and len(v["seeds"]) == 3 and not v["anchor"]:
            lines.append(
                f'add_noise "w" {v["first"]} seeds {" ".join(v["seeds"])} coefs {" ".join(v["coefs"])} '
                f"rounding_seed {v['rounding_seed']} base f32 {v['base'][1][8]} at {hex(int(v['first'], 16) + 8)} -> "
                f"{v['out'][0]} {v['out'][1][8]}"
            )
    for v in vectors["low_rank"]:
        if v["out"][0] == "f32":
            lines.append(
                f'add_noise "w" {v["first"]} noise_rank {v["noise_rank"]} width {v["width"]} seeds {v["seeds"][0]} '
                f"coefs {v['coefs'][0]} rounding_seed None base f32 {v['base'][1][8]} at "
                f"{hex(int(v['first'], 16) + 8)} -> f32 {v['out'][1][8]}"
            )
    for v in vectors["factors"]:
        what = (
            f"factors {json.dumps(v['name'])} {v['rows']} x {v['cols']} noise_rank {v['noise_rank']} seed {v['seed']}"
        )
        lines += [f"{what} {side} -> {' '.join(v[side][:6])}" for side in ("left", "right")]
    for v in vectors["fingerprint"]:
        if v["first"] == "0x5":
            lines.append(
                f'fingerprint "w" {v["first"]} {v["tensor"][0]} {" ".join(v["tensor"][1])} -> {v["fingerprint"]}'
            )
    return "\n".join([*lines, "```"])


def page(text, vectors):
    """NOISE.md with its generated blocks, each between `<!-- NAME -->` and `<!-- end -->`."""
    for name, block in (("constants", _constants()), ("quality", _quality()), ("vectors", _vectors(vectors))):
        text, count = re.subn(
            f"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m, block=block: m[1] + block + m[2], text, flags=re.S
        )
        assert count == 1, f"NOISE.md has {count} blocks named {name}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args().check
    vectors = golden()
    old_page = (PACKAGE / "NOISE.md").read_text()
    stale = False
    for file, text in (("golden.json", as_text(vectors)), ("NOISE.md", page(old_page, vectors))):
        path = PACKAGE / file
        if not path.exists() or path.read_text() != text:
            stale = True
            print(f"{file} {'is stale' if check else 'written'}")
            if not check:
                path.write_text(text)
    sys.exit(check and stale)


if __name__ == "__main__":
    main()
