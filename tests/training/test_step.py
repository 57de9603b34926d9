"""The training step: accumulation, clipping and sharding change nothing that they should not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import load_tokenizer, train_batches
from jaxlm.parallel.context import use_mesh
from jaxlm.training.loop import jit_train_step, prepare
from jaxlm.training.state import init_state
from tests.training.helpers import tiny_config


def run_steps(config, devices, steps=5):
    setup = prepare(config, devices=devices)
    data = config.data
    batches = train_batches(
        data, load_tokenizer(data.tokenizer), batch_size=data.batch_size, sequence_length=data.sequence_length,
        seed=config.seed, rows=setup.rows,
    )  # fmt: skip
    history = []
    with use_mesh(setup.mesh, setup.rules):
        state = init_state(setup.config.model, setup.optimizer, config.seed, setup.shardings)
        step = jit_train_step(setup)
        for _ in range(steps):
            state, metrics = step(state, setup.to_device(next(batches)))
            history.append({k: float(v) for k, v in metrics.items()})
    return history, state


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """A run that several tests compare with."""
    return run_steps(tiny_config(tmp_path_factory.mktemp("one")), jax.devices()[:1])


@pytest.fixture(scope="module")
def clipped(tmp_path_factory):
    """The first step of a run whose gradients are clipped, with a z-loss."""
    config = tiny_config(tmp_path_factory.mktemp("clipped"), optimizer={"clip": 0.01}, train={"z_loss": 0.1})
    [first], state = run_steps(config, jax.devices()[:1], steps=1)
    return first, state


@pytest.mark.parametrize("kind", ["adamw", pytest.param("lion", marks=pytest.mark.slow), "muon"])
def test_eight_devices_equal_one(tmp_path, kind, one_device):
    optimizer = {} if kind == "adamw" else {"kind": kind, "learning_rate": 1e-3}
    one, state_one = one_device
    if optimizer:
        one, state_one = run_steps(tiny_config(tmp_path, optimizer=optimizer), jax.devices()[:1])
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    many, state_many = run_steps(tiny_config(tmp_path, optimizer=optimizer, mesh=mesh), jax.devices()[:8])
    for a, b in zip(one, many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert one[-1]["loss"] < one[0]["loss"]
    kernel = state_many.params["stages"][0]["blocks"][0]["ffn"]["up"]["kernel"]
    assert kernel.shape == (32, 64)
    assert kernel.addressable_shards[0].data.shape == (16, 32)
    if kind != "lion":  # a sign flips on rounding
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state_one.params, state_many.params)


def test_a_split_sequence_trains_alike(tmp_path, one_device):
    """A hybrid whose rows are packed: documents end anywhere in the shards."""
    one, _ = one_device
    many, state = run_steps(tiny_config(tmp_path, mesh={"data": 2, "sequence": 4}), jax.devices()[:8])
    for a, b in zip(one, many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 8


def test_optimizer_moments_are_sharded_like_their_parameters(tmp_path):
    setup = prepare(tiny_config(tmp_path, mesh={"data": 2, "fsdp": 2, "tensor": 2}), devices=jax.devices()[:8])
    specs = [s.spec for s in jax.tree.leaves(setup.shardings.opt_state)]
    params = [s.spec for s in jax.tree.leaves(setup.shardings.params)]
    sharded = lambda specs: sum(any(axis for axis in spec) for spec in specs)  # noqa: E731
    # Two moments for every trained parameter.
    assert sharded(specs) == 2 * sharded(params)
    assert sharded(params) > 10


def test_accumulation_gives_the_update_of_the_whole_batch(tmp_path, one_device):
    whole, state_whole = one_device
    parts, state_parts = run_steps(tiny_config(tmp_path, train={"accumulation": 4}), jax.devices()[:1])
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"] == 8 * 32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state_whole.params, state_parts.params)


def test_metrics_are_what_they_say(clipped):
    first, _ = clipped
    # The first update of Adam has magnitude lr for every entry with a gradient, whatever the clip.
    assert first["learning_rate"] == pytest.approx(3e-3 / 2)
    assert first["loss"] == pytest.approx(np.log(320), rel=0.02)
    assert first["z_loss"] == pytest.approx(0.1 * np.log(320) ** 2, rel=0.05)
    assert first["grad_norm"] > 0.01
    assert 0 < first["update_norm"] < 0.1 * first["param_norm"]


def test_clipping_scales_gradients_to_the_limit(clipped):
    """With plain decay-free Lion the update cannot show it, so look at Adam's first moment."""
    first, state = clipped
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    norm = jnp.sqrt(sum(jnp.sum((m / 0.1) ** 2) for m in moments if float(jnp.min(m)) < 0))
    assert float(norm) == pytest.approx(0.01, rel=1e-3)
    assert first["grad_norm"] > 0.01


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"mesh": {"data": 3}}, "asks for 3 devices but 8 are available"),
        ({"mesh": {"data": 8}, "data": {"batch_size": 12}}, r"batch_size=12 / train.accumulation=1 = 12 rows do not divide"),
        (
            {"mesh": {"data": 1, "sequence": 8}, "data": {"sequence_length": 36}},
            "mesh.sequence=8 does not divide data.sequence_length=36; make the length a multiple of 8",
        ),
        ({"mesh": {"tensor": 8}, "model": {"width": 36}}, "which tensor = 8 does not divide"),
        ({"model": {"vocab_size": 100}, "mesh": {"data": 8}}, "model.vocab_size=100 is smaller than the bytes tokenizer's"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, sections, words):
    sections = {"mesh": {"data": -1}, **sections}
    with pytest.raises(Exception, match=words):
        prepare(tiny_config(tmp_path, **sections), devices=jax.devices()[:8])


def test_auxiliary_losses_train_the_router_and_are_reported_apart(tmp_path):
    mixer = {"kind": "mom", "heads": 2, "convolution": 0, "chunk_size": 8}
    model = {"width": 16, "depth": 1, "pattern": ["mom"], "mixers": {"mom": mixer}}
    losses = []
    for coefficient in (0.0, 5.0):
        model["mixers"]["mom"]["balance"] = coefficient
        metrics, _ = run_steps(tiny_config(tmp_path, model=model), jax.devices()[:1], steps=1)
        losses.append(metrics)
    # The balance is at its best, top_k, where all memories get alike.
    assert losses[0][0]["auxiliary_loss"] == 0
    assert losses[1][0]["auxiliary_loss"] >= 5.0 * 2 - 1e-3
    # The loss that is reported is the text's alone, and the same before anything was learnt.
    assert losses[0][0]["loss"] == pytest.approx(losses[1][0]["loss"], rel=1e-6)
    assert losses[0][0]["grad_norm"] < losses[1][0]["grad_norm"]
