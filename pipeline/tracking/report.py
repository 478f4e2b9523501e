"""The report of a run, on one page: <run>/report.html, which needs no other file and no network; and curves.png.

It is made from the run's folder alone: the journal of what was told (journal.py), summary.json and, where
jobs/evaluate.py was run before, evaluation.json. MLflow gets it as an artifact.
"""

from __future__ import annotations

import base64
import datetime
import html
import io
import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.console import format_seconds
from pipeline.run_files import CURVES_FILE, REPORT_FILE, SCORES_FILE, SUMMARY_FILE
from pipeline.storage.folders import Folder
from pipeline.tracking.journal import Entry
from pipeline.tracking.run_history import Story, tell

_NO_RECIPE = (
    "data",
    "output",
    "tracking_uri",
    "experiment",
    "registered_model",
    "price_per_hour",
    "dry_run",
    "hellaswag",
)
_MOST_POINTS = 2000  # of a curve, in the picture
_MOST_SAMPLES = 5
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2rem; border-bottom: 1px solid #d0d7de; }
table { border-collapse: collapse; } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left; vertical-align: top; }
td:first-child { color: #57606a; white-space: nowrap; } code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { background: #f6f8fa; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 14rem; overflow-y: auto; } img { max-width: 100%; }
.recipe { columns: 3 12rem; } .recipe div { break-inside: avoid; } .recipe span { color: #57606a; }
"""

Rows = list[tuple[str, str]]


def write_pages(folder: Folder, entries: Iterable[Entry]) -> list[str]:
    """Write curves.png and report.html of the run in ``folder``; returns the names of those that there are now.

    entries: of its journal.
    """
    story = tell(entries)
    curves = draw_curves(story)
    if curves is not None:
        folder.write(CURVES_FILE, [curves])
    summary, scores = _read_json(folder, SUMMARY_FILE), _read_json(folder, SCORES_FILE)
    folder.write(REPORT_FILE, [render(folder, story, summary, scores, curves).encode("utf-8", "replace")])
    return [REPORT_FILE] if curves is None else [CURVES_FILE, REPORT_FILE]


def render(
    folder: Folder, story: Story, summary: Mapping[str, Any], scores: Mapping[str, Any], curves: bytes | None
) -> str:
    """The page. Of the run only what is known is on it: a run that goes on has no summary yet."""
    name = folder.url.rpartition("/")[2]
    parts = [
        f"<h1>{html.escape(name)}</h1><p>{html.escape(_headline(story, summary))}</p>",
        _section("Result", _table(_result(summary, scores))),
        _section("Curves", _picture(curves)),
        _section("Made from", _table(_inputs(story))),
        _section("Recipe", _recipe(story)),
        _section("Speed and cost", _table(_speed(story, summary))),
        _section("Samples", _samples(story)),
        _section("Made by", _table(sorted(story.tags.items()))),
        _section("Use it", _usage(folder.url, name, summary)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(name)}</title><style>{_STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )


def draw_curves(story: Story) -> bytes | None:
    """Loss, learning rate, speed, gradient norm and HellaSwag by step, a PNG.

    None where nothing was trained, or matplotlib, which MLflow brings along, is not installed.
    """
    if not story.metrics.get("train/loss"):
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    panels: list[tuple[str, list[str]]] = [
        ("loss (nats per token)", ["train/loss", "val/loss"]),
        ("learning rate", ["train/lr"]),
        ("tokens per second", ["perf/tokens_per_second"]),
        ("gradient norm", ["train/grad_norm"]),
    ]
    if story.metrics.get("eval/hellaswag_acc_norm"):
        panels.append(("HellaSwag", ["eval/hellaswag_acc_norm", "eval/hellaswag_acc"]))
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    for place, (label, names) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, 2, place)
        for name in names:
            _plot(axis, name, story.metrics.get(name, {}))
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _plot(axis: Any, name: str, points: Mapping[int, float]) -> None:
    steps = sorted(points)
    steps = steps[:: -(-len(steps) // _MOST_POINTS) or 1]
    marker = "o" if len(steps) < 20 else None
    axis.plot(steps, [points[step] for step in steps], label=name, linewidth=1.2, marker=marker, markersize=3)


def _headline(story: Story, summary: Mapping[str, Any]) -> str:
    begin = datetime.datetime.fromtimestamp(story.periods[0][0], datetime.UTC) if story.periods else None
    return (
        f"GPT-2.5 training run{f' of {begin:%Y-%m-%d}' if begin else ''}: "
        f"{summary.get('parameters', 0):,} parameters, {summary.get('tokens_seen', 0):,} tokens in "
        f"{summary.get('steps', 0):,} steps."
    )


def _result(summary: Mapping[str, Any], scores: Mapping[str, Any]) -> Rows:
    rows: Rows = []
    if summary:
        rows.append(("train loss", f"{summary['first_loss']:.4f} → {summary['last_loss']:.4f} nats per token"))
        rows.append(("val loss", f"{summary['val_loss']:.4f} on {summary['val_tokens']:,} tokens"))
    if summary.get("best_step") is not None:
        rows.append(("best checkpoint", f"step {summary['best_step']:,}, val loss {summary['best_val_loss']:.4f}"))
    if scores.get("val_loss") is not None:
        rows.append(("whole val set", f"{scores['val_loss']:.4f} on {scores['val_tokens']:,} tokens"))
    found = scores if scores.get("hellaswag_acc_norm") is not None else summary
    if found.get("hellaswag_acc_norm") is not None:
        rows.append(
            (
                "HellaSwag",
                f"{found['hellaswag_acc_norm']:.4f} acc_norm, {found['hellaswag_acc']:.4f} acc, on "
                f"{found['hellaswag_questions']:,} questions (guessing: 0.25)",
            )
        )
    return rows


def _inputs(story: Story) -> Rows:
    rows = []
    for item in story.inputs:
        figures = ", ".join(
            f"{value:,} {name}" for name, value in item["profile"].items() if isinstance(value, int | float)
        )
        rows.append((item["context"], f"{item['source']}: {figures}; sha256 {item['fingerprint']}"))
    return rows


def _recipe(story: Story) -> str:
    named = [(name, value) for name, value in story.params.items() if name not in _NO_RECIPE and value is not None]
    cells = (f"<div><span>{html.escape(name)}</span> {html.escape(str(value))}</div>" for name, value in named)
    return f'<div class="recipe">{"".join(cells)}</div>' if named else ""


def _speed(story: Story, summary: Mapping[str, Any]) -> Rows:
    """Figures of the steps are medians of the points told; hours are those of the processes that trained."""
    rows: Rows = []
    speed, mfu, wait, step = (
        _median(story, f"perf/{name}") for name in ("tokens_per_second", "mfu", "data_wait_seconds", "step_seconds")
    )
    if speed is not None:
        rows.append(("tokens per second", f"{speed:,.0f}"))
    if mfu is not None:
        rows.append(("MFU", f"{mfu:.1%} of the devices' peak"))
    if wait is not None and step:
        rows.append(("waiting for data", f"{wait / step:.1%} of a step"))
    if story.periods:
        interruptions = len(story.periods) - 1
        rows.append(("time", f"{format_seconds(story.hours * 3600)}, from start to end"))
        rows.append(("interruptions", str(interruptions)))
        rows.append(("worker hours", f"{story.worker_hours:,.2f}"))
    price = story.params.get("price_per_hour")
    if price is not None:
        rows.append(("cost", f"${story.worker_hours * price:,.2f} at ${price:,.2f} per worker and hour"))
    if summary.get("peak_memory_gib"):
        rows.append(("peak memory", f"{summary['peak_memory_gib']:.1f} GiB on rank 0"))
    return rows


def _median(story: Story, name: str) -> float | None:
    points = story.metrics.get(name)
    return statistics.median(points.values()) if points else None


def _samples(story: Story) -> str:
    """The first and the last ones."""
    chosen = [*story.samples[:1], *story.samples[1:][-(_MOST_SAMPLES - 1) :]]
    return "".join(f"<p>step {step:,}</p><pre>{html.escape(text)}</pre>" for step, _, text in chosen)


def _usage(run: str, name: str, summary: Mapping[str, Any]) -> str:
    best = summary.get("best_step")
    checkpoint = summary.get("checkpoint", run) if best is None else f"{run}/checkpoints/step-{best:06d}"
    commands = "\n".join(
        f"python jobs/{line}"
        for line in (
            f"generate.py --checkpoint {checkpoint} --prompt 'Once upon a time, '",
            f"evaluate.py --checkpoint {checkpoint}",
            f"export.py {checkpoint} --output export/{name}",
            f"serve.py {checkpoint}",
        )
    )
    note = "export.py writes a folder for transformers, vLLM and llama.cpp; serve.py speaks OpenAI's protocol."
    return f"<pre>{html.escape(commands)}</pre><p>{note}</p>"


def _section(title: str, content: str) -> str:
    return f"\n<h2>{title}</h2>\n{content}" if content else ""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{lines}</table>" if lines else ""


def _picture(curves: bytes | None) -> str:
    if curves is None:
        return ""
    data = base64.b64encode(curves).decode("ascii")
    return f'<img alt="loss, learning rate, speed and gradient norm by step" src="data:image/png;base64,{data}">'


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Empty where there is none, or none that can be read."""
    try:
        values = json.loads(folder.read(name))
    except (FileNotFoundError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
