"""A LoRA adapter of PEFT, tuned by the optimizer in a loop of your own, and saved as PEFT saves it.

The command line does it by `--lora_rank`: docs/guides/lora.md.

python examples/lora.py
"""

import peft

from es_finetune import EvolutionStrategy
from toy import load, reward_of

model, tokenizer = load()
model = peft.get_peft_model(
    model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
)
model.print_trainable_parameters()

# Parameters that do not require grad, those of the base model, are left out.
optimizer = EvolutionStrategy(model.named_parameters(), sigma=0.03, lr=0.03, population=16, seed=0)
means = []
for generation in range(10):
    means.append(optimizer.step(lambda: reward_of(model, tokenizer)))
    print(f"generation {generation}: mean reward {means[-1]:.3f}")

model.save_pretrained("runs/lora")
print(f"the tuned adapter: {reward_of(model, tokenizer):.3f}, in runs/lora")
