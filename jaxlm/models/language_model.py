"""The language model: embed, blocks by pattern, norm, readout.

A block is a sequence mixer and a channel mixer on a residual stream. The pattern of mixers repeats to the depth: whole
periods are stacked and scanned, what is left over stands behind them as a tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxlm import params as params_lib
from jaxlm.layers.embeddings import Embedding
from jaxlm.layers.ffn import SwiGLU, SwiGLUSettings
from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers import MIXERS, MixerSettings
from jaxlm.layers.mixers.common import LayerContext
from jaxlm.layers.norms import RMSNorm
from jaxlm.parallel.mesh import constrain
from jaxlm.schema import Schema, did_you_mean

State = Any

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class ModelSettings(Schema):
    """Shape of a language model."""

    vocab_size: int | None = Field(
        None, gt=0, description="Rows of the embedding; null: the tokenizer's vocabulary rounded up to a multiple of 64."
    )
    width: int = Field(512, gt=0, description="Channels of the residual stream.")
    depth: int = Field(8, gt=0, description="Number of blocks.")
    pattern: tuple[str, ...] = Field(
        ("gla", "gla", "gla", "attention"),
        min_length=1,
        description="Mixers of consecutive blocks, repeated to the depth: kinds, or names from model.mixers.",
    )
    mixers: dict[str, MixerSettings] = Field(
        default_factory=dict, description="Settings of the mixers that the pattern names; a kind without an entry has defaults."
    )
    ffn: SwiGLUSettings = Field(SwiGLUSettings(), description="Channel mixer of every block.")
    tied_embedding: bool = Field(True, description="Read out with the embedding table.")
    norm_eps: float = Field(1e-6, gt=0, description="Epsilon of the block and final norms.")
    remat: Literal["none", "dots", "full"] = Field(
        "none", description="What the backward recomputes: nothing, all but matrix products, or every block."
    )

    @model_validator(mode="after")
    def _known_mixers(self):
        for name in self.pattern:
            if name not in self.mixers and name not in MIXERS:
                known = sorted({*MIXERS, *self.mixers})
                raise ValueError(f"pattern: unknown mixer {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
        unused = sorted(set(self.mixers) - set(self.pattern))
        if unused:
            raise ValueError(f"mixers: {', '.join(unused)} not used by the pattern {list(self.pattern)}; remove or use it")
        return self

    def mixer(self, name: str) -> Schema:
        """Settings of the mixer that a pattern entry names."""
        return self.mixers[name] if name in self.mixers else MIXERS[name][0]()

    @property
    def periods(self) -> int:
        return self.depth // len(self.pattern)

    @property
    def tail(self) -> tuple[str, ...]:
        return self.pattern[: self.depth % len(self.pattern)]

    def layer_names(self) -> tuple[str, ...]:
        """Pattern entry of every block, first to last."""
        return self.pattern * self.periods + self.tail

    def sequence_flops(self, context: int) -> float:
        """Forward FLOPs per token of the sequence mathematics (what no parameter multiplies) at a context length."""
        return sum(self.mixer(name).sequence_flops(self.width, context) for name in self.layer_names())


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, settings: ModelSettings, name: str, context: LayerContext, *, rngs: nnx.Rngs):
        mixer_settings = settings.mixer(name)
        _, mixer = MIXERS[mixer_settings.kind]
        self.mixer_norm = RMSNorm(settings.width, eps=settings.norm_eps)
        self.mixer = mixer(mixer_settings, context, rngs=rngs)
        self.ffn_norm = RMSNorm(settings.width, eps=settings.norm_eps)
        self.ffn = SwiGLU(settings.ffn, settings.width, output_gain=context.output_gain, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None, segment_ids: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], State]:
        y, new_state = self.mixer(self.mixer_norm(x), state, segment_ids)
        x = constrain(x + y, "batch", "sequence", None)
        x = constrain(x + self.ffn(self.ffn_norm(x)), "batch", "sequence", None)
        # Without an incoming state nobody wants the outgoing one; a scan would keep it for every layer.
        return x, None if state is None else new_state


class Period(nnx.Module):
    """One run through the pattern."""

    def __init__(
        self, settings: ModelSettings, names: tuple[str, ...], first: Int[Array, ""], *, scanned: bool, rngs: nnx.Rngs
    ):
        contexts = [LayerContext(settings.width, settings.depth, first + i) for i in range(len(names))]
        self.blocks = nnx.List([Block(settings, n, c, rngs=rngs) for n, c in zip(names, contexts, strict=True)])
        self.remat = settings.remat
        self.scanned = scanned

    def __call__(self, x: Float[Array, "B T D"], states: tuple | None, segment_ids: Int[Array, "B T"] | None):
        call = Block.__call__
        if self.remat != "none":
            # A scan's loop boundary already keeps the recomputation apart from the forward.
            call = jax.checkpoint(call, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scanned)
        new_states = []
        for i, block in enumerate(self.blocks):
            x, state = call(block, x, None if states is None else states[i], segment_ids)
            new_states.append(state)
        return x, None if states is None else tuple(new_states)


class LanguageModel(nnx.Module):
    """A decoder-only language model over any pattern of mixers.

    One call serves training, prefill and decode: `logits, state = model(tokens, state=None, segment_ids=None)` for any
    number of tokens. Without a state the tokens start a document and no state is returned; with one (from `init_state`
    or a previous call) they continue it.

    Args:
      settings: the shape; `vocab_size` must be set.
      dtype: of activations and matrix products; parameters are float32 and states are as each mixer says.

    Example:
      >>> model = LanguageModel(ModelSettings(vocab_size=320, width=64, depth=4), rngs=nnx.Rngs(0))
      >>> logits, state = model(tokens[:, :-1], model.init_state(batch=1))
      >>> logits, state = model(tokens[:, -1:], state)
    """

    def __init__(self, settings: ModelSettings, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32):
        if settings.vocab_size is None:
            raise ValueError("model.vocab_size: a model needs it; configs may leave it to the tokenizer, code may not")
        self.settings = settings
        self.dtype = jnp.dtype(dtype)
        self.embedding = Embedding(settings.vocab_size, settings.width, rngs=rngs)
        self.stack = self._make_stack(settings, rngs) if settings.periods else None
        self.tail = None if not settings.tail else self._make_tail(settings, rngs)
        self.norm = RMSNorm(settings.width, eps=settings.norm_eps)
        self.readout = None if settings.tied_embedding else self._make_readout(settings, rngs)

    @staticmethod
    def _make_stack(settings: ModelSettings, rngs: nnx.Rngs) -> Period:
        return params_lib.stack(
            lambda key, first: Period(settings, settings.pattern, first, scanned=True, rngs=nnx.Rngs(key)),
            jax.random.split(rngs.params(), settings.periods),
            jnp.arange(settings.periods) * len(settings.pattern),
        )

    @staticmethod
    def _make_tail(settings: ModelSettings, rngs: nnx.Rngs) -> Period:
        first = jnp.asarray(settings.periods * len(settings.pattern))
        return Period(settings, settings.tail, first, scanned=False, rngs=rngs)

    @staticmethod
    def _make_readout(settings: ModelSettings, rngs: nnx.Rngs) -> Dense:
        # Standard deviation 0.02, as a tied table has.
        return Dense(
            settings.width, settings.vocab_size, axes=("embed", "vocab"), role="output", gain=0.02 * settings.width**0.5,
            rngs=rngs,
        )  # fmt: skip

    def hidden(
        self, tokens: Int[Array, "B T"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State | None]:
        """Final normed hidden states: what `readout_kernel` turns into logits."""
        x = constrain(self.embedding(tokens, self.dtype), "batch", "sequence", None)
        state = {} if state is None else state
        new_state = {}
        if self.stack is not None:

            def body(x, xs):
                period, states = xs
                return period(x, states, segment_ids)

            x, new_state["stack"] = jax.lax.scan(body, x, (self.stack, state.get("stack")))
        if self.tail is not None:
            x, new_state["tail"] = self.tail(x, state.get("tail"), segment_ids)
        return self.norm(x), new_state if state else None

    def readout_kernel(self) -> Float[Array, "D vocab"]:
        """Matrix from hidden states to logits, float32."""
        return self.embedding.table[...].T if self.readout is None else self.readout.kernel[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Next-token logits of hidden states, float32."""
        kernel = self.readout_kernel().astype(hidden.dtype)
        return constrain(jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32), "batch", "sequence", "vocab")

    def __call__(
        self, tokens: Int[Array, "B T"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T vocab"], State | None]:
        """Next-token logits in float32, and the state after the last token (None if none was passed in).

        Args:
          tokens: ids; ids outside the vocabulary are the caller's error (jax clamps gathers silently).
          state: from `init_state` or a previous call; the tokens continue its document.
          segment_ids: documents of a packed row; states and convolutions reset where the id changes.
        """
        x, state = self.hidden(tokens, state, segment_ids)
        return self.logits(x), state

    def init_state(self, batch: int, length: int = 2048) -> State:
        """State before the first token: zeros of fixed shape.

        Args:
          batch: number of rows.
          length: tokens that attention layers without a window can hold, prompt and continuation together; recurrent and
            windowed layers do not depend on it.
        """

        def one(period: Period):
            return tuple(block.mixer.init_state(batch, length, self.dtype) for block in period.blocks)

        state = {}
        if self.stack is not None:
            n = self.settings.periods
            shapes = one(self.stack)
            state["stack"] = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), shapes)
        if self.tail is not None:
            state["tail"] = one(self.tail)
        return state


def abstract_model(settings: ModelSettings, dtype: jax.typing.DTypeLike = jnp.float32) -> LanguageModel:
    """The model with ShapeDtypeStructs for parameters: structure, metadata and counts without memory or compute."""
    return nnx.eval_shape(lambda: LanguageModel(settings, rngs=nnx.Rngs(0), dtype=dtype))


def init_params(settings: ModelSettings, seed: int, out_shardings: Mapping | None = None) -> dict:
    """Float32 initial parameters as a nested dict, made where they live: each device computes only its shards."""

    def init():
        return params_lib.split(LanguageModel(settings, rngs=nnx.Rngs(seed)))[1]

    # Runs once: LLVM's optimisations of so many random number generators cost ten times what they save.
    shardings = jax.tree.leaves(out_shardings)
    platform = next(iter(shardings[0].device_set)).platform if shardings else jax.default_backend()
    options = {"xla_backend_optimization_level": 0} if platform == "cpu" else None
    return jax.jit(init, out_shardings=out_shardings, compiler_options=options)()


def train_flops_per_token(settings: ModelSettings, infos: dict, context: int) -> float:
    """Model FLOPs of one training step per token: forward plus twice that for the backward, recomputation not counted.

    Convention: 2 FLOPs per multiply-add; 2 per token and entry of every matrix or convolution (the embedding lookup is
    free, the readout counts, tied or not); causal attention counts the half it needs; a recurrence counts the state update
    and read of its recurrent form (4KV a head for linear attention), whatever the chunked form spends beyond that.
    """
    matrices = params_lib.count(infos, frozenset({"hidden", "output", "convolution"}))
    if settings.tied_embedding:
        matrices += settings.vocab_size * settings.width
    return 3 * (2 * matrices + settings.sequence_flops(context))
