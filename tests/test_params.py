"""Parameter metadata."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxlm import params
from jaxlm.layers.linear import Dense


class Pair(nnx.Module):
    def __init__(self, *, rngs):
        self.a = Dense(4, 6, axes=("embed", "mlp"), bias=True, rngs=rngs)
        self.fixed = params.param(jnp.ones(3), (None,), "constant")


def test_describe_has_the_structure_of_split_and_the_declared_metadata():
    model = Pair(rngs=nnx.Rngs(0))
    _, tree = params.split(model)
    infos = params.describe(model)
    assert jax.tree.structure(tree) == jax.tree.structure(params.map_info(lambda i: 0, infos))
    assert infos["a"]["kernel"] == params.ParamInfo((4, 6), jnp.float32, ("embed", "mlp"), "hidden")
    assert dict(params.leaves(infos)).keys() == {"a.kernel", "a.bias", "fixed"}
    assert params.count(infos) == 4 * 6 + 6
    assert params.count(infos, frozenset({"bias"})) == 6


def test_stack_prepends_the_layer_axis_and_gives_each_layer_its_own_values():
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = params.stack(lambda key: Pair(rngs=nnx.Rngs(key)), keys)
    info = params.describe(stacked)["a"]["kernel"]
    assert info.shape == (3, 4, 6)
    assert info.axes == ("layers", "embed", "mlp")
    assert info.stacked
    kernel = stacked.a.kernel[...]
    assert not jnp.array_equal(kernel[0], kernel[1])
    alone = Pair(rngs=nnx.Rngs(keys[1]))
    assert jnp.array_equal(kernel[1], alone.a.kernel[...])


def test_merge_of_split_is_the_model():
    model = Pair(rngs=nnx.Rngs(0))
    graphdef, tree = params.split(model)
    x = jnp.ones((2, 4))
    assert jnp.array_equal(nnx.merge(graphdef, tree).a(x), model.a(x))


@pytest.mark.parametrize(("axes", "role", "word"), [(("embed",), "hidden", "2 logical axes"), ((None, None), "magic", "magic")])
def test_param_refuses_wrong_metadata(axes, role, word):
    with pytest.raises(ValueError, match=word):
        params.param(jnp.ones((2, 2)), axes, role)


def test_dense_starts_with_the_stated_deviation():
    layer = Dense(400, 500, axes=(None, None), gain=2.0, rngs=nnx.Rngs(0))
    assert abs(float(jnp.std(layer.kernel[...])) * 400**0.5 / 2.0 - 1) < 0.01
