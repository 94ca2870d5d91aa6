"""`es-finetune replay`: the tuned weights made again from base model and log, each generation proven by fingerprint."""

from __future__ import annotations

import logging
import time

from es_finetune.commands import takes_options_of
from es_finetune.config import ReplayConfig
from es_finetune.runs.replay import Rebuilt, rebuild

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_MESSAGES = 10.0


@takes_options_of(ReplayConfig)
def replay(config: ReplayConfig) -> Rebuilt:
    """Make a run's weights again from its base model and its log alone, bit for bit, on any backend.

    Args:
        run: Folder of the run.
        model: Where the base model is now; as in the log if None.
        generation: Stop after this many updates; all if None.
        device: "cpu", "cuda", "cuda:1", ...; "auto": cuda if there is one.

    Returns:
        `model` with the live weights and its `tokenizer`, `optimizer` with the exact ones, `config` and `generations`
        of the log.

    Raises:
        UserError: The log is damaged, the base model is another one, or a fingerprint differs from the log's.
    """
    return rebuild_run(config.run, model=config.model, device=config.device, generation=config.generation)


def rebuild_run(run: str, *, model: str | None, device: str, generation: int | None) -> Rebuilt:
    """`runs.replay.rebuild`, which takes minutes of a long run: every ten seconds a message says how far it is."""
    last = time.monotonic()

    def say(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_MESSAGES:
            last = time.monotonic()
            logger.info("replaying %s: %d generations made again", run, done)

    return rebuild(run, model=model, device=device, generation=generation, on_generation=say)
