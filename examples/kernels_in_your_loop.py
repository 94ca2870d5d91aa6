"""ES in a loop of your own, by the kernels alone: bfloat16 weights, exact restore, no memory for noise.

python examples/kernels_in_your_loop.py
"""

import torch

import es_kernels
from es_kernels import ParamTable, noise
from toy import load, reward_of

GENERATIONS, POPULATION, SIGMA, LR = 10, 16, 0.01, 0.01

model, tokenizer = load()
model.to(torch.bfloat16)
live = dict(model.named_parameters())  # what the model computes with
master = {name: p.detach().to(torch.float32, copy=True) for name, p in live.items()}  # the exact weights
table, base = ParamTable(live), ParamTable(master)

rewards = torch.empty(POPULATION)
means = []
with torch.no_grad():
    for generation in range(GENERATIONS):
        # Any integers serve. These need no state: a worker knows the seeds of every member of every generation.
        seeds = noise.member_seeds(0, generation, range(POPULATION))
        for member, seed in enumerate(seeds):
            es_kernels.add_noise_(table, seed, SIGMA, base=base)  # live <- round(master + SIGMA * noise(seed))
            rewards[member] = reward_of(model, tokenizer)
        z = (rewards - rewards.mean()) / rewards.std(correction=0)
        es_kernels.add_noise_(base, seeds, (LR / POPULATION * z).tolist())  # all members in one pass
        means.append(rewards.mean().item())
        print(f"generation {generation}: mean reward {means[-1]:.3f}")
    es_kernels.add_noise_(table, [], [], base=base)  # live <- round(master)

print(f"the tuned model: {reward_of(model, tokenizer):.3f}, fingerprint {es_kernels.fingerprint(base):016x}")
