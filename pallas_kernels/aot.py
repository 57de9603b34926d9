"""Compile kernels for a chip that is not there, and report what its compiler says.

    python -m pallas_kernels.aot "v5e:2x2" MODULE:FUNCTION '{"T": 4096}'

calls FUNCTION(**arguments), which returns a function of arrays and their shapes, compiles it for the first device of the
topology, and prints JSON. `report` does so in a process of its own: compilers read their settings from the environment before
jax is imported. For TPUs it needs libtpu, for Hopper GPUs the wheels jax-cuda13-plugin and jax-cuda13-pjrt (of the version of
jax, installed without what they depend on); neither needs the chip.

A TPU kernel's *static cycles* are the instruction bundles of its final schedule times the steps of its grid: one bundle issues
per cycle at best, and stalls on memory are not in it. They are a count of the compiler's, never a time.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The smallest topology of each chip.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}

# What XLA would ask an H100 (SXM, 80 GB). Autotuning is off, so what it compiles beside kernels is not what runs fastest.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 28 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")


def report(
    chip: str, target: str, arguments: dict[str, Any], *, schedules: bool = True, timeout: float = 600
) -> dict[str, Any]:
    """What a chip's compiler makes of a function and its kernels.

    Args:
      chip: a key of `TOPOLOGIES`, a TPU topology such as "v6e:4x4", or "h100".
      target: "module:function"; called with the arguments, returns (function, its arguments as `jax.ShapeDtypeStruct`).
      schedules: also read the schedules of the kernels, for which the compiler writes down all its steps.

    Returns:
      device_kind, hbm_bytes (see `hbm_bytes`; None for GPUs), peak_bytes; and kernels, for every one in order: name, grid,
      vmem_bytes, operand_bytes (operands and results, each once) and of its schedule bundles (of one step), static_cycles, use
      (share of each unit's slots), fills and spills (loads and stores of registers for want of them). For GPUs name, smem_bytes
      (shared memory of a block), operand_bytes, registers (a thread), stack_bytes and spill_bytes (stored, a thread).

    Raises:
      RuntimeError: with the compiler's message if it refuses; or if GPU kernels of one program share a name, as what the
        assembler says of them could not be told apart.
    """
    gpu = chip == "h100"
    with tempfile.TemporaryDirectory() as folder:
        flags = os.environ.get("LIBTPU_INIT_ARGS", "")
        if schedules and not gpu:
            flags += f" --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = {**os.environ, **_ENVIRONMENT, "LIBTPU_INIT_ARGS": flags.strip(), "MOSAIC_GPU_DUMP_PTXAS": "1"}
        command = [sys.executable, "-m", "pallas_kernels.aot", TOPOLOGIES.get(chip, chip), target, json.dumps(arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"{target} does not compile for {chip}: {done.stderr[-4000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        if gpu:
            found = {kernel["name"]: kernel for kernel in ptxas(done.stdout + done.stderr)}
            names = [kernel["name"] for kernel in result["kernels"]]
            if len(set(names)) < len(names):
                raise RuntimeError(f"{target}: kernels of one name, give each its own: {', '.join(sorted(names))}")
            result["kernels"] = [kernel | found[kernel["name"]] for kernel in result["kernels"]]
        for kernel in result["kernels"] if schedules and not gpu else ():
            kernel |= schedule(Path(folder), kernel["name"])
            kernel["static_cycles"] = kernel["bundles"] * math.prod(kernel["grid"])
    return result


def ptxas(text: str) -> list[dict[str, Any]]:
    """Name, registers, stack_bytes and spill_bytes of every kernel that NVIDIA's assembler speaks of."""
    found = []
    for part in text.split("Compiling entry function '")[1:]:
        stack, spill = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", part).groups()
        registers = re.search(r"Used (\d+) registers", part)[1]
        name = part.split("'")[0].removesuffix("_mosaic_gpu_kernel")
        found.append({"name": name, "registers": int(registers), "stack_bytes": int(stack), "spill_bytes": int(spill)})
    return found


def schedule(folder: Path, kernel: str) -> dict[str, Any]:
    """Bundles, use of units, fills and spills of a named kernel, from the compiler's dump."""

    def newest(pattern: str) -> str:
        found = sorted(folder.glob(f"*-{kernel}.*{pattern}*")) or sorted(folder.glob(f"*-{kernel}-*{pattern}*"))
        if not found:
            raise RuntimeError(f"the compiler left no {pattern} of a kernel named {kernel}")
        return found[-1].read_text()

    bundles = int(re.search(r"total scheduled bundles:\s+(\d+)", newest("schedule-analysis_final_bundles"))[1])
    lines = newest("final_hlo-static-per-bundle-utilization").splitlines()
    capacity = dict(zip(_UNITS, map(int, lines[2].split()), strict=True))
    rows = [tuple(map(int, line.split())) for line in lines[4:] if line.strip()]
    used = {unit: sum(row[i] for row in rows) for i, unit in enumerate(_UNITS)}
    return {
        "bundles": bundles,
        "use": {unit: round(used[unit] / (capacity[unit] * bundles), 3) for unit in _UNITS if unit not in ("FILL", "SPILL")},
        "fills": used["FILL"],
        "spills": used["SPILL"],
    }


def compile_for(topology: str, function: Callable, arguments: tuple) -> dict[str, Any]:
    """Compile for the first device of a topology, in a process with the environment that `report` sets."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

    gpu = topology == "h100"
    if gpu:
        described = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")
    else:
        described = topologies.get_topology_desc(topology, platform="tpu")
    device = described.devices[0]
    sharding = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    kind, cores = ("NVIDIA H100 80GB HBM3", 132) if gpu else (device.device_kind, 1)
    abstract = AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu" if gpu else "tpu")
    mesh = AbstractMesh((1,), ("device",), abstract_device=abstract, axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*placed)
    compiled = traced.lower(lowering_platforms=("cuda" if gpu else "tpu",)).compile()
    text = compiled.as_text()
    kernels = []
    if gpu:
        for name, shared, operands in gpu_calls(traced.jaxpr.jaxpr):
            kernels.append({"name": name, "smem_bytes": shared, "operand_bytes": operands})
    for name, grid, operands in pallas_calls(traced.jaxpr.jaxpr):
        memory = re.search(rf'%{name}[.\d]* = .*"used_scoped_memory_configs":\[(.*?)\]', text)
        sizes = re.findall(r'"size":"?(\d+)', memory[1]) if memory else []
        kernels.append({"name": name, "grid": grid, "vmem_bytes": sum(map(int, sizes)), "operand_bytes": operands})
    memory = compiled.memory_analysis()
    return {
        "device_kind": kind,
        "kernels": kernels,
        "hbm_bytes": None if gpu else hbm_bytes(text),
        "peak_bytes": memory.peak_memory_in_bytes,
    }


_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1, "f64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)([^}]*)\})?")
_FREE = ("tuple", "get-tuple-element", "parameter", "bitcast", "constant", "while", "conditional", "after-all", "iota")


def _sizes(shapes: str, everywhere: bool = False) -> list[int]:
    """Bytes of the arrays of an HLO shape, padded to their tiles; 0 for those in the chip's own memory unless `everywhere`."""
    sizes = []
    for kind, dims, order, layout in _ARRAY.findall(shapes):
        if kind not in _BYTES:
            continue
        dims = [int(n) for n in dims.split(",") if n]
        tile = re.search(r"T\(([\d,]+)\)", layout)
        if tile and order:
            tile, order = [int(n) for n in tile[1].split(",")], [int(n) for n in order.split(",")]
            for axis, length in zip(order, reversed(tile), strict=False):
                dims[axis] = -(-dims[axis] // length) * length
        sizes.append(_BYTES[kind] * math.prod(dims) if everywhere or "S(" not in layout else 0)
    return sizes


def hbm_bytes(text: str) -> int:
    """Bytes that a compiled TPU program moves between its memory and the chip: operands and results of every instruction
    that are not in the chip's own memory, padded to their tiles, bodies of loops as often as they run.

    An instruction that reads or updates a slice of an array is charged for the slice.
    """
    computations = _computations(text)

    def size(shapes: str) -> int:
        return sum(_sizes(shapes))

    def cost(name: str) -> int:
        total = 0
        shapes = {result: shape for result, shape, *_ in computations[name]}
        for _, shape, kind, operands, rest in computations[name]:
            if kind == "while":
                body, condition = re.search(r"body=%([\w.-]+)", rest)[1], re.search(r"condition=%([\w.-]+)", rest)[1]
                total += _trips(computations[condition]) * cost(body)
            elif kind == "conditional":
                names = re.findall(r"%([\w.-]+)", rest[rest.index("branch") :])
                total += max(cost(name) for name in names if name in computations)
            elif kind in ("copy-start", "slice-start"):
                # Between the chip's memory and its own: the smaller of source and destination, on one side.
                total += min(n for n in _sizes(shape, everywhere=True) if n > 4)
            elif kind == "dynamic-update-slice":
                total += 2 * size(shapes.get(operands[1], ""))
            elif kind == "dynamic-slice":
                total += 2 * size(shape)
            elif kind.endswith("-start"):
                total += size(shape)  # the operands are part of it
            elif kind not in _FREE and not kind.endswith(("-update", "-done")):
                called = re.search(r"calls=%([\w.-]+)", rest)
                read = [size(shapes.get(operand, "")) for operand in operands]
                if kind == "fusion" and called and called[1] in computations:
                    total += _fused(computations, called[1], read, size(shape))
                else:
                    total += size(shape) + sum(read)
        return total

    entry = re.search(r"^ENTRY %([\w.-]+)", text, re.M)[1]
    return cost(entry)


def _fused(computations: dict, name: str, read: list[int], written: int) -> int:
    """Bytes of a fusion whose operands and result have these: where it takes slices or updates one, those alone."""
    inner = computations[name]
    sizes = {result: sum(_sizes(shape, everywhere=True)) for result, shape, *_ in inner}
    read = [min(n, _needed(computations, name, number)) for number, n in enumerate(read)]
    # In the dtype of the array that is updated: the value may be fused with its conversion.
    shapes = {result: shape for result, shape, *_ in inner}
    updates = [
        sizes[operands[1]] * _BYTES[shape.partition("[")[0]] // _BYTES[shapes[operands[1]].partition("[")[0]]
        for _, shape, kind, operands, _ in inner
        if kind == "dynamic-update-slice"
    ]
    if updates:
        written = min(written, sum(updates))
    return written + sum(read)


def _needed(computations: dict, name: str, number: int) -> float:
    """Bytes of its parameter of a number that a fused computation reads: infinity for all of it."""
    inner = computations[name]
    sizes = {result: sum(_sizes(shape, everywhere=True)) for result, shape, *_ in inner}
    parameters = {int(rest.split(")")[0]): result for result, _, kind, _, rest in inner if kind == "parameter"}
    values, total = [parameters[number]], 0
    while values:
        value = values.pop()
        for user, _, kind, operands, rest in inner:
            for place in (at for at, operand in enumerate(operands) if operand == value):
                if kind == "bitcast":
                    values.append(user)
                elif kind == "dynamic-slice":
                    total += sizes[user]
                elif kind == "fusion" and "output_to_operand_aliasing" in rest:
                    values.append(user)  # tiled anew, in place
                elif kind == "fusion":
                    total += _needed(computations, re.search(r"calls=%([\w.-]+)", rest)[1], place)
                elif kind != "dynamic-update-slice" or place != 0:
                    return math.inf
    return total


def _computations(text: str) -> dict[str, list[tuple[str, str, str, list[str], str]]]:
    """Name -> (result, shape, kind, operands, the rest of the line) of every instruction."""
    found, current = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line)
        if head:
            current = found.setdefault(head[1], [])
            continue
        parts = re.match(r"\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", re.sub(r"/\*.*?\*/", "", line))
        if parts and current is not None:
            operands = re.findall(r"%([\w.-]+)", parts[4].split(")")[0])
            current.append((parts[1], parts[2], parts[3], operands, parts[4] + f" name={parts[1]}"))
    return found


def _trips(condition: list) -> int:
    """How often a loop runs, from the constant that its condition compares with."""
    constants = [int(m[1]) for *_, kind, _, rest in condition if kind == "constant" and (m := re.match(r"(\d+)\)", rest))]
    if len(constants) != 1:
        raise RuntimeError(f"cannot tell how often a loop runs: {condition}")
    return constants[0]


def pallas_calls(jaxpr) -> Iterator[tuple[str, list[int], int]]:
    """Name, grid and bytes of operands and results of every `pallas_call` in a jaxpr, in order."""
    for equation in _equations(jaxpr, "pallas_call"):
        name = equation.params.get("name") or equation.params["name_and_src_info"].name
        yield name, [int(n) for n in equation.params["grid_mapping"].grid], _bytes(*equation.invars, *equation.outvars)


def gpu_calls(jaxpr) -> Iterator[tuple[str, int, int]]:
    """Name, bytes of shared memory of a block, and of operands and results, of every Mosaic GPU kernel in a jaxpr."""
    for equation in _equations(jaxpr, "mpmd_map"):
        [body] = equation.params["jaxprs"]
        memory = next(_equations(body, "run_scoped")).params["jaxpr"].invars
        memory = [v for v in memory if str(getattr(v.aval, "memory_space", "")) == "smem"]
        yield equation.params["name"], _bytes(*memory), _bytes(*equation.invars, *equation.outvars)


def _bytes(*variables) -> int:
    """Of arrays; barriers are 8 each."""
    return sum(v.aval.size * getattr(v.aval.dtype, "itemsize", 8) for v in variables)


def _equations(jaxpr, primitive: str) -> Iterator:
    """Those of a primitive, inside others too but not inside one another."""
    from jax.extend.core import ClosedJaxpr, Jaxpr

    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == primitive:
            yield equation
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from _equations(inner, primitive)


def main() -> None:
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    topology, target, arguments = sys.argv[1:]
    module, function = target.split(":")
    print(json.dumps(compile_for(topology, *getattr(importlib.import_module(module), function)(**json.loads(arguments)))))


if __name__ == "__main__":
    main()
