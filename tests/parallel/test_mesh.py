"""Mesh sizes, rules, and where parameters and activations go."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxlm.parallel import context, processes
from jaxlm.parallel import mesh as mesh_lib
from jaxlm.params import ParamInfo
from jaxlm.schema import UserError


def test_sizes_fill_the_free_axis_and_default_to_one():
    sizes = mesh_lib.resolve_axis_sizes({"data": -1, "tensor": 2}, 8)
    assert sizes == {"slice": 1, "data": 4, "fsdp": 1, "sequence": 1, "tensor": 2, "expert": 1}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": -1, "tensor": 3}, "mesh: tensor 3 does not divide the 8"),
        ({"data": 2, "fsdp": 2}, "asks for 4 devices but 8 are available"),
        ({"data": -1, "fsdp": -1}, "only one axis can be -1"),
        ({"data": 0}, "mesh.data=0"),
    ],
)
def test_sizes_that_do_not_fit_say_which(sizes, words):
    with pytest.raises(UserError, match=words):
        mesh_lib.resolve_axis_sizes(sizes, 8)


def test_mesh_axes_are_auto_and_complete():
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert dict(mesh.shape) == {"slice": 1, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 2, "expert": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_devices_of_the_mesh_are_known_in_bodies_of_shard_maps():
    assert context.device() == jax.devices()[0]
    mesh = mesh_lib.make_mesh({"data": 3}, jax.devices()[4:7])
    with context.use_mesh(mesh), context.no_mesh():
        assert context.active() is None
        assert context.device() == jax.devices()[4]
    assert context.device() == jax.devices()[0]


def test_rules_can_be_replaced_and_typos_are_named():
    rules = mesh_lib.make_rules({"embed": []})
    assert mesh_lib.partition_spec(("embed", "mlp", None), rules) == PartitionSpec(None, ("tensor",), None)
    with pytest.raises(UserError, match=r"mesh.rules.embedd: unknown logical axis"):
        mesh_lib.make_rules({"embedd": []})
    with pytest.raises(UserError, match="unknown mesh axis 'tensro'"):
        mesh_lib.make_rules({"embed": ["tensro"]})


def test_a_parameter_that_does_not_divide_is_named():
    mesh = mesh_lib.make_mesh({"fsdp": 8})
    infos = {"block": {"kernel": ParamInfo((12, 4), jnp.float32, ("embed", None), "hidden")}}
    with pytest.raises(UserError, match="block.kernel has 12 entries along 'embed', which fsdp = 8 does not divide"):
        mesh_lib.param_shardings(infos, mesh, context.DEFAULT_RULES)


def test_copies_of_parameters_in_an_optimizer_state_live_beside_them():
    mesh = mesh_lib.make_mesh({"fsdp": 4, "tensor": 2})
    infos = {
        "a": {"kernel": ParamInfo((8, 4), jnp.float32, ("embed", "mlp"), "hidden")},
        "b": {"kernel": ParamInfo((8, 2), jnp.float32, ("embed", None), "hidden")},
    }
    shardings = mesh_lib.param_shardings(infos, mesh, context.DEFAULT_RULES)
    shape = jax.ShapeDtypeStruct
    moments = {"a": {"kernel": shape((8, 4), jnp.float32)}, "b": {"kernel": shape((8, 2), jnp.float32)}}
    state = ({"mu": moments}, shape((), jnp.int32))
    default = jax.NamedSharding(mesh, PartitionSpec())
    found = mesh_lib.like_params(state, infos, shardings, default)
    assert found[0]["mu"] == shardings
    assert found[0]["mu"]["a"]["kernel"].spec == PartitionSpec(("fsdp",), ("tensor",))
    assert found[1] is default


def test_constrain_places_activations_and_is_the_identity_without_a_mesh():
    x = jnp.ones((8, 4, 6))
    assert context.constrain(x, "batch", "sequence", "mlp") is x
    mesh = mesh_lib.make_mesh({"data": 4, "tensor": 2})
    with context.use_mesh(mesh):
        y = jax.jit(lambda x: context.constrain(x * 2, "batch", None, "mlp"))(x)
        # A single row cannot be split over four devices and is left alone.
        z = jax.jit(lambda x: context.constrain(x * 2, "batch", None, "mlp"))(x[:1])
    assert y.addressable_shards[0].data.shape == (2, 4, 3)
    assert z.shape == (1, 4, 6)


def test_local_rows_are_those_of_this_process():
    mesh = mesh_lib.make_mesh({"data": 4, "tensor": 2})
    sharding = jax.NamedSharding(mesh, mesh_lib.partition_spec(("batch",), context.DEFAULT_RULES))
    assert processes.local_rows(sharding, 8) == list(range(8))
