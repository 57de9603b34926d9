"""What the TPU compiler made of kernels when their results were recorded."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def assert_as_recorded(kernel: dict, file: str, *, chip: str, op: str, direction: str, decay: str, tokens: int) -> None:
    """Static cycles and spilled registers of a kernel of `aot.report` are at most a tenth above those in a file of results.

    Args:
      tokens: tokens and heads (channels) of the kernel, over all rows.
    """
    known = {"chip": chip, "op": op, "direction": direction, "decay": decay}
    rows = json.loads((RESULTS / file).read_text())["rows"]
    [row] = [row for row in rows if {name: row[name] for name in known} == known]
    cycles = kernel["static_cycles"] / tokens
    assert cycles <= 1.1 * row["cycles"], (cycles, row["cycles"])
    assert kernel["spills"] <= 1.1 * row["spills"] + 4, (kernel["spills"], row["spills"])
