"""Small models of every mixer on diagnostic tasks: what each can recall, what each can track, and how far beyond training.

Every cell is a model of two blocks trained from scratch on freshly drawn examples and tested at the sizes it was trained on
and beyond. The results are kept as they come: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from jaxlm.bench.report import chosen, environment, new_figure, print_table, read_json, write_json
from jaxlm.data.tasks import TASKS, Examples, Task
from jaxlm.layers.ffn import SwiGLUSettings
from jaxlm.layers.mixers import MIXERS, consumes, produces
from jaxlm.models.language_model import LanguageModel, ModelSettings, init_params
from jaxlm.schema import UserError

# Settings that differ from a kind's defaults, which are made for widths of a thousand; kinds without an entry join as they are.
CHUNK = 16
HEADS = {"heads": 2}
VARIANTS: dict[str, dict] = {
    # Without the norm of queries and keys recall is found from more seeds.
    "attention": HEADS | {"qk_norm": False},
    "gla": HEADS | {"gate_rank": 8, "convolution": 4, "chunk_size": CHUNK},
    "retention": HEADS | {"chunk_size": CHUNK},
    "linear": HEADS | {"convolution": 4, "chunk_size": CHUNK},
    "mamba2": {"head_dim": 16, "state": 32, "chunk_size": CHUNK},
    "hgrn2": {"head_dim": 32, "chunk_size": CHUNK},
    "lightnet": {"head_dim": 32, "gate_rank": 8, "chunk_size": CHUNK},
    "deltanet": HEADS | {"chunk_size": CHUNK},
    "deltanet-negative": HEADS | {"kind": "deltanet", "negative_eigenvalues": True, "chunk_size": CHUNK},
    "gated_deltanet": HEADS | {"head_dim": 32, "expand_v": 1.0, "chunk_size": CHUNK},
    "gated_deltanet-negative": HEADS
    | {"kind": "gated_deltanet", "head_dim": 32, "expand_v": 1.0, "negative_eigenvalues": True, "chunk_size": CHUNK},
    "kda": HEADS | {"head_dim": 32, "chunk_size": CHUNK},
    "kda-negative": HEADS | {"kind": "kda", "head_dim": 32, "negative_eigenvalues": True, "chunk_size": CHUNK},
    "rwkv7": {"head_dim": 32, "chunk_size": CHUNK},
    "mla": HEADS | {"kv_rank": 32, "nope_dim": 16, "rope_dim": 16, "value_dim": 32},
    "mom": HEADS | {"chunk_size": CHUNK},
}
# Softmax attention, a linear recurrence, and the delta rule that can track states: the known separation shows in these.
QUICK_MIXERS = ("attention", "gla", "deltanet-negative")
QUICK_TASKS = (
    "parity", "modular_addition", "s5_swaps", "copying", "mqar_few", "k_hop", "in_context_language", "addition_reverse",
)  # fmt: skip


def mixer_names() -> list[str]:
    """All mixers that stand alone: every kind that reads no other block's values, and the variants."""
    alone = [kind for kind, (settings, _) in MIXERS.items() if consumes(settings()) is None and produces(settings()) is None]
    variants = [name for name, changes in VARIANTS.items() if changes.get("kind", name) in alone]
    return list(dict.fromkeys([*alone, *variants]))


class Scale(NamedTuple):
    """How large models and training are."""

    width: int
    depth: int
    batch: int
    steps: int
    learning_rate: float
    test_examples: int
    pool: int  # distinct training examples


QUICK = Scale(width=64, depth=2, batch=32, steps=600, learning_rate=2e-3, test_examples=128, pool=8_192)
FULL = Scale(width=128, depth=2, batch=64, steps=1000, learning_rate=2e-3, test_examples=256, pool=32_768)

SIZES = 4  # that training examples have, from an eighth of the largest
STEPS_A_CALL = 50


def model_settings(mixer: str, vocab: int, scale: Scale) -> ModelSettings:
    """Two blocks of a named mixer."""
    changes = {"kind": mixer, **VARIANTS.get(mixer, {})}
    settings = MIXERS[changes["kind"]][0](**changes)
    return ModelSettings(
        vocab_size=vocab, width=scale.width, depth=scale.depth, pattern=("mixer",), mixers={"mixer": settings},
        ffn=SwiGLUSettings(hidden=2 * scale.width), tied_embedding=False,
    )  # fmt: skip


def train_cell(mixer: str, task_name: str, seed: int, scale: Scale, *, test: bool = True) -> dict:
    """Train one model and test it.

    Returns:
      accuracy: by test size (share of asked positions whose answer is right); loss: of the last training call, None if
      training diverged; parameters; seconds.
    """
    task = TASKS[task_name]
    total = round(task.effort * scale.steps)
    settings = model_settings(mixer, task.vocab, scale)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(settings, rngs=nnx.Rngs(0))))
    schedule = optax.warmup_cosine_decay_schedule(0.0, scale.learning_rate, total // 20 + 1, total)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    def loss(params, tokens, targets, mask):
        model = nnx.merge(graphdef, params)
        hidden, _, auxiliary = model.hidden_with_auxiliary(tokens)
        nll = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets)
        return jnp.sum(nll * mask) / jnp.sum(mask) + auxiliary

    @jax.jit
    def steps(params, opt_state, batches):
        def step(carry, batch):
            params, opt_state = carry
            value, gradient = jax.value_and_grad(loss)(params, *batch)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        (params, opt_state), values = jax.lax.scan(step, (params, opt_state), batches)
        return params, opt_state, jnp.mean(values)

    start = time.perf_counter()
    draw = _Batches(task, task_name, seed, scale)
    params = init_params(settings, seed)
    opt_state = optimizer.init(params)
    for done in range(0, total, STEPS_A_CALL):
        batches = draw(min(STEPS_A_CALL, total - done))
        params, opt_state, value = steps(params, opt_state, batches)
    result = {
        "loss": float(value) if np.isfinite(value) else None,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "steps": total,
    }
    if test:
        predict = jax.jit(lambda params, tokens: jnp.argmax(nnx.merge(graphdef, params)(tokens)[0], axis=-1))
        result["accuracy"] = {
            str(size): accuracy(lambda tokens: np.asarray(predict(params, tokens)), task, task_name, size, scale)
            for size in task.test
        }
    return {**result, "seconds": time.perf_counter() - start}


def accuracy(predict, task: Task, task_name: str, size: int, scale: Scale) -> float:
    """Share of the asked positions that `predict` (tokens -> answers) gets right, on examples that training never drew."""
    examples = task.generate(_rng("test", task_name, size), scale.test_examples, size)
    right = total = 0
    for begin in range(0, scale.test_examples, scale.batch):
        part = Examples(*(None if x is None else x[begin : begin + scale.batch] for x in examples))
        answers = predict(part.tokens)
        hit = answers == part.targets
        if part.accepted is not None:
            hit = np.take_along_axis(part.accepted, answers[..., None], axis=-1)[..., 0]
        right, total = right + int((hit & part.mask).sum()), total + int(part.mask.sum())
    return right / total


def _rng(*key) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])


class _Batches:
    """Training batches [steps, batch, T] from a pool drawn once: no GPU waits for Python.

    Sizes have equal shares of it, as recall and state tracking are learnt from the small ones first; all are padded to one
    length, so that one program is compiled.
    """

    def __init__(self, task: Task, task_name: str, seed: int, scale: Scale):
        smallest, largest = task.train
        sizes = sorted({round(s) for s in np.geomspace(max(smallest, largest / 8), largest, SIZES)})
        counts = [scale.pool // len(sizes) + (rest < scale.pool % len(sizes)) for rest in range(len(sizes))]
        parts = [task.generate(_rng("train", task_name, seed, s), n, s)[:3] for s, n in zip(sizes, counts, strict=True)]
        length = max(tokens.shape[1] for tokens, _, _ in parts)
        self.pool = [
            np.concatenate([np.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in arrays]).astype(dtype)
            for arrays, dtype in zip(zip(*parts, strict=True), (np.int32, np.int32, np.float32), strict=True)
        ]
        self.rng, self.scale = _rng("order", task_name, seed), scale

    def __call__(self, steps: int) -> tuple:
        rows = self.rng.integers(self.scale.pool, size=(steps, self.scale.batch))
        return tuple(x[rows] for x in self.pool)


def run(
    output: Path,
    *,
    mixers: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: int = 1,
    quick: bool = False,
    force: bool = False,
    steps: int | None = None,
    jobs: int = 1,
    scale: Scale | None = None,
) -> dict:
    """Train and test every cell, print the table, write OUTPUT/tasks.json after each and draw OUTPUT/tasks.png.

    Args:
      output: directory; cells that its tasks.json has at this scale are not run again unless `force`.
      mixers: of `mixer_names()`; None for all, or with `quick` for a few.
      tasks: of `TASKS`; likewise.
      seeds: models a cell; the table shows the best, as the question is what a mixer can learn.
      quick: small models, three mixers and eight tasks by default: about a quarter of an hour of a laptop's CPU.
      steps: training steps instead of the scale's.
      jobs: cells at once, each in a process of its own. Processes take the GPUs in turn and share them, as small models
        leave one idle most of the time (several run at once if NVIDIA's MPS, `nvidia-cuda-mps-control -d`, is on).

    Raises:
      UserError: for names that are not there, or numbers that mean nothing.
    """
    known = mixer_names()
    mixers = list(QUICK_MIXERS) if quick and not mixers else chosen(mixers, known, "--mixers")
    tasks = list(QUICK_TASKS) if quick and not tasks else chosen(tasks, TASKS, "--tasks")
    for option, number in (("--seeds", seeds), ("--steps", steps), ("--jobs", jobs)):
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: it must be at least 1")
    scale = scale or (QUICK if quick else FULL)
    if steps is not None:
        scale = scale._replace(steps=steps)
    path = output / "tasks.json"
    old = None if force else read_json(path)
    cells = [] if old is None else [cell for cell in old["cells"] if cell["scale"] == scale._asdict()]
    done = {(c["mixer"], c["task"], c["seed"]) for c in cells}
    wanted = [(m, t, s) for t in tasks for m in mixers for s in range(seeds)]
    wanted = [cell for cell in wanted if cell not in done]
    if jobs > 1:
        # Read when a process first uses the GPU; otherwise the first of them takes three quarters of its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console = Console(stderr=True)
    here = environment()
    # Cells of an earlier run may come from another machine, so each says its own.
    result = {"scale": scale._asdict(), "cells": cells}
    for number, ((mixer, task, seed), trained) in enumerate(_trained(wanted, scale, jobs)):
        cell = {"mixer": mixer, "task": task, "seed": seed, **trained}
        cells.append(cell | {"scale": scale._asdict(), "environment": here})
        # In one order whichever is done first; cells of other versions may have names that are no longer known.
        cells.sort(key=lambda c: (*([*names, c[k]].index(c[k]) for k, names in (("mixer", known), ("task", TASKS))), c["seed"]))
        write_json(path, result)
        scores = ", ".join(f"{size}: {value:.3f}" for size, value in cell["accuracy"].items())
        loss = "not finite" if cell["loss"] is None else f"{cell['loss']:.3f}"
        line = f"[{number + 1}/{len(wanted)}] {task}, {mixer}: loss {loss}, {scores} ({cell['seconds']:.0f} s)"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print_table(*table(result))
    console.print(f"wrote {path}" + (f" and {output / 'tasks.png'}" if draw(result, output) else ""))
    return result


def _trained(wanted: Sequence[tuple], scale: Scale, jobs: int) -> Iterator[tuple[tuple, dict]]:
    """Cells (mixer, task, seed) and what `train_cell` returns of them, as they are done."""
    if jobs == 1:
        yield from ((cell, train_cell(*cell, scale)) for cell in wanted)
        return
    # Not forked: jax has threads.
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    for name in _gpu_names(jobs):
        gpus.put(name)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_take_gpu, initargs=(gpus,)) as pool:
        futures = {pool.submit(train_cell, *cell, scale): cell for cell in wanted}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _gpu_names(jobs: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for each of so many processes, which take the GPUs in turn; none without GPUs."""
    if jax.default_backend() != "gpu":
        return []
    count = jax.local_device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [names[job % count] for job in range(jobs)]


def _take_gpu(gpus) -> None:
    """Give this process, before it uses one, a GPU of those that are left, if there are any."""
    if not gpus.empty():
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()


def best(result: dict) -> dict[tuple[str, str], dict[str, float]]:
    """(mixer, task) -> accuracy by size, of the seed that is best at the largest size; empty where all diverged."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for cell in result["cells"]:
        key, scores = (cell["mixer"], cell["task"]), cell["accuracy"]
        if cell["loss"] is None:
            found.setdefault(key, {})
        elif not found.get(key) or list(scores.values())[-1] > list(found[key].values())[-1]:
            found[key] = scores
    return found


def table(result: dict) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: accuracy in per cent at every size."""
    scores = best(result)
    mixers = list(dict.fromkeys(cell["mixer"] for cell in result["cells"]))
    tasks = list(dict.fromkeys(cell["task"] for cell in result["cells"]))
    scale = result["scale"]
    devices = ", ".join(dict.fromkeys(cell["environment"]["devices"] for cell in result["cells"]))
    title = (
        f"{devices}: accuracy in % at the trained size and beyond it (sizes under the task); {scale['depth']} blocks of width "
        f"{scale['width']}, {scale['steps']} steps of {scale['batch']}; chance in brackets"
    )
    columns = [
        "mixer",
        *(f"{t}\n({100 * TASKS[t].chance:.0f}) " + "/".join(map(str, TASKS[t].test)) for t in tasks),
    ]

    def cell(mixer, task):
        if (mixer, task) not in scores:
            return "-"
        return "/".join(f"{100 * value:.0f}" for value in scores[mixer, task].values()) or "diverged"

    return title, columns, [[mixer, *(cell(mixer, task) for task in tasks)] for mixer in mixers]


def draw(result: dict, output: Path) -> bool:
    """Accuracy of every mixer at the trained and the largest size, a panel a task; False without matplotlib."""
    scores = best(result)
    mixers = list(dict.fromkeys(mixer for mixer, _ in scores))
    tasks = list(dict.fromkeys(task for _, task in scores))
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    made = new_figure(rows, columns, (4.6 * columns, (0.24 * len(mixers) + 1.2) * rows))
    if made is None:
        return False
    figure, axes = made
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        first, last = TASKS[task].test[0], TASKS[task].test[-1]
        trained = [mixer for mixer in mixers if scores.get((mixer, task))]
        for row, mixer in enumerate(trained):
            values = list(scores[mixer, task].values())
            axis.plot([values[0], values[-1]], [row, row], color="0.7", linewidth=1, zorder=1)
            axis.scatter(values[0], row, color="C0", s=26, zorder=2)
            axis.scatter(values[-1], row, color="C1", s=26, zorder=2)
        axis.axvline(TASKS[task].chance, color="0.5", linestyle=":", linewidth=1)
        axis.set_title(f"{task}\n{first} (blue, trained), {last} (orange)", fontsize=9)
        axis.set(xlim=(-0.03, 1.03), yticks=range(len(trained)), yticklabels=trained)
        axis.invert_yaxis()
    figure.savefig(output / "tasks.png", dpi=120)
    return True
