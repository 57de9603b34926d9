"""Training steps compiled for TPUs by their own compiler."""

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: uv sync --extra tpu"),
]

V5E_GIB = 15.75  # what the compiler gives a program of a v5e's 16 GB


def hybrid(mixer: dict) -> dict:
    return {
        "name": "long",
        "model": {
            "vocab_size": 32_000, "width": 768, "depth": 14, "pattern": ["m", "m", "m", "attention"],
            "mixers": {"m": mixer, "attention": {"kind": "attention", "heads": 12, "kv_heads": 4}}, "remat": "full",
        },
        "data": {
            "sources": [{"kind": "python_stdlib"}], "tokenizer": {"kind": "bytes"},
            "sequence_length": 65_536, "batch_size": 1,
        },
        "train": {"loss_chunk": 2048},
        "mesh": {"data": 1, "sequence": 8},
    }  # fmt: skip


def compile_for(topology: str, config: dict) -> dict:
    command = [sys.executable, "-m", "tests.parallel.compile_for_tpu", topology, json.dumps(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("mixer", "op"),
    [
        ({"kind": "gla", "heads": 3}, "linear_attention"),
        ({"kind": "gated_deltanet", "heads": 6, "head_dim": 128, "expand_v": 1.0}, "delta_rule"),
    ],
    ids=lambda x: x["kind"] if isinstance(x, dict) else "",
)
def test_a_hybrid_trains_on_64k_tokens_split_over_eight_v5e(mixer, op):
    report = compile_for("v5e:2x4", hybrid(mixer))
    assert report["devices"] == 8
    assert 120e6 < report["parameters"] < 145e6
    assert report["peak_gib"] < V5E_GIB
    assert report["kernels"] == [f"{op}_backward", f"{op}_forward"]
    # Attention layers gather keys and values, so there is traffic; nothing is resharded token by token.
    assert "all-to-all" not in report["collectives"]
