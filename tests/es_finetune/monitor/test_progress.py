"""Contract under test: the progress of a run.

On a terminal one live line, below 80 columns in ordinary runs and cut, not wrapped, in narrower ones; in a pipe a plain
line for the first generation, every tenth part and the last, without escape codes. The time left is what the
generations since the first took, evals on the held-out items included. Within a generation the live line moves with
every member; a pipe gets nothing of that. Messages stay, as they are, in both.
"""

import io
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console

from es_finetune.monitor.progress import Progress, duration, show_messages, value

ROW = {"reward_mean": 0.5123, "reward_max": 0.9, "exact_mean": None, "seconds": 60.0, "share_outside": 0.0043}


class Run:
    """What Progress sees of a Trainer: generations that take 60 s, each followed by an eval of 12 s, after 100 s for
    the base model."""

    def __init__(self, generations, metric="exact", held_out=0.4321, begin=0):
        self.config, self.task = SimpleNamespace(generations=generations), SimpleNamespace(metric=metric)
        self.generation, self.rows, self.evals = begin, [], [{metric: held_out, "seconds": 100.0}]
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
    assert lines[1] == " 50/500  reward 0.512  held-out exact 43.2%  62 min, 9.0 h left  outside 0.4%"  # 450 * 72 s
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


def test_a_terminal_shows_one_live_line_and_cuts_it():
    wide = run(500, force_terminal=True, width=100)
    # The last state and the note
    assert "500/500  reward 0.512  held-out exact 43.2%" in wide and wide.count("\n") <= 3
    assert "[bold]a note[/bold] 7" in wide
    narrow = run(500, force_terminal=True, width=30)
    assert "…" in narrow and "outside" not in narrow


def test_the_live_line_moves_with_every_member():
    out = io.StringIO()
    progress, trainer = Progress(Console(file=out, force_terminal=True, width=80)), Run(500, begin=3)
    trainer.evals[0]["seconds"] = 0.0

    def line():
        return progress.bar.tasks[0].description

    progress.on_start(trainer)
    progress.on_activity(trainer, "answering 720 held-out prompts")
    assert line() == "3/500  answering 720 held-out prompts"
    progress.on_activity(trainer, "member 7/30, generation about 14 min")
    assert line() == "3/500  member 7/30, generation about 14 min"
    trainer.after(progress, ROW)
    progress.on_activity(trainer, "member 30/30")
    now = line()
    assert now == "  4/500  reward 0.512  held-out exact 43.2%  72 s, 8.3 h left  member 30/30" and len(now) < 80
    progress.on_eval(trainer, {})
    assert line() == f"{now.partition('  member')[0]}  outside 0.4%"
    progress.on_end(trainer, None)


def test_one_object_serves_one_run_after_the_other():
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    progress = Progress(screen)
    for _ in range(2):
        trainer = Run(500)
        progress.on_start(trainer)
        for _ in range(2):
            trainer.after(progress, ROW)
        assert [bar.description for bar in progress.bar.tasks] == [progress.line] and " 10.0 h left" in progress.line
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
