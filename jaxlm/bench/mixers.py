"""Every op in every form, side by side on this device: time, memory, and how both grow with the sequence.

Times are the medians of rounds in which every form is run once, so that what else the machine does meets all alike; what
counts is their ratio to the recurrent form (`jax.lax.scan` over tokens) of the same round.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxlm.bench.report import chosen, environment, new_figure, print_table, read_json, write_json
from jaxlm.ops.attention import attention
from jaxlm.ops.delta_rule import delta_rule, dplr_delta_rule
from jaxlm.ops.diagonal import diagonal_recurrence, diagonal_ssm, selective_scan
from jaxlm.ops.fast_weights import memora, moneta, ttt_linear, yaad
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.ops.log_linear import levels_for, log_linear_attention
from jaxlm.schema import UserError

FORMS = ("recurrent", "parallel", "chunked", "fft")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
QUICK_LENGTHS = (512, 2048)


class Shape(NamedTuple):
    """Batch, heads, key and value channels."""

    B: int = 2
    H: int = 4
    K: int = 64
    V: int = 64


DEFAULT_SHAPE = Shape()


def _arrays(shape: Shape, T: int, dtype, decay: str | None, extra: Sequence[str] = ()) -> dict[str, jax.Array]:
    """Unit keys, moderate decays, step sizes in (0, 1)."""
    B, H, K, V = shape
    rng = np.random.default_rng(0)
    k = rng.normal(size=(B, T, H, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {"q": rng.normal(size=(B, T, H, K)), "k": k, "v": rng.normal(size=(B, T, H, V))}
    low = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    if "a" in extra:
        rate = rng.random((B, T, H, 1))
        low |= {"a": jnp.asarray(-k, dtype), "b": jnp.asarray(k * rate, dtype)}
    if "beta" in extra:
        low["beta"] = jnp.asarray(rng.random((B, T, H)), jnp.float32)
    if "write" in extra:
        gates = {"beta": rng.random((B, T, H, K)), "write": rng.random((B, T, H, V))}
        low |= {name: jnp.asarray(x, jnp.float32) for name, x in gates.items()}
    if decay:
        size = (B, T, H) if decay == "scalar" else (B, T, H, K)
        low["log_decay"] = jnp.asarray(-0.1 * rng.random(size), jnp.float32)
    return low


def _diagonal(shape: Shape, T: int, dtype) -> dict[str, jax.Array]:
    channels = shape.H * shape.K
    rng = np.random.default_rng(0)
    log_a = jnp.asarray(-rng.random((shape.B, T, channels)), jnp.float32)
    return {"log_a": log_a, "b": jnp.asarray(rng.normal(size=(shape.B, T, channels)), dtype)}


def _complex_diagonal(shape: Shape, T: int, dtype) -> dict[str, jax.Array]:
    """complex64 whatever the dtype: there are no shorter ones."""
    rng, real = np.random.default_rng(1), _diagonal(shape, T, jnp.float32)
    turns, imaginary = rng.uniform(-3, 3, size=real["b"].shape), rng.normal(size=real["b"].shape)
    arrays = {"log_a": real["log_a"] + 1j * turns, "b": real["b"] + 1j * imaginary}
    return {name: jnp.asarray(x, jnp.complex64) for name, x in arrays.items()}


def _ssm(shape: Shape, T: int, dtype) -> dict[str, jax.Array]:
    """S4D-Lin with 64 states a channel, as 32 pairs, and steps of 0.01."""
    channels, pairs = shape.H * shape.K, 32
    rng = np.random.default_rng(0)
    a = np.exp(0.01 * (-0.5 + 1j * np.pi * np.arange(pairs)))
    return {
        "u": jnp.asarray(rng.normal(size=(shape.B, T, channels)), dtype),
        "a": jnp.asarray(np.tile([a.real, a.imag], (channels, 1, 1)), jnp.float32),
        "c": jnp.asarray(rng.normal(size=(channels, 2, pairs)), jnp.float32),
    }


def _fast_weights(shape: Shape, T: int, dtype, inner: str) -> dict:
    """An inner model of K to K channels: "linear", or an "mlp" of 4K hidden units; "threshold" is one with yaad's gate."""
    B, H, K, _ = shape
    rng = np.random.default_rng(1)
    arrays = _arrays(shape._replace(V=K), T, dtype, None)
    low = {"norm_scale": np.ones((H, K)), "norm_bias": np.zeros((H, K))}
    if inner == "linear":
        low |= {"rate": rng.random((B, T, H)) / K, "token_scale": 1 / np.arange(1.0, 17)}
        weights = {"w": 0.02 * rng.normal(size=(H, K, K)), "b": np.zeros((H, K))}
    else:
        low |= {"rate": 0.01 * rng.random((B, T, H, K)), "log_decay": -0.01 * rng.random((B, T, H, K))}
        weights = {"w_in": rng.normal(size=(H, K, 4 * K)) / K**0.5, "w_out": rng.normal(size=(H, 4 * K, K)) / (4 * K) ** 0.5}
    if inner == "threshold":
        low["threshold"] = np.full((B, T, H), K**0.5)
    return arrays | jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), low | {"weights": weights})


def _selective(shape: Shape, T: int, dtype) -> dict[str, jax.Array]:
    channels, states = shape.H * shape.K, 16
    rng = np.random.default_rng(0)
    return {
        "u": jnp.asarray(rng.normal(size=(shape.B, T, channels)), dtype),
        "dt": jnp.asarray(0.1 * rng.random((shape.B, T, channels)), jnp.float32),
        "a": jnp.asarray(-np.tile(np.arange(1.0, states + 1), (channels, 1)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(shape.B, T, states)), dtype),
        "c": jnp.asarray(rng.normal(size=(shape.B, T, states)), dtype),
    }


def _log_linear(shape: Shape, T: int, dtype) -> dict[str, jax.Array]:
    scales = np.random.default_rng(1).random((shape.B, T, shape.H, levels_for(T)))
    return _arrays(shape, T, dtype, "scalar") | {"level_scales": jnp.asarray(scales, jnp.float32)}


class Line(NamedTuple):
    """One line of the table.

    Attributes:
      op: what is timed.
      arrays: (shape, T, dtype) -> its arrays.
      forms: those it has.
      scores: whether the parallel form has scores [B, H, T, T]. Otherwise it is an associative scan, or (diagonal_ssm) a
        Toeplitz matrix a channel, and the compiler says what that takes.
    """

    op: Callable
    arrays: Callable
    forms: tuple[str, ...] = ("recurrent", "parallel", "chunked")
    scores: bool = True


WITHOUT_PARALLEL = ("recurrent", "chunked")
OPS: dict[str, Line] = {
    "linear_attention": Line(linear_attention, partial(_arrays, decay=None)),
    "linear_attention-scalar": Line(linear_attention, partial(_arrays, decay="scalar")),
    "linear_attention-vector": Line(linear_attention, partial(_arrays, decay="vector")),
    "delta_rule": Line(delta_rule, partial(_arrays, decay=None, extra=("beta",))),
    "delta_rule-scalar": Line(delta_rule, partial(_arrays, decay="scalar", extra=("beta",))),
    "delta_rule-vector": Line(delta_rule, partial(_arrays, decay="vector", extra=("beta",))),
    "delta_rule-gates": Line(delta_rule, partial(_arrays, decay="vector", extra=("write",))),
    "dplr_delta_rule": Line(dplr_delta_rule, partial(_arrays, decay="vector", extra=("a",))),
    "diagonal_recurrence": Line(diagonal_recurrence, _diagonal, scores=False),
    "diagonal_recurrence-complex": Line(diagonal_recurrence, _complex_diagonal, scores=False),
    "diagonal_ssm": Line(diagonal_ssm, _ssm, FORMS, scores=False),
    "selective_scan": Line(selective_scan, _selective, scores=False),
    "log_linear_attention": Line(log_linear_attention, _log_linear),
    "ttt_linear": Line(ttt_linear, partial(_fast_weights, inner="linear"), WITHOUT_PARALLEL),
    "moneta": Line(moneta, partial(_fast_weights, inner="mlp"), WITHOUT_PARALLEL),
    "yaad": Line(yaad, partial(_fast_weights, inner="threshold"), WITHOUT_PARALLEL),
    "memora": Line(memora, partial(_fast_weights, inner="mlp"), WITHOUT_PARALLEL),
    "attention": Line(attention, partial(_arrays, decay=None)),
}


def run(
    output: Path,
    *,
    ops: Sequence[str] | None = None,
    forms: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    dtype: str = "float32",
    shape: Shape = DEFAULT_SHAPE,
    rounds: int = 5,
    budget: float = 20.0,
    memory_gib: float | None = None,
    quick: bool = False,
    update: bool = False,
) -> dict:
    """Measure, print the table, write OUTPUT/mixers.json and draw OUTPUT/mixers.png.

    Args:
      output: directory.
      ops: of `OPS`; None for all. So with forms and lengths.
      rounds: runs of each form that the medians are of.
      budget: seconds that one run of a form may take; longer sequences of it are left out, which the table says.
      memory_gib: temporary memory that a form may take; None for a third of what this device or machine has.
      quick: two lengths and three rounds.
      update: keep what OUTPUT/mixers.json has of other ops, if it was measured alike.

    Raises:
      UserError: for names that are not there, numbers that mean nothing, or an update of a file from other versions, another
        machine or with other settings.
    """
    names = chosen(ops, OPS, "--ops")
    forms = chosen(forms, FORMS, "--forms")
    lengths = sorted(lengths or (QUICK_LENGTHS if quick else LENGTHS))
    if lengths[0] < 1 or rounds < 1:
        raise UserError(f"--lengths {lengths[0]} --rounds {rounds}: both must be at least 1")
    rounds = min(rounds, 3) if quick else rounds
    memory_gib = memory_gib or _memory_gib() / 3
    where = environment()
    settings = {**shape._asdict(), "dtype": dtype, "rounds": rounds, "budget_seconds": budget}
    kept = _rows_of_other_ops(output / "mixers.json", names, where, settings) if update else []
    console = Console(stderr=True)
    rows = []
    for name in names:
        slow: dict[tuple[str, str], str] = {}
        for T in lengths:
            console.print(f"{name}, T={T}", markup=False, highlight=False)
            rows += _measure(name, forms, T, jnp.dtype(dtype), shape, rounds, budget, memory_gib, slow)
    order = list(OPS)
    rows = sorted([*kept, *rows], key=lambda row: order.index(row["op"]))
    result = {"environment": where, "settings": settings, "rows": rows}
    write_json(output / "mixers.json", result)
    print_table(*table(result))
    console.print(f"wrote {output / 'mixers.json'}" + (f" and {output / 'mixers.png'}" if draw(result, output) else ""))
    return result


def _rows_of_other_ops(path: Path, names: Sequence[str], where: dict, settings: dict) -> list[dict]:
    before = read_json(path)
    if before is None:
        return []
    for what, mine in (("environment", where), ("settings", settings)):
        differ = [f"{name} {before[what].get(name)} there, {value} here" for name, value in mine.items()
                  if before[what].get(name) != value]  # fmt: skip
        if differ:
            raise UserError(
                f"--update: {path} was measured with {'; '.join(differ)}: these do not stand side by side; measure all ops, or "
                "choose another --output"
            )
    return [row for row in before["rows"] if row["op"] not in names and row["op"] in OPS]


def _memory_gib() -> float:
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _measure(name, forms, T, dtype, shape, rounds, budget, memory_gib, slow) -> list[dict]:
    line = OPS[name]
    op, arrays = line.op, line.arrays(shape, T, dtype)
    size = sum(x.nbytes for x in jax.tree.leaves(arrays))
    rows, runs = {}, {}
    for form in (form for form in forms if form in line.forms):
        rows[form] = row = {"op": name, "form": form, "T": T, "input_bytes": size}
        for kind in ("forward", "both"):
            if (form, kind) in slow:
                row[f"{kind}_skipped"] = slow[form, kind]
                continue
            scores = 4 * shape.B * shape.H * T * T if line.scores else 0
            if form == "parallel" and scores > memory_gib * 2**30:
                row[f"{kind}_skipped"] = slow[form, kind] = f"scores of more than {memory_gib:.1f} GiB"
                continue
            try:
                compiled = _compile(op, form, kind, arrays)
                temporary = compiled.memory_analysis().temp_size_in_bytes
                row[f"{kind}_temp_bytes"] = temporary
                if temporary > memory_gib * 2**30:
                    row[f"{kind}_skipped"] = slow[form, kind] = f"{temporary / 2**30:.1f} GiB of temporary memory"
                    continue
                seconds = _time(compiled, arrays)
            except jax.errors.JaxRuntimeError as error:
                # Of the run, or of a GPU's compiler, which tries programs out in real memory.
                if "Out of memory" not in str(error):
                    raise
                row[f"{kind}_skipped"] = slow[form, kind] = "out of memory"
                continue
            if seconds > budget:
                row[f"{kind}_skipped"] = slow[form, kind] = f"{seconds:.0f} s a run"
            runs[form, kind] = compiled
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, compiled in runs.items():
            if f"{key[1]}_skipped" not in rows[key[0]]:
                times[key].append(_time(compiled, arrays))
    for (form, kind), measured in times.items():
        if not measured:
            continue
        rows[form][f"{kind}_ms"] = 1e3 * statistics.median(measured)
        baseline = times.get(("recurrent", kind))
        if baseline:
            rows[form][f"{kind}_speedup"] = statistics.median(b / m for b, m in zip(baseline, measured, strict=True))
    return list(rows.values())


def function(op: Callable, form: str, kind: str) -> Callable:
    """What is timed: arrays -> the op's output ("forward"), or gradients of all arrays ("both")."""

    def forward(arrays):
        return op(**arrays, form=form)[0]

    def both(arrays):
        # A cotangent that depends on the output, as a loss makes it.
        def loss(arrays):
            o = forward(arrays)
            parts = (o.real, o.imag) if jnp.iscomplexobj(o) else (o,)
            return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in parts)

        return jax.grad(loss)(arrays)

    return forward if kind == "forward" else both


def _compile(op: Callable, form: str, kind: str, arrays: dict):
    return jax.jit(function(op, form, kind)).lower(arrays).compile()


def _time(compiled, arrays) -> float:
    start = time.perf_counter()
    jax.block_until_ready(compiled(arrays))
    return time.perf_counter() - start


def table(result: dict) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows."""
    where, settings = result["environment"], result["settings"]
    title = (
        f"{where['devices']}, jax {where['jax']}, {settings['dtype']}, "
        + ", ".join(f"{n}={settings[n]}" for n in ("B", "H", "K", "V"))
        + "; speed-up over the recurrent form of the same run; temporary memory of forward+backward over the inputs"
    )

    def cell(row: dict, name: str, pattern: str) -> str:
        return pattern.format(row[name]) if name in row else "-"

    rows = []
    for row in result["rows"]:
        kept = row["both_temp_bytes"] / row["input_bytes"] if "both_temp_bytes" in row else None
        rows.append([
            row["op"], row["form"], str(row["T"]),
            cell(row, "forward_ms", "{:.1f}"), cell(row, "forward_speedup", "{:.2f}x"),
            row.get("both_skipped") or cell(row, "both_ms", "{:.1f}"), cell(row, "both_speedup", "{:.2f}x"),
            "-" if kept is None else f"{kept:.1f}x",
        ])  # fmt: skip
    return title, ["op", "form", "T", "forward ms", "", "forward+backward ms", "", "memory"], rows


def draw(result: dict, output: Path) -> bool:
    """Time and memory of forward and backward against T, both logarithmic; False without matplotlib."""
    names = list(dict.fromkeys(row["op"] for row in result["rows"]))
    columns = min(6, len(names))
    bands = -(-len(names) // columns)
    made = new_figure(2 * bands, columns, (3.2 * columns, 5.6 * bands))
    if made is None:
        return False
    figure, axes = made
    for axis in axes.flat:
        axis.set_visible(False)
    for place, name in enumerate(names):
        band, column = divmod(place, columns)
        above, below = axes[2 * band, column], axes[2 * band + 1, column]
        for axis, field, scale in ((above, "both_ms", 1.0), (below, "both_temp_bytes", 2.0**-20)):
            axis.set_visible(True)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            for number, form in enumerate(FORMS):
                rows = [row for row in result["rows"] if row["op"] == name and row["form"] == form and field in row]
                points = [(row["T"], row[field] * scale) for row in rows]
                if points:
                    axis.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", markersize=3, label=form)
        above.set_title(name, fontsize=9)
        below.set_xlabel("T")
        if column == 0:
            above.set_ylabel("forward + backward, ms")
            below.set_ylabel("temporary memory, MiB")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    axes[0, 0].legend(handles=[lines[form] for form in FORMS if form in lines], frameon=False)
    figure.savefig(output / "mixers.png", dpi=130)
    return True
