"""The ES gradient handed to a torch optimizer: the kernel writes it into .grad, and Adam takes the step.

python examples/adam_on_es.py
"""

import torch

import es_kernels
from es_kernels import ParamTable, noise
from toy import load, reward_of

GENERATIONS, POPULATION, SIGMA, LR = 10, 16, 0.01, 1e-3

model, tokenizer = load()
live = ParamTable(model.named_parameters())
exact = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()}
for p in exact.values():
    p.grad = torch.zeros_like(p)
base = ParamTable(exact)
gradient = ParamTable({name: p.grad for name, p in exact.items()})  # by the same names: the same noise
adam = torch.optim.Adam(exact.values(), lr=LR)

rewards = torch.empty(POPULATION)
means = []
for generation in range(GENERATIONS):
    seeds = noise.member_seeds(0, generation, range(POPULATION))
    with torch.no_grad():
        for member, seed in enumerate(seeds):
            es_kernels.add_noise_(live, seed, SIGMA, base=base)
            rewards[member] = reward_of(model, tokenizer)
        z = (rewards - rewards.mean()) / rewards.std(correction=0)
        adam.zero_grad(set_to_none=False)  # the table knows where the gradients lie
        es_kernels.add_noise_(gradient, seeds, (-z / POPULATION).tolist())  # Adam goes down: minus
    adam.step()
    means.append(rewards.mean().item())
    print(f"generation {generation}: mean reward {means[-1]:.3f}")

with torch.no_grad():
    es_kernels.add_noise_(live, [], [], base=base)
print(f"the tuned model: {reward_of(model, tokenizer):.3f}")
