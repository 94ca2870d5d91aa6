"""Members in one batch: tokens a second beside plain inference, beside one member after the other, and beside PEFT.

    python -m bench.speed.members [--device cpu|cuda] [--out bench/results] [--models NAME ...] [--weights FOLDER]

Writes members-cpu.json or members-GPU.json after every model: models of real shapes with random weights (the embedded
one as it is), noise of rank 1. Every way generates the same number of tokens for the same prompts:

plain         the model as it is, on as many rows: what members in one batch are measured against
one batch     all members at once (HFEngine.generate_members), with making their factors
one by one    each member put in place and asked alone, with putting it in place and theta back in the end
PEFT          the same noise as adapters of LoRA, told apart by `adapter_names`: what a user can do today. Only linear
              layers have them, and making them is not timed
update        of theta by all members, which ends a generation either way

A whole generation is answers and update; rewards of such answers take no time. Rounds are interleaved, figures are
medians of them with 20th and 80th percentile. Before anything is timed the logits of members in one batch must be those
of one by one, to 1e-3 of their spread.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in kernels.py

import torch

from bench import RESULTS
from bench.common import environment
from bench.common.timing import Variant, interleave
from bench.speed.generation_cost import Numbers, load
from es_finetune import EvolutionStrategy
from es_finetune.engines.hf import HFEngine
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.members import Members
from es_finetune.runs.files import write_atomically
from es_kernels import factors

SIGMA, RANK = 1e-3, 1
# Of each model: members, prompts, tokens of a prompt and of an answer, whether PEFT is measured. 30 members x 2 prompts
# are a generation of conciseness, with shorter answers than its 100 tokens; the last one of the embedded model is the
# demo's generation.
CASES = {
    "cpu": {
        "SmolLM2-135M": [(members, 8, 32, 8, False) for members in (1, 4, 16, 32)] + [(30, 2, 32, 24, True)],
        "embedded": [(16, 8, 32, 8, False), (32, 8, 32, 8, False), (30, 2, 32, 24, True), (30, 128, 12, 12, False)],
    },
    "cuda": {
        model: [(members, 8, 64, 128, members == 30) for members in (1, 4, 16, 30, 64, 128)]
        for model in ("Qwen2.5-0.5B", "Qwen2.5-7B", "SmolLM2-135M")
    },
}


class Ways:
    """One model and one case; its methods are what is timed."""

    def __init__(self, model, case, device):
        self.model, self.device = model, device
        self.members, prompts, prompt_tokens, self.tokens, _ = case
        entries = list(named_segments(model))
        self.layers = Members(model, entries)
        self.engine = HFEngine(model, Numbers(), self.tokens, self.members * prompts, members=self.layers)
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(1, model.config.vocab_size, (prompts, prompt_tokens), generator=draws).tolist()
        self.encoded = self.engine.encode([" ".join(map(str, row)) for row in ids], self.members)
        self.many = self.engine.encode([" ".join(map(str, row)) for row in ids * self.members])
        tuned = [entry for entry in entries if entry.name in self.layers.names]
        self.optimizer = EvolutionStrategy(
            tuned, sigma=SIGMA, noise_rank=RANK, population=max(2, self.members), master="copy"
        )

    def plain(self):
        return self._whole(self.engine.generate(self.many))

    def one_batch(self):
        noise = self.optimizer.noise(range(self.members))
        return self._whole([answer for each in self.engine.generate_members(self.encoded, noise) for answer in each])

    def one_by_one(self):
        answers = []
        for member in range(self.members):
            self.optimizer.perturb(member)
            answers += self.engine.generate(self.encoded)
        self.optimizer.restore()
        return self._whole(answers)

    def update(self):
        self.optimizer.tell(range(self.optimizer.population))

    def _whole(self, answers):
        """RuntimeError unless every answer has all its tokens."""
        lengths = {len(answer.ids) for answer in answers}
        if lengths != {self.tokens}:
            raise RuntimeError(f"answers of {lengths} tokens instead of {self.tokens}")

    @torch.no_grad()
    def right(self):
        """Whether two members in one batch have the logits of weights with their noise."""
        ids = self.encoded[0][1]["input_ids"][:1]
        with self.layers.added(self.optimizer.noise([0, 1])) as begin:
            begin(2)
            together = self.model(ids.repeat(2, 1)).logits
        plain = self.model(ids).logits[0]
        for member in (0, 1):
            self.optimizer.perturb(member)
            alone = self.model(ids).logits[0]
            self.optimizer.restore()
            if not ((together[member] - alone).abs().max() < 1e-3 * plain.std() < (alone - plain).abs().max()):
                return False
        return True


class Adapters:
    """The members of a Ways as adapters of PEFT, over a model of its own."""

    def __init__(self, ways, model):
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.names = [f"member{i}" for i in range(ways.members)]
        self.model = peft.get_peft_model(model, config, self.names[0])
        for name in self.names[1:]:
            self.model.add_adapter(name, config)
        self.model.eval()
        seeds = ways.optimizer.noise(range(ways.members))[0].seeds
        for path, module in self.model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                pair = factors({f"{path}.weight": tuple(module.base_layer.weight.shape)}, seeds, RANK)
                (left, right) = pair[f"{path}.weight"]
                for i, name in enumerate(self.names):
                    module.lora_A[name].weight.data.copy_(right[i].T)
                    module.lora_B[name].weight.data.copy_(SIGMA * left[i])
        (_, inputs), *_ = ways.encoded
        rows = len(inputs["input_ids"])
        self.inputs = {name: t.repeat(ways.members, 1) for name, t in inputs.items()}
        self.of_rows = [name for name in self.names for _ in range(rows)]
        self.options = ways.engine.options

    def generate(self):
        self.model.generate(**self.inputs, adapter_names=self.of_rows, generation_config=self.options)


def measure(name, case, device, weights=None):
    """The row of one case."""
    ways = Ways(load(name, device, weights), case, device)
    if not ways.right():
        raise SystemExit(f"{name}, {case[0]} members: members in one batch have other logits than one by one")
    runs = {"plain": ways.plain, "one batch": ways.one_batch, "one by one": ways.one_by_one, "update": ways.update}
    if case[4]:
        runs["PEFT"] = Adapters(ways, load(name, device, weights)).generate
    variants = {way: Variant(lambda k, run=run: run(), capture=False) for way, run in runs.items()}
    timings = interleave(variants, device, rounds=3)
    update = timings.pop("update")
    made = case[0] * case[1] * case[3]
    result = dict(zip(("model", "members", "prompts", "prompt_tokens", "tokens"), (name, *case[:4]), strict=True))
    result["ways"] = {way: {**t.row(), "tokens_per_s": made / t.median} for way, t in timings.items()}
    result["update"] = update.row()
    together = timings["one batch"].median
    result["share_of_plain"] = timings["plain"].median / together
    for way in ("one by one", "PEFT"):
        if way in timings:
            result[f"{way} takes"] = timings[way].median / together
    whole = {way: timings[way].median + update.median for way in ("one batch", "one by one")}
    result["generation one by one takes"] = whole["one by one"] / whole["one batch"]
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--models", nargs="+", help="of CASES; all, if left out")
    parser.add_argument("--weights", type=pathlib.Path, help="folder of the one model of --models; random if left out")
    args = parser.parse_args()
    if args.weights and len(args.models or ()) != 1:
        parser.error("--weights belong to one model: name its shapes by --models")
    args.out.mkdir(parents=True, exist_ok=True)
    facts = environment.describe(args.device)
    content = {"machine": facts, "weights": args.weights and args.weights.name, "noise_rank": RANK, "rows": []}
    for name in args.models or CASES[args.device]:
        for case in CASES[args.device][name]:
            row = measure(name, case, args.device, args.weights)
            content["rows"].append(row)
            ways = ", ".join(f"{way} {of['tokens_per_s']:.1f}" for way, of in row["ways"].items())
            print(f"{name}, {case[0]} members x {case[1]} prompts, tokens/s: {ways}", flush=True)
            write_atomically(args.out / f"members-{environment.slug(facts)}.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
