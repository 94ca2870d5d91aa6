"""Contract under test: every task that grades in this process gives any text a finite score, at once, and never raises.
(Graders in a process of their own: test_mathematics.py, test_reasoning.py.)"""

import pytest
from hypothesis import HealthCheck, example, given, settings

from es_finetune.tasks import load_task

from .conftest import HOSTILE, TEXTS

RECORDS = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(6)]
TASKS = {
    "countdown": {},
    "countdown-char": {},
    "conciseness": {},
    "short-answers": {},
    "custom": {"data": RECORDS, "reward": lambda completion, record: float(record["answer"] in completion)},
    "custom, logprob": {"data": RECORDS, "reward": "logprob"},
}


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return load_task(request.param.split(",")[0], **TASKS[request.param])


def with_examples(test):
    for text in HOSTILE:
        test = example(f"</think>\n<answer>{text}</answer>")(example(text)(test))
    return test


@with_examples
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_text_has_a_score(task, is_a_score, within, text):
    with within(5):
        score = task.score(task.train[0], text)
    assert is_a_score(score) and score.error is None
