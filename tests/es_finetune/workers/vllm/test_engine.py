"""Contract under test: weights in vLLM's workers do what weights here do, and all that crosses to them is JSON.

Without vLLM: its modules are empty, and its worker is this process with a model of transformers. tests/vllm has the
real one, in an environment of its own.
"""

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from es_finetune.config import TrainConfig
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.optim.update import Update
from es_finetune.runs.setup import make_optimizer, make_schedules
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
        "vllm vllm.platforms vllm.model_executor vllm.model_executor.layers vllm.model_executor.layers.utils "
        "vllm.model_executor.layers.linear vllm.model_executor.layers.vocab_parallel_embedding"
    ).split():
        module = ModuleType(name)
        vars(module).update({kind: type(kind, (), {}) for kind in LAYERS})
        module.current_platform = SimpleNamespace(is_cpu=lambda: True)
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
