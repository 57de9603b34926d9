"""A run small enough for tests."""

import textwrap

from jaxlm.config import RunConfig

DOCUMENT = "def f{i}(x):\n    return x * {i} + {j}\n\n"


def write_corpus(directory, documents=60):
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        text = "".join(DOCUMENT.format(i=i, j=j) for j in range(1 + i % 7))
        (directory / f"{i:03}.py").write_text(textwrap.dedent(text))
    return directory


def tiny_config(tmp_path, **sections) -> RunConfig:
    """A hybrid of 2 blocks on a few kilobytes of generated text; keyword arguments update a section."""
    corpus = tmp_path / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    config = {
        "name": "tiny",
        "run_directory": str(tmp_path / "run"),
        "model": {
            "width": 32, "depth": 2, "pattern": ["gla", "attention"],
            "mixers": {
                "gla": {"kind": "gla", "heads": 2, "convolution": 4, "chunk_size": 16},
                "attention": {"kind": "attention", "heads": 4, "kv_heads": 2},
            },
            "ffn": {"hidden": 64},
        },
        "data": {
            "sources": [{"kind": "text", "paths": [str(corpus)]}],
            "tokenizer": {"kind": "bytes"}, "held_out_fraction": 0.2, "sequence_length": 32, "batch_size": 8,
        },
        "optimizer": {"kind": "adamw", "learning_rate": 3e-3, "schedule": {"kind": "cosine", "warmup_steps": 2}},
        "train": {"steps": 6, "log_every": 1},
        "evaluation": {"tokens": 2048},
        "checkpoint": {"every": 3},
        "mesh": {"data": -1},
    }  # fmt: skip
    for name, changes in sections.items():
        config[name] = {**config[name], **changes} if isinstance(config.get(name), dict) else changes
    return RunConfig.model_validate(config)
