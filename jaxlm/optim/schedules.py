"""Learning-rate schedules by name."""

from __future__ import annotations

from typing import Annotated, Literal

import jax.numpy as jnp
import optax
from pydantic import Field

from jaxlm.schema import KnownKind, Schema, UserError


class ConstantSchedule(Schema):
    """Warm up linearly, then stay."""

    kind: Literal["constant"] = "constant"
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")


class CosineSchedule(Schema):
    """Warm up linearly, then fall to `final` of the peak along half a cosine by the last step."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    final: float = Field(0.1, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")


class WSDSchedule(Schema):
    """Warm up, stay, then decay over the last steps (MiniCPM, arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    decay_steps: int | None = Field(None, gt=0, description="Steps of decay at the end; null: a fifth of the run.")
    decay: Literal["linear", "cosine", "one_minus_sqrt"] = Field("linear", description="Shape of the decay.")
    final: float = Field(0.0, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")


ScheduleSettings = Annotated[ConstantSchedule | CosineSchedule | WSDSchedule, Field(discriminator="kind"), KnownKind()]

_DECAY_SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + jnp.cos(jnp.pi * x)) / 2,
    "one_minus_sqrt": lambda x: 1 - jnp.sqrt(x),
}


def make_schedule(settings: ScheduleSettings, peak: float, steps: int) -> optax.Schedule:
    """A function from the step (int32, from 0) to the learning rate (float32).

    The warm-up's step t has rate peak (t + 1) / warmup_steps, so that no step is wasted at zero.

    Raises:
      UserError: if the stages are longer than the run.
    """
    warmup = settings.warmup_steps
    if warmup > steps:
        raise UserError(
            f"optimizer.schedule.warmup_steps={warmup} is longer than train.steps={steps}; shorten the warm-up or train longer"
        )
    if isinstance(settings, ConstantSchedule):
        after, start = (lambda x: jnp.ones_like(x)), steps
        decay_steps, final = 1, 1.0
    elif isinstance(settings, CosineSchedule):
        after, start, final = _DECAY_SHAPES["cosine"], warmup, settings.final
        decay_steps = max(steps - warmup, 1)
    else:
        decay_steps = settings.decay_steps or max(steps // 5, 1)
        if warmup + decay_steps > steps:
            raise UserError(
                f"optimizer.schedule: warmup_steps={warmup} + decay_steps={decay_steps} is longer than train.steps={steps}; "
                "shorten a stage or train longer"
            )
        after, start, final = _DECAY_SHAPES[settings.decay], steps - decay_steps, settings.final

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum((step + 1) / max(warmup, 1), 1.0)
        progress = jnp.minimum(jnp.maximum(step - start, 0.0) / decay_steps, 1.0)
        return peak * jnp.where(step < warmup, rising, final + (1 - final) * after(progress))

    return schedule
