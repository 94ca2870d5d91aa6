"""Contract under test: what holds for small models holds for a real one, SmolLM2-135M-Instruct, as it is fetched and
unpacked from GGUF: its chat template and end token are used as they are meant; two generations by transformers, by
vLLM and over torchrun are replayed without either; members answer in one batch as one by one; what is exported loads in
transformers and vLLM and answers as the run did."""

import json
import os
import subprocess
import sys

import pytest

import es_finetune
from bench.common import smollm2
from es_finetune import TrainConfig, Trainer
from es_finetune.engines.hf import HFEngine
from es_finetune.engines.prompts import continuations, tokenize
from es_finetune.models.load import load_model
from es_finetune.runs.log import read_log
from es_finetune.tasks import load_task

OPTIONS = {
    "task": "short-answers",
    "population": 4,
    "prompts": 4,
    "eval_items": 4,
    "generations": 2,
    "eval_every": 0,
    "health_every": 0,
    "noise_rank": 1,
    "sigma": 0.003,
    "lr": 0.02,
    "batch_size": 16,
    "threads": 0,
    "report_to": ["none"],
    "device": "cpu",
}


@pytest.fixture(scope="session")
def model():
    return str(smollm2.fetch())


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Folder of a run by transformers, its members in one batch, with the tuned model in it."""
    folder = tmp_path_factory.mktemp("hf") / "run"
    Trainer(TrainConfig(model=model, output=folder, **OPTIONS)).train()
    return folder


def answers_of(run, which):
    lines = (run / "answers" / f"{which}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def proven(run):
    """That the log alone gives the weights, each generation by its fingerprints."""
    rebuilt = es_finetune.replay(run, device="cpu")
    _, generations = read_log(run / "run.log")
    assert len(generations) == rebuilt.optimizer.generation == 2 and all(g.update.z for g in generations)
    return rebuilt


def test_chat_template_and_end_token(model):
    loaded, tokenizer, identity = load_model(model, device="cpu")
    assert identity["parameters"] == 134_515_008 and identity["dtype"] == "float32"
    item = load_task("short-answers").train[0]
    [ids] = tokenize(tokenizer, [item.prompt])
    text = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    assert tokenizer.decode(ids) == f"{text}<|im_start|>assistant\n"
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids].count("<|im_start|>") == 3  # one token each
    engine = HFEngine(loaded, tokenizer, 12, 2)
    assert engine.end == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    [answer] = engine.generate(engine.encode([item.prompt]))
    assert answer.text == "The capital of France is Paris." and answer.ids[-1] == engine.end
    _, [read] = continuations(tokenizer, [item.prompt], ["Paris"], engine.end)
    assert tokenizer.convert_ids_to_tokens(read) == ["Paris", "<|im_end|>"]


def test_a_run_is_replayed_and_what_it_exports_answers_as_it_did(run):
    import transformers

    rebuilt = proven(run)
    exported = es_finetune.export(run, output=run.parent / "exported", device="cpu")
    assert exported.live == f"{rebuilt.optimizer.fingerprint('live'):016x}"
    tuned = transformers.AutoModelForCausalLM.from_pretrained(exported.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported.folder)
    for line in answers_of(run, "tuned"):
        inputs = tokenizer.apply_chat_template(
            line["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = tuned.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == line["completion"]


def test_members_answer_in_one_batch_as_one_by_one(model, tmp_path):
    options = {**OPTIONS, "generations": 1, "freeze": ["*norm*"], "save_model": False}
    z = []
    for at_once in (0, 1):
        folder = tmp_path / f"{at_once}"
        Trainer(TrainConfig(model=model, output=folder, members_at_once=at_once, **options)).train()
        z.append(read_log(folder / "run.log")[1][0].update.z)
    assert z[0] == pytest.approx(z[1], abs=1e-3)


def test_two_ranks_of_torchrun(model, run, tmp_path):
    flags = [f"--{name}={value}" for name, value in OPTIONS.items() if name != "report_to"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["es_finetune", "train", "--quiet", "--model", model, "--output", str(tmp_path / "run"), *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--report_to", "none", "--save_model", "false"], env=environment, check=True)
    proven(tmp_path / "run")
    both = (read_log(folder / "run.log")[1] for folder in (run, tmp_path / "run"))
    for alone, shared in zip(*both, strict=True):  # the same members, in other batches
        assert shared.update.z == pytest.approx(alone.update.z, abs=1e-2)


def test_vllm_makes_a_run_and_answers_with_the_model_that_another_exported(model, run, tmp_path):
    trainer = Trainer(TrainConfig(model=model, output=tmp_path / "run", engine="vllm", **OPTIONS, save_model=False))
    trainer.train()
    proven(tmp_path / "run")
    for ours, theirs in zip(*(answers_of(folder, "base") for folder in (tmp_path / "run", run)), strict=True):
        assert ours["completion"] == theirs["completion"]
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-2)

    import vllm

    llm = vllm.LLM(str(run / "model"), dtype="float32", max_model_len=128, max_num_seqs=4)
    expected = answers_of(run, "tuned")
    sampling = vllm.SamplingParams(temperature=0, max_tokens=12)
    outputs = llm.chat([line["prompt"] for line in expected], sampling, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == [line["completion"] for line in expected]
