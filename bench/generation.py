"""One whole generation of ES on models of real shapes with random weights: where the time goes, ours beside what people do today.

    python bench/generation.py [--device cpu|cuda] [--out bench/results] [--models NAME ...] [--seconds 3000]

What is so, first: answers take nearly all of the time. With the 1024 tokens of the paper's Countdown the reference's own handling of weights is one or
two percent of a generation (README has the arithmetic), so nobody gains there from faster kernels. They count where answers are short (one token,
log-probabilities of given ones, the 100 tokens of the conciseness task), where populations are large, and in memory, which is KV cache.

A generation of N members takes N * (weights + answers + rewards) + update. Each part is measured by itself, all ways of handling weights
interleaved, answers by the engine that es_finetune runs with, the same for every way. Answers too long to wait for are extrapolated,
prompt + tokens * seconds a token from two shorter lengths, and their rows say so. Break-even: the number of tokens at which handling weights takes a
tenth, or a hundredth, of the generation.

Writes generation-cpu.json or generation-GPU.json, anew after every workload.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import random
import statistics
import sys
import time
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in kernels.py

import machine
import shapes
import timing
import torch
from es_finetune.engines import Answer
from es_finetune.engines.hf import HFEngine
from es_finetune.files import write_atomically
from es_finetune.model import load_model
from es_finetune.tasks import load_task
from timing import Variant, interleave
from ways import YARDSTICK, coefficients, ways

RESULTS = pathlib.Path(__file__).parent / "results"
REFERENCE = "es-at-scale"
THEIRS = (REFERENCE, "es-at-scale, without waste")
MODELS = {"cpu": ["embedded", "50M"], "cuda": ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-1.5B"]}
BASES = {"fp32": 4, "copy": 2, "None": 0}  # bytes of theta a bf16 parameter


class Workload(NamedTuple):
    name: str
    prompts: int
    prompt_tokens: int
    tokens: int  # of an answer; 0: no answer is generated, the reward is the log-probability of a given one
    population: int = 30
    update_seeds: int = 30


WORKLOADS = [
    Workload("one-token answers", 200, 150, 1),
    Workload("log-probabilities", 32, 300, 0),
    Workload("a MeZO step", 32, 300, 0, 2, 1),  # +sigma, -sigma, one direction
    Workload("one-token answers, N = 512", 200, 150, 1, 512, 512),
    Workload("conciseness", 2, 30, 100),
    Workload("countdown, 256 tokens", 200, 150, 256),
    Workload("countdown, 1024 tokens", 200, 150, 1024),
]
LENGTHS = (1, 17)  # tokens, from which longer answers are extrapolated where there is no time to wait for them


class Numbers:
    """A tokenizer for random weights: texts are numbers in decimal."""

    pad_token_id, eos_token_id = 0, None  # nothing ends an answer early

    def __call__(self, texts, **options):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def batch_decode(self, ids, **options):
        return [" ".join(map(str, row)) for row in ids]


def load(name, device):
    """(model of these shapes with weights that nobody has trained, tokenizer); the embedded model as it is. bf16 on a GPU; a CPU without bf16
    arithmetic of its own takes four times as long with it as with f32."""
    if name == "embedded":
        model, _, _ = load_model("embedded", device=device)
        model.config.max_position_embeddings = 2048  # its positions are rotary: only speed is asked for
    else:
        from transformers import AutoModelForCausalLM

        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shapes.config(name), dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval(), Numbers()


class Clock:
    """Seconds of answers and rewards, by workload; what was measured is kept, and what there is no time for is extrapolated."""

    def __init__(self, model, tokenizer, end):
        self.model, self.tokenizer, self.end, self.known = model, tokenizer, end, {}

    def answers(self, work):
        """(seconds of one member's answers, measured or not)."""
        if work.tokens == 0:
            return self._once(work, 0), True
        first, second = (self._once(work, n) for n in LENGTHS)
        expected = extrapolated(first, second, work.tokens)
        if work.tokens <= LENGTHS[-1] or time.monotonic() + 2 * expected < self.end:
            return self._once(work, work.tokens), True
        return expected, False

    def _once(self, work, tokens):
        key = work.prompts, work.prompt_tokens, tokens
        if key not in self.known:
            draws = random.Random(0)
            vocabulary = self.model.config.vocab_size
            prompts = [" ".join(str(draws.randrange(1, vocabulary)) for _ in range(work.prompt_tokens)) for _ in range(work.prompts)]
            engine = HFEngine(self.model, self.tokenizer, max(1, tokens), batch_size=work.prompts)
            if tokens:
                run = functools.partial(engine.generate, engine.encode(prompts))
            else:
                run = functools.partial(engine.log_probs, prompts, [Answer("", (1,))] * work.prompts)
            seconds = []
            for _ in range(4):  # the first warms up; long ones are not repeated
                start = time.perf_counter()
                run()
                if self.model.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                if seconds[-1] > 5:
                    break
            self.known[key] = statistics.median(seconds[1:] or seconds)
        return self.known[key]


def extrapolated(first, second, tokens):
    """Seconds of an answer of so many tokens, from those of LENGTHS."""
    return first + (tokens - LENGTHS[0]) * (second - first) / (LENGTHS[1] - LENGTHS[0])


def seconds_of_rewards(work):
    """Countdown's own scorer, on texts of the length asked for."""
    if work.tokens == 0:
        return 0.0
    task = load_task("countdown")
    items = [task.train[i % len(task.train)] for i in range(work.prompts)]
    text = ("1 + 2 " * work.tokens)[: 4 * work.tokens]  # four characters a token
    start = time.perf_counter()
    for item in items:
        task.score(item, text)
    return time.perf_counter() - start


def generation(population, weights, answers, rewards, update):
    """Seconds of a generation and of its parts, from those of one member and of the update."""
    parts = {"weights": population * weights, "answers": population * answers, "rewards": population * rewards, "update": update}
    total = sum(parts.values())
    return parts | {"total": total, "share_of_weights": (parts["weights"] + update) / total}


def break_even(share, weights, update, population, first, a_token):
    """How many tokens an answer has when handling weights (and updating them) is `share` of a generation; 0 if even one token is more."""
    answers = (weights + update / population) * (1 / share - 1)
    return max(0, math.ceil(1 + (answers - first) / a_token))


def memory(name):
    """Bytes of theta by base, and the tokens of KV cache in bf16 that would fit instead. Arithmetic, from the shapes alone."""
    m = shapes.MODELS[name]
    values = sum(map(math.prod, shapes.parameter_shapes(name).values()))
    a_token = 2 * m.layers * m.kv_heads * (m.hidden // m.heads) * 2
    return {
        "model": name,
        "parameters": values,
        "kv_bytes_a_token": a_token,
        **{base: {"bytes": n * values, "kv_tokens": n * values // a_token} for base, n in BASES.items()},
    }


def measure(report, name, device, end):
    model, tokenizer = load(name, device)
    live = {n: p.detach() for n, p in model.named_parameters()}
    values, rounds = sum(p.numel() for p in live.values()), 3
    all_ways = ways(live, THEIRS)
    members = _interleaved({n: way.member for n, way in all_ways.items()}, device, rounds)
    updates = {}
    clock = Clock(model, tokenizer, end)
    for work in WORKLOADS:
        if time.monotonic() > end:
            report["left_out"].append(f"{name}: {work.name}")
            continue
        try:
            answers, measured = clock.answers(work)
            rewards = seconds_of_rewards(work)
            if work.update_seeds not in updates:
                # 512 seeds by torch.randn take minutes: 32 of them, times 16, since every seed is one more pass.
                timed = min(work.update_seeds, 32)
                found = _interleaved({n: functools.partial(way.update, *coefficients(timed)) for n, way in all_ways.items()}, device, rounds)
                updates[work.update_seeds] = {n: seconds * work.update_seeds / timed for n, seconds in found.items()}
        except torch.cuda.OutOfMemoryError as error:
            report["left_out"].append(f"{name}: {work.name}, out of memory ({str(error).splitlines()[0]})")
            torch.cuda.empty_cache()
            continue
        for way in all_ways:
            row = {"model": name, "parameters": values, "workload": work.name, **work._asdict(), "way": way, "answers_measured": measured}
            row |= generation(work.population, members[way], answers, rewards, updates[work.update_seeds][way])
            reference = generation(work.population, members[REFERENCE], answers, rewards, updates[work.update_seeds][REFERENCE])
            report["generations"].append(row | {"times_reference": row["total"] / reference["total"]})
        print(f"{name:14} {work.name:28} {_line(report['generations'], name, work.name)}", flush=True)
        _save(report)
    first, second = (clock.known.get((200, 150, n)) for n in LENGTHS)
    if first and second and 30 in updates:
        a_token = (second - first) / (LENGTHS[1] - LENGTHS[0])
        for name_of_way, way in all_ways.items():
            parts = {"seconds_member": members[name_of_way], "seconds_update": updates[30][name_of_way], "seconds_a_token": a_token}
            tokens = {str(share): break_even(share, members[name_of_way], updates[30][name_of_way], 30, first, a_token) for share in (0.1, 0.01)}
            work = {"member": way.member, "update": functools.partial(way.update, *coefficients(4))}
            extra = {what: timing.peak_extra_bytes(run, device) for what, run in work.items()}
            report["break_even"].append({"model": name, "way": name_of_way, "prompts": 200, **parts, "tokens": tokens, "peak_extra_bytes": extra})
    _save(report)


def _interleaved(work, device, rounds):
    timings = interleave({name: Variant(lambda k, run=run: run(), capture=False) for name, run in work.items()}, device, rounds)
    return {name: t.median for name, t in timings.items()}


def _line(rows, model, workload):
    found = {r["way"]: r for r in rows if r["model"] == model and r["workload"] == workload}
    ours, theirs = found[YARDSTICK], found[REFERENCE]
    how = "" if ours["answers_measured"] else ", answers extrapolated"
    both = "; ".join(
        f"{who} {row['total']:9.2f} s, of it weights {row['share_of_weights']:6.2%}" for who, row in (("theirs", theirs), ("ours", ours))
    )
    return both + how


def _save(report):
    write_atomically(report["path"], json.dumps({k: v for k, v in report.items() if k != "path"}, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--models", nargs="+", choices=["embedded", *shapes.MODELS], help="default: what the device can do")
    parser.add_argument("--seconds", type=float, default=3000, help="begin nothing further after so long")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = machine.describe(args.device)
    report = {"path": args.out / f"generation-{machine.slug(facts)}.json", "machine": facts, "memory": [memory(name) for name in shapes.MODELS]}
    report |= {"generations": [], "break_even": [], "left_out": []}
    begin, names = time.monotonic(), args.models or MODELS[args.device]
    for number, name in enumerate(names):
        # Each model may use up its part of what is left, so that a slow one leaves time for the others.
        now = time.monotonic()
        measure(report, name, args.device, now + max(0, begin + args.seconds - now) / (len(names) - number))
        if args.device == "cuda":
            torch.cuda.empty_cache()
    for what in report["left_out"]:
        print(f"left out: {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
