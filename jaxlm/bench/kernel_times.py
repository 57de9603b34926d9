"""Kernels on the GPU that is there: times beside the chunked and recurrent forms and the installed peers, in one process.

Peers are timed where they are installed: jax-linear-attention (module jla, Pallas Mosaic GPU) and fla-core (module fla,
Triton through torch). A time is the median of several runs of many calls each, divided by the calls, after two that compile
and warm up. The floor is every input read once and every output written once, at the bandwidth that a large copy reaches in the
same process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxlm.bench.report import chosen, environment, new_figure, print_table, read_json, write_json
from jaxlm.ops import kernels
from jaxlm.ops.delta_rule import delta_rule
from jaxlm.ops.diagonal import diagonal_recurrence
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.schema import UserError
from pallas_kernels import cases

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
TOKENS = 32768  # in all rows together
OPS = {"linear_attention": linear_attention, "delta_rule": delta_rule, "diagonal_recurrence": diagonal_recurrence}
DIRECTIONS = ("forward", "forward and backward")
PEERS = ("jax-linear-attention", "fla-core", "torch", "triton")  # packages, which need not be there


def kernel_names(chip: str) -> list[str]:
    """Names "op-decay" of every op whose GPU kernel runs on a chip: heads of 128 channels, float32 for the diagonal op."""
    names = []
    for op in cases.OPS:
        module = kernels.module(op, "gpu")
        known = {"K": 128, "V": 128, "dtype": jnp.bfloat16, "chip": chip}
        names += [f"{op}-{decay}" for decay in cases.DECAYS if module and module.declines(**known) is None]
    diagonal = kernels.module("diagonal_recurrence", "gpu")
    if diagonal and diagonal.declines(dtype=jnp.float32, chip=chip) is None:
        names.append("diagonal_recurrence-vector")
    return names


def clock(call: Callable[[], Any], *, wait: Callable[[Any], Any], calls: int = 20, runs: int = 7) -> float:
    """Median milliseconds of a call."""
    wait(call())
    wait(call())
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return median(times)


def bandwidth() -> float:
    """TB/s of reading and writing a gigabyte."""
    x = jnp.ones((1 << 28,), jnp.float32)
    return 2 * x.nbytes / clock(partial(jax.jit(lambda x: x + 1), x), wait=jax.block_until_ready) * 1e-9


def inputs(op: str, decay: str, shape: cases.Shape) -> dict[str, jax.Array]:
    """Random arrays as training has them: normalised keys, mild decays."""
    B, T, H, K, V = shape
    keys = jax.random.split(jax.random.key(0), 6)
    if op == "diagonal_recurrence":
        log_a = jax.nn.log_sigmoid(jax.random.normal(keys[3], (B, T, H * K))) / 16
        return {"log_a": log_a, "b": jax.random.normal(keys[0], log_a.shape)}
    q, k, v = (jax.random.normal(key, (B, T, H, n)) for key, n in zip(keys, (K, K, V), strict=False))
    arrays = {"q": q, "k": k / jnp.linalg.norm(k, axis=-1, keepdims=True), "v": v}
    arrays = {name: x.astype(jnp.bfloat16) for name, x in arrays.items()}
    if decay != "none":
        width = (B, T, H) if decay == "scalar" else (B, T, H, K)
        arrays["log_decay"] = jax.nn.log_sigmoid(jax.random.normal(keys[3], width)) / 16
    if op == "delta_rule":
        arrays["beta"] = jax.nn.sigmoid(jax.random.normal(keys[4], (B, T, H)))
    return arrays


def ours(op: str, form: str) -> Callable:
    """A form of an op of the arrays of `inputs`."""

    def call(arrays):
        return OPS[op](**arrays, form=form)

    return call


def jax_linear_attention(op: str, decay: str) -> Callable | None:
    """The peer's function of the same arrays, None where it has none."""
    from jla.ops.mosaic_gpu import gated_delta_rule, gla, kda, scalar_gate

    functions = {
        ("linear_attention", "scalar"): scalar_gate.simple_gla,
        ("linear_attention", "vector"): gla.gla,
        ("delta_rule", "none"): gated_delta_rule.delta_rule,
        ("delta_rule", "scalar"): gated_delta_rule.gated_delta_rule,
        ("delta_rule", "vector"): kda.kda,
    }
    if (op, decay) not in functions:
        return None

    def call(arrays):
        scale = arrays["q"].shape[-1] ** -0.5
        B, _, H, K = arrays["q"].shape
        state = jnp.zeros((B, H, K, arrays["v"].shape[-1]), jnp.float32)
        named = {"g" if name == "log_decay" else name: x for name, x in arrays.items()}
        return functions[op, decay](**named, scale=scale, initial_state=state, output_final_state=True)

    return call


def time_jax(function: Callable, arrays: dict, direction: str) -> float:
    """Milliseconds of a function of arrays that returns outputs and a state."""
    if direction == "forward":
        return clock(partial(jax.jit(function), arrays), wait=jax.block_until_ready)

    def both(arrays, cotangent):
        out, pull = jax.vjp(function, arrays)
        return out, pull((cotangent, jnp.zeros_like(out[1])))

    like = arrays["v" if "v" in arrays else "b"]
    cotangent = jax.random.normal(jax.random.key(1), like.shape).astype(like.dtype)
    return clock(partial(jax.jit(both), arrays, cotangent), wait=jax.block_until_ready)


def time_fla(op: str, decay: str, arrays: dict, direction: str) -> float | None:
    """Milliseconds of flash-linear-attention on the same arrays, None where it has no such op."""
    import torch
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    functions = {
        ("linear_attention", "none"): partial(chunk_linear_attn, normalize=False),
        ("linear_attention", "scalar"): chunk_simple_gla,
        ("linear_attention", "vector"): chunk_gla,
        ("delta_rule", "none"): chunk_delta_rule,
        ("delta_rule", "scalar"): chunk_gated_delta_rule,
        ("delta_rule", "vector"): chunk_kda,
    }
    if (op, decay) not in functions:
        return None
    names = {"log_decay": "g"}
    tensors = {names.get(name, name): torch.from_dlpack(x) for name, x in arrays.items()}
    backward = direction != "forward"
    tensors = {name: x.detach().clone().requires_grad_(backward) for name, x in tensors.items()}
    cotangent = torch.randn_like(tensors["v"])

    def call():
        o, _ = functions[op, decay](**tensors, output_final_state=True)
        return torch.autograd.grad(o, list(tensors.values()), cotangent) if backward else o

    return clock(call, wait=lambda _: torch.cuda.synchronize())


def run(
    output: Path,
    *,
    names: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    H: int = 8,
    K: int = 128,
    V: int = 128,
    tokens: int = TOKENS,
    forms: Sequence[str] | None = None,
    quick: bool = False,
) -> dict:
    """Time, print the table, write OUTPUT/times.json after every row and draw OUTPUT/times.png.

    What OUTPUT/times.json holds of the same machine, versions and sizes stays, but for the kernels and lengths timed now.

    Args:
      names: of `kernel_names`; None for all. lengths: T.
      H, K, V: heads and their channels.
      tokens: of all rows together, as long as one row has no more.
      forms: beside the kernel; None for the chunked one. The recurrent one takes tens of milliseconds.
      quick: only T = 2048.

    Raises:
      UserError: for names that are not there, and where no kernel runs on this chip.
    """
    chip = jax.devices()[0].device_kind
    if not kernel_names(chip):
        raise UserError(f"no GPU kernel runs on {chip}")
    names = chosen(names, kernel_names(chip), "--kernels")
    lengths = lengths or ((2048,) if quick else LENGTHS)
    forms = chosen(forms or ("kernel", "chunked"), ("kernel", "chunked", "recurrent"), "--forms")
    forms = ["kernel", *(form for form in forms if form != "kernel")]  # what the others are compared with
    peers = [name for name, module in (("jax-linear-attention", "jla"), ("fla", "fla")) if importlib.util.find_spec(module)]
    console, rate = Console(stderr=True), bandwidth()
    settings = {"H": H, "K": K, "V": V, "tokens": tokens, "dtype": "bfloat16"}
    made = {"environment": environment() | _peers() | {"device": chip}, "settings": settings}
    before = read_json(output / "times.json") or {"rows": []}
    if _is_of(before) != _is_of(made):
        before = {"rows": []}  # what was measured elsewhere or of another size is not to be compared with
    versions = {name: version for name, version in before.get("environment", {}).items() if name in PEERS}
    result = made | {"environment": versions | made["environment"], "copy_tb_s": rate, "rows": before["rows"]}
    for name in names:
        op, decay = name.rsplit("-", 1)
        for T in lengths:
            # Forms of one length are compared, so none of them stays from before.
            rows = [row for row in result["rows"] if (row["op"], row["decay"], row["T"]) != (op, decay, T)]
            result["rows"] = rows
            shape = cases.Shape(max(1, tokens // T), T, H, K, V)
            arrays = inputs(op, decay, shape)
            least = cases.least_bytes(op, "forward", decay, shape)
            for direction in DIRECTIONS:
                if direction != "forward":
                    least += cases.least_bytes(op, "backward", decay, shape)
                kernel = None
                for form in (*forms, *peers):
                    row = {"op": op, "decay": decay, "direction": direction, "form": form, "B": shape.B, "T": T}
                    row["floor_ms"] = least / rate * 1e-9
                    try:
                        row["ms"] = _time(op, decay, form, arrays, direction)
                    except Exception as error:  # a peer or XLA's autotuner may fail in any way, and the rest still counts
                        row["ms"], row["error"] = None, f"{type(error).__name__}: {error}"[:300]
                    if form == "kernel":
                        kernel = row["ms"]
                    elif row["ms"] and kernel:
                        row["over_kernel"] = row["ms"] / kernel
                    if row["ms"] is not None or "error" in row:
                        rows.append(row)
                        shown = f"{row['ms']:.3f} ms" if row["ms"] else row["error"]
                        console.print(f"{name}, {direction}, B={shape.B} T={T}, {form}: {shown}", markup=False, highlight=False)
                        # A peer may compile for minutes, and what is measured stays measured.
                        write_json(output / "times.json", result)
    show(result, output)
    return result


def merge(output: Path, folders: Sequence[Path]) -> dict:
    """Join the times.json of several runs, as of a machine lent for minutes at a time, into OUTPUT/times.json and its plot.

    Of a kernel, direction, form and length that several runs have, the row of the last one that measured it stays. Ratios to
    the kernel are those of the process that measured both; the absolute times of different lines may be of different machines
    of one kind. Environment and copy rate are those of the first run, with the versions of the peers of all.

    Args:
      folders: that hold a times.json, or such files; what OUTPUT held before stays only if it is one of them.

    Raises:
      UserError: for a folder without times.json, and for results of other devices, versions (of jax, of peers) or sizes than
        the first.
    """
    merged, rows = None, {}
    for folder in folders:
        path = folder if folder.suffix == ".json" else folder / "times.json"
        result = read_json(path)
        if result is None:
            raise UserError(f"--merge: there is no {path}")
        merged = merged or result
        if _is_of(result) != _is_of(merged):
            raise UserError(f"--merge: {path} is of {_is_of(result)}, not of {_is_of(merged)}")
        known = merged.setdefault("environment", {})
        for name in PEERS:
            version = result["environment"].get(name)
            if version and known.setdefault(name, version) != version:
                raise UserError(f"--merge: {path} is of {name} {version}, not of {known[name]}")
        kernels_ms = {_place(row): row["ms"] for row in result["rows"] if row["form"] == "kernel"}
        for row in result["rows"]:
            kernel = kernels_ms.get(_place(row))
            if row["form"] != "kernel" and row["ms"] and kernel:
                row.setdefault("over_kernel", row["ms"] / kernel)
            place = *_place(row), row["form"]
            if row["ms"] or place not in rows:  # what failed once was measured before
                rows[place] = row
    ranks = {name: i for i, name in enumerate((*OPS, *cases.DECAYS, *DIRECTIONS, "kernel", "chunked", "recurrent"))}

    def order(row):
        named = [ranks[row[name]] for name in ("op", "decay")]
        return *named, row["T"], ranks[row["direction"]], ranks.get(row["form"], len(ranks)), row["form"]

    result = {**merged, "rows": sorted(rows.values(), key=order)}
    write_json(output / "times.json", result)
    show(result, output)
    return result


def _peers() -> dict[str, str]:
    """Versions of what is installed of `PEERS`."""
    found = {package.name.replace("_", "-"): package.version for package in importlib.metadata.distributions()}
    return {name: found[name] for name in PEERS if name in found}


def _is_of(result: dict) -> dict:
    """What has to agree for times to be compared."""
    return {name: result.get("environment", {}).get(name) for name in ("device", "jax")} | result.get("settings", {})


def _place(row: dict) -> tuple:
    return row["op"], row["decay"], row["direction"], row["T"]


def show(result: dict, output: Path) -> None:
    """Print the table, draw the plot and say where both are."""
    print_table(*table(result))
    drawn = f" and {output / 'times.png'}" if draw(result, output) else ""
    Console(stderr=True).print(f"wrote {output / 'times.json'}{drawn}", markup=False, highlight=False)


def _time(op: str, decay: str, form: str, arrays: dict, direction: str) -> float | None:
    if form == "fla":
        return time_fla(op, decay, arrays, direction)
    function = jax_linear_attention(op, decay) if form == "jax-linear-attention" else ours(op, form)
    return None if function is None else time_jax(function, arrays, direction)


def table(result: dict) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: milliseconds, the floor, and how many times as long the other forms take as the kernel."""
    forms = list(dict.fromkeys(row["form"] for row in result["rows"]))
    title = (
        f"Milliseconds on {result['environment']['device']}, {result['copy_tb_s']:.2f} TB/s copied, "
        + ", ".join(f"{n}={v}" for n, v in result["settings"].items())
    )  # fmt: skip
    lines: dict[tuple, dict] = {}
    for row in result["rows"]:
        lines.setdefault((row["op"], row["decay"], row["direction"], row["B"], row["T"]), {})[row["form"]] = row
    rows = []
    for (op, decay, direction, B, T), found in lines.items():
        line = [f"{op}-{decay}", direction, str(B), str(T)]
        for form in forms:
            row = found.get(form, {})
            over = f" ({row['over_kernel']:.2f}x)" if "over_kernel" in row else ""
            line.append(f"{row['ms']:.3f}{over}" if row.get("ms") else "failed" if row else "-")
        rows.append([*line, f"{next(iter(found.values()))['floor_ms']:.3f}"])
    return title, ["kernel", "direction", "B", "T", *forms, "floor"], rows


def draw(result: dict, output: Path) -> bool:
    """Microseconds a thousand tokens against T, with the floor: a column a kernel, a row a direction; False without
    matplotlib."""
    names = list(dict.fromkeys((row["op"], row["decay"]) for row in result["rows"]))
    forms = list(dict.fromkeys(row["form"] for row in result["rows"]))
    made = new_figure(2, len(names), (3.6 * len(names) + 1, 6))
    if made is None:
        return False
    figure, axes = made
    for column, name in enumerate(names):
        for line, direction in enumerate(DIRECTIONS):
            axis = axes[line, column]
            chosen_rows = [row for row in result["rows"] if (row["op"], row["decay"], row["direction"]) == (*name, direction)]
            if not chosen_rows:
                axis.set_axis_off()
                continue

            def curve(rows, key):
                rows = sorted(rows, key=lambda row: row["T"])
                return [row["T"] for row in rows], [1e6 * row[key] / (row["B"] * row["T"]) for row in rows]

            for number, form in enumerate(forms):
                rows = [row for row in chosen_rows if row["form"] == form and row["ms"]]
                # Also without rows, so that every panel has the same colours and the first one all of the legend.
                axis.plot(*curve(rows, "ms"), f"C{number}", marker="o", markersize=3, label=form)
            floors = {row["T"]: row for row in reversed(chosen_rows)}  # that of the kernel, which comes first
            axis.plot(*curve(floors.values(), "floor_ms"), "k--", label="floor")
            axis.set(xscale="log", yscale="log", xlabel="tokens a row")
            axis.set_title(f"{'-'.join(name)}, {direction}", fontsize=8)
            lengths = sorted({row["T"] for row in chosen_rows})
            axis.set_xticks(lengths, labels=[f"{T // 1024}K" if T % 1024 == 0 else str(T) for T in lengths], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_ylabel("µs per 1,000 tokens")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{result['environment']['device']}, bfloat16, H={result['settings']['H']}", fontsize=10)
    figure.savefig(output / "times.png", dpi=120)
    return True
