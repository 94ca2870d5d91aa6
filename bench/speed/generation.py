"""One whole generation of ES on models of real shapes: where the time goes, ours beside what people do today.

    python -m bench.speed.generation [--device cpu|cuda] [--out bench/results] [--models NAME ...] [--seconds 900]
                                       [--weights FOLDER]

First of all: answers take nearly all of the time. With the 1024 tokens of the paper's Countdown the reference's
own handling of weights is about one percent of a generation by arithmetic for a GPU, and less on a CPU, so
nobody gains there from faster kernels. They count where answers are short (one token, log-probabilities of given ones,
the 100 tokens of two questions of conciseness) and in memory, which is KV cache. Large populations make updates long,
but answers as well: the shares stay.

A generation of N members takes N * (weights + answers + rewards) + update. Where answers take less than two seconds
whole members are timed, the methods in turn; else weights in turn and answers by themselves, the same for every method.
What there is no time to wait for is extrapolated, and its row says from what: answers from one batch of prompts at
shorter lengths (the parabola through the last three: a step costs more the longer the cache), updates of many seeds
from those of 1 and 30. Break-even: the number of tokens at which handling weights takes a tenth, or a hundredth, of the
generation.

Writes generation-cpu.json or generation-GPU.json after every workload. An error there (no memory) costs its own
workload alone.
"""

import argparse
import functools
import gc
import json
import math
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in kernels.py

import torch

from bench import RESULTS
from bench.common import environment, shapes, timing
from bench.common.baselines import BASELINES
from bench.common.methods import HELD, YARDSTICK, coefficients, make_methods
from bench.speed.generation_cost import LIMIT, LONG, ROWS, AnswerTimer, Workload, extrapolated, load, medians, samples
from es_finetune.runs.files import write_atomically
from es_finetune.tasks import load_task

REFERENCE = "es-at-scale"
THEIRS = (REFERENCE, "es-at-scale, without waste")
MODELS = {"cpu": ["embedded", "50M"], "cuda": ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-1.5B"]}
MASTERS = {"fp32": 4, "copy": 2, "None": 0}  # bytes of theta a bf16 parameter
SHORT = 2  # seconds of answers below which whole members are timed
# In this order: the first does every workload, the others the long answers
DECODINGS = ("dynamic", "static", "continuous")
COMPILING = 60  # seconds that "static" decoding may take before its first token


WORKLOADS = [
    Workload("one-token answers", 200, 150, 1),
    Workload("log-probabilities", 32, 300, 0),
    Workload("a MeZO step", 32, 300, 0, 2, 1),  # +sigma, -sigma, one direction
    Workload("one-token answers, N = 512", 200, 150, 1, 512, 512),
    Workload("conciseness", 2, 30, 100),
    Workload("countdown, 256 tokens", 200, 150, 256),
    Workload("countdown, 1024 tokens", 200, 150, 1024),
]
# MeZO walks +sigma, -2 sigma, +sigma: three passes for its two members, where perturbing and restoring each would be
# four.
MEZO, MEZO_PASSES = "MeZO", 3 / 4


# ---- seconds ----


class Weights:
    """Seconds and temporary bytes of each method on a model's weights; and the methods, for as long as they are
    needed."""

    def __init__(self, model, device):
        self.methods = make_methods({name: p.detach() for name, p in model.named_parameters()}, (*THEIRS, MEZO))
        self.apart = {name for name, method in self.methods.items() if device == "cuda" and method.empties_cache}
        self.device, self.updates, self.in_turn, self.extra = device, {}, {}, {}
        self.members = self._medians({name: method.member for name, method in self.methods.items()})
        for n in (1, 30):
            self._update(n)
        for name, method in self.methods.items():
            update = functools.partial(method.update, *coefficients(2))  # memory does not depend on the number of seeds
            self.extra[name] = {
                "member": timing.peak_extra_bytes(method.member, device),
                "update": timing.peak_extra_bytes(update, device),
            }

    def update(self, n):
        """({method: seconds} of an update by n seeds, measured or not)."""
        if n not in self.updates:
            one, thirty = self.updates[1], self.updates[30]
            extrapolated = {name: one[name] + (n - 1) * (thirty[name] - one[name]) / 29 for name in thirty}
            if sum(extrapolated.values()) > LIMIT[self.device]:
                return extrapolated, False
            self._update(n)
        return self.updates[n], True

    def _update(self, n):
        runs = {
            name: functools.partial(method.update, *coefficients(n))
            for name, method in self.methods.items()
            if name != MEZO or n == 1
        }
        self.updates[n] = self._medians(runs)

    def _medians(self, runs):
        """In turn, but for those that empty the allocator's cache: the next to allocate would pay."""
        quiet = {name: run for name, run in runs.items() if name not in self.apart}
        return medians(quiet, self.device) | medians(
            {name: runs[name] for name in runs.keys() - quiet.keys()}, self.device
        )

    def with_answers(self, work, answer):
        """({method: seconds of weights}, {method: seconds of answers}): whole members of each method in turn. Answers
        are the same work for all, so their samples are one heap, but for those of a method that empties the allocator's
        cache: the answers after it must allocate again."""
        if work.questions not in self.in_turn:
            seconds = samples(
                {
                    (what, name): run
                    for name, method in self.methods.items()
                    for what, run in (("weights", method.member), ("answers", answer))
                },
                self.device,
            )
            heap = [s for name in self.methods if name not in self.apart for s in seconds["answers", name]]
            self.in_turn[work.questions] = (
                {name: statistics.median(seconds["weights", name]) for name in self.methods},
                {
                    name: statistics.median(seconds["answers", name] if name in self.apart else heap)
                    for name in self.methods
                },
            )
        return self.in_turn[work.questions]


_countdown = functools.cache(functools.partial(load_task, "countdown"))


def seconds_of_rewards(work):
    """Countdown's own scorer, on texts of the length asked for that hold what it parses."""
    if work.tokens == 0:
        return 0.0
    task = _countdown()
    items = [task.train[i % len(task.train)] for i in range(work.prompts)]
    # Four characters a token
    text = ("1 + 2 " * work.tokens)[: 4 * work.tokens] + "</think>\n<answer>(1 + 2) * 3</answer>"
    start = time.perf_counter()
    for item in items:
        task.score(item, text)
    return time.perf_counter() - start


# ---- arithmetic ----


def generation(population, weights, answers, rewards, update):
    """Seconds of a generation and of its parts, from those of one member and of the update."""
    parts = {
        "weights": population * weights,
        "answers": population * answers,
        "rewards": population * rewards,
        "update": update,
    }
    total = sum(parts.values())
    return parts | {"total": total, "share_of_weights": (parts["weights"] + update) / total}


def break_even(share, weights, update, population, answers):
    """The least number of tokens with which handling weights (updating included) is at most `share` of a generation, 1
    if it never is more; answers: tokens -> seconds of one member. Rewards are left out: scoring 200 answers takes
    milliseconds."""
    needed = (weights + update / population) * (1 / share - 1)
    most = 1
    while answers(most) < needed and most < 1 << 30:
        most *= 2
    least = most // 2 + 1
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if answers(middle) >= needed else (middle + 1, most)
    return most


def memory(name, gpu_bytes=None):
    """Bytes of theta by master and of the reference's temporaries, what KV cache in bf16 they displace, and their share
    of a GPU. Arithmetic: in an update es-at-scale holds a sum in f32 and noise in bf16 of the largest tensor, on a CPU
    more (f32 noise)."""
    m, sizes = shapes.MODELS[name], [math.prod(shape) for shape in shapes.parameter_shapes(name).values()]
    a_token = 2 * m.layers * m.kv_heads * (m.hidden // m.heads) * 2
    held = {master: n * sum(sizes) for master, n in MASTERS.items()} | {
        REFERENCE: BASELINES[REFERENCE].update_bytes(sizes)
    }
    row = {"model": name, "parameters": sum(sizes), "kv_bytes_a_token": a_token}
    for what, n in held.items():
        row[what] = {"bytes": n, "kv_tokens": n // a_token} | ({"share_of_gpu": n / gpu_bytes} if gpu_bytes else {})
    return row


# ---- a model ----


def measure(report, name, device, decoding, known, end, folder):
    """All workloads, the handling of weights included; with a model whose weights are `known` from before long answers
    only, decoded otherwise."""
    # Live weights and two masters
    if device == "cuda" and 1.15 * HELD([memory(name)["parameters"]]) > torch.cuda.mem_get_info()[0]:
        report["left_out"].append(f"{name}: too little memory for weights and masters")
        return
    again = name in known
    try:
        model = load(name, device, folder)
        if not again:
            known[name] = Weights(model, device)
    except RuntimeError as error:
        _failed(report, name, decoding, "weights", error)
        return
    weights, timer = known[name], AnswerTimer(model, device, decoding, end)
    about = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype)[6:],
        "decoding": decoding,
    }
    for work in WORKLOADS:
        if again and work.tokens < LONG:
            continue
        if time.monotonic() > end:
            report["left_out"].append(f"{name}: {work.name}" + f", {decoding}" * again)
            continue
        try:
            _keep_faster(report, rows_of(work, about, weights, timer))
        except RuntimeError as error:  # out of memory, or what "static" or "continuous" failed to do
            _failed(report, name, decoding, work.name, error)
        _save(report)
    _add_break_even(report, name, decoding, weights, timer)
    weights.methods = None  # the bases' memory
    _save(report)


def rows_of(work, about, weights, timer):
    answers, source = timer.seconds(work)
    updates, update_measured = weights.update(work.update_seeds)
    members, each = weights.members, dict.fromkeys(weights.members, answers)
    in_turn = source is None and answers < SHORT and weights.methods is not None
    if in_turn:
        members, each = weights.with_answers(work, timer.run(work))
    about = about | {
        "workload": work.name,
        **work._asdict(),
        "answers_measured": source is None,
        "update_measured": update_measured,
        "in_turn": in_turn,
    }
    about |= {"answers_from": source} if source else {}
    rewards, rows = seconds_of_rewards(work), []
    for method in weights.members:
        if method != MEZO or work.update_seeds == 1:
            a_member = members[method] * (MEZO_PASSES if method == MEZO else 1)
            parts = generation(work.population, a_member, each[method], rewards, updates[method])
            rows.append(about | {"way": method} | parts)
    reference = next(row["total"] for row in rows if row["way"] == REFERENCE)
    return [row | {"times_reference": row["total"] / reference} for row in rows]


def _add_break_even(report, name, decoding, weights, timer):
    if len(timer.points) < 2 or not any(
        row["decoding"] == decoding and row["tokens"] > LONG for row in report["generations"] if row["model"] == name
    ):
        return  # nothing to go by, or the other decoding was faster
    long = next(work for work in WORKLOADS if work.tokens > LONG)
    report["break_even"] = [row for row in report["break_even"] if row["model"] != name]  # of a slower decoding
    batches = math.ceil(long.prompts / ROWS[timer.device])

    def answers(tokens):
        return batches * extrapolated(timer.points, tokens)

    by_tokens = {
        "longest_measured": max(timer.points),
        "seconds_answers": {str(2**i): answers(2**i) for i in range(12)},
    }
    for method in weights.updates[30]:
        parts = {
            "seconds_member": weights.members[method],
            "seconds_update": weights.updates[30][method],
            "seconds_a_token": (answers(129) - answers(1)) / 128,
        }
        tokens = {
            str(share): break_even(share, weights.members[method], weights.updates[30][method], 30, answers)
            for share in (0.1, 0.01)
        }
        row = {
            "model": name,
            "decoding": decoding,
            "way": method,
            "prompts": long.prompts,
            "prompt_tokens": long.prompt_tokens,
        }
        report["break_even"].append(
            row | parts | by_tokens | {"tokens": tokens, "peak_extra_bytes": weights.extra[method]}
        )


def _failed(report, name, decoding, what, error):
    kind = "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else type(error).__name__
    report["errors"].append(
        {
            "model": name,
            "decoding": decoding,
            "workload": what,
            "error": f"{kind}: {(str(error).splitlines() or [''])[0]}",
        }
    )
    print(f"{name:14} {decoding:8} {what:28} {report['errors'][-1]['error']}", file=sys.stderr, flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _save(report)


def _keep_faster(report, rows):
    """Adds a workload's rows, and drops those of the other decoding if it was slower; or these. What was measured is
    not dropped for what was not."""
    key = ("model", "workload")
    report["decodings"].append(
        {k: rows[0][k] for k in ("model", "workload", "decoding", "answers", "answers_measured")}
    )
    others = [row for row in report["generations"] if all(row[k] == rows[0][k] for k in key)]
    if not others or (
        rows[0]["answers"] < others[0]["answers"] and rows[0]["answers_measured"] >= others[0]["answers_measured"]
    ):
        report["generations"] = [row for row in report["generations"] if row not in others] + rows
    print(_line(rows), flush=True)


def _line(rows):
    by_method = {row["way"]: row for row in rows}
    ours, theirs = by_method[YARDSTICK], by_method[REFERENCE]
    both = [
        f"{who} {row['total']:9.2f} s, of it weights {row['share_of_weights']:6.2%}"
        for who, row in (("theirs", theirs), ("ours", ours))
    ]
    guessed = " and ".join(what for what in ("answers", "update") if not ours[f"{what}_measured"])
    return f"{ours['model']:14} {ours['decoding']:8} {ours['workload']:28} {'; '.join(both)}" + (
        f" ({guessed} extrapolated)" if guessed else ""
    )


def _save(report):
    write_atomically(report["path"], json.dumps({k: v for k, v in report.items() if k != "path"}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result file")
    parser.add_argument(
        "--models", nargs="+", choices=["embedded", *shapes.MODELS], help="default: what the device can do"
    )
    parser.add_argument("--weights", type=pathlib.Path, help="folder of the one model of --models; random if left out")
    parser.add_argument("--seconds", type=float, default=900, help="begin nothing further after so long")
    args = parser.parse_args()
    if args.weights and len(args.models or ()) != 1:
        parser.error("--weights belong to one model: name its shapes by --models")
    args.out.mkdir(parents=True, exist_ok=True)
    facts = environment.describe(args.device)
    report = {"path": args.out / f"generation-{environment.slug(facts)}.json", "machine": facts}
    report |= {
        "weights": args.weights and args.weights.name,
        "memory": [memory(name, facts.get("memory_bytes")) for name in shapes.MODELS],
        "generations": [],
        "break_even": [],
    }
    report |= {"decodings": [], "left_out": [], "errors": []}
    print(
        "Answers take nearly all of a generation: with 1024 tokens nobody gains from faster handling of weights. "
        "Measured:",
        flush=True,
    )
    end, names, known = time.monotonic() + args.seconds, args.models or MODELS[args.device], {}
    plan = [(name, decoding) for decoding in (DECODINGS if args.device == "cuda" else ("dynamic",)) for name in names]
    for number, (name, decoding) in enumerate(plan):
        left = end - time.monotonic()
        if decoding != "dynamic" and (left < COMPILING or name not in known):
            report["left_out"].append(f"{name}: {decoding} decoding")
            continue
        # Each model may use up its part of what is left, so that a slow one leaves time for the others.
        parts = len(names) - number if number < len(names) else 1
        measure(report, name, args.device, decoding, known, time.monotonic() + max(0, left) / parts, args.weights)
        gc.collect()
        if args.device == "cuda":
            torch._dynamo.reset()  # compiled code holds its model
            torch.cuda.empty_cache()
    _save(report)
    for row in report["generations"]:
        if row["way"] == REFERENCE and row["tokens"] > LONG:
            how = "measured" if row["answers_measured"] else "extrapolated"
            share = f"{row['share_of_weights']:.2%} of the reference's generation"
            print(f"{row['model']}, answers of {row['tokens']} tokens ({how}): handling weights is {share}")
    for what in report["left_out"]:
        print(f"left out: {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
