"""Writes the README's tables from bench/results/*.json.

    python bench/readme.py            rewrite README.md
    python bench/readme.py --check    exit with 1 if it differs (a test does the same)
"""

import argparse
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]


def results(name):
    return json.loads((ROOT / f"bench/results/{name}.json").read_text())


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cpu():
    report = results("cpu")
    cells = {(r["isa"], r["threads"], r["what"]): r for r in report["rows"]}
    columns = sorted({(isa, threads) for isa, threads, _ in cells}, key=lambda c: (["avx512", "avx2", "baseline"].index(c[0]), c[1]))
    what = list(dict.fromkeys(r["what"] for r in report["rows"]))
    header = ["ns a value (times torch)", *(f"{isa}, {threads} thread{'s' * (threads > 1)}" for isa, threads in columns)]
    rows = []
    for w in what:
        found = [cells[(*column, w)] for column in columns]
        rows.append([w, *(f"{r['ns_per_value']:.2f}" + (f" ({r['ratio_to_torch']:.1f} x)" if "perturb" in w or "update" in w else "") for r in found)])
    return f"{report['processor']}, torch {report['torch']}, {report['elements']:,} elements.\n\n" + table(header, rows)


def sass():
    rows = [r for r in results("static_analysis")["rows"] if r["arch"] == "sm_90" and "stochastic" not in r["kernel"] and "f16 <-" not in r["kernel"].replace("bf16 <-", "")]
    rows = [r for r in rows if not r["kernel"].endswith("<- f16")]
    pipes = ["FMA", "ALU", "IMAD.WIDE", "memory", "other"]
    body = [
        [r["kernel"], f"{r['instructions_per_value']:.2f}", *(f"{r['per_value'].get(p, 0):.2f}" for p in pipes), str(r["registers"]), str(r["spill_bytes"])] for r in rows
    ]
    return table(["kernel (out <- base)", "instructions a value", *pipes, "registers", "bytes spilled"], body)


def noise():
    return table(["", "over all 2^32 words, the worse of x and y"], [[k, f"{v:.4g}"] for k, v in results("noise").items()])


def noise_stats():
    report = results("noise_stats")
    normals, words = report["normals"], report["words"]
    if isinstance(words, str):
        battery = words
    else:
        orders = list(dict.fromkeys(row["order"] for row in words))
        p = [row["p"] for row in words]
        battery = f"{len(p)} p-values ({', '.join(orders)}), {min(p):.3f} to {max(p):.5f}; Bonferroni p of the most extreme {min(1, report['bonferroni']['words']):.3f}"
    rows = [
        ["normals", f"{report['values']:.3g} from the CPU kernel: {len(normals)} statistics, the largest {max(abs(row['z']) for row in normals if row['z'] is not None):.2f} standard errors away"],
        ["the law's own distance to N(0, 1)", f"{report['law']['distance_to_normal']:.3g}"],
        ["correlation of x² and y² in a pair", f"{report['law']['pair_correlation_of_squares']:.4f} by enumeration (0 in exact Box-Muller)"],
        ["raw words, dieharder", battery],
    ]
    return table(["against the exact law of the transform", ""], rows)


def learning():
    report = results("learning")
    body = []
    for r in report["rows"]:
        difference = f"{100 * r['difference']:+.1f} ± {100 * r['difference_error']:.1f} to {r['reference']}"
        body.append([r["option"], f"{r['final']:.1%} ± {r['error']:.1%}", "" if r["reference"] == r["option"] else difference])
    header = [f"{report['seeds']} seeds, mean ± standard error", "held-out exact", "points, paired by seed"]
    return table(header, body)


def filled(text):
    for name, make in (("cpu", cpu), ("learning", learning), ("noise", noise), ("noise-stats", noise_stats), ("sass", sass)):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: m[1] + make() + "\n" + m[2], text, flags=re.S)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    if args.check:
        sys.exit(0 if filled(text) == text else "README.md differs from bench/results: run python bench/readme.py")
    readme.write_text(filled(text))


if __name__ == "__main__":
    main()
