"""Contract under test: what workers do alike is a function of the plan, the generation and the members' lines."""

import dataclasses
from types import SimpleNamespace

import pytest

from es_finetune.tasks import Item
from es_finetune.workers.plan import Plan

TASK = SimpleNamespace(
    train=[Item(f"{k}?", k) for k in range(20)], test=[Item(f"{k}!", k) for k in range(7)], floor=-1.0
)
PLAN = Plan(
    TASK,
    population=4,
    prompts=5,
    eval_items=3,
    seed=7,
    shaping="zscore",
    antithetic=False,
    stop_on_reward_error=False,
    every_member=False,
)


def line(member, *rewards, generation=0):
    return {"generation": generation, "member": member, "rewards": list(rewards)}


def test_the_questions_of_a_generation_are_drawn_by_seed_and_number_alone():
    again = dataclasses.replace(PLAN, population=6, shaping="ranks")
    draws = [PLAN.training(generation) for generation in range(50)]
    assert draws == [again.training(generation) for generation in range(50)]
    assert all(len({item.prompt for item in draw}) == 5 for draw in draws)
    assert {item.prompt for draw in draws for item in draw} == {item.prompt for item in TASK.train}
    assert draws != [dataclasses.replace(PLAN, seed=8).training(generation) for generation in range(50)]
    assert dataclasses.replace(PLAN, prompts=0).training(3) == TASK.train


def test_random_numbers_are_a_generations_own():
    assert PLAN.sampling(3) is None
    plan = dataclasses.replace(PLAN, temperature=0.5)
    drawn = [plan.sampling(generation) for generation in range(50)]
    assert drawn == [dataclasses.replace(plan, population=6).sampling(generation) for generation in range(50)]
    assert {one.temperature for one in drawn} == {0.5} and len({one.seed for one in drawn}) == 50
    assert dataclasses.replace(plan, seed=8).sampling(0) != drawn[0]


def test_held_out_questions_are_the_first_or_all():
    assert PLAN.held_out == TASK.test[:3] and dataclasses.replace(PLAN, eval_items=0).held_out == TASK.test


def test_members_that_a_journal_holds_are_known_unless_their_failure_stops_the_run_again():
    lines = [line(0, 1.0), line(2, None), line(1, 0.5, generation=1)]
    assert PLAN.known(lines, 0) == {0: lines[0], 2: lines[1]} and PLAN.left({0, 2}) == [1, 3]
    assert dataclasses.replace(PLAN, stop_on_reward_error=True).known(lines, 0) == {0: lines[0]}


@pytest.mark.parametrize("shaping", ["zscore", "ranks", "per_prompt"])
def test_an_update_comes_of_the_lines_with_the_floor_for_a_reward_that_failed(shaping):
    lines = [line(0, 1.0, 0.0), line(1, None, 2.0), line(3, 3.0, 1.0)]
    update, by_prompt = dataclasses.replace(PLAN, shaping=shaping).update(5, lines, dropped=[2])
    assert by_prompt == [[1.0, 0.0], [-1.0, 2.0], [3.0, 1.0]]
    assert (update.generation, update.scored, update.dropped) == (5, 3, (2,))
    assert update.reward == 1.0 and update.z[2] == 0 and update.z[3] == max(update.z)
