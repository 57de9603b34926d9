"""What a run reports: metrics.jsonl, TensorBoard, throughput, and the progress bar."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxlm.schema import UserError

METRICS = "metrics.jsonl"
DROPPED = "metrics.dropped.jsonl"

Value = float | int | str | None


class MetricsWriter:
    """Appends one JSON object a line to RUN/metrics.jsonl, and scalars to RUN/tensorboard if that extra is installed.

    JSON has no NaN or infinity: they are written as the strings "nan", "inf" and "-inf". Only process 0 writes.

    Args:
      run_dir: the run.
      resume_step: lines of later steps (written after the checkpoint that training continues from) are moved to
        metrics.dropped.jsonl, so that a curve has each step once.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0):
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        path = Path(run_dir) / METRICS
        if path.exists():
            _drop_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboardX") is not None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, **values: Value) -> None:
        """Write one line; finite numbers also go to TensorBoard."""
        if self._file is None:
            return
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file; a half-written last line (a killed process) is left out.

    Raises:
      UserError: if there is no such file, or another line is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no metrics there; give a run directory that `jaxlm train` has written to")
    return [line for _, line in _parse(path)]


def _parse(path: Path) -> list[tuple[str, dict]]:
    texts = path.read_text(encoding="utf-8").splitlines()
    parsed = []
    for number, text in enumerate(texts, 1):
        try:
            parsed.append((text, json.loads(text)))
        except json.JSONDecodeError as error:
            if number == len(texts):
                break
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); remove or mend that line") from error
    return parsed


def _drop_after(path: Path, step: int) -> None:
    lines = _parse(path)
    kept = [text for text, line in lines if line["step"] <= step]
    dropped = [text for text, line in lines if line["step"] > step]
    if dropped:
        with path.with_name(DROPPED).open("a", encoding="utf-8") as file:
            file.writelines(text + "\n" for text in dropped)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
    temporary.replace(path)


def _plain(value: Value) -> Value:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class ThroughputMeter:
    """Tokens per second over the last steps. The first step (it compiles) and pauses (evaluation, saving) do not count.

    Args:
      tokens_per_step: of the global batch.
      window: steps averaged over.
    """

    def __init__(self, tokens_per_step: int, window: int = 20):
        self.tokens_per_step = tokens_per_step
        self._times: deque[float] = deque(maxlen=window)
        self._last: float | None = None

    def step(self) -> None:
        """Call after every finished step."""
        now = time.perf_counter()
        if self._last is not None:
            self._times.append(now - self._last)
        self._last = now

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside belongs to no step."""
        began = time.perf_counter()
        yield
        if self._last is not None:
            self._last += time.perf_counter() - began

    @property
    def step_time(self) -> float | None:
        """Seconds a step, or None before the second one."""
        return sum(self._times) / len(self._times) if self._times else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens_per_step / self.step_time if self._times else None


# Dense bfloat16 peaks per jax device, in FLOP/s, by a part of `device_kind`; the first that matches counts. NVIDIA's
# figures are without sparsity; a v4 or v5p device is a chip, a v7x device half of one.
_PEAKS = (
    ("h100 pcie", 756e12),
    ("h100", 989.4e12),
    ("h200", 989.4e12),
    ("b200", 2250e12),
    ("a100", 312e12),
    ("tpu v4", 275e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5p", 459e12),
    ("tpu v5", 459e12),
    ("tpu v6", 918e12),
    ("tpu7x", 1153.5e12),
    ("tpu v7", 1153.5e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s; None where it is not known (every CPU), and then MFU is null."""
    kind = device.device_kind.lower()
    return next((peak for name, peak in _PEAKS if name in kind), None)


def format_count(value: float) -> str:
    """12,345,678 as 12.3M."""
    for size, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class TrainingProgress:
    """A progress bar on a terminal; elsewhere a line every few seconds. Silent where the console is.

    Args:
      console: where to.
      total: steps of the whole run.
      start: steps done before.
      every: seconds between lines where there is no terminal.
    """

    def __init__(self, console: Console, total: int, start: int, every: float = 10.0):
        self.console, self.total, self.every = console, total, every
        self._printed = -math.inf
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TextColumn("left"), TimeRemainingColumn(), console=console, disable=not console.is_terminal or console.quiet,
        )  # fmt: skip
        self._task = self._bar.add_task("compiling", total=total, completed=start)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        if not self.console.is_terminal:
            self.console.print("compiling the training step")
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def update(self, step: int, *, loss: float, tokens_per_second: float | None, step_time: float | None) -> None:
        """Show a finished step."""
        speed = "" if tokens_per_second is None else f"  {tokens_per_second:,.0f} tokens/s  {step_time:.3g} s a step"
        text = f"loss {loss:.4f}{speed}"
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._printed >= self.every or step == self.total):
            self._printed = now
            left = "" if step_time is None else f"  {format_seconds(step_time * (self.total - step))} left"
            self.console.print(f"step {step}/{self.total}  {text}{left}", markup=False)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False)
