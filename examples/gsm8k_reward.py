"""A reward for GSM8K (arXiv:2110.14168), and for any task whose answer is one number at the end.

Write the questions of the data set, {"question": ..., "answer": "... #### 72"} a line, as those of a run. Then train:

    python examples/gsm8k_reward.py < train.jsonl > items.jsonl
    es-finetune train --model MODEL --data items.jsonl --reward examples/gsm8k_reward.py:reward --max_new_tokens 512
"""

import json
import re
import sys
from fractions import Fraction

ASK = "Think step by step. End with a line that holds #### and the answer, a plain number."
NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"


def number(text: str) -> Fraction | None:
    """Its exact value: "$1,200.50" is 1200.5. None where it is too long to be an answer."""
    return Fraction(re.sub(r"[$,]", "", text)) if len(text) <= 40 else None


def reward(completion: str, item: dict) -> dict:
    """1 for the right number in the last line, 0.1 for the form alone. The text is never evaluated."""
    ending = re.search(rf"####\s*({NUMBER})\.?\s*$", completion)
    value = number(ending[1]) if ending else None
    exact = value is not None and value == number(item["answer"])
    return {"reward": 0.9 * exact + 0.1 * (ending is not None), "exact": exact, "format": ending is not None}


reward.floor = 0.0


def item(record: dict) -> dict:
    """A question as a message, so that an Instruct model gets its chat template."""
    answer = record["answer"].rpartition("####")[2].strip()
    return {"prompt": [{"role": "user", "content": f"{record['question']}\n{ASK}"}], "answer": answer}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(item(json.loads(line))))
