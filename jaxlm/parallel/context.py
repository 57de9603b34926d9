"""The mesh that computations are being traced for, and where it puts their arrays. Needs jax alone, as ops do."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# From the slowest network to the fastest: slices are joined by the data-centre network, tensor needs the fastest links.
MESH_AXES = ("slice", "data", "fsdp", "sequence", "tensor", "expert")

Rules = Mapping[str, tuple[str, ...]]

# A logical axis may use several mesh axes; an empty tuple replicates it.
DEFAULT_RULES: Rules = {
    "batch": ("slice", "data", "fsdp", "expert"),
    "sequence": ("sequence",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "layers": (),
}


_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("jaxlm_mesh", default=None)
# As `_ACTIVE`'s, in the bodies of shard_maps too.
_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("jaxlm_devices", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Within this context `constrain` places activations by `rules` on `mesh`, and `mesh` is jax's ambient mesh."""
    token, mesh_token = _ACTIVE.set((mesh, rules)), _MESH.set(mesh)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _ACTIVE.reset(token)
        _MESH.reset(mesh_token)


def active() -> tuple[Mesh, Rules] | None:
    """The mesh and rules of the innermost `use_mesh`."""
    return _ACTIVE.get()


def device() -> jax.Device:
    """One of the devices that computations are traced for: of the innermost `use_mesh`, in the body of a shard_map too, else
    jax's first. It need not be a device of this machine."""
    mesh = _MESH.get()
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


@contextlib.contextmanager
def no_mesh() -> Iterator[None]:
    """Within this context (the body of a shard_map) `constrain` is the identity and `active` None."""
    token = _ACTIVE.set(None)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell the partitioner where an activation lives, by logical axis; without a mesh this is the identity.

    An axis whose mesh axes do not divide the dimension is left to the partitioner (a batch of one in decoding, say).
    """
    active = _ACTIVE.get()
    if active is None:
        return x
    mesh, rules = active
    if mesh.size == 1:
        return x
    entries = []
    for size, axis in zip(x.shape, axes, strict=True):
        mesh_axes = rules[axis] if axis is not None else ()
        ways = math.prod(mesh.shape[a] for a in mesh_axes)
        entries.append(mesh_axes if mesh_axes and size % ways == 0 else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*entries)))
