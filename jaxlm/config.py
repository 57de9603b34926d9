"""The settings of a run: every section's settings class, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from jaxlm.data import DataSettings, Tokenizer
from jaxlm.models.language_model import ModelSettings
from jaxlm.optim.registry import AdamWSettings, OptimizerSettings
from jaxlm.schema import Schema, UserError


class TrainSettings(Schema):
    """The training step and loop."""

    steps: int = Field(1000, gt=0, description="Optimizer updates of the whole run.")
    accumulation: int = Field(1, gt=0, description="Micro-batches an update; divides data.batch_size.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of activations and products; auto: bfloat16 on TPU and GPU, float32 on CPU."
    )
    z_loss: float = Field(0.0, ge=0, description="Coefficient of the squared log-partition (PaLM uses 1e-4).")
    loss_chunk: int = Field(512, gt=0, description="Tokens of a row whose logits are held at once.")
    log_every: int = Field(10, gt=0, description="Steps between lines of metrics.jsonl.")


class EvaluationSettings(Schema):
    """Loss on held-out text."""

    every: int | None = Field(None, gt=0, description="Steps between evaluations; null: only at the end.")
    tokens: int = Field(65_536, gt=0, description="Held-out tokens read at most.")


class SampleSettings(Schema):
    """The text printed at the end of training."""

    prompt: str = Field("", description="What the sample continues.")
    tokens: int = Field(0, ge=0, description="Length of the sample; 0 prints none.")
    temperature: float = Field(0.8, ge=0, description="0 takes the likeliest token.")


class CheckpointSettings(Schema):
    """When to save, and what to keep."""

    every: int = Field(1000, gt=0, description="Steps between checkpoints; one is also saved at the end.")
    keep_last: int = Field(2, gt=0, description="Newest checkpoints kept.")
    keep_every: int | None = Field(None, gt=0, description="Also keep those at multiples of this; null: none.")
    asynchronous: bool = Field(True, description="Write in the background while training goes on.")


class MeshSettings(Schema):
    """Devices along each mesh axis; -1 takes all that the others leave."""

    slice: int = Field(1, description="Pod slices joined by the data-centre network.")
    data: int = Field(-1, description="Replicas of the parameters.")
    fsdp: int = Field(1, description="Shards of parameters and optimizer state; also splits the batch.")
    sequence: int = Field(1, description="Shards of the time axis.")
    tensor: int = Field(1, description="Shards of heads, hidden units and vocabulary.")
    expert: int = Field(1, description="Shards of experts; also splits the batch.")
    rules: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Mesh axes of a logical axis, instead of the default ([] replicates it)."
    )

    def sizes(self) -> dict[str, int]:
        return {name: value for name, value in self if name != "rules"}


class RunConfig(Schema):
    """Everything that determines a run."""

    name: str = Field(description="Name of the run.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_directory: str | None = Field(None, description="Where the run is kept; null: runs/NAME.")
    seed: int = Field(0, ge=0, description="Of initial parameters and data order.")
    model: ModelSettings = ModelSettings()
    data: DataSettings
    optimizer: OptimizerSettings = AdamWSettings()
    train: TrainSettings = TrainSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    sample: SampleSettings = SampleSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    mesh: MeshSettings = MeshSettings()

    @model_validator(mode="after")
    def _accumulation_divides(self):
        if self.data.batch_size % self.train.accumulation:
            raise ValueError(
                f"train.accumulation={self.train.accumulation} does not divide data.batch_size={self.data.batch_size}"
            )
        return self

    @property
    def directory(self) -> Path:
        return Path(self.run_directory or f"runs/{self.name}")

    @property
    def tokens_per_step(self) -> int:
        return self.data.batch_size * self.data.sequence_length


# A run may be continued with other values of these: they say where and how it runs, not what it computes.
OPERATIONAL = ("run_directory", "mesh.", "checkpoint.", "evaluation.", "sample.", "train.log_every", "data.prefetch")


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The config with `model.vocab_size` filled in from the tokenizer.

    Raises:
      UserError: if a given vocabulary is too small for the tokenizer.
    """
    given = config.model.vocab_size
    if given is None:
        vocab_size = -(-tokenizer.vocab_size // 64) * 64
        return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})
    if given < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={given} is smaller than the {config.data.tokenizer.kind} tokenizer's vocabulary of "
            f"{tokenizer.vocab_size}; set model.vocab_size to null or to at least {tokenizer.vocab_size}"
        )
    return config


def compute_dtype(setting: str, platform: str) -> jax.typing.DTypeLike:
    """Resolve `train.dtype` for a platform ("cpu", "gpu", "tpu")."""
    if setting == "auto":
        return jnp.float32 if platform == "cpu" else jnp.bfloat16
    return jnp.dtype(setting)


def check_batch(config: RunConfig, mesh_shape: Mapping[str, int], batch_axes: tuple[str, ...]) -> None:
    """Check that the mesh divides the micro-batch.

    Raises:
      UserError: naming the fields to change.
    """
    ways = 1
    for axis in batch_axes:
        ways *= mesh_shape[axis]
    rows = config.data.batch_size // config.train.accumulation
    if rows % ways:
        raise UserError(
            f"data.batch_size={config.data.batch_size} / train.accumulation={config.train.accumulation} = {rows} rows do not "
            f"divide over {' x '.join(f'mesh.{a}={mesh_shape[a]}' for a in batch_axes if mesh_shape[a] > 1)} = {ways} "
            f"shards of the batch; make the rows a multiple of {ways}"
        )
    if config.data.sequence_length % mesh_shape["sequence"]:
        raise UserError(
            f"mesh.sequence={mesh_shape['sequence']} does not divide data.sequence_length={config.data.sequence_length}; "
            f"make the length a multiple of {mesh_shape['sequence']}"
        )
