"""The model of a run: a transformers causal LM with its tokenizer, from a folder or the hub and back to a folder."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import es_kernels
from es_finetune.errors import UserError, did_you_mean, require
from es_finetune.models import WEIGHT_DTYPES
from es_finetune.models.checkpoint_names import (
    adapter_names,
    base_of,
    is_peft,
    named_segments,
    refuse_prompt_config,
    unwrap,
)
from es_kernels.table import DTYPES

EMBEDDED_MODEL = Path(__file__).parent / "embedded"
_MIXED = "mixed_dtypes"  # key of a config.json: the files hold tensors of several dtypes, each to be loaded as it is
# Share of the largest logit: 1/16 of what bfloat16 rounds. In float32 a right merge is off by about 1e-6; wrong ones
# were by 1e-3 (Jamba) and more.
_SAME_LOGITS = 2**-13
# Of the first values of every new adapter, whatever the run's seed: runs that differ in it start from one model
LORA_SEED = 0

# Options of a GenerationConfig that mean something only with do_sample.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def load_model(
    name: str | os.PathLike,
    *,
    device: torch.device | str,
    dtype: str = "auto",
    lora_rank: int = 0,
    pad_token: str | None = None,
    attn_implementation: str | None = None,
    mixed: bool = False,
) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    """(model in eval mode on `device`, its tokenizer, which pads on the left, what to write into a log about them).

    name: "embedded" (the character-level model of the demo), or a folder or hub name of a causal LM or of a PEFT
    adapter, which
        comes with its base model. Of a model with an adapter only the adapter is trainable.
    dtype: of the weights, one of WEIGHT_DTYPES; "auto" is that of the checkpoint's config.
    mixed: with dtype "auto" each tensor has the dtype of its file, as it always has where save_model wrote a model of
    several. lora_rank: above 0 adds a LoRA adapter of this rank to all linear layers but the output, alpha 2 * rank.
    Its first values are
        the same on every machine and for every seed of a run.
    pad_token: an existing token to pad with, for a tokenizer without one.

    ValueError, of one line, if any of it cannot be had.
    """
    if dtype not in WEIGHT_DTYPES:
        raise UserError(f"dtype must be one of {', '.join(WEIGHT_DTYPES)}, not {dtype!r}")
    if lora_rank < 0:
        raise UserError(f"lora_rank must be at least 0, not {lora_rank}")
    name = os.fspath(name)
    path = path_of(name)
    with _one_line(f"model {name}"):
        from transformers.utils import find_adapter_config_file

        adapter = find_adapter_config_file(path) is not None
    if adapter:
        if lora_rank:
            raise UserError(f"model {name} is an adapter already: leave out lora_rank, or give the base model")
        peft = _peft()
        with _one_line(f"adapter {name}"):
            peft_config = peft.PeftConfig.from_pretrained(path)
        refuse_prompt_config(peft_config)
        base_path = peft_config.base_model_name_or_path
        if not base_path:
            raise UserError(
                f"adapter {name} does not say of which model: set base_model_name_or_path in its adapter_config.json"
            )
        base, mixed = _load_base(
            base_path, f"base model {base_path} of adapter {name}", dtype, attn_implementation, mixed
        )
        with _one_line(f"adapter {name}"):
            model = peft.PeftModel.from_pretrained(base, path, is_trainable=True)
    else:
        base_path = path
        base, mixed = _load_base(path, f"model {name}", dtype, attn_implementation, mixed)
        model = base
        if lora_rank:
            model = _add_lora(base, lora_rank)
    freeze_towers(model)
    tokenizer = _load_tokenizer(name, path, base_path)
    _set_pad_token(tokenizer, name, pad_token, base)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in DTYPES:
            raise UserError(
                f"model {name}: {parameter_name} is {parameter.dtype}, and noise is added to float32, bfloat16 and "
                "float16 only: give a dtype"
            )
    with _one_line(f"model {name}"):
        model = model.to(device).eval()
    identity = {
        "model": name,
        "class": type(base).__name__,
        "commit": getattr(base.config, "_commit_hash", None),  # of the hub; a folder has none
        "dtype": dtype_of(base) if mixed else str(base.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "vocabulary": len(tokenizer),
    }
    if adapter:
        identity["base_model"] = base_path
    if lora_rank:
        identity["lora_rank"] = lora_rank
    return model, tokenizer, identity


def dtype_of(model: torch.nn.Module) -> str:
    """Of the parameters and buffers that a checkpoint holds; "mixed" where these are several. An adapter, which has a
    file of its own, aside."""
    adapter = adapter_names(unwrap(model))
    found = {
        t.dtype
        for t in base_of(model).state_dict(keep_vars=True).values()
        if t.is_floating_point() and id(t) not in adapter
    }
    return "mixed" if len(found) > 1 else str(*found).removeprefix("torch.")


def freeze_towers(model: torch.nn.Module) -> None:
    """Freeze, with a UserWarning, what text does not pass through: the parts of a model that see or hear, and what
    joins them to the text."""
    base = base_of(model)
    kinds = tuple(map(type, _towers(getattr(base, "config", None))))
    if not kinds:
        return
    outside = {
        id(p)
        for module in base.modules()
        if isinstance(getattr(module, "config", None), kinds)
        for p in module.parameters()
    }
    if "text_config" in base.config.sub_configs:
        text = [
            part
            for part in (base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings())
            if part is not None
        ]
        outside |= {id(p) for p in base.parameters()} - {id(p) for part in text for p in part.parameters()}
    frozen = {name: p for name, p in base.named_parameters() if p.requires_grad and id(p) in outside}
    for p in frozen.values():
        p.requires_grad_(False)
    if frozen:
        warnings.warn(
            f"{len(frozen)} parameter(s) of {type(base).__name__}, e.g. {next(iter(frozen))}, take no part in text: "
            "they are frozen, and saved as they are",
            stacklevel=2,
        )


def _towers(config: Any) -> list[Any]:
    """The configs of the parts that see or hear."""
    parts = [
        getattr(config, key, None) for key in getattr(config, "sub_configs", {}) if key.startswith(("vision", "audio"))
    ]
    return [part for part in parts if part is not None]


def path_of(name: str) -> str:
    """Where a model of this name is, for transformers and engines: the embedded one is a folder of the package.
    ValueError for what can only be a path, and is no folder."""
    path = Path(name)
    if path.is_file():
        raise UserError(f"model {name} is a file: give its folder")
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not path.is_dir():
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"the model's folder {name} does not exist{did_you_mean(path.name, beside)}")
    return str(EMBEDDED_MODEL) if name == "embedded" else name


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the GPU if there is one. ValueError for one that torch does not know or
    see."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown to torch: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} was asked for, but torch sees no GPU: give --device cpu")
    return device


def save_model(model: torch.nn.Module, tokenizer: Any, folder: str | os.PathLike, *, merge_lora: bool = False) -> None:
    """Write what `from_pretrained` reads: safetensors, configs, tokenizer. `folder` is whole or, as before the call,
    what it was; an older one of the name is replaced. OSError if it cannot be written.

    A merged model is first compared, in float32, with the adapter over its base: ValueError, and nothing written, where
    it computes otherwise. Of a model that also sees or hears all parts are written, and the settings of its processor
    if it came from a folder or the hub. Of a model with a PEFT adapter the adapter is written, or with merge_lora the
    full model with the adapter added into its weights (made on the CPU; `model` stays as it is). A model of several
    dtypes is written as it is and load_model reads it so, while transformers rounds all of it to the dtype of its first
    weight.
    """
    from safetensors import SafetensorError

    model, folder = unwrap(model), Path(folder)
    if is_peft(model) and merge_lora:
        model = _merged(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    part = scratch / "new"
    part.mkdir()
    try:
        if is_peft(model):
            # "auto" would ask the hub whether the vocabulary has grown.
            model.save_pretrained(part, save_embedding_layers=False)
        else:
            with _savable_generation_config(model, part):
                model.save_pretrained(part)
            if dtype_of(model) == "mixed":
                config = part / "config.json"
                config.write_text(json.dumps({**json.loads(config.read_text()), _MIXED: True}, indent=2) + "\n")
            if _towers(model.config):
                _copy_processor(model, part)
        tokenizer.save_pretrained(part)
    except BaseException as error:
        shutil.rmtree(scratch)
        if isinstance(error, (OSError, SafetensorError)):  # the second where the disk is full
            raise OSError(f"the model could not be written to {folder}: {error}") from error
        raise
    if folder.exists():  # a folder cannot be replaced in one step
        os.replace(folder, scratch / "old")
    os.replace(part, folder)
    shutil.rmtree(scratch)


def _copy_processor(model: torch.nn.Module, folder: Path) -> None:
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        with contextlib.suppress(OSError):  # a model made in memory has no folder
            if path := cached_file(
                model.name_or_path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False
            ):
                shutil.copy(path, folder / name)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Any failure as a ValueError of one line: what transformers, peft and the hub say, in any type of error, can be a
    page."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} could not be loaded: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What it says in its first line that is not empty, or else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def empty_model(name: str, dtype: str = "auto") -> tuple[torch.nn.Module, Any, torch.dtype]:
    """(model without memory, its tokenizer, dtype of its weights): what an engine needs to know that loads the weights
    by itself. Its parameters, without the tied ones, have the checkpoint's names and shapes. ValueError, of one line,
    as of load_model."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import find_adapter_config_file

    path = path_of(name)
    with _one_line(f"model {name}"):
        adapter = find_adapter_config_file(path) is not None
    if adapter:
        raise UserError(
            f"model {name} is an adapter, which this engine cannot perturb: give the whole model, or use --engine hf"
        )
    config = _load_config(path, f"model {name}")
    if dtype == "auto" and getattr(config, _MIXED, False):
        raise UserError(
            f"model {name} has tensors of several dtypes, which this engine would make one: give --dtype, or use "
            "--engine hf"
        )
    found = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with _one_line(f"model {name}"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=found)
    with contextlib.suppress(OSError):  # a model may have none
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, _load_tokenizer(name, path, path), found


def _load_config(path: str, what: str) -> Any:
    # trust_remote_code=False: left out, transformers asks at the terminal and waits.
    from transformers import AutoConfig

    with _one_line(what):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{what} has quantised weights, and noise is added to float32, bfloat16 and float16 only: give the "
            "unquantised model"
        )
    return config


def _load_base(
    path: str, what: str, dtype: str, attn_implementation: str | None, mixed: bool
) -> tuple[torch.nn.Module, bool]:
    """The model, and whether each tensor has the dtype of its file."""
    from transformers import AutoModelForCausalLM

    config = _load_config(path, what)
    mixed = dtype == "auto" and (mixed or getattr(config, _MIXED, False))
    if mixed:
        dtype = "float32"  # holds every value of the others
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _one_line(what):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    # transformers fills them with random numbers, others on every machine.
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{what} lacks {len(missing)} weight(s) of {type(model).__name__}, e.g. {missing[0]}: give a complete "
            "checkpoint of a causal LM"
        )
    if _towers(config) and not _towers(model.config):
        warnings.warn(
            f"of {what} only the text part, {type(model).__name__}, is loaded: what is tuned and saved is without the "
            "rest",
            stacklevel=3,
        )
    if mixed:
        with _one_line(what):
            _cast_as_in_files(model, _dtypes_in_files(path))
        for part in ("", *config.sub_configs):
            of, given = ((getattr(c, part) if part else c) for c in (model.config, config))
            if of is not None:
                of.dtype = given.dtype
    return model, mixed


def _dtypes_in_files(path: str) -> dict[str, torch.dtype]:
    """Of each tensor in the safetensors files of a folder or a model of the hub."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = get_checkpoint_shard_files(path, index)[0] if index else [cached_file(path, SAFE_WEIGHTS_NAME)]
    names = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            found |= {name: names.get(file.get_slice(name).get_dtype()) for name in file.keys()}
    return found


def _cast_as_in_files(model: torch.nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give each parameter and buffer the dtype of the file's tensor, or of the tensors that it is made of the
    widest."""
    for name, tensor, *segments in itertools.chain(named_segments(model), model.named_buffers()):
        found = [dtypes[key] for key in ({s.name for s in segments[0]} if segments else {name}) if dtypes.get(key)]
        if found and tensor.is_floating_point():
            tensor.data = tensor.data.to(functools.reduce(torch.promote_types, found))


def _load_tokenizer(name: str, path: str, base_path: str) -> Any:
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    with _one_line(f"tokenizer of {name}"):
        # An adapter brings its own or leaves it to the base model.
        own = path == base_path or get_tokenizer_config(path)
        return AutoTokenizer.from_pretrained(path if own else base_path, padding_side="left", trust_remote_code=False)


def _set_pad_token(tokenizer: Any, name: str, pad_token: str | None, model: torch.nn.Module) -> None:
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserError(
                f"pad_token {pad_token!r} is no token of {name}: give one that its tokenizer knows, e.g. "
                f"{tokenizer.eos_token!r}"
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no pad token, which batches need: give --pad_token with an existing one, "
            f"e.g. {tokenizer.eos_token!r}"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id >= rows:
        raise UserError(
            f"pad token {tokenizer.pad_token!r} of {name} is number {tokenizer.pad_token_id}, but the model embeds "
            f"{rows} tokens: give another --pad_token"
        )


def _peft():
    require("an adapter", "lora", "peft")
    import peft

    return peft


def _add_lora(base: torch.nn.Module, rank: int) -> torch.nn.Module:
    peft = _peft()
    # Llama 4's and PhiMoE's routers are linear layers that return a tuple, which PEFT cannot wrap.
    routers = [
        name
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module).__name__.endswith("Router")
    ]
    options = {"target_modules": "all-linear", "exclude_modules": routers or None}
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, task_type="CAUSAL_LM", **options)
    with _one_line(f"LoRA adapter of {type(base).__name__}"), torch.random.fork_rng(devices=[]):
        model = peft.get_peft_model(base, config)
    # Instead of PEFT's own draw for A, which depends on the device and on torch's version: the kernels' noise, with the
    # same variance, 1 / (3 * inputs). B starts at 0.
    with torch.no_grad():
        for name, parameter, *_ in named_segments(model):
            if parameter.requires_grad and "lora_A" in name.split("."):
                es_kernels.add_noise_(
                    parameter.zero_(), [LORA_SEED], [1 / math.sqrt(3 * parameter.shape[1])], name=name
                )
    return model


def _merged(model: torch.nn.Module) -> torch.nn.Module:
    """A copy on the CPU with the adapter added into the weights. ValueError where the copy computes otherwise: PEFT
    adds more than once into weights that layers share (Zamba), and into some that its layers do not compute with
    (Jamba)."""
    exact = _on_cpu(model, torch.float32)
    attention = base_of(exact).config._attn_implementation
    if attention not in ("eager", "sdpa"):  # what is for GPUs
        base_of(exact).set_attn_implementation("eager")
    ids = torch.arange(16)[None] % base_of(exact).config.get_text_config().vocab_size
    with torch.no_grad():
        before = exact(input_ids=ids, use_cache=False).logits
        error = (
            exact.merge_and_unload()(input_ids=ids, use_cache=False).logits - before
        ).abs().max() / before.abs().max()
    if not error <= _SAME_LOGITS:
        raise UserError(
            f"PEFT cannot add this adapter into the weights of {type(base_of(model)).__name__}: logits would be off by "
            f"{error:.1g} of the largest; "
            "write the adapter, without merge_lora"
        )
    del exact
    return _on_cpu(model).merge_and_unload()


def _on_cpu(model: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A copy; `dtype`: of its floating-point tensors, if not their own."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        copied = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
        return torch.nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else copied

    # Of which deepcopy makes no copies of its own
    memo = {id(t): moved(t) for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _savable_generation_config(model: torch.nn.Module, folder: Path) -> Iterator[None]:
    """Within, the model's generation config is one that can be saved: transformers refuses options of sampling without
    do_sample, which published models have. They are left out of what is written; greedy text does not depend on
    them."""
    config = model.generation_config
    try:
        config.save_pretrained(folder)
    except ValueError:
        model.generation_config = copy.deepcopy(config)
        for option in _SAMPLING:
            setattr(model.generation_config, option, None)
    try:
        yield
    finally:
        model.generation_config = config
