"""Log-probability training: answers are read, and nothing is generated. The task of own_reward.py, by its answers.

python examples/logprob.py
"""

from es_finetune import TrainConfig, Trainer
from own_reward import QUESTIONS

ITEMS = [{"prompt": item["prompt"], "answer": "+".join(map(str, item["numbers"]))} for item in QUESTIONS]

config = TrainConfig(
    model="embedded",
    task="custom",
    reward="logprob",
    max_new_tokens=12,
    generations=10,
    population=16,
    prompts=32,
    sigma=0.02,
    lr=0.02,
    noise_rank=1,  # members share a batch:
    batch_size=512,  # 16 members of 32 prompts
    output="runs/logprob",
    overwrite=True,
)
summary = Trainer(config, data=ITEMS).train()
print(f"held-out answers that are exact: {summary['base']:.2f} -> {summary['final']:.2f}")
