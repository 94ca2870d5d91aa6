"""Contract under test: the engine over a transformers model, in each of its ways of decoding.

- An answer depends on its prompt and on the weights of this moment only: not on its place, its batch's padding, the
  decoding or what was generated before (no KV block survives a weight change). It is greedy, or sampled from the
  model's own distribution, whatever sampling options the checkpoint carries; sampled answers repeat, and torch's
  generators stay as they were.
- A model for which padding or the prompts beside one matter is found, and asked one prompt at a time.
- An answer's ids end with its first end token; text leaves special tokens out.
- Prompts are text as it is, or chats as the tokenizer's template writes them, with special tokens once. What cannot be
  asked is refused before any work.
- A model that cannot generate, or not by the decoding asked for, is refused before any work, in one line; no error and
  a wrong answer is worse.
- Members in one batch get the answers that each would get with its noise in the weights, sampled ones too, whatever
  shares the batch; theta stays as it is. Random numbers are a prompt's own, the same for all members.
- log_probs are those of the model at temperature 1, whatever the batches, in one batch of members those of each. An
  answer is read as the tokens that follow its prompt's, with the end token.
"""

import copy
import sys
import threading
import types

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import es_kernels
from es_finetune import EvolutionStrategy
from es_finetune.engines import DECODINGS, Answer, Sampling, hf
from es_finetune.engines.hf import HFEngine
from es_finetune.engines.prompts import PromptError, continuations, tokenize
from es_finetune.errors import RunError, UserError
from es_finetune.models.checkpoint_names import named_segments
from es_finetune.models.load import EMBEDDED_MODEL
from es_finetune.models.members import Members
from es_finetune.tasks import load_task

pytestmark = pytest.mark.usefixtures("little_garbage")

PROMPTS = [item.prompt for item in load_task("countdown-char").test[:40]]
all_decodings = pytest.mark.parametrize("decoding", DECODINGS)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).eval()


@pytest.fixture(scope="module")
def one_by_one(tokenizer):
    """The answers to PROMPTS, each asked alone."""
    return generate(AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).eval(), tokenizer, batch_size=1)


@pytest.fixture
def long_model(build_model):
    """Random weights, large enough that each change of them changes what is written; positions for prompts of several
    cache blocks."""
    return build_model("llama", vocab_size=22, max_position_embeddings=1024, initializer_range=0.5)


@pytest.fixture
def chat_tokenizer():
    """One token per character, <s> put in front by the tokenizer itself and also by its chat template."""
    names = ["<pad>", "<s>", "</s>", "<user>", "<model>", *"abcdef "]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<model>"]})
    made.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
    )
    return made


def generate(model, tokenizer, prompts=PROMPTS, batch_size=16, new=12, sampling=None, **options):
    engine = HFEngine(model, tokenizer, new, batch_size, **options)
    return engine.generate(engine.encode(prompts), sampling)


# --- what an answer depends on ----------------------------------------------------------------------------------------


@all_decodings
def test_answers_come_in_the_order_of_the_prompts_whatever_the_batches_and_the_path(
    model, tokenizer, decoding, one_by_one
):
    assert len({len(prompt) for prompt in PROMPTS}) > 1  # so batches are padded
    assert len({answer.text for answer in one_by_one}) > 20
    assert generate(model, tokenizer, decoding=decoding) == one_by_one
    assert generate(model, tokenizer, PROMPTS[::-1], decoding=decoding) == one_by_one[::-1]


def test_rows_are_left_padded_and_the_longest_prompts_come_first(model, tokenizer):
    batches = HFEngine(model, tokenizer, 12, 8).encode(PROMPTS)
    assert sorted(i for rows, _ in batches for i in rows) == list(range(len(PROMPTS)))
    lengths = [inputs["attention_mask"].sum(1) for _, inputs in batches]
    assert torch.equal(torch.cat(lengths), torch.cat(lengths).sort(descending=True).values)
    for rows, inputs in batches:
        assert inputs["attention_mask"][:, -1].all()
        assert [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*inputs.values(), strict=True)] == [
            PROMPTS[i] for i in rows
        ]


@all_decodings
def test_nothing_survives_a_weight_change(long_model, tokenizer, decoding):
    common = "123456789+" * 60  # of more than two blocks of 256 positions, the size that prefix caches share
    prompts = [common + tail for tail in ("1=", "2+3=", "4,5,6:")]
    engine = HFEngine(long_model, tokenizer, 12, 64, decoding=decoding)
    encoded = engine.encode(prompts)
    before = engine.generate(encoded)
    opt = EvolutionStrategy(long_model.named_parameters(), sigma=0.1, population=2)
    with opt.perturbed(0):
        inside = engine.generate(encoded)
        assert inside == generate(long_model, tokenizer, prompts)
        assert all(a != b for a, b in zip(inside, before, strict=True))
    assert engine.generate(encoded) == before


@all_decodings
def test_calls_leave_nothing_behind(model, tokenizer, decoding):
    model.set_attn_implementation("eager")  # continuous batching computes with another one
    generation_config, names = model.generation_config, set(vars(model))
    engine = HFEngine(model, tokenizer, 12, 64, decoding=decoding)
    threads, state = set(threading.enumerate()), torch.get_rng_state()
    encoded = engine.encode(PROMPTS[:4])
    for _ in range(2):
        engine.generate(encoded)
        assert set(threading.enumerate()) <= threads and torch.equal(torch.get_rng_state(), state)
        assert (
            model.config._attn_implementation == "eager"
            and model.generation_config is generation_config
            and set(vars(model)) == names
        )


def test_a_static_cache_is_kept_at_its_address_and_serves_prompts_of_any_length(long_model, tokenizer):
    engine = HFEngine(long_model, tokenizer, 12, 2, decoding="static")
    long, short = ["12+" * 90, "3+4" * 80, "7-1" * 70], ["1+", "2+2=", "45"]
    expected = {tuple(prompts): generate(long_model, tokenizer, prompts) for prompts in (long, short)}
    addresses = []
    for prompts in (short, long, short, long):
        assert engine.generate(engine.encode(prompts)) == expected[tuple(prompts)]
        addresses.append(sorted(cache.layers[0].keys.data_ptr() for _, cache in engine._caches.values()))
    # One for two rows, one for the third
    assert addresses[1] == addresses[2] == addresses[3] and len(addresses[1]) == 2


def test_failure_of_continuous_batching_is_raised_and_leaves_nothing_behind(model, tokenizer, monkeypatch):
    model.set_attn_implementation("eager")
    engine = HFEngine(model, tokenizer, 12, 4, decoding="continuous")
    encoded, threads = engine.encode(PROMPTS[:4]), set(threading.enumerate())
    expected = engine.generate(encoded)

    def broken(*args, **kwargs):
        raise RuntimeError("the forward pass broke")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", broken)
        with pytest.raises(RunError, match="continuous batching"):  # no bug of ours
            engine.generate(encoded)
    assert set(threading.enumerate()) <= threads and model.config._attn_implementation == "eager"
    assert engine.generate(encoded) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rwkv", "llama", "qwen2", "mixtral", "gemma", "jamba"])
def test_a_model_that_does_not_ignore_padding_is_asked_one_prompt_at_a_time(
    build_model, tokenizer, kind, dtype, caplog
):
    engine = HFEngine(build_model(kind, vocab_size=64).to(dtype), tokenizer, 4, 16)
    options = copy.deepcopy(engine.options)
    engine.prove()
    assert [text for text in caplog.messages if "padding" in text] == (
        ["models of type rwkv do not ignore padding: they are asked one prompt at a time"] if kind == "rwkv" else []
    )
    assert engine.batch_size == (1 if kind == "rwkv" else 16) and engine.options == options
    if dtype == torch.float32:
        together, alone = (engine.generate(engine.encode(prompts)) for prompts in (PROMPTS[:4], PROMPTS[:1]))
        assert together[0] == alone[0]


# --- where an answer ends ---------------------------------------------------------------------------------------------


@all_decodings
def test_an_answer_ends_at_the_first_end_token_of_several(model, tokenizer, decoding):
    eos, plus = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("+")
    model.generation_config.eos_token_id = [eos, plus]
    answers = generate(model, tokenizer, decoding=decoding)
    last = [answer.ids[-1] for answer in answers]
    assert last.count(eos) > 3 and last.count(plus) > 3
    for text, ids in answers:
        assert not set(ids[:-1]) & {eos, plus, tokenizer.pad_token_id}
        assert text == tokenizer.decode(ids, skip_special_tokens=True) and not set(text) & set("_^$")


@all_decodings
def test_an_answer_without_end_has_all_its_tokens(model, tokenizer, decoding):
    assert all(len(answer.ids) == 3 for answer in generate(model, tokenizer, new=3, decoding=decoding))


# --- sampling ---------------------------------------------------------------------------------------------------------


@all_decodings
def test_sampling_options_of_the_checkpoint_do_not_matter(model, tokenizer, decoding):
    before = generate(model, tokenizer, decoding=decoding)
    model.generation_config.update(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=5.0,
        max_new_tokens=2,
        suppress_tokens=[5, 6, 7],
    )
    assert generate(model, tokenizer, decoding=decoding) == before


@all_decodings
def test_sampled_answers_repeat_and_follow_the_seed(model, tokenizer, decoding):
    engine = HFEngine(model, tokenizer, 12, 16, decoding=decoding)
    encoded, state = engine.encode(PROMPTS[:8]), torch.get_rng_state()
    first = engine.generate(encoded, Sampling(1.5, 3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert engine.generate(encoded, Sampling(1.5, 3)) == first
    assert engine.generate(encoded, Sampling(1.5, 4)) != first
    assert first != engine.generate(encoded) == generate(model, tokenizer, PROMPTS[:8])


@pytest.mark.parametrize("decoding", ["dynamic", "static"])
def test_a_prompts_random_numbers_depend_on_its_place_alone(model, tokenizer, decoding):
    """Not on batches, nor on how long the answers beside it or before it are."""
    prompts, sampling = PROMPTS[:1] * 12, Sampling(2.0, 2**64 - 1)
    answers = generate(model, tokenizer, prompts, 12, sampling=sampling, decoding=decoding)
    assert len(set(answers)) > 6  # though the prompt is the same
    for size in (1, 5):
        assert generate(model, tokenizer, prompts, size, sampling=sampling, decoding=decoding) == answers
    mixed = generate(model, tokenizer, [*PROMPTS[1:6], *prompts[5:]], sampling=sampling, decoding=decoding)
    assert mixed[5:] == answers[5:]
    shorter = generate(model, tokenizer, prompts, 5, new=3, sampling=sampling, decoding=decoding)
    assert [answer.ids for answer in shorter] == [answer.ids[:3] for answer in answers]


def test_samples_come_from_the_whole_distribution_at_the_temperature(model, tokenizer):
    model.generation_config.update(do_sample=True, top_k=3, top_p=0.5)
    answers = generate(model, tokenizer, PROMPTS[:1] * 4000, 4000, new=1, sampling=Sampling(2.0, 0))
    shares = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=22) / 4000
    logits = model(tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]).logits[0, -1]
    expected = torch.softmax(logits / 2.0, dim=-1)
    assert (expected > 0.01).sum() > 4  # so top_k or top_p would show
    assert (shares - expected).abs().max() < 0.03  # 4 standard errors


def test_samples_come_from_a_large_vocabulary_too(tokenizer):
    """transformers' own top_k is 50, more than the tokens of the model above."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=200, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).eval()
    sampled = {
        answer.ids for answer in generate(model, tokenizer, PROMPTS[:1] * 4000, 4000, new=1, sampling=Sampling(1.0, 0))
    }
    assert len(sampled) > 190


# --- members in one batch ---------------------------------------------------------------------------------------------


@pytest.fixture
def members_engine(model, tokenizer):
    """members_engine(batch_size, **options) -> (engine, optimizer with 6 members) over one model."""

    def make(batch_size, **options):
        entries = list(named_segments(model))
        members = Members(model, entries)
        engine = HFEngine(model, tokenizer, 12, batch_size, members=members, **options)
        tuned = [entry for entry in entries if entry.name in members.names]
        return engine, EvolutionStrategy(tuned, sigma=0.02, population=6, noise_rank=2, antithetic=True)

    return make


@pytest.mark.parametrize(
    "decoding, sampling",
    [("dynamic", None), ("static", None), ("dynamic", Sampling(1.0, 5)), ("static", Sampling(1.0, 5))],
)
def test_members_in_one_batch_answer_as_one_by_one(members_engine, decoding, sampling):
    """In float32 99 % of the tokens: a batch rounds otherwise than weights in memory."""
    engine, optimizer = members_engine(12, decoding=decoding)
    prompts = PROMPTS[:10]
    theta = es_kernels.fingerprint(optimizer.tables[0].live)
    encoded = engine.encode(prompts, 4)
    together = engine.generate_members(encoded, optimizer.noise(range(4)), sampling)
    together += engine.generate_members(encoded, optimizer.noise([4, 5]), sampling)
    assert es_kernels.fingerprint(optimizer.tables[0].live) == theta
    encoded = engine.encode(prompts)  # other batches
    plain = engine.generate(encoded, sampling)
    alone = optimizer.evaluate(lambda member: engine.generate(encoded, sampling))
    assert [len(answers) for answers in together] == [len(prompts)] * 6
    pairs = [(a, b) for ours, theirs in zip(together, alone, strict=True) for a, b in zip(ours, theirs, strict=True)]
    same = sum(x == y for a, b in pairs for x, y in zip(a.ids, b.ids, strict=False))
    assert same >= 0.99 * sum(max(len(a.ids), len(b.ids)) for a, b in pairs)
    assert len({tuple(answers) for answers in (plain, *together)}) == 7


def test_a_model_that_mixes_members_is_refused(members_engine, model):
    engine, _ = members_engine(40)
    engine.prove()
    inside = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: inside(x.roll(1, 0)).roll(-1, 0)  # its rows in another order
    with pytest.raises(UserError, match="another one's logits.*--members_at_once 1"):
        engine.prove()


def test_members_without_noise_share_the_random_numbers(members_engine):
    engine, optimizer = members_engine(40)
    encoded, sampling = engine.encode(PROMPTS[:10], 4), Sampling(2.0, 3)
    noise = [group._replace(coefs=[0.0] * 4) for group in optimizer.noise(range(4))]
    assert engine.generate_members(encoded, noise, sampling) == [engine.generate(encoded, sampling)] * 4


def test_batches_hold_fewer_prompts_where_members_share_them(members_engine):
    engine, _ = members_engine(12)
    assert [len(rows) for rows, _ in engine.encode(PROMPTS[:8], 4)] == [3, 3, 2]
    assert [len(rows) for rows, _ in engine.encode(PROMPTS[:8], 100)] == [1] * 8


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_text_is_taken_as_it_is_and_chats_by_the_template_with_special_tokens_once(tiny_llama, chat_tokenizer):
    engine = HFEngine(tiny_llama, chat_tokenizer, 4, 4)
    chat = ({"role": "user", "content": "ab"}, {"role": "user", "content": "c"})
    assert tokenize(engine.tokenizer, ["abc", chat, "d", list(chat)]) == [
        [1, 5, 6, 7],
        [1, 3, 5, 6, 3, 7, 4],
        [1, 8],
        [1, 3, 5, 6, 3, 7, 4],
    ]
    encoded = engine.encode(["abc", chat])
    assert [rows for rows, _ in encoded] == [[1, 0]]
    assert len(engine.generate(encoded)) == 2


def test_prompts_that_cannot_be_asked_are_refused(model, tokenizer, tiny_llama, chat_tokenizer):
    engine = HFEngine(model, tokenizer, 12, 16)
    with pytest.raises(ValueError, match="prompt 1 is a chat, but the tokenizer has no chat template"):
        engine.encode(["1", [{"role": "user", "content": "2"}]])
    with pytest.raises(
        ValueError,
        match=r"prompt 2 has 53 tokens, too many for 12 new ones within the model's 64 positions: shorten it, or",
    ):
        engine.encode(["1", "2", "3" * 53])
    engine.encode(["3" * 52])
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        engine.encode(["1", ""])
    with pytest.raises(ValueError, match="prompt 0 is refused by the tokenizer's chat template: no system role"):
        HFEngine(tiny_llama, chat_tokenizer, 4, 4).encode([[{"role": "system", "content": "a"}]])
    chat_tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(
        ValueError, match="prompt 0 is refused by the tokenizer's chat template: can only concatenate str"
    ):
        HFEngine(tiny_llama, chat_tokenizer, 4, 4).encode([[{"role": "user", "content": "a"}]])
    tiny_llama.resize_token_embeddings(10)
    with pytest.raises(ValueError, match="prompt 1 has token number 10, but the model embeds 10 tokens"):
        HFEngine(tiny_llama, chat_tokenizer, 4, 4).encode(["ab", "abf"])


def test_a_model_without_a_limit_of_positions_takes_prompts_of_any_length(model, tokenizer):
    for unlimited in (-1, 0):  # XLNet's config says -1
        model.config.max_position_embeddings = unlimited
        assert HFEngine(model, tokenizer, 12, 16).encode(["3" * 500])


def test_options_that_cannot_be_are_refused(model):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    with pytest.raises(ValueError, match="decoding must be one of dynamic, static, continuous, not 'paged'"):
        HFEngine(model, tokenizer, 12, 16, decoding="paged")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        HFEngine(model, tokenizer, 12, 16)


# --- models -----------------------------------------------------------------------------------------------------------


NEOX = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
NEO = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 8,
}
XLNET = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


@pytest.mark.parametrize(
    "family, config, refused",
    [
        (
            "GPTNeoXForCausalLM",
            NEOX,
            {"continuous": r"models of type gpt_neox cannot generate with decoding 'continuous' \(.*\)"},
        ),
        (
            "XLNetLMHeadModel",
            XLNET,
            dict.fromkeys(["continuous", "static"], "models of type xlnet do not support decoding"),
        ),
        (
            "GPTNeoForCausalLM",
            NEO,
            dict.fromkeys(["continuous", "static"], "models of type gpt_neo do not support decoding"),
        ),
        (
            "MambaForCausalLM",
            MAMBA,
            dict.fromkeys(["continuous", "static"], "models of type mamba do not support decoding"),
        ),
        ("LlamaForCausalLM", NEOX, {}),
    ],
)
def test_a_decoding_that_a_model_cannot_do_is_refused_in_one_line(tokenizer, capfd, family, config, refused):
    kind = getattr(transformers, family)
    model = kind(kind.config_class(vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, **config)).eval()
    engines = {decoding: HFEngine(model, tokenizer, 4, 4, decoding=decoding) for decoding in DECODINGS}
    capfd.readouterr()
    for decoding, engine in engines.items():
        if decoding in refused:
            with pytest.raises(ValueError, match=refused[decoding] + ".*: use --decoding dynamic$") as raised:
                engine.prove()
            assert "\n" not in str(raised.value)
        else:
            engine.prove()
            assert engine.generate(engine.encode(["1", "2+2"])) == engines["dynamic"].generate(
                engines["dynamic"].encode(["1", "2+2"])
            )
            assert engine.options.max_new_tokens == 4
    assert "Traceback" not in capfd.readouterr().err


def test_a_model_that_cannot_generate_at_all_is_refused_in_one_line(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: 1 / 0)
    with pytest.raises(
        ValueError, match=r"^models of type llama cannot generate with decoding 'dynamic' \(division by zero\)$"
    ):
        HFEngine(model, tokenizer, 4, 4).prove()


# --- log probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2**28, 1000])
def test_log_probs_are_those_of_each_token_at_temperature_1(model, tokenizer, monkeypatch, at_once):
    monkeypatch.setattr(hf, "_LOGITS_AT_ONCE", at_once)
    engine = HFEngine(model, tokenizer, 12, 16)
    answers = engine.generate(engine.encode(PROMPTS), Sampling(2.0, 0))
    answers[3] = Answer("", ())
    rows = engine.log_probs(engine.encode_answers(PROMPTS, answers))
    assert len({len(row) for row in rows}) > 3
    for prompt, answer, log_p in zip(PROMPTS, answers, rows, strict=True):
        ids = tokenizer(prompt)["input_ids"] + list(answer.ids)
        with torch.no_grad():
            whole = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        begin = len(ids) - len(answer.ids)
        expected = (
            torch.stack([whole[place - 1, ids[place]] for place in range(begin, len(ids))])
            if answer.ids
            else torch.empty(0)
        )
        assert log_p.dtype == torch.float32 and not log_p.requires_grad
        torch.testing.assert_close(log_p, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma3", "lora"])
@pytest.mark.parametrize("at_once", [2**28, 4000])
def test_log_probs_of_members_in_one_batch_are_those_of_each(build_model, tokenizer, monkeypatch, kind, at_once):
    """To 1e-5, whatever the batches and however many logits are computed: the model's own log_softmax with the member's
    noise in the weights."""
    monkeypatch.setattr(hf, "_LOGITS_AT_ONCE", at_once)
    model = build_model(kind)
    entries = [entry for entry in named_segments(model) if entry.tensor.requires_grad]
    members = Members(model, entries)
    engine = HFEngine(model, tokenizer, 4, 12, members=members)
    tuned = [entry for entry in entries if entry.name in members.names]
    optimizer = EvolutionStrategy(tuned, sigma=0.02, population=4, noise_rank=2)
    prompts = [prompt[:length] for length, prompt in enumerate(PROMPTS[:7], 3)]
    answers = ["3+4+7", "1", "9-8", "12*2-1*1", "7", "1+1", "0"]
    theta = es_kernels.fingerprint(optimizer.tables[0].live)
    together = engine.log_probs_members(engine.encode_answers(prompts, answers, 3), optimizer.noise(range(3)))
    together += engine.log_probs_members(engine.encode_answers(prompts, answers, 3), optimizer.noise([3]))
    assert es_kernels.fingerprint(optimizer.tables[0].live) == theta
    one_by_one = optimizer.evaluate(lambda member: engine.log_probs(engine.encode_answers(prompts, answers)))
    alone = optimizer.evaluate(
        lambda member: [own_log_probs(model, tokenizer, *pair) for pair in zip(prompts, answers, strict=True)]
    )
    for rows, others, expected in zip(together, one_by_one, alone, strict=True):
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(others, expected, rtol=0, atol=1e-5)
    assert max(abs(a - b).max() for a, b in zip(together[0], together[1], strict=True)) > 1e-2


@torch.no_grad()
def own_log_probs(model, tokenizer, prompt, answer):
    """Of the answer's tokens and the end token, by one forward pass over this text alone."""
    before = tokenizer(prompt)["input_ids"]
    ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
    assert ids[: len(before)] == before
    log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
    return torch.stack([log_p[place - 1, ids[place]] for place in range(len(before), len(ids))])


def test_an_answer_follows_a_text_at_once_and_a_chat_after_the_generation_prompt(tiny_llama, chat_tokenizer):
    """With <s> put in front of each text by the tokenizer, and </s> at the end."""
    chat = ({"role": "user", "content": "ab"},)
    read = continuations(chat_tokenizer, ["ab", chat, "c", chat], ["cd", "cd", Answer("", (9,)), Answer("", ())], 2)
    assert read == ([[1, 5, 6], [1, 3, 5, 6, 4], [1, 7], [1, 3, 5, 6, 4]], [[7, 8, 2], [7, 8, 2], [9], []])
    assert continuations(chat_tokenizer, ["ab"], ["cd"], None)[1] == [[7, 8]]


def test_an_answers_tokens_are_those_behind_the_prompts_own(tokenizer):
    """A model that answers has the prompt's tokens before it: none may reach across the border. And a space that a
    tokenizer puts in front of each text is not in front of an answer."""
    names = {name: i for i, name in enumerate(["<pad>", "</s>", "_", "a", "b", "c", "ab", "bc"])}
    inner = Tokenizer(models.BPE(names, [("a", "b"), ("b", "c")]))
    inner.normalizer = normalizers.Prepend("_")
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
    assert continuations(made, ["ca"], ["bc"], 1) == ([[2, 5, 3]], [[2, 7, 1]])  # not [6] across the border
    assert continuations(made, ["aa"], ["cb"], 1) == ([[2, 3, 3]], [[5, 4, 1]])
    with pytest.raises(PromptError, match="answer 1 'zz' has no tokens"):
        continuations(made, ["a", "a"], ["b", "zz"], 1)


def test_the_end_of_an_answer_is_the_tokenizers_own_end_token_where_the_model_stops_at_several(model, tokenizer):
    model.generation_config.eos_token_id = [3, tokenizer.eos_token_id]
    assert HFEngine(model, tokenizer, 4, 4).end == tokenizer.eos_token_id
    model.generation_config.eos_token_id = [7, 3]
    assert HFEngine(model, tokenizer, 4, 4).end == 3
    model.generation_config.eos_token_id, tokenizer = None, copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    assert HFEngine(model, tokenizer, 4, 4).end is None


@pytest.mark.parametrize(
    "prompt, answer, words",
    [
        ("1", "3" * 63, "answer 1 has 64 tokens, too many after 1 of the prompt within the model's 64 positions"),
        ("3" * 99, "1", "answer 1 has 2 tokens, too many after 99 of the prompt"),
    ],
)
def test_an_answer_that_cannot_be_read_is_refused(build_model, tokenizer, prompt, answer, words):
    engine = HFEngine(build_model("llama"), tokenizer, 4, 4)
    with pytest.raises(PromptError, match=words):
        engine.encode_answers(["1", prompt], ["2", answer])


def test_a_peft_model_generates_with_its_adapter_and_keeps_its_own_options(model, tokenizer):
    import peft

    base = generate(model, tokenizer)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    generation_config = model.generation_config
    adapted = generate(wrapped, tokenizer)
    assert adapted != base and model.generation_config is generation_config
    assert adapted == generate(wrapped.merge_and_unload(), tokenizer)


def wrapped_twice(model):
    return torch.nn.DataParallel(torch.compile(model))


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, checkpoint_wrapper, wrapped_twice])
def test_a_wrapped_model_generates_as_itself(model, tokenizer, wrap):
    assert generate(wrap(model), tokenizer, PROMPTS[:4]) == generate(model, tokenizer, PROMPTS[:4])


def test_a_model_in_training_mode_answers_without_dropout(model, tokenizer):
    expected = generate(model, tokenizer)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert generate(model, tokenizer) == expected


def test_a_transformers_without_continuous_batching_is_refused_at_once(model, tokenizer, monkeypatch):
    older = types.ModuleType("transformers")
    older.__dict__.update(GenerationConfig=GenerationConfig, __version__="5.0.0")
    monkeypatch.setitem(sys.modules, "transformers", older)
    with pytest.raises(ValueError, match="needs a newer transformers than 5.0.0"):
        HFEngine(model, tokenizer, 12, 16, decoding="continuous")
