"""Opening a trained run on one device, without a mesh: what a notebook, `jaxlm eval` and `jaxlm generate` do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from jaxlm.config import RunConfig, compute_dtype, with_vocabulary
from jaxlm.data import Tokenizer, load_tokenizer
from jaxlm.models.language_model import LanguageModel, abstract_model
from jaxlm.training.checkpoint import restore_params
from jaxlm.training.run import read_config, run_tokenizer


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained model with what is needed to use it."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: RunConfig
    step: int


def load_run(run_dir: str | Path, step: int | None = None, dtype: str | None = None) -> LoadedRun:
    """A run's model, tokenizer and config, on jax's first device.

    Args:
      run_dir: the directory that `jaxlm train` left; nothing outside it is read.
      step: the checkpoint; None takes the newest that can be read.
      dtype: compute dtype ("float32", "bfloat16"); None decides as `train.dtype` does, for the device at hand.

    Raises:
      UserError: if the directory holds no run, no such step, or no readable checkpoint.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    tokenizer = load_tokenizer(run_tokenizer(config, run_dir))
    config = with_vocabulary(config, tokenizer)
    params, _, step = restore_params(run_dir, step)
    compute = compute_dtype(dtype or config.train.dtype, jax.devices()[0].platform)
    graphdef, _ = nnx.split(abstract_model(config.model, compute))
    return LoadedRun(nnx.merge(graphdef, params), tokenizer, config, step)


def load(run_dir: str | Path, step: int | None = None, dtype: str | None = None) -> LanguageModel:
    """A run's trained model, ready to call: `logits, state = jaxlm.load("runs/quickstart")(tokens)`. As `load_run`."""
    return load_run(run_dir, step, dtype).model
