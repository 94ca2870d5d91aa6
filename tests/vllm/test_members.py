"""Contract under test: members that share a batch in vLLM answer as they do one by one.

Their greedy answers are those of transformers with the same noise in the same matrices, one member after the other
(float32, 99 % of tokens), though the next group has the same adapters and the same long prompts; theta stays as it is,
and answers as before. A run is replayed without vLLM, which comes to the same choice of matrices.
"""

import itertools

import pytest
import torch

from es_finetune import TrainConfig, Trainer
from es_finetune.engines import Sampling
from es_finetune.optim.update import Update
from es_finetune.runs.log import read_log
from es_finetune.runs.replay import rebuild
from es_finetune.tasks import load_task
from es_finetune.workers.setup import make_worker

LONG = 300  # characters, which are tokens: more than two blocks of vLLM's cache
OPTIONS = {
    "task": "custom",
    "population": 6,
    "members_at_once": 3,
    "prompts": 4,
    "eval_items": 8,
    "generations": 2,
    "eval_every": 0,
    "health_every": 0,
    "sigma": 0.05,
    "lr": 0.02,
    "report_to": ["none"],
    "device": "cpu",
    "max_new_tokens": 12,
}


def long_questions():
    """Their common prefix is nearly all of them."""
    items = [{"prompt": ("12+" * LONG)[:LONG] + f"{k}="} for k in range(20)]
    return load_task("custom", data=items, reward=lambda completion, item: len(set(completion)), test_share=0.4)


# Queries and keys in groups; tied, with biases, and a rank that vLLM has not
@pytest.fixture(scope="module", params=[("Llama", 1, False), ("Qwen2", 3, True)], ids=lambda param: param[0])
def pair(request, saved, tmp_path_factory):
    """(worker over vLLM in which members share a batch, worker over transformers in which they do not) of one model,
    the same matrices tuned."""
    kind, rank, antithetic = request.param
    config = {
        **OPTIONS,
        "model": str(saved(kind)),
        "output": str(tmp_path_factory.mktemp("run")),
        "noise_rank": rank,
        "antithetic": antithetic,
        "sigma_for": ["*mlp*=0.02"],
    }
    ours = make_worker(TrainConfig(**config, engine="vllm"), task=long_questions())
    alone = {"members_at_once": 1, "tune": ["*_proj.weight"]}
    yield ours, make_worker(TrainConfig(**config | alone), task=long_questions())
    ours.close()


def tokens_of(worker, generation):
    """[member][question] -> tokens."""
    answered = worker._answered(generation, range(OPTIONS["population"]), ())
    return [[answer.ids for answer in evaluation.answers] for _, evaluation in answered]


def equal_share(ours, theirs):
    """Of the tokens."""
    pairs = [
        (a, b)
        for mine, yours in zip(ours, theirs, strict=True)
        for one, two in zip(mine, yours, strict=True)
        for a, b in itertools.zip_longest(one, two)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def test_members_in_one_batch_answer_as_one_by_one_and_leave_theta_as_it_is(pair):
    ours, theirs = pair
    for generation in range(2):
        before = ours.start()
        held_out = [worker.answer_held_out().digest for worker in pair]
        assert held_out[0] == held_out[1]
        tokens = [tokens_of(worker, generation) for worker in pair]
        theirs.weights.restore()
        assert equal_share(*tokens) >= 0.99
        members = [str(of_member) for of_member in tokens[0]]
        assert len(set(members)) > OPTIONS["members_at_once"]  # the second group is not answered as the first was
        assert ours.start() == before
        assert ours.answer_held_out().digest == held_out[0]
        proofs = [worker.update(Update(generation, (1.0, -1.0, 0.5, -0.5, 0.25, 0.0), 6, 0.0)) for worker in pair]
        assert all(proofs[0][key] == proofs[1][key] for key in ("theta", "live"))
        assert f"{proofs[0]['theta']:016x}" != before["theta"]


def test_fewer_members_than_adapters_answer_as_in_a_full_group(pair):
    ours, _ = pair
    full = [evaluation.digest for _, evaluation in ours._answered(1, range(3), ())]
    assert [evaluation.digest for _, evaluation in ours._answered(1, [2], ())] == full[2:]
    assert [evaluation.digest for _, evaluation in ours._answered(1, [1, 0], ())] == full[1::-1]


def test_samples_of_a_member_are_its_own_whoever_shares_the_batch(pair):
    engine, noise = pair[0].replica.engine, pair[0].weights.noise
    encoded = engine.encode([item.prompt for item in pair[0].task.train[:2]] * 2)
    together = engine.generate_members(encoded, noise([0, 1, 2]), Sampling(1.0, 7))
    assert together[1] == engine.generate_members(encoded, noise([1]), Sampling(1.0, 7))[0]
    assert together[1][:2] != together[1][2:] and together[1] != together[2]


def test_answers_are_read_as_by_transformers_one_by_one(pair):
    prompts, answers = ["^1:", "4" * LONG], ["1+1", "12+7"]
    ours, theirs = (worker.replica.engine for worker in pair)
    together = ours.log_probs_members(ours.encode_answers(prompts, answers, 3), pair[0].weights.noise([0, 3, 5]))
    for member, read in zip([0, 3, 5], together, strict=True):
        pair[1].weights.perturb(member)
        expected = theirs.log_probs(theirs.encode_answers(prompts, answers))
        pair[1].weights.restore()
        torch.testing.assert_close(read, expected, rtol=0, atol=1e-3)
    assert not torch.allclose(together[0][1], together[1][1], atol=0.1)


def test_a_run_is_replayed_without_vllm_and_goes_on_only_over_vllm(saved, tmp_path, caplog):
    model = saved("Qwen2", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    config = {**OPTIONS, "model": str(model), "output": str(tmp_path / "run"), "noise_rank": 1, "engine": "vllm"}
    with caplog.at_level("INFO"):
        summary = Trainer(TrainConfig(**config), task=long_questions()).train()
    assert "members share a batch, so 12 parameters are not tuned" in caplog.text
    assert all(g.update.z is not None for g in read_log(tmp_path / "run/run.log")[1])
    rebuilt = rebuild(tmp_path / "run", device="cpu")
    assert f"{rebuilt.optimizer.fingerprint('live'):016x}" == summary["live"]
    start = rebuild(tmp_path / "run", device="cpu", generation=0).model.state_dict()
    changed = {name for name, tensor in rebuilt.model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed == {name for name in start if name.endswith("_proj.weight")}
    with pytest.raises(ValueError, match="the run was begun with engine 'vllm', not 'hf'"):
        Trainer(TrainConfig(**config | {"engine": "hf", "resume": True}), task=long_questions()).train()
