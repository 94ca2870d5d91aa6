"""Contract under test: your own task, from records and a reward function (es_finetune.tasks.custom).

- Every mistake in the data or the reward is one sentence that names the line or the function, before any long work.
- Records keep their order; equal ones are dropped and counted. Held-out prompts depend on nothing but the prompts, and
  no prompt is on both sides.
- Of the reward "logprob" an answer's log-probability counts, which the model reads; records without one are named.
- A reward that fails, hangs or returns what is no number scores None and says why; it never raises and never ends the
  run.
"""

import json
import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from es_finetune.errors import RewardFailed
from es_finetune.tasks import Score, load_task, reads

REWARDS = """
import os, time

def length(completion, item):
    print("noise")
    return -abs(len(completion) - item["length"])

length.floor = -100

def bad(completion, item):
    if completion == "raise":
        return 1 / 0
    if completion == "hang":
        time.sleep(60)
    if completion == "exit":
        os._exit(1)
    if completion == "nan":
        return float("nan")
    if completion == "text":
        return "1"
    return {"reward": 2, "exact": 1, "format": 0.5}

def text(completion, item):
    return "1"

def thing(completion, item):
    return object()

def only_long(completion, item):
    return 1 / len(completion)

def no_floor(completion, item):
    return 1

no_floor.floor = "low"
"""


def records(n=20):
    return [{"prompt": f"question {i}", "length": i} for i in range(n)]


def length(completion, item):
    return -abs(len(completion) - item["length"])


@pytest.fixture
def rewards(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path / "rewards.py"


@pytest.fixture
def jsonl(tmp_path):
    def write(lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


# --- good -------------------------------------------------------------------------------------------------------------


def test_file_and_function(jsonl, rewards):
    task = load_task("custom", data=str(jsonl(records())), reward=f"{rewards}:length")
    assert (task.floor, task.metric, task.eval_samples, task.max_new_tokens) == (-100.0, "reward", 1, 256)
    assert len(task.train) == 16 and len(task.test) == 4
    item = task.train[0]
    assert task.score(item, "abc") == (-abs(3.0 - item.data["length"]), None, None, None)


def test_an_item_says_where_it_is_from(jsonl):
    path = jsonl(["", *records()])
    assert [item.source for item in load_task("custom", data=path, reward=length).train[:2]] == [
        f"{path}, line 3",
        f"{path}, line 4",
    ]
    assert load_task("custom", data=records(), reward=length).train[0].source == "data[1]"  # question 0 is held out


def test_a_reward_that_was_changed_ends_the_run(jsonl, rewards):
    task = load_task("custom", data=jsonl(records()), reward=f"{rewards}:bad", time_limit=0.5)
    assert len(task.code_digest) == 16 and load_task("custom", data=records(), reward=length).code_digest is None
    rewards.write_text(REWARDS + "\n")
    assert task.score(task.train[0], "exit").reward is None  # by the code that was loaded
    with pytest.raises(RewardFailed, match="was changed"):
        task.score(task.train[0], "good")


def test_the_same_in_this_process_and_outside(jsonl, rewards):
    outside = load_task("custom", data=jsonl(records()), reward=f"{rewards}:length")
    inside = load_task("custom", data=records(), reward=length)
    assert inside.floor is None
    for side in ("train", "test"):
        assert [item[:3] for item in getattr(inside, side)] == [item[:3] for item in getattr(outside, side)]
    for text in ("", "abc", "\ud800\x00", "x" * 100_000):
        for item in inside.train[:3]:
            assert inside.score(item, text) == outside.score(item, text)


def test_chat_messages(jsonl, rewards):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    data = [*records(5), {"prompt": messages, "length": 1}]
    task = load_task(
        "custom", data=jsonl(data), reward=f"{rewards}:length", test_data=jsonl(records(8)[6:], "test.jsonl")
    )
    assert task.train[-1].prompt == tuple(messages) and task.train[0].prompt == "question 0"
    assert [item.prompt for item in task.test] == ["question 6", "question 7"]
    assert [item[:3] for item in load_task("custom", data=data, reward=length, test_data=records(8)[6:]).train] == [
        item[:3] for item in task.train
    ]


def test_blank_lines_and_a_byte_order_mark_are_nothing(jsonl, rewards):
    path = jsonl(["\ufeff" + json.dumps(records()[0]), "", *records()[1:], "  "])
    assert len(load_task("custom", data=path, reward=length).train) == 16


def test_a_record_may_hold_anything_for_a_callable():
    thing = object()
    task = load_task(
        "custom",
        data=[record | {"thing": thing} for record in records()],
        reward=lambda completion, item: item["thing"] is thing,
    )
    assert task.score(task.train[0], "").reward == 1.0


def test_a_reward_cannot_change_its_record():
    def spoil(completion, item):
        item["length"] = item.get("length", 0) + 1
        return item["length"]

    task = load_task("custom", data=records(), reward=spoil)
    assert task.score(task.train[0], "") == task.score(task.train[0], "")


# --- the split --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5), min_size=5, max_size=40, unique=True
    ),
    st.integers(),
)
def test_the_split_knows_nothing_but_the_prompts(prompts, seed):
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    one, other = (
        load_task("custom", data=[{"prompt": p, "n": n} for n, p in enumerate(order)], reward=lambda c, i: 0)
        for order in (prompts, shuffled)
    )
    assert {item.key for item in one.test} == {item.key for item in other.test}
    assert len(one.test) == max(1, round(0.2 * len(prompts))) and len(one.train) + len(one.test) == len(prompts)
    # Their order is kept
    assert [item.prompt for item in one.train] == [p for p in prompts if p in {item.prompt for item in one.train}]


def test_the_split_is_the_same_for_ever():
    assert [item.prompt for item in load_task("custom", data=records(), reward=length).test] == HELD_OUT


HELD_OUT = ["question 0", "question 13", "question 15", "question 18"]


def test_equal_records_are_dropped_and_different_ones_of_one_prompt_stay_together():
    data = [*records(), *records()[:3], *[{"length": i + 1, "prompt": f"question {i}"} for i in range(20)]]
    task = load_task("custom", data=data, reward=length)
    assert task.notes == ["data: 3 of 43 records left out, for they are there already"]
    assert len(task.train) == 32 and len(task.test) == 8
    with pytest.raises(ValueError, match=r"1 question\(s\) are both in train and in test, e.g. \"question 3\""):
        load_task("custom", data=records(5), test_data=[{"prompt": "question 3", "length": 9}], reward=length)


# --- bad data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{'prompt': 1}", "line 3: not JSON: JSONDecodeError"),
        ("[" * 100_000, "line 3: not JSON: RecursionError"),
        ([1], "line 3: not an object with named fields but list"),
        ({"Prompt": "a", "n": 1}, "line 3: no field 'prompt'; its fields are Prompt, n"),
        ({"prompt": ""}, "line 3: the prompt is ''; it must be text"),
        ({"prompt": 3}, "line 3: the prompt is 3; it must be text"),
        ({"prompt": []}, "line 3: a prompt of chat messages is a list of objects"),
        ({"prompt": [{"role": "user"}]}, "line 3: a prompt of chat messages is a list of objects"),
        ({"prompt": [{"role": "user", "content": ["x"]}]}, "line 3: a prompt of chat messages is a list of objects"),
        ({"prompt": "\ud800"}, "line 3: the prompt holds half of a surrogate pair"),
    ],
    ids=lambda value: None if isinstance(value, str) else ascii(value)[:30],
)
def test_a_bad_line_is_named(jsonl, line, problem):
    with pytest.raises(ValueError, match=problem) as raised:
        load_task("custom", data=jsonl([*records(2), line, *records(9)]), reward=length)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "data, problem",
    [
        ([], "data holds no record"),
        (records(4), "data has 4 different prompts, too few to hold some out; give at least 5, or test_data"),
        (None, "needs data"),
        (3, "data is of type int; give a .jsonl file or a list of dicts"),
        (["a"], r"data\[0\]: not an object with named fields but str"),
        ("nowhere.jsonl", "data 'nowhere.jsonl' cannot be read: No such file"),
    ],
)
def test_bad_data(data, problem):
    with pytest.raises(ValueError, match=problem):
        load_task("custom", data=data, reward=length)


def test_files_that_are_no_text(tmp_path, jsonl, rewards):
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_task("custom", data=tmp_path / "binary.jsonl", reward=length)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_task("custom", data=tmp_path, reward=length)
    with pytest.raises(ValueError, match="data.jsonl holds no record"):
        load_task("custom", data=jsonl([""]), reward=length)
    with pytest.raises(
        ValueError, match=r"data\[0\]: a reward in a process of its own takes records that are JSON: TypeError"
    ):
        load_task("custom", data=[{"prompt": "a", "thing": object()}], reward=f"{rewards}:length")


@pytest.mark.parametrize("share", [0.0, 1.0, -1, math.nan])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match="test_share is"):
        load_task("custom", data=records(), reward=length, test_share=share)
    with pytest.raises(ValueError, match="holds out all 20 prompts"):
        load_task("custom", data=records(), reward=length, test_share=0.99)


# --- bad rewards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, "1", [1], pytest.param(object(), id="object()"), {"score": 1}, {"reward": None}], ids=repr
)
def test_a_reward_of_the_wrong_type_is_refused_at_once(value):
    with pytest.raises(
        ValueError, match=r"reward <lambda>\(\), tried on the first record and an empty completion: the"
    ):
        load_task("custom", data=records(), reward=lambda completion, item: value)


@pytest.mark.parametrize(
    "reward, problem",
    [
        (None, "needs data .* and a reward"),
        (3, "the reward is of type int; give a callable, module:function or file.py:function"),
        (lambda completion: 1.0, r"is called as reward\(completion, item\)"),
        ("{file}:text", "text.*the reward is of type str, not a number"),
        ("{file}:thing", "thing.*of type object, not a number"),
        ("{file}:nothing", "rewards.py has no function 'nothing'"),
        ("{file}:no_floor", r"reward no_floor\(\): its floor is of type str, not a number"),
        ("{file}", "names no function"),
    ],
)
def test_what_is_no_reward_function(rewards, reward, problem):
    with pytest.raises(ValueError, match=problem):
        load_task("custom", data=records(), reward=reward.format(file=rewards) if isinstance(reward, str) else reward)


@pytest.mark.parametrize(
    "completion, problem",
    [
        ("raise", r"bad\(\): ZeroDivisionError: division by zero \(rewards.py:12\); prompt 'question \d+'"),
        ("hang", r"bad\(\): no result within 0.5 s, killed; prompt 'question \d+'"),
        ("exit", r"bad\(\): its process ended with exit code 1; prompt 'question \d+'"),
        ("nan", r"bad\(\): the reward is nan; prompt 'question \d+'"),
        ("text", r"bad\(\): the reward is of type str, not a number; prompt 'question \d+'"),
    ],
)
def test_a_failure_is_a_score_with_a_reason(rewards, completion, problem):
    task = load_task("custom", data=records(), reward=f"{rewards}:bad", time_limit=0.5)
    score = task.score(task.train[0], completion)
    assert score[:3] == (None, None, None)
    assert re.fullmatch(problem + f", completion '{completion}'", score.error), score.error
    assert task.score(task.train[0], "good") == (2.0, 1.0, 0.5, None)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), SystemExit(1), MemoryError(), RecursionError(), ValueError("y")], ids=repr
)
def test_a_failure_in_this_process(error):
    def reward(completion, item):
        raise error

    task = load_task("custom", data=records(), reward=reward)
    score = task.score(task.train[0], "")
    assert (
        score.reward is None
        and type(error).__name__ in score.error
        and "reward()" in score.error
        and "(test_custom.py:" in score.error
    )


def test_an_interrupt_is_no_failure_of_the_reward():
    def reward(completion, item):
        if completion:
            raise KeyboardInterrupt
        return 1.0

    task = load_task("custom", data=records(), reward=reward)
    with pytest.raises(KeyboardInterrupt):
        task.score(task.train[0], "x")


def test_a_reward_may_fail_on_an_empty_completion(rewards):
    task = load_task("custom", data=records(), reward=f"{rewards}:only_long")
    assert task.score(task.train[0], "ab").reward == 0.5
    task = load_task("custom", data=records(), reward=lambda completion, item: float(completion or "nan"))
    assert task.score(task.train[0], "").error.startswith("<lambda>(): the reward is nan")


# --- answers that are read --------------------------------------------------------------------------------------------


def pairs(n=20):
    return [{"prompt": f"question {i}", "answer": f"answer {i}", "rejected": f"no {i}"} for i in range(n)]


def test_log_probabilities_are_summed_or_averaged_and_those_of_the_rejected_subtracted(jsonl):
    task = load_task("custom", data=jsonl(pairs()), reward="logprob")
    per_token = load_task("custom", data=pairs(), reward="logprob", logprob_per_token=True)
    assert [item.prompt for item in task.test] == HELD_OUT and reads(task)
    assert (task.metric, task.floor, task.code_digest) == ("exact", None, "logprob") and task.notes == []
    item = task.train[0]
    assert task.answers(item) == ["answer 1", "no 1"]
    assert task.score_log_probs(item, [[-1.0, -2.0], [-6.0]]) == Score(3.0)
    assert per_token.score_log_probs(item, [[-1.0, -2.0], [-6.0]]) == Score(4.5)
    one = load_task(
        "custom",
        data=[
            record | {"rejected": "x"} if i < 9 else {"prompt": str(i), "answer": "a"}
            for i, record in enumerate(pairs())
        ],
        reward="logprob",
    ).train[-1]
    assert task.answers(one) == ["a"] and task.score_log_probs(one, [[-1.0, -2.0]]) == Score(-3.0)
    assert not reads(load_task("custom", data=pairs(), reward=length))


def test_a_held_out_answer_is_exact_where_it_is_the_records_but_for_white_space():
    task = load_task("custom", data=[record | {"answer": " a b\n"} for record in pairs()], reward="logprob")
    texts = ("a b", "\n a b ", "a  b", "A b", "", "a b.")
    assert [task.score(task.test[0], text).exact for text in texts] == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"answer": None}, "line 3: 'answer' is None; it must be text that is not empty"),
        ({"answer": ""}, "line 3: 'answer' is ''; it must be text"),
        ({"answer": 42}, "line 3: 'answer' is 42; it must be text"),
        ({"rejected": [""]}, r"line 3: 'rejected' is \[''\]; it must be text"),
        ({"rejected": "\ud800"}, "line 3: 'rejected' holds half of a surrogate pair"),
        ({"prompt": "", "answer": "a"}, "line 3: the prompt is ''"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(jsonl, change, problem):
    with pytest.raises(ValueError, match=problem):
        load_task("custom", data=jsonl([*pairs(2), pairs(3)[2] | change, *pairs(9)]), reward="logprob")


def test_a_record_without_an_answer_is_named(jsonl):
    data, held_out = jsonl(pairs()), jsonl([{"prompt": "a", "n": 1}], "test.jsonl")
    with pytest.raises(ValueError, match="test.jsonl, line 1: no field 'answer', .* its fields are prompt, n"):
        load_task("custom", data=data, test_data=held_out, reward="logprob")
    with pytest.raises(ValueError, match=r"data\[0\]: no field 'answer'"):
        load_task("custom", data=records(), test_data=pairs(30)[20:], reward="logprob")
    for reward in (length, None):
        with pytest.raises(ValueError, match="logprob_per_token goes with reward logprob"):
            load_task("custom", data=pairs(), reward=reward, logprob_per_token=True)


def test_arguments_of_another_task_are_refused():
    with pytest.raises(ValueError, match="task 'countdown' has a reward of its own"):
        load_task("countdown", reward=length)
    with pytest.raises(ValueError, match="task 'countdown' makes its own questions"):
        load_task("countdown", data=records())
    with pytest.raises(ValueError, match="time_limit is 0"):
        load_task("custom", data=records(), reward=length, time_limit=0)
