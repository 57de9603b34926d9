"""The training and evaluation steps: pure functions of (state, batch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from jaxlm.training.loss import Loss, cross_entropy
from jaxlm.training.state import TrainState

# Positions follow from the segment ids on the device.
BATCH_FIELDS = ("tokens", "targets", "segment_ids", "weights")

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


def _fields(batch: dict) -> Batch:
    return {name: batch[name] for name in BATCH_FIELDS}


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation: int,
    clip: float | None,
    z_loss: float,
    loss_chunk: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer update from one global batch.

    The loss is the mean over the batch's weighted tokens, whatever the split into micro-batches or devices, plus the
    mixers' auxiliary losses (metric `auxiliary_loss`, a mean over micro-batches), which evaluation leaves out. With
    `accumulation` n the rows are taken n-th by n-th in a scan and gradients summed in float32: the memory of a batch n
    times smaller, the update of the whole one.
    """

    def objective(params, batch: Batch, tokens: Float[Array, ""]):
        loss, auxiliary = _forward(graphdef, params, batch, loss_chunk)
        auxiliary = auxiliary / accumulation
        return (loss.nll + z_loss * loss.z_loss) / tokens + auxiliary, (loss, auxiliary)

    gradient = jax.grad(objective, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens = jnp.sum(batch["weights"])
        if accumulation == 1:
            grads, (loss, auxiliary) = gradient(state.params, batch, tokens)
        else:
            # Rows i, i + n, i + 2n, ... form a micro-batch, so that each device's rows stay on it.
            micro = jax.tree.map(
                lambda x: jnp.moveaxis(x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 1, 0), batch
            )

            def body(carry, batch):
                return jax.tree.map(jnp.add, carry, gradient(state.params, batch, tokens)), None

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            zero = jnp.zeros((), jnp.float32)
            (grads, (loss, auxiliary)), _ = jax.lax.scan(body, (zeros, (Loss(zero, zero, zero), zero)), micro)

        grad_norm = optax.tree.norm(grads)
        if clip is not None:
            # The factor is 1 below the limit; a norm that is not finite makes every gradient so, and the loop stops.
            grads = jax.tree.map(lambda g: g * (clip / jnp.maximum(grad_norm, clip)), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss.nll / tokens,
            "accuracy": loss.correct / tokens,
            "learning_rate": schedule(state.step),
            "grad_norm": grad_norm,
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
            "tokens": tokens,
        }
        if z_loss:
            metrics["z_loss"] = z_loss * loss.z_loss / tokens
        if nnx.merge(graphdef, state.params).settings.has_auxiliary():
            metrics["auxiliary_loss"] = auxiliary
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(graphdef: nnx.GraphDef, token_bytes: Array, *, loss_chunk: int) -> Callable[[dict, Batch], Metrics]:
    """Sums over one batch: `nll` (nats), `correct`, `tokens` and `bytes` of the targets."""

    def eval_step(params: dict, batch: Batch) -> Metrics:
        loss, _ = _forward(graphdef, params, batch, loss_chunk)
        weights = batch["weights"]
        size = jnp.sum(weights * jnp.asarray(token_bytes, jnp.float32)[batch["targets"]])
        return {"nll": loss.nll, "correct": loss.correct, "tokens": jnp.sum(weights), "bytes": size}

    return eval_step


class Evaluator:
    """Mean loss over the same held-out batches every time.

    Args:
      eval_step: what `make_eval_step` made, jitted.
      batches: this process's rows of every batch; read again at each call.
      to_device: turns them into device arrays.
    """

    def __init__(self, eval_step: Callable[[dict, Batch], Metrics], batches: Iterable[dict], *, to_device: Callable = _fields):
        self.eval_step, self.batches, self.to_device = eval_step, batches, to_device

    def __call__(self, params: dict) -> dict[str, float | None]:
        """`held_out_loss` (nats per token), `perplexity`, `bits_per_byte` (None if no target stands for text), accuracy."""
        totals = {"nll": 0.0, "correct": 0.0, "tokens": 0.0, "bytes": 0.0}
        for batch in self.batches:
            sums = jax.device_get(self.eval_step(params, self.to_device(batch)))
            totals = {name: total + float(sums[name]) for name, total in totals.items()}
        loss = totals["nll"] / totals["tokens"]
        return {
            "held_out_loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": totals["nll"] / math.log(2) / totals["bytes"] if totals["bytes"] else None,
            "held_out_accuracy": totals["correct"] / totals["tokens"],
            "held_out_tokens": int(totals["tokens"]),
        }


def _forward(graphdef: nnx.GraphDef, params: dict, batch: Batch, loss_chunk: int) -> tuple[Loss, Float[Array, ""]]:
    model = nnx.merge(graphdef, params)
    hidden, _, auxiliary = model.hidden_with_auxiliary(batch["tokens"], segment_ids=batch["segment_ids"])
    loss = cross_entropy(hidden, model.readout_kernel(), batch["targets"], batch["weights"], chunk=loss_chunk)
    return loss, auxiliary
