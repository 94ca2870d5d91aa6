"""The answers of one member: models of real shapes, trained or not, the workloads of an ES run, and how long
answers take.

Answers too long to wait for are extrapolated from one batch of prompts at shorter lengths, by the parabola through the
last three: a step costs more the longer the cache. The line through 1 and 17 tokens says 10 s for 1024 tokens of the
embedded model, which take 76 (generation-cpu.json).
"""

import functools
import math
import random
import statistics
import time
from typing import NamedTuple

import torch

from bench.common import shapes
from es_finetune.engines.hf import HFEngine
from es_finetune.models.load import load_model

ROWS = {"cpu": 25, "cuda": 200}  # prompts in a batch: a CPU gains nothing from more, and its KV cache stays small
LIMIT = {"cpu": 10, "cuda": 3}  # seconds after which nothing is repeated
LENGTHS = (1, 32, 128)  # tokens at which answers are timed in order to extrapolate longer ones
LONG = 100  # tokens; of more only one batch may be timed


class Workload(NamedTuple):
    name: str
    prompts: int
    prompt_tokens: int
    # Of an answer; 0: none is generated, the reward is the log-probability of the last tokens of the prompt
    tokens: int
    population: int = 30
    update_seeds: int = 30

    @property
    def questions(self):
        """All that the seconds of a member's answers depend on."""
        return self.prompts, self.prompt_tokens, self.tokens


class Numbers:
    """A tokenizer for random weights: texts are numbers in decimal."""

    pad_token_id, eos_token_id = 0, None  # nothing ends an answer early

    def __call__(self, texts, **options):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    def batch_decode(self, ids, **options):
        return [" ".join(map(str, row)) for row in ids]


def load(name, device, weights=None):
    """A model of these shapes with the weights of a folder, or with none that anybody has trained; the embedded one as
    it is. bf16 on a GPU, f32 on a CPU: without bf16 instructions 25 prompts take nine times as long in bf16."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if weights is not None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype).to(device)
        built = {path: tuple(p.shape) for path, p in model.named_parameters()}
        if built != shapes.parameter_shapes(name):
            raise SystemExit(f"{weights} does not hold a model of {name}'s shapes: name its own by --models")
    elif name == "embedded":
        model, _, _ = load_model("embedded", device=device)
        model.config.max_position_embeddings = 2048  # its positions are rotary: only speed is asked for
    else:
        from transformers import AutoModelForCausalLM

        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shapes.config(name), dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


# ---- seconds ----


def timed(run, device):
    """By the wall clock, from and to a device with nothing to do."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def samples(runs, device, rounds=3):
    """{name: function} -> {name: [seconds]}: all in turn, until LIMIT. The first round warms up and counts only if it
    was the only one."""
    measured, begin = {name: [] for name in runs}, time.monotonic()
    for _ in range(rounds + 1):
        for name, run in runs.items():
            measured[name].append(timed(run, device))
        if time.monotonic() - begin > LIMIT[device]:
            break
    return {name: seconds[1:] or seconds for name, seconds in measured.items()}


def medians(runs, device):
    return {name: statistics.median(seconds) for name, seconds in samples(runs, device).items()}


class AnswerTimer:
    """Seconds of the answers of one member, measured as far as time allows."""

    def __init__(self, model, device, decoding, end):
        self.model, self.device, self.decoding, self.end = model, device, decoding, end
        self.points = {}  # tokens -> seconds of one batch of Countdown's prompts
        self.engines, self.short = {}, {}

    def seconds(self, work):
        """(seconds, None if they were measured or else what they were extrapolated from)."""
        batches = math.ceil(work.prompts / ROWS[self.device])
        if work.tokens <= LONG:
            if work.questions not in self.short:
                self.short |= medians({work.questions: self.run(work)}, self.device)
            return self.short[work.questions], None
        one_batch = work._replace(prompts=work.prompts // batches)
        if self.decoding == "static":
            self.points = {}  # another cache, another law
        for n in LENGTHS:
            if n not in self.points and (len(self.points) < 2 or self._time_for(extrapolated(self.points, n))):
                self.points |= medians({n: self.run(one_batch, n)}, self.device)
        expected = extrapolated(self.points, work.tokens)
        if self._time_for(expected * batches):
            whole = timed(self.run(work), self.device)
            self.points[work.tokens] = whole / batches
            return whole, None
        if batches > 1 and self._time_for(expected):
            self.points[work.tokens] = timed(self.run(one_batch), self.device)
        seconds = batches * extrapolated(self.points, work.tokens)
        return seconds, {"batches": batches, "rows": one_batch.prompts, "seconds_of_a_batch": dict(self.points)}

    def _time_for(self, seconds):
        return time.monotonic() + 1.3 * seconds < self.end

    def run(self, work, tokens=None):
        """A function that makes one member's answers, of so many tokens as the workload or fewer."""
        draws, vocabulary = random.Random(0), self.model.config.vocab_size
        prompts = [[draws.randrange(1, vocabulary) for _ in range(work.prompt_tokens)] for _ in range(work.prompts)]
        if work.tokens == 0:
            return functools.partial(log_probability, self.model, torch.tensor(prompts, device=self.device))
        if work.questions not in self.engines:
            engine = HFEngine(
                self.model, Numbers(), work.tokens, min(work.prompts, ROWS[self.device]), decoding=self.decoding
            )
            # One: "static" keeps its caches
            self.engines = {work.questions: (engine, engine.encode([" ".join(map(str, ids)) for ids in prompts]))}
            for _ in range(3 if self.decoding == "static" else 0):  # to compile, to warm up, to capture
                self._generate(work, 4)
        return functools.partial(self._generate, work, tokens or work.tokens)

    def _generate(self, work, tokens):
        engine, encoded = self.engines[work.questions]
        engine.options.max_new_tokens = engine.max_new_tokens = tokens
        lengths = {len(answer.ids) for answer in engine.generate(encoded)}
        if lengths != {tokens}:
            raise RuntimeError(f"answers of {lengths} tokens instead of {tokens}")


@torch.no_grad()
def log_probability(model, ids, target=8):
    """The mean log-probability of the last `target` tokens of each row of ids i64 [prompts, tokens], as MeZO's
    reward."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=target + 1).logits[:, :-1].float()
    return torch.log_softmax(logits, -1).gather(2, ids[:, -target:, None]).mean().item()


def extrapolated(points, tokens):
    """Seconds of a batch of answers of so many tokens, from {tokens: seconds}. Between points the line; beyond, the
    parabola through the last three, or the line through the last two if it would bend down, since a longer cache is no
    faster."""
    known = sorted(points.items())
    after = next((k for k in range(1, len(known) - 1) if known[k][0] >= tokens), len(known) - 1)
    (a, at_a), (b, at_b) = known[after - 1 : after + 1]
    slope = (at_b - at_a) / (b - a)
    bend = 0.0
    if tokens > b and after > 1:
        before, at_before = known[after - 2]
        bend = max(0.0, (slope - (at_a - at_before) / (a - before)) / (b - before))
    return at_b + slope * (tokens - b) + bend * (tokens - a) * (tokens - b)
