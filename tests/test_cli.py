"""The command line as a user meets it: help, printed configs, and errors with their remedy."""

import json

import pytest

from jaxlm import cli
from jaxlm.ops import kernels


def run(capsys, *words):
    code = cli.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", ["train", "eval", "generate", "config", "doctor", "plot", "tokenize"])
def test_help_names_the_command(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"jaxlm {command}" in capsys.readouterr().out


def test_config_prints_the_resolved_quickstart_with_overrides(capsys):
    code, out, _ = run(capsys, "config", "train.steps=7", "model.mixers.gla.heads=8")
    assert code == 0
    assert "steps: 7" in out
    assert "heads: 8" in out
    assert "name: quickstart" in out


def test_config_diff(capsys):
    code, out, _ = run(capsys, "config", "hybrid-340m", "--diff", "gla-340m")
    assert code == 0
    assert "model.pattern" in out
    assert "name" in out
    assert "optimizer.learning_rate" not in out
    assert run(capsys, "config", "--diff", "quickstart")[1] == "no differences\n"


def test_settings_stand_anywhere_among_options(capsys):
    words = ("hybrid-340m", "train.steps=7", "--diff", "hybrid-340m", "model.norm_eps=1e-5")
    _, out, _ = run(capsys, "config", *words)
    assert "train.steps" in out
    assert "model.norm_eps" in out
    unknown_of = {"config --steps 7": "--steps", "config seed=1 -y seed=2": "-y seed=2", "plot a --c d": "--c d"}
    for line, unknown in unknown_of.items():
        with pytest.raises(SystemExit) as exit_:
            cli.main(line.split())
        assert exit_.value.code == 2
        assert f"unrecognized arguments: {unknown}\n" in capsys.readouterr().err


def test_config_schema_and_keys(capsys):
    code, out, _ = run(capsys, "config", "--schema")
    assert code == 0
    assert "model" in json.loads(out)["properties"]
    code, out, _ = run(capsys, "config", "--keys")
    assert code == 0
    assert "learning_rate" in out


def test_doctor_names_devices_versions_and_forms(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in ("cpu", "flax", "linear_attention, T=2048", "chunked", "tensorboard"):
        assert word in out, word


def test_doctor_knows_the_heads_of_a_model(capsys):
    words = ["model.pattern=[gla,attention]", "model.width=192", "model.mixers.gla.heads=2", "train.dtype=bfloat16"]
    with kernels.interpreted("gpu", "NVIDIA H100 80GB HBM3"):
        _, out, _ = run(capsys, "doctor", *words, "--length", "64")
        _, fits, _ = run(capsys, "doctor", *words[:1], "model.width=256", *words[2:])
    assert "  linear_attention, bfloat16, H=2, K=48, V=96, decay=vector  chunked: the GPU kernel has K in (64, 128, 256)" in out
    assert "  attention, bfloat16, K=48, V=48  chunked: cuDNN attention does not take segment ids" in out
    assert "forms of quickstart on gpu, T=64\n" in out
    assert "  linear_attention, bfloat16, H=2, K=64, V=128, decay=vector  kernel: Pallas kernel" in fits


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["doctor", "--length", "0"], "--length: a row has at least one token, not 0"),
        (["train", "model.widht=64"], "did you mean 'width'"),
        (["train", "train.steps=many"], "train.steps"),
        (["train", "quikstart"], "did you mean 'quickstart'"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "quickstart", "other.yaml"], "two configs given"),
        (["train", "model.pattern=[gla, atention]"], "did you mean 'attention'"),
        (["train", "data.sources=[{kind: text, paths: [nowhere.txt]}]", "run_directory=runs/never"], "nowhere.txt"),
        (["generate", "no-such-run"], "no-such-run: holds no config.yaml"),
        (["eval", "no-such-run"], "no run directory"),
        (["plot", "no-such-run"], "no-such-run"),
        (["tokenize", "out"], "nothing to read"),
        (["eval", "no-such-run", "--source", "{kind: jsnl}"], "jsonl"),
    ],
)
def test_bad_input_exits_2_and_names_it(capsys, words, message):
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
