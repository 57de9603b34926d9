"""What training carries from step to step, and where it lives."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxlm.models.language_model import ModelSettings, init_params
from jaxlm.parallel.context import Rules
from jaxlm.parallel.mesh import like_params, param_shardings
from jaxlm.params import map_info


class TrainState(NamedTuple):
    """Masters are float32; `step` counts finished updates."""

    step: Int[Array, ""]
    params: dict
    opt_state: Any


def state_shardings(optimizer: optax.GradientTransformation, infos: dict, mesh: Mesh, rules: Rules) -> TrainState:
    """Where every leaf of the state lives: optimizer moments beside their parameters, the rest everywhere."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(infos, mesh, rules)
    opt_state = like_params(_abstract_opt_state(optimizer, infos), infos, params, everywhere)
    return TrainState(everywhere, params, opt_state)


def abstract_state(optimizer: optax.GradientTransformation, infos: dict, shardings: TrainState) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    shapes = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), _abstract_params(infos), _abstract_opt_state(optimizer, infos)
    )
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)


def init_state(
    settings: ModelSettings, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState
) -> TrainState:
    """A fresh state; every device makes only its own shards."""
    params = init_params(settings, seed, shardings.params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, opt_state)


def _abstract_params(infos: dict) -> dict:
    return map_info(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), infos)


def _abstract_opt_state(optimizer: optax.GradientTransformation, infos: dict):
    return jax.eval_shape(optimizer.init, _abstract_params(infos))
