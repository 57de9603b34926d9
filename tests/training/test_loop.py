"""Whole runs through the command line: resume, signals, other meshes, several processes, and what goes wrong."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import cli
from jaxlm.config_loading import to_yaml
from jaxlm.schema import UserError
from jaxlm.training import loop
from jaxlm.training.metrics import read_metrics
from tests.training.helpers import tiny_config, write_corpus


def train_lines(run_dir):
    return {line["step"]: line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line}


def losses(run_dir):
    return {step: (line["loss"], line["grad_norm"]) for step, line in train_lines(run_dir).items()}


def held_out(run_dir):
    return [line["held_out_loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "held_out_loss" in line]


def config_file(tmp_path, name="tiny", **sections):
    path = tmp_path / f"{name}.yaml"
    path.write_text(to_yaml(tiny_config(tmp_path, **{"mesh": MESH, **sections})))
    return str(path)


def spawn(arguments, devices=1, interrupt=None, **environment):
    module = ["jaxlm.cli"] if interrupt is None else ["tests.training.interrupted", *interrupt]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", *module, *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


# Parameters are in parts, so that checkpoints are, too, those of two processes in parts of both.
MESH = {"data": 1, "fsdp": -1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run that several tests compare with."""
    tmp_path = tmp_path_factory.mktemp("finished")
    result = loop.train(tiny_config(tmp_path, mesh=MESH, sample={"prompt": "def", "tokens": 5}))
    return tmp_path, result


def test_a_run_leaves_what_it_promises(finished, capsys):
    tmp_path, result = finished
    run_dir = tmp_path / "run"
    assert result.run_directory == run_dir
    lines = read_metrics(run_dir / "metrics.jsonl")
    for name in ("step", "loss", "learning_rate", "grad_norm", "update_norm", "tokens_per_second", "mfu"):
        assert name in lines[0], name
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    [last] = [line for line in lines if "held_out_loss" in line]
    assert last["held_out_loss"] == result.held_out_loss
    # One token is one byte, and a document's first token stands for none.
    assert last["bits_per_byte"] == pytest.approx(result.held_out_loss / math.log(2), rel=0.1)
    assert last["bits_per_byte"] > result.held_out_loss / math.log(2)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["3", "6"]
    assert jaxlm.training.run.read_config(run_dir).model.vocab_size == 320
    assert json.loads((run_dir / "versions.json").read_text())["jax"] == jax.__version__
    assert len(result.sample) >= 1


def test_load_gives_a_model_on_one_device_that_scores_like_the_run(finished, capsys):
    tmp_path, result = finished
    model = jaxlm.load(tmp_path / "run")
    assert model.embedding.table[...].devices() == {jax.devices()[0]}
    logits, _ = model(jnp.asarray([[256, 100, 101]]))
    assert logits.shape == (1, 3, 320)
    earlier = jaxlm.load(tmp_path / "run", step=3)
    assert not jnp.array_equal(earlier.embedding.table[...], model.embedding.table[...])
    assert cli.main(["eval", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 6
    assert found["held_out_loss"] == pytest.approx(result.held_out_loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(result.held_out_loss), rel=1e-4)


def test_eval_on_other_text(finished, tmp_path, capsys):
    run_tmp, _ = finished
    text = tmp_path / "other.txt"
    text.write_text("some other text\n" * 20)
    assert cli.main(["eval", str(run_tmp / "run"), "--text", str(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held_out_tokens"] == 320
    assert found["bits_per_byte"] == pytest.approx(found["held_out_loss"] / math.log(2), rel=0.02)


def test_generate_needs_the_run_directory_alone(finished, capsys):
    tmp_path, _ = finished
    arguments = ["generate", str(tmp_path / "run"), "--prompt", "def f", "--max-tokens", "8", "--temperature", "0"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("def f")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert cli.main([*arguments, "--prompt", "return"]) == 0
    assert capsys.readouterr().out.startswith("--- 1 of 2\ndef f")


def test_a_finished_run_says_so(finished, capsys):
    tmp_path, result = finished
    again = loop.train(tiny_config(tmp_path, mesh=MESH, sample={"prompt": "def", "tokens": 5}))
    assert "already complete" in capsys.readouterr().err
    assert again.held_out_loss == result.held_out_loss


def test_another_config_is_refused_and_nothing_is_touched(finished, capsys):
    tmp_path, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    other = config_file(tmp_path, "other", optimizer={"learning_rate": 1e-2}, seed=3)
    assert cli.main(["train", other]) == 2
    message = capsys.readouterr().err
    assert "optimizer.learning_rate" in message
    assert "seed" in message
    assert "--accept-changes" in message
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_resume_after_a_kill_equals_an_uninterrupted_run_bitwise(finished, tmp_path):
    whole, _ = finished
    write_corpus(tmp_path / "corpus")
    # Written in the foreground, so that the checkpoint of step 3 is there when the process dies.
    config = config_file(tmp_path, checkpoint={"every": 3, "asynchronous": False})
    process = spawn(["train", config], devices=8, interrupt=("SIGKILL", "5"))
    _, err = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, err
    assert 5 in losses(tmp_path / "run")
    assert 6 not in losses(tmp_path / "run")
    process = spawn(["train", config], devices=8)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "resumed from step 3" in err
    assert losses(tmp_path / "run") == losses(whole / "run")
    assert held_out(tmp_path / "run") == held_out(whole / "run")


def test_sigterm_saves_leaves_nonzero_and_resumes_bitwise(finished, tmp_path):
    whole, _ = finished
    write_corpus(tmp_path / "corpus")
    config = config_file(tmp_path)
    process = spawn(["train", config], devices=8, interrupt=("SIGTERM", "4"))
    _, err = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopped by signal 15 after step 5" in err
    assert "Traceback" not in err
    result = loop.train(jaxlm.load_config(config).config)
    assert result.step == 6
    assert losses(tmp_path / "run") == losses(whole / "run")


def test_restore_onto_another_mesh(finished, tmp_path, capsys):
    whole, _ = finished
    shutil.copytree(whole / "run", tmp_path / "run")
    expected = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    loop.train(tiny_config(whole, run_directory=str(tmp_path / "run"), mesh={"data": 1, "fsdp": 4, "tensor": 2}))
    assert "resumed from step 3" in capsys.readouterr().err
    found = losses(tmp_path / "run")
    for step in range(1, 7):
        assert found[step][0] == pytest.approx(expected[step][0], rel=1e-5)


def test_two_processes_equal_one(finished, tmp_path):
    whole, _ = finished
    write_corpus(tmp_path / "corpus")
    config = config_file(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    workers = [
        spawn(["train", config], devices=4, JAX_PROCESS_ID=str(i), **shared) for i in range(2)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    found, expected = losses(tmp_path / "run"), losses(whole / "run")
    assert found.keys() == expected.keys()
    for step in expected:
        # Partial sums of other sizes: the losses agree to rounding, gradients' norms less closely.
        np.testing.assert_allclose(found[step][0], expected[step][0], rtol=1e-5)
        np.testing.assert_allclose(found[step][1], expected[step][1], rtol=1e-3)
    assert "parameters" in outputs[0][1]
    assert "parameters" not in outputs[1][1]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    original = loop.jit_train_step

    def poisoned(setup):
        step = original(setup)

        # Outside the compiled step, which is that of the other runs.
        def train_step(state, batch):
            return step(state, {**batch, "weights": batch["weights"] * (jnp.nan if state.step == 4 else 1)})

        return train_step

    monkeypatch.setattr(loop, "jit_train_step", poisoned)
    with pytest.raises(loop.TrainingDiverged, match=r"step 5: loss nan.*last good checkpoint is .*checkpoints/3"):
        loop.train(tiny_config(tmp_path, mesh=MESH))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]


def test_bad_data_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="sequence_length"):
        loop.train(tiny_config(tmp_path, data={"sequence_length": 100_000}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        loop.train(tiny_config(tmp_path, data={"sources": [{"kind": "text", "paths": [str(tmp_path / "empty")]}]}))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no config.yaml"):
        loop.train(tiny_config(tmp_path))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]
