"""Sequence mixers by name. A mixer is `y, state = mixer(x, state=None, segment_ids=None)` for any number of tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jaxlm.layers.mixers.attention import Attention, AttentionSettings
from jaxlm.layers.mixers.gla import GLA, GLASettings
from jaxlm.layers.mixers.linear import LinearAttention, LinearSettings
from jaxlm.layers.mixers.retention import Retention, RetentionSettings
from jaxlm.schema import Schema

MixerSettings = Annotated[
    AttentionSettings | GLASettings | LinearSettings | RetentionSettings, Field(discriminator="kind")
]

# kind -> (settings, module)
MIXERS = {
    "attention": (AttentionSettings, Attention),
    "gla": (GLASettings, GLA),
    "linear": (LinearSettings, LinearAttention),
    "retention": (RetentionSettings, Retention),
}


def produces(settings: Schema) -> str | None:
    """Name of the value that a mixer with these settings makes for later blocks, if any."""
    return getattr(settings, "produces", None)


def consumes(settings: Schema) -> str | None:
    """Name of the value that it reads from an earlier block, if any."""
    return getattr(settings, "consumes", None)


def reads_only_shared(settings: Schema) -> bool:
    """Whether it sees other tokens only through the value it consumes (cross-attention, gated memory unit)."""
    return getattr(settings, "reads_only_shared", False)
