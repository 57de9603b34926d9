"""Evaluating a trained run on any source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax

from jaxlm.data import held_out_batches
from jaxlm.params import split
from jaxlm.schema import UserError
from jaxlm.training.load import load_run
from jaxlm.training.step import Evaluator, make_eval_step


def evaluate_run(
    run_dir: str | Path,
    step: int | None = None,
    *,
    sources: Sequence = (),
    tokens: int | None = None,
    batch_size: int | None = None,
) -> dict[str, float | int | None]:
    """Loss of a run's model on text, on one device.

    Args:
      run_dir: the run.
      step: the checkpoint; None for the newest that can be read.
      sources: data sources read whole; empty: the run's own held-out text.
      tokens: read at most this many; None: as the run's `evaluation.tokens`, or everything of given sources.
      batch_size: rows a step; None: the run's.

    Returns:
      step, loss (nats per token), perplexity, bits_per_byte, accuracy, tokens, bytes.

    Raises:
      UserError: for a run or source that cannot be read.
    """
    run = load_run(run_dir, step)
    data = run.config.data
    if sources:
        data = data.model_copy(update={"held_out": tuple(sources)})
    if tokens is not None and tokens < 1:
        raise UserError(f"--tokens {tokens}: read at least one token")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: use at least one row")
    limit = tokens or (None if sources else run.config.evaluation.tokens)
    rows = batch_size or data.batch_size
    batches = held_out_batches(
        data, run.tokenizer, batch_size=rows, sequence_length=data.sequence_length, max_tokens=limit, rows=range(rows)
    )
    graphdef, params = split(run.model)
    evaluate = Evaluator(
        jax.jit(make_eval_step(graphdef, run.tokenizer.token_bytes, loss_chunk=run.config.train.loss_chunk)), batches
    )
    result = evaluate(params)
    return {"step": run.step, **result}
