"""What this machine has and what jaxlm would do on it."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp

from jaxlm.config import compute_dtype
from jaxlm.ops import forms
from jaxlm.training.metrics import format_count, peak_flops
from jaxlm.training.run import versions

# extra -> the module it brings
EXTRAS = {
    "tpu": "libtpu",
    "cuda": "jax_cuda13_plugin",
    "tokenizers": "tokenizers",
    "plot": "matplotlib",
    "tensorboard": "tensorboardX",
    "parquet": "pyarrow",
}


def report(length: int) -> str:
    """Devices, versions, extras, and the form that every op takes for training at a sequence length, with the reason."""
    device = jax.devices()[0]
    peak = peak_flops(device)
    dtype = jnp.dtype(compute_dtype("auto", device.platform))
    lines = ["devices"]
    lines += [f"  {d.id}  {d.device_kind} ({d.platform}), process {d.process_index}" for d in jax.devices()]
    lines += [f"  peak  {format_count(peak)}FLOP/s bf16 a device" if peak else "  peak  not known, so mfu is null"]
    lines += ["versions"] + [f"  {name}  {version}" for name, version in versions().items() if name != "devices"]
    lines += ["extras"]
    for extra, module in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        lines.append(f"  {extra}  {'installed' if there else f'not installed: pip install jaxlm[{extra}]'}")
    lines += [f"forms on {device.platform}, {dtype.name} (form=auto)"]
    for op in forms.OPS:
        # Training rows are packed, so they come with segment ids.
        for tokens, use, masked in ((length, "training", True), (1, "decode", False)):
            choice = forms.choose(
                op, "auto", T=tokens, dtype=dtype, platform=device.platform, chip=device.device_kind, masked=masked,
            )  # fmt: skip
            lines.append(f"  {op}, T={tokens} ({use})  {choice.form}: {choice.reason}")
    return "\n".join(lines)
