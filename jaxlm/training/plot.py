"""Loss curves of runs as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxlm.schema import UserError
from jaxlm.training.metrics import METRICS, read_metrics


def plot_runs(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Draw training loss (thin: each line of the log; thick: smoothed) and held-out loss (points) against steps.

    Args:
      run_dirs: one or several runs.
      output: the PNG; None for loss.png in the first run.

    Returns:
      Where the picture is.

    Raises:
      UserError: if the extra `plot` is missing or a run has no metrics.
    """
    figure = draw_runs(run_dirs)
    output = Path(output or Path(run_dirs[0]) / "loss.png")
    if output.suffix != ".png":
        raise UserError(f"--output {output}: the picture is a PNG; give a name that ends in .png")
    figure.savefig(output, dpi=150)
    return output


def draw_runs(run_dirs: Sequence[Path]):
    """The matplotlib figure of `plot_runs`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plotting needs matplotlib; install the extra: pip install 'jaxlm[plot]'") from error

    curves = [(Path(run_dir).name, *_curves(Path(run_dir))) for run_dir in run_dirs]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, steps, losses, held_out) in enumerate(curves):
        color = f"C{number}"
        axes.plot(steps, losses, color=color, linewidth=0.7, alpha=0.35)
        axes.plot(steps, smooth(losses), color=color, linewidth=1.6, label=f"{name}: training")
        if held_out:
            axes.plot(
                [step for step, _ in held_out], [loss for _, loss in held_out],
                color=color, marker="o", linestyle="--", linewidth=1, markersize=5, label=f"{name}: held out",
            )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential moving average over about `share` of the curve, corrected for its start."""
    decay = 1 - 1 / max(1.0, share * len(values))
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(total / weight)
    return smoothed


def _curves(run_dir: Path) -> tuple[list[int], list[float], list[tuple[int, float]]]:
    lines = read_metrics(run_dir / METRICS)
    training = [(line["step"], float(line["loss"])) for line in lines if "loss" in line]
    if not training:
        raise UserError(f"{run_dir}: its {METRICS} holds no training step yet; nothing to plot")
    held_out = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    return [step for step, _ in training], [loss for _, loss in training], held_out
