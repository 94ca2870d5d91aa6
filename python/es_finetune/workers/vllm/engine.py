"""The engine over vLLM. Weights, theta and updates live in vLLM's worker processes (extension.py); what crosses to them
is numbers."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from es_finetune.config import TrainConfig
from es_finetune.engines import Answer, Sampling
from es_finetune.engines.prompts import (
    Prompt,
    continuations,
    positions_of,
    refuse_unanswerable,
    refuse_unreadable,
    tokenize,
    vocabulary_of,
)
from es_finetune.errors import UserError, first_line
from es_finetune.evaluation.evaluator import encoded
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.load import empty_model, path_of
from es_finetune.models.members import MemberNoise
from es_finetune.models.save import save_model
from es_finetune.runs.setup import make_members, tell_what_is_left_out
from es_finetune.tasks import Task, reads
from es_finetune.workers.plan import Plan
from es_finetune.workers.replica import Replica
from es_kernels.noise import SAMPLING, member_seed

_UTILISATION = 0.9  # of a GPU's memory: vLLM's default
_BLOCK = 128  # lengths are rounded up to so many tokens


def load(config: TrainConfig, plan: Plan) -> Replica:
    """The model of the config in vLLM, with the run's weights over it, for what the plan asks.

    Raises:
        UserError: vLLM is not installed, or it or ES in place cannot do what the config asks for.
    """
    _refuse(config)
    vllm = _vllm()
    model, tokenizer, dtype = empty_model(config.model, config.dtype)
    entries = list(named_segments(model))
    members = make_members(model, entries, config)
    tell_what_is_left_out(entries, members, config)
    adapters = None if members is None else Adapters(sorted(members.names), plan.at_once, config.noise_rank)
    engine = VllmEngine(
        vllm,
        config.model,
        model,
        tokenizer,
        dtype,
        plan.task,
        max_new_tokens=config.max_new_tokens or plan.task.max_new_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        tensor_parallel=config.tensor_parallel,
        master=config.master,
        adapters=adapters,
    )
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    try:
        weights = RemoteWeights(engine.llm, dataclasses.asdict(config), shapes, adapters)
    except BaseException:
        engine.close()
        raise
    identity = {
        "model": config.model,
        "class": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "vllm": vllm.__version__,
    }
    identity["parameters"] = sum(p.numel() for p in model.parameters())

    def save(folder: Path) -> None:
        save_model(weights.filled(model, dtype), tokenizer, folder)

    return Replica(
        weights,
        engine,
        identity,
        identity["parameters"],
        f"{weights.backend} in vLLM",
        save,
        close=engine.close,
        together=adapters is not None,
    )


class Adapters(NamedTuple):
    """What vLLM allocates for members that share a batch: one of its LoRA adapters each.

    Attributes:
        shared: Names of the matrices in which they differ.
        members: How many, at most.
        noise_rank: Of their noise.
    """

    shared: Sequence[str]
    members: int
    noise_rank: int

    def options(self) -> dict[str, Any]:
        """Of vllm.LLM."""
        from vllm.config.lora import MaxLoRARanks

        return {
            "enable_lora": True,
            "max_loras": self.members,
            "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= self.noise_rank),
            "lora_target_modules": sorted({name.split(".")[-2] for name in self.shared}),
        }


class VllmEngine:
    """Answers by vLLM's continuous batching, `batch_size` at a time, CUDA graphs and prefix caching as vLLM has them;
    log-probabilities by `prompt_logprobs`. Its memory for the KV cache is what theta leaves: theta is allocated after
    it.

    Members that share a batch are LoRA adapters, without files: extension.py writes their noise where vLLM computes
    with it, in place.

    Args:
        vllm: The module.
        name: Folder or hub name of the model.
        model: The same without weights (`load.empty_model`): its shapes and limits.
        tokenizer: Its tokenizer.
        dtype: Of the weights.
        task: Its longest question decides the length of a sequence.
        max_new_tokens: Of an answer.
        batch_size: Answers at a time.
        seed: Of the run; each call of `generate` has its own.
        tensor_parallel: GPUs over which the model is cut.
        master: Where the exact weights will live, "fp32", "copy" or "host": memory for them is left free.
        adapters: For members that share a batch; None: one member at a time, put in place by others.

    Raises:
        UserError: The exact weights do not fit beside the model, or vLLM cannot load it.
    """

    def __init__(
        self,
        vllm: Any,
        name: str,
        model: torch.nn.Module,
        tokenizer: Any,
        dtype: torch.dtype,
        task: Task,
        *,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
        tensor_parallel: int,
        master: str,
        adapters: Adapters | None = None,
    ):
        self.tokenizer, self.max_new_tokens = tokenizer, max_new_tokens
        self.vocabulary = vocabulary_of(model)
        longest = max(
            map(len, encoded([*task.train, *task.test], lambda prompts: tokenize(tokenizer, prompts))), default=0
        )
        longest += self.max_new_tokens
        if reads(task):
            items = [item for item in [*task.train, *task.test] for _ in task.answers(item)]
            texts = [text for item in [*task.train, *task.test] for text in task.answers(item)]
            pairs = encoded(items, lambda prompts: self._continuations(prompts, texts))
            longest = max(longest, 1 + max(len(before) + len(after) for before, after in zip(*pairs, strict=True)))
        self.length = min(positions_of(model), -(-longest // _BLOCK) * _BLOCK)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        options: dict[str, Any] = {"tensor_parallel_size": tensor_parallel}
        if adapters is not None:
            options |= adapters.options()
        if tensor_parallel > 1:
            options["distributed_executor_backend"] = "mp"
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            bytes_a_parameter = {"fp32": 4, "copy": dtype.itemsize, "host": 0}[master]
            theta = bytes_a_parameter * sum(p.numel() for p in model.parameters()) // tensor_parallel
            # Not by torch, which would begin to use the GPU in this process
            free = current_platform.get_device_total_memory() * _UTILISATION
            if theta >= free:
                raise UserError(
                    f"master {master!r} needs {theta / 1e9:.0f} GB on each GPU beside the weights: choose master "
                    "copy or host, or more --tensor_parallel"
                )
            options["gpu_memory_utilization"] = _UTILISATION * (1 - theta / free)
        self.sampling_params = functools.partial(vllm.SamplingParams, detokenize=False)
        try:
            self.llm = vllm.LLM(
                model=path_of(name),
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=self.length,
                max_num_seqs=batch_size,
                seed=seed % 2**31,  # vLLM wants a small one
                worker_extension_cls="es_finetune.workers.vllm.extension.Extension",
                **options,
            )
        except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
            raise UserError(f"vLLM could not load {name}: {first_line(error)}; what it said stands above") from error

    def encode(self, prompts: Sequence[Prompt], members: int = 1) -> list[dict[str, list[int]]]:
        tokens = tokenize(self.tokenizer, prompts)
        refuse_unanswerable(tokens, self.max_new_tokens, self.length, self.vocabulary)
        return [{"prompt_token_ids": ids} for ids in tokens]

    def generate(self, encoded: list[dict[str, list[int]]], sampling: Sampling | None = None) -> list[Answer]:
        return self._written(self.llm.generate(encoded, self._params(len(encoded), sampling), use_tqdm=False))

    def generate_members(
        self, encoded: list[dict[str, list[int]]], noise: Sequence[MemberNoise], sampling: Sampling | None = None
    ) -> list[list[Answer]]:
        outputs = self._of_members(encoded, self._params(len(encoded), sampling), noise)
        return [self._written(of_member) for of_member in outputs]

    def _params(self, prompts: int, sampling: Sampling | None) -> list[Any]:
        """Of each prompt."""
        if sampling is None:
            return [self.sampling_params(temperature=0.0, max_tokens=self.max_new_tokens)] * prompts
        return [
            self.sampling_params(
                temperature=sampling.temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=self.max_new_tokens,
                seed=member_seed(sampling.seed, 0, prompt, SAMPLING) % 2**63,  # vLLM's are signed
            )
            for prompt in range(prompts)
        ]

    def _of_members(self, prompts: list[Any], params: list[Any], noise: Sequence[MemberNoise]) -> list[list[Any]]:
        """vLLM's output of each member for each prompt."""
        from vllm.lora.request import LoRARequest

        members, count = range(len(noise[0].seeds)), len(prompts)
        _change(self.llm, "put_members", noise)
        # vLLM knows an adapter by its number, and asks for a path, which it does not open
        adapters = [LoRARequest(f"member {k}", k + 1, "in memory") for k in members for _ in prompts]
        outputs = self.llm.generate(
            prompts * len(members), params * len(members), use_tqdm=False, lora_request=adapters
        )
        return [outputs[k * count : (k + 1) * count] for k in members]

    def _written(self, outputs: list[Any]) -> list[Answer]:
        tokens = [list(one.outputs[0].token_ids) for one in outputs]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Answer(text, tuple(ids)) for text, ids in zip(texts, tokens, strict=True)]

    def encode_answers(
        self, prompts: Sequence[Prompt], answers: Sequence[str | Answer], members: int = 1
    ) -> list[tuple[list[int], list[int]]]:
        before, after = self._continuations(prompts, answers)
        refuse_unreadable(before, after, self.length - 1, self.vocabulary)  # vLLM generates a token in any case
        return list(zip(before, after, strict=True))

    def log_probs(self, encoded: list[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
        return self._read(encoded, self.llm.generate(*self._readings(encoded), use_tqdm=False))

    def log_probs_members(
        self, encoded: list[tuple[list[int], list[int]]], noise: Sequence[MemberNoise]
    ) -> list[list[torch.Tensor]]:
        return [self._read(encoded, of_member) for of_member in self._of_members(*self._readings(encoded), noise)]

    def _readings(self, encoded: list[tuple[list[int], list[int]]]) -> tuple[list[Any], list[Any]]:
        """Prompts and their parameters."""
        params = self.sampling_params(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        return [{"prompt_token_ids": before + after} for before, after in encoded], [params] * len(encoded)

    def _read(self, encoded: list[tuple[list[int], list[int]]], outputs: list[Any]) -> list[torch.Tensor]:
        return [
            torch.tensor(
                [of[token].logprob for of, token in zip(one.prompt_logprobs[len(before) :], after, strict=True)]
            )
            for one, (before, after) in zip(outputs, encoded, strict=True)
        ]

    def _continuations(
        self, prompts: Sequence[Prompt], answers: Sequence[str | Answer]
    ) -> tuple[list[list[int]], list[list[int]]]:
        return continuations(self.tokenizer, prompts, answers, self.tokenizer.eos_token_id)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class RemoteWeights:
    """weights.Weights of all of an engine's workers at once.

    Args:
        llm: vLLM's.
        config: Of TrainConfig, of which each of vLLM's workers makes its optimizer.
        shapes: Of the checkpoint's tensors.
        adapters: For members that share a batch; None: they are put in place.
    """

    def __init__(
        self, llm: Any, config: dict[str, Any], shapes: dict[str, list[int]], adapters: Adapters | None = None
    ):
        self.llm = llm
        built = _rpc(llm, "es_build", config, shapes, *(() if adapters is None else adapters[:2]))
        self.backend = built[0]["backend"]
        covered: dict[str, int] = {}
        for of_worker in built:
            for name, count in of_worker["covered"].items():
                covered[name] = covered.get(name, 0) + count
        wrong = {
            name: covered.get(name, 0) for name, shape in shapes.items() if covered.get(name, 0) != math.prod(shape)
        }
        if wrong:
            name, count = next(iter(wrong.items()))
            raise UserError(
                f"{len(wrong)} tensor(s) of the checkpoint are not wholly in vLLM's parameters, e.g. {name}: {count} "
                f"of {math.prod(shapes[name])} elements; use --engine hf for this model"
            )
        self.shapes = shapes

    def start(self) -> dict[str, Any]:
        starts = _call(self.llm, "start")
        proofs = {
            key: f"{sum(int(of[key], 16) for of in starts) % 2**64:016x}"
            for key in ("base_fingerprint", "theta", "live")
        }
        return {**starts[0], **proofs}

    def fast_forward(self, generations: Sequence[dict[str, Any]], snapshots: str | None = None) -> None:
        if len(generations):
            _change(self.llm, "fast_forward", list(generations), snapshots)

    def perturb(self, member: int) -> None:
        _change(self.llm, "perturb", member)

    def noise(self, members: Sequence[int]) -> list[MemberNoise]:
        return [MemberNoise(*group) for group in _call(self.llm, "noise", list(members))[0]]

    def restore(self) -> None:
        _change(self.llm, "restore")

    def measure_member(self) -> None:
        _call(self.llm, "measure_member")

    def apply(self, update: dict[str, Any], with_health: bool = False) -> dict[str, Any]:
        results = _change(self.llm, "apply", update, with_health)
        proofs = {key: sum(of[key] for of in results) % 2**64 for key in ("theta", "live")}
        return {**results[0], **proofs, "peak_memory_bytes": max(of["peak_memory_bytes"] for of in results)}

    def save_snapshot(self, folder: str) -> None:
        _call(self.llm, "save_snapshot", folder)

    def filled(self, model: Any, dtype: torch.dtype) -> torch.nn.Module:
        """The model, so far empty, with the live weights of the workers as its own, in the CPU's memory."""
        from safetensors import safe_open

        state = {name: torch.empty(shape, dtype=dtype) for name, shape in self.shapes.items()}
        with tempfile.TemporaryDirectory() as folder:
            for path in _rpc(self.llm, "es_write", folder):
                with safe_open(path, "pt") as file:
                    for number, (name, first, index_stride) in json.loads(file.metadata()["places"]).items():
                        part = file.get_tensor(number)
                        torch.as_strided(state[name], part.shape, (index_stride, 1), first).copy_(part)
        model.load_state_dict(state, assign=True, strict=False)
        model.tie_weights()
        return model


def _change(llm: Any, method: str, *arguments: Any) -> list[Any]:
    """_call of what changes weights or members. After it vLLM forgets what it has computed: its cache of prefixes would
    give the answers of those before."""
    try:
        return _call(llm, method, *arguments)
    finally:
        if not llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not give up its prefix cache, which holds what the weights before have computed: requests "
                "are still running"
            )


def _call(llm: Any, method: str, *arguments: Any) -> list[Any]:
    """A method of the weights in each of vLLM's workers."""
    return [of_worker["result"] for of_worker in _rpc(llm, "es_call", method, *arguments)]


def _rpc(llm: Any, method: str, *arguments: Any) -> list[Any]:
    results = llm.collective_rpc(method, args=arguments)
    for rank, of_worker in enumerate(results):
        if isinstance(of_worker, dict) and "error" in of_worker:
            where = f"vLLM's worker {rank}: " if len(results) > 1 else ""
            raise UserError(f"{where}{of_worker['error']}")
    return results


def _refuse(config: TrainConfig) -> None:
    """What goes with transformers only, or not with weights in other processes."""
    if config.master == "none":
        raise UserError("master 'none' is for engine hf: over vLLM choose fp32, copy or host")
    if config.lora_rank:
        raise UserError(
            "vLLM computes with adapters that it loads from files, which cannot be perturbed in place: leave out "
            "lora_rank, or use --engine hf"
        )
    if config.tensor_parallel > 1 and config.snapshot_every:
        raise UserError(
            "snapshots are of whole weights, which no worker of --tensor_parallel has: leave out snapshot_every, the "
            "log is enough"
        )


def _vllm():
    try:
        import vllm
    except ImportError:
        raise UserError(
            "engine vllm needs the package vllm, best in an environment of its own: see docs/guides/vllm.md"
        ) from None
    return vllm
