"""metrics.jsonl, throughput and the picture drawn from them."""

import io
import json
import math
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from jaxlm.schema import UserError
from jaxlm.training import metrics
from jaxlm.training.plot import draw_runs, plot_runs, smooth


def write(tmp_path, steps, resume_step=0, **values):
    with metrics.MetricsWriter(tmp_path, resume_step) as writer:
        for step in steps:
            writer.write(step, loss=1.0 / step, **values)


def steps(path):
    return [line["step"] for line in metrics.read_metrics(path)]


def test_lines_are_strict_json_and_hide_nothing(tmp_path):
    write(tmp_path, [1], mfu=None, bad=math.nan, worse=-math.inf)
    [text] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    line = json.loads(text, parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": 1.0, "mfu": None, "bad": "nan", "worse": "-inf"}
    assert math.isnan(float(line["bad"]))


def test_resuming_keeps_each_step_once_and_loses_nothing(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], resume_step=3)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert steps(tmp_path / "metrics.dropped.jsonl") == [4, 5]


def test_a_half_written_last_line_is_left_out_and_other_damage_named(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "lo')
    assert steps(path) == [1, 2]
    write(tmp_path, [3], resume_step=2)
    assert steps(path) == [1, 2, 3]
    path.write_text("garbage\n" + whole)
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not JSON"):
        metrics.read_metrics(path)
    with pytest.raises(UserError, match="no metrics there"):
        metrics.read_metrics(tmp_path / "nowhere")


def test_throughput_leaves_out_the_first_step_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = metrics.ThroughputMeter(100)
    assert meter.tokens_per_second is None
    now[0] = 50.0  # compiling
    meter.step()
    assert meter.step_time is None
    now[0] = 52.0
    meter.step()
    with meter.pause():
        now[0] = 80.0
    now[0] = 82.0
    meter.step()
    assert meter.step_time == 2.0
    assert meter.tokens_per_second == 50.0


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12),
     ("TPU v6 lite", 918e12), ("TPU7x", 1153.5e12), ("cpu", None)],
)  # fmt: skip
def test_peaks(kind, peak):
    assert metrics.peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_counts_and_times_read_well():
    assert [metrics.format_count(x) for x in (999, 12_345_678, 1.5e12)] == ["999", "12.3M", "1.5T"]
    assert [metrics.format_seconds(x) for x in (5, 65, 3700)] == ["0:05", "1:05", "1:01:40"]


def test_progress_off_a_terminal_prints_lines_and_silence_is_silent():
    for quiet in (False, True):
        out = io.StringIO()
        with metrics.TrainingProgress(Console(file=out, quiet=quiet), total=10, start=0) as progress:
            progress.update(1, loss=2.5, tokens_per_second=None, step_time=None)
            progress.update(2, loss=2.4, tokens_per_second=100.0, step_time=2.0)
            progress.update(10, loss=1.5, tokens_per_second=100.0, step_time=2.0)
        text = out.getvalue()
        if quiet:
            assert text == ""
        else:
            assert "step 1/10  loss 2.5000" in text
            assert "step 2/10" not in text
            assert "step 10/10  loss 1.5000  100 tokens/s  2 s a step  0:00 left" in text


def test_smoothing_starts_at_the_first_value_and_follows():
    assert smooth([2.0] * 10) == pytest.approx([2.0] * 10)
    curve = smooth([4.0] * 50 + [0.0] * 50)
    assert curve[49] == pytest.approx(4.0)
    assert 0 < curve[55] < 4
    assert curve[99] < 0.1


def test_the_plot_shows_what_was_logged(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with metrics.MetricsWriter(tmp_path / name) as writer:
            for step in (1, 2, 3):
                writer.write(step, loss=3.0 / step)
            writer.write(3, held_out_loss=1.25)
    [axes] = draw_runs([tmp_path / "first", tmp_path / "second"]).axes
    raw = axes.lines[0]
    assert list(raw.get_xdata()) == [1, 2, 3]
    assert list(raw.get_ydata()) == [3.0, 1.5, 1.0]
    assert list(axes.lines[2].get_ydata()) == [1.25]
    assert axes.get_legend().get_texts()[0].get_text() == "first: training"
    path = plot_runs([tmp_path / "first"])
    assert path == tmp_path / "first" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_steps_cannot_be_plotted(tmp_path):
    with metrics.MetricsWriter(tmp_path):
        pass
    with pytest.raises(UserError, match="holds no training step"):
        plot_runs([tmp_path])
