"""Does exactness matter for learning? ES on bf16 weights where a step is about as large as their resolution, as at the
paper's setting.

    python -m bench.learning.exactness [--seeds 6] [--generations 200] [--processes 2] [--runs FOLDER] [--json
    bench/results/exactness.json]

arXiv:2509.24372 moves a weight by lr / sqrt(N) = 9.1e-5 a generation (rms), with sigma = 2 lr; bf16 resolves 1.2e-4 at
0.02, a usual weight: step / ulp = 0.75. The embedded model at sigma 0.002 and lr 0.001 has a median step / ulp of 0.75
too (quartiles 0.37 and 3.0). One generation of adding and subtracting leaves 43% of its weights changed, by 1.06 of a
step's rms; at the paper's setting and weights N(0, 0.02) 48% and 0.81.

So small a sigma hardly changes what a model of this size answers. So the reward is the mean log-probability of 64
questions' answers, in plain style: one forward pass, and hundreds of generations take minutes. Evaluated are the 269
held-out questions: the share whose greedy answer is right (0.42 at first, mostly because the model spoils its style:
what is learnt is mostly style), and their mean log-probability, which does not saturate. Every way of keeping the
weights starts from the same weights and sees the same seeds, so the same noise and questions; errors are over seeds,
and differences are paired by seed. master="host" is left out: it has the bits of "fp32"
(tests/es_finetune/optim/test_evolution_strategy.py).
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import pathlib
import statistics

import numpy as np
import torch

import es_kernels
from bench import RESULTS
from es_kernels.noise import MEMBER_NOISE, member_seed

SIGMA, LR, POPULATION, QUESTIONS, EVAL_EVERY = 0.002, 0.001, 30, 64, 10
STEP = LR / math.sqrt(POPULATION)  # rms of one update of a weight
MIDWAY = 100  # generations: while all still learn, a difference shows that the end, where all have learnt, may hide
# way: dtype of the weights, options of the optimizer (None: add then subtract)
WAYS = {
    "f32 weights": (torch.float32, {"master": "fp32"}),
    "bf16, master fp32": (torch.bfloat16, {"master": "fp32"}),
    "bf16, master copy": (torch.bfloat16, {"master": "copy"}),
    "bf16, master copy, update to nearest": (torch.bfloat16, {"master": "copy", "update_rounding": "nearest"}),
    "bf16, master None": (torch.bfloat16, {"master": None}),
    "bf16, master None, update to nearest": (torch.bfloat16, {"master": None, "update_rounding": "nearest"}),
    "bf16, add then subtract": (torch.bfloat16, None),
}
REFERENCE = "bf16, master fp32"


class AddThenSubtract:
    """What the paper's code does, with our noise: p += sigma * eps in the weights' dtype, score, p -= sigma * eps; the
    update adds up in f32 and is cast to the weights' dtype before it is added."""

    def __init__(self, weights, *, sigma, lr, population, seed):
        self.weights, self.sigma, self.lr, self.population, self.seed, self.generation = (
            weights,
            sigma,
            lr,
            population,
            seed,
            0,
        )
        self.zeros, self.eps = (
            es_kernels.ParamTable({name: torch.zeros_like(p) for name, p in weights.items()}) for _ in range(2)
        )

    def noise(self, member):
        """(weight, eps) of every tensor; eps until the next call."""
        es_kernels.add_noise_(
            self.eps, member_seed(self.seed, self.generation, member, MEMBER_NOISE), 1.0, base=self.zeros
        )
        return list(zip(self.weights.values(), self.eps.tensors, strict=True))

    @torch.no_grad()
    def step(self, closure):
        rewards = []
        for member in range(self.population):
            noise = self.noise(member)
            for p, eps in noise:
                p.add_(self.sigma * eps)
            rewards.append(closure())
            for p, eps in noise:
                p.sub_(self.sigma * eps)
        mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
        if spread:
            totals = [torch.zeros_like(p, dtype=torch.float32) for p in self.weights.values()]
            for member, reward in enumerate(rewards):
                for total, (_, eps) in zip(totals, self.noise(member), strict=True):
                    total.add_(eps, alpha=self.lr / self.population * (reward - mean) / spread)
            for p, total in zip(self.weights.values(), totals, strict=True):
                p.add_(total.to(p.dtype))
        self.generation += 1
        return mean


class Questions:
    """Questions with answers in plain style, as tokens. For the reward one answer each, the one with the prompt's order
    of numbers; to evaluate, all right ones: what the model says greedily is one of them if each of its tokens is the
    most likely one after those before it."""

    def __init__(self, items, tokenizer, all_answers=False):
        from es_finetune.tasks.countdown_char import prompt, solutions

        right_answers = solutions()
        right = [
            right_answers[item.key]
            if all_answers
            else [next(a for a in right_answers[item.key] if prompt(a, item.key[1]) == item.prompt)]
            for item in items
        ]
        tokens = [
            [(tokenizer(item.prompt)["input_ids"], tokenizer(answer + "$")["input_ids"]) for answer in of]
            for item, of in zip(items, right, strict=True)
        ]
        self.question = torch.tensor([number for number, of in enumerate(tokens) for _ in of])  # of each row
        tokens = [pair for of in tokens for pair in of]
        longest = max(len(question) + len(answer) for question, answer in tokens)
        self.ids = torch.full((len(tokens), longest), tokenizer.pad_token_id)
        self.answers = torch.full((len(tokens), longest), -1)  # the token to be said next; -1: none
        for row, (question, answer) in enumerate(tokens):
            self.ids[row, : len(question) + len(answer)] = torch.tensor(question + answer)
            self.answers[row, len(question) - 1 : len(question) + len(answer) - 1] = torch.tensor(answer)

    def _logits(self, model, rows):
        return model(input_ids=self.ids[rows], use_cache=False).logits  # padding is on the right: no real token sees it

    @torch.no_grad()
    def reward(self, model, rows=slice(None)):
        """Mean log-probability of the answers' tokens, in nats."""
        answers = self.answers[rows]
        log_p = torch.log_softmax(self._logits(model, rows), -1).gather(-1, answers.clamp(min=0)[..., None])[..., 0]
        return log_p[answers >= 0].double().mean().item()

    @torch.no_grad()
    def right(self, model):
        """Share of the questions that are answered right."""
        said = self._logits(model, slice(None)).argmax(-1)
        rows = ((said == self.answers) | (self.answers < 0)).all(-1)
        return len(self.question[rows].unique()) / len(self.question.unique())


def step_over_ulp(weights, step):
    """step / ulp of bf16 at each weight: 2^-7 of its power of two."""
    _, exponent = torch.frexp(weights.float())
    return step / torch.exp2(exponent.double() - 8)


def optimizer(way, weights, seed):
    _, options = WAYS[way]
    settings = {"sigma": SIGMA, "lr": LR, "population": POPULATION, "seed": seed}
    if options is None:
        return AddThenSubtract(weights, **settings)
    from es_finetune import EvolutionStrategy

    return EvolutionStrategy([(name, p.requires_grad_()) for name, p in weights.items()], **settings, **options)


def embedded(dtype):
    """The embedded model in f32, its tokenizer, and its weights, to bf16 precision in every dtype, so that all ways
    start from the same."""
    from es_finetune.models.load import load_model

    model, tokenizer, _ = load_model("embedded", device="cpu", dtype="float32")
    return model, tokenizer, {name: p.detach().bfloat16().to(dtype) for name, p in model.named_parameters()}


def run(way, seed, generations):
    """Held-out share and log-probability every EVAL_EVERY generations, from the untouched model on. The weights are
    kept as the way says; what computes with them is f32, which this CPU does six times faster than bf16, so that
    nothing but the weights differs."""
    from es_finetune.tasks.countdown_char import CountdownChar

    torch.set_num_threads(1)
    model, tokenizer, weights = embedded(WAYS[way][0])
    task = CountdownChar()
    train, test, all_answers = (
        Questions(task.train, tokenizer),
        Questions(task.test, tokenizer),
        Questions(task.test, tokenizer, all_answers=True),
    )
    es = optimizer(way, weights, seed)

    @torch.no_grad()
    def loaded():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
        return model

    curve, log_p = [], []
    for generation in range(generations + 1):
        if generation % EVAL_EVERY == 0:
            curve.append(round(all_answers.right(loaded()), 4))
            log_p.append(round(test.reward(model), 4))
        if generation < generations:
            rows = torch.from_numpy(
                np.random.default_rng((seed, generation)).choice(len(task.train), QUESTIONS, replace=False)
            )
            es.step(lambda rows=rows: train.reward(loaded(), rows))
    return {"way": way, "seed": seed, "curve": curve, "log_p": log_p}


def kept(folder, way, seed, generations):
    """run(), once only where there is a folder."""
    if folder is None:
        return run(way, seed, generations)
    path = folder / f"{list(WAYS).index(way)}-{seed}-{generations}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run(way, seed, generations)))
    return json.loads(path.read_text())


def left_behind(way):
    """What one generation that learns nothing does to the weights: the share of them changed, and the rms of that over
    the rms of a step."""
    _, _, weights = embedded(WAYS[way][0])
    before = _flat(weights)
    optimizer(way, weights, 0).step(lambda: 0.0)
    error = _flat(weights) - before
    return {
        "changed": (error != 0).double().mean().item(),
        "error_over_step": error.square().mean().sqrt().item() / STEP,
    }


def quantiles():
    """Of step / ulp over the weights."""
    weights = _flat(embedded(torch.bfloat16)[2])
    shares = [0.1, 0.25, 0.5, 0.75, 0.9]
    return dict(
        zip(
            map(str, shares),
            step_over_ulp(weights[weights != 0], STEP).quantile(torch.tensor(shares, dtype=torch.double)).tolist(),
            strict=True,
        )
    )


def _flat(weights):
    return torch.cat([p.detach().flatten().double() for p in weights.values()])


def summary(runs):
    """One row a way: the mean curve and its standard errors, and after MIDWAY generations and at the end the difference
    to REFERENCE, paired by seed; of the share answered right, and in "log_p" of the log-probability."""
    runs = sorted(runs, key=lambda r: r["seed"])
    curves = {
        key: {way: np.array([r[key] for r in runs if r["way"] == way]) for way in WAYS} for key in ("curve", "log_p")
    }
    rows = []
    for way in WAYS:
        share, log_p = (_compared(of[way], of[REFERENCE]) for of in curves.values())
        rows.append({"way": way, **share, "log_p": log_p})
    return rows


def _compared(curves, reference):
    mean, error = _mean_and_error(curves)
    differences = _mean_and_error(curves - reference)
    figures = {"mean": mean.tolist(), "error": error.tolist()}
    for name, at in (("midway", MIDWAY // EVAL_EVERY), ("end", -1)):
        values = (*(a[at] for a in (mean, error)), *(a[at] for a in differences))
        figures[name] = dict(zip(("mean", "error", "difference", "difference_error"), map(float, values), strict=True))
    return figures


def _mean_and_error(curves):
    """Over seeds."""
    return curves.mean(0), curves.std(0, ddof=1) / math.sqrt(len(curves))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--runs",
        type=pathlib.Path,
        metavar="FOLDER",
        help="keeps each run that ended: a call after an interruption goes on",
    )
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / "exactness.json")
    args = parser.parse_args()
    setting = {
        "sigma": SIGMA,
        "lr": LR,
        "population": POPULATION,
        "questions": QUESTIONS,
        "look_every": EVAL_EVERY,
        "midway": MIDWAY,
    }
    setting |= {"reference": REFERENCE, "seeds": args.seeds, "generations": args.generations}
    runs = []
    with concurrent.futures.ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(kept, args.runs, way, seed, args.generations) for seed in range(args.seeds) for way in WAYS]
        for job in concurrent.futures.as_completed(jobs):
            runs.append(r := job.result())
            print(
                f"{len(runs)}/{len(jobs)}  {r['way']}, seed {r['seed']}: {r['curve'][-1]:.3f} {r['log_p'][-1]:.4f}",
                flush=True,
            )
    runs.sort(key=lambda r: (list(WAYS).index(r["way"]), r["seed"]))
    drift = {
        "add_then_subtract": {"step_over_ulp": quantiles(), **left_behind("bf16, add then subtract")},
        "master_none": left_behind("bf16, master None"),
    }
    report = {"setting": setting, **drift, "rows": summary(runs), "runs": runs}
    for row in report["rows"]:
        for what, figures in (("right", row), ("log p", row["log_p"])):
            texts = (
                f"{at} {figures[at]['mean']:.4f} +- {figures[at]['error']:.4f} ({figures[at]['difference']:+.4f} +- "
                f"{figures[at]['difference_error']:.4f})"
                for at in ("midway", "end")
            )
            print(f"{row['way']:36} {what}  ", *texts, sep="  ")
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
