"""A run directory: which config it holds, and what else lies in it.

    RUN/config.yaml      the resolved config
    RUN/versions.json    packages and devices of the last start
    RUN/tokenizer.json   a copy, where the tokenizer is a file
    RUN/metrics.jsonl    one JSON object a line
    RUN/checkpoints/     one folder a step
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils

import jaxlm
from jaxlm.config import OPERATIONAL, RunConfig
from jaxlm.config_loading import diff, format_diff, load, to_yaml
from jaxlm.schema import UserError, did_you_mean

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Versions of what determines a run's numbers, and the devices."""
    found = {"python": platform.python_version(), "jaxlm": jaxlm.__version__}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    found["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return found


def read_config(run_dir: Path) -> RunConfig:
    """The resolved config of an existing run.

    Raises:
      UserError: if the directory holds no run.
    """
    path = Path(run_dir) / CONFIG
    if not path.is_file():
        raise UserError(f"{run_dir}: holds no {CONFIG}, so it is no run directory; give the one that `jaxlm train` printed")
    return load(RunConfig, path).config


def builtin_configs() -> Path:
    """The folder of configs that come with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def load_config(path: str | None = None, overrides: Sequence[str] = ()) -> Loaded[RunConfig]:
    """A run's config from a YAML file or the name of a built-in one (None: quickstart), and `key=value` overrides.

    Raises:
      UserError: for files, keys or values that are wrong; every problem at once.
    """
    name = path or "quickstart"
    builtin = builtin_configs() / f"{name}.yaml"
    if path is None or (not Path(path).exists() and builtin.is_file()):
        return load(RunConfig, builtin, overrides)
    if not Path(path).exists() and not path.endswith((".yaml", ".yml")):
        known = sorted(p.stem for p in builtin_configs().glob("*.yaml"))
        hint = f"{did_you_mean(path, known)} (built in: {', '.join(known)})"
        raise UserError(f"{path}: no such file, and no built-in config of that name{hint}")
    return load(RunConfig, path, overrides)


def open_run(config: RunConfig, *, accept_changes: bool = False) -> list[str]:
    """Create the run directory, or check that it holds the same run; writes nothing where it does not.

    Returns:
      Notes on operational settings that differ from last time.

    Raises:
      UserError: if the directory holds another config (says which fields differ), or is not a run directory.
    """
    run_dir = config.directory
    notes: list[str] = []
    path = run_dir / CONFIG
    if path.is_file():
        differences = diff(read_config(run_dir), config)
        essential = [d for d in differences if not d[0].startswith(OPERATIONAL)]
        if essential and not accept_changes:
            raise UserError(
                f"{run_dir} holds a run with another config:\n{format_diff(essential, ('there', 'now'))}\n"
                "Choose another place with run_directory=..., restore the values above, or continue that run with the new "
                "values by --accept-changes"
            )
        notes = [f"{path}: {name} was {before}, now {after}" for name, before, after in differences]
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(
            f"{run_dir} is not empty and holds no {CONFIG}, so it is not a run of jaxlm; choose another run_directory"
        )
    if jax.process_count() > 1:
        # Nobody may write before everybody has looked.
        multihost_utils.sync_global_devices("jaxlm: run directory checked")
    if jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        tokenizer = config.data.tokenizer
        if tokenizer.kind == "json" and Path(tokenizer.path).resolve() != (run_dir / TOKENIZER).resolve():
            shutil.copyfile(tokenizer.path, run_dir / TOKENIZER)
        _write(path, to_yaml(config))
        _write(run_dir / "versions.json", json.dumps(versions(), indent=2) + "\n")
    return notes


def run_tokenizer(config: RunConfig, run_dir: Path):
    """Settings of the run's tokenizer, read from the copy inside the run directory where it is a file."""
    settings = config.data.tokenizer
    copy = Path(run_dir) / TOKENIZER
    return settings.model_copy(update={"path": str(copy)}) if settings.kind == "json" and copy.is_file() else settings


def _write(path: Path, text: str) -> None:
    # Through a temporary name, so that a kill or a full disk leaves the old file whole.
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
