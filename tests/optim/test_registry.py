"""Optimizers over parameter metadata: decay only where it belongs, and stacked layers as layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.optim.registry import AdamWSettings, LionSettings, MuonSettings, make_optimizer
from jaxlm.params import ParamInfo, map_info

LAYERS = 3
INFOS = {
    "embedding": ParamInfo((16, 8), jnp.float32, ("vocab", "embed"), "input"),
    "stack": {
        "kernel": ParamInfo((LAYERS, 8, 12), jnp.float32, ("layers", "embed", "mlp"), "hidden"),
        "scale": ParamInfo((LAYERS, 8), jnp.float32, ("layers", None), "norm"),
        "rates": ParamInfo((LAYERS, 4), jnp.float32, ("layers", None), "constant"),
    },
}
OPTIMIZERS = [AdamWSettings(weight_decay=0.1), LionSettings(weight_decay=0.1), MuonSettings(weight_decay=0.1)]


def random_tree(infos, seed):
    keys = iter(jax.random.split(jax.random.key(seed), 10))
    return map_info(lambda info: jax.random.normal(next(keys), info.shape), infos)


def one_layer(tree, layer):
    return {"embedding": tree["embedding"], "stack": {name: leaf[layer] for name, leaf in tree["stack"].items()}}


def run(settings, infos, params, grads_per_step):
    optimizer = make_optimizer(settings, lambda step: 0.01 * (step + 1), infos)
    state = optimizer.init(params)
    for grads in grads_per_step:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda s: s.kind)
def test_stacked_layers_are_updated_as_if_they_stood_alone(settings):
    params, grads = random_tree(INFOS, 0), [random_tree(INFOS, seed) for seed in (1, 2, 3)]
    # Layers of very different scale: a norm taken over the whole stack would mix them.
    scale = jnp.asarray([1.0, 100.0, 0.01])[:, None, None]
    for g in grads:
        g["stack"]["kernel"] = g["stack"]["kernel"] * scale
    stacked = run(settings, INFOS, params, grads)
    flat_infos = {
        "embedding": INFOS["embedding"],
        "stack": {n: ParamInfo(i.shape[1:], i.dtype, i.axes[1:], i.role) for n, i in INFOS["stack"].items()},
    }
    for layer in range(LAYERS):
        alone = run(settings, flat_infos, one_layer(params, layer), [one_layer(g, layer) for g in grads])
        for name in ("kernel", "scale"):
            np.testing.assert_allclose(stacked["stack"][name][layer], alone["stack"][name], rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda s: s.kind)
def test_only_matrices_decay_and_constants_stay(settings):
    params = random_tree(INFOS, 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = run(settings, INFOS, params, [zeros])
    for name, decays in (("kernel", True), ("scale", False), ("rates", False)):
        expected = params["stack"][name] * (1 - 0.01 * 0.1 * decays)
        np.testing.assert_allclose(after["stack"][name], expected, rtol=1e-6)
    np.testing.assert_allclose(after["embedding"], params["embedding"] * (1 - 0.01 * 0.1), rtol=1e-6)
    moved = run(settings, INFOS, params, [random_tree(INFOS, 1)])
    np.testing.assert_array_equal(moved["stack"]["rates"], params["stack"]["rates"])
    assert not np.allclose(moved["stack"]["scale"], params["stack"]["scale"])


def test_adamw_equals_optax_adamw():
    params, grads = random_tree(INFOS, 0), [random_tree(INFOS, s) for s in (1, 2)]
    ours = run(AdamWSettings(weight_decay=0.1), INFOS, params, grads)
    mask = map_info(lambda info: info.role in ("input", "hidden"), INFOS)
    reference = optax.adamw(lambda step: 0.01 * (step + 1), b1=0.9, b2=0.95, weight_decay=0.1, mask=mask)
    state, theirs = reference.init(params), params
    for g in grads:
        updates, state = reference.update(g, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours["stack"]["kernel"], theirs["stack"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(ours["stack"]["scale"], theirs["stack"]["scale"], rtol=1e-6)


def test_muon_updates_of_hidden_matrices_are_nearly_orthogonal_with_the_stated_size():
    settings = MuonSettings(weight_decay=0.0)
    params, grads = random_tree(INFOS, 0), random_tree(INFOS, 1)
    after = run(settings, INFOS, params, [grads])
    update = (after["stack"]["kernel"] - params["stack"]["kernel"]) / 0.01
    singular = jnp.linalg.svd(update, compute_uv=False) / (0.2 * 12**0.5)
    assert float(singular.min()) > 0.6
    assert float(singular.max()) < 1.3
    # The embedding takes AdamW's first step: the sign of the gradient.
    step = (after["embedding"] - params["embedding"]) / -0.01
    np.testing.assert_allclose(step, jnp.sign(grads["embedding"]), rtol=1e-3)
