"""Contract under test: in one batch every member gets the logits that the model gives with its noise in the weights.

- In float64 to a rounding of float32, for every architecture here: tied and untied, with biases, fused and grouped
  heads, norms of q and k, Conv1D, embedded positions, scaled embeddings, a LoRA adapter, prompts of several lengths.
- What members cannot differ in is known by name: norms and fused experts.
- Nothing of a member is left when the block ends, by exception too; and no hook.
"""

import pytest
import torch

import es_kernels
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.members import MemberNoise, Members

SEEDS, COEFS = (11, 12, 13), (0.1, -0.2, 0.05)
KINDS = ("llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma3", "mixtral", "lora")


def double(model):
    """In float64; transformers' fused experts know it only in their plain loop."""
    model.config._experts_implementation = "eager"
    return model.double()


def entries_of(model):
    return [entry for entry in named_segments(model) if entry.tensor.requires_grad]


def noise_of(members, rank=1):
    """Of two groups: embeddings, and the rest with another sigma."""
    embeddings = {name for name in members.names if "embed" in name or "wte" in name}
    groups = [(embeddings, COEFS), (members.names - embeddings, [2 * c for c in COEFS])]
    return [MemberNoise(sorted(names), SEEDS, coefs, rank) for names, coefs in groups if names]


@pytest.fixture
def inputs():
    """Two prompts, padded on the left, of each member."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    return {"input_ids": ids, "attention_mask": (torch.tensor([[0, 0, 1, 1, 1], [1] * 5]))}


def in_memory(model, entries, noise, member):
    """Adds a member's noise to the weights, in their dtype."""
    tensors = {entry.name: entry.tensor for entry in entries}
    with torch.no_grad():
        for group in noise:
            seed, coef, rank = group.seeds[member], group.coefs[member], group.noise_rank
            for name in group.names:
                t = tensors[name]
                if t.dim() == 2:
                    left, right = (f[0].to(t) for f in es_kernels.factors({name: tuple(t.shape)}, seed, rank)[name])
                    t += coef / rank**0.5 * left @ right.T
                else:
                    t += es_kernels.add_noise_(torch.zeros(len(t)), seed, coef, name=name).to(t)


@pytest.mark.parametrize("rank", (1, 3))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_perturbed_weights(build_model, inputs, kind, rank):
    model = double(build_model(kind))
    entries = entries_of(model)
    members = Members(model, entries)
    noise = noise_of(members, rank)
    assert members.names
    with torch.no_grad():
        plain = model(**inputs).logits
        with members.added(noise) as begin:
            begin(6)
            together = model(**{name: t.repeat(3, 1) for name, t in inputs.items()}).logits.view(3, 2, 5, -1)
        assert torch.equal(model(**inputs).logits, plain)
        for member in range(3):
            other = double(build_model(kind))
            in_memory(other, entries_of(other), noise, member)
            alone = other(**inputs).logits
            seen = inputs["attention_mask"].bool()
            torch.testing.assert_close(together[member][seen], alone[seen], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(alone[seen], plain[seen], atol=1e-2)


def test_what_members_cannot_differ_in(build_model):
    def left_out(kind):
        model = build_model(kind)
        entries = entries_of(model)
        return {entry.name for entry in entries} - Members(model, entries).names

    assert all("norm" in name for name in left_out("llama") | left_out("qwen3") | left_out("gemma"))
    assert all("ln_" in name for name in left_out("gpt2")) and left_out("lora") == set()
    assert any("experts" in name for name in left_out("mixtral"))


def test_adapters_change_the_linear_layers_below_the_head(build_model):
    for kind in ("llama", "qwen2", "qwen3", "gemma"):
        model = build_model(kind)
        names = Members(model, entries_of(model), adapters=True).names
        assert names == {name for name, _ in model.named_parameters() if name.endswith("_proj.weight")}
    assert not Members(build_model("gpt2"), entries_of(build_model("gpt2")), adapters=True).names


def test_nothing_is_left_by_an_exception(build_model, inputs):
    model = build_model("qwen2")
    members = Members(model, entries_of(model))
    before = es_kernels.fingerprint(dict(model.named_parameters()))
    with pytest.raises(ZeroDivisionError), members.added(noise_of(members)) as begin:
        begin(6)
        model(**{name: t.repeat(3, 1) for name, t in inputs.items()})
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())
    assert es_kernels.fingerprint(dict(model.named_parameters())) == before


def test_rows_that_are_not_the_batch_are_refused(build_model, inputs):
    model = build_model("llama")
    members = Members(model, entries_of(model))
    with members.added(noise_of(members)) as begin:
        with pytest.raises(ValueError, match="4 rows .* 3 members"):
            begin(4)
        begin(3)
        with pytest.raises(RuntimeError, match="2 rows of a batch of 3"):
            model(**inputs)
