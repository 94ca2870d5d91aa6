"""Contract under test: named_segments gives every parameter the names, shapes and indices of the tensors in the files
that `save_pretrained` writes, whatever wraps, fuses or adapts the model in memory. So one fingerprint serves for the
model and the files, and noise added in memory is, to the bit, noise added to the files' tensors. What cannot be named
so keeps its name in memory, and a warning says it. Weights that are not plain numbers in memory, and prompts that an
adapter learns, are refused."""

import sys
import warnings

import peft
import pytest
import safetensors.torch as safetensors
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import es_kernels
from es_finetune import EvolutionStrategy, TrainConfig, Trainer
from es_finetune.engines.hf import HFEngine
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.load import EMBEDDED_MODEL, load_model
from es_finetune.runs.replay import base_fingerprint

KINDS = ("llama", "qwen2", "mixtral", "qwen3_moe")


@pytest.fixture(autouse=True)
def no_other_test_warns(request, caplog):
    yield
    said = [record.getMessage() for record in caplog.get_records("call")]
    assert "warns" in request.node.name or not any("draw noise by the name in memory" in text for text in said)


def read(folder):
    """The tensors in a folder's safetensors files, by name."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(safetensors.load_file(file))
    return tensors


def saved(model, folder):
    model.save_pretrained(folder)
    return read(folder)


def fingerprint(named):
    return es_kernels.fingerprint(es_kernels.ParamTable(named))


def checkpoint_names(entries):
    return {part.name for entry in entries for part in entry.segments or [entry]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_one_fingerprint_for_the_model_and_its_files(build_model, tmp_path, kind, dtype):
    model = build_model(kind).to(dtype)
    files = saved(model, tmp_path)
    assert checkpoint_names(list(named_segments(model))) == files.keys()
    assert fingerprint(named_segments(model)) == fingerprint(files)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_read_from_files_has_their_names(build_model, tmp_path, kind):
    files = saved(build_model(kind), tmp_path / "first")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert fingerprint(named_segments(model)) == fingerprint(files)


@pytest.fixture
def noise_on_the_files(bits, tmp_path):
    """check(model, noise_rank): noise added in memory is that added to the files."""

    def check(model, noise_rank):
        files = saved(model, tmp_path / "before")
        with torch.no_grad():
            table = es_kernels.ParamTable(named_segments(model))
            es_kernels.add_noise_(table, [11, 12], [0.01, -0.02], noise_rank=noise_rank)
        es_kernels.add_noise_(files, [11, 12], [0.01, -0.02], noise_rank=noise_rank)
        after = saved(model, tmp_path / "after")
        assert after.keys() == files.keys()
        for name, tensor in after.items():
            assert torch.equal(bits(tensor), bits(files[name])), name

    return check


@pytest.mark.parametrize("dtype, noise_rank", [(torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_in_memory_is_noise_on_the_files(build_model, noise_on_the_files, kind, dtype, noise_rank):
    noise_on_the_files(build_model(kind).to(dtype), noise_rank)


@pytest.mark.parametrize("kind", ["mixtral", "lora"])
def test_every_matrix_of_the_checkpoint_has_its_width(build_model, noise_on_the_files, kind):
    model = build_model(kind)
    if kind == "mixtral":
        noise_on_the_files(model, 3)
    table = es_kernels.ParamTable(named_segments(model))
    pack = table.pack(matrices=True)
    assert sum(p.numel() for p in model.parameters() if p.ndim == 1) == sum(
        int(s["rows"] * s["cols"]) for s in pack.segments if not s["width"]
    )


def test_experts_are_one_segment_per_file_tensor(tiny_mixtral):
    pytest.importorskip("transformers.core_model_loading")  # nothing is fused before version 5
    table = es_kernels.ParamTable(named_segments(tiny_mixtral))
    segments = dict(zip(table.names, table.layout.segments, strict=True))
    fused = segments["model.layers.1.mlp.experts.gate_up_proj"]
    assert len(fused) == 4 * 2
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert [s for s in fused if s.name == name] == [
        es_kernels.Segment(name, 1, 24 * 16, offset=(2 * 2 + 1) * 24 * 16, width=16)
    ]


@pytest.mark.parametrize("wrap", ["compile", "parallel", "both", "part", "checkpointed", "checkpointed part"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_wrappers_do_not_show(build_model, tmp_path, kind, wrap):
    model = build_model(kind)
    files = saved(model, tmp_path)
    if wrap == "part":
        model.model.layers[1] = torch.compile(model.model.layers[1])
    elif wrap == "checkpointed part":
        model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    else:
        if wrap in ("compile", "both"):
            model = torch.compile(model)
        if wrap in ("parallel", "both"):
            model = torch.nn.DataParallel(model)
        if wrap == "checkpointed":
            model = checkpoint_wrapper(model)
    # A checkpoint_wrapper around all takes its name out by itself.
    shown = {part for name, _ in model.named_parameters() for part in name.split(".")}
    assert wrap == "checkpointed" or shown & {"_orig_mod", "_checkpoint_wrapped_module", "module"}
    assert fingerprint(named_segments(model)) == fingerprint(files)


@pytest.mark.parametrize("family", ["Camembert", "XLMRoberta", "Roberta"])
def test_tied_weights_have_the_name_of_the_file_where_that_is_not_their_first(tmp_path, family):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pad_token_id": 1,
    }
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**sizes, is_decoder=True)
    )
    files = saved(model, tmp_path)
    assert fingerprint(named_segments(model)) == fingerprint(files)


def test_tied_weights_count_once_under_their_first_name(tiny_qwen2):
    names = [entry.name for entry in named_segments(tiny_qwen2)]
    assert names == [name for name, _ in tiny_qwen2.named_parameters()]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def compile_a_layer(model):
    layers = model.get_base_model().model.layers
    layers[1] = torch.compile(layers[1])
    return model


@pytest.mark.parametrize(
    "wrap", [lambda m: m, torch.compile, torch.nn.DataParallel, compile_a_layer, checkpoint_wrapper]
)
@pytest.mark.parametrize(
    "adapter",
    [{}, {"modules_to_save": ["lm_head", "norm"]}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}],
)
def test_an_adapter_has_the_names_of_its_file(build_model, tmp_path, adapter, wrap):
    model = build_model("lora", **adapter)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    trained = [(name, p) for name, p, _ in named_segments(wrap(model)) if p.requires_grad]
    assert {name for name, _ in trained} == read(tmp_path).keys()
    assert fingerprint(trained) == fingerprint(read(tmp_path))


def test_an_adapter_inside_of_a_transformers_model(build_model, tmp_path):
    build_model("lora").save_pretrained(tmp_path / "adapter")
    model = build_model("llama")
    model.load_adapter(str(tmp_path / "adapter"))
    trained = [(name, p) for name, p, _ in named_segments(model) if "lora" in name]
    assert fingerprint(trained) == fingerprint(read(tmp_path / "adapter"))


@pytest.mark.parametrize("adapter", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_weights_under_an_adapter_have_the_names_of_the_base_checkpoint(build_model, tmp_path, kind, adapter):
    model = build_model(kind)
    files = saved(model, tmp_path)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **adapter))
    frozen = [entry for entry in named_segments(model) if not entry.tensor.requires_grad]
    assert fingerprint(frozen) == fingerprint(files)


def conversions(*operations):
    """Put a conversion of the MLP's weights on a model: one that the mapping of this version of transformers has for
    some model."""
    loading = pytest.importorskip("transformers.core_model_loading")
    source, target, *names = operations
    return [loading.WeightConverter(source, target, [getattr(loading, name)(**options) for name, options in names])]


@pytest.mark.parametrize("noise_rank", [0, 1, 3])
def test_parts_of_a_joined_tensor(build_model, noise_on_the_files, tmp_path, noise_rank):
    model = build_model("llama")
    model._weight_conversions = conversions(
        "self_attn.qkv.weight", [f"self_attn.{n}_proj.weight" for n in "qkv"], ("Split", {"dim": 0})
    ) + conversions("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], ("Chunk", {"dim": 1}))
    files = saved(model, tmp_path)
    assert files["model.layers.0.self_attn.qkv.weight"].shape == (32, 16) and files[
        "model.layers.0.mlp.gate_up.weight"
    ].shape == (24, 32)
    assert fingerprint(named_segments(model)) == fingerprint(files)
    noise_on_the_files(model, noise_rank)


@pytest.mark.parametrize("noise_rank", [0, 1, 3])
@pytest.mark.parametrize("columns", [8, 16])
def test_parts_of_a_joined_tensor_of_another_shape(build_model, noise_on_the_files, columns, noise_rank):
    """In 8 columns a row of gate_proj or up_proj is two rows of the joined tensor."""
    loading = pytest.importorskip("transformers.core_model_loading")

    class JoinedInFiles(loading.ConversionOps):
        def convert(self, input_dict, *args, **kwargs):
            parts = [part[0] if isinstance(part, list) else part for part in input_dict.values()]
            return {"mlp.gate_up.weight": torch.cat(parts, dim=1).reshape(-1, columns)}

        @property
        def reverse_op(self):
            return self

    model = build_model("llama")
    names = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [loading.WeightConverter("mlp.gate_up.weight", names, [JoinedInFiles()])]
    noise_on_the_files(model, noise_rank)


@pytest.mark.parametrize("noise_rank", [0, 1])
def test_a_matrix_in_memory_that_is_none_in_the_files(build_model, noise_on_the_files, tmp_path, noise_rank):
    model = build_model("llama")
    kernel = {"in_channels": 2, "kernel_size": (2, 2, 2)}
    model._weight_conversions = conversions("mlp.conv.weight", ["mlp.up_proj.weight"], ("Conv3dToLinear", kernel))
    files = saved(model, tmp_path)
    assert files["model.layers.0.mlp.conv.weight"].shape == (24, 2, 2, 2, 2)
    assert checkpoint_names(list(named_segments(model))) == files.keys()
    noise_on_the_files(model, noise_rank)


@pytest.mark.parametrize("operation", [("Interleave", {"dim": 0}), ("Transpose", {"dim0": 0, "dim1": 1})])
def test_warns_of_a_layout_that_is_no_view(build_model, tmp_path, operation, caplog):
    model = build_model("llama")
    model._weight_conversions = conversions("mlp.up.weight", ["mlp.up_proj.weight"], operation)
    files = saved(model, tmp_path)
    entries = {name: p for name, p, _ in named_segments(model)}
    (said,) = caplog.messages
    assert said.startswith("2 parameter(s) draw noise by the name in memory, e.g. model.layers.0.mlp.up_proj.weight, ")
    changed = {f"model.layers.{i}.mlp.up{part}.weight" for i in (0, 1) for part in ("", "_proj")}
    assert entries.keys() == files.keys() ^ changed
    kept = files.keys() - changed
    assert fingerprint({name: entries[name] for name in kept}) == fingerprint({name: files[name] for name in kept})


def test_warns_of_a_conversion_that_fails(build_model, caplog):
    model = build_model("llama")
    model._weight_conversions = conversions(
        "mlp.up.weight", ["mlp.up_proj.weight"], ("Chunk", {"dim": 0}), ("Chunk", {"dim": 9})
    )
    names = [name for name, _, _ in named_segments(model)]
    assert "in a form that cannot be found out: " in caplog.text
    assert names == [name for name, _ in model.named_parameters()]


def test_no_memory_is_needed():
    """A Mixtral 8x7B of 47 billion parameters, none of which exists."""
    pytest.importorskip("transformers.core_model_loading")
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig())
    entries = list(named_segments(model))
    assert sum(len(entry.segments) for entry in entries if entry.segments) == 32 * 8 * 3
    covered = sum(s.rows * s.cols for entry in entries for s in entry.segments or ())
    assert covered + sum(entry.tensor.numel() for entry in entries if not entry.segments) == sum(
        p.numel() for p in model.parameters()
    )


def test_before_version_5_nothing_is_fused(tiny_mixtral, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    names = [name for name, _ in tiny_mixtral.named_parameters()]
    assert [entry.name for entry in named_segments(tiny_mixtral)] == names


def test_a_plain_module():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    assert list(named_segments(torch.compile(model))) == [(name, p, None) for name, p in model.named_parameters()]


# --- what cannot be tuned ---------------------------------------------------------------------------------------------


# As transformers does for torchao, bitsandbytes, GPTQ and the rest, from files and at loading
def noted_in_the_config(model):
    model.config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)


def noted_on_the_model(model):
    model.hf_quantizer = object()


def in_another_dtype(model):  # as bitsandbytes
    for name, p in list(model.named_parameters()):
        if name.endswith("_proj.weight"):
            model.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(
                p.to(torch.int8), requires_grad=False
            )


def in_eight_bit_floats(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)


def in_a_subclass(model):  # as torchao: a float tensor around others
    from torch.testing._internal.two_tensor import TwoTensor

    weight = model.lm_head.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(TwoTensor(weight, weight))


def in_packed_modules(model):  # torch's own; GPTQ's and AWQ's layers are such too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)


QUANTISED = [
    noted_in_the_config,
    noted_on_the_model,
    in_another_dtype,
    in_eight_bit_floats,
    in_a_subclass,
    in_packed_modules,
]


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, torch.nn.DataParallel])
@pytest.mark.parametrize("quantise", QUANTISED)
def test_quantised_weights_are_refused(build_model, quantise, wrap):
    model = build_model("llama")
    quantise(model)
    with pytest.raises(
        ValueError, match=r"^LlamaForCausalLM has quantised weights \(.*\), of which only such as .* LoRA adapter"
    ):
        list(named_segments(wrap(model)))
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"^LlamaForCausalLM has quantised weights \([^)]*\): give the unquantised model"
    ):
        list(named_segments(wrap(model)))


@pytest.mark.parametrize("quantise", [noted_in_the_config, noted_on_the_model, in_another_dtype, in_a_subclass])
def test_an_adapter_over_quantised_weights_is_tuned(build_model, tmp_path, quantise):
    """QLoRA."""
    model = build_model("lora")
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = model.get_base_model()
    if quantise is in_another_dtype:
        for name, p in list(base.named_parameters()):
            if "base_layer" in name:
                base.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(
                    p.to(torch.int8), requires_grad=False
                )
    else:
        quantise(base)
        base.lm_head.weight.requires_grad_(False)
    entries = list(named_segments(model))
    assert fingerprint([(name, p) for name, p, _ in entries if p.requires_grad]) == fingerprint(read(tmp_path))
    assert base_fingerprint(entries)
    base.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="of which only such as .*norm.weight could be tuned"):
        list(named_segments(model))


def test_what_transformers_has_dequantised_is_tuned(build_model):
    model = build_model("llama")
    model.config.quantization_config, model.is_quantized = {"quant_method": "mxfp4"}, True
    transformers.quantizers.HfQuantizer.remove_quantization_config(None, model)
    assert list(named_segments(model))


PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    "cpt": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
    ),
}


@pytest.fixture(params=PROMPTS)
def prompt_adapter(request, build_model):
    return peft.get_peft_model(build_model("llama"), PROMPTS[request.param]())


def test_prompt_learning_is_refused_at_every_door(prompt_adapter, save_tiny, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    config = TrainConfig(model="mine", task="countdown-char", output=str(tmp_path / "run"))
    doors = [
        lambda: list(named_segments(prompt_adapter)),
        lambda: HFEngine(torch.nn.DataParallel(prompt_adapter), tokenizer, 4, 4),
        lambda: Trainer(config, model=prompt_adapter, tokenizer=tokenizer),
        lambda: load_model(tmp_path / "adapter", device="cpu"),
    ]
    prompt_adapter.base_model.save_pretrained(tmp_path / "base")
    prompt_adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    prompt_adapter.save_pretrained(tmp_path / "adapter")
    for door in doors:
        with pytest.raises(ValueError, match="the adapter learns a prompt .* virtual tokens"):
            door()
    assert not (tmp_path / "run").exists()


def test_a_quantised_model_is_refused_by_the_trainer_and_its_tensors_by_the_optimizer(build_model, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = build_model("llama")
    in_a_subclass(model)
    with pytest.raises(ValueError, match="has quantised weights"):
        Trainer(
            TrainConfig(model="mine", task="countdown-char", output=str(tmp_path / "run")),
            model=model,
            tokenizer=tokenizer,
        )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="'lm_head.weight' is a TwoTensor, whose values are not in its memory"):
        EvolutionStrategy(model.named_parameters())
