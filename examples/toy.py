"""What the examples start from, in place of your own model and reward: the model of 108,000 parameters that ships with
the package, and the log-probability of five answers. Nothing is downloaded."""

import torch

from es_finetune.models.load import load_model

TEXTS = ["^3,4,7=14:3+4+7$", "^2,5,9=16:2+5+9$", "^8,1,6=15:8+1+6$", "^9,7,2=65:9*7+2$", "^6,6,1=37:6*6+1$"]
PROMPT = 10  # characters, which are tokens


def load():
    """(model, tokenizer); ^ and $ are its tokens for the beginning and the end of a text."""
    model, tokenizer, _ = load_model("embedded", device="cpu")
    return model, tokenizer


@torch.no_grad()
def reward_of(model, tokenizer):
    """Mean log-probability of a token of the answers; higher is better."""
    ids = tokenizer(TEXTS, return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, :PROMPT] = -100  # not counted
    return -model(ids, labels=labels).loss.item()
