"""Contract under test: the progress of a run.

On a terminal a live view: a bar with generations and the time left, the rewards and the best so far, what is being
done, and a sample answer; no line of it is broken inside a word, nor is a message above it. In a pipe a plain line for
the first generation, every tenth part and the last, without escape codes, and each sample answer once. The time left is
what the generations since the first took, evals on the held-out items included. Within a generation the live view moves
with every member; a pipe gets nothing of that. Messages stay, as they are, in both.
"""

import io
import json
import logging
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from es_finetune.monitor.progress import Progress, duration, show_messages, terminal, value

ROW = {"reward_mean": 0.5123, "reward_max": 0.9, "exact_mean": None, "seconds": 60.0, "share_outside": 0.0043}


class Run:
    """What Progress sees of a Trainer: generations that take 60 s, each followed by an eval of 12 s, after 100 s for
    the base model."""

    def __init__(self, generations, metric="exact", held_out=0.4321, begin=0):
        self.config, self.task = SimpleNamespace(generations=generations), SimpleNamespace(metric=metric)
        self.generation, self.rows, self.evals = begin, [], [{metric: held_out, "seconds": 100.0}]
        self.folder = Path("/nonexistent")
        self.held_out = self.evals[0]

    def after(self, progress, row):
        self.rows.append({**row, "generation": self.generation})
        self.evals.append({**self.held_out, "seconds": 12.0})
        self.generation += 1
        progress.on_generation(self, self.rows[-1])


def run(generations, metric="exact", held_out=0.4321, row=ROW, begin=0, **console):
    """What is written by such a run."""
    out = io.StringIO()
    screen = Console(file=out, highlight=False, soft_wrap=True, **console)
    trainer, progress = Run(generations, metric, held_out, begin), Progress(screen)
    with show_messages(screen):
        progress.on_start(trainer)
        for _ in range(begin, generations):
            trainer.after(progress, row)
        logging.getLogger("es_finetune.trainer").info("[bold]a note[/bold] 7")
        progress.on_end(trainer, None)
    return out.getvalue()


def test_in_a_pipe_a_plain_line_every_tenth():
    *lines, note = run(500).splitlines()
    assert [line.split("/")[0].strip() for line in lines] == ["1", *(str(50 * i) for i in range(1, 11))]
    assert lines[1] == " 50/500  reward 0.512  held-out exact 43.2%, best 43.2%  62 min, 9.0 h left"  # 450 * 72 s
    assert lines[-1].startswith("500/500") and " 0 s left" in lines[-1]
    assert note == "[bold]a note[/bold] 7" and "\x1b" not in "".join(lines)
    assert len(run(3).splitlines()) == 4  # short runs: every generation


def test_the_first_estimate_is_the_generation_itself():
    assert " 8.3 h left" in run(500).splitlines()[0]  # 499 * 60 s, without the 100 s before it


def test_a_resumed_run_counts_its_own_seconds_only():
    lines = run(500, begin=398).splitlines()
    assert lines[0].startswith("400/500") and " 2.0 h left" in lines[0]  # 100 * 72 s


@pytest.mark.parametrize(
    "metric, held_out, row",
    [("exact", 1.0, ROW), ("reward", -123.456, {**ROW, "reward_mean": -123.456}), ("exact", None, ROW)],
)
def test_the_line_fits_80_columns(metric, held_out, row):
    lines = run(500, metric, held_out, row).splitlines()
    assert max(map(len, lines)) < 80


def view(progress, width=80):
    """The lines of the live view as a terminal of that width shows them."""
    screen = Console(width=width, file=io.StringIO(), soft_wrap=True, force_terminal=True, color_system="standard")
    screen.print(progress.view.get_renderable(), soft_wrap=False)
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", screen.file.getvalue()).splitlines()]


@pytest.fixture
def watched():
    """A run that began again at its fourth generation, and its progress on a terminal."""
    progress, trainer = Progress(Console(file=io.StringIO(), force_terminal=True, width=80)), Run(500, begin=3)
    trainer.evals[0]["seconds"] = 0.0
    progress.on_start(trainer)
    yield progress, trainer
    progress.on_end(trainer, None)


def test_the_live_view_is_a_bar_and_plain_lines_that_move_with_every_member(watched):
    progress, trainer = watched
    progress.on_activity(trainer, "answering 720 held-out prompts")
    bar, doing = view(progress)
    assert re.fullmatch("[━╺╸]+ 3/500", bar) and doing == "answering 720 held-out prompts"
    trainer.after(progress, {**ROW, "reward_mean": 0.7})
    trainer.after(progress, ROW)
    progress.on_activity(trainer, "member 30/30")
    bar, results, doing = view(progress)
    assert re.fullmatch("[━╺╸]+   5/500  2 min, 9.9 h left", bar) and len(bar) == 80  # 495 * 72 s
    assert results == "reward 0.512, best 0.700  held-out exact 43.2%, best 43.2%" and doing == "member 30/30"
    trainer.evals.append({"exact": 0.2, "seconds": 0.0})
    progress.on_eval(trainer, {"generation": 5})
    assert view(progress)[1:] == ["reward 0.512, best 0.700  held-out exact 20.0%, best 43.2%"]


@pytest.mark.parametrize("width", [20, 30, 50, 80])
def test_no_line_is_broken_inside_a_word(watched, width):
    progress, trainer = watched
    trainer.after(progress, ROW)
    progress.on_activity(trainer, "answering 720 held-out prompts")
    broken = view(progress, width)
    words = " ".join(broken[1:]).split()
    assert words == " ".join(view(progress, 200)[1:]).split() and max(map(len, broken)) <= width


def test_a_message_on_a_terminal_is_broken_between_words_above_the_view():
    text = "estimate: 4.7 h for 6 generations of 1.2 s and 3 evals on the held-out prompts of 0.1 s; peak memory"
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80, soft_wrap=True)
    progress, trainer = Progress(screen), Run(500)
    with show_messages(screen):
        progress.on_start(trainer)
        logging.getLogger("es_finetune.trainer").info(text)
        progress.on_end(trainer, None)
    assert textwrap.fill(text, 80) + "\n" in screen.file.getvalue().replace(" \n", "\n")


def test_messages_and_view_share_one_console():
    assert terminal() is terminal(stderr=False) is not terminal(stderr=True)


def answers(folder, name, *rows):
    (folder / "answers").mkdir(exist_ok=True)
    (folder / "answers" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_each_eval_shows_another_sample_answer_and_a_pipe_each_once(tmp_path):
    out = io.StringIO()
    progress, trainer = Progress(Console(file=out, soft_wrap=True)), Run(2)
    trainer.folder = tmp_path
    rows = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}", "reward": 0.5, "exact": n % 2} for n in range(3)]
    answers(tmp_path, "base", *rows)
    answers(tmp_path, "tuned", *({**row, "exact": None} for row in rows))
    progress.on_start(trainer)
    progress.on_eval(trainer, {"generation": 0})
    trainer.after(progress, ROW)
    trainer.after(progress, ROW)
    progress.on_eval(trainer, {"generation": 2})
    progress.on_end(trainer, None)
    first, sample, second, last = out.getvalue().splitlines()
    assert first.startswith("1/2") and second.startswith("2/2")
    assert sample == "sample: 0 + 0 = -> 0 (wrong)" and last == "sample: 2 + 2 = -> 4 (reward 0.500)"


def test_a_sample_is_one_short_line_of_printable_words(watched, tmp_path):
    progress, trainer = watched
    trainer.folder = tmp_path
    row = {
        "prompt": [{"role": "user", "content": "What is\nseven times eight, please? " * 9}],
        "exact": 1.0,
        "reward": 1.0,
    }
    for completion, shown in (
        ("Let me think about it. " * 50 + "\n<answer>\x1b[31m56</answer>", "… <answer> [31m56</answer>"),
        ("x" * 200 + "56", "…" + "x" * 23 + "56"),
        ("", ""),
        ("五" * 99, "… " + "五" * 12),
    ):
        answers(tmp_path, "base", {**row, "completion": completion})
        progress.on_eval(trainer, {"generation": 0})
        line = progress.view.lines[1]
        assert line.startswith("sample: What is seven times … -> ") and line.endswith(" (right)")
        assert len(line) < 80 and line.isprintable() and line[32:-8].strip() == shown


def test_one_object_serves_one_run_after_the_other():
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    progress = Progress(screen)
    for _ in range(2):
        trainer = Run(500)
        progress.on_start(trainer)
        for _ in range(2):
            trainer.after(progress, ROW)
        assert [bar.description for bar in progress.view.tasks] == ["  2/500  4 min, 10.0 h left"]
        progress.on_end(trainer, None)


def test_a_pipe_gets_nothing_of_the_members():
    out = io.StringIO()
    progress, trainer = Progress(Console(file=out)), Run(500)
    progress.on_start(trainer)
    progress.on_activity(trainer, "member 7/30, generation about 14 min")
    progress.on_end(trainer, None)
    assert not out.getvalue().strip()


def test_messages_are_shown_from_a_level_on_and_only_while_it_is_asked_for():
    out, logger = io.StringIO(), logging.getLogger("es_finetune.anything")
    with show_messages(Console(file=out), logging.WARNING):
        logger.info("an estimate")
        logger.warning("a [warning] of 3 %s", "words")
    logger.warning("too late")
    assert out.getvalue() == "a [warning] of 3 words\n"


def test_numbers_and_times_in_words():
    assert [value("exact", x) for x in (0, 0.5, 1, None)] == ["0.0%", "50.0%", "100.0%", "?"]
    assert [value("reward", x) for x in (0.12345, -9.5, 123.456, 1e7)] == ["0.123", "-9.500", "123.5", "1e+07"]
    assert [duration(s) for s in (0, 119, 120, 7100, 7200, 360_000)] == [
        "0 s",
        "119 s",
        "2 min",
        "118 min",
        "2.0 h",
        "100 h",
    ]
