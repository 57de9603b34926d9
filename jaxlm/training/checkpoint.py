"""Checkpoints of a run, by orbax: written in the background, restored onto any mesh, read past a damaged one.

    RUN/checkpoints/STEP/params     the parameters, readable alone
    RUN/checkpoints/STEP/train      step and optimizer state
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxlm.config import CheckpointSettings
from jaxlm.schema import UserError
from jaxlm.training.state import TrainState

FOLDER = "checkpoints"
DAMAGED = ".damaged"


class CheckpointError(UserError):
    """A checkpoint could not be written or read."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state from disk. `extra` is what was saved beside it, `skipped` the newer steps that could not be read and why."""

    step: int
    state: TrainState
    extra: dict
    skipped: list[tuple[int, str]]


class Checkpoints:
    """The checkpoints of one run; a context manager, which at its end waits for what is still being written."""

    def __init__(self, run_dir: str | Path, settings: CheckpointSettings):
        self.directory = Path(run_dir).absolute() / FOLDER
        self.settings = settings
        self._writing: int | None = None
        self._open()

    def _open(self) -> None:
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(self.settings.keep_last)]
        if self.settings.keep_every is not None:
            keep.append(policies.EveryNSteps(self.settings.keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.wait()
            self._checkpointer.close()
            return
        # Something else went wrong already; a write that fails on top must not hide it.
        try:
            self._checkpointer.close()
        except Exception as error:
            print(f"warning: {self._write_error(error, self._writing)}", file=sys.stderr)

    @property
    def steps(self) -> list[int]:
        """Steps that are finished, ascending."""
        return _steps(self.directory)

    def save(self, step: int, state: TrainState, extra: dict, *, force: bool = False) -> bool:
        """Save if `step` is a multiple of `settings.every`, or forced; False if it is not, or is there already.

        The arrays are copied before this returns, so the next step may overwrite them; the writing goes on behind.

        Raises:
          CheckpointError: if this or the previous write failed.
        """
        if (step % self.settings.every and not force) or step in self.steps:
            return False
        items = {"params": state.params, "train": {"step": state.step, "opt_state": state.opt_state}}
        # The previous write ends here, so that its error is told as its own.
        self.wait()
        try:
            self._checkpointer.save_checkpointables_async(step, items, force=True, custom_metadata=extra)
            if not self.settings.asynchronous:
                self._checkpointer.wait()
        except Exception as error:
            raise self._write_error(error, step) from error
        self._writing = step
        return True

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
          CheckpointError: if it could not be written; names the last good checkpoint.
        """
        step, self._writing = self._writing, None
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise self._write_error(error, step) from error

    def _write_error(self, error: Exception, step: int | None) -> CheckpointError:
        good = [s for s in self.steps if s != step]
        kept = f"the last good checkpoint is {self.directory / str(good[-1])}" if good else "there is no earlier checkpoint"
        if _is_full_disk(error):
            free = shutil.disk_usage(self.directory).free
            return CheckpointError(
                f"checkpoint {step} was not written: no space left under {self.directory} ({free / 2**20:,.0f} MiB free); "
                f"{kept}. Make room, or keep fewer checkpoints (checkpoint.keep_last), and run the same command again"
            )
        return CheckpointError(f"checkpoint {step} was not written to {self.directory}: {_one_line(error)}; {kept}")

    def restore(self, abstract_state: TrainState, step: int | None = None) -> Restored | None:
        """The newest checkpoint that can be read, placed as `abstract_state` says; None if there is none at all.

        Steps that cannot be read are renamed `STEP.damaged`, so that training can write them anew and nothing is deleted.

        Args:
          abstract_state: ShapeDtypeStructs with shardings, of any mesh.
          step: this one only.

        Raises:
          CheckpointError: if none can be read, or not the one asked for.
        """
        items = {
            "params": abstract_state.params,
            "train": {"step": abstract_state.step, "opt_state": abstract_state.opt_state},
        }
        found = _newest_readable(self.directory, step, lambda path: ocp.load_checkpointables(path, items))
        if found is None:
            return None
        number, loaded, skipped = found
        extra = _read_extra(self.directory / str(number))
        if skipped:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("jaxlm: damaged checkpoints found")
            if jax.process_index() == 0:
                for bad, _ in skipped:
                    _set_aside(self.directory / str(bad))
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("jaxlm: damaged checkpoints set aside")
            self._checkpointer.close()
            self._open()
        train = loaded["train"]
        return Restored(number, TrainState(train["step"], loaded["params"], train["opt_state"]), extra, skipped)


def restore_params(run_dir: str | Path, step: int | None = None) -> tuple[dict, dict, int]:
    """(parameters, extra, step) of a run on jax's first device: no mesh, no optimizer, wherever they were saved.

    Raises:
      CheckpointError: if there is no checkpoint that can be read, or not the one asked for.
    """
    directory = Path(run_dir).absolute() / FOLDER
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(path: Path) -> dict:
        saved = ocp.checkpointables_metadata(path).metadata["params"]
        here = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding), saved)
        return ocp.load_checkpointables(path, {"params": here})["params"]

    found = _newest_readable(directory, step, read)
    if found is None:
        raise CheckpointError(f"{run_dir}: no checkpoint yet; train it first, or give another run directory")
    number, params, skipped = found
    for bad, reason in skipped:
        print(f"warning: checkpoint {bad} cannot be read ({reason}); using {number}", file=sys.stderr)
    return _with_list_keys(params), _read_extra(directory / str(number)), number


def _newest_readable(directory: Path, step: int | None, read: Callable[[Path], Any]):
    """(step, what `read` gave, [(newer step, why not), ...]) or None."""
    steps = _steps(directory)
    unfinished = _unfinished(directory)
    if step is not None:
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{directory}: no checkpoint of step {step}; there are {there}")
        steps = [step]
    skipped: list[tuple[int, str]] = []
    for number in sorted({*steps, *(unfinished if step is None else ())}, reverse=True):
        if number in unfinished:
            skipped.append((number, "it was not finished"))
            continue
        try:
            return number, read(directory / str(number)), skipped
        except Exception as error:  # orbax, tensorstore and zarr each raise their own for damaged files
            if step is not None:
                raise CheckpointError(f"{directory / str(step)} cannot be read: {_one_line(error)}") from error
            skipped.append((number, _one_line(error)))
    if not skipped:
        return None
    reasons = "\n".join(f"  {number}: {reason}" for number, reason in skipped)
    raise CheckpointError(
        f"{directory}: no checkpoint can be read:\n{reasons}\nMove the folder away to train this run from its beginning"
    )


def _steps(directory: Path) -> list[int]:
    """Step folders that orbax has finished, ascending."""
    return [number for number in _step_folders(directory) if number not in _unfinished(directory)]


def _step_folders(directory: Path) -> list[int]:
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit() and p.is_dir())


def _unfinished(directory: Path) -> set[int]:
    # A finished step folder has orbax's metadata in it; writing goes on under another name until then.
    return {n for n in _step_folders(directory) if not (directory / str(n) / "_CHECKPOINT_METADATA").is_file()}


def _set_aside(path: Path) -> None:
    target = path.with_name(path.name + DAMAGED)
    attempt = 1
    while target.exists():
        attempt += 1
        target = path.with_name(f"{path.name}{DAMAGED}-{attempt}")
    path.rename(target)


def _read_extra(path: Path) -> dict:
    return ocp.checkpointables_metadata(path).custom_metadata


def _with_list_keys(tree: Any) -> Any:
    """Numeric keys as integers again: on disk every key is a string."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if isinstance(k, str) and k.isdigit() else k: _with_list_keys(v) for k, v in tree.items()}


def _is_full_disk(error: BaseException | None) -> bool:
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."
