"""The language model: embed, blocks by pattern, norm, readout.

A block is a sequence mixer and a channel mixer on a residual stream. Blocks come in stages: a pattern of mixers, repeated.
The periods of a repeated stage are stacked and scanned; a stage that stands once is called block by block, and may make
values (keys and values, a memory) which the mixers of later stages read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxlm import params as params_lib
from jaxlm.layers.embeddings import Embedding
from jaxlm.layers.ffn import FFNS, FFNSettings, SwiGLUSettings
from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers import MIXERS, MixerSettings, consumes, produces, reads_only_shared
from jaxlm.layers.mixers.common import LayerContext
from jaxlm.layers.norms import NORMS
from jaxlm.parallel.context import constrain
from jaxlm.schema import Schema, did_you_mean

State = Any
Shared = dict[str, Any]

DEFAULT_PATTERN = ("gla", "gla", "gla", "attention")

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stage(Schema):
    """Consecutive blocks: a pattern of mixers and how often it repeats."""

    pattern: tuple[str, ...] = Field(
        min_length=1, description="Mixers of consecutive blocks: kinds, or names from model.mixers."
    )
    repeat: int = Field(1, gt=0, description="Times the pattern follows itself.")
    ffn: FFNSettings | None = Field(None, description="Channel mixer of the stage's blocks; null: model.ffn.")


class ModelSettings(Schema):
    """Shape of a language model."""

    vocab_size: int | None = Field(
        None, gt=0, description="Rows of the embedding; null: the tokenizer's vocabulary rounded up to a multiple of 64."
    )
    width: int = Field(512, gt=0, description="Channels of the residual stream.")
    depth: int = Field(8, gt=0, description="Number of blocks.")
    pattern: tuple[str, ...] | None = Field(
        DEFAULT_PATTERN,
        min_length=1,
        description="Mixers of consecutive blocks, repeated to the depth: kinds, or names from model.mixers.",
    )
    stages: tuple[Stage, ...] | None = Field(
        None,
        min_length=1,
        description="Patterns one after the other, instead of a repeated one (then null); their blocks sum to depth.",
    )
    mixers: dict[str, MixerSettings] = Field(
        default_factory=dict, description="Settings of the mixers that the pattern names; a kind without an entry has defaults."
    )
    ffn: FFNSettings = Field(SwiGLUSettings(), description="Channel mixer of every block.")
    norm: Literal["rms", "layer"] = Field("rms", description="Norm before every mixer and at the end; layer: with a bias.")
    norm_eps: float = Field(1e-6, gt=0, description="Epsilon of the block and final norms.")
    embedding_norm: bool = Field(False, description="Norm of the embedding before the first block (RWKV).")
    tied_embedding: bool = Field(True, description="Read out with the embedding table.")
    remat: Literal["none", "dots", "full"] = Field(
        "none", description="What the backward recomputes: nothing, all but matrix products, or every block."
    )

    @model_validator(mode="after")
    def _stages_fit(self):
        if (self.pattern is None) == (self.stages is None):
            both = "both given" if self.stages else "both null"
            raise ValueError(f"pattern and stages are {both}; give one and set the other to null")
        if self.stages is not None:
            blocks = sum(len(stage.pattern) * stage.repeat for stage in self.stages)
            if blocks != self.depth:
                raise ValueError(f"depth={self.depth} but the stages have {blocks} blocks; set depth to {blocks}")
        return self

    @model_validator(mode="after")
    def _known_mixers(self):
        names = self.layer_names()
        for name in names:
            if name not in self.mixers and name not in MIXERS:
                known = sorted({*MIXERS, *self.mixers})
                raise ValueError(f"pattern: unknown mixer {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
        unused = sorted(set(self.mixers) - set(names))
        if unused:
            raise ValueError(
                f"mixers: {', '.join(unused)} not used by the pattern {list(dict.fromkeys(names))}; remove or use it"
            )
        return self

    @model_validator(mode="after")
    def _consumers_have_producers(self):
        made: set[str] = set()
        for stage in self.layout():
            for name in stage.pattern:
                needed, value = consumes(self.mixer(name)), produces(self.mixer(name))
                if needed is not None and needed not in made:
                    raise ValueError(
                        f"pattern: {name!r} reads {needed!r}, which no earlier block makes; put a mixer with "
                        f"produces: {needed} before it"
                    )
                if value is None:
                    continue
                if stage.repeat > 1 or value in made:
                    raise ValueError(
                        f"pattern: {name!r} makes {value!r} more than once; one block makes it, in a stage of "
                        "model.stages with repeat: 1"
                    )
                made.add(value)
        return self

    def mixer(self, name: str) -> Schema:
        """Settings of the mixer that a pattern entry names."""
        return self.mixers[name] if name in self.mixers else MIXERS[name][0]()

    def layout(self) -> tuple[Stage, ...]:
        """The stages; of a pattern its whole periods, and what is left over."""
        if self.stages is not None:
            return self.stages
        periods, rest = divmod(self.depth, len(self.pattern))
        stages = (Stage(pattern=self.pattern, repeat=periods),) if periods else ()
        return (*stages, Stage(pattern=self.pattern[:rest])) if rest else stages

    def layer_names(self) -> tuple[str, ...]:
        """Pattern entry of every block, first to last."""
        return tuple(name for stage in self.layout() for name in stage.pattern * stage.repeat)

    def describe_layout(self) -> str:
        """The stages in words: `6 x (gla, gla, gla, attention)`."""
        stages = [(stage.repeat, ", ".join(stage.pattern)) for stage in self.layout()]
        return ", ".join(f"{repeat} x ({names})" if repeat > 1 else names for repeat, names in stages)

    def last_mixing_stage(self) -> int:
        """The last stage with a mixer that reads other tokens by itself, not through another mixer's values."""
        mixing = [not all(reads_only_shared(self.mixer(name)) for name in stage.pattern) for stage in self.layout()]
        return max(i for i, mixes in enumerate(mixing) if mixes)

    def has_auxiliary(self) -> bool:
        """Whether a mixer adds a loss of its own to training."""
        return any(hasattr(MIXERS[self.mixer(name).kind][1], "with_auxiliary") for name in self.layer_names())

    def sequence_flops(self, context: int) -> float:
        """Forward FLOPs per token of the sequence mathematics (what no parameter multiplies) at a context length."""
        return sum(self.mixer(name).sequence_flops(self.width, context) for name in self.layer_names())


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) unless the model has no channel mixers."""

    def __init__(self, settings: ModelSettings, name: str, ffn: FFNSettings, context: LayerContext, *, rngs: nnx.Rngs):
        mixer_settings = settings.mixer(name)
        self.produces, self.consumes = produces(mixer_settings), consumes(mixer_settings)
        norm = NORMS[settings.norm]
        self.mixer_norm = norm(settings.width, eps=settings.norm_eps)
        self.mixer = MIXERS[mixer_settings.kind][1](mixer_settings, context, rngs=rngs)
        make_ffn = FFNS[ffn.kind][1]
        self.ffn = None if make_ffn is None else make_ffn(ffn, context, rngs=rngs)
        self.ffn_norm = None if make_ffn is None else norm(settings.width, eps=settings.norm_eps)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: State | None,
        segment_ids: Int[Array, "B T"] | None,
        shared: Shared,
        only_last: bool = False,
    ) -> tuple[Float[Array, "B T D"], State, Any, Float[Array, ""]]:
        """The stream, the state (None without an incoming one), what the mixer made for others, its auxiliary loss.

        With `only_last` nobody wants the stream but of the last token: a mixer that can saves the others'.
        """
        produced, auxiliary = None, jnp.zeros((), jnp.float32)
        mixer_state = None if state is None else state["mixer"]
        normed = self.mixer_norm(x)
        if only_last and hasattr(self.mixer, "exchange_last") and state["ffn"] is None:
            y, mixer_state, produced = self.mixer.exchange_last(normed, mixer_state, segment_ids)
            x, segment_ids = x[:, -1:], None
        elif self.produces is not None or self.consumes is not None:
            consumed = None if self.consumes is None else shared[self.consumes]
            y, mixer_state, produced = self.mixer.exchange(normed, mixer_state, segment_ids, consumed)
        elif hasattr(self.mixer, "with_auxiliary"):
            y, mixer_state, auxiliary = self.mixer.with_auxiliary(normed, mixer_state, segment_ids)
        else:
            y, mixer_state = self.mixer(normed, mixer_state, segment_ids)
        x = constrain(x + y, "batch", "sequence", None)
        ffn_state = None
        if self.ffn is not None:
            y, ffn_state = self.ffn(self.ffn_norm(x), None if state is None else state["ffn"], segment_ids)
            x = constrain(x + y, "batch", "sequence", None)
        # Without an incoming state nobody wants the outgoing one; a scan would keep it for every layer.
        new_state = None if state is None else {"mixer": mixer_state, "ffn": ffn_state}
        return x, new_state, produced, auxiliary

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        ffn = None if self.ffn is None else self.ffn.init_state(batch, dtype)
        return {"mixer": self.mixer.init_state(batch, length, dtype), "ffn": ffn}


class Period(nnx.Module):
    """One run through a stage's pattern."""

    def __init__(self, settings: ModelSettings, stage: Stage, first: Int[Array, ""], *, rngs: nnx.Rngs):
        contexts = [LayerContext(settings.width, settings.depth, first + i) for i in range(len(stage.pattern))]
        ffn = stage.ffn or settings.ffn
        self.blocks = nnx.List(
            [Block(settings, name, ffn, c, rngs=rngs) for name, c in zip(stage.pattern, contexts, strict=True)]
        )
        self.remat = settings.remat
        self.scanned = stage.repeat > 1

    def __call__(
        self,
        x: Float[Array, "B T D"],
        states: tuple | None,
        segment_ids: Int[Array, "B T"] | None,
        shared: Shared,
        only_last: bool = False,
    ) -> tuple[Float[Array, "B T D"], tuple | None, Shared, Float[Array, ""]]:
        call = Block.__call__
        if self.remat != "none":
            # A scan's loop boundary already keeps the recomputation apart from the forward.
            call = jax.checkpoint(call, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scanned)
        new_states, total = [], jnp.zeros((), jnp.float32)
        for i, block in enumerate(self.blocks):
            if only_last and i == len(self.blocks) - 1:
                call = partial(Block.__call__, only_last=True)
            x, state, produced, auxiliary = call(block, x, None if states is None else states[i], segment_ids, shared)
            total = total + auxiliary
            new_states.append(state)
            if block.produces is not None:
                shared = {**shared, block.produces: produced}
        return x, None if states is None else tuple(new_states), shared, total

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> tuple:
        return tuple(block.init_state(batch, length, dtype) for block in self.blocks)


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
        norm = NORMS[settings.norm]
        self.embedding = Embedding(settings.vocab_size, settings.width, rngs=rngs)
        self.embedding_norm = norm(settings.width, eps=settings.norm_eps) if settings.embedding_norm else None
        self.stages = nnx.List(self._make_stages(settings, rngs))
        self.norm = norm(settings.width, eps=settings.norm_eps)
        self.readout = None if settings.tied_embedding else self._make_readout(settings, rngs)

    @staticmethod
    def _make_stages(settings: ModelSettings, rngs: nnx.Rngs) -> Iterator[Period]:
        first = 0
        for stage in settings.layout():
            if stage.repeat == 1:
                yield Period(settings, stage, jnp.asarray(first), rngs=rngs)
            else:
                yield params_lib.stack(
                    lambda key, first, stage=stage: Period(settings, stage, first, rngs=nnx.Rngs(key)),
                    jax.random.split(rngs.params(), stage.repeat),
                    first + jnp.arange(stage.repeat) * len(stage.pattern),
                )
            first += stage.repeat * len(stage.pattern)

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
        hidden, state, _ = self.hidden_with_auxiliary(tokens, state, segment_ids)
        return hidden, state

    def hidden_with_auxiliary(
        self, tokens: Int[Array, "B T"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State | None, Float[Array, ""]]:
        """As `hidden`, and the sum of the mixers' auxiliary losses (a router's balance), coefficients applied."""
        return self._run(tokens, state, segment_ids, last=None)

    def prefill(
        self, tokens: Int[Array, "B T"], state: State, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B vocab"], State]:
        """Next-token logits after the last token alone, and the state.

        Blocks behind the last one that looks back at other tokens by itself (a cross-decoder: YOCO, arXiv 2405.05254;
        SambaY, 2507.06607) run for the last token only, so that reading a prompt costs half of them or less.
        """
        hidden, state, _ = self._run(tokens, state, segment_ids, last=self.settings.last_mixing_stage())
        return self.logits(hidden[:, -1:])[:, 0], state

    def _run(self, tokens, state, segment_ids, *, last: int | None):
        x = constrain(self.embedding(tokens, self.dtype), "batch", "sequence", None)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        total = jnp.zeros((), jnp.float32)
        shared: Shared = {}
        new_states = []
        for i, (stage, period) in enumerate(zip(self.settings.layout(), self.stages, strict=True)):
            states = None if state is None else state[i]
            if stage.repeat == 1:
                x, states, shared, auxiliary = period(x, states, segment_ids, shared, only_last=i == last)
            else:

                def body(carry, xs, segment_ids=segment_ids, shared=shared):
                    x, total = carry
                    period, states = xs
                    x, states, _, auxiliary = period(x, states, segment_ids, shared)
                    return (x, total + auxiliary), states

                (x, auxiliary), states = jax.lax.scan(body, (x, jnp.zeros((), jnp.float32)), (period, states))
            total = total + auxiliary
            new_states.append(states)
            if i == last:
                x = x[:, -1:]
                segment_ids = None if segment_ids is None else segment_ids[:, -1:]
        return self.norm(x), None if state is None else tuple(new_states), total

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

        def one(stage: Stage, period: Period):
            state = period.init_state(batch, length, self.dtype)
            if stage.repeat == 1:
                return state
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (stage.repeat, *x.shape)), state)

        return tuple(one(stage, period) for stage, period in zip(self.settings.layout(), self.stages, strict=True))


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
