"""The engine over a transformers model that lives in this process."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from es_finetune.engines import DECODINGS, Answer, Sampling
from es_finetune.engines.prompts import (
    Prompt,
    continuations,
    end_token,
    positions_of,
    refuse_unanswerable,
    refuse_unreadable,
    tokenize,
    vocabulary_of,
)
from es_finetune.errors import RunError, UserError, first_line
from es_finetune.models.checkpoint_names import base_of, refuse_prompt_learning
from es_finetune.models.members import MemberNoise, Members
from es_kernels.noise import SAMPLING, member_seed

logger = logging.getLogger(__name__)

# Static caches have a multiple of this many positions, so that prompts of other lengths seldom need a new one
_CACHE_STEP = 128
_LOGITS_AT_ONCE = 2**28  # elements: 1 GiB in float32


class HFEngine:
    """Decoding with transformers' own loops.

    All three stop a row at its end token, and a batch when each of its rows has ended or has `max_new_tokens`:

    - "dynamic": left-padded batches of `batch_size` prompts of similar length, each with a KV cache of its own that
      grows. Fastest on a CPU and for small models.
    - "static": the same batches over KV caches of fixed size; on CUDA transformers compiles the decoding step and
      replays it as a CUDA graph, which is captured for the addresses of weights and cache. So each cache is kept for
      the next call (only as memory: it is zeroed before each batch), and weights must be changed in place, as
      EvolutionStrategy does, never assigned.
    - "continuous": no batches; a prompt starts as soon as one of `batch_size` places is free, over a paged KV cache
      that lives for one call and shares no blocks between prompts. With flash attention (float16 or bfloat16 on CUDA;
      used where it is installed) decoding steps are CUDA graphs, captured in each call: it pays where answers are long
      and of very different lengths.

    Which prompts are computed together depends only on the prompts and on `batch_size`. Greedy text can differ in the
    last bits of the logits when decoding, batch split, thread count or GPU changes: runs that have to agree must fix
    them.

    Args:
        model: A transformers causal LM, wrapped or with a PEFT adapter or neither. It is put in eval mode.
        tokenizer: Its tokenizer, with a pad token.
        max_new_tokens: How many tokens an answer may have.
        batch_size: How many prompts are answered at a time.
        decoding: One of `engines.DECODINGS`.
        members: Where members that share a batch add their noise. None: one member at a time, put in place by others.

    Raises:
        UserError: An option is none of these, the tokenizer has no pad token, the installed transformers lacks the
            decoding, or the model's adapter learns a prompt.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_new_tokens: int,
        batch_size: int,
        *,
        decoding: str = "dynamic",
        members: Members | None = None,
    ):
        import transformers
        from transformers import GenerationConfig

        if decoding not in DECODINGS:
            raise UserError(f"decoding must be one of {', '.join(DECODINGS)}, not {decoding!r}")
        if decoding == "continuous":
            try:
                from transformers import ContinuousBatchingConfig  # noqa: F401
            except ImportError:
                raise UserError(
                    f"decoding 'continuous' needs a newer transformers than {transformers.__version__}: pip install -U "
                    "transformers"
                ) from None
        if tokenizer.pad_token_id is None:
            raise UserError(
                "the tokenizer has no pad token, which batches need: set tokenizer.pad_token (eos_token serves) and "
                "save it"
            )
        refuse_prompt_learning(model)
        # Without PEFT's wrapper, which then adds nothing to generating: its layers sit inside the model, and so do the
        # options to replace.
        self.model = base_of(model)
        model.eval()  # dropout would be noise that no seed explains
        self.tokenizer, self.max_new_tokens, self.batch_size = tokenizer, max_new_tokens, batch_size
        self.decoding, self.members = decoding, members
        eos = self.model.generation_config.eos_token_id
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
        self.end = end_token(tokenizer, self.eos)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.options = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.eos) or None,
            pad_token_id=tokenizer.pad_token_id,
        )
        self._caches: dict[int, tuple] = {}  # rows -> (positions, StaticCache)

    def prove(self) -> None:
        """Generate two tokens, as the first member will; a run asks for it before it writes anything.

        Where an answer depends on the prompts beside it, batches are of one prompt from then on, and a warning says so.

        Raises:
            UserError: The model cannot generate at all, not by this decoding, or not for members in one batch.
        """
        kind = getattr(self.model.config, "model_type", type(self.model).__name__)
        remedy = "" if self.decoding == "dynamic" else ": use --decoding dynamic"
        # What transformers' own flags say comes first: where they say no, XLNet's and OpenAI-GPT's continuous and
        # GPT-Neo's static answers were wrong in a trial, without any error.
        needs = {"continuous": "_supports_attention_backend", "static": "_can_compile_fullgraph"}.get(self.decoding)
        if needs and not getattr(self.model, needs, True):
            raise UserError(f"models of type {kind} do not support decoding {self.decoding!r}{remedy}")
        token = min(self.eos, default=0)
        options, self.options = self.options, copy.deepcopy(self.options)
        # A compiled step for a batch that never comes again would cost half a minute.
        self.options.update(max_new_tokens=2, disable_compile=True)
        try:
            with _silent("ContinuousBatchingLogger"), self._only_our_options():
                if self.decoding == "continuous":
                    with self._own_random_numbers(None):
                        self._in_places([[token]], None)
                else:
                    inputs = torch.full((1, 1), token, device=self.model.device)
                    self._in_batches([([0], {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)})], None)
                    if self.batch_size > 1 and self._neighbours_show():
                        self.batch_size = 1
                        logger.warning(
                            "models of type %s do not ignore padding: they are asked one prompt at a time", kind
                        )
                    if self.members is not None and self._members_meet(self.members):
                        raise RuntimeError("a member's noise shows in another one's logits")
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.model.device} has no memory left to generate with this model ({first_line(error)}): use a "
                "smaller one"
            ) from error
        except Exception as error:
            together = "" if self.members is None else ", or with members in one batch: give --members_at_once 1"
            raise UserError(
                f"models of type {kind} cannot generate with decoding {self.decoding!r} ({first_line(error)}){remedy}"
                f"{together}"
            ) from error
        finally:
            self.options = options
            self._caches.clear()

    def _neighbours_show(self) -> bool:
        """Whether a prompt's logits, for its first token and the one after it, change where it is padded beside a
        longer one. What rounding may do (`_differ`) is put at half the digits of the coarsest dtype, in units of the
        logits' standard deviation: 9 % in bfloat16. RWKV is off by 64 %."""
        longest = self._trial_length()
        if longest < 4:
            return False
        prompts = [self._trial_prompt(length) for length in (longest, 3)]
        self.options.update(do_sample=False, output_logits=True, return_dict_in_generate=True)
        beside, alone = (
            self.model.generate(**self._padded(rows), generation_config=self.options) for rows in (prompts, prompts[1:])
        )
        steps = 1 + bool(beside.sequences[-1, -2] == alone.sequences[-1, -2])
        both = zip(alone.logits[:steps], beside.logits[:steps], strict=False)  # either may have ended before
        return any(self._differ(a[-1], b[-1]) for a, b in both)

    @torch.no_grad()
    def _members_meet(self, members: Members) -> bool:
        """Whether of two members in one batch, of which one has no noise, that one has other logits than the model, or
        the other one other logits when they change places: so where a layer sees rows in another order, or a part of
        them. By `_differ`."""
        length = self._trial_length()
        prompts = [self._trial_prompt(length), self._trial_prompt(length)[::-1]]
        inputs = self._padded(prompts)

        def logits(*coefs: float) -> torch.Tensor:  # [members, prompts, vocabulary]
            with members.added([MemberNoise(sorted(members.names), (1, 1), coefs, 1)]) as begin:
                begin(4)
                together = {name: t.repeat(2, 1) for name, t in inputs.items()}
                return self.model(**together, use_cache=False).logits[:, -1].unflatten(0, (2, 2))

        plain = self.model(**inputs, use_cache=False).logits[:, -1]
        (quiet, loud), (loud_before, quiet_behind) = logits(0.0, 1e-3), logits(1e-3, 0.0)
        return any(self._differ(a, b) for a, b in ((plain, quiet), (plain, quiet_behind), (loud, loud_before)))

    def _trial_length(self) -> int:
        return int(min(12, positions_of(self.model) - 2))

    def _trial_prompt(self, length: int) -> list[int]:
        vocabulary = self.model.config.get_text_config().vocab_size
        return [(7 * place + length) % vocabulary for place in range(length)]

    def _differ(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether logits differ by more than rounding may do."""
        bound = math.sqrt(max(torch.finfo(p.dtype).eps for p in self.model.parameters() if p.is_floating_point()))
        return bool((b.float() - a.float()).square().mean().sqrt() > bound * a.float().std())

    def _padded(self, tokens: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """One batch, the longest first: inputs of generate(), padded on the left."""
        longest = len(tokens[0])
        ids = [[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in tokens]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in tokens]
        return {
            "input_ids": torch.tensor(ids, device=self.model.device),
            "attention_mask": torch.tensor(mask, device=self.model.device),
        }

    def encode(
        self, prompts: Sequence[str | Sequence[dict]], members: int = 1
    ) -> list[tuple[list[int], dict[str, torch.Tensor]]] | list[list[int]]:
        """What does not depend on the weights.

        Args:
            prompts: Texts, or chats as lists of messages.
            members: How many will share a batch, which then holds so many times fewer prompts.

        Returns:
            Batches as (positions in `prompts`, inputs i64 [rows, longest prompt]), longest prompts first, so that the
            batch that needs most memory runs first. For "continuous" the prompts' ids, which need no batches.

        Raises:
            PromptError: A prompt is empty, or too long for the model's positions with `max_new_tokens` after it, or has
                tokens that the model does not embed; or the tokenizer's chat template refuses its messages.
        """
        tokens = tokenize(self.tokenizer, prompts)
        refuse_unanswerable(tokens, self.max_new_tokens, positions_of(self.model), vocabulary_of(self.model))
        if self.decoding == "continuous":
            return tokens
        order = sorted(range(len(tokens)), key=lambda i: (-len(tokens[i]), i))
        batches = []
        size = max(1, self.batch_size // members)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batches.append((rows, self._padded([tokens[row] for row in rows])))
        return batches

    def generate(self, encoded: list, sampling: Sampling | None = None) -> list[Answer]:
        """Answer what `encode` gave. torch's generators stay as they were.

        Args:
            encoded: Batches, or for "continuous" ids.
            sampling: None: greedy. With "continuous" a prompt's random numbers depend on the others' answers too.

        Returns:
            One answer per prompt, in the prompts' order.

        Raises:
            RunError: transformers' continuous batching gave up, as where memory runs out.
        """
        with self._only_our_options():
            if self.decoding == "continuous":
                with self._own_random_numbers(sampling):
                    return self._answers(self._in_places(encoded, sampling))
            return self._answers(self._in_batches(encoded, sampling)[0])

    def generate_members(
        self, encoded: list, noise: Sequence[MemberNoise], sampling: Sampling | None = None
    ) -> list[list[Answer]]:
        """Answer what `encode` gave for as many members or more, each with its own noise over the weights in place,
        which stay as they are. Static caches are used without CUDA graphs, whose addresses a member's noise has not.

        Args:
            encoded: Batches.
            noise: Of each param_group, of the same members.
            sampling: As for `generate`.

        Returns:
            Of each member one answer per prompt, in the prompts' order.
        """
        assert self.members is not None
        with self._only_our_options(), self.members.added(noise) as begin:
            tokens = self._in_batches(encoded, sampling, len(noise[0].seeds), begin)
        return [self._answers(of_member) for of_member in tokens]

    def _answers(self, tokens: list[list[int]]) -> list[Answer]:
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Answer(text, tuple(ids)) for text, ids in zip(texts, tokens, strict=True)]

    def encode_answers(
        self, prompts: Sequence[Prompt], answers: Sequence[str | Answer], members: int = 1
    ) -> list[_Reading]:
        """What of reading answers does not depend on the weights.

        Args:
            prompts: As for `encode`.
            answers: One for each: text, which the end token follows (`prompts.continuations`), or ids as they are.
            members: How many will share a batch, which then holds so many times fewer answers.

        Returns:
            Batches, longest rows first.

        Raises:
            PromptError: As for `encode`; or an answer has no tokens, or does not fit behind its prompt.
        """
        before, after = continuations(self.tokenizer, prompts, answers, self.end)
        refuse_unreadable(before, after, positions_of(self.model), vocabulary_of(self.model))
        whole = [ids + more for ids, more in zip(before, after, strict=True)]
        order = sorted(range(len(whole)), key=lambda i: (-len(whole[i]), i))
        vocabulary = self.model.config.get_text_config().vocab_size
        batches = []
        while order:
            rows = order[: max(1, self.batch_size // members)]
            logits = len(self._window(before, after, rows)) * vocabulary
            rows = rows[: max(1, _LOGITS_AT_ONCE // (logits * members))]
            order = order[len(rows) :]
            longest = len(whole[rows[0]])
            # Padded on the right: no real token sees what comes after it, and positions count from 0 without a word
            # from us.
            ids = [whole[row] + [self.tokenizer.pad_token_id] * (longest - len(whole[row])) for row in rows]
            mask = [[1] * len(whole[row]) + [0] * (longest - len(whole[row])) for row in rows]
            window = self._window(before, after, rows)
            inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
            if self._keeps_logits:
                inputs["logits_to_keep"] = torch.arange(window.start, window.stop)
            # The logits of a token are at the place before it
            places = [(at, len(before[row]) + k) for at, row in enumerate(rows) for k in range(len(after[row]))]
            batches.append(
                _Reading(
                    rows,
                    {name: t.to(self.model.device) for name, t in inputs.items()},
                    torch.tensor([at for at, _ in places], dtype=torch.int64, device=self.model.device),
                    torch.tensor(
                        [k - 1 - window.start for _, k in places], dtype=torch.int64, device=self.model.device
                    ),
                    torch.tensor([ids[at][k] for at, k in places], dtype=torch.int64, device=self.model.device),
                    [len(after[row]) for row in rows],
                )
            )
        return batches

    def _window(self, before: Sequence[list[int]], after: Sequence[list[int]], rows: Sequence[int]) -> range:
        """Places whose logits are computed for these rows: from the first to the last that is asked for, or all where
        the model knows no such option."""
        first = min(len(before[row]) for row in rows) - 1 if self._keeps_logits else 0
        return range(first, max(first + 1, *(len(before[row]) + len(after[row]) - 1 for row in rows)))

    def log_probs(self, encoded: list[_Reading]) -> list[torch.Tensor]:
        """Log-probabilities of the answers that `encode_answers` was given, under the weights of this moment, at
        temperature 1.

        Returns:
            Per answer, in their order, one f32 tensor [its tokens] on the CPU: the natural log of the probability of
            each of them after the prompt and the tokens before it.
        """
        return self._read(encoded)[0]

    def log_probs_members(self, encoded: list[_Reading], noise: Sequence[MemberNoise]) -> list[list[torch.Tensor]]:
        """The same for as many members as `encode_answers` was told or fewer, each with its own noise over the weights
        in place, which stay as they are."""
        assert self.members is not None
        with self.members.added(noise) as begin:
            return self._read(encoded, len(noise[0].seeds), begin)

    @torch.no_grad()
    def _read(
        self, batches: list[_Reading], members: int = 1, begin: Callable[[int], None] = lambda rows: None
    ) -> list[list[torch.Tensor]]:
        """Of each member the log-probabilities of the answers' tokens. Rows and `begin` as for `_in_batches`."""
        count = sum(len(rows) for rows, *_ in batches)
        result: list[list[torch.Tensor]] = [[torch.empty(0)] * count for _ in range(members)]
        for rows, inputs, at, place, token, lengths in batches:
            begin(members * len(rows))
            inputs = {name: t if t.dim() == 1 else t.repeat(members, 1) for name, t in inputs.items()}
            logits = self.model(**inputs, use_cache=False).logits.unflatten(0, (members, len(rows)))[:, at, place]
            log_p = torch.log_softmax(logits.float(), dim=-1).gather(2, token.expand(members, -1)[..., None])[..., 0]
            for member, of_member in enumerate(log_p.cpu()):
                for row, of_answer in zip(rows, of_member.split(lengths), strict=True):
                    result[member][row] = of_answer
        return result

    def _in_batches(
        self,
        batches: list[tuple[list[int], dict[str, torch.Tensor]]],
        sampling: Sampling | None,
        members: int = 1,
        begin: Callable[[int], None] = lambda rows: None,
    ) -> list[list[list[int]]]:
        """Of each member the tokens of its answers. Its rows follow those of the member before; `begin` is called with
        the rows of each batch before it."""
        count = sum(len(rows) for rows, _ in batches)
        tokens: list[list[list[int]]] = [[[]] * count for _ in range(members)]
        longest = max((inputs["input_ids"].shape[1] for _, inputs in batches), default=0)
        options = copy.deepcopy(self.options)
        options.update(disable_compile=members > 1 or self.options.disable_compile)
        for rows, inputs in batches:
            total = members * len(rows)
            begin(total)
            inputs = {name: t.repeat(members, 1) for name, t in inputs.items()}
            others: dict[str, Any] = {}
            if self.decoding == "static":
                others["past_key_values"] = self._empty_cache(total, longest)
            if sampling is not None:  # ours: generate()'s own draws row after row
                others["logits_processor"] = [_Sampler(sampling, rows, members)]
            ids = self.model.generate(**inputs, **others, generation_config=options)
            answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
            for place, answer in enumerate(answers):
                member, row = divmod(place, len(rows))
                tokens[member][rows[row]] = self._until_end(answer)
        return tokens

    def _until_end(self, ids: list[int]) -> list[int]:
        """Without what generate() fills a row with after its end."""
        return next((ids[: place + 1] for place, token in enumerate(ids) if token in self.eos), ids)

    def _empty_cache(self, rows: int, longest: int):
        """The cache for batches of so many rows. generate() would make one per call, at another address: a new CUDA
        graph each time."""
        from transformers import StaticCache

        length, cache = self._caches.pop(rows, (0, None))
        if length < longest + self.max_new_tokens:
            length = -(-(longest + self.max_new_tokens) // _CACHE_STEP) * _CACHE_STEP
            cache = StaticCache(config=self.model.config, max_cache_len=length)
        self._caches[rows] = length, cache
        cache.reset()
        return cache

    @torch.no_grad()
    def _in_places(self, prompts: list[list[int]], sampling: Sampling | None) -> list[list[int]]:
        """transformers' continuous batching. As its generate_batch, but each prompt is in the queue before the loop
        starts, so that which prompts share a step (and the order of random numbers) does not depend on the speed of a
        thread, and failures are raised."""
        from transformers import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        if not prompts:
            return []
        model, longest = self.model, max(len(ids) for ids in prompts)
        if model.device.type == "cuda":
            # It computes on a stream of its own, which waits for nothing: the weights' last change must have ended.
            torch.cuda.current_stream(model.device).synchronize()
        places = min(self.batch_size, len(prompts))
        page = ContinuousBatchingConfig.page_size
        config = ContinuousBatchingConfig(
            allow_block_sharing=False,
            # What `places` of the longest prompts can fill, not what happens to be free on the device, lest text depend
            # on that.
            num_blocks=places * -(-(longest + self.max_new_tokens) // page) + 1,
            safety_margin=0.0,
            max_batch_tokens=max(places, min(8192, places * longest)),
            max_requests_per_batch=places,
            auto_switch_to_flash=model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16),
        )
        attention = model.config._attn_implementation
        options = copy.deepcopy(self.options)
        if sampling is not None:
            options.update(do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0)
        manager = None
        try:
            hints = WorkloadHints(
                max_prompt_length=longest, max_generated_length=self.max_new_tokens, num_requests=len(prompts)
            )
            manager = model.init_continuous_batching(options, config, hints)
            manager.warmup()
            names = manager.add_requests(prompts, max_new_tokens=self.max_new_tokens)
            manager.start()
            answers: dict[str, list[int]] = {}
            while len(answers) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.error is not None:
                    remedy = "; a smaller batch_size needs less memory" if "memory" in str(result.error) else ""
                    raise RunError(f"continuous batching failed: {result.error}{remedy}")
                if result is not None and result.is_finished():
                    answers[result.request_id] = result.generated_tokens
                elif result is None and not manager.is_running():
                    raise RunError(
                        f"continuous batching stopped by itself: {manager.background_thread_status.fatal_error}"
                    )
            return [answers[name] for name in names]
        except MemoryError as error:
            raise RunError(
                f"no memory for the KV caches of {places} answers at a time: lower batch_size ({error})"
            ) from error
        finally:
            if manager is not None:
                if manager.is_running():
                    manager.stop(hard_stop=True)
                manager.destroy()
            if model.config._attn_implementation != attention:  # it switches back only when it ends well
                model.set_attn_implementation(attention)

    @contextmanager
    def _only_our_options(self) -> Iterator[None]:
        """Without the checkpoint's own: generate() fills what a caller leaves open from them, and e.g. Qwen2.5-Instruct
        ships sampling and a repetition penalty."""
        checkpoints_own = self.model.generation_config
        self.model.generation_config = self.options
        try:
            yield
        finally:
            self.model.generation_config = checkpoints_own

    @contextmanager
    def _own_random_numbers(self, sampling: Sampling | None) -> Iterator[None]:
        """For continuous batching, which draws from torch's generators even where it is greedy."""
        with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(0 if sampling is None else sampling.seed)
            yield


class _Reading(NamedTuple):
    """A batch of prompts with answers. Of each token of an answer, i64 [tokens]: its row, its place among the logits,
    and itself."""

    rows: list[int]  # by their places among all
    inputs: dict[str, torch.Tensor]  # of the model, i64 [rows, longest]
    at: torch.Tensor
    place: torch.Tensor
    token: torch.Tensor
    lengths: list[int]  # of the answers


class _Sampler:
    """A logits processor after which the largest score is a sample: argmax of logits / temperature - log E with E ~
    Exp(1) is one of the softmax (Gumbel's trick). Each prompt draws its E from a generator of its own, so that they
    depend on the seed, the prompt's place and the token's alone; the members of a batch share them.

    Args:
        sampling: Temperature and seed.
        prompts: Of the batch, by their places among all.
        members: Of the batch.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[int], members: int):
        self.temperature, self.members = sampling.temperature, members
        self.seeds = [member_seed(sampling.seed, 0, prompt, SAMPLING) for prompt in prompts]
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        shared = torch.empty(len(self.generators), scores.shape[1], device=scores.device)
        for row, generator in zip(shared, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - shared.log_().repeat(self.members, 1)


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Within, it says nothing: transformers logs a page for each failure of its loop, which we raise."""
    said = logging.getLogger(logger)
    before, said.disabled = said.disabled, True
    try:
        yield
    finally:
        said.disabled = before
