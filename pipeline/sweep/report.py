"""The report of a sweep, on one page that needs no other file: its table and a picture of all trials."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from pipeline.run_files import CURVES_FILE, REPORT_FILE
from pipeline.storage.folders import Folder
from pipeline.sweep.results import Result, best_of, ranked, val_losses

_TEMPLATE = Path(__file__).with_name("report.html")
_LOG_RATIO = 8  # of the largest and the smallest value, from which on an axis is logarithmic
_MOST_NAMES = 12  # in the legend

Curves = Mapping[str, Sequence[tuple[int, float]]]


def write_pages(output: Folder, results: Sequence[Result], shared: Mapping[str, Any]) -> list[str]:
    """Write report.html and, if there is a val loss and matplotlib is installed, curves.png; returns their names.

    Args:
        shared: the settings that all trials have in common.
    """
    curves = {result.name: val_losses(output, result.name) for result in results}
    picture = draw(results, curves)
    if picture is not None:
        output.write(CURVES_FILE, [picture])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        name=output.url.rpartition("/")[2],
        names=list(results[0].varied),
        results=ranked(results),
        best=best_of(results),
        ended=sum(result.has_ended for result in results),
        failed=[result for result in results if result.error],
        picture=None if picture is None else base64.b64encode(picture).decode("ascii"),
        shared=shared,
    )
    output.write(REPORT_FILE, [page.encode("utf-8", "replace")])
    return [REPORT_FILE] if picture is None else [CURVES_FILE, REPORT_FILE]


def draw(results: Sequence[Result], curves: Curves) -> bytes | None:
    """Val loss by step of all trials, and the last val loss by each setting that differs, as a PNG.

    None where there is no val loss yet, or where matplotlib, which MLflow brings along, is not installed.
    """
    if not any(curves.values()):
        return None
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return None
    shown = [result for result in ranked(results) if curves[result.name]]
    colors = {
        result.name: colormaps["viridis"](place / max(1, len(shown) - 1)) for place, result in enumerate(shown)
    }  # the best is dark
    names = list(results[0].varied)
    rows = -(-(1 + len(names)) // 2)
    figure = Figure(figsize=(11, 3.8 * rows), layout="constrained")
    axis = figure.add_subplot(rows, 2, 1)
    for result in shown:
        steps, losses = zip(*curves[result.name], strict=True)
        axis.plot(steps, losses, color=colors[result.name], label=result.name, marker="o", markersize=3, linewidth=1.2)
    axis.set(xlabel="optimizer step", ylabel="val loss (nats per token)")
    axis.grid(alpha=0.3)
    if len(shown) <= _MOST_NAMES:
        axis.legend(fontsize="small")
    for place, name in enumerate(names, 2):
        _draw_setting(figure.add_subplot(rows, 2, place), name, shown, colors)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _draw_setting(axis: Any, name: str, shown: Sequence[Result], colors: Mapping[str, Any]) -> None:
    """The last val loss by one setting: a dot for each finished trial, a cross for one that has not finished."""
    numbers = _numbers([result.varied[name] for result in shown])
    if numbers is not None and min(numbers) > 0 and max(numbers) / min(numbers) > _LOG_RATIO:
        axis.set_xscale("log")
    for place, result in enumerate(shown):
        at = numbers[place] if numbers is not None else result.varied[name]
        marker = "o" if result.status == "finished" else "x"
        axis.plot([at], [result.val_loss], marker=marker, color=colors[result.name], linestyle="none")
    axis.set(xlabel=f"{name} (dot: finished, cross: not)", ylabel="last val loss")
    axis.grid(alpha=0.3)


def _numbers(values: Sequence[str]) -> list[float] | None:
    """The values as numbers; None where one is a word."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None
