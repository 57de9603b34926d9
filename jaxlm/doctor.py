"""What this machine has and what jaxlm would do on it."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import RunConfig, compute_dtype, with_vocabulary
from jaxlm.data import BytesTokenizerSettings, load_tokenizer
from jaxlm.models.language_model import abstract_model
from jaxlm.ops import forms, kernels
from jaxlm.schema import UserError
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


def report(length: int | None = None, config: RunConfig | None = None) -> str:
    """Devices, versions, extras, and the form that every op takes for training, with the reason.

    Args:
      length: tokens a row; None for the config's, or 2,048.
      config: also the forms of its model's ops, with the heads and decays that they have there.

    Raises:
      UserError: for a length below 1.
    """
    if length is None:
        length = config.data.sequence_length if config else 2048
    if length < 1:
        raise UserError(f"--length: a row has at least one token, not {length}")
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
    return "\n".join(lines + (_of_model(config, length) if config else []))


# What `forms.choose` is told, by the names that people have for it.
KNOWN = {"heads": "H", "head_dim": "K", "value_dim": "V", "decay": "decay"}


def _of_model(config: RunConfig, length: int) -> list[str]:
    """The forms that the ops of a model take in a training step on one device: traced, not run."""
    config = with_vocabulary(config, load_tokenizer(BytesTokenizerSettings()))  # no text is read, so that any tokenizer does
    platform, _ = kernels.target()
    graphdef, params = nnx.split(abstract_model(config.model, compute_dtype(config.train.dtype, platform)))
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def hidden(params, tokens, ids):
        return nnx.merge(graphdef, params).hidden_with_auxiliary(tokens, segment_ids=ids)[0]

    with forms.recorded() as asked:
        jax.eval_shape(hidden, params, row, row)
    lines = [f"forms of {config.name} on {platform}, T={length}"]
    for op, known, choice in asked:
        told = [known["dtype"]] + [f"{name}={known[field]}" for field, name in KNOWN.items() if known.get(field) is not None]
        lines.append(f"  {op}, {', '.join(told)}  {choice.form}: {choice.reason}")
    return lines
