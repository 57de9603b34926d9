"""Checkpoints: exact round trips, other meshes, what is kept, and damage of every kind."""

import errno
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.config import CheckpointSettings
from jaxlm.parallel.mesh import make_mesh
from jaxlm.training import checkpoint as checkpoint_lib
from jaxlm.training.checkpoint import CheckpointError, Checkpoints, restore_params
from jaxlm.training.state import TrainState

MESH_A = {"fsdp": 8}
MESH_B = {"fsdp": 4, "tensor": 2}


def make_state(step, sizes=MESH_A):
    sharding = NamedSharding(make_mesh(sizes), PartitionSpec("fsdp", "tensor"))
    everywhere = NamedSharding(make_mesh(sizes), PartitionSpec())
    kernel = jax.random.normal(jax.random.key(step), (8, 4))
    params = {
        "blocks": {0: {"kernel": jax.device_put(kernel, sharding)}, 1: {"kernel": jax.device_put(kernel * 3, sharding)}},
        "half": jax.device_put(jnp.arange(3, dtype=jnp.bfloat16) / 3, everywhere),
    }
    labels = {"blocks": {0: {"kernel": "adam"}, 1: {"kernel": "none"}}, "half": "adam"}
    optimizer = optax.partition({"adam": optax.adamw(1e-3), "none": optax.set_to_zero()}, labels)
    opt_state = jax.tree.map(lambda x: jax.device_put(x, everywhere), optimizer.init(params))
    return TrainState(jax.device_put(jnp.int32(step), everywhere), params, opt_state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def saved(tmp_path, steps=(2, 4, 6), **settings):
    with Checkpoints(tmp_path, CheckpointSettings(**{"every": 2, "keep_last": 5, **settings})) as checkpoints:
        for step in steps:
            assert checkpoints.save(step, make_state(step), {"data": {"next_index": step}})
    return tmp_path / "checkpoints"


def restore(tmp_path, sizes=MESH_A, step=None):
    with Checkpoints(tmp_path, CheckpointSettings(every=2, keep_last=5)) as checkpoints:
        return checkpoints.restore(abstract(make_state(0, sizes)), step)


def assert_state(state, step):
    expected = make_state(step)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_round_trip_is_exact_and_carries_what_was_beside_it(tmp_path):
    saved(tmp_path)
    restored = restore(tmp_path)
    assert (restored.step, restored.extra, restored.skipped) == (6, {"data": {"next_index": 6}}, [])
    assert_state(restored.state, 6)
    assert restore(tmp_path, step=4).extra == {"data": {"next_index": 4}}


def test_nothing_saved_is_none(tmp_path):
    assert restore(tmp_path) is None
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        restore_params(tmp_path)


def test_restore_onto_another_mesh(tmp_path):
    saved(tmp_path)
    restored = restore(tmp_path, MESH_B)
    kernel = restored.state.params["blocks"][0]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 2)
    assert_state(restored.state, 6)


def test_params_alone_on_one_device(tmp_path):
    saved(tmp_path)
    params, extra, step = restore_params(tmp_path)
    assert (step, extra) == (6, {"data": {"next_index": 6}})
    expected = make_state(6).params
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    np.testing.assert_array_equal(params["blocks"][1]["kernel"], expected["blocks"][1]["kernel"])
    assert params["half"].dtype == jnp.bfloat16
    assert {d for leaf in jax.tree.leaves(params) for d in leaf.devices()} == {jax.devices()[0]}
    np.testing.assert_array_equal(restore_params(tmp_path, 2)[0]["half"], expected["half"])
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are 2, 4, 6"):
        restore_params(tmp_path, 3)


def test_saving_follows_the_settings(tmp_path):
    with Checkpoints(tmp_path, CheckpointSettings(every=2, keep_last=1, keep_every=4)) as checkpoints:
        for step in range(1, 8):
            assert checkpoints.save(step, make_state(step), {}) == (step % 2 == 0)
        assert checkpoints.save(7, make_state(7), {}, force=True)
        checkpoints.wait()
        assert not checkpoints.save(7, make_state(7), {}, force=True)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "7"]


def remove_metadata(step):
    (step / "_CHECKPOINT_METADATA").unlink()


def empty_the_folder(step):
    shutil.rmtree(step)
    step.mkdir()


def remove_params(step):
    shutil.rmtree(step / "params")


def truncate_data(step):
    for path in step.rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bytes(step):
    """A byte changed in the middle of every data file: only a checksum can tell."""
    for path in step.rglob("*"):
        if path.is_file() and "/d/" in str(path):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [remove_metadata, empty_the_folder, remove_params, truncate_data, flip_bytes])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, damage):
    folder = saved(tmp_path)
    damage(folder / "6")
    restored = restore(tmp_path)
    assert restored.step == 4
    [(step, reason)] = restored.skipped
    assert step == 6
    assert reason
    assert_state(restored.state, 4)
    # Nothing is deleted, and training can write that step anew.
    assert (folder / "6.damaged").is_dir()
    with Checkpoints(tmp_path, CheckpointSettings(every=2, keep_last=5)) as checkpoints:
        assert checkpoints.save(6, make_state(6), {"data": {"next_index": 6}})
    assert restore(tmp_path).step == 6


def test_loading_params_also_reads_past_damage(tmp_path, capsys):
    folder = saved(tmp_path)
    truncate_data(folder / "6")
    assert restore_params(tmp_path)[2] == 4
    assert "checkpoint 6 cannot be read" in capsys.readouterr().err
    assert (folder / "6").is_dir()


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    folder = saved(tmp_path, steps=(2, 4))
    remove_metadata(folder / "2")
    remove_metadata(folder / "4")
    with pytest.raises(CheckpointError, match="no checkpoint can be read:\n  4: it was not finished\n  2:"):
        restore(tmp_path)


def test_a_damaged_step_that_was_asked_for_is_an_error(tmp_path):
    folder = saved(tmp_path)
    remove_params(folder / "6")
    with pytest.raises(CheckpointError, match="6 cannot be read"):
        restore(tmp_path, step=6)


def test_a_full_disk_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    folder = saved(tmp_path, steps=(2,))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"checkpoint 4 was not written: no space left under .*good checkpoint is .*/2\."):  # noqa: SIM117
        with Checkpoints(tmp_path, CheckpointSettings(every=2)) as checkpoints:
            monkeypatch.setattr(checkpoints._checkpointer, "save_checkpointables_async", full)
            checkpoints.save(4, make_state(4), {})
    assert checkpoint_lib._steps(folder) == [2]
    assert restore(tmp_path).step == 2
