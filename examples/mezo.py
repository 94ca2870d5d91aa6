"""Steps of MeZO (arXiv:2305.17333): two forward passes with +eps and -eps along one noise, then a move along it.

The step alone, beside MeZO's own, is in docs/guides/coming-from.md.

python examples/mezo.py
"""

import torch

import es_kernels
from es_kernels import ParamTable
from toy import load, reward_of

STEPS, EPS, LR = 100, 1e-3, 2e-5

model, tokenizer = load()
exact = {name: p.detach().clone() for name, p in model.named_parameters()}
table, base = ParamTable(model.named_parameters()), ParamTable(exact)

losses = []
with torch.no_grad():
    for seed in range(STEPS):
        es_kernels.add_noise_(table, seed, EPS, base=base)
        plus = -reward_of(model, tokenizer)
        es_kernels.add_noise_(table, seed, -EPS, base=base)
        minus = -reward_of(model, tokenizer)
        slope = (plus - minus) / (2 * EPS)  # of the loss along the noise
        es_kernels.add_noise_(base, seed, -LR * slope)
        losses.append((plus + minus) / 2)
        if seed % 10 == 0:
            print(f"step {seed}: loss {losses[-1]:.4f}")
    es_kernels.add_noise_(table, [], [], base=base)  # the model has the new weights

print(f"the tuned model: loss {-reward_of(model, tokenizer):.4f}")
