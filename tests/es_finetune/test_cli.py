"""Contract under test: the command line.

Bad input is one clear line on stderr and exit code 2, with nothing written. Flags override YAML files; the ready ones
are the paper's experiments. A run that breaks off says how to go on, with exit code 1.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import es_finetune
from es_finetune.cli import COMMANDS, CONFIGS, _hide_bars, _parse, main
from es_finetune.config import TrainConfig
from es_finetune.errors import UserError
from es_finetune.models.load import EMBEDDED_MODEL
from es_finetune.runs.files import read_rows
from es_finetune.runs.log import read_log

SMALL = ["--generations", "2", "--population", "4", "--prompts", "16", "--eval_items", "32", "--report_to", "none"]


def train(output, *flags):
    return main(["train", "--output", str(output), *SMALL, *flags])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sigma", "0"], "sigma must be"),
        (["--sigma", "-1"], "sigma must be"),
        (["--sigma", "nan"], "sigma must be"),
        (["--sigma", "much"], "invalid float value: 'much'"),
        (["--lr", "-1"], "lr must be"),
        (["--lr", "0"], "lr must be a positive number, not 0"),
        (["--population", "1"], "population must be"),
        (["--population", "5", "--antithetic"], "even"),
        (["--generations", "0"], "generations must be"),
        (["--momentum", "1"], "momentum must be"),
        (["--momentum_window", "0"], "momentum_window"),
        (["--shaping", "softmax"], "shaping must be"),
        (["--lr_schedule", "wavy"], "lr_schedule must be"),
        (["--final_scale", "0"], "final_scale must be"),
        (["--model", "embedded", "--task", "sudoku"], "unknown task 'sudoku'"),
        (["--task", "reasoning-gym:chess_boxing"], "chess_boxing"),
        (["--task", "countdown"], "needs a model"),
        (["--model", "embedded", "--task", "custom"], "data"),
        (["--model", "some/model"], "no task was given"),
        (["--model", "/nowhere/at/all", "--task", "countdown"], "/nowhere/at/all"),
        (["--master", "fp8"], "master must be"),
        (["--dtype", "int4"], "dtype must be"),
        (["--decoding", "magic"], "decoding must be"),
        (["--prompts", "100000"], "prompts must be at most"),
        (["--device", "abacus"], "abacus"),
        (["--device", "cuda:7"], "sees no GPU"),
        (["--freeze", "*nothing*"], "'*nothing*' fits no parameter"),
        (["--freeze", "*"], "leave no parameter"),
        (["--noise_rank", "65"], "noise_rank must be at most 64"),
        (["--samples", "2"], "2 greedy samples are all the same"),
        (["--logprob_per_token"], "logprob_per_token goes with reward logprob"),
        (["--sigma_for", "*norm*"], "PATTERN=SIGMA"),
        (["--sigma_for", "*norm*=0"], "PATTERN=SIGMA"),
        (["--report_to", "carrier_pigeon"], "carrier_pigeon"),
        (["--resume"], "cannot be read"),
        (["--resume", "--overwrite"], "cannot be read|give one of them"),
        (["--no_such_flag", "1"], "unknown flag --no_such_flag; es-finetune train --help lists them"),
        (["--sgima", "1"], "unknown flag --sgima: did you mean --sigma?"),
        (["-sigma", "1"], "unknown flag -sigma: did you mean --sigma?"),
        (["--batchsize=3"], "unknown flag --batchsize=3: did you mean --batch_size?"),
        (["--pop", "1"], "unknown flag --pop: did you mean --population?"),
        (["--modle", "X", "--task", "countdown"], "unknown flag --modle: did you mean --model?"),
        (["--sigma", "1", "2"], "'2' belongs to no flag; usage: es-finetune train [flags]"),
        (["--overwrite", "maybe"], "argument --overwrite: true or false was expected, not 'maybe'"),
        (["--model", "embedded", "--task", "countdwn"], "unknown task 'countdwn': did you mean countdown?"),
        (
            ["--model", "embedded", "--task", "reasoning_gym:x"],
            "unknown task 'reasoning_gym:x': did you mean reasoning-gym:<name>?",
        ),
        (["--task", "countdown_char"], "task 'countdown_char' needs a model: did you mean countdown-char?"),
        (["--model", "./nope", "--task", "countdown"], "the model's folder ./nope does not exist"),
        (["--model", __file__, "--task", "countdown"], "test_cli.py is a file: give its folder"),
        (
            ["--model", f"{CONFIGS.parent}/modles", "--task", "countdown"],
            "/modles does not exist: did you mean models?",
        ),
        (["--pad_token", "<nosuch>"], "<nosuch>"),
        (["--lora_rank", "-1"], "lora_rank"),
        (["--seed", str(2**64)], "seed must be a whole number of 64 bits"),
        (["--sigma", "1e-50"], "sigma must be a number that float32 holds"),
        (["--sigma_for", "*norm*=1e39"], "PATTERN=SIGMA"),
        (["--lr", "1e39"], "lr must be a number that float32 holds"),
        (["--weight_decay", "1e300"], "weight_decay must be a number that float32 holds"),
        (["--threads", "100000"], "threads must be at most 1024, not 100000"),
        (["--generations", str(2**32)], "generations must be at most 4294967295"),
        (["--straggler_limit", "nan"], "straggler_limit must be a finite number, not nan"),
        (["--time_limit", "inf"], "time_limit must be a finite number, not inf"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, capsys, flags, words):
    assert train(tmp_path / "run", *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and any(word in lines[0] for word in words.split("|")), (
        lines
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_the_other_commands_know_the_same_limits(capsys, command):
    for flag, value, words in (
        ("--seed", str(2**64), "seed must be a whole number of 64 bits"),
        ("--threads", "100000", "threads must be at most 1024"),
    ):
        assert main([command, "--model", "embedded", flag, value]) == 2
        assert words in capsys.readouterr().err
    if command == "calibrate":
        assert main([command, "--model", "embedded", "--sigmas", "1e-50"]) == 2
        assert "each of sigmas must be a number that float32 holds" in capsys.readouterr().err
        assert main([command, "--model", "embedded", "--noise_rank", "65"]) == 2
        assert "noise_rank must be at most 64" in capsys.readouterr().err


REWARDS = """
def good(completion, item): return float(len(completion))
number = 3
def text(completion, item): return "high"
"""


GOOD = "".join(f'{{"prompt": "^{n}:"}}\n' for n in range(9))


@pytest.mark.parametrize(
    "data, reward, words",
    [
        ("", "r.py:good", "data.jsonl"),
        ("{}\n", "r.py:good", "prompt"),
        ("not json\n", "r.py:good", "line 1"),
        ('{"prompt": "^1:"}\n' * 9, "r.py:good", "1 different prompts"),
        (GOOD, "r.py:missing", "missing"),
        (GOOD, "r.py:number", "number"),
        (GOOD, "nofile.py:good", "nofile.py"),
        (GOOD, "r.py:text", "text"),
        (GOOD, "r.py", "FUNCTION|function"),
    ],
)
def test_bad_data_and_bad_rewards_too(tmp_path, capsys, data, reward, words):
    (tmp_path / "data.jsonl").write_text(data)
    (tmp_path / "r.py").write_text(REWARDS)
    flags = [
        "--model",
        "embedded",
        "--data",
        str(tmp_path / "data.jsonl"),
        "--reward",
        str(tmp_path / reward),
        "--prompts",
        "0",
        "--max_new_tokens",
        "4",
    ]
    assert train(tmp_path / "run", *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and any(word in lines[0] for word in words.split("|")), lines
    assert not (tmp_path / "run").exists()


def test_a_model_without_pad_token_says_what_to_do(tmp_path, save_tiny, capsys):
    model = save_tiny(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    pad = config.pop("pad_token")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    pads = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps({**pads, "padding": None}))
    assert train(tmp_path / "run", "--model", model, "--task", "countdown-char") == 2
    assert (
        "has no pad token" in (error := capsys.readouterr().err) and "--pad_token" in error and error.count("\n") == 1
    )
    assert train(tmp_path / "run", "--model", model, "--task", "countdown-char", "--pad_token", pad) == 0


def test_a_decoding_that_the_model_cannot_do_leaves_an_older_run_as_it_was(tmp_path, capfd):
    tiny = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GPTNeoXConfig(vocab_size=40, eos_token_id=2, **tiny)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path / "model")
    assert train(tmp_path / "run", "--no_save_model") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capfd.readouterr()
    flags = ["--model", str(tmp_path / "model"), "--task", "countdown-char", "--decoding", "continuous", "--overwrite"]
    assert train(tmp_path / "run", *flags) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "models of type gpt_neox" in lines[0] and lines[0].endswith("use --decoding dynamic"), (
        lines
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


REWARD = """
import time

def reward(completion, item):
    if item["n"] == 3:
        time.sleep(60)
    if item["n"] == 4:
        1 / 0
    return len(completion)
"""


def test_a_reward_from_a_file_trains_though_it_hangs_and_raises(tmp_path, capsys):
    for name, numbers in (("train", range(6)), ("test", range(6, 9))):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"prompt": f"^{n}:", "n": n}) + "\n" for n in numbers)
        )
    (tmp_path / "r.py").write_text(REWARD)
    flags = [
        "--model",
        "embedded",
        "--data",
        str(tmp_path / "train.jsonl"),
        "--test_data",
        str(tmp_path / "test.jsonl"),
        "--max_new_tokens",
        "4",
    ]
    flags += ["--reward", f"{tmp_path / 'r.py'}:reward", "--prompts", "0", "--time_limit", "0.3", "--generations", "1"]
    assert train(tmp_path / "run", *flags) == 0
    out = capsys.readouterr().out
    assert "held-out reward" in out and "0.3" in out[out.index("generation 1:") :]
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["failed"] == 4 * 2 and "0.3" in row["failed_example"]


@pytest.fixture
def own(tmp_path):
    """A task of one's own in files, and flags for a short run of it: data.jsonl, test.jsonl, and r.py, which imports
    h.py."""
    for name, numbers in (("data", range(6)), ("test", range(6, 9))):
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"^{n}:", "n": n} for n in numbers])
    (tmp_path / "h.py").write_text("def distance(a, b): return abs(a - b)\n")
    (tmp_path / "r.py").write_text(
        "from h import distance\ndef reward(completion, item): return -distance(len(completion), item['n'])\n"
    )
    flags = [
        "--model",
        "embedded",
        "--data",
        str(tmp_path / "data.jsonl"),
        "--test_data",
        str(tmp_path / "test.jsonl"),
        "--max_new_tokens",
        "4",
    ]
    return [
        "--reward",
        f"{tmp_path / 'r.py'}:reward",
        "--prompts",
        "2",
        "--generations",
        "1",
        "--no_save_model",
        *flags,
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_reward_is_known_by_its_content_and_not_by_its_path(tmp_path, capsys, own):
    assert train(tmp_path / "run", *own) == 0
    resume = ["train", "--resume", "--output", str(tmp_path / "run")]
    (tmp_path / "moved").mkdir()
    for name, moved in (("r", "other"), ("h", "h")):
        (tmp_path / "moved" / f"{moved}.py").write_bytes((tmp_path / f"{name}.py").read_bytes())
    assert main([*resume, "--reward", f"{tmp_path / 'moved' / 'other.py'}:reward", "--generations", "2"]) == 0
    assert len(read_log(tmp_path / "run" / "run.log")[1]) == 2
    before = contents(tmp_path / "run")
    for name in ("r", "h"):
        text = (tmp_path / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(text + "# edited\n")
        capsys.readouterr()
        assert main([*resume, "--generations", "3"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert (
            "r.py:reward is not the one that the run in" in line
            and "put it back as it was, or begin another run" in line
        )
        assert contents(tmp_path / "run") == before
        (tmp_path / f"{name}.py").write_text(text)
    assert main([*resume, "--generations", "3"]) == 0


@pytest.mark.parametrize("name, split", [("data", "train"), ("test", "test")])
def test_other_reference_answers_are_refused_on_resume(tmp_path, capsys, own, name, split):
    assert train(tmp_path / "run", *own) == 0
    rows = read_rows(tmp_path / f"{name}.jsonl")
    write(tmp_path / f"{name}.jsonl", [{**rows[0], "n": 99}, *rows[1:]])
    before = contents(tmp_path / "run")
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), "--generations", "2"]) == 2
    assert (
        f"what the {split} items of task custom give the reward, as reference answers, is not what the run"
        in capsys.readouterr().err
    )
    assert contents(tmp_path / "run") == before
    # The order of a record's keys says nothing
    write(tmp_path / f"{name}.jsonl", [dict(reversed(row.items())) for row in rows])
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), "--generations", "2"]) == 0


def test_a_reward_that_scores_nothing_of_the_base_model_ends_the_run_at_once(tmp_path, capsys, own):
    good = (tmp_path / "r.py").read_text()
    (tmp_path / "r.py").write_text(good.replace("item['n']", "item['answer']"))
    assert train(tmp_path / "run", *own) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        "no answer of the base model to a held-out question could be scored; the first failure: reward(): KeyError: "
        "'answer'" in line
    )
    assert line.endswith("Nothing is kept yet: mend the reward, and begin again with --overwrite")
    (tmp_path / "r.py").write_text(good)
    assert train(tmp_path / "run", *own, "--overwrite") == 0


@pytest.mark.parametrize("name", ["data", "test"])
def test_every_prompt_is_proven_before_the_run_whichever_is_drawn(tmp_path, capsys, own, name, monkeypatch):
    rows = read_rows(tmp_path / f"{name}.jsonl")
    rows[2]["prompt"] = "3" * 61
    assert train(tmp_path / "run", *own) == 0
    before = contents(tmp_path / "run")
    write(tmp_path / f"{name}.jsonl", rows)
    words = f"{name}.jsonl, line 3: the prompt has 61 tokens, too many for 4 new ones within the model's 64 positions"
    for more, folder in ((["--overwrite"], "run"), ([], "new")):
        capsys.readouterr()
        assert train(tmp_path / folder, *own, *more) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
    assert contents(tmp_path / "run") == before and not (tmp_path / "new").exists()
    with monkeypatch.context() as older:  # one that asked what it drew, and died when it was this
        older.setattr("es_finetune.engines.hf.refuse_unanswerable", lambda *_: None)
        assert train(tmp_path / "old", *own) == 0
    assert main(["train", "--resume", "--output", str(tmp_path / "old"), "--generations", "2"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in line and "was begun with it and cannot go on: begin another run without it" in line
    assert main(["replay", str(tmp_path / "old")]) == 0


def test_commands(capsys):
    assert ended(["--help"]) == 0
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^    {command} +\S", out, re.MULTILINE)
        assert main([command, "--no_such_flag"]) == 2
    assert main([]) == 2
    assert capsys.readouterr().err.endswith(
        "error: no command given; the commands are " + ", ".join(COMMANDS) + ", and es-finetune --help says more\n"
    )


def ended(arguments):
    """The exit code of what argparse ends by itself: help and version."""
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    return raised.value.code


SETUP = """attn_implementation batch_size config data debug decoding device dtype logprob_per_token lora_rank
max_new_tokens model pad_token quiet reward task test_data threads time_limit"""
TRAIN = """anchored antithetic engine eval_every eval_items final_scale freeze generations health_every lr lr_schedule
master members_at_once momentum momentum_window no_save_model noise_rank objective on_reward_error on_straggler output
overwrite perturb_rounding population prompts ray_workers report_to resume samples save_model seed shaping sigma
sigma_for sigma_schedule snapshot_every straggler_limit temperature tensor_parallel tune update_rounding weight_decay
workers"""
FLAGS = {
    "train": f"{SETUP} {TRAIN}",
    "eval": SETUP.replace("config ", "") + " generation items kl kl_model output run samples seed split",
    "calibrate": f"{SETUP} members noise_rank prompts seed sigmas",
    "replay": "debug device generation model quiet",
    "export": "debug device generation merge_lora model output overwrite quiet",
    "report": "debug quiet",
    "configs": "debug quiet",
    "env": "debug quiet",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_a_command_change_only_on_purpose(command, capsys):
    """Who adds, removes or renames one adds it here, and says so in the docs."""
    assert ended([command, "--help"]) == 0
    shown = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(shown) == sorted(FLAGS[command].split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["fly"],
            "unknown command 'fly'; the commands are train, eval, calibrate, replay, export, report, configs, env",
        ),
        (["--quiet", "fly"], "unknown command 'fly'; the commands are " + ", ".join(COMMANDS)),
        (["--verison"], "unknown flag --verison: did you mean --version?"),
        (["trian"], "unknown command 'trian': did you mean train?"),
        (["Train"], "unknown command 'Train': did you mean train?"),
        (["replay"], "replay needs the folder of a run: es-finetune replay RUN"),
        (["export", "--overwrite"], "export needs the folder of a run: es-finetune export RUN"),
        (["report", "a", "b"], "'b' belongs to no flag; usage: es-finetune report RUN [flags]"),
        (["eval", "RUN"], "'RUN' belongs to no flag; usage: es-finetune eval [--run RUN] [flags]"),
        (["calibrate", "--sigma", "1"], "unknown flag --sigma: did you mean --sigmas?"),
        (
            ["train", "--config", "countdown-qwen2.5-1.5"],
            "no ready config of that name: did you mean countdown-qwen2.5-1.5b?",
        ),
        (["train", "--config", "countdown"], "no ready config of that name: did you mean --task countdown?"),
        (["train", "--config", "sigma=0.1"], "no ready config of that name: did you mean --sigma=0.1?"),
        (
            ["configs", "countdown-qwen2.5"],
            "no ready config of that name: did you mean "
            + " or ".join(f"countdown-qwen2.5-{size}" for size in ("0.5b", "1.5b", "3b"))
            + "?",
        ),
        (
            ["train", "countdown-qwen2.5-1.5b"],
            "'countdown-qwen2.5-1.5b' belongs to no flag: did you mean --config countdown-qwen2.5-1.5b?",
        ),
        (
            ["train", "--config", "."],
            ". is a folder, and a file with options was expected; a run is continued with --resume --output .",
        ),
    ],
    ids=" ".join,
)
def test_a_misspelt_command_line_is_one_line_with_what_was_meant(capsys, arguments, words):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith("error: ") and error.endswith(f"{words}\n") and error.count("\n") == 1


@pytest.mark.parametrize(
    "hidden, arguments, words",
    [
        (
            ["transformers", "matplotlib"],
            ["report", "RUN"],
            "es-finetune report needs the packages transformers, matplotlib: pip install 'es-kernels[finetune]'",
        ),
        (["yaml"], ["configs"], "a YAML file needs the package yaml: pip install 'es-kernels[finetune]'"),
        (["rich"], ["train"], "es-finetune train needs the package rich: pip install 'es-kernels[finetune]'"),
        (["peft"], ["train", "--lora_rank", "2"], "an adapter needs the package peft: pip install 'es-kernels[lora]'"),
        (
            ["datasets"],
            ["train", "--task", "math", "--model", "m"],
            "the task 'math' needs the package datasets: pip install 'es-kernels[tasks]'",
        ),
        (["ray"], ["train", "--workers", "ray"], "workers 'ray' needs the package ray: pip install 'es-kernels[ray]'"),
        (
            ["vllm"],
            ["train", "--engine", "vllm"],
            "engine vllm needs the package vllm, best in an environment of its own: see docs/guides/vllm.md",
        ),
        (
            ["tensorboard"],
            ["train"],
            "report_to names tensorboard, which is not installed: pip install tensorboard, or take it out",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    tmp_path, capsys, monkeypatch, hidden, arguments, words
):
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    if "tensorboard" in hidden:
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert main([*arguments, *(["--output", str(tmp_path / "run")] if arguments[0] == "train" else [])]) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"{words}\n") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_python_is_told_the_extra_too(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # which only the end of a run needs
        with pytest.raises(
            ValueError, match=r"a run needs the package matplotlib: pip install 'es-kernels\[finetune\]'"
        ):
            es_finetune.Trainer(TrainConfig(output=str(tmp_path / "run")))
    for name in ("es_finetune.trainer", "es_finetune.monitor.progress"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"rich.*: pip install 'es-kernels\[finetune\]'"):
        _ = es_finetune.Trainer


@pytest.mark.parametrize("way", ["module", "script"])
def test_ctrl_c_while_packages_are_imported_is_no_traceback(tmp_path, way):
    """A torch that interrupts its own import: it takes most of the two seconds before a command does anything."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background job lacks
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    module, function = re.search(
        r'^es-finetune = "(.*):(.*)"', (Path(__file__).parents[2] / "pyproject.toml").read_text(), re.MULTILINE
    ).groups()
    script = f"import sys; from {module} import {function}; sys.exit({function}())"  # as pip writes it
    command = [
        sys.executable,
        *(["-m", "es_finetune"] if way == "module" else ["-c", script]),
        "train",
        "--output",
        str(tmp_path / "run"),
    ]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_progress_in_a_pipe_is_plain_lines(tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    assert "1/2  reward 0." in out and "estimate: " in out and "held-out exact" in out


def test_flags_override_a_yaml_file_whose_numbers_may_be_written_as_people_do(tmp_path):
    def options(content, *flags, command="train"):
        (tmp_path / "run.yaml").write_text(content)
        return _parse([command, "--config", str(tmp_path / "run.yaml"), *flags])

    content = "sigma: 2e-3  # a text for YAML\ngenerations: 7\nantithetic: true\nfreeze: ['*norm*', '*embed*']\n"
    assert options(content, "--generations", "9") == {
        "command": "train",
        "sigma": 2e-3,
        "generations": 9,
        "antithetic": True,
        "freeze": ["*norm*", "*embed*"],
    }
    assert options("master: null\nreport_to: []\nresume: false\nlr:\n") == {
        "command": "train",
        "master": "none",
        "report_to": ["none"],
        "resume": False,
    }
    # What calibrate has no use for is left out; what no command knows is refused
    assert options("prompts: 7\ngenerations: 7\n", command="calibrate") == {"command": "calibrate", "prompts": 7}
    for content, words in (
        ("sigmma: 1\n", r"unknown option 'sigmma': did you mean sigma\?"),
        ("sigma: much\n", "argument --sigma: invalid float value: 'much'"),
        ("- 1\n", "holds no options"),
        ("a: [", "is no YAML"),
    ):
        with pytest.raises(UserError, match=words):
            options(content)
    with pytest.raises(UserError, match="ready are .*countdown-qwen2.5-1.5b"):
        _parse(["train", "--config", "nothing"])


PAPER = {
    "countdown-qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", "countdown", 0, 1024),
    "countdown-qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", "countdown", 0, 1024),
    "countdown-qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", "countdown", 0, 1024),
    "countdown-qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", "countdown", 0, 1024),
    "countdown-llama-3.2-1b": ("meta-llama/Llama-3.2-1B-Instruct", "countdown", 0, 1024),
    "countdown-llama-3.2-3b": ("meta-llama/Llama-3.2-3B-Instruct", "countdown", 0, 1024),
    "countdown-llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", "countdown", 0, 1024),
    "conciseness-qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", "conciseness", 0, 100),
    "math-qwen2.5-math-7b": ("Qwen/Qwen2.5-Math-7B", "math", 64, 3000),
    "mini-sudoku-qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", "reasoning-gym:mini_sudoku", 0, None),
    "arc-qwen2.5-14b": ("Qwen/Qwen2.5-14B-Instruct", "reasoning-gym:arc_agi", 0, None),
}
SMOLLM2 = ("short-answers-smollm2-135m", "conciseness-smollm2-135m", "countdown-smollm2-135m")


def test_each_experiment_of_the_paper_has_a_ready_config():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*PAPER, *SMOLLM2}
    for name, expected in PAPER.items():
        options = _parse(["train", "--config", name])
        config = TrainConfig(**{name: value for name, value in options.items() if name != "command"})
        assert (config.model, config.task, config.prompts, config.max_new_tokens) == expected
        assert (config.population, config.sigma, config.lr, config.shaping, config.antithetic) == (
            30,
            1e-3,
            5e-4,
            "zscore",
            False,
        )
        assert bool(config.pad_token) == ("Llama" in config.model)


def test_a_runs_config_is_a_yaml_file_for_another(tmp_path, capsys):
    assert train(tmp_path / "one", "--sigma", "0.02", "--overwrite") == 0
    assert main(["train", "--config", str(tmp_path / "one" / "config.json"), "--output", str(tmp_path / "two")]) == 0
    one, two = (read_log(tmp_path / name / "run.log") for name in ("one", "two"))
    assert one[0]["config"] == two[0]["config"] and one[1] == two[1]
    assert main(["train", "--resume", "--output", str(tmp_path / "one")]) == 0


def test_how_to_go_on_names_what_was_changed(tmp_path, capsys, monkeypatch):
    from es_finetune.trainer import Trainer

    assert train(tmp_path / "run") == 0
    monkeypatch.setattr(Trainer, "train", lambda self: (_ for _ in ()).throw(OSError("late")))
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), "--generations", "8", "--threads", "2"]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(f"train --resume --output {tmp_path / 'run'} --threads 2 --generations 8")
    )


def test_what_nobody_foresaw_also_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    from es_finetune.engines.hf import HFEngine

    def out_of_memory(self, encoded, sampling):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(HFEngine, "generate", out_of_memory)
    assert train(tmp_path / "run") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "CUDA out of memory" in last and "train --resume --output" in last


def test_help_of_a_command_says_how_it_is_called(capsys):
    for command, usage in (
        ("train", "train [flags]"),
        ("replay", "replay RUN [flags]"),
        ("eval", "eval [--run RUN] [flags]"),
    ):
        assert ended([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert f"usage: es-finetune {usage}" in out and "default: None" not in out


def test_resume_takes_the_config_of_the_log(tmp_path, capsys):
    assert train(tmp_path / "run", "--sigma", "0.02") == 0
    assert main(["train", "--resume", "--output", str(tmp_path / "run")]) == 0
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), "--sigma", "0.01"]) == 2
    assert "begun with sigma 0.02, not 0.01" in capsys.readouterr().err
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), "--generations", "3"]) == 0
    assert len(read_log(tmp_path / "run" / "run.log")[1]) == 3


def test_a_run_that_breaks_off_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    from es_finetune.runs.log import SealedLines

    real = SealedLines.append

    def append(self, line):
        if line.get("generation") == 1 and line.get("member") == 2:
            raise OSError(28, "No space left on device", str(self.path))
        real(self, line)

    monkeypatch.setattr(SealedLines, "append", append)
    assert train(tmp_path / "run") == 1
    error = capsys.readouterr().err.strip()
    assert "No space left on device" in error and "1 generation and 2 members are kept in" in error
    monkeypatch.undo()
    command = error[error.index("es-finetune train") :].split()
    assert main(command[1:]) == 0
    assert len(read_log(tmp_path / "run" / "run.log")[1]) == 2


LIGHT = """
import runpy, sys
sys.argv = ["es-finetune", *sys.argv[1:]]
try:
    runpy.run_module("es_finetune", run_name="__main__")
except SystemExit:
    print(sorted({"torch", "transformers", "numpy", "rich", "es_finetune.config"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments, imported",
    [
        (["--help"], []),
        (["--version"], []),
        (["fly"], []),
        (["train", "--help"], ["es_finetune.config"]),
        (["train", "--sgima", "1"], ["es_finetune.config"]),
    ],
    ids=" ".join,
)
def test_help_version_and_misspelt_flags_import_nothing_heavy(arguments, imported):
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(imported)


def test_help_shows_choices_defaults_and_groups(capsys):
    assert ended(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--shaping {zscore,ranks,per_prompt}" in out and "--decoding {dynamic,static,continuous}" in out
    words = " ".join(out.split())
    assert "(default: zscore)" in words and "0.01 with the embedded model, else 0.001" in words
    titles = re.findall(r"^(\w[\w ]*):$", out, re.MULTILINE)
    assert titles == ["options", "task", "model", "noise and update", "evaluation", "workers", "files"]


def test_both_spellings_of_a_flag_and_all_of_a_bool_are_understood():
    flags = ["--eval-items", "3", "--antithetic", "--no-save-model", "--anchored", "no", "--overwrite", "True"]
    assert _parse(["train", *flags, "--report-to", "wandb", "trackio"]) == {
        "command": "train",
        "eval_items": 3,
        "antithetic": True,
        "save_model": False,
        "anchored": False,
        "overwrite": True,
        "report_to": ["wandb", "trackio"],
    }


def test_version_configs_and_env(capsys, monkeypatch):
    assert ended(["--version"]) == 0
    assert re.fullmatch(r"es-finetune \d+\.\d+.*\n", capsys.readouterr().out)
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted([*PAPER, *SMOLLM2])
    assert main(["configs", "countdown-qwen2.5-1.5b"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "countdown-qwen2.5-1.5b.yaml").read_text()
    monkeypatch.setitem(sys.modules, "transformers", None)  # what is broken is told, and breaks nothing
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^torch +\d", out, re.MULTILINE) and re.search(r"^serves cpu +\w", out, re.MULTILINE)


def test_a_bug_shows_its_traceback_and_asks_for_a_report(capsys, monkeypatch):
    def planted(options):
        raise ValueError("nobody foresaw this")

    monkeypatch.setitem(COMMANDS, "configs", COMMANDS["configs"]._replace(run=planted))
    assert main(["configs"]) == 1
    out, error = capsys.readouterr()
    assert not out and "Traceback" in error and "in planted" in error
    assert error.splitlines()[-2:] == [
        "ValueError: nobody foresaw this",
        "this is a bug of es_finetune: please report it, with the traceback above and what `es-finetune env` prints",
    ]


def test_debug_shows_the_traceback_of_a_users_error_too(capsys):
    assert main(["replay", "/nowhere", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("error: /nowhere/run.log cannot be read")


def test_quiet_leaves_the_result(tmp_path, capfd):
    assert train(tmp_path / "run", "--quiet", "--no_save_model") == 0
    out, error = capfd.readouterr()
    assert out.startswith("held-out exact ") and out.count("\n") == 1 and not error


def test_only_what_is_downloaded_has_bars(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    try:
        for hide in (enable_progress_bars, disable_progress_bars):  # whoever has hidden the hub's, keeps them hidden
            hide()
            hidden = are_progress_bars_disabled()
            logging._tqdm_active = True
            _hide_bars(quiet=False)
            assert (
                are_progress_bars_disabled() == hidden == (hide is disable_progress_bars)
                and not logging.is_progress_bar_enabled()
            )
    finally:
        enable_progress_bars()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "run") == 2
    assert "error: " in capsys.readouterr().err
