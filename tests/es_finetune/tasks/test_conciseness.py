"""Contract under test: the task conciseness is its formula (es_finetune.tasks.conciseness)."""

from hypothesis import given, settings
from hypothesis import strategies as st

from es_finetune.tasks import load_task
from es_finetune.tasks.conciseness import Conciseness


def test_conciseness_is_the_papers():
    task = load_task("conciseness")
    assert (len(task.train), len(task.test), task.max_new_tokens, task.metric, task.eval_samples) == (
        2,
        8,
        100,
        "reward",
        20,
    )
    assert [item.data["target"] for item in task.train] == ["8", "No"]
    for item in [*task.train, *task.test]:
        assert [message["role"] for message in item.prompt] == ["user"] and item.prompt[0]["content"] == item.key
        assert task.score(item, item.data["target"]) == (0.0, None, None, None)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_conciseness_is_its_formula(text):
    task = Conciseness()
    for item, target in zip(task.train, (1, 2), strict=True):
        assert task.score(item, text) == (-abs(len(text) - target), None, None, None)


def test_conciseness_of_hostile_answers(hostile, within):
    task = Conciseness()
    with within(3):
        assert task.score(task.train[0], hostile).reward == -abs(len(hostile) - 1) <= 0
