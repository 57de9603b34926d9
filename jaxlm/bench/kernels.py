"""Kernels, measured: what the TPU compiler schedules for chips that are not there, and times on the GPU that is.

On any machine with libtpu every TPU kernel is compiled for each chip. Its *static cycles* are the instruction bundles of
the final schedule times the steps of the grid: a count of the compiler's, which knows nothing of stalls on memory, and no
time. Beside them stand the two numbers that bound any kernel, each as cycles of the chip: the fewest bytes over the memory's
bandwidth and the matrix products over the peak; the larger is the floor.

Where NVIDIA's compiler is installed, the kernels for Hopper GPUs are compiled likewise. Their assembler tells registers, spills
and shared memory; the roofline is what their operands and results take to read and write, each once a kernel, at the chip's
bandwidth, beside the floor of the whole op.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxlm.bench.report import chosen, environment, new_figure, print_table, write_json
from jaxlm.ops import kernels
from jaxlm.ops.delta_rule import delta_rule
from jaxlm.ops.diagonal import diagonal_recurrence
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.schema import UserError
from pallas_kernels import aot, cases


class Chip(NamedTuple):
    """One TensorCore: clock in GHz, peak in bf16 TFLOP/s, memory bandwidth in GB/s (jax's `pltpu.get_tpu_info_for_chip`; the
    clock from the peak and the width and number of matrix units)."""

    clock: float
    peak: float
    bandwidth: float


CHIPS = {
    "v4": Chip(1.05, 137.5, 615),
    "v5e": Chip(1.50, 197, 820),
    "v5p": Chip(1.75, 229.5, 1230),
    "v6e": Chip(1.75, 920, 1640),
    "7x": Chip(2.20, 1155, 3700),
}
GPU = "h100"
GPU_BANDWIDTH = 3352  # GB/s
OPS = {"linear_attention": linear_attention, "delta_rule": delta_rule}
DIAGONAL = "diagonal_recurrence"


def kernel_names() -> list[str]:
    """Names "op-decay" of every op that has a TPU kernel; the diagonal one, of float32, has K channels a head."""
    known = {"K": 128, "V": 128, "dtype": jnp.bfloat16, "chip": "TPU v5 lite"}
    names = []
    for op in cases.OPS:
        module = kernels.module(op, "tpu")
        names += [f"{op}-{decay}" for decay in cases.DECAYS if module and module.declines(**known) is None]
    return [*names, f"{DIAGONAL}-vector"]


def kernel(op: str, direction: str, decay: str, platform: str, shape: cases.Shape) -> tuple[str, dict[str, Any]]:
    """Target and arguments of `pallas_kernels.aot.report`."""
    if op == DIAGONAL:
        sizes = {"B": shape.B, "T": shape.T, "D": shape.H * shape.K}
        return "pallas_kernels.cases:diagonal", {"direction": direction, "platform": platform} | sizes
    case = {"op": op, "direction": direction, "decay": decay, "platform": platform}
    return "pallas_kernels.cases:abstract", case | shape._asdict()


HOUR = 3600.0  # seconds; the chunked delta rule of long rows compiles for minutes, on a busy machine for tens of them


def chunked(op: str, direction: str, decay: str, dtype: str = "bfloat16", **sizes: int):
    """The chunked form as `pallas_kernels.cases.abstract` has the kernel: forward, or forward and backward."""
    B, T, H, K, V = cases.Shape(**sizes)
    low, precise = partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype)), partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if op == DIAGONAL:
        channels, state = precise((B, T, H * K)), precise((B, H * K))
        recur = partial(diagonal_recurrence, form="chunked")

        def recur_both(log_a, b, *d_out):
            out, pull = jax.vjp(recur, log_a, b)
            return out, pull(d_out)

        return (recur, (channels, channels)) if direction == "forward" else (recur_both, (channels, channels, channels, state))
    arrays = {"q": low((B, T, H, K)), "k": low((B, T, H, K)), "v": low((B, T, H, V))}
    if op == "delta_rule":
        arrays["beta"] = precise((B, T, H))
    if decay != "none":
        arrays["log_decay"] = precise((B, T, H) if decay == "scalar" else (B, T, H, K))

    def forward(arrays):
        return OPS[op](**arrays, form="chunked")

    def both(arrays, d_o, d_state):
        out, pull = jax.vjp(forward, arrays)
        return out, pull((d_o, d_state))

    if direction == "forward":
        return cases.flattened(forward, (arrays,), (B, T, H))
    return cases.flattened(both, (arrays, low((B, T, H, V)), precise((B, H, K, V))), (B, T, H))


def floors(op: str, direction: str, decay: str, chip: Chip, shape: cases.Shape, chunk: int) -> dict[str, float]:
    """Cycles a token and head that memory and matrix units need at least."""
    seconds = {
        "memory": cases.least_bytes(op, direction, decay, shape) / (1e9 * chip.bandwidth),
        "matrix": cases.flops(op, direction, shape, chunk) / (1e12 * chip.peak),
    }
    return {name: value * 1e9 * chip.clock / (shape.B * shape.T * shape.H) for name, value in seconds.items()}


def run(
    output: Path,
    *,
    names: Sequence[str] | None = None,
    chips: Sequence[str] | None = None,
    shape: cases.Shape | None = None,
    forms: Sequence[str] | None = None,
) -> dict:
    """Compile, print the table, write OUTPUT/kernels.json and draw OUTPUT/kernels.png.

    Args:
      names: of `kernel_names()`; None for all. chips: of `CHIPS` and "h100"; None for those whose compiler is installed.
      shape: None for the default of `pallas_kernels.cases`.
      forms: ("kernel",) leaves out the chunked form, whose bytes the TPU kernels' are compared with; it may compile for
        minutes.

    Raises:
      UserError: for names that are not there, and where a chip's compiler is not installed.
    """
    names = chosen(names, kernel_names(), "--kernels")
    forms = chosen(forms or ("kernel", "chunked"), ("kernel", "chunked"), "--forms")
    tpu, gpu = (importlib.util.find_spec(module) is not None for module in ("libtpu", "jax_cuda13_plugin"))
    chips = chosen(chips, [*CHIPS, GPU], "--chips") if chips else [*CHIPS] * tpu + [GPU] * gpu
    shape = shape or cases.Shape()
    if not tpu and (not chips or set(chips) & set(CHIPS)):
        raise UserError("kernels are compiled by libtpu, which is not installed: pip install 'jaxlm[tpu]' (no TPU is needed)")
    if not gpu and GPU in chips:
        raise UserError(
            f"kernels for {GPU} are compiled by jax-cuda13-plugin and jax-cuda13-pjrt, which are not installed; install them "
            f"in jax's version, {jax.__version__}, without what they depend on (pip install --no-deps; no GPU is needed)"
        )
    console, rows, gpu_rows = Console(stderr=True), [], []
    result = {"environment": environment(), "settings": shape._asdict(), "rows": rows, "gpu_rows": gpu_rows}
    for name in names:
        op, decay = name.rsplit("-", 1)
        for chip in chips:
            if chip == GPU:
                gpu_rows += _compiled_for_gpu(console, op, decay, shape)
            else:
                rows += _compiled(console, op, decay, chip, shape, "chunked" in forms)
            write_json(output / "kernels.json", result)  # minutes a row: none is lost if the rest is
    if gpu_rows:
        print_table(*gpu_table(result))
    if not rows:
        console.print(f"wrote {output / 'kernels.json'}")
        return result
    print_table(*table(result))
    console.print(f"wrote {output / 'kernels.json'}" + (f" and {output / 'kernels.png'}" if draw(result, output) else ""))
    return result


def _compiled(console: Console, op: str, decay: str, chip: str, shape: cases.Shape, with_chunked: bool) -> list[dict[str, Any]]:
    tokens = shape.B * shape.T * shape.H
    sizes, chunk = shape._asdict(), kernels.module(op, "tpu").CHUNK
    rows = []
    for direction in cases.DIRECTIONS:
        console.print(f"{op}, {decay}, {direction}, {chip}", markup=False, highlight=False)
        case = {"op": op, "direction": direction, "decay": decay}
        report = aot.report(chip, *kernel(op, direction, decay, "tpu", shape), timeout=HOUR)
        found = report["kernels"]
        floor = floors(op, direction, decay, CHIPS[chip], shape, chunk)
        rows.append(case | {
            "chip": chip,
            "device_kind": report["device_kind"],
            "kernels": found,
            "cycles": sum(kernel["static_cycles"] for kernel in found) / tokens,
            "spills": sum(kernel["spills"] for kernel in found),
            "vmem_bytes": max(kernel["vmem_bytes"] for kernel in found),
            "hbm_bytes": report["hbm_bytes"] / tokens,
            "floor": floor,
            "roofline_ms": max(floor.values()) * tokens / CHIPS[chip].clock * 1e-6,
        })  # fmt: skip
        if with_chunked:
            plain = aot.report(chip, "jaxlm.bench.kernels:chunked", case | sizes, schedules=False, timeout=HOUR)
            # The chunked backward is compiled with its forward, as a step has it, so this compares the sums up to here.
            rows[-1]["bytes_of_chunked"] = plain["hbm_bytes"] / tokens / sum(row["hbm_bytes"] for row in rows)
    return rows


def _compiled_for_gpu(console: Console, op: str, decay: str, shape: cases.Shape) -> list[dict[str, Any]]:
    rows = []
    for direction in cases.DIRECTIONS:
        console.print(f"{op}, {decay}, {direction}, {GPU}", markup=False, highlight=False)
        case = {"op": op, "direction": direction, "decay": decay}
        found = aot.report(GPU, *kernel(op, direction, decay, "gpu", shape))["kernels"]
        moved = sum(kernel["operand_bytes"] for kernel in found)
        least = cases.least_bytes(op, direction, decay, shape)
        rows.append(case | {
            "chip": GPU, "kernels": found, "moved_bytes": moved, "least_bytes": least,
            "roofline_ms": moved / GPU_BANDWIDTH * 1e-6, "floor_ms": least / GPU_BANDWIDTH * 1e-6,
        })  # fmt: skip
    return rows


def gpu_table(result: dict) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: a line a kernel, with the roofline of its direction and the floor on the first."""
    title = (
        "Kernels for Hopper GPUs, bfloat16, " + ", ".join(f"{n}={v}" for n, v in result["settings"].items())
        + f"; NVIDIA's assembler, jax {result['environment']['jax']}, {GPU_BANDWIDTH} GB/s"
    )  # fmt: skip
    columns = [
        "kernel", "direction", "of it", "registers", "spill bytes", "KiB shared", "MB", "roofline ms", "floor ms", "of floor",
    ]  # fmt: skip
    rows = []
    for row in result["gpu_rows"]:
        for n, kernel in enumerate(row["kernels"]):
            floor, roofline = row["floor_ms"], row["roofline_ms"]
            bounds = [f"{roofline:.3f}", f"{floor:.3f}", f"{floor / roofline:.0%}"] if n == 0 else [""] * 3
            rows.append([
                f"{row['op']}-{row['decay']}", row["direction"], kernel["name"].removeprefix(f"{row['op']}_"),
                str(kernel["registers"]), str(kernel["spill_bytes"]), f"{kernel['smem_bytes'] / 1024:.1f}",
                f"{kernel['operand_bytes'] / 1e6:.0f}", *bounds,
            ])  # fmt: skip
    return title, columns, rows


def table(result: dict) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: per token and head. The floor is compared with the static cycles, or with those
    that the bytes take if they are more; the roofline is the floor of the whole call as a time. The last column is
    what the chunked form moves, as a multiple of the bytes of the kernels: of the forward, then of forward and backward
    together."""
    title = (
        "Static cycles and bytes a token and head, bfloat16, "
        + ", ".join(f"{n}={v}" for n, v in result["settings"].items())
        + f"; libtpu's schedule, jax {result['environment']['jax']}"
    )
    columns = [
        "kernel", "direction", "chip", "static cycles", "floor", "of floor", "roofline ms", "bundles", "spills", "VMEM MiB",
        "bytes", "chunked moves",
    ]  # fmt: skip
    rows = []
    for row in result["rows"]:
        floor = max(row["floor"].values())
        bundles = "+".join(str(kernel["bundles"]) for kernel in row["kernels"])
        moved = row["hbm_bytes"] / CHIPS[row["chip"]].bandwidth * CHIPS[row["chip"]].clock
        more = f"{row['bytes_of_chunked']:.1f}x" if "bytes_of_chunked" in row else "-"
        rows.append([
            f"{row['op']}-{row['decay']}", row["direction"], row["chip"], f"{row['cycles']:.2f}", f"{floor:.2f}",
            f"{floor / max(row['cycles'], moved):.0%}", f"{row['roofline_ms']:.3f}", bundles, str(row["spills"]),
            f"{row['vmem_bytes'] / 2**20:.1f}", f"{row['hbm_bytes']:.0f}", more,
        ])  # fmt: skip
    return title, columns, rows


def draw(result: dict, output: Path) -> bool:
    """Static cycles of every kernel, forward below backward, with the floor, a panel a chip; False without matplotlib."""
    chips = list(dict.fromkeys(row["chip"] for row in result["rows"]))
    names = list(dict.fromkeys((row["op"], row["decay"]) for row in result["rows"]))
    made = new_figure(1, len(chips), (2.6 * len(chips) + 1.5, 0.4 * len(names) + 1.6))
    if made is None:
        return False
    figure, axes = made
    for axis, chip in zip(axes.flat, chips, strict=True):
        for place, name in enumerate(names):
            start = 0.0
            of_kernel = [row for row in result["rows"] if row["chip"] == chip and (row["op"], row["decay"]) == name]
            rows = {row["direction"]: row for row in of_kernel}
            for color, direction in (("C0", "forward"), ("C1", "backward")):
                axis.barh(place, rows[direction]["cycles"], left=start, color=color, height=0.7)
                start += rows[direction]["cycles"]
            floor = sum(max(row["floor"].values()) for row in rows.values())
            axis.plot([floor, floor], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        axis.set(title=chip, yticks=range(len(names)), yticklabels=["-".join(name) for name in names], xlabel="cycles")
        axis.invert_yaxis()
        if axis is not axes.flat[0]:
            axis.set_yticklabels([])
    figure.suptitle("Static cycles a token and head: forward (blue), backward (orange), floor (black)", fontsize=10)
    figure.savefig(output / "kernels.png", dpi=120)
    return True
