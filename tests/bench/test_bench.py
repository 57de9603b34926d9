"""The benchmarks at their smallest: what they measure is not asserted, that they measure and keep it is."""

import json
import multiprocessing
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.bench import kernel_times, kernels, mixers, report, tasks, training
from jaxlm.cli import main
from jaxlm.ops import forms
from jaxlm.schema import UserError
from jaxlm.training.run import load_config


def test_mixers_compares_forms_of_one_run(tmp_path, capsys):
    ops = ["linear_attention-scalar", "attention"]
    shape = mixers.Shape(B=1, H=2, K=8, V=8)
    # The scores of attention at the larger length exceed the memory allowed.
    result = mixers.run(tmp_path, ops=ops, lengths=[64, 512], shape=shape, rounds=2, memory_gib=1e-3)
    assert json.loads((tmp_path / "mixers.json").read_text()) == result
    rows = {(row["op"], row["form"], row["T"]): row for row in result["rows"]}
    assert len(rows) == 2 * 3 * 2
    small = rows["linear_attention-scalar", "chunked", 64]
    assert small["input_bytes"] == 64 * 2 * (3 * 8 + 1) * 4
    baseline = rows["linear_attention-scalar", "recurrent", 64]
    assert baseline["both_speedup"] == 1
    # A median of ratios lies between the extremes of two rounds.
    assert 0.1 < small["both_speedup"] / (baseline["both_ms"] / small["both_ms"]) < 10
    skipped = rows["attention", "parallel", 512]
    assert "both_ms" not in skipped
    assert "GiB" in skipped["both_skipped"]
    assert "chunked" in capsys.readouterr().out
    assert result["environment"]["devices"].startswith("8 x")


# Ops that share the forms of another.
FORMS_OF = {
    "moneta": "miras", "yaad": "miras", "memora": "miras", "diagonal_ssm": "diagonal_recurrence",
    "selective_scan": "diagonal_recurrence",
}  # fmt: skip


def test_every_op_has_a_line_with_its_forms():
    ops = {line.op.__name__ for line in mixers.OPS.values()}
    assert ops == set(FORMS_OF) | (set(forms.OPS) - {"miras"})
    for name, line in mixers.OPS.items():
        known = set(forms.OPS[FORMS_OF.get(line.op.__name__, line.op.__name__)]) - {"kernel"}
        # Decays that change in time, as all but diagonal_ssm's do here, have no convolution.
        assert set(line.forms) == known - (set() if name == "diagonal_ssm" else {"fft"}), name


@pytest.mark.slow
@pytest.mark.parametrize("name", mixers.OPS)
def test_every_line_can_be_timed(name):
    line = mixers.OPS[name]
    arrays = line.arrays(mixers.Shape(B=1, H=2, K=8, V=8), 8, jnp.dtype("float32"))
    for form in line.forms:
        gradients = jax.jit(mixers.function(line.op, form, "both"))(arrays)
        assert jax.tree.structure(gradients) == jax.tree.structure(arrays)
        assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(gradients)), form


def test_an_update_keeps_the_other_ops_of_a_like_file(tmp_path):
    settings = {"lengths": [32], "shape": mixers.Shape(B=1, H=1, K=8, V=8), "rounds": 1}
    mixers.run(tmp_path, ops=["diagonal_recurrence", "linear_attention"], forms=["chunked"], **settings)
    before = report.read_json(tmp_path / "mixers.json")["rows"]
    result = mixers.run(tmp_path, ops=["diagonal_recurrence"], forms=["recurrent"], update=True, **settings)
    assert result == report.read_json(tmp_path / "mixers.json")
    # In the order of the table, whatever was measured first.
    assert [(row["op"], row["form"]) for row in result["rows"]] == [
        ("linear_attention", "chunked"), ("diagonal_recurrence", "recurrent")
    ]  # fmt: skip
    assert result["rows"][0] == next(row for row in before if row["op"] == "linear_attention")
    with pytest.raises(UserError, match="--update: .* was measured with rounds 1 there, 2 here: .* measure all ops"):
        mixers.run(tmp_path, ops=["attention"], update=True, **{**settings, "rounds": 2})
    other = {**result, "environment": {**result["environment"], "jax": "0.11"}}
    report.write_json(tmp_path / "mixers.json", other)
    with pytest.raises(UserError, match="jax 0.11 there"):
        mixers.run(tmp_path, ops=["attention"], update=True, **settings)
    # Without the option the file is the run.
    [row] = mixers.run(tmp_path, ops=["diagonal_recurrence"], forms=["recurrent"], **settings)["rows"]
    assert row["op"] == "diagonal_recurrence"


def test_parallel_forms_without_scores_are_not_said_to_have_them(tmp_path):
    shape = mixers.Shape(B=1, H=1, K=8, V=8)
    result = mixers.run(tmp_path, ops=["diagonal_recurrence", "attention"], forms=["parallel"], lengths=[256], shape=shape,
                        rounds=1, memory_gib=2.0**-13)  # fmt: skip
    elementwise, attention = result["rows"]
    assert "forward_ms" in elementwise
    assert attention["forward_skipped"].startswith("scores")


def test_unknown_names_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="--ops: 'delta_rul' is not there; did you mean 'delta_rule'"):
        mixers.run(tmp_path, ops=["delta_rul"])
    with pytest.raises(UserError, match="--tasks: 'parrity' is not there; did you mean 'parity'"):
        tasks.run(tmp_path, tasks=["parrity"])
    with pytest.raises(UserError, match="--seeds 0"):
        tasks.run(tmp_path, seeds=0)
    with pytest.raises(UserError, match="--jobs 0"):
        tasks.run(tmp_path, jobs=0)
    (tmp_path / "tasks.json").write_text("{")
    with pytest.raises(UserError, match="is not a result of a benchmark"):
        tasks.run(tmp_path, mixers=["gla"], tasks=["parity"])


@pytest.mark.slow
def test_tasks_in_processes_train_the_same(tmp_path):
    scale = SCALE._replace(steps=3)
    alone = tasks.train_cell("gla", "parity", 0, scale)
    cells = tasks.run(tmp_path, mixers=["linear", "gla"], tasks=["parity"], scale=scale, jobs=2)["cells"]
    assert [cell["mixer"] for cell in cells] == ["gla", "linear"]  # whichever is done first
    assert json.loads((tmp_path / "tasks.json").read_text())["cells"] == cells
    assert (cells[0]["loss"], cells[0]["accuracy"]) == (alone["loss"], alone["accuracy"])


def test_processes_take_the_gpus_in_turn(monkeypatch):
    assert tasks._gpu_names(3) == []
    monkeypatch.setattr(tasks.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(tasks.jax, "local_device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert tasks._gpu_names(3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    names = multiprocessing.get_context("spawn").SimpleQueue()
    names.put(tasks._gpu_names(2)[1])
    tasks._take_gpu(names)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    tasks._take_gpu(names)  # none left: as it was
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


SCALE = tasks.Scale(width=16, depth=1, batch=16, steps=60, learning_rate=1e-2, test_examples=32, pool=64)


def test_tasks_trains_tests_keeps_and_goes_on(tmp_path, monkeypatch, capsys):
    # One token says it all: after a few steps every mixer knows the next.
    echo = tasks.Task(lambda rng, n, size: identity(rng, n, size), 4, (4, 8), (8, 16), 0.25)
    monkeypatch.setitem(tasks.TASKS, "echo", echo)
    result = tasks.run(tmp_path, mixers=["gla"], tasks=["echo"], scale=SCALE)
    [cell] = result["cells"]
    assert set(cell["accuracy"]) == {"8", "16"}
    assert cell["accuracy"]["8"] > 0.95
    assert json.loads((tmp_path / "tasks.json").read_text()) == result
    assert "8/16" in capsys.readouterr().out

    trained = []
    train = tasks.train_cell
    monkeypatch.setattr(tasks, "train_cell", lambda *args: (trained.append(args[0]), train(*args))[1])
    again = tasks.run(tmp_path, mixers=["gla", "linear"], tasks=["echo"], scale=SCALE)
    assert trained == ["linear"]
    assert again["cells"][0] == cell
    tasks.run(tmp_path, mixers=["gla"], tasks=["echo"], scale=SCALE, force=True)
    assert trained == ["linear", "gla"]


def identity(rng, count, size):
    tokens = rng.integers(4, size=(count, size))
    return tasks.Examples(tokens, tokens, np.ones_like(tokens, bool))


def test_accuracy_counts_asked_positions_and_accepted_answers():
    tokens = np.zeros((2, 3), int)
    targets, mask = np.array([[1, 2, 3], [1, 2, 3]]), np.array([[True, True, False], [False, True, True]])
    accepted = np.zeros((2, 3, 4), bool)
    accepted[..., 2] = True
    scale = SCALE._replace(test_examples=2, batch=1)
    answer = lambda tokens: np.full(tokens.shape, 2)  # noqa: E731
    task = tasks.Task(lambda *_: tasks.Examples(tokens, targets, mask), 4, (3, 3), (3,), 0.25)
    assert tasks.accuracy(answer, task, "x", 3, scale) == 2 / 4
    task = task._replace(generate=lambda *_: tasks.Examples(tokens, targets, mask, accepted))
    assert tasks.accuracy(answer, task, "x", 3, scale) == 1.0


def test_models_that_diverged_have_no_accuracy(tmp_path, monkeypatch, capsys):
    echo = tasks.Task(lambda rng, n, size: identity(rng, n, size), 4, (4, 8), (8, 16), 0.25)
    monkeypatch.setitem(tasks.TASKS, "echo", echo)
    result = tasks.run(tmp_path, mixers=["linear"], tasks=["echo"], scale=SCALE._replace(learning_rate=1e38))
    assert result["cells"][0]["loss"] is None
    assert "NaN" not in (tmp_path / "tasks.json").read_text()
    assert "loss not finite" in capsys.readouterr().err
    assert tasks.table(result)[2] == [["linear", "diverged"]]
    # Another seed that did not says what the mixer can learn.
    other = result["cells"][0] | {"seed": 1, "loss": 0.5, "accuracy": {"8": 0.5, "16": 0.25}}
    for cells in ([*result["cells"], other], [other, *result["cells"]]):
        assert tasks.table(result | {"cells": cells})[2] == [["linear", "50/25"]]


def test_training_examples_have_all_sizes_in_equal_shares():
    task = tasks.Task(identity, 4, (1, 16), (16,), 0.25)
    marked = task._replace(generate=lambda rng, n, size: identity(rng, n, size)._replace(tokens=np.full((n, size), size)))
    tokens = tasks._Batches(marked, "x", 0, SCALE._replace(pool=66)).pool[0]
    assert tokens.shape == (66, 16)
    sizes, counts = np.unique(tokens[:, 0], return_counts=True)
    assert dict(zip(sizes.tolist(), counts.tolist(), strict=True)) == {2: 17, 4: 17, 8: 16, 16: 16}


def test_every_mixer_that_stands_alone_has_a_model():
    names = tasks.mixer_names()
    assert {"attention", "gla", "deltanet-negative"} <= set(names)
    assert not {"gmu", "cross_attention"} & set(names)
    for name in names:
        assert tasks.model_settings(name, 20, tasks.QUICK).width == 64


def test_json_is_written_whole(tmp_path):
    report.write_json(tmp_path / "deep" / "x.json", {"a": 1})
    assert report.read_json(tmp_path / "deep" / "x.json") == {"a": 1}
    assert report.read_json(tmp_path / "none.json") is None
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_command_line_names_the_benchmarks():
    done = subprocess.run([sys.executable, "-m", "jaxlm.cli", "bench", "--help"], capture_output=True, text=True, check=True)
    assert "mixers" in done.stdout
    assert "tasks" in done.stdout


def test_a_form_without_memory_is_left_out_and_the_rest_measured(tmp_path, monkeypatch):
    compile_form = mixers._compile

    def compile_or_fail(op, form, kind, arrays):
        if form == "recurrent":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16.02GiB")
        if form == "parallel":
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
        return compile_form(op, form, kind, arrays)

    monkeypatch.setattr(mixers, "_compile", compile_or_fail)
    settings = {"ops": ["linear_attention"], "lengths": [32], "shape": mixers.Shape(B=1, H=1, K=8, V=8), "rounds": 1}
    result = mixers.run(tmp_path, forms=["recurrent", "chunked"], **settings)
    recurrent, chunked = result["rows"]
    assert recurrent["both_skipped"] == "out of memory"
    assert chunked["both_ms"] > 0
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        mixers.run(tmp_path, forms=["parallel"], **settings)


def test_times_of_kernels_are_ratios_to_the_kernel_beside_the_floor():
    row = {"op": "linear_attention", "decay": "scalar", "B": 4, "T": 8192, "floor_ms": 0.25}
    rows = [
        row | {"direction": "forward", "form": "kernel", "ms": 0.5},
        row | {"direction": "forward", "form": "chunked", "ms": 4.0, "over_kernel": 8.0},
        row | {"direction": "forward", "form": "peer", "ms": None, "error": "does not run"},
    ]
    result = {"environment": {"device": "H100"}, "settings": {"H": 16}, "copy_tb_s": 2.9, "rows": rows}
    _, columns, lines = kernel_times.table(result)
    assert columns[4:] == ["kernel", "chunked", "peer", "floor"]
    assert lines == [["linear_attention-scalar", "forward", "4", "8192", "0.500", "4.000 (8.00x)", "failed", "0.250"]]


def test_peers_are_timed_beside_the_kernel_and_their_versions_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_times, "kernel_names", lambda chip: ["delta_rule-none"])
    monkeypatch.setattr(kernel_times, "bandwidth", lambda: 2.9)
    monkeypatch.setattr(kernel_times, "inputs", lambda *args: ())
    monkeypatch.setattr(kernel_times, "_time", lambda op, decay, form, *rest: 0.5 if form == "kernel" else 1.0)
    for module, versions in (("jla", {"jax-linear-attention": "0.1.0"}), ("fla", {"fla-core": "0.6.0", "triton": "3.6.0"})):
        monkeypatch.setattr(kernel_times.importlib.util, "find_spec", lambda name, module=module: name == module or None)
        monkeypatch.setattr(kernel_times, "_peers", lambda versions=versions: versions)
        monkeypatch.setattr(kernel_times, "draw", lambda *args: False)
        T = {"jla": 2048, "fla": 4096}[module]
        result = kernel_times.run(tmp_path, lengths=[T], tokens=8192, forms=["kernel"])
    forward = [row for row in result["rows"] if row["direction"] == "forward"]
    found = [(row["B"], row["T"], row["form"], row.get("over_kernel")) for row in forward]
    assert found == [
        (4, 2048, "kernel", None), (4, 2048, "jax-linear-attention", 2.0), (2, 4096, "kernel", None), (2, 4096, "fla", 2.0)
    ]  # fmt: skip
    assert result["settings"]["tokens"] == 8192
    versions = {name: result["environment"].get(name) for name in kernel_times.PEERS}
    assert versions == {"jax-linear-attention": "0.1.0", "fla-core": "0.6.0", "torch": None, "triton": "3.6.0"}
    assert json.loads((tmp_path / "times.json").read_text()) == result


def test_times_of_several_runs_are_joined_with_the_ratios_of_each(tmp_path):
    row = {"op": "delta_rule", "decay": "none", "direction": "forward", "B": 4, "T": 8192, "floor_ms": 0.25}
    settings = {"environment": {"device": "H100", "jax": "1"}, "settings": {"H": 16}, "copy_tb_s": 2.9}
    runs = {
        "a": [row | {"form": "kernel", "ms": 0.5}, row | {"form": "chunked", "ms": 4.0}],
        "b": [row | {"form": "kernel", "ms": 0.4}, row | {"form": "peer", "ms": 0.8, "over_kernel": 2.0}],
        "c": [
            row | {"form": "chunked", "ms": None, "error": "fails"},
            row | {"form": "kernel", "ms": 0.3, "T": 2048},
            row | {"form": "peer", "ms": None, "error": "fails", "T": 2048},
        ],
    }
    of_peers = {"a": {}, "b": {"triton": "3.6.0"}, "c": {"fla-core": "0.6.0", "triton": "3.6.0"}, "f": {"triton": "3.7.1"}}
    for name, versions in of_peers.items():
        run = settings | {"environment": settings["environment"] | versions, "rows": runs.get(name, [])}
        report.write_json(tmp_path / name / "times.json", run)
    main(["bench", "kernels", "--merge", f"{tmp_path}/a,{tmp_path}/b/times.json,{tmp_path}/c", "-o", str(tmp_path / "out")])
    joined = json.loads((tmp_path / "out/times.json").read_text())
    found = {(row["T"], row["form"]): (row["ms"], row.get("over_kernel")) for row in joined["rows"]}
    assert list(found.items()) == [
        ((2048, "kernel"), (0.3, None)), ((2048, "peer"), (None, None)),
        ((8192, "kernel"), (0.4, None)), ((8192, "chunked"), (4.0, 8.0)), ((8192, "peer"), (0.8, 2.0)),
    ]  # fmt: skip
    assert joined["environment"] == {"device": "H100", "jax": "1", "triton": "3.6.0", "fla-core": "0.6.0"}
    with pytest.raises(UserError, match="f/times.json is of triton 3.7.1, not of 3.6.0"):
        kernel_times.merge(tmp_path / "out", [tmp_path / "b", tmp_path / "f"])
    report.write_json(tmp_path / "d/times.json", settings | {"settings": {"H": 8}, "rows": []})
    with pytest.raises(UserError, match="d/times.json is of .*'H': 8.* not of .*'H': 16"):
        kernel_times.merge(tmp_path / "out", [tmp_path / "a", tmp_path / "d"])
    with pytest.raises(UserError, match="--merge: there is no .*e/times.json"):
        kernel_times.merge(tmp_path / "out", [tmp_path / "e"])


def test_gpu_kernels_are_listed_one_by_one_under_their_roofline():
    found = [
        {"name": f"delta_rule_{name}", "registers": 100, "spill_bytes": n, "smem_bytes": 2048, "operand_bytes": 3_000_000}
        for n, name in enumerate(("inverses", "forward"))
    ]
    row = {"op": "delta_rule", "decay": "none", "direction": "forward", "kernels": found, "roofline_ms": 0.2, "floor_ms": 0.1}
    _, columns, lines = kernels.gpu_table({"environment": {"jax": "1"}, "settings": {"B": 1}, "gpu_rows": [row]})
    assert len(columns) == len(lines[0])
    assert lines[0] == ["delta_rule-none", "forward", "inverses", "100", "0", "2.0", "3", "0.200", "0.100", "50%"]
    assert lines[1] == ["delta_rule-none", "forward", "forward", "100", "1", "2.0", "3", "", "", ""]


def test_kernels_of_a_chip_need_its_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="kernels are compiled by libtpu, which is not installed: pip install"):
        kernels.run(tmp_path)
    with pytest.raises(UserError, match="kernels for h100 are compiled by jax-cuda13-plugin"):
        kernels.run(tmp_path, chips=["h100"])
    with pytest.raises(UserError, match="--chips: 'h10' is not there; did you mean 'h100'"):
        kernels.run(tmp_path, chips=["h10"])


def test_times_need_a_chip_with_kernels(tmp_path):
    assert kernel_times.kernel_names("NVIDIA H100 80GB HBM3") == [
        "linear_attention-none", "linear_attention-scalar", "linear_attention-vector",
        "delta_rule-none", "delta_rule-scalar", "delta_rule-vector", "diagonal_recurrence-vector",
    ]  # fmt: skip
    with pytest.raises(UserError, match="no GPU kernel runs on cpu"):
        kernel_times.run(tmp_path)


def test_training_takes_the_largest_batch_that_fits_and_keeps_other_configs(tmp_path, monkeypatch):
    words = ["model.width=32", "model.depth=1", "model.pattern=[gla]", "model.mixers={gla: {kind: gla, heads: 1}}"]
    config = load_config(None, [*words, "data.sequence_length=32", "name=small"]).config
    measured = training.measure(config, steps=2, groups=2)
    assert measured["kernel_calls"] == 0  # of a CPU
    assert len(measured["losses"]) == 2 + 2 * 2
    assert measured["losses"] == sorted(measured["losses"], reverse=True)  # one batch, learnt by heart
    assert measured["tokens_per_second"] == pytest.approx(config.tokens_per_step / measured["seconds"])
    tried = []

    def with_little_memory(config, *, steps, groups=5):
        rows = config.data.batch_size
        choice = forms.choose("linear_attention", "auto", T=32, dtype="bfloat16", platform="tpu", chip="TPU v5 lite")
        tried.append((choice.form, rows))
        if rows > (32 if choice.form == "kernel" else 16):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return measured

    monkeypatch.setattr(training, "measure", with_little_memory)
    (tmp_path / "training.json").write_text(json.dumps({"runs": [{"config": "other", "tokens_a_row": 8, "environment": {
        "devices": "1 x H100"}, "kernels": True, "rows": 1, "seconds": 1.0, "tokens_per_second": 8.0, "mfu": 0.5,
        "peak_bytes": None, "kernel_calls": 3}]}))  # fmt: skip
    result = training.run(tmp_path, config, rows=[16, 64, 32], steps=1)
    forms_tried, rows_tried = zip(*tried, strict=True)
    assert forms_tried == ("kernel",) * 2 + ("chunked",) * 3 + ("kernel",)
    assert rows_tried == (64, 32, 64, 32, 16, 16)
    found = [(one["config"], one["kernels"], one["rows"]) for one in result["runs"]]
    assert found == [("other", True, 1), ("small", True, 32), ("small", False, 16), ("small", True, 16)]
    assert json.loads((tmp_path / "training.json").read_text()) == result
    # Once more: what is there of the same config, device and batch is replaced.
    measured["seconds"] /= 2
    seconds = [one["seconds"] for one in training.run(tmp_path, config, rows=[16], steps=1)["runs"]]
    assert seconds == [1.0, 2 * measured["seconds"], measured["seconds"], measured["seconds"]]
    with pytest.raises(UserError, match="small does not fit this device's memory with 64 rows of 32 tokens"):
        training.run(tmp_path, config, rows=[64])
    tried.clear()
    training.run(tmp_path, config, rows=[64, 32, 16], kernels_only=True)
    assert tried == [("kernel", 64), ("kernel", 32)]
