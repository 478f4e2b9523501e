"""The report card of a run, on one page: <run>/report.html, which needs no other file and no network; and curves.png.

It is made from the run's folder alone: the journal, summary.json and, where jobs/evaluate.py was run before,
evaluation.json. What they do not hold is left out of the page. MLflow gets it as an artifact.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import io
import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from typing_extensions import TypedDict

from pipeline.console import format_seconds, python_command
from pipeline.published_results import PUBLISHED
from pipeline.run_files import CHECKPOINTS_FOLDER, CURVES_FILE, REPORT_FILE, SCORES_FILE, SUMMARY_FILE
from pipeline.storage.folders import Folder
from pipeline.storage.json_files import DamagedFileError, read_json
from pipeline.tracking.journal import Entry
from pipeline.tracking.lineage import read_parent
from pipeline.tracking.run_history import RunHistory

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("report.html")
_NO_RECIPE = {
    *("data", "output", "tracking_uri", "experiment", "registered_model", "price_per_hour", "dry_run", "hellaswag"),
    *("tasks", "task_files", "tokens_per_second"),
}
_PANELS = {
    "loss (nats per token)": ("train/loss", "val/loss"),
    "learning rate": ("train/lr",),
    "tokens per second": ("perf/tokens_per_second",),
    "gradient norm": ("train/grad_norm",),
    "HellaSwag": ("eval/hellaswag_acc_norm", "eval/hellaswag_acc"),
    "CORE": ("eval/core",),
}
"""Label of an axis -> the metrics drawn on it."""
_OPTIONAL_PANELS = {"HellaSwag", "CORE"}
_SMOOTHED = {"train/loss", "train/grad_norm"}
_SMOOTHED_POINTS = 40  # with fewer the raw curve can be read
_MOST_POINTS = 2000  # of a curve, in the picture
_MOST_SAMPLES = 5

MASKED = ", each seeing its own document alone (document_mask)"
"""Behind the number of tokens of a val loss that was measured so: it compares with others of its kind only."""

Rows = list[tuple[str, str]]


class _Scores(TypedDict, total=False):
    """What the page shows of evaluation.json."""

    val_loss: float | None
    val_tokens: int | None
    document_mask: bool | None
    hellaswag_acc_norm: float | None
    hellaswag_acc: float | None
    hellaswag_questions: int | None
    tasks: dict[str, dict[str, int | float | None]] | None
    core: float | None
    core_stderr: float | None


class _Summary(_Scores, total=False):
    """What it shows of summary.json."""

    parameters: int
    tokens_seen: int
    steps: int
    first_loss: float
    last_loss: float
    best_step: int | None
    best_val_loss: float | None
    checkpoint: str
    peak_memory_gib: float


FiguresT = TypeVar("FiguresT", _Scores, _Summary)


def write_pages(folder: Folder, entries: Iterable[Entry]) -> list[str]:
    """Write curves.png and report.html of the run in ``folder``, from its journal's entries; returns their names."""
    history = RunHistory.from_journal(entries)
    curves = draw_curves(history)
    if curves is not None:
        folder.write(CURVES_FILE, [curves])
    summary, scores = _read_or_empty(folder, SUMMARY_FILE, _Summary), _read_or_empty(folder, SCORES_FILE, _Scores)
    folder.write(REPORT_FILE, [render(folder, history, summary, scores, curves).encode("utf-8", "replace")])
    return [REPORT_FILE] if curves is None else [CURVES_FILE, REPORT_FILE]


def render(
    folder: Folder, history: RunHistory, summary: Mapping[str, Any], scores: Mapping[str, Any], curves: bytes | None
) -> str:
    """The page as HTML, which holds the PNG ``curves``. A run that has not finished has an empty ``summary``."""
    best = summary.get("best_step")
    begin = datetime.datetime.fromtimestamp(history.periods[0][0], datetime.UTC) if history.periods else None
    params = history.params.items()
    return _template().render(
        name=folder.url.rpartition("/")[2],
        python=python_command(),
        history=history,
        summary=summary,
        begin=f"{begin:%Y-%m-%d}" if begin else None,
        result=_result(summary, scores, is_masked=bool(history.params.get("document_mask"))),
        comparison=comparison(scores, tokens=summary.get("tokens_seen")),
        is_chat=bool(history.metrics.get("val/token_accuracy")),
        curves=None if curves is None else base64.b64encode(curves).decode("ascii"),
        inputs=[*_origin(folder, history), *(_input(item) for item in history.inputs)],
        recipe=[(name, value) for name, value in params if name not in _NO_RECIPE and value not in (None, [])],
        speed=speed_rows(history, summary),
        samples=[*history.samples[:1], *history.samples[1:][-(_MOST_SAMPLES - 1) :]],  # the first and the last ones
        checkpoint=(
            summary.get("checkpoint", folder.url)
            if best is None
            else f"{folder.url}/{CHECKPOINTS_FOLDER}/step-{best:06d}"
        ),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def draw_curves(history: RunHistory) -> bytes | None:
    """Loss, learning rate, speed, gradient norm, HellaSwag and CORE by step, as a PNG.

    None where nothing was trained, or where matplotlib, which MLflow brings along, is not installed.
    """
    if not history.metrics.get("train/loss"):
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    panels = [
        (label, names)
        for label, names in _PANELS.items()
        if label not in _OPTIONAL_PANELS or any(history.metrics.get(name) for name in names)
    ]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(8.5, 2.8 * rows), layout="constrained")
    for place, (label, names) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, 2, place)
        for name in names:
            points = history.metrics.get(name, {})
            steps = sorted(points)
            steps = steps[:: -(-len(steps) // _MOST_POINTS) or 1]
            marker = "o" if len(steps) < 20 else None
            values = [points[step] for step in steps]
            (line,) = axis.plot(steps, values, label=name, linewidth=1.2, marker=marker, markersize=3)
            if name in _SMOOTHED and len(steps) >= _SMOOTHED_POINTS:
                line.set(alpha=0.3, label=f"{name} (raw)")
                axis.plot(steps, smoothed(values), label=name, linewidth=1.4, color=line.get_color())
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the values, with the bias of its start corrected.

    As Adam's moments are (Kingma and Ba 2014, section 3). Values that are not finite are passed over.
    """
    keep = 1 - 20 / max(20, len(values))
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else value)
    return result


def _result(summary: Mapping[str, Any], scores: Mapping[str, Any], *, is_masked: bool = False) -> Rows:
    """Losses and scores; ``is_masked`` says how the run itself measured its val loss."""
    rows: Rows = []
    note, scores_note = MASKED if is_masked else "", MASKED if scores.get("document_mask") else ""
    if _has(summary, "first_loss", "last_loss"):
        rows.append(("train loss", f"{summary['first_loss']:.4f} → {summary['last_loss']:.4f} nats per token"))
    if _has(summary, "val_loss", "val_tokens"):
        rows.append(("val loss", f"{summary['val_loss']:.4f} on {summary['val_tokens']:,} tokens{note}"))
    if _has(summary, "best_step", "best_val_loss"):
        rows.append(("best checkpoint", f"step {summary['best_step']:,}, val loss {summary['best_val_loss']:.4f}"))
    if _has(scores, "val_loss", "val_tokens"):
        rows.append(("whole val set", f"{scores['val_loss']:.4f} on {scores['val_tokens']:,} tokens{scores_note}"))
    hellaswag = scores if scores.get("hellaswag_acc_norm") is not None else summary
    if _has(hellaswag, "hellaswag_acc_norm", "hellaswag_acc", "hellaswag_questions"):
        text = (
            f"{hellaswag['hellaswag_acc_norm']:.4f} acc_norm, {hellaswag['hellaswag_acc']:.4f} acc, on "
            f"{hellaswag['hellaswag_questions']:,} questions (guessing: 0.25)"
        )
        rows.append(("HellaSwag", text))
    return rows + task_rows(scores)


def task_rows(scores: Mapping[str, Any]) -> Rows:
    """Of evaluation.json, a line for each task, each score with its standard error behind +-, and one for CORE."""
    rows = []
    for name, values in (scores.get("tasks") or {}).items():
        labels = {"acc": "acc", "acc_norm": "acc_norm", "centered": "centered", "bits_per_byte": "bits per byte"}
        parts = [f"{_with_error(values, key)} {label}" for key, label in labels.items() if values.get(key) is not None]
        examples = f", {values['num_fewshot']} examples each" if values.get("num_fewshot") else ""
        rows.append((name, f"{', '.join(parts)}, on {values.get('questions', 0):,} questions{examples}"))
    if scores.get("core") is not None:
        rows.append(("CORE", f"{_with_error(scores, 'core')}, the mean of the centered accuracies"))
    return rows


def comparison(scores: Mapping[str, Any], *, tokens: int | None) -> list[tuple[str, ...]]:
    """Rows of a table: what is compared, this model, and published ones with their sources.

    Empty where neither HellaSwag nor CORE was measured: a val loss alone, over other tokens, compares with nothing.
    """
    asked = (scores.get("tasks") or {}).get("hellaswag") or {}
    hellaswag, core = scores.get("hellaswag_acc_norm") or asked.get("acc_norm"), scores.get("core")
    if hellaswag is None and core is None:
        return []
    own = (
        *("this model", "" if tokens is None else f"{tokens / 1e9:.3g} B"),
        *("" if value is None else f"{value:.4f}" for value in (scores.get("val_loss"), hellaswag, core)),
        f"val loss on its own val set{MASKED if scores.get('document_mask') else ''}",
    )
    others = [(each.model, each.tokens, each.val_loss, each.hellaswag, each.core, each.source) for each in PUBLISHED]
    return [("", "tokens", "val loss", "HellaSwag, acc_norm", "CORE", "source"), own, *others]


def _with_error(values: Mapping[str, Any], key: str) -> str:
    error = values.get(f"{key}_stderr")
    return f"{values[key]:.4f}" if error is None else f"{values[key]:.4f} +- {error:.4f}"


def _has(values: Mapping[str, Any], *names: str) -> bool:
    return all(values.get(name) is not None for name in names)


def _input(item: Mapping[str, Any]) -> tuple[str, str]:
    """What an input was used for; where it came from, its figures and its fingerprint."""
    numbers = {name: value for name, value in item["profile"].items() if isinstance(value, int | float)}
    figures = ", ".join(f"{value:,} {name}" for name, value in numbers.items())
    share = f"{item['weight']:.4g} of the tokens, " if "weight" in item else ""
    return item["context"], f"{item['source']}: {share}{figures}; sha256 {item['fingerprint']}"


def _origin(folder: Folder, history: RunHistory) -> Rows:
    """Which run it began from, and where it went back to an earlier step with other settings."""
    rows: Rows = []
    with contextlib.suppress(DamagedFileError):
        if parent := read_parent(folder):
            rows.append(("branch of", f"{parent.folder}, at step {parent.step:,}"))
    for step, last, changed in history.rollbacks:
        shown = ", ".join(f"{name} {now} instead of {before}" for name, (before, now) in changed.items())
        rows.append(("went back", f"from step {last:,} to step {step:,}: {shown}"))
    return rows


def speed_rows(history: RunHistory, summary: Mapping[str, Any]) -> Rows:
    """Figures per step are medians over the logged steps; hours are those of the processes that trained."""
    speed, mfu, wait, step = (
        _median(history, f"perf/{name}") for name in ("tokens_per_second", "mfu", "data_wait_seconds", "step_seconds")
    )
    rows: Rows = []
    if speed is not None:
        rows.append(("tokens per second", f"{speed:,.0f}"))
    if mfu is not None:
        rows.append(("MFU", f"{mfu:.1%} of the devices' peak"))
    if wait is not None and step:
        rows.append(("waiting for data", f"{wait / step:.1%} of a step"))
    if history.periods:
        rows.append(("time", f"{format_seconds(history.hours * 3600)}, from start to end"))
        rows.append(("interruptions", str(len(history.periods) - 1)))
        rows.append(("worker hours", f"{history.worker_hours:,.2f}"))
    price = history.params.get("price_per_hour")
    if isinstance(price, int | float):
        rows.append(("cost", f"${history.worker_hours * price:,.2f} at ${price:,.2f} per worker and hour"))
    if summary.get("peak_memory_gib"):
        rows.append(("peak memory", f"{summary['peak_memory_gib']:.1f} GiB on rank 0"))
    return rows


def _median(history: RunHistory, name: str) -> float | None:
    points = history.metrics.get(name)
    return statistics.median(points.values()) if points else None


def _read_or_empty(folder: Folder, name: str, schema: type[FiguresT]) -> Mapping[str, Any]:
    """The figures in a JSON file of the run; empty where it is missing or damaged."""
    try:
        return read_json(folder, name, schema, mend="the report goes without it") or {}
    except DamagedFileError as error:
        logger.warning("%s", error)
        return {}
