"""Sequence mixers by name. A mixer is `y, state = mixer(x, state=None, segment_ids=None)` for any number of tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jaxlm.layers.mixers.attention import Attention, AttentionSettings
from jaxlm.layers.mixers.gla import GLA, GLASettings
from jaxlm.layers.mixers.linear import LinearAttention, LinearSettings
from jaxlm.layers.mixers.retention import Retention, RetentionSettings

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
