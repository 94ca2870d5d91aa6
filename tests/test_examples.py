"""Contract: every example runs as it stands, and does what it says: what it trains gets better, the
reward for GSM8K tells right from wrong, the caller in C has the bits of Python."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch

import es_kernels
from es_finetune.tasks import load_task
from es_finetune.tasks.reward_process import RewardProcess

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(file) -> (its globals, what it printed): as a script, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def script(file):
        names = runpy.run_path(str(EXAMPLES / file), run_name="__main__")
        return names, capsys.readouterr().out

    return script


def test_each_is_tested_and_listed():
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".c", ".ipynb")}
    tested, listed = pathlib.Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    assert [file for file in files - {"toy.py"} if f'"{file}"' not in tested] == []
    assert [file for file in files if f"({file})" not in listed] == []


def test_kernels_in_your_loop(run):
    names, out = run("kernels_in_your_loop.py")
    assert names["means"][-1] > names["means"][0] + 0.05
    exact, live = names["master"], names["live"]
    assert all(torch.equal(p, exact[name].to(torch.bfloat16)) for name, p in live.items())
    assert f"{es_kernels.fingerprint(exact):016x}" in out


def test_mezo(run):
    names, _ = run("mezo.py")
    assert names["losses"][-1] < names["losses"][0] - 0.005
    assert all(torch.equal(p, names["exact"][name]) for name, p in names["model"].named_parameters())


def test_adam_on_es(run):
    names, _ = run("adam_on_es.py")
    assert names["means"][-1] > names["means"][0] + 0.03
    # The gradient is -1/N sum z eps, with eps the noise that the members had.
    name, p = next(iter(names["exact"].items()))
    expected = torch.zeros_like(p)
    coefs = (-names["z"] / names["POPULATION"]).tolist()
    es_kernels.add_noise_(expected.detach(), names["seeds"], coefs, name=name)
    assert torch.equal(p.grad, expected)


def test_lora(run, tmp_path):
    pytest.importorskip("peft")
    names, _ = run("lora.py")
    assert names["means"][-1] > names["means"][0] + 0.02
    assert (tmp_path / "runs/lora/adapter_model.safetensors").exists()


def test_own_reward(run, tmp_path):
    names, out = run("own_reward.py")
    assert names["summary"]["final"] > names["summary"]["base"] + 0.1 and "held-out reward" in out
    assert (tmp_path / "runs/own-reward/report.html").exists()
    by_file = RewardProcess(f"{EXAMPLES / 'own_reward.py'}:reward", 5)  # as its first lines say
    for answer, exact, form in (("4+3+7", True, True), ("3+4+8", False, True), ("3*4+2", False, False)):
        value = by_file(answer, {"numbers": [3, 4, 7]})
        assert (value["exact"], value["format"]) == (exact, form)
    by_file.close()


def test_logprob(run):
    names, _ = run("logprob.py")
    assert names["summary"]["final"] > names["summary"]["base"] + 0.1


def test_the_notebook(tmp_path, monkeypatch):
    """Its cells, in order. It is kept without outputs."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in json.loads((EXAMPLES / "demo.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    names["plt"].close("all")
    assert names["summary"]["final"] > names["summary"]["base"] + 0.2
    assert f"{names['again'].optimizer.fingerprint('theta'):016x}" == names["summary"]["fingerprint"]


def test_gsm8k_reward(tmp_path):
    record = {"question": "A book costs $1,200.50. How much are two?", "answer": "2 * 1,200.50 = 2,401\n#### 2,401"}
    command = [sys.executable, EXAMPLES / "gsm8k_reward.py"]
    written = subprocess.run(command, input=json.dumps(record) + "\n", capture_output=True, text=True, check=True)
    item = json.loads(written.stdout)
    assert item["answer"] == "2,401" and item["prompt"][0]["content"].startswith(record["question"])
    others = [{**item, "prompt": f"question {number}"} for number in range(9)]
    task = load_task("custom", data=others, reward=f"{EXAMPLES / 'gsm8k_reward.py'}:reward")
    for completion, exact, form in [
        ("so it is\n#### 2401", 1, 1),
        ("#### $2,401.00.\n", 1, 1),
        ("#### 2400\n#### 2401", 1, 1),
        ("#### 2401 or 2402", 0, 0),
        ("#### 2402", 0, 1),
        ("2401", 0, 0),
        ("#### " + "9" * 10_000, 0, 1),
        ("#### " + "9" * 100_000 + "x", 0, 0),
        ("#### 9**9**9", 0, 0),
        ("", 0, 0),
    ]:
        score = task.score(task.train[0], completion)
        assert (score.exact, score.format) == (exact, form) and score.reward == 0.9 * exact + 0.1 * form, completion


def test_the_caller_in_c(tmp_path):
    """Compiled as its first lines say; the same calls from Python have the same fingerprints."""
    assert len((EXAMPLES / "caller.c").read_text().splitlines()) <= 60
    library = ROOT / "es_kernels/libes_cpu.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-I", ROOT / "csrc", f"-Wl,-rpath,{library.parent}", "-o", "caller"]
    subprocess.run(["gcc", EXAMPLES / "caller.c", library, *flags], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "caller"], capture_output=True, text=True, check=True).stdout

    exact = (torch.arange(1003, dtype=torch.float32) - 500) / 1024
    live = torch.empty(1003, dtype=torch.bfloat16)
    lines = []
    for what, out, base, seeds, coefs in (
        ("perturbed", live, exact, [7], [0.01]),
        ("restored", live, exact, [], []),
        ("updated", exact, None, [7, 8, 9], [0.25, -0.5, 0.125]),
    ):
        es_kernels.add_noise_(out, seeds, coefs, base=base, name="weight")
        lines.append(f"{what} {es_kernels.fingerprint({'weight': out}):016x}\n")
    assert printed == "".join(lines) + f"weight[0] = {c_hex(exact[0].item())}\n"


def c_hex(value):
    """As printf's %a writes it."""
    mantissa, exponent = value.hex().split("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}"
