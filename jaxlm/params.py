"""What a parameter is: a shape, a logical axis name per dimension, a role, and an initial value.

A model is an `nnx.Module`; everything that trains sees plain nested dicts. `describe` turns a model (or an abstract one)
into a dict of `ParamInfo` with the same structure, and shardings, weight-decay masks, optimizer labels and parameter
counts are `jax.tree.map` over that dict. Nothing else needs to know what the layers are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

STACK_AXIS = "layers"

# What a parameter does, as far as optimizers and parameterisations such as muP care.
ROLES = {
    "input": "embedding table: indexed, not multiplied; only its fan-out grows with width",
    "hidden": "matrix [..., in, out] between two widths that both grow",
    "output": "readout matrix [..., in, out] whose fan-out does not grow with width",
    "norm": "scale of a normalisation",
    "bias": "additive vector",
    "convolution": "depthwise short convolution [width, channels]",
    "dynamics": "vector that sets a recurrence's rates (A_log, dt_bias, D, bounds, token-shift mixes): never decayed",
    "constant": "not trained: fixed by the architecture, kept here because it differs between stacked layers",
}
DECAYED_ROLES = frozenset({"input", "hidden", "output"})


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """Metadata of one parameter leaf. `shape` and `axes` include the leading stack axis of scanned layers, if any."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]
    role: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        """Whether the leading axis counts layers; per-matrix optimizers must treat it as a batch axis."""
        return bool(self.axes) and self.axes[0] == STACK_AXIS


def param(value: jax.Array, axes: tuple[str | None, ...], role: str) -> nnx.Param:
    """Wrap an initial value as a parameter with one logical axis name (or None) per dimension and a role of `ROLES`.

    Raises:
      ValueError: if the axes do not match the value's rank or the role is unknown.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"parameter of shape {value.shape} needs {value.ndim} logical axes, got {axes}")
    if role not in ROLES:
        raise ValueError(f"unknown parameter role {role!r}; choose one of {sorted(ROLES)}")
    return nnx.Param(value, axes=axes, role=role)


def stack(make: Callable[..., nnx.Module], *args: jax.Array) -> nnx.Module:
    """Build `make(*args)` once for every entry of the leading axis of `args`, as one module with stacked parameters.

    The result is scanned over with `jax.lax.scan(body, x, module)`; each parameter's logical axes gain `STACK_AXIS` in front.
    """
    module = jax.vmap(make)(*args)
    for _, leaf in nnx.iter_graph(module):
        if isinstance(leaf, nnx.Param):
            leaf.set_metadata(axes=(STACK_AXIS, *leaf.get_metadata("axes")))
    return module


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """A model as (static structure, nested dict of arrays); `nnx.merge(structure, params)` puts it together again."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def describe(model: nnx.Module) -> dict:
    """The nested dict of `ParamInfo` with the structure of `split(model)[1]`. Works on abstract models too."""
    _, state = nnx.split(model)
    infos = {
        path: ParamInfo(tuple(leaf.shape), leaf.dtype, leaf.get_metadata("axes"), leaf.get_metadata("role"))
        for path, leaf in nnx.to_flat_state(state)
    }
    return _nest(infos)


def _nest(flat: dict[tuple, object]) -> dict:
    tree: dict = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def map_info(fn: Callable, infos: dict, *trees) -> dict:
    """`jax.tree.map` over a tree of `ParamInfo` and trees of the same structure."""
    return jax.tree.map(fn, infos, *trees, is_leaf=lambda x: isinstance(x, ParamInfo))


def leaves(infos: dict) -> list[tuple[str, ParamInfo]]:
    """All parameters as (dotted name, info)."""
    flat, _ = jax.tree_util.tree_flatten_with_path(infos, is_leaf=lambda x: isinstance(x, ParamInfo))
    return [(".".join(str(k.key) for k in path), info) for path, info in flat]


def count(infos: dict, roles: frozenset[str] | None = None) -> int:
    """Number of trained scalars (constants excluded), optionally of some roles only."""
    return sum(
        info.size for _, info in leaves(infos) if info.role != "constant" and (roles is None or info.role in roles)
    )

