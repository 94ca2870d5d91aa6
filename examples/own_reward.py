"""Your own questions and reward: a run in a folder, with log, report and model.

python examples/own_reward.py

or, with the questions in a file, es-finetune train --model embedded --data FILE --reward examples/own_reward.py:reward
"""

import re

from es_finetune import TrainConfig, Trainer, report

QUESTIONS = [
    {"prompt": f"^{a},{b},{c}={a + b + c}:", "numbers": [a, b, c]}
    for a in range(1, 10)
    for b in range(1, 10)
    for c in range(1, 10)
]


def reward(completion: str, item: dict) -> dict:
    """Is it the sum of the three numbers, and nothing else? A part of the reward is for the form alone."""
    form = re.fullmatch(r"\d\+\d\+\d", completion) is not None
    exact = form and sorted(map(int, completion.split("+"))) == sorted(item["numbers"])
    return {"reward": 0.9 * exact + 0.1 * form, "exact": exact, "format": form}


if __name__ == "__main__":
    config = TrainConfig(
        model="embedded",
        task="custom",
        max_new_tokens=12,
        generations=10,
        population=16,
        prompts=32,
        sigma=0.02,
        lr=0.02,
        noise_rank=1,  # members share a batch:
        batch_size=512,  # 16 members of 32 prompts
        output="runs/own-reward",
        overwrite=True,
    )
    summary = Trainer(config, data=QUESTIONS, reward=reward).train()
    print(f"held-out reward {summary['base']:.2f} -> {summary['final']:.2f}; {report(config.output)}")
