"""Contract under test: report.html.

One page from a run's folder: self-contained (no script, no address, nothing fetched), under 3 MB for 500 generations,
the same bytes for the same folder, whole or not there. It says what the run's files say (headline with intervals,
warnings once with their generations, tensors that lost their noise, failed rewards, answers of base and tuned for the
same prompts, environment and command line) and of what they do not say, that it was not measured or recorded. Beside
each figure stands what its numbers are called in the files, and what that means. Text that a model or a user wrote can
neither become markup nor break it.
"""

import dataclasses
import errno
import html
import json
import math
import random
import re
import shlex
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from es_finetune import cli
from es_finetune.commands.report import report
from es_finetune.config import TrainConfig
from es_finetune.monitor import plots
from es_finetune.monitor.health import FAITHFUL
from es_finetune.monitor.rows import EvalRow, GenerationRow, Health, meanings
from es_finetune.optim.update import Update
from es_finetune.runs.files import read_rows
from es_finetune.runs.log import Generation, SealedLines

HOSTILE = "<script>alert(1)</script>\x00\x1b[31m\ud83d\u202eabc</pre><img src=x onerror=alert(1)>&amp;{{ 7*7 }}"


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, generations=500, asked=None, *, metric="exact", health=True, finished=True, warnings=True, seed=0):
    """A folder as a run of countdown with N = 30 leaves it, of made-up numbers."""
    draws = random.Random(seed)
    folder.mkdir(parents=True)
    asked = asked or generations
    config = {
        "output": str(folder),
        "task": "countdown",
        "model": "Qwen/Qwen2.5-1.5B-Instruct",
        "population": 30,
        "generations": asked,
        "sigma": 1e-3,
        "lr": 5e-4,
        "sigma_schedule": "constant",
        "lr_schedule": "constant",
        "shaping": "zscore",
        "antithetic": False,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "master": "fp32",
        "dtype": "auto",
        "tune": [],
        "freeze": ["*.embed_tokens.*"],
        "prompts": 0,
        "batch_size": 100,
        "eval_every": 25,
        "health_every": 10,
        "seed": 7,
        "data": None,
        "reward": None,
        "threads": 0,
        "device": "auto",
        "report_to": ["tensorboard"],
        "save_model": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    header = {
        "run": 2,
        "metric": metric,
        "es_finetune": "0.3.0",
        "noise_version": 1,
        "config": config,
        "model": {"class": "Qwen2ForCausalLM", "parameters": 1_543_714_304},
        "versions": {"python": "3.12.3", "torch": "2.13.0", "transformers": "5.23.0", "es_kernels": "0.3.0"},
        "machine": {"processor": "AMD EPYC, 64 threads", "gpu": "NVIDIA H200", "driver": "580.95.05"},
        "base_fingerprint": "00ba5e" * 2 + "0000",
        "theta": "0" * 16,
        "live": "1" * 16,
    }
    log = SealedLines(folder / "run.log", sync=False)
    log.append(header)
    rows, evals = [], []

    def learned(done):
        return 0.12 + 0.5 / (1 + math.exp(-(done - 160) / 60))

    def add_eval(done):
        share = learned(done) + draws.gauss(0, 0.008)
        half = 1.96 * math.sqrt(share * (1 - share) / 1000)
        exact = share if metric == "exact" else None
        value = share if metric == "exact" else 100 * share - 80
        half = half if metric == "exact" else 3.0
        evals.append(
            {
                "generation": done,
                "items": 1000,
                "reward": 0.1 + 0.9 * share if metric == "exact" else value,
                "exact": exact,
                "format": 0.9,
                "answer_tokens": 300.0 - done / 5,
                "answer_tokens_q10": 200.0 - done / 5,
                "answer_tokens_q90": 450.0 - done / 5,
                "low": value - half,
                "high": value + half,
                "seconds": 41.0,
            }
        )

    add_eval(0)
    for generation in range(generations):
        mean, std = learned(generation) * 0.9 + 0.05 + draws.gauss(0, 0.01), 0.02 + 0.01 * draws.random()
        seconds = 62 + draws.gauss(0, 2)
        score, kernels = 0.4 + 0.1 * draws.random(), 0.05 + 0.01 * draws.random()
        generate = seconds - score - kernels - 0.2 - 0.05 * draws.random()
        row = {
            "generation": generation,
            "reward_mean": mean,
            "reward_std": std,
            "reward_min": mean - 2.2 * std,
            "reward_max": mean + 2.1 * std,
            "reward_q25": mean - 0.7 * std,
            "reward_q50": mean,
            "reward_q75": mean + 0.7 * std,
            "exact_mean": mean if metric == "exact" else None,
            "format_mean": 0.9,
            "sigma": 1e-3,
            "lr": 5e-4,
            "seconds": seconds,
            "seconds_generate": generate,
            "seconds_score": score,
            "seconds_kernels": kernels,
            "share_outside": 1 - (generate + score) / seconds,
            "tokens": 480_000 + draws.randrange(90_000),
            "answer_tokens": 320.0 - generation / 5,
            "identical": 0.1 * draws.random() if generation > 300 else 0.0,
            "failed": 0,
            "failed_example": None,
            "theta": f"{draws.getrandbits(64):016x}",
            "live": f"{draws.getrandbits(64):016x}",
            "peak_memory_bytes": 17_400_000_000,
        }
        row["tokens_per_second"] = row["tokens"] / generate
        if health and generation % 10 == 0:
            worst = 0.86 + 0.1 * draws.random()
            row["health"] = {
                "correlation": {
                    "model.norm.weight": [0.36, 0.9],
                    **({"model.layers.3.self_attn.q_proj.bias": [worst, worst + 0.02]} if worst < 0.9 else {}),
                },
                "correlation_min": ["model.norm.weight", 0.36],
                "rms_ratio_min": ["model.norm.weight", 0.97],
                "step_correlation": 0.995 + 0.004 * draws.random(),
                "step_rms": 1e-5,
                "drift": 2e-5 * math.sqrt(generation + 1),
                "drift_relative": 8e-4 * math.sqrt(generation + 1),
            }
        if warnings and generation in (4, 5, 6, 40, 303):
            row["warnings"] = [f"{20 + generation % 7} of 30 members gave identical answers: raise sigma"]
        if warnings and generation == 2:
            row |= {"failed": 3, "failed_example": f"ZeroDivisionError: division by zero, for the answer {HOSTILE!r}"}
        rows.append(row)
        log.append(
            Generation(
                Update(generation, tuple(draws.gauss(0, 1) for _ in range(30)), 30, mean),
                (5e-4,),
                (1e-3,),
                int(row["theta"], 16),
                int(row["live"], 16),
            ).to_json()
        )
        if (generation + 1) % 25 == 0 or (finished and generation + 1 == generations):
            add_eval(generation + 1)
    log.close()
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "evals.jsonl", evals)

    def answers(tuned):
        for i in range(300):
            a, b, c = (draws.randrange(1, 99) for _ in range(3)) if not tuned else (0, 0, 0)
            prompts[i] = prompts.get(i) or [
                {"role": "system", "content": "You are a helpful assistant."},
                {
                    "role": "user",
                    "content": f"Using the numbers [{a}, {b}, {c}], create an equation that equals {a + b - c}. "
                    "Show your work in <think> tags.",
                },
            ]
            exact = float(i % 3 != 0) if tuned else float(i % 3 == 1 or i % 21 == 0)
            text = f"<think>\nLet me try: {i} + {i} - 1.\n</think>\n<answer>{i} + {i} - 1</answer>" + (
                " I wonder whether 3 + 4 works." * 80 if i % 5 == 0 else ""
            )
            yield {
                "prompt": prompts[i],
                "completion": HOSTILE if i in (0, 1) else text,
                "reward": 0.1 + 0.9 * exact if metric == "exact" else -40.0 + 30 * exact,
                "exact": exact if metric == "exact" else None,
            }

    prompts = {}
    write_rows(folder / "answers" / "base.jsonl", answers(False))
    if finished:
        write_rows(folder / "answers" / "tuned.jsonl", answers(True))
        summary = {
            "task": "countdown",
            "model": config["model"],
            "metric": metric,
            "held_out": 1000,
            "generations": generations,
            "seconds_total": 62.5 * generations,
            "backend": "cuda",
            "noise_version": 1,
            "seed": 7,
            "fingerprint": rows[-1]["theta"],
            "live": rows[-1]["live"],
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "model").mkdir()
    return folder


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside <style>."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        self.text += " " if tag in ("td", "th", "dt", "dd", "div") else ""

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "countdown")
    return report(folder)


@pytest.fixture
def no_plots(monkeypatch):
    """For what only the text of a page shows: drawing takes nine tenths of the time."""
    monkeypatch.setattr("es_finetune.monitor.report.svg", lambda label, draw: "<svg></svg>")


def page(folder):
    return Page(report(folder))


def assert_self_contained(path):
    text, parsed = path.read_text(encoding="utf-8"), Page(path)
    assert not {"script", "iframe", "object", "embed", "link", "img", "base", "form", "foreignobject"} & {
        tag for tag, _ in parsed.tags
    }
    for tag, attributes in parsed.tags:
        for name, content in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert content.startswith("#"), (tag, name, content)
            assert "url(" not in (content or "") or "url(#" in content
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "@import" not in style and "url(" not in style
    assert re.findall(r"https?://", text) == []
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))  # of two plots with one id the second would draw with the first one's parts
    used = {
        match
        for _, attributes in parsed.tags
        for content in attributes.values()
        for match in re.findall(r"^#(.+)|url\(#([^)]+)\)", content or "")
    }
    assert {a or b for a, b in used} <= set(ids)


def test_shares_of_time_count_every_worker(tmp_path, no_plots):
    """Parts are summed over the workers, seconds are the clock's."""
    folder, shown = make_run(tmp_path / "run", generations=5), []
    parts = [f"seconds_{part}" for part in ("generate", "score", "kernels")]
    rows = read_rows(folder / "metrics.jsonl")
    for workers in (1, 4):
        for row in rows:
            row |= {"workers": workers} | {part: workers * row[part] for part in parts}
        write_rows(folder / "metrics.jsonl", rows)
        axes = Figure().subplots()
        plots.draw_time(axes, rows)
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        shown.append([re.search(r"outside of answering and scoring ([\d.]+%)", page(folder).text)[1], *labels])
    assert shown[0] == shown[1] and shown[0][0] != "0.00%"


def test_one_small_page_that_needs_nothing_else(long):
    assert long.name == "report.html" and not list(long.parent.glob("*.tmp"))
    assert_self_contained(long)
    assert long.stat().st_size < 3_000_000
    assert sum(tag == "svg" for tag, _ in Page(long).tags) == 9


def test_the_same_folder_gives_the_same_bytes(long):
    before = long.read_bytes()
    assert report(long.parent).read_bytes() == before


def test_it_says_what_the_files_say(long):
    text = Page(long).text
    evals, rows = (read_rows(long.parent / name) for name in ("evals.jsonl", "metrics.jsonl"))
    for row in (evals[0], evals[-1]):
        assert f"{row['exact']:.1%}" in text and f"{row['low']:.1%} to {row['high']:.1%}" in text
    assert "1,000 items" in text and "500 generations" in text and "not finished" not in text
    # of 300 items those divisible by 3 were right before only if also by 21, and never after; one above a multiple
    # always; the rest only after
    assert (
        "Of 300 answers compared, 100 became right, 15 became wrong, 185 scored as before (p < 0.001 by the sign test)."
        in text
    )
    assert "overlap" not in text and "shows no change" not in text
    assert rows[-1]["theta"] in text and rows[-1]["live"] in text and "00ba5e" in text
    assert "2.13.0" in text and "Qwen2ForCausalLM" in text and "*.embed_tokens.*" in text
    size = (long.parent / "run.log").stat().st_size
    assert f"{size / 1000:,.0f} kB" in text
    assert f"es-finetune replay {long.parent}" in text and "AutoModelForCausalLM.from_pretrained" in text


def test_it_names_machine_versions_and_the_command_line(long):
    text = Page(long).text
    for told in (
        "GPU NVIDIA H200",
        "GPU driver 580.95.05",
        "processor AMD EPYC, 64 threads",
        "Python 3.12.3",
        "torch 2.13.0",
        "transformers 5.23.0",
        "es_kernels 0.3.0",
        "kernels served by cuda",
    ):
        assert f" {told} " in text
    assert "versions torch" not in text and "machine gpu" not in text


def test_the_command_line_asks_for_the_same_run(long):
    config = json.loads((long.parent / "config.json").read_text())
    words = re.search(r"<pre>(es-finetune train .*?)</pre>", long.read_text(encoding="utf-8"), re.DOTALL)[1]
    options = cli._parse(shlex.split(html.unescape(words))[1:])
    assert options.pop("command") == "train"
    asked = dataclasses.asdict(TrainConfig(**options))
    assert {name: asked[name] for name in config} == config | {"output": str(long.parent)}


def test_of_an_older_run_what_was_not_recorded_is_called_so(no_plots, tmp_path):
    folder = make_run(tmp_path / "old", 3)
    log = SealedLines(folder / "run.log", sync=False)
    header = {name: value for name, value in log.lines[0].items() if name not in ("machine", "crc")}
    log.clear()
    log.append({**header, "versions": {"torch": "2.13.0"}})
    log.close()
    text = page(folder).text
    assert "GPU not recorded" in text and "Python not recorded" in text and " torch 2.13.0 " in text


def test_beside_each_figure_its_names_in_the_files_are_explained(long):
    text = Page(long).text
    assert text.count("Names in the files") == 9
    for kind, names in (
        (GenerationRow, ("reward_mean", "reward_q25", "answer_tokens", "seconds_kernels", "identical")),
        (EvalRow, ("exact", "answer_tokens_q90")),
        (Health, ("drift_relative", "step_correlation")),
    ):
        for name in names:
            assert f" {name} {meanings(kind)[name]}" in text


def test_a_warning_is_shown_once_with_its_generations(long):
    text = Page(long).text
    assert text.count("members gave identical answers") == 1
    assert "5 times, in generations 5–7, 41, 304" in text


def test_tensors_that_lost_noise_are_named_with_their_worst(long):
    text = Page(long).text
    biases = "model.layers.3.self_attn.q_proj.bias"
    seen = [
        row["health"]["correlation"][biases]
        for row in read_rows(long.parent / "metrics.jsonl")
        if biases in row.get("health", {}).get("correlation", {})
    ]
    (worst, ratio), last = min(seen), seen[-1]
    columns = "tensor lowest correlation rms, realised / meant in generation times seen"
    assert worst < last[0] and f"{columns} {biases} {worst:.3f} {ratio:.3f}" in text
    assert f"under {FAITHFUL}:" in text and "--sigma_for" in text and "a step below 1 is normal" in text


def test_norm_weights_are_counted_and_not_named_among_them(long):
    text = Page(long).text
    assert (
        "Part of the noise is lost in norm weights (1), which are near 1" in text
        and "(lowest correlation 0.36). This is normal, in the paper's setting too" in text
    )
    assert "model.norm.weight" not in text


def number_class(folder):
    """How the tuned model's number is painted: as a gain, a loss, or neither."""
    (_, tuned) = (
        attributes["class"] for tag, attributes in page(folder).tags if attributes.get("class", "").startswith("number")
    )
    return tuned


def test_only_what_is_no_chance_is_painted(no_plots, tmp_path):
    folder = make_run(tmp_path / "short", 3)
    base = {
        "generation": 0,
        "items": 50,
        "reward": 0.3,
        "exact": 0.4,
        "format": None,
        "low": 0.3,
        "high": 0.5,
        "seconds": 1,
    }

    def painted(exact, low, high, answers=None):
        write_rows(folder / "evals.jsonl", [base, {**base, "generation": 3, "exact": exact, "low": low, "high": high}])
        for name in ("base", "tuned"):
            path = folder / "answers" / f"{name}.jsonl"
            path.unlink(missing_ok=True)
            if answers:
                write_rows(
                    path,
                    [
                        {"prompt": str(i), "completion": "x", "reward": 0.0, "exact": float(c)}
                        for i, c in enumerate(answers[name == "tuned"])
                    ],
                )
        return number_class(folder).split()[1:]

    assert painted(0.4, 0.3, 0.5) == painted(0.45, 0.35, 0.55) == []
    assert painted(0.7, 0.6, 0.8) == ["gain"] and painted(0.1, 0.0, 0.2) == ["loss"]
    # The same answers, before and after, say more than two intervals: here that the numbers differ by chance, and here
    # that they do not.
    assert painted(0.7, 0.6, 0.8, ("0000000011", "0000000111")) == [] and painted(0.4, 0.3, 0.5, ("0011", "0011")) == []
    assert painted(0.45, 0.35, 0.55, ("0000000011", "1111111111")) == ["gain"] and painted(
        0.35, 0.25, 0.45, ("11111111", "00000000")
    ) == ["loss"]


def test_failed_rewards_are_counted_and_shown(long):
    text = Page(long).text
    assert (
        "failed on 3 answers, which got the task's floor as reward, or the lowest of their generation if it declares "
        "none." in text
    )
    assert "ZeroDivisionError" in text


def test_what_was_written_by_others_stays_text(long):
    source, text = long.read_text(encoding="utf-8"), Page(long).text
    assert "alert(1)" in text and "<script>" in text and "{{ 7*7 }}" in text  # seen by the reader, as text
    assert "<script" not in source and "<img" not in source
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff\u202e]", source)


def test_samples_are_the_same_prompts_of_every_kind(long):
    text = Page(long).text
    for kind in ("became right", "became wrong", "unchanged"):
        assert text.count(f"Prompt {kind}") == 4
    assert "more characters)" in text and "user: Using the numbers" in text


def test_a_run_of_three_generations(tmp_path):
    folder = make_run(tmp_path / "short", 3, warnings=False)
    text = page(folder).text
    assert_self_contained(folder / "report.html")
    assert "3 generations." in text and "Failed rewards" not in text and "Warnings" not in text


def test_what_may_be_chance_is_called_so(no_plots, tmp_path):
    folder = make_run(tmp_path / "short", 3)
    evals = [
        {
            "generation": g,
            "items": 50,
            "reward": 0.3,
            "exact": e,
            "format": None,
            "low": e - 0.1,
            "high": e + 0.1,
            "seconds": 1,
        }
        for g, e in ((0, 0.4), (3, 0.5))
    ]
    write_rows(folder / "evals.jsonl", evals)
    for after, words, chance in (
        ("1111111110", "8 became right, 1 became wrong, 1 scored as before (p = 0.039 by the sign test).", False),
        ("1111111100", "8 became right, 2 became wrong, 0 scored as before (p = 0.109 by the sign test).", True),
        ("0000000011", "0 became right, 0 became wrong, 10 scored as before.", False),
    ):
        for name, exact in (("base", "0000000011"), ("tuned", after)):
            write_rows(
                folder / "answers" / f"{name}.jsonl",
                [{"prompt": str(i), "completion": "x", "reward": 0.0, "exact": float(c)} for i, c in enumerate(exact)],
            )
        text = page(folder).text
        assert words in text and ("the change may be chance" in text) == chance and "overlap" not in text
    (folder / "answers" / "tuned.jsonl").unlink()  # the intervals are all that is known
    assert "The intervals overlap" in page(folder).text
    write_rows(folder / "evals.jsonl", [evals[0], {**evals[1], "exact": 0.7, "low": 0.6, "high": 0.8}])
    assert "intervals overlap" not in page(folder).text


def test_a_killed_run_is_reported_as_one(tmp_path):
    folder = make_run(tmp_path / "killed", 60, 500, finished=False)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"generation": 60, "reward_mean": 0.')
    text = page(folder).text
    assert_self_contained(folder / "report.html")
    assert "60 of 500 generations so far: the run has not finished" in text
    assert "after 50 updates" in text and "tuned," not in text
    assert "This folder holds no model/" in text and "es-finetune export" in text
    assert "does not hold the answers of both" in text


def test_a_run_that_only_began(tmp_path):
    folder = make_run(tmp_path / "began", 1, 500, finished=False)
    for name in ("metrics.jsonl", "evals.jsonl", "run.log"):
        (folder / name).unlink()
    text = page(folder).text
    assert "no generation finished yet" in text and text.count("not measured") >= 8


def test_without_exact_and_health_nothing_is_invented(tmp_path):
    folder = make_run(tmp_path / "conciseness", 40, metric="reward", health=False)
    text = page(folder).text
    assert_self_contained(folder / "report.html")
    assert "Mean reward on held-out items" in text and "Held-out reward" in text and "Exact" not in text
    assert "became right" not in text and "100 became better, 15 became worse" in text
    assert text.count("not measured") == 2  # the plots of drift and of realised noise
    assert "of at least 0.9" not in text


def test_of_answers_that_are_read_no_tokens_are_drawn(tmp_path):
    folder = make_run(tmp_path / "read", 3)
    rows = [row | {"tokens": 0, "tokens_per_second": 0.0} for row in read_rows(folder / "metrics.jsonl")]
    write_rows(folder / "metrics.jsonl", rows)
    assert '<div class="missing">not measured</div>' in report(folder).read_text()


def test_a_full_disk_keeps_the_page_that_was_there(no_plots, tmp_path, monkeypatch):
    before = report(make_run(tmp_path / "run", 3)).read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").read_bytes() == before and not list((tmp_path / "run").glob("*.tmp"))


def test_a_name_cannot_become_markup(tmp_path):
    folder = make_run(tmp_path / "a'b c$x$", 3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model": HOSTILE, "task": HOSTILE, HOSTILE: HOSTILE}))
    shown = page(folder)
    assert_self_contained(folder / "report.html")
    assert "<script>alert(1)" in shown.text
    # The command can be pasted in a shell
    assert html.escape("""'"'"'""") in (folder / "report.html").read_text() or """'"'"'""" in shown.text


def test_a_generation_done_again_counts_once(no_plots, tmp_path):
    folder = make_run(tmp_path / "again", 3, warnings=False)
    rows = read_rows(folder / "metrics.jsonl")
    write_rows(folder / "metrics.jsonl", [*rows, {**rows[-1], "tokens": 0}])
    assert f"{sum(row['tokens'] for row in rows[:2]) / 1e6:,.1f} M" in page(folder).text


def test_a_damaged_log_is_said_and_the_rest_is_shown(no_plots, tmp_path):
    folder = make_run(tmp_path / "run", 3)
    data = bytearray((folder / "run.log").read_bytes())
    data[200] ^= 1
    (folder / "run.log").write_bytes(data)
    text = page(folder).text
    assert "run.log is damaged in line 1" in text and "3 generations." in text


def test_no_run_and_damage_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="holds no run of es_finetune"):
        report(tmp_path)
    folder = make_run(tmp_path / "run", 3)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:40], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged in line 2"):
        report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("torn", ['{"generation": 2', '{"generation": 2\n', '{"a": "\udce9', "\x00\x00\x00"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"generation": 0}\n{"generation": 1}\n' + torn.encode("utf-8", "surrogateescape"))
    assert read_rows(path) == [{"generation": 0}, {"generation": 1}]
    path.write_text('{"generation": 0}')  # whole, only its line end is missing
    assert read_rows(path) == [{"generation": 0}]
    assert read_rows(tmp_path / "none.jsonl") == []


def drawn(monkeypatch, **options):
    """The axes that plot_run filled, and the file's first bytes."""
    from matplotlib.figure import Figure

    kept = []
    subplots = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda self, *a, **k: kept.append(subplots(self, *a, **k)) or kept[-1])
    plots.plot_run(**options)
    return kept[0]


def test_reward_png_draws_the_rows_and_the_intervals(rendered, tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", 75)
    rows, evals = (read_rows(folder / name) for name in ("metrics.jsonl", "evals.jsonl"))
    rewards, held_out = drawn(
        monkeypatch,
        path=tmp_path / "reward.png",
        title=r"ES on $\nosuch$ and more",
        metric="exact",
        rows=rows,
        evals=evals,
    )
    assert rewards.lines[0].get_ydata().tolist() == [row["reward_mean"] for row in rows]
    assert [text.get_text() for text in rewards.get_legend().get_texts()] == [
        "worst to best member",
        "middle half",
        "mean",
    ]
    container = held_out.containers[0]
    assert container[0].get_xdata().tolist() == [0, 25, 50, 75]
    bars = [segment[:, 1].tolist() for segment in container[2][0].get_segments()]
    assert bars == [pytest.approx([row["low"], row["high"]]) for row in evals]
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("generations, evals", [(0, 0), (1, 1), (3, 0)])
def test_reward_png_of_next_to_nothing(rendered, tmp_path, generations, evals):
    folder = make_run(tmp_path / "run", 3)
    rows, held_out = (read_rows(folder / name) for name in ("metrics.jsonl", "evals.jsonl"))
    plots.plot_run(tmp_path / "reward.png", "ES", "exact", rows[:generations], held_out[:evals])
    assert (tmp_path / "reward.png").stat().st_size > 10_000


def test_rewards_of_an_older_run_have_no_middle_half_and_lengths_no_band(rendered, tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", 3)
    rows = [
        {name: value for name, value in row.items() if not name.startswith(("reward_q", "answer_tokens"))}
        for row in read_rows(folder / "metrics.jsonl")
    ]
    write_rows(folder / "metrics.jsonl", rows)
    (rewards, _) = drawn(monkeypatch, path=tmp_path / "a.png", title="ES", metric="exact", rows=rows, evals=[])
    assert [text.get_text() for text in rewards.get_legend().get_texts()] == ["worst to best member", "mean"]
    assert page(folder).text.count("not measured") == 0  # the held-out lengths are known


def test_the_lengths_are_a_line_and_bars_of_the_middle_of_the_answers(tmp_path):
    from matplotlib.figure import Figure

    folder = make_run(tmp_path / "run", 30)
    rows, evals = (read_rows(folder / name) for name in ("metrics.jsonl", "evals.jsonl"))
    axes = Figure().subplots()
    plots.draw_lengths(axes, rows, evals)
    assert axes.lines[0].get_ydata().tolist() == [row["answer_tokens"] for row in rows]
    bars = [segment.tolist() for segment in axes.collections[0].get_segments()]
    assert bars == [
        [[r["generation"], r["answer_tokens_q10"]], [r["generation"], r["answer_tokens_q90"]]] for r in evals
    ]
