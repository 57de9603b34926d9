"""What the benchmarks share: where numbers were measured, and writing them down."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from jaxlm.schema import UserError, did_you_mean
from jaxlm.training.run import versions


def environment() -> dict[str, str | int]:
    """Versions, devices and cores: without them a number says nothing."""
    return {**versions(), "platform": jax.default_backend(), "cpu_cores": os.cpu_count()}


def chosen(names: Sequence[str] | None, known: Iterable[str], option: str) -> list[str]:
    """The names given to an option, or all known ones.

    Raises:
      UserError: for one that is not there.
    """
    known = list(known)
    for name in names or ():
        if name not in known:
            raise UserError(f"{option}: {name!r} is not there{did_you_mean(name, known)} (known: {', '.join(known)})")
    return list(names) if names else known


def write_json(path: Path, result: dict) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict | None:
    """What an earlier run left, None for nothing.

    Raises:
      UserError: for a file that is no result.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not a result of a benchmark ({error}); move it away or choose another --output") from error


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on standard output; the first column on the left, numbers on the right."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width to fit, and a table cut off is worse than one that wraps.
    console = Console(width=max(Console().width, Console(width=1000).measure(table).maximum))
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def new_figure(rows: int, columns: int, size: tuple[float, float]):
    """A matplotlib figure and its axes [rows, columns], or None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
