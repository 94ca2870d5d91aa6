"""The model of a run: a transformers causal LM with its tokenizer, from a folder, a GGUF file or the hub."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import es_kernels
from es_finetune.errors import UserError, did_you_mean, loading
from es_finetune.models import WEIGHT_DTYPES
from es_finetune.models.adapters import add_lora, import_peft
from es_finetune.models.checkpoint_names import refuse_prompt_config
from es_finetune.models.dtypes import MIXED, cast_as_in_files, dtype_of, dtypes_in_files
from es_finetune.models.gguf import forget_quantization, gguf_of, unpacked
from es_finetune.models.towers import freeze_towers, towers_of
from es_kernels.segment import DTYPES

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = Path(__file__).parent / "embedded"


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
    """Load a model and its tokenizer.

    Args:
        name: "embedded" (the character-level model of the demo), or a folder or hub name of a causal LM or of a PEFT
            adapter, which comes with its base model, or FILE.gguf or FOLDER:FILE.gguf, whose weights are unpacked. Of a
            model with an adapter only the adapter is trainable.
        device: Where the model goes.
        dtype: Of the weights, one of `models.WEIGHT_DTYPES`; "auto" is that of the checkpoint's config, and float32 for
            a GGUF file.
        lora_rank: Above 0 adds a LoRA adapter of this rank to all linear layers but the output, alpha 2 * rank. Its
            first values are the same on every machine and for every seed of a run.
        pad_token: An existing token to pad with, for a tokenizer without one.
        attn_implementation: As of `from_pretrained`; None is its default.
        mixed: With dtype "auto" each tensor has the dtype of its file, as it always has where save_model wrote a model
            of several.

    Returns:
        The model in eval mode on `device`; its tokenizer, which pads on the left; what to write into a log about them.

    Raises:
        UserError: Any of it cannot be had.
    """
    if dtype not in WEIGHT_DTYPES:
        raise UserError(f"dtype must be one of {', '.join(WEIGHT_DTYPES)}, not {dtype!r}")
    if lora_rank < 0:
        raise UserError(f"lora_rank must be at least 0, not {lora_rank}")
    name = os.fspath(name)
    gguf = gguf_of(name)
    path, file = (path_of(name), {}) if gguf is None else (gguf.folder, gguf.options)
    with loading(f"model {name}"):
        from transformers.utils import find_adapter_config_file

        adapter = gguf is None and find_adapter_config_file(path) is not None
    if adapter:
        if lora_rank:
            raise UserError(f"model {name} is an adapter already: leave out lora_rank, or give the base model")
        peft = import_peft()
        with loading(f"adapter {name}"):
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
        with loading(f"adapter {name}"):
            model = peft.PeftModel.from_pretrained(base, path, is_trainable=True)
    else:
        base_path = path
        base, mixed = _load_base(path, f"model {name}", dtype, attn_implementation, mixed, file)
        model = base
        if lora_rank:
            model = add_lora(base, lora_rank)
    freeze_towers(model)
    tokenizer = _load_tokenizer(name, path, base_path, file)
    _set_pad_token(tokenizer, name, pad_token, base)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in DTYPES:
            raise UserError(
                f"model {name}: {parameter_name} is {parameter.dtype}, and noise is added to float32, bfloat16 and "
                "float16 only: give a dtype"
            )
    with loading(f"model {name}"):
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
    if gguf is not None:
        identity |= {"file": gguf.file, "sha256": gguf.digest()}
    if adapter:
        identity["base_model"] = base_path
    if lora_rank:
        identity["lora_rank"] = lora_rank
    return model, tokenizer, identity


def path_of(name: str) -> str:
    """Where a model of this name is, for transformers and engines: the embedded one is a folder of the package.
    UserError for what can only be a path, and is no folder."""
    path = Path(name)
    if path.is_file():
        raise UserError(f"model {name} is a file: give its folder, or a .gguf file")
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not path.is_dir():
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"the model's folder {name} does not exist{did_you_mean(path.name, beside)}")
    return str(EMBEDDED_MODEL) if name == "embedded" else name


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the GPU if there is one. UserError for one that torch does not know or
    see, and where no backend of es_kernels serves it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown to torch: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} was asked for, but torch sees no GPU: give --device cpu")
    try:
        es_kernels.active_backend(device)
    except (RuntimeError, ValueError) as error:  # also of what ES_KERNELS_BACKEND asks for
        raise UserError(str(error)) from error
    return device


def empty_model(name: str, dtype: str = "auto") -> tuple[torch.nn.Module, Any, torch.dtype]:
    """What an engine needs to know that loads the weights by itself.

    Returns:
        The model without memory, whose parameters, without the tied ones, have the checkpoint's names and shapes; its
        tokenizer; the dtype of its weights.

    Raises:
        UserError: As of load_model; and for an adapter, a GGUF file, or weights of several dtypes.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import find_adapter_config_file

    if gguf_of(name) is not None:
        raise UserError(
            f"model {name} is a GGUF file, which this engine cannot perturb: write it as a folder first "
            "(docs/guides/models.md), or use --engine hf"
        )
    path = path_of(name)
    with loading(f"model {name}"):
        adapter = find_adapter_config_file(path) is not None
    if adapter:
        raise UserError(
            f"model {name} is an adapter, which this engine cannot perturb: give the whole model, or use --engine hf"
        )
    config = _load_config(path, f"model {name}")
    if dtype == "auto" and getattr(config, MIXED, False):
        raise UserError(
            f"model {name} has tensors of several dtypes, which this engine would make one: give --dtype, or use "
            "--engine hf"
        )
    weight_dtype = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with loading(f"model {name}"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=weight_dtype)
    with loading(f"generation config of model {name}"), contextlib.suppress(OSError):  # a model may have none
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, _load_tokenizer(name, path, path), weight_dtype


def _load_config(path: str, what: str, **file: str) -> Any:
    # trust_remote_code=False: left out, transformers asks at the terminal and waits.
    from transformers import AutoConfig

    with loading(what):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **file)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{what} has quantised weights, and noise is added to float32, bfloat16 and float16 only: give the "
            "unquantised model"
        )
    return config


def _load_base(
    path: str,
    what: str,
    dtype: str,
    attn_implementation: str | None,
    mixed: bool,
    file: Mapping[str, str] = MappingProxyType({}),
) -> tuple[torch.nn.Module, bool]:
    """The model, and whether each tensor has the dtype of its file. `file`: of a GGUF file its `options`."""
    from transformers import AutoModelForCausalLM

    config = _load_config(path, what, **file)
    mixed = not file and dtype == "auto" and (mixed or getattr(config, MIXED, False))
    if mixed or (file and dtype == "auto"):
        dtype = "float32"  # holds every value of the others, and of packed weights
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if file:
        options |= {**file, **unpacked()}
    with loading(what):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
        )
    forget_quantization(model)
    # transformers fills them with random numbers, others on every machine.
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{what} lacks {len(missing)} weight(s) of {type(model).__name__}, e.g. {missing[0]}: give a complete "
            "checkpoint of a causal LM"
        )
    if towers_of(config) and not towers_of(model.config):
        logger.warning(
            f"of {what} only the text part, {type(model).__name__}, is loaded: what is tuned and saved is without the "
            "rest"
        )
    if mixed:
        with loading(what):
            cast_as_in_files(model, dtypes_in_files(path))
        for part in ("", *config.sub_configs):
            loaded, stored = ((getattr(c, part) if part else c) for c in (model.config, config))
            if loaded is not None:
                loaded.dtype = stored.dtype
    return model, mixed


def _load_tokenizer(name: str, path: str, base_path: str, file: Mapping[str, str] = MappingProxyType({})) -> Any:
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    with loading(f"tokenizer of {name}"):
        # An adapter brings its own or leaves it to the base model.
        own = path == base_path or get_tokenizer_config(path)
        return AutoTokenizer.from_pretrained(
            path if own else base_path,
            padding_side="left",
            trust_remote_code=False,
            **file,
        )


def _set_pad_token(tokenizer: Any, name: str, pad_token: str | None, model: Any) -> None:
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
