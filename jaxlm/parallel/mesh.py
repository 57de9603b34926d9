"""The device mesh and the rules that map logical axis names to mesh axes.

Layers name the axes of what they compute ("batch", "heads", ...); only this file knows which mesh axis a name means.
Sharding is `jax.jit` with `NamedSharding` over a mesh of Auto axes (what used to be pjit): XLA propagates the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.parallel.context import DEFAULT_RULES, MESH_AXES, Rules
from jaxlm.params import ParamInfo, leaves, map_info
from jaxlm.schema import UserError


def resolve_axis_sizes(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """Fill in the one axis size given as -1 so that the mesh uses every device.

    Raises:
      UserError: if the sizes cannot be made to multiply to `device_count`.
    """
    sizes = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    bad = [f"mesh.{axis}={size}" for axis, size in sizes.items() if size == 0 or size < -1]
    if bad:
        raise UserError(f"{', '.join(bad)}: a mesh axis is a positive number of devices, or -1 for all that are left")
    if len(free) > 1:
        raise UserError(f"mesh: only one axis can be -1 (all remaining devices), got {', '.join(free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    named = [f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1)]
    shape = " x ".join(named) or "1"
    if free:
        if device_count % fixed:
            raise UserError(
                f"mesh: {shape}{f' = {fixed}' if len(named) > 1 else ''} does not divide the {device_count} available devices, "
                f"so mesh.{free[0]}=-1 has no size; change the other axes to a divisor of {device_count}"
            )
        sizes[free[0]] = device_count // fixed
    elif fixed != device_count:
        raise UserError(
            f"mesh: {shape} asks for {fixed} devices but {device_count} are available; set one axis to -1 to take all "
            f"of them (usually mesh.data=-1), or choose sizes whose product is {device_count}"
        )
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all of `MESH_AXES`, laid out along the hardware's topology. `sizes` as in `resolve_axis_sizes`."""
    devices = list(jax.devices() if devices is None else devices)
    resolved = resolve_axis_sizes(sizes, len(devices))
    shape = tuple(resolved.values())
    if resolved["slice"] > 1 and hasattr(devices[0], "slice_index"):
        slices = (resolved["slice"], *(1,) * (len(shape) - 1))
        grid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), slices, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def make_rules(overrides: Mapping[str, Sequence[str]] | None = None) -> Rules:
    """The default rules with some replaced.

    Raises:
      UserError: for a logical or mesh axis that does not exist.
    """
    rules = dict(DEFAULT_RULES)
    for name, mesh_axes in (overrides or {}).items():
        if name not in rules:
            raise UserError(f"mesh.rules.{name}: unknown logical axis; there are {', '.join(rules)}")
        unknown = [axis for axis in mesh_axes if axis not in MESH_AXES]
        if unknown:
            raise UserError(f"mesh.rules.{name}: unknown mesh axis {unknown[0]!r}; there are {', '.join(MESH_AXES)}")
        rules[name] = tuple(mesh_axes)
    return rules


def partition_spec(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical axes (None: replicated)."""
    return PartitionSpec(*(rules[axis] or None if axis is not None else None for axis in axes))


def param_shardings(infos: dict, mesh: Mesh, rules: Rules) -> dict:
    """A NamedSharding for every parameter.

    Raises:
      UserError: naming the parameter whose dimension the mesh does not divide.
    """
    for name, info in leaves(infos):
        for size, axis in zip(info.shape, info.axes, strict=True):
            mesh_axes = rules[axis] if axis is not None else ()
            ways = math.prod(mesh.shape[a] for a in mesh_axes)
            if size % ways:
                raise UserError(
                    f"mesh: parameter {name} has {size} entries along {axis!r}, which {' x '.join(mesh_axes)} = {ways} does "
                    f"not divide; change mesh.{mesh_axes[-1]}, the model's size, or replicate it with mesh.rules.{axis}=[]"
                )
    return map_info(lambda info: NamedSharding(mesh, partition_spec(info.axes, rules)), infos)


def like_params(tree, infos: dict, shardings: dict, default: NamedSharding):
    """Shardings for a tree that contains copies of the parameter tree (an optimizer state).

    A leaf takes the sharding of the parameter whose path is a suffix of its own and whose shape it has; the rest is
    replicated with `default`. This holds for every optax state, masked and partitioned ones included.
    """
    by_path = {
        tuple(str(k.key) for k in path): (info.shape, sharding)
        for (path, info), sharding in zip(
            jax.tree_util.tree_flatten_with_path(infos, is_leaf=lambda x: isinstance(x, ParamInfo))[0],
            jax.tree.leaves(shardings),
            strict=True,
        )
    }

    def pick(path, leaf):
        keys = tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
        for start in range(len(keys)):
            shape, sharding = by_path.get(keys[start:], (None, None))
            if shape == tuple(leaf.shape):
                return sharding
        return default

    return jax.tree_util.tree_map_with_path(pick, tree)
