"""Train recurrent language models in JAX, from a laptop to a TPU pod.

    import jaxlm
    run = jaxlm.load_run("runs/quickstart")
    logits, state = run.model(tokens)
    [text] = jaxlm.generate(run.model, run.tokenizer, ["def "])
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "LanguageModel": "jaxlm.models.language_model",
    "ModelSettings": "jaxlm.models.language_model",
    "RunConfig": "jaxlm.config",
    "SamplingSettings": "jaxlm.inference.generate",
    "UserError": "jaxlm.schema",
    "generate": "jaxlm.inference.generate",
    "load": "jaxlm.training.load",
    "load_config": "jaxlm.training.run",
    "load_run": "jaxlm.training.load",
    "train": "jaxlm.training.loop",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    # Lazily, so that `import jaxlm.ops` needs jax alone.
    if name not in _EXPORTS:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
