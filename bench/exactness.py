"""Does exactness matter for learning? ES on bf16 weights where a step is about as large as their resolution, as at the paper's setting.

    python bench/exactness.py [--seeds 5] [--generations 300] [--processes 2] [--json bench/results/exactness.json]

arXiv:2509.24372 moves a weight by lr / sqrt(N) = 9e-5 a generation (rms); bf16 resolves 1.2e-4 at 0.02, a usual weight: step / ulp = 0.75 and sigma /
ulp = 8. The embedded model at sigma 0.002 and lr 0.001 has a median step / ulp of 0.75 too (the file holds the quantiles).

So small a sigma hardly changes what a model of this size answers. So the reward is the mean log-probability of 64 questions' answers, in plain
style: one forward pass, and hundreds of generations take minutes. Looked at is the share of the 269 held-out questions whose answer the
model says greedily. Every way of keeping the weights sees the same seeds, so the same noise and questions; errors are over seeds, and
differences are paired by seed. base="host" is left out: it has the bits of "fp32".
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
from es_kernels.noise import MEMBER_NOISE, member_seed

SIGMA, LR, POPULATION, QUESTIONS, LOOK_EVERY = 0.002, 0.001, 30, 64, 10
STEP = LR / math.sqrt(POPULATION)  # rms of one update of a weight
MIDWAY = 100  # generations: while all still learn, a difference shows that the end, where all have learnt, may hide
# way: dtype of the weights, options of the optimizer (None: add then subtract)
WAYS = {
    "f32 weights": (torch.float32, {"base": "fp32"}),
    "bf16, base fp32": (torch.bfloat16, {"base": "fp32"}),
    "bf16, base copy": (torch.bfloat16, {"base": "copy"}),
    "bf16, base copy, update to nearest": (torch.bfloat16, {"base": "copy", "update_rounding": "nearest"}),
    "bf16, base None": (torch.bfloat16, {"base": None}),
    "bf16, add then subtract": (torch.bfloat16, None),
}
REFERENCE = "bf16, base fp32"


class AddThenSubtract:
    """What the paper's code does, with our noise: p += sigma * eps in the weights' dtype, score, p -= sigma * eps; the update adds up in f32."""

    def __init__(self, named, *, sigma, lr, population, seed):
        self.table = es_kernels.ParamTable(named)
        self.sigma, self.lr, self.population, self.seed, self.generation = sigma, lr, population, seed, 0

    def noise(self, member):
        seed = member_seed(self.seed, self.generation, member, MEMBER_NOISE)
        zeros = {name: torch.zeros_like(p) for name, p in zip(self.table.names, self.table.tensors)}
        return es_kernels.add_noise_(zeros, seed, 1.0).values()

    @torch.no_grad()
    def step(self, closure):
        rewards = []
        for member in range(self.population):
            noise = self.noise(member)
            for p, eps in zip(self.table.tensors, noise):
                p.add_(self.sigma * eps)
            rewards.append(closure())
            for p, eps in zip(self.table.tensors, noise):
                p.sub_(self.sigma * eps)
        mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
        if spread:
            totals = [torch.zeros_like(p, dtype=torch.float32) for p in self.table.tensors]
            for member, reward in enumerate(rewards):
                for total, eps in zip(totals, self.noise(member)):
                    total.add_(eps, alpha=self.lr / self.population * (reward - mean) / spread)
            for p, total in zip(self.table.tensors, totals):
                p.add_(total.to(p.dtype))
        self.generation += 1
        return mean


class Questions:
    """Questions with answers in plain style, as tokens. For the reward one answer each, the one with the prompt's order of numbers; to look at
    with all right ones: what the model says greedily is one of them if each of its tokens is the most likely one after those before it."""

    def __init__(self, items, tokenizer, all_answers=False):
        from es_finetune.tasks.countdown_char import prompt, solutions

        found = solutions()
        right = [found[item.key] if all_answers else [next(a for a in found[item.key] if prompt(a, item.key[1]) == item.prompt)] for item in items]
        tokens = [[(tokenizer(item.prompt)["input_ids"], tokenizer(answer + "$")["input_ids"]) for answer in of] for item, of in zip(items, right)]
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
    """The embedded model in f32, its tokenizer, and its weights, to bf16 precision in every dtype, so that all ways start from the same."""
    from es_finetune.model import load_model

    model, tokenizer, _ = load_model("embedded", device="cpu", dtype="float32")
    return model, tokenizer, {name: p.detach().bfloat16().to(dtype) for name, p in model.named_parameters()}


def run(way, seed, generations):
    """Held-out share and log-probability every LOOK_EVERY generations, from the untouched model on. The weights are kept as the way says; what
    computes with them is f32, which a CPU does four times faster than bf16, so that nothing but the weights differs."""
    from es_finetune.tasks.countdown_char import CountdownChar

    torch.set_num_threads(1)
    model, tokenizer, weights = embedded(WAYS[way][0])
    task = CountdownChar()
    train, test, all_answers = Questions(task.train, tokenizer), Questions(task.test, tokenizer), Questions(task.test, tokenizer, all_answers=True)
    es = optimizer(way, weights, seed)

    @torch.no_grad()
    def loaded():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
        return model

    curve, log_p = [], []
    for generation in range(generations + 1):
        if generation % LOOK_EVERY == 0:
            curve.append(round(all_answers.right(loaded()), 4))
            log_p.append(round(test.reward(model), 4))
        if generation < generations:
            rows = torch.from_numpy(np.random.default_rng((seed, generation)).choice(len(task.train), QUESTIONS, replace=False))
            es.step(lambda: train.reward(loaded(), rows))
    return {"way": way, "seed": seed, "curve": curve, "log_p": log_p}


def left_behind(way):
    """What one generation that learns nothing does to the weights: the share of them changed, and the rms of that over the rms of a step."""
    _, _, weights = embedded(WAYS[way][0])
    before = _flat(weights)
    optimizer(way, weights, 0).step(lambda: 0.0)
    error = _flat(weights) - before
    return {"changed": (error != 0).double().mean().item(), "error_over_step": error.square().mean().sqrt().item() / STEP}


def quantiles():
    """Of step / ulp over the weights."""
    weights = _flat(embedded(torch.bfloat16)[2])
    shares = [0.1, 0.25, 0.5, 0.75, 0.9]
    return dict(zip(map(str, shares), step_over_ulp(weights[weights != 0], STEP).quantile(torch.tensor(shares, dtype=torch.double)).tolist()))


def _flat(weights):
    return torch.cat([p.detach().flatten().double() for p in weights.values()])


def summary(runs):
    """One row a way: the mean curve and its standard errors, and after MIDWAY generations and at the end the difference to REFERENCE, paired by
    seed; of the share answered right, and in "log_p" of the log-probability."""
    runs = sorted(runs, key=lambda r: r["seed"])
    curves = {key: {way: np.array([r[key] for r in runs if r["way"] == way]) for way in WAYS} for key in ("curve", "log_p")}
    rows = []
    for way in WAYS:
        share, log_p = (_compared(of[way], of[REFERENCE]) for of in curves.values())
        rows.append({"way": way, **share, "log_p": log_p})
    return rows


def _compared(curves, reference):
    mean, error = _mean_and_error(curves)
    differences = _mean_and_error(curves - reference)
    found = {"mean": mean.tolist(), "error": error.tolist()}
    for name, look in (("midway", MIDWAY // LOOK_EVERY), ("end", -1)):
        values = (*(a[look] for a in (mean, error)), *(a[look] for a in differences))
        found[name] = dict(zip(("mean", "error", "difference", "difference_error"), map(float, values)))
    return found


def _mean_and_error(curves):
    """Over seeds."""
    return curves.mean(0), curves.std(0, ddof=1) / math.sqrt(len(curves))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--generations", type=int, default=300)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results/exactness.json")
    args = parser.parse_args()
    setting = {
        "sigma": SIGMA,
        "lr": LR,
        "population": POPULATION,
        "questions": QUESTIONS,
        "look_every": LOOK_EVERY,
        "midway": MIDWAY,
        "reference": REFERENCE,
    }
    setting |= {"seeds": args.seeds, "generations": args.generations}
    runs = []
    with concurrent.futures.ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run, way, seed, args.generations) for seed in range(args.seeds) for way in WAYS]
        for job in concurrent.futures.as_completed(jobs):
            runs.append(job.result())
            print(f"{len(runs)}/{len(jobs)}  {runs[-1]['way']}, seed {runs[-1]['seed']}: {runs[-1]['curve'][-1]:.3f}", flush=True)
    runs.sort(key=lambda r: (list(WAYS).index(r["way"]), r["seed"]))
    report = {"setting": setting, "add_then_subtract": drift(), "rows": summary(runs), "runs": runs}
    for row in report["rows"]:
        print(
            f"{row['way']:36} "
            + "   ".join(
                f"{m} {row[m]['mean']:.3f} +- {row[m]['error']:.3f} ({row[m]['difference']:+.3f} +- {row[m]['difference_error']:.3f})"
                for m in ("midway", "end")
            )
        )
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
