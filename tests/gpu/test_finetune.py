"""Contract under test: a run on a GPU is the run that its log describes.

Each way of decoding trains; the log replayed on the CPU gives the same bits; a run resumed on the GPU goes on from
them; perturbing in place keeps captured graphs valid (an engine that has answered before answers like a fresh one).
"""

import pytest

from es_finetune import EvolutionStrategy, TrainConfig, Trainer
from es_finetune.engines import DECODINGS
from es_finetune.engines.hf import HFEngine
from es_finetune.models.load import load_model
from es_finetune.runs.replay import rebuild
from es_finetune.tasks import load_task

OPTIONS = {
    "generations": 3,
    "population": 4,
    "prompts": 32,
    "eval_items": 32,
    "report_to": ["none"],
    "health_every": 1,
    "device": "cuda",
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("master", ["fp32", "copy", "host", "none"])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_run_is_replayed_on_the_cpu(tmp_path, decoding, master):
    summary = Trainer(TrainConfig(output=str(tmp_path / "run"), decoding=decoding, master=master, **OPTIONS)).train()
    optimizer = rebuild(tmp_path / "run", device="cpu").optimizer
    assert (f"{optimizer.fingerprint('theta'):016x}", f"{optimizer.fingerprint('live'):016x}") == (
        summary["fingerprint"],
        summary["live"],
    )
    assert (
        Trainer(
            TrainConfig(output=str(tmp_path / "run"), decoding=decoding, master=master, resume=True, **OPTIONS)
        ).generation
        == 3
    )


@pytest.mark.parametrize("decoding", DECODINGS)
def test_an_engine_that_has_answered_before_answers_like_a_fresh_one(decoding):
    model, tokenizer, _ = load_model("embedded", device="cuda", dtype="bfloat16")
    prompts = [item.prompt for item in load_task("countdown-char").test[:64]]
    engine = HFEngine(model, tokenizer, 12, 16, decoding=decoding)
    encoded = engine.encode(prompts)
    before = engine.generate(encoded)
    with EvolutionStrategy(model.named_parameters(), sigma=0.05, population=2).perturbed(0):
        inside = engine.generate(encoded)
        fresh = HFEngine(model, tokenizer, 12, 16, decoding=decoding)
        assert inside == fresh.generate(fresh.encode(prompts)) != before
    assert engine.generate(encoded) == before
