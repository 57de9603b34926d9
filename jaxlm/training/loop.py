"""The training loop, top to bottom."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from jaxlm import params as params_lib
from jaxlm.config import RunConfig, check_batch, compute_dtype, with_vocabulary
from jaxlm.data import Tokenizer, held_out_batches, load_tokenizer, train_batches
from jaxlm.inference.generate import SamplingSettings, generate
from jaxlm.models.language_model import abstract_model, train_flops_per_token
from jaxlm.ops import forms
from jaxlm.optim.registry import make_optimizer
from jaxlm.optim.schedules import make_schedule
from jaxlm.parallel import processes
from jaxlm.parallel.context import Rules, use_mesh
from jaxlm.parallel.mesh import make_mesh, make_rules, partition_spec
from jaxlm.schema import UserError
from jaxlm.training.checkpoint import Checkpoints
from jaxlm.training.metrics import MetricsWriter, ThroughputMeter, TrainingProgress, format_count, peak_flops
from jaxlm.training.preemption import Preempted, PreemptionGuard
from jaxlm.training.run import open_run, versions
from jaxlm.training.state import TrainState, abstract_state, init_state, state_shardings
from jaxlm.training.step import BATCH_FIELDS, Evaluator, make_eval_step, make_train_step


class TrainingDiverged(UserError):
    """The loss or the gradient is not finite."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves."""

    run_directory: Path
    step: int
    held_out_loss: float
    bits_per_byte: float | None
    sample: str | None


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything a run needs before its first step; building it computes nothing on the devices."""

    config: RunConfig
    tokenizer: Tokenizer
    mesh: Mesh
    rules: Rules
    batch_sharding: NamedSharding
    rows: list[int]
    graphdef: nnx.GraphDef
    infos: dict
    optimizer: object
    schedule: object
    shardings: TrainState
    flops_per_token: float

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def to_device(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows of a batch as global arrays."""
        fields = {name: batch[name] for name in BATCH_FIELDS}
        return processes.to_global(fields, self.batch_sharding, self.config.data.batch_size)


def prepare(config: RunConfig, tokenizer: Tokenizer | None = None, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Resolve a config for the devices at hand.

    Raises:
      UserError: for a vocabulary, mesh or schedule that does not fit.
    """
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
    config = with_vocabulary(config, tokenizer)
    mesh = make_mesh(config.mesh.sizes(), devices)
    rules = make_rules(config.mesh.rules)
    check_batch(config, mesh.shape, rules["batch"])
    model = abstract_model(config.model, compute_dtype(config.train.dtype, mesh.devices.flat[0].platform))
    graphdef, _ = nnx.split(model)
    infos = params_lib.describe(model)
    schedule = make_schedule(config.optimizer.schedule, config.optimizer.learning_rate, config.train.steps)
    optimizer = make_optimizer(config.optimizer, schedule, infos)
    batch_sharding = NamedSharding(mesh, partition_spec(("batch",), rules))
    return Setup(
        config=config,
        tokenizer=tokenizer,
        mesh=mesh,
        rules=rules,
        batch_sharding=batch_sharding,
        rows=processes.local_rows(batch_sharding, config.data.batch_size),
        graphdef=graphdef,
        infos=infos,
        optimizer=optimizer,
        schedule=schedule,
        shardings=state_shardings(optimizer, infos, mesh, rules),
        flops_per_token=train_flops_per_token(config.model, infos, config.data.sequence_length),
    )


def jit_train_step(setup: Setup) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The training step of a run, compiled for its mesh at the first call; the old state's memory is reused."""
    config = setup.config
    step = make_train_step(
        setup.graphdef, setup.optimizer, setup.schedule,
        accumulation=config.train.accumulation, clip=config.optimizer.clip, z_loss=config.train.z_loss,
        loss_chunk=config.train.loss_chunk,
    )  # fmt: skip
    return jax.jit(step, out_shardings=(setup.shardings, setup.replicated), donate_argnums=0)


def train(config: RunConfig, overridden: Iterable[tuple] = (), *, accept_changes: bool = False) -> Result:
    """Train a run from its config, or continue it from its newest readable checkpoint.

    Leaves the run directory of `jaxlm.training.run`; prints a summary, progress and a sample to standard error and output.

    Raises:
      UserError: for bad settings or data, before anything is written.
      TrainingDiverged: when the loss is not finite; names the last good checkpoint.
      Preempted: after SIGTERM or Ctrl-C, once the state is saved.
    """
    processes.initialize()
    setup = prepare(config)
    config, run_dir = setup.config, setup.config.directory
    leader = jax.process_index() == 0
    console = Console(stderr=True, quiet=not leader, highlight=False)

    batches = train_batches(
        config.data, setup.tokenizer, batch_size=config.data.batch_size, sequence_length=config.data.sequence_length,
        seed=config.seed, rows=setup.rows,
    )  # fmt: skip
    held_out = held_out_batches(
        config.data, setup.tokenizer, batch_size=config.data.batch_size, sequence_length=config.data.sequence_length,
        max_tokens=config.evaluation.tokens, rows=setup.rows,
    )  # fmt: skip
    notes = open_run(config, accept_changes=accept_changes)
    for line in summary(setup, overridden):
        console.print(line, soft_wrap=True, markup=False)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)

    train_step = jit_train_step(setup)
    eval_step = make_eval_step(setup.graphdef, setup.tokenizer.token_bytes, loss_chunk=config.train.loss_chunk)
    evaluate = Evaluator(jax.jit(eval_step, out_shardings=setup.replicated), held_out, to_device=setup.to_device)
    peak = peak_flops(setup.mesh.devices.flat[0])
    meter = ThroughputMeter(config.tokens_per_step)

    with (
        Checkpoints(run_dir, config.checkpoint) as checkpoints,
        PreemptionGuard() as guard,
        use_mesh(setup.mesh, setup.rules),
    ):
        restored = checkpoints.restore(abstract_state(setup.optimizer, setup.infos, setup.shardings))
        if restored is None:
            state, first = init_state(config.model, setup.optimizer, config.seed, setup.shardings), 0
        else:
            for step, reason in restored.skipped:
                console.print(f"warning: checkpoint {step} cannot be read ({reason}); using {restored.step}", markup=False)
            state, first = restored.state, restored.step
            batches.set_state(restored.extra["data"])
            console.print(f"resumed from step {first} of {config.train.steps}")

        def save(step: int, *, force: bool = False) -> None:
            extra = {"data": batches.get_state(), "versions": versions(), "config": config.model_dump(mode="json")}
            checkpoints.save(step, state, extra, force=force)

        with (
            MetricsWriter(run_dir, resume_step=first) as metrics,
            TrainingProgress(console, total=config.train.steps, start=first) as progress,
        ):
            # Reading a number off the device waits for it, so each step's are read while the next one runs.
            unread: deque[tuple[int, dict]] = deque()

            def read(keep: int) -> None:
                while len(unread) > keep:
                    step, device_values = unread.popleft()
                    values = {name: float(value) for name, value in jax.device_get(device_values).items()}
                    meter.step()
                    if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                        metrics.write(step, **values)
                        # The checkpoint in flight may be the last good one.
                        checkpoints.wait()
                        raise TrainingDiverged(divergence_message(step, values, checkpoints.steps, run_dir))
                    rate = meter.tokens_per_second
                    progress.update(step, loss=values["loss"], tokens_per_second=rate, step_time=meter.step_time)
                    if step % config.train.log_every == 0 or step in (1, config.train.steps):
                        metrics.write(
                            step,
                            **values,
                            tokens_seen=step * config.tokens_per_step,
                            tokens_per_second=rate,
                            step_time=meter.step_time,
                            model_flops_per_second=rate and rate * setup.flops_per_token,
                            mfu=rate and peak and rate * setup.flops_per_token / (peak * setup.mesh.size),
                            elapsed=time.perf_counter() - started,
                        )

            started = time.perf_counter()
            result = None
            for step in range(first + 1, config.train.steps + 1):
                state, values = train_step(state, setup.to_device(next(batches)))
                unread.append((step, values))
                read(keep=1)
                stop = guard.should_stop(step)
                last = step == config.train.steps
                evaluates = last or (config.evaluation.every and step % config.evaluation.every == 0)
                saves = last or stop or step % config.checkpoint.every == 0
                if evaluates or saves:
                    # Nothing is saved or reported of a state whose own step has not been seen to be finite.
                    read(keep=0)
                    with meter.pause():
                        if evaluates and not stop:
                            result = evaluate(state.params)
                            metrics.write(step, **result)
                            progress.note(f"step {step}: {describe_evaluation(result)}")
                        if saves:
                            save(step, force=last or stop)
                if stop:
                    checkpoints.wait()
                    raise Preempted(
                        f"stopped by signal {guard.received} after step {step}; saved {run_dir / 'checkpoints' / str(step)}. "
                        "The same command continues the run",
                        128 + guard.received,
                    )
            checkpoints.wait()
            if result is None:
                console.print(f"the run is already complete at step {first}; nothing to train")
                result = evaluate(state.params)

    sample = None
    if config.sample.tokens:
        sample = write_sample(setup, state.params, console)
    console.print(f"done: {describe_evaluation(result)}; run directory {run_dir}", soft_wrap=True)
    return Result(run_dir, int(state.step), result["held_out_loss"], result["bits_per_byte"], sample)


def describe_evaluation(result: dict[str, float | None]) -> str:
    size = result["bits_per_byte"]
    return f"held-out loss {result['held_out_loss']:.4f} nats per token" + (f", {size:.4f} bits per byte" if size else "")


def summary(setup: Setup, overridden: Iterable[tuple]) -> list[str]:
    """What is about to run, in ten lines."""
    config = setup.config
    device = setup.mesh.devices.flat[0]
    mesh = ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items() if size > 1) or "one device"
    embedding = params_lib.count(setup.infos, frozenset({"input", "output"}))
    total = params_lib.count(setup.infos)
    dtype = compute_dtype(config.train.dtype, device.platform)
    chosen = forms_in_use(config, device.platform, dtype)
    micro = f", in {config.train.accumulation} micro-batches" if config.train.accumulation > 1 else ""
    changes = ", ".join(f"{name}={new}" for name, _, new in overridden) or "none"
    rows = [
        ("run", f"{config.name} (seed {config.seed}), {config.train.steps} steps"),
        ("model", f"{config.model.depth} blocks of width {config.model.width}: {config.model.describe_layout()}"),
        ("parameters", f"{total:,} ({format_count(total)}), of which embedding and readout {embedding:,}"),
        ("model FLOPs", f"{format_count(setup.flops_per_token)} per token (3 x forward; causal attention counted half)"),
        ("tokens a step", f"{config.tokens_per_step:,} = {config.data.batch_size} rows x {config.data.sequence_length}{micro}"),
        ("devices", f"{setup.mesh.size} x {device.device_kind} ({mesh}), {jax.process_count()} process(es)"),
        ("precision", f"{np.dtype(dtype).name} compute, float32 parameters; optimizer {config.optimizer.kind}"),
        ("forms", "; ".join(f"{op}: {choice.form} ({choice.reason})" for op, choice in chosen.items())),
        ("overridden", changes),
        ("run directory", str(config.directory)),
    ]  # fmt: skip
    return [f"{name:>15}  {text}" for name, text in rows]


def forms_in_use(config: RunConfig, platform: str, dtype) -> dict[str, forms.Choice]:
    """The form that each op of the model takes in training (rows are packed, so segment ids are given), and why."""
    mixers = [config.model.mixer(name) for name in config.model.layer_names()]
    ops = dict.fromkeys(mixer.op for mixer in mixers if mixer.op is not None)
    length = config.data.sequence_length
    return {op: forms.choose(op, "auto", T=length, dtype=np.dtype(dtype), platform=platform, masked=True) for op in ops}


def divergence_message(step: int, values: dict[str, float], saved: Sequence[int], run_dir: Path) -> str:
    good = [s for s in saved if s < step]
    kept = "no checkpoint was saved before it"
    if good:
        kept = f"the last good checkpoint is {run_dir / 'checkpoints' / str(good[-1])}"
    return (
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: not finite, so the run stops; {kept}. "
        "A lower optimizer.learning_rate, a longer optimizer.schedule.warmup_steps or a smaller optimizer.clip usually helps"
    )


def write_sample(setup: Setup, params: dict, console: Console) -> str:
    """Continue the sample prompt with the trained model and print both."""
    config = setup.config
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    model = nnx.merge(setup.graphdef, jax.device_put(params, jax.local_devices()[0]))
    settings = SamplingSettings(
        max_tokens=config.sample.tokens, temperature=config.sample.temperature, seed=config.seed, stop_at_end_of_text=False
    )
    [text] = generate(model, setup.tokenizer, [config.sample.prompt], settings)
    console.rule("sample")
    console.print(config.sample.prompt + text, markup=False, soft_wrap=True)
    console.rule()
    return text
