"""Mixture of memories: a router sends every token to a few of several linear-recurrent states (MoM, arXiv 2502.13685)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxlm.layers.convolution import ShortConvolution
from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import ChunkSize, HeadOutput, LayerContext, State, head_size, recurrent_flops
from jaxlm.layers.mixers.delta import l2_normalise
from jaxlm.layers.mixers.hgrn import forget_gate
from jaxlm.layers.mixers.log_linear import LEVEL_BIAS, check_length
from jaxlm.layers.mixers.mamba2 import dt_bias
from jaxlm.layers.mixers.minimal import MinGRU, MinLSTM
from jaxlm.layers.mixers.mom_memories import DELTA_RULES, DIAGONAL, read_memories
from jaxlm.layers.mixers.retention import head_log_decay
from jaxlm.layers.mixers.rwkv7 import DECAY_BOUND, initial_channels, initial_mix, token_shift
from jaxlm.layers.mixers.s4d import S4DFilter, S4DSettings
from jaxlm.ops.log_linear import levels_for
from jaxlm.ops.logsumexp import running_logsumexp
from jaxlm.ops.segments import counts_in_runs, resets, run_index
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema, UserError

# The log decay's projection: one number a head, or one a key channel through a low rank.
SCALAR_GATES = ("simple_gla", "mamba2", "gated_deltanet", "log_linear")
VECTOR_GATES = ("gla", "kda")
# Decays of a rate and a step size.
STEPS = ("mamba2", "gated_deltanet", "kda", "log_linear")
# Decays that do not depend on the data, by the name that `head_log_decay` has for them.
FIXED = {"retention": "retnet", "lightning": "lightning"}
# Rules without queries and keys.
KEYLESS = (*DIAGONAL, "s4d")
MINIMAL = {"mingru": MinGRU, "minlstm": MinLSTM}
# Of a state channel, by rule.
GATES = {"hgrn": ("forget",), **{rule: mixer.gates for rule, mixer in MINIMAL.items()}}
# LightNet's logit of a token that a memory does not get: beside any other its weight is exactly 0, and unlike minus infinity
# it has differences that are numbers, so that gradients are, too.
NO_LOGIT = -1e30
# RWKV-7's inputs that see the token before.
SHIFTED = ("r", "w", "k", "v", "a")


class MoMSettings(Schema):
    """Linear attention or a delta rule on several states, of which a token reads and writes a few."""

    kind: Literal["mom"] = "mom"
    rule: Literal[
        "linear", "retention", "lightning", "simple_gla", "gla", "hgrn2", "lightnet", "mamba2",
        "deltanet", "gated_deltanet", "kda", "rwkv7", "hgrn", "mingru", "minlstm", "mamba", "s4d",
        "log_linear",
    ] = Field(
        "gated_deltanet",
        description="Recurrence of a memory. Decay: none in linear and deltanet; fixed in retention and lightning; a gate a "
        "head in simple_gla, mamba2, gated_deltanet and log_linear; a gate a key channel in gla, hgrn2, kda and rwkv7; of a "
        "running sum in lightnet. States of value channels alone, without keys, in hgrn, mingru and minlstm; of value channels "
        "that keep as many numbers as a head has key channels in mamba, and in s4d, whose decay does not depend on the data; "
        "a state a level in log_linear.",
    )  # fmt: skip
    gates: Literal["head", "channel"] = Field(
        "head",
        description="Write strength of kda: 'head' one a head; 'channel' an erase gate a key channel and a write gate a value "
        "channel (Gated DeltaNet-2, arXiv 2605.22791).",
    )
    negative_eigenvalues: bool = Field(
        False,
        description="Write strengths of deltanet, gated_deltanet and kda (gates=channel: erase gates) in (0, 2): transitions "
        "with eigenvalues in (-1, 1) (arXiv 2411.12537).",
    )
    memories: int = Field(4, gt=0, description="Number of memories that the router chooses from.")
    top_k: int = Field(2, gt=0, description="Memories a token goes to.")
    shared: bool = Field(True, description="One more memory, to which all tokens go.")
    heads: int = Field(4, gt=0, description="Number of heads.")
    expand_k: float = Field(
        1.0, gt=0, description="Total key channels as a multiple of the model width; hgrn, mingru and minlstm have none."
    )
    expand_v: float = Field(1.0, gt=0, description="Total value channels as a multiple of the model width.")
    gate_rank: int = Field(16, gt=0, description="Rank of the projection of a gate a key channel, and of mamba's step.")
    convolution: int = Field(
        4,
        ge=0,
        description="Width of a short convolution on q, k and v; 0 for none. The k of hgrn2 and lightnet, which sets their "
        "decay, has none, nor have the gates of hgrn, mingru and minlstm, nor rwkv7, which has a token shift.",
    )
    max_length: int = Field(
        2048, gt=0, description="Most tokens of a row of log_linear: sets the number of its levels, ceil(log2) + 1."
    )
    output_gate: bool = Field(True, description="Multiply the normed output by swish of a projection.")
    balance: float = Field(0.01, ge=0, description="Coefficient of the auxiliary loss that spreads tokens over memories.")
    chunk_size: ChunkSize = 64

    @model_validator(mode="after")
    def _enough_memories(self):
        if self.top_k > self.memories:
            raise ValueError(f"top_k={self.top_k} is more than memories={self.memories}; lower it or add memories")
        return self

    @model_validator(mode="after")
    def _gates_of_kda(self):
        if self.gates == "channel" and self.rule != "kda":
            raise ValueError(f"gates=channel goes with rule=kda, not with rule={self.rule}")
        return self

    @model_validator(mode="after")
    def _eigenvalues_of_delta_rules(self):
        if self.negative_eigenvalues and self.rule not in DELTA_RULES:
            raise ValueError(f"negative_eigenvalues goes with rule={', '.join(DELTA_RULES)}, not with rule={self.rule}")
        return self

    @model_validator(mode="after")
    def _keys_of_those_that_have_them(self):
        if self.expand_k != 1 and self.rule in DIAGONAL:
            raise ValueError(f"expand_k={self.expand_k:g}: rule={self.rule} has no key channels; leave it at 1")
        return self

    @property
    def op(self) -> str:
        if self.rule == "rwkv7":
            return "dplr_delta_rule"
        if self.rule in (*DIAGONAL, "mamba", "s4d"):
            return "diagonal_recurrence"
        if self.rule == "log_linear":
            return "log_linear_attention"
        return "delta_rule" if self.rule in DELTA_RULES else "linear_attention"

    def sizes(self, width: int) -> tuple[int, int]:
        keys = head_size(width * self.expand_k, self.heads, "mom.expand_k")
        if self.rule == "s4d" and keys % 2:
            raise UserError(f"mom.expand_k: rule=s4d has {keys} states a channel, which must be even, being conjugate pairs")
        return keys, head_size(width * self.expand_v, self.heads, "mom.expand_v")

    def sequence_flops(self, width: int, context: int) -> float:
        keys, values = self.sizes(width)
        if self.op == "diagonal_recurrence":
            # As the mixers of these names count.
            a_channel = {"mamba": 6.0 * keys, "s4d": 5.5 * keys}.get(self.rule, 2.0)
            return (self.top_k + self.shared) * a_channel * self.heads * values
        if self.rule == "log_linear":
            # A level read costs as much as a write.
            return (self.top_k + self.shared) * (levels_for(context) + 1) / 2 * recurrent_flops(self.heads, keys, values)
        # A delta rule also reads the state by the key, 2KV more; RWKV-7 by a, and writes by b.
        more = {"dplr_delta_rule": 2.0, "delta_rule": 1.5, "linear_attention": 1.0}[self.op]
        return (self.top_k + self.shared) * more * recurrent_flops(self.heads, keys, values)


class _Stack(nnx.Module):
    """`Dense` for every memory: x W_r for all r, or x_r W_r where x has a row a memory already."""

    def __init__(
        self,
        memories: int,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, ...],
        *,
        gain: float = 1.0,
        rngs: nnx.Rngs,
    ):
        # As `Dense` starts.
        std = gain / (in_features**0.5 * 0.87962566103423978)
        kernel = std * jax.random.truncated_normal(rngs.params(), -2, 2, (memories, in_features, out_features))
        self.kernel = param(kernel, (None, *axes), "hidden")

    def __call__(self, x: Float[Array, "B T D"] | Float[Array, "B T R D"]) -> Float[Array, "B T R E"]:
        equation = "btd,rde->btre" if x.ndim == 3 else "btrd,rde->btre"
        return jnp.einsum(equation, x, self.kernel[...].astype(x.dtype))


class _Decay(nnx.Module):
    """The log decay of every token in every memory, float32 [B, T, R, G], G one a head or one a key channel; and the step
    size that it is made of, if it is."""

    def __init__(self, settings: MoMSettings, width: int, memories: int, keys: int, *, rngs: nnx.Rngs):
        heads, rank = settings.heads, settings.gate_rank
        vector, steps = settings.rule in VECTOR_GATES, settings.rule in STEPS
        gates = keys if vector else heads
        self.down = _Stack(memories, width, rank, ("embed", None), rngs=rngs) if vector else None
        self.up = _Stack(memories, rank if vector else width, gates, (None if vector else "embed", "heads"), rngs=rngs)
        # Rates of 1 to 16, step sizes log-uniform from 0.001 to 0.1, common to all memories.
        rates = jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1, maxval=16))
        self.a_log = param(rates, ("heads",), "dynamics") if steps else None
        self.dt_bias = param(dt_bias(rngs.params(), (gates,), 1e-3, 0.1), ("heads",), "dynamics") if steps else None
        self.bias = None if steps else param(jnp.zeros((memories, gates)), (None, "heads"), "bias")

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T R G"], Float[Array, "B T R G"] | None]:
        gate = self.up(x if self.down is None else self.down(x)).astype(jnp.float32)
        if self.a_log is None:
            return jax.nn.log_sigmoid(gate + self.bias[...]) / 16, None
        step = jax.nn.softplus(gate + self.dt_bias[...])
        rate = jnp.exp(self.a_log[...])
        return -jnp.repeat(rate, step.shape[-1] // rate.shape[0]) * step, step


class _Selection(nnx.Module):
    """Mamba's step size of every token, memory and channel through a low rank, float32; and its rates, common."""

    def __init__(self, settings: MoMSettings, width: int, memories: int, values: int, states: int, *, rngs: nnx.Rngs):
        self.down = _Stack(memories, width, settings.gate_rank, ("embed", None), rngs=rngs)
        # The variance of the reference's uniform(-rank^-1/2, rank^-1/2).
        self.up = _Stack(memories, settings.gate_rank, values, (None, "heads"), gain=3**-0.5, rngs=rngs)
        self.dt_bias = param(dt_bias(rngs.params(), (values,), 1e-3, 0.1), ("heads",), "dynamics")
        rates = jnp.log(jnp.arange(1, states + 1, dtype=jnp.float32))
        self.a_log = param(jnp.tile(rates, (values, 1)), ("heads", None), "dynamics")

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R E"]:
        return jax.nn.softplus(self.up(self.down(x)).astype(jnp.float32) + self.dt_bias[...])


class _LoRA(nnx.Module):
    """sigmoid(activation(x W_down) W_up + bias) for every memory, float32; W_down is zero at the start, the bias common."""

    def __init__(self, memories: int, width: int, rank: int, bias: Float[Array, " E"], *, rngs: nnx.Rngs):
        self.down = _Stack(memories, width, rank, ("embed", None), gain=0.0, rngs=rngs)
        self.up = _Stack(memories, rank, bias.shape[0], (None, "heads"), gain=0.1, rngs=rngs)
        self.bias = param(bias, ("heads",), "dynamics")

    def __call__(self, x: Float[Array, "B T D"], activation: Callable = lambda x: x) -> Float[Array, "B T R E"]:
        return jax.nn.sigmoid(self.up(activation(self.down(x))).astype(jnp.float32) + self.bias[...])


class _GeneralisedDelta(nnx.Module):
    """What RWKV-7 makes of tokens besides r, k and v: see `jaxlm.layers.mixers.rwkv7`, whose initial values it has."""

    def __init__(self, settings: MoMSettings, context: LayerContext, memories: int, keys: int, *, rngs: nnx.Rngs):
        width, rank, size = context.width, settings.gate_rank, keys // settings.heads
        linear, decay, rate = initial_channels(keys, size, context)
        self.mix = param(initial_mix(SHIFTED, context), (None, None), "dynamics")
        self.decay = _LoRA(memories, width, rank, decay, rngs=rngs)
        self.rate = _LoRA(memories, width, rank, rate, rngs=rngs)
        per_head = lambda x: param(x.reshape(settings.heads, size), ("heads", None), "dynamics")  # noqa: E731
        self.k_k, self.k_a = per_head(0.71 - 0.1 * linear), per_head(jnp.full(keys, 1.02))
        self.r_k = per_head(jnp.full(keys, -0.04))

    def shift(self, x: Float[Array, "B T D"], state, segment_ids) -> tuple[dict[str, Array], Float[Array, "B 1 D"]]:
        """The inputs of the projections by name, and the last token."""
        delta, state = token_shift(x, state, segment_ids)
        return {name: x + delta * mu for name, mu in zip(SHIFTED, self.mix[...].astype(x.dtype), strict=True)}, state

    def __call__(self, mixed: dict[str, Array], r: Float[Array, "B T 1 H K"], k: Float[Array, "B T R H K"]) -> dict[str, Array]:
        """k, a, b and log_decay of the op, and the factor [B, T, R, H, 1] of v in the bonus term."""
        log_decay = DECAY_BOUND * self.decay(mixed["w"], jnp.tanh).reshape(k.shape)
        rate = self.rate(mixed["a"]).reshape(k.shape)
        dtype, k = k.dtype, k.astype(jnp.float32)
        removal = l2_normalise(k * self.k_k[...])
        k = (k * (1 + (rate - 1) * self.k_a[...])).astype(dtype)
        bonus = jnp.sum(r.astype(jnp.float32) * k.astype(jnp.float32) * self.r_k[...], axis=-1, keepdims=True)
        a, b = (-removal).astype(dtype), (removal * rate).astype(dtype)
        return {"k": k, "a": a, "b": b, "log_decay": log_decay, "skip": bonus}


class MoM(nnx.Module):
    """o_t = sum_r w_tr q_t S_tr over the top-k memories r of token t, and q_t S_t of the shared one (eq. 5-12).

    w are the softmax scores of the router's top-k, divided by their sum. Every memory has its own keys, values and gates;
    queries, short convolutions, rates and the output are common. A memory is the recurrence over the tokens that it gets,
    in their order: others neither write it nor let it decay, and its convolutions see its own tokens alone (what the
    reference does at inference; in training its convolutions run over the borders of memories).

    A rule is the recurrence of the mixer of that name, with these projections, convolutions and outputs around it: no
    rotary embedding in retention; B, C and x of mamba2 and mamba are k, q and v, a B and a C for each head, and their skip
    D x is added a memory; hgrn2's forget gate and lightnet's logits are k's projection, which has no convolution; lightnet's
    running sum is over the tokens of the document that the memory gets.

    hgrn, mingru and minlstm keep one number a value channel, mamba and s4d as many as a head has key channels, s4d in
    conjugate pairs. hgrn, mingru, minlstm and s4d have neither q nor k: v is what they take in. The gates of the first three
    are each memory's, without convolutions, HGRN's bound common. Mamba's step is each memory's (rank gate_rank), its rates
    and the step's bias are common; step, B and C are projections of the token, as in Mamba-2, where Mamba has them of what
    the convolution gives. The filter of s4d (S4D-Lin by zero-order hold: rates, steps, C and D) is common.

    log_linear counts the tokens of the document that a memory gets: its levels are of these. The level scales, of the token
    that reads, are common like its query.

    RWKV-7's token shift stands before the router, so its inputs see the token before in the row, whatever memory that goes
    to. r, the mixes, k_k, k_a, r_k and the biases of w and a are common; k, v and the low-rank w and a (rank gate_rank) are
    each memory's. The bonus term is added a memory, in front of the common norm and gate, which stand in for its group norm
    and low-rank gate. Its value residual is left out: the first layer sends a token to memories of its own.

    Without a state, the tokens of each memory lie one after the other in one row, each memory from a multiple of the
    chunk size on, so that a token's place in its chunk depends on earlier tokens alone. The op then runs over
    T (top_k + shared) tokens and a few empty chunks. Memories of hgrn, mingru and minlstm have room for T tokens each, since
    the place of a memory among all chunks sets how the diagonal op rounds its states: it must not depend on later tokens.

    With a state, every memory is a row of its own of T tokens, the empty slots behind its tokens inert (no key, value, step
    nor decay; of s4d, which always decays, behind its end), which leaves its last state as the final one: the op costs
    `memories` times the tokens. Projections of all tokens for all memories are computed either way.

    Where the sequence is split over devices, each groups its own tokens, in blocks of a few chunks. A block, and with it a
    memory's blocks on a device, is an affine map of the memory's state, so that what devices exchange is the states of all
    memories, and the last inputs of each for the convolutions, whatever the number of tokens (`jaxlm.parallel.sequence`).
    The op runs over the blocks for what they write, for what they keep of a state, unless that is a product of factors, and
    for the outputs.
    """

    def __init__(self, settings: MoMSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        self.key_dim, self.value_dim = settings.sizes(context.width)
        width, heads, memories, rule = context.width, settings.heads, settings.memories + settings.shared, settings.rule
        keys, values = self.key_dim * heads, self.value_dim * heads
        # muP: the fan-out does not grow with width.
        self.router = Dense(width, settings.memories, axes=("embed", None), role="output", rngs=rngs)
        keyless = rule in KEYLESS
        self.q = None if keyless else Dense(width, keys, axes=("embed", "heads"), rngs=rngs)
        # RWKV-7 writes keys that are not normalised, small at the start.
        gain = 0.1 if rule == "rwkv7" else 1.0
        self.k = None if keyless else _Stack(memories, width, keys, ("embed", "heads"), gain=gain, rngs=rngs)
        self.v = _Stack(memories, width, values, ("embed", "heads"), rngs=rngs)
        sizes = {"v": values} if keyless else {"q": keys, "k": keys, "v": values}
        if rule in ("hgrn2", "lightnet"):
            sizes.pop("k")
        if not settings.convolution or rule == "rwkv7":
            sizes = {}
        if rule in ("hgrn", "hgrn2"):
            self.bound_logit = param(jnp.zeros(keys if rule == "hgrn2" else values), ("heads",), "dynamics")
            self.position = param(jnp.asarray(context.index / context.depth, jnp.float32), (), "constant")
        self.convolve = nnx.Dict(
            {name: ShortConvolution(size, settings.convolution, axis="heads", rngs=rngs) for name, size in sizes.items()}
        )
        project = lambda size: _Stack(memories, width, size, ("embed", "heads"), rngs=rngs)  # noqa: E731
        channels = settings.gates == "channel"
        self.beta = project(keys if channels else heads) if rule in DELTA_RULES else None
        self.write = project(values) if channels else None
        self.decay = _Decay(settings, width, memories, keys, rngs=rngs) if rule in (*SCALAR_GATES, *VECTOR_GATES) else None
        self.generalised = _GeneralisedDelta(settings, context, memories, keys, rngs=rngs) if rule == "rwkv7" else None
        # Lightning's rates differ between layers, so stacked layers must carry them as an array.
        fixed = FIXED.get(rule)
        self.rates = param(head_log_decay(fixed, heads, context), ("heads",), "constant") if fixed else None
        skip = {"mamba2": heads, "mamba": values}.get(rule)
        self.skip = param(jnp.ones(skip), ("heads",), "dynamics") if skip else None
        self.gates = nnx.Dict({name: project(values) for name in GATES.get(rule, ())})
        mamba = rule == "mamba"
        self.selection = _Selection(settings, width, memories, values, self.key_dim, rngs=rngs) if mamba else None
        self.filter = S4DFilter(S4DSettings(state=self.key_dim), values, rngs=rngs) if rule == "s4d" else None
        self.levels = levels_for(settings.max_length) if rule == "log_linear" else 0
        self.level = Dense(width, heads * self.levels, axes=("embed", "heads"), rngs=rngs) if self.levels else None
        bias = jnp.full((heads, self.levels), LEVEL_BIAS)
        self.level_bias = param(bias, ("heads", None), "dynamics") if self.levels else None
        self.output = HeadOutput(context, values, self.value_dim, gate=settings.output_gate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State | None]:
        y, state, _ = self.with_auxiliary(x, state, segment_ids)
        return y, state

    def with_auxiliary(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State | None, Float[Array, ""]]:
        """As a call, and the router's auxiliary loss (float32), times its coefficient.

        With f_r the share of tokens whose top-k holds memory r and p_r the mean score of r, the loss is M sum_r f_r p_r
        (Switch Transformer, arXiv 2101.03961, eq. 4), top_k where tokens are spread evenly. Tokens of segment id 0, the
        padding of packed rows, do not count. The reference takes f and p over all layers together; here each layer adds
        its own loss.

        Raises:
          UserError: if there are more memories than tokens, unless a state is given; of log_linear, if there are more than
            `max_length` tokens.
        """
        settings = self.settings
        if state is None and x.shape[1] < settings.memories:
            raise UserError(
                f"mom: memories={settings.memories} are more than the {x.shape[1]} tokens of a row; use fewer or longer rows"
            )
        if settings.rule == "log_linear":
            check_length("mom", settings.max_length, x.shape[1])
        kernel = self.router.kernel[...].astype(jnp.float32)
        scores = jax.nn.softmax(jnp.matmul(x.astype(jnp.float32), kernel, precision="highest"), axis=-1)
        # Not lax.top_k, which XLA gathers from all devices; a sort of the few memories stays where its rows are.
        chosen = jnp.argsort(scores, axis=-1, descending=True)[..., : settings.top_k]
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        routed = jax.nn.one_hot(chosen, settings.memories, dtype=jnp.int32).sum(axis=2)
        auxiliary = self._balance_loss(scores, routed, segment_ids)
        if settings.shared:
            everyone = jnp.ones((*chosen.shape[:2], 1), jnp.int32)
            routed = jnp.concatenate([routed, everyone], axis=-1)
            chosen = jnp.concatenate([chosen, settings.memories * everyone], axis=-1)
            weights = jnp.concatenate([weights, everyone.astype(weights.dtype)], axis=-1)

        tokens, new_state = self._tokens(x, routed, state, segment_ids)
        reset = None if segment_ids is None else resets(segment_ids)
        run = jnp.zeros(x.shape[:2], jnp.int32) if reset is None else run_index(reset)
        positions = None
        if settings.rule == "log_linear":
            start = jnp.zeros_like(routed[:, 0]) if state is None else state["position"]
            positions = counts_in_runs(routed, reset, start)
            new_state["position"] = positions[:, -1] + routed[:, -1]
        taps = {name: convolution.weight[...] for name, convolution in self.convolve.items()}
        memory = None if state is None else {name: state[name] for name in ("recurrent", *taps)}
        o, memory = read_memories(
            settings.rule, settings.chunk_size, taps, self._common(), tokens, (routed, chosen, run, positions), weights, memory
        )
        y = self.output(constrain(o, "batch", "sequence", "heads", None), x)
        return y, None if state is None else {**new_state, **memory}, auxiliary

    def _balance_loss(self, scores: Float[Array, "B T M"], routed: Int[Array, "B T M"], segment_ids) -> Float[Array, ""]:
        counted = jnp.ones(scores.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
        counted = counted[..., None] / jnp.maximum(jnp.sum(counted), 1)
        share, mean = jnp.sum(counted * routed, axis=(0, 1)), jnp.sum(counted * scores, axis=(0, 1))
        return self.settings.balance * self.settings.memories * jnp.sum(share * mean)

    def _common(self) -> dict[str, Float[Array, "H X ..."]]:
        """What tokens and memories have in common besides convolutions: `skip`, a factor of v; Mamba's rates, for every
        channel and state; S4D's factor of the state and its read-out, pairs for every channel and state."""
        found = {}
        if self.skip is not None:
            found["skip"] = self.skip[...]
        if self.selection is not None:
            found["rates"] = -jnp.exp(self.selection.a_log[...])
        if self.filter is not None:
            found["factor"], found["read"] = self.filter.discretise()
            found["skip"] = self.filter.skip[...]
        return {name: x.reshape(self.settings.heads, -1, *x.shape[1:]) for name, x in found.items()}

    def _tokens(self, x, routed, state: State | None, segment_ids) -> tuple[dict[str, Array], State]:
        """What each token holds for each memory [B, T, R, H, *], or for all alike [B, T, 1, H, *]: q, k and v before their
        convolutions, gates; and the states of what runs over the tokens in their own order."""
        settings, new_state = self.settings, {}
        rule, (batch, length) = settings.rule, x.shape[:2]
        inputs = dict.fromkeys(SHIFTED, x)
        if rule == "rwkv7":
            inputs, new_state["shift"] = self.generalised.shift(x, None if state is None else state["shift"], segment_ids)
        v = self._heads(self.v(inputs["v"]))
        if rule in KEYLESS:
            v = jax.nn.silu(v) if rule == "hgrn" and not self.convolve else v
            return {"v": v, **self._forget(x)}, new_state
        q, k = self._heads(self.q(inputs["r"])[:, :, None]), self._heads(self.k(inputs["k"]))
        tokens = {"q": q, "k": k, "v": v}
        if rule in ("hgrn2", "lightnet") and not self.convolve:
            tokens["q"] = jax.nn.silu(q)
        if self.rates is not None:
            rates = jnp.broadcast_to(self.rates[...], (batch, length, 1, settings.heads))
            tokens["log_decay"] = jax.lax.stop_gradient(rates)
        if rule == "hgrn2":
            tokens["log_decay"], rest = self._bounded(k)
            tokens["k"] = rest.astype(k.dtype)
        if rule == "lightnet":
            before = None if state is None else state["sum"]
            tokens["k"], tokens["log_decay"], new_state["sum"] = _running_softmax(k, routed, before, segment_ids)
        if rule == "rwkv7":
            tokens |= self.generalised(inputs, q, k)
        if self.decay is not None:
            log_decay, step = self.decay(x)
            tokens["log_decay"] = self._heads(log_decay) if rule in VECTOR_GATES else log_decay
            if rule == "mamba2":
                tokens["step"] = step
        if self.selection is not None:
            tokens["step"] = self._heads(self.selection(x))
        if self.level is not None:
            level = self._heads(self.level(x)[:, :, None]).astype(jnp.float32)
            tokens["scales"] = jax.nn.softplus(level + self.level_bias[...])
        if self.beta is not None:
            beta = (1 + settings.negative_eigenvalues) * jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
            tokens["beta"] = beta if self.write is None else self._heads(beta)
        if self.write is not None:
            tokens["write"] = self._heads(jax.nn.sigmoid(self.write(x).astype(jnp.float32)))
        return tokens, new_state

    def _forget(self, x: Float[Array, "B T D"]) -> dict[str, Float[Array, "B T R H V"]]:
        """log f and 1 - f of the forget gates of `DIAGONAL`."""
        gates = {name: self._heads(gate(x)).astype(jnp.float32) for name, gate in self.gates.items()}
        if not gates:
            return {}
        if self.settings.rule == "hgrn":
            log_f, rest = self._bounded(gates["forget"])
        else:
            logit = MINIMAL[self.settings.rule].forget_logit(gates)
            log_f, rest = jax.nn.log_sigmoid(logit), jax.nn.sigmoid(-logit)
        return {"log_decay": log_f, "write": rest}

    def _bounded(self, forget: Float[Array, "B T R H X"]) -> tuple[Float[Array, "B T R H X"], Float[Array, "B T R H X"]]:
        """HGRN's and HGRN2's log f and 1 - f."""
        position = jax.lax.stop_gradient(self.position[...])
        bound = self.bound_logit[...] + jnp.log(position) - jnp.log1p(-position)
        return forget_gate(forget.astype(jnp.float32), bound.reshape(forget.shape[3:]))

    def _heads(self, x: Float[Array, "B T R HX"]) -> Float[Array, "B T R H X"]:
        return constrain(x.reshape(*x.shape[:3], self.settings.heads, -1), "batch", "sequence", None, "heads", None)

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        memories, heads = self.settings.memories + self.settings.shared, self.settings.heads
        convolution = {name: conv.init_state(batch * memories, dtype) for name, conv in self.convolve.items()}
        keys, values = self.key_dim, self.value_dim
        channels = {"mamba": (values, keys), "s4d": (values, 2, keys // 2), **dict.fromkeys(DIAGONAL, (values,))}
        channels["log_linear"] = (self.levels - 1, keys, values)
        size = channels.get(self.settings.rule, (keys, values))
        state = {
            "recurrent": jnp.zeros((batch, memories, heads, *size), jnp.float32),
            **{name: s.reshape(batch, memories, *s.shape[1:]) for name, s in convolution.items()},
        }
        if self.settings.rule == "log_linear":
            check_length("mom", self.settings.max_length, length)
            state["position"] = jnp.zeros((batch, memories), jnp.int32)
        if self.settings.rule == "lightnet":
            state["sum"] = jnp.full((batch, memories, heads, self.key_dim), NO_LOGIT, jnp.float32)
        if self.settings.rule == "rwkv7":
            state["shift"] = jnp.zeros((batch, 1, self.router.kernel.shape[-2]), dtype)
        return state


def _running_softmax(
    logits: Float[Array, "B T R H K"], routed: Int[Array, "B T R"], before: Float[Array, "B R H K"] | None, segment_ids
) -> tuple[Float[Array, "B T R H K"], Float[Array, "B T R H K"], Float[Array, "B R H K"]]:
    """LightNet's keys, log decays, and running sum after the last token.

    In the tokens' own order, where a memory's sum stays as it is over tokens that others get: a token's place in the scan,
    and with it how its sum is rounded, does not depend on what later tokens do.
    """
    memories, heads, size = logits.shape[2:]

    def together(x):
        """Memories as channels: [.., R, H, K] to [.., H, R K]."""
        return jnp.moveaxis(x, -3, -2).reshape(*x.shape[:-3], heads, memories * size)

    def apart(x):
        return jnp.moveaxis(x.reshape(*x.shape[:-1], memories, size), -2, -3)

    masked = jnp.where(routed[..., None, None] > 0, logits.astype(jnp.float32), NO_LOGIT)
    z, log_decay = running_logsumexp(together(masked), None if before is None else together(before), segment_ids)
    z, log_decay = apart(z), apart(log_decay)
    # No state precedes what a memory gets first.
    log_decay = jnp.where(log_decay < NO_LOGIT / 2, 0, log_decay)
    return jnp.exp(masked - z).astype(logits.dtype), log_decay, z[:, -1]
