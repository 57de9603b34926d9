"""Optimizers by name, built for a model's parameter metadata."""

from __future__ import annotations

from typing import Annotated, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon
from pydantic import Field

from jaxlm.optim.schedules import CosineSchedule, ScheduleSettings
from jaxlm.params import DECAYED_ROLES, ParamInfo, map_info
from jaxlm.schema import KnownKind, Schema


class _OptimizerSettings(Schema):
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    schedule: ScheduleSettings = Field(CosineSchedule(), description="Learning rate over the run.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled decay of matrices, multiplied by the learning rate.")
    clip: float | None = Field(1.0, gt=0, description="Global norm that gradients are scaled down to; null: never.")


class AdamWSettings(_OptimizerSettings):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    b1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    b2: float = Field(0.95, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")


class LionSettings(_OptimizerSettings):
    """Lion (Chen et al. 2023, arXiv 2302.06675). Wants 3 to 10 times less learning rate and more decay than AdamW."""

    kind: Literal["lion"] = "lion"
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(1.0, ge=0, description="Decoupled decay of matrices, multiplied by the learning rate.")
    b1: float = Field(0.9, ge=0, lt=1, description="Interpolation between momentum and gradient under the sign.")
    b2: float = Field(0.99, ge=0, lt=1, description="Decay of the momentum.")


class MuonSettings(_OptimizerSettings):
    """Muon (Jordan 2024) for hidden matrices, AdamW for the rest.

    Muon's update is scaled to a root mean square of 0.2 (Liu et al. 2025, arXiv 2502.16982), so that both halves share
    AdamW's learning rate and weight decay.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of Muon's momentum (Nesterov).")
    b1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay, for all but hidden matrices.")
    b2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay, for all but hidden matrices.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")


OptimizerSettings = Annotated[AdamWSettings | LionSettings | MuonSettings, Field(discriminator="kind"), KnownKind()]

MUON_UPDATE_RMS = 0.2


def make_optimizer(settings: OptimizerSettings, schedule: optax.Schedule, infos: dict) -> optax.GradientTransformation:
    """The optax transform for a model whose parameters are described by `infos`.

    Only matrices are decayed, constants are not updated, and Muon treats the axis of stacked layers as a batch axis.
    Clipping is not part of it: the training step clips, because it reports the norm from before.
    """

    def finish(direction: optax.GradientTransformation, weight_decay: float) -> optax.GradientTransformation:
        return optax.chain(
            direction, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(schedule)
        )

    if isinstance(settings, LionSettings):
        direction = optax.scale_by_lion(settings.b1, settings.b2)
    else:
        direction = optax.scale_by_adam(settings.b1, settings.b2, settings.eps)
    transforms = {
        "matrix": finish(direction, settings.weight_decay),
        "vector": finish(direction, 0.0),
        "constant": optax.set_to_zero(),
    }
    if isinstance(settings, MuonSettings):
        transforms["hidden"] = finish(_muon_direction(settings.momentum), settings.weight_decay)

    def label(info: ParamInfo) -> str:
        if info.role in transforms:
            return info.role
        return "matrix" if info.role in DECAYED_ROLES else "vector"

    return optax.partition(transforms, map_info(label, infos))


def _muon_direction(momentum: float) -> optax.GradientTransformation:
    # optax's default rule (two-dimensional leaves, first axis reduced) mistakes stacked layers for part of the matrix: say
    # that the last two axes are the matrix and all before them a batch.
    dimensions = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    orthogonalize = scale_by_muon(
        beta=momentum, weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: dimensions, tree)
    )

    def to_rms(update: jax.Array) -> jax.Array:
        # An m x n matrix with unit singular values has a root mean square of 1 / sqrt(max(m, n)).
        return update * (MUON_UPDATE_RMS * max(update.shape[-2:]) ** 0.5)

    return optax.chain(orthogonalize, optax.stateless(lambda updates, _: jax.tree.map(to_rms, updates)))
