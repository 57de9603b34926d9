"""Training steps of a config with the Pallas kernels and without, on this device.

Tokens are random and packed as training packs them, in documents of different lengths; nothing else of a run is left out: the
optimizer, clipping and recomputation are the config's. A time is the median of several groups of steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jaxlm.bench.report import environment, print_table, read_json, write_json
from jaxlm.config import RunConfig
from jaxlm.data import BytesTokenizerSettings, load_tokenizer
from jaxlm.ops import forms
from jaxlm.parallel.context import use_mesh
from jaxlm.schema import UserError
from jaxlm.training.loop import Setup, jit_train_step, prepare
from jaxlm.training.metrics import peak_flops
from jaxlm.training.state import init_state

ROWS = (64, 32, 16, 8, 4, 2, 1)
KERNEL_CALLS = ("mosaic_gpu", "tpu_custom_call")  # how compiled programs name Pallas kernels
DOCUMENT = 1024  # tokens, on average


def batch(setup: Setup) -> dict[str, np.ndarray]:
    """Rows of random tokens in documents of random lengths."""
    config, rng = setup.config, np.random.default_rng(setup.config.seed)
    shape = (len(setup.rows), config.data.sequence_length)
    tokens = rng.integers(config.model.vocab_size, size=(shape[0], shape[1] + 1), dtype=np.int32)
    documents = np.cumsum(rng.random(shape) < 1 / DOCUMENT, axis=1, dtype=np.int32)
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": documents, "weights": np.ones(shape, np.float32)
    }  # fmt: skip


def measure(config: RunConfig, *, steps: int, groups: int = 5) -> dict[str, Any]:
    """Seconds a step, peak memory, the places of the program that call a kernel, and the loss of every step of a config.

    Raises:
      jax.errors.JaxRuntimeError: where the memory is too small.
    """
    jax.clear_caches()  # what was traced with kernels is not what is traced without
    # No text is read, so that any tokenizer does.
    setup = prepare(config, load_tokenizer(BytesTokenizerSettings()))
    with use_mesh(setup.mesh, setup.rules):
        state = init_state(setup.config.model, setup.optimizer, config.seed, setup.shardings)
        inputs = setup.to_device(batch(setup))
        step = jit_train_step(setup).lower(state, inputs).compile()
        memory, text = step.memory_analysis(), step.as_text()
        losses, seconds = [], []
        for group in range(1 + groups):  # the first, which is not timed, warms up
            start = time.perf_counter()
            count = steps if group else 2
            for _ in range(count):
                state, values = step(state, inputs)
                losses.append(values["loss"])
            jax.block_until_ready(state)
            if group:
                seconds.append((time.perf_counter() - start) / count)
    peak = peak_flops(setup.mesh.devices.flat[0])
    rate = config.tokens_per_step / median(seconds)
    return {
        "seconds": median(seconds),
        "tokens_per_second": rate,
        "mfu": peak and rate * setup.flops_per_token / (peak * setup.mesh.size),
        "flops_per_token": setup.flops_per_token,
        "peak_bytes": memory and memory.peak_memory_in_bytes,
        "kernel_calls": sum(text.count(f'custom_call_target="{name}') for name in KERNEL_CALLS),
        "losses": [float(loss) for loss in losses],
    }


def run(
    output: Path,
    config: RunConfig,
    *,
    rows: Sequence[int] | None = None,
    steps: int = 5,
    quick: bool = False,
    kernels_only: bool = False,
) -> dict[str, Any]:
    """Measure with kernels and without, at the largest batch of each that fits and at the smaller of the two; print the table
    and write OUTPUT/training.json, which keeps what other configs and batches left there.

    Args:
      rows: batch sizes to try, from the largest on; None for powers of two from 64 down.
      steps: a group of timed steps; quick: two, and batches from 4 rows down.
      kernels_only: nothing without kernels, which takes most of the time.

    Raises:
      UserError: where not even the smallest batch fits.
    """
    rows = sorted(rows or (ROWS[-3:] if quick else ROWS), reverse=True)
    steps = 2 if quick else steps
    console, path = Console(stderr=True), output / "training.json"
    result = read_json(path) or {"runs": []}
    length = config.data.sequence_length
    key = {"config": config.name, "tokens_a_row": length, "environment": environment()}
    found: dict[tuple[bool, int], dict] = {}

    def attempt(with_kernels: bool, n: int) -> bool:
        changed = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": n})})
        name = "with kernels" if with_kernels else "without"
        try:
            with forms.use_kernels(with_kernels):
                found[with_kernels, n] = measure(changed, steps=steps)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
                raise
            console.print(f"{config.name}, {name}: {n} rows do not fit the memory", markup=False, highlight=False)
            return False
        known = key | {"kernels": with_kernels, "rows": n}
        row = known | found[with_kernels, n]
        result["runs"] = [one for one in result["runs"] if {name: one[name] for name in known} != known] + [row]
        write_json(path, result)
        rate = f"{row['tokens_per_second']:,.0f} tokens/s"
        console.print(f"{config.name}, {name}, {n} rows: {rate}", markup=False, highlight=False)
        return True

    sides = (True,) if kernels_only else (True, False)
    largest = {}
    for with_kernels in sides:
        largest[with_kernels] = next((n for n in rows if attempt(with_kernels, n)), None)
        if largest[with_kernels] is None:
            raise UserError(f"{config.name} does not fit this device's memory with {rows[-1]} rows of {length} tokens")
    for with_kernels in sides:
        if largest[with_kernels] > min(largest.values()):
            attempt(with_kernels, min(largest.values()))
    print_table(*table(result["runs"]))
    console.print(f"wrote {path}")
    return result


def table(runs: list[dict]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows."""
    columns = ["config", "kernels", "rows x tokens", "ms a step", "tokens/s", "MFU", "peak GiB", "device"]
    rows = []
    for one in sorted(runs, key=lambda one: (one["config"], one["tokens_a_row"], one["rows"], one["kernels"])):
        called = f"{one['kernel_calls']} calls" if one["kernels"] else "off"
        rows.append([
            one["config"], called, f"{one['rows']} x {one['tokens_a_row']}",
            f"{1e3 * one['seconds']:.1f}", f"{one['tokens_per_second']:,.0f}", f"{one['mfu']:.1%}" if one["mfu"] else "-",
            f"{one['peak_bytes'] / 2**30:.1f}" if one["peak_bytes"] else "-", one["environment"]["devices"],
        ])  # fmt: skip
    return "Training steps with Pallas kernels and without", columns, rows
