"""Sequence mixers by name. A mixer is `y, state = mixer(x, state=None, segment_ids=None)` for any number of tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jaxlm.layers.mixers.attention import Attention, AttentionSettings
from jaxlm.layers.mixers.cross import (
    CrossAttention,
    CrossAttentionSettings,
    GatedMemoryUnit,
    GMUSettings,
    KeyValue,
    KeyValueSettings,
)
from jaxlm.layers.mixers.delta import (
    KDA,
    DeltaNet,
    DeltaNetSettings,
    GatedDeltaNet,
    GatedDeltaNetSettings,
    KDASettings,
)
from jaxlm.layers.mixers.gla import GLA, GLASettings
from jaxlm.layers.mixers.hgrn import HGRN, HGRNSettings
from jaxlm.layers.mixers.hgrn2 import HGRN2, HGRN2Settings
from jaxlm.layers.mixers.lightnet import LightNet, LightNetSettings
from jaxlm.layers.mixers.linear import LinearAttention, LinearSettings
from jaxlm.layers.mixers.log_linear import LogLinearAttention, LogLinearSettings
from jaxlm.layers.mixers.mamba import Mamba, MambaSettings
from jaxlm.layers.mixers.mamba2 import Mamba2, Mamba2Settings
from jaxlm.layers.mixers.minimal import MinGRU, MinGRUSettings, MinLSTM, MinLSTMSettings
from jaxlm.layers.mixers.miras import MemoraSettings, Miras, MonetaSettings, YaadSettings
from jaxlm.layers.mixers.mla import MLASettings, MultiHeadLatentAttention
from jaxlm.layers.mixers.mom import MoM, MoMSettings
from jaxlm.layers.mixers.retention import Retention, RetentionSettings
from jaxlm.layers.mixers.rwkv7 import RWKV7, RWKV7Settings
from jaxlm.layers.mixers.s4d import S4D, S4DSettings
from jaxlm.layers.mixers.ttt import TTTLinear, TTTLinearSettings
from jaxlm.schema import KnownKind, Schema

MixerSettings = Annotated[
    AttentionSettings
    | CrossAttentionSettings
    | GMUSettings
    | KeyValueSettings
    | MLASettings
    | MoMSettings
    | GLASettings
    | LinearSettings
    | HGRNSettings
    | MambaSettings
    | MinGRUSettings
    | MinLSTMSettings
    | S4DSettings
    | DeltaNetSettings
    | GatedDeltaNetSettings
    | HGRN2Settings
    | KDASettings
    | LightNetSettings
    | Mamba2Settings
    | RWKV7Settings
    | LogLinearSettings
    | TTTLinearSettings
    | MonetaSettings
    | YaadSettings
    | MemoraSettings
    | RetentionSettings,
    Field(discriminator="kind"),
    KnownKind(),
]

# kind -> (settings, module)
MIXERS = {
    "attention": (AttentionSettings, Attention),
    "cross_attention": (CrossAttentionSettings, CrossAttention),
    "deltanet": (DeltaNetSettings, DeltaNet),
    "gated_deltanet": (GatedDeltaNetSettings, GatedDeltaNet),
    "gla": (GLASettings, GLA),
    "gmu": (GMUSettings, GatedMemoryUnit),
    "key_value": (KeyValueSettings, KeyValue),
    "hgrn": (HGRNSettings, HGRN),
    "hgrn2": (HGRN2Settings, HGRN2),
    "kda": (KDASettings, KDA),
    "lightnet": (LightNetSettings, LightNet),
    "linear": (LinearSettings, LinearAttention),
    "mamba": (MambaSettings, Mamba),
    "mamba2": (Mamba2Settings, Mamba2),
    "mingru": (MinGRUSettings, MinGRU),
    "minlstm": (MinLSTMSettings, MinLSTM),
    "mla": (MLASettings, MultiHeadLatentAttention),
    "mom": (MoMSettings, MoM),
    "retention": (RetentionSettings, Retention),
    "rwkv7": (RWKV7Settings, RWKV7),
    "s4d": (S4DSettings, S4D),
    "log_linear": (LogLinearSettings, LogLinearAttention),
    "memora": (MemoraSettings, Miras),
    "moneta": (MonetaSettings, Miras),
    "ttt_linear": (TTTLinearSettings, TTTLinear),
    "yaad": (YaadSettings, Miras),
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
