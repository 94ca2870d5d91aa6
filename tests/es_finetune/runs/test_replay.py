"""Contract under test: base model + log = tuned model, to the bit.

On every backend, for every kind of master, adapter and fused experts included, each generation proven by the
fingerprints in the log; a log that does not fit the model or was tampered with is refused, as is one of an older
format. What is exported loads in transformers and has the weights and the text of the run's own model.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import es_kernels
from es_finetune import TrainConfig, Trainer
from es_finetune.cli import main
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.load import EMBEDDED_MODEL, load_model
from es_finetune.models.save import save_model
from es_finetune.runs.log import SealedLines, read_log
from es_finetune.runs.replay import rebuild
from es_finetune.tasks import Item, Score

CONFIGS = {
    "llama": {},
    "qwen2": {"master": "copy", "antithetic": True, "momentum": 0.5},
    "mixtral": {
        "master": "fp32",
        "weight_decay": 0.1,
        "anchored": True,
        "sigma_for": ["*experts*=0.1"],
        "noise_rank": 1,
        "members_at_once": 1,
    },
    "lora": {"lora_rank": 2, "noise_rank": 3},
    "host": {"master": "host", "shaping": "ranks"},
    "none": {"master": "none", "lr_schedule": "cosine", "sigma_schedule": "linear"},
    "batch": {"master": "none", "noise_rank": 1, "members_at_once": 3, "antithetic": True},
}


class Letters:
    name, metric, floor, max_new_tokens, eval_samples, notes = "letters", "reward", None, 4, 1, ()
    train = [Item(f"^{a},{b}:", (a, b)) for a in range(1, 5) for b in range(5, 7)]
    test = [Item("^7:", 7), Item("^8:", 8)]

    def score(self, item, completion):
        return Score(sum(map(ord, completion)) / 100)


@pytest.fixture(scope="module")
def runs(save_tiny, tmp_path_factory):
    """Folder of the run of each config, made when it is asked for."""
    made = {}

    def folder_of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = save_tiny(folder / "base", name if name in ("llama", "qwen2", "mixtral") else "llama")
            options = {
                "dtype": "bfloat16",
                "sigma": 0.05,
                "lr": 0.05,
                "generations": 3,
                "population": 4,
                "prompts": 0,
                "report_to": ["none"],
            }
            Trainer(
                TrainConfig(output=str(folder / "run"), model=model, task="letters", **options, **CONFIGS[name]),
                task=Letters(),
            ).train()
            assert all(g.update.z for g in read_log(folder / "run" / "run.log")[1])
            made[name] = folder / "run"
        return made[name]

    return folder_of


@pytest.fixture(params=CONFIGS)
def run(request, runs):
    return runs(request.param)


@pytest.fixture
def llama(runs):
    return runs("llama")


def assert_made_again(run, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(run / "run.log", alone)
    seen = []
    rebuilt = rebuild(alone, on_generation=seen.append)
    assert seen == [1, 2, 3]
    last = rebuilt.generations[-1]
    assert (rebuilt.optimizer.fingerprint("theta"), rebuilt.optimizer.fingerprint("live")) == (last.theta, last.live)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_log_alone_makes_the_same_bits_again(run, backend, tmp_path):
    with es_kernels.backend(backend):
        assert_made_again(run, tmp_path)


def test_every_backend_does(llama, kernel_backend, tmp_path):
    assert_made_again(llama, tmp_path)


def test_a_log_of_before_there_was_low_rank_is_of_full_noise(llama, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    lines = [json.loads(line) for line in (llama / "run.log").read_text().splitlines()]
    assert lines[0]["config"].pop("noise_rank") == 0
    log = SealedLines(old / "run.log")
    for line in lines:
        log.append({key: value for key, value in line.items() if key != "crc"})
    log.close()
    assert "noise_rank" not in read_log(old / "run.log")[0]["config"]
    assert_made_again(old, tmp_path)


def test_it_stops_at_any_generation(run):
    for done in range(4):
        optimizer = rebuild(run, generation=done).optimizer
        expected = (
            int(rebuild(run, generation=done).header["theta"], 16)
            if done == 0
            else read_log(run / "run.log")[1][done - 1].theta
        )
        assert optimizer.generation == done and optimizer.fingerprint() == expected
    with pytest.raises(ValueError, match="has 3 generations, not 4"):
        rebuild(run, generation=4)


def test_export_writes_what_the_run_wrote(run, tmp_path, capsys):
    assert main(["export", str(run), "--output", str(tmp_path / "model")]) == 0
    ours, theirs = (sorted(folder.glob("*.safetensors")) for folder in (tmp_path / "model", run / "model"))
    assert [path.name for path in ours] == [path.name for path in theirs]
    header, generations = read_log(run / "run.log")
    for a, b in zip(ours, theirs, strict=True):
        tuned = [name for name in load_file(a) if header["config"]["members_at_once"] == 1 or "norm" not in name]
        saved, again = ({name: load_file(path)[name] for name in tuned} for path in (a, b))
        assert es_kernels.fingerprint(saved) == es_kernels.fingerprint(again) == generations[-1].live
    assert main(["export", str(run), "--output", str(tmp_path / "model")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (
        main(
            [
                "export",
                str(run),
                "--output",
                str(tmp_path / "model"),
                "--overwrite",
                "--merge_lora",
                "--generation",
                "1",
            ]
        )
        == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    rebuilt = rebuild(run, generation=1)
    batch = tokenizer(["^1,2:"], return_tensors="pt", return_token_type_ids=False)
    texts = [
        m.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist() for m in (model, rebuilt.model)
    ]
    if "lora" not in str(run):  # merging rounds
        assert texts[0] == texts[1]


@pytest.mark.parametrize("save", ["save_model", "save_pretrained"])
def test_weights_of_several_dtypes(build_model, tmp_path, save):
    """Of a model given in memory: the run's own model and its base, whoever saved that, are read as they were."""
    model, tokenizer = build_model("mixed"), AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    if save == "save_model":
        save_model(model, tokenizer, tmp_path / "base")
    else:
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
    options = {"sigma": 0.05, "lr": 0.05, "generations": 2, "population": 4, "prompts": 0, "report_to": ["none"]}
    config = TrainConfig(output=str(tmp_path / "run"), model=str(tmp_path / "base"), task="letters", **options)
    Trainer(config, model=model, tokenizer=tokenizer, task=Letters()).train()
    header, generations = read_log(tmp_path / "run" / "run.log")
    assert header["model"]["dtype"] == "mixed"
    rebuilt = rebuild(tmp_path / "run")
    assert (rebuilt.optimizer.fingerprint("theta"), rebuilt.optimizer.fingerprint("live")) == (
        generations[-1].theta,
        generations[-1].live,
    )
    for written in (tmp_path / "run" / "model", tmp_path / "exported"):
        if written.name == "exported":
            assert main(["export", str(tmp_path / "run"), "--output", str(written)]) == 0
        tuned = load_model(written, device="cpu")[0]
        assert es_kernels.fingerprint(es_kernels.ParamTable(named_segments(tuned))) == generations[-1].live


def test_the_command_proves_it(run, capsys):
    assert main(["replay", str(run)]) == 0
    last = read_log(run / "run.log")[1][-1]
    out = capsys.readouterr().out
    assert f"theta {last.theta:016x}, live {last.live:016x}" in out and "3 of 3 generations" in out


def copy_of(run, folder, change):
    """The run with its log's lines changed, and sealed again."""
    folder.mkdir()
    lines = [json.loads(line) for line in (run / "run.log").read_text().splitlines()]
    log = SealedLines(folder / "run.log")
    change(lines)
    for line in lines:
        line.pop("crc")
        log.append(line)
    log.close()
    return folder


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda lines: lines[2].update(z=lines[1]["z"]), "generation 1: theta and live have the fingerprints"),
        (
            lambda lines: lines[1].update(lr=[0.051] * len(lines[1]["lr"])),
            "generation 0: theta and live have the fingerprints",
        ),
        (lambda lines: lines[3].update(theta="0" * 16), "the log says 0000000000000000"),
        (lambda lines: lines[0].update(noise_version=99), "noise version 99"),
        (lambda lines: lines[0].update(base_fingerprint="0" * 16), "is not the one the run began with"),
        (
            lambda lines: lines[0]["config"].update(freeze=["*norm*"]),
            "parameters to tune are not those|fits no parameter",
        ),
        (lambda lines: lines[0]["config"].update(unheard_of=1), "whose configs differ"),
        (
            lambda lines: lines[0].update(run=1),
            f"run.log was written by an older version, es_finetune {es_kernels.__version__}, whose option base is now "
            "called master: replay it with that version",
        ),
        (lambda lines: lines[0]["config"].update(model="/nowhere/at/all"), "/nowhere/at/all"),
    ],
)
def test_a_log_that_does_not_fit_is_refused(llama, tmp_path, change, words, capsys):
    folder = copy_of(llama, tmp_path / "copy", change)
    with pytest.raises(ValueError, match=words):
        rebuild(folder)
    assert main(["replay", str(folder)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


def test_another_base_model_is_refused(llama, save_tiny, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", initializer_range=0.3)
    with pytest.raises(ValueError, match=f"model {other} is not the one the run began with"):
        rebuild(llama, model=other)
