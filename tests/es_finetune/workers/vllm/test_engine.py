"""Contract under test: weights in vLLM's workers do what weights here do, and all that crosses to them is JSON. Answers
are sampled with random numbers of each prompt's own; given ones are read as by transformers.

Without vLLM: its modules are empty, and its worker is this process with a model of transformers. tests/vllm has the
real one, in an environment of its own.
"""

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from transformers import AutoTokenizer

from es_finetune.config import TrainConfig
from es_finetune.engines import Answer, Sampling
from es_finetune.engines.hf import HFEngine
from es_finetune.engines.prompts import PromptError
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.load import EMBEDDED_MODEL
from es_finetune.optim.update import Update
from es_finetune.runs.setup import make_optimizer, make_schedules
from es_finetune.tasks import load_task
from es_finetune.workers.weights import Weights
from es_kernels import NamedTensor

LAYERS = (
    "ColumnParallelLinear LinearBase MergedColumnParallelLinear QKVParallelLinear ReplicatedLinear RowParallelLinear "
    "UnquantizedLinearMethod VocabParallelEmbedding"
).split()


@pytest.fixture
def wire(monkeypatch):
    """(engine.py, extension.py), imported over a package vllm of empty classes."""
    for name in (
        "vllm vllm.lora vllm.lora.request vllm.platforms vllm.model_executor vllm.model_executor.layers "
        "vllm.model_executor.layers.utils "
        "vllm.model_executor.layers.linear vllm.model_executor.layers.vocab_parallel_embedding"
    ).split():
        module = ModuleType(name)
        vars(module).update({kind: type(kind, (), {}) for kind in LAYERS})
        module.current_platform = SimpleNamespace(is_cpu=lambda: True)
        module.LoRARequest = lambda *arguments: arguments
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "es_finetune.workers.vllm.extension", raising=False)
    from es_finetune.workers.vllm import engine, extension

    yield engine, extension
    sys.modules.pop("es_finetune.workers.vllm.extension", None)


class LLM:
    """Calls its one worker, over JSON."""

    def __init__(self, worker):
        self.worker, self.resets = worker, 0

    def collective_rpc(self, method, args):
        result = getattr(self.worker, method)(*json.loads(json.dumps(args)))
        return [json.loads(json.dumps(result))]

    def reset_prefix_cache(self):
        self.resets += 1
        return True


def test_what_crosses_to_vllm_is_json_and_comes_to_the_same_weights(wire, build_model):
    engine, extension = wire
    options = {"population": 4, "prompts": 4, "momentum": 0.5, "health_every": 1, "sigma_for": ["*norm*=0.02"]}
    config = TrainConfig(**options, noise_rank=2)
    there, here = build_model("llama"), build_model("llama")
    entries = list(named_segments(here))
    weights = Weights(entries, make_optimizer(entries, config, None), make_schedules(config), with_health=True)
    worker = extension.Extension()
    worker.rank, worker.get_model = 0, lambda: there
    llm = LLM(worker)
    shapes = {name: list(p.shape) for name, p in there.named_parameters()}
    remote = engine.RemoteWeights(llm, dataclasses.asdict(config), shapes)
    start = remote.start()
    assert start == weights.start()
    with torch.no_grad():
        for generation, z in enumerate(((1.0, -1.0, 0.1, -0.1), None, (0.5, 0.25, -0.75, 0.0))):
            update = Update(generation, z, 4, 0.5)
            for each in (remote, weights):
                each.perturb(0)
                each.measure_member()
            for a, b in zip(there.parameters(), here.parameters(), strict=True):
                assert torch.equal(a, b)
            assert remote.noise([3, 1]) == weights.noise([3, 1])
            assert llm.resets == 3 * generation + 1
            for each in (remote, weights):
                each.restore()
            mine, theirs = (each.apply(update.to_json(), with_health=True) for each in (weights, remote))
            assert all(mine[key] == theirs[key] for key in ("theta", "live", "lr", "sigma", "health"))
            assert f"{theirs['theta']:016x}" != start["theta"]


def test_an_error_of_vllms_worker_is_one_of_the_user(wire, build_model):
    engine, extension = wire
    worker = extension.Extension()
    worker.rank, worker.get_model = 0, lambda: build_model("llama")
    config = dataclasses.asdict(TrainConfig(freeze=["*nothing*"]))
    shapes = {name: list(p.shape) for name, p in worker.get_model().named_parameters()}
    with pytest.raises(ValueError, match="the pattern '.nothing.' fits no parameter"):
        engine.RemoteWeights(LLM(worker), config, shapes)
    with pytest.raises(ValueError, match="vLLM has a parameter .* that the checkpoint has not"):
        engine.RemoteWeights(LLM(worker), config, {})


def test_members_that_vllms_adapters_cannot_hold_are_refused(wire, build_model):
    engine, extension = wire
    worker = extension.Extension()
    worker.rank, worker.get_model, worker.model_runner = 0, lambda: build_model("llama"), MagicMock()
    shapes = {name: list(p.shape) for name, p in worker.get_model().named_parameters()}
    adapters = engine.Adapters(["model.layers.0.mlp.up_proj.weight"], members=2, noise_rank=1)
    for order, words in (
        ([1, 2], "vLLM has no adapter for model.layers.0.mlp.up_proj.weight by itself"),
        ([2, 1], "vLLM orders its adapters otherwise"),
    ):
        worker.model_runner.lora_manager._adapter_manager = SimpleNamespace(lora_index_to_id=order, modules={})
        with pytest.raises(ValueError, match=words):
            engine.RemoteWeights(LLM(worker), dataclasses.asdict(TrainConfig(noise_rank=1)), shapes, adapters)


def test_fingerprints_of_what_each_process_counts_add_up_to_the_models(wire, weights):
    _, extension = wire
    config = TrainConfig(population=4)

    def start(*counted):
        entries = [NamedTensor(name, tensor) for name, tensor in weights(torch.bfloat16)]
        optimizer = make_optimizer(entries, config, None)
        return extension._Sharded(entries, optimizer, make_schedules(config), counted=list(counted)).start()

    whole, one, other = start(True, True, True, True), start(True, False, False, True), start(False, True, True, False)
    for key in ("theta", "live", "base_fingerprint"):
        assert int(whole[key], 16) == (int(one[key], 16) + int(other[key], 16)) % 2**64


# --- what is asked ----------------------------------------------------------------------------------------------------


class Generating:
    """vllm.LLM over a model of transformers: the log-probabilities of prompts, and of each answer one token."""

    def __init__(self, model, max_model_len):
        self.model, self.max_model_len, self.asked = model, max_model_len, []

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm):
        self.asked = params = params if isinstance(params, list) else [params] * len(prompts)
        outputs = []
        for prompt, one in zip(prompts, params, strict=True):
            ids = prompt["prompt_token_ids"]
            assert len(ids) + one.max_tokens <= self.max_model_len
            log_p = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], dim=-1)
            of = [
                {token: SimpleNamespace(logprob=row[token].item())} for token, row in zip(ids[1:], log_p, strict=False)
            ]
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=(5,))], prompt_logprobs=[None, *of]))
        return outputs


@pytest.fixture
def engine_of(wire, build_model):
    """engine_of(task) -> (VllmEngine over a model of 64 positions, HFEngine over the same)."""
    engine, _ = wire
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = build_model("llama")

    def make(task):
        vllm = SimpleNamespace(
            SamplingParams=lambda **options: SimpleNamespace(**options),
            LLM=lambda max_model_len, **options: Generating(model, max_model_len),
        )
        options = {"batch_size": 4, "seed": 0, "tensor_parallel": 1, "master": "fp32"}
        made = engine.VllmEngine(vllm, "x", model, tokenizer, torch.float32, task, max_new_tokens=4, **options)
        return made, HFEngine(model, tokenizer, 4, 4)

    return make


def test_answers_are_read_as_by_transformers(engine_of):
    data = [{"prompt": f"^{a}:", "answer": f"{a}+" * a, "rejected": "7"} for a in range(1, 9)]
    task = load_task("custom", data=data, reward="logprob")
    engine, other = engine_of(task)
    prompts, answers = ["^1:", "^2,3:", "4"], ["1+1", "7", Answer("", (5, 6))]
    read, expected = (each.log_probs(each.encode_answers(prompts, answers)) for each in (engine, other))
    assert [len(row) for row in read] == [4, 2, 2]
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-5)
    with pytest.raises(PromptError, match="answer 0 has 61 tokens, too many after 3 of the prompt"):
        engine.encode_answers(["^1:"], ["7" * 60])  # 64 positions, and vLLM generates one


def test_each_prompt_has_random_numbers_of_its_own(engine_of):
    engine, _ = engine_of(load_task("countdown-char"))
    encoded = engine.encode(["1", "2", "2"])
    assert engine.generate(encoded) == [Answer("1", (5,))] * 3
    assert [params.temperature for params in engine.llm.asked] == [0.0] * 3
    engine.generate(encoded, Sampling(0.5, 2**64 - 1))
    first = engine.llm.asked
    assert {params.temperature for params in first} == {0.5} and len({params.seed for params in first}) == 3
    assert all(0 <= params.seed < 2**63 and params.top_k == 0 and params.max_tokens == 4 for params in first)
    engine.generate(encoded[:2], Sampling(0.5, 2**64 - 1))
    assert engine.llm.asked == first[:2]
