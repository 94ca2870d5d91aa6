"""Contract under test: the model in vLLM is the model in transformers.

Its parameters, under the checkpoint's names, hold the same bits at the start, with any member in place and after every
update; all of them, and nothing beside them, is perturbed. Greedy answers are those of transformers on the same weights
(float32), whatever vLLM's prefix cache has seen before. What is exported has the fingerprint of the same updates
replayed in transformers. What cannot be done is refused by name before anything is changed.
"""

import json

import pytest
import torch

import es_kernels
from es_finetune import TrainConfig, Trainer
from es_finetune.engines import Sampling
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.optim.update import Update
from es_finetune.runs.log import read_log
from es_finetune.runs.replay import rebuild
from es_finetune.tasks import load_task
from es_finetune.workers.setup import make_worker

OPTIONS = {
    "task": "countdown-char",
    "population": 4,
    "prompts": 8,
    "eval_items": 16,
    "generations": 2,
    "eval_every": 0,
    "sigma": 0.02,
    "lr": 0.01,
}
OPTIONS |= {"report_to": ["none"], "device": "cpu", "max_new_tokens": 12}
LONG = 300  # characters, which are tokens: more than two blocks of 128
# Queries and keys in groups; tied, with biases; norms of queries and keys
KINDS = {"Llama": "float32", "Qwen2": "float32", "Qwen3": "bfloat16"}


def long_questions():
    """A task whose prompts share a prefix of more than two blocks of vLLM's cache."""
    items = [{"prompt": ("12+" * LONG)[:LONG] + f"{k}="} for k in range(30)]
    return load_task("custom", data=items, reward=lambda completion, item: len(completion), test_share=0.4)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, saved, tmp_path_factory):
    """(worker over vLLM, worker over transformers) of one model, at the same state."""
    config = {
        **OPTIONS,
        "model": str(saved(request.param, KINDS[request.param])),
        "output": str(tmp_path_factory.mktemp("run")),
    }
    task = long_questions() if request.param == "Qwen2" else None
    ours = make_worker(TrainConfig(**config, engine="vllm"), task=task)
    yield ours, make_worker(TrainConfig(**config), task=task)
    ours.close()


def live(worker):
    """{name: tensor} of what the worker's engine computes with."""
    if worker.model is not None:
        return {name: p.detach().clone() for name, p in worker.model.named_parameters()}
    from es_finetune.models.load import empty_model

    model, _, dtype = empty_model(worker.replica.identity["model"])
    return {name: p.detach() for name, p in worker.weights.filled(model, dtype).named_parameters()}


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(bits(a[name]), bits(b[name])), name


def test_start_members_and_updates_are_bit_for_bit_those_of_transformers(pair):
    ours, theirs = pair
    a, b = ours.start(), theirs.start()
    assert {key: a[key] for key in a if key != "model"} == {key: b[key] for key in b if key != "model"}
    before = live(ours)
    assert_same(before, live(theirs))
    for worker in pair:
        worker.weights.perturb(3)
    member = live(ours)
    assert_same(member, live(theirs))
    for name, tensor in member.items():
        changed = (tensor != before[name]).float().mean()
        assert changed == 1 if tensor.dtype == torch.float32 else changed > 0.6, name  # 1 + 0.02 eps is often 1 in bf16
    for worker in pair:
        worker.weights.restore()
    assert_same(before, live(ours))


def test_answers_are_those_of_transformers_before_and_after_every_change(pair):
    ours, theirs = pair
    generation = 0
    if theirs.model.dtype == torch.bfloat16:  # whose texts differ by the order of sums
        digests = [ours.evaluate(generation, {}, lambda line: None)[0] for _ in range(2)]
        assert [line["digest"] for line in digests[0]] == [line["digest"] for line in digests[1]]
    else:
        for z in ((1.0, -1.0, 0.5, -0.5), (-0.5, 1.5, -1.0, 0.0)):
            evals = [worker.answer_held_out() for worker in pair]
            assert [a.ids for a in evals[0].answers] == [a.ids for a in evals[1].answers]
            assert evals[0].digest == evals[1].digest
            lines = [worker.evaluate(generation, {}, lambda line: None)[0] for worker in pair]
            assert [line["digest"] for line in lines[0]] == [line["digest"] for line in lines[1]]
            assert len({line["digest"] for line in lines[0]}) > 1  # a stale cache would answer alike
            proofs = [worker.update(Update(generation, z, 4, 0.0), with_health=False) for worker in pair]
            assert proofs[0]["theta"] == proofs[1]["theta"] and proofs[0]["live"] == proofs[1]["live"]
            generation += 1
        assert evals[0].digest != ours.answer_held_out().digest


READ = [{"prompt": ("12+" * LONG)[:LONG] + f"{k}=", "answer": f"{k}" * k, "rejected": "7"} for k in range(1, 10)]


def test_answers_are_read_as_by_transformers_and_sampled_with_the_same_random_numbers(saved, tmp_path):
    """Log-probabilities are those of each member's weights, behind a prompt of several blocks of the cache."""
    config = {**OPTIONS, "model": str(saved("Llama")), "output": str(tmp_path / "run"), "prompts": 0}
    config |= {"task": "custom", "reward": "logprob"}
    task = load_task("custom", data=READ, reward="logprob", test_share=0.4)
    ours, theirs = (make_worker(TrainConfig(**config, engine=engine), task=task) for engine in ("vllm", "hf"))
    lines, expected = (worker.evaluate(0, {}, lambda line: None)[0] for worker in (ours, theirs))
    assert len({line["digest"] for line in lines}) == 4
    for line, other in zip(lines, expected, strict=True):
        assert line["rewards"] == pytest.approx(other["rewards"], abs=1e-3)
    evals = [worker.answer_held_out() for worker in (ours, theirs)]
    assert evals[0].digest == evals[1].digest
    assert evals[0].rewards == pytest.approx(evals[1].rewards, abs=1e-3)

    engine, sampling = ours.replica.engine, Sampling(1.0, 5)
    encoded = engine.encode([READ[0]["prompt"]] * 6)
    drawn = engine.generate(encoded, sampling)
    assert len(set(drawn)) > 3 and engine.generate(encoded, sampling) == drawn
    assert engine.generate(encoded[:3], sampling) == drawn[:3] != engine.generate(encoded[:3], Sampling(1.0, 6))
    ours.close()


def test_a_run_is_replayed_and_its_model_loads(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    model = saved("Llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    config = TrainConfig(
        **{**OPTIONS, "health_every": 1}, model=str(model), output=str(tmp_path / "run"), engine="vllm"
    )
    task = long_questions()
    summary = Trainer(config, task=task).train()
    assert summary["backend"] == "cpu in vLLM" and all(
        g.update.z is not None for g in read_log(tmp_path / "run/run.log")[1]
    )
    assert f"{rebuild(tmp_path / 'run', device='cpu').optimizer.fingerprint('live'):016x}" == summary["live"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert f"{es_kernels.fingerprint(es_kernels.ParamTable(named_segments(exported))):016x}" == summary["live"]
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert row["health"]["correlation_min"][1] > 0.99
    # Resumed over the other engine, which the log allows: scores come from wherever, weights do not.
    again = Trainer(
        TrainConfig(
            **{**OPTIONS, "generations": 3, "health_every": 1},
            model=str(model),
            output=str(tmp_path / "run"),
            resume=True,
        ),
        task=task,
    ).train()
    assert again["generations"] == 3 and again["fingerprint"] != summary["fingerprint"]


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"master": "none"}, "master 'none' is for engine hf"),
        ({"lora_rank": 4}, "leave out lora_rank, or use --engine hf"),
        ({"tensor_parallel": 2, "snapshot_every": 5}, "leave out snapshot_every, the log is enough"),
        ({"model": "./nowhere"}, "the model's folder ./nowhere does not exist"),
    ],
)
def test_options_and_models_that_do_not_go_with_it(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        make_worker(
            TrainConfig(**{**OPTIONS, "model": "embedded", "engine": "vllm", "output": str(tmp_path), **options})
        )


def test_quantised_checkpoints_and_adapters(saved, tmp_path):
    model = saved("Llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="has quantised weights"):
        make_worker(TrainConfig(**OPTIONS, model=str(model), engine="vllm", output=str(tmp_path)))
    (model / "config.json").write_text(json.dumps(config))
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter, which this engine cannot perturb"):
        make_worker(TrainConfig(**OPTIONS, model=str(model), engine="vllm", output=str(tmp_path)))
