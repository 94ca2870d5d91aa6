"""Contract under test: Ray actors with a vLLM engine each make the run of one process with transformers, also when one
of them is killed; and an actor that is killed takes its engine along."""

import json
import os
import pathlib
import signal
import threading
import time

import pytest

from es_finetune import TrainConfig, Trainer
from es_finetune.runs.log import read_log

ray = pytest.importorskip("ray")


def running(name):
    """Processes with this title."""
    pids = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cmdline").read_bytes().startswith(name.encode()):
                pids.append(int(path.name))
        except OSError:
            pass
    return pids


def test_a_killed_actor_changes_nothing(saved, tmp_path):
    (tmp_path / "reward.py").write_text("def reward(completion, item):\n    return float(len(completion))\n")
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"prompt": f"{k}+{k}="}) + "\n" for k in range(40)))
    options = {
        "model": str(saved("Llama")),
        "data": str(tmp_path / "items.jsonl"),
        "reward": f"{tmp_path / 'reward.py'}:reward",
    }
    options |= {"population": 6, "prompts": 8, "eval_items": 8, "eval_every": 0, "generations": 4}
    options |= {
        "sigma": 0.02,
        "lr": 0.01,
        "report_to": ["none"],
        "device": "cpu",
        "max_new_tokens": 12,
        "save_model": False,
    }
    expected = Trainer(TrainConfig(**options, output=str(tmp_path / "alone"))).train()
    config = TrainConfig(**options, output=str(tmp_path / "run"), engine="vllm", workers="ray", ray_workers=2)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        trainer = Trainer(config)
        victim = ray.get(trainer.workers.slots[0].actor.__ray_call__.remote(lambda actor: os.getpid()))
        engines = running("VLLM::EngineCore")
        assert len(engines) == 2

        def kill():
            while trainer.generation < 1:
                time.sleep(0.01)
            os.kill(victim, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        result = trainer.train()
        thread.join()
        assert result["fingerprint"] == expected["fingerprint"] and all(
            g.update.z is not None for g in read_log(tmp_path / "run/run.log")[1]
        )
    finally:
        ray.shutdown()
    for _ in range(300):
        if not set(running("VLLM::EngineCore")) & set(engines):
            return
        time.sleep(0.1)
    pytest.fail("engines outlive their actors")
