"""The tables and the picture of benchmarks/recipes.py, from its results.

Shapes of the tables: one of rates, one of changes for every size, one over all sizes, one of seeds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLES, PICTURE = "recipes_tables.md", "recipes.svg"
SHOWN = ("adamw", "muon", "fast", "fastest")
COLORS = dict(zip(SHOWN, ("#444444", "#1f77b4", "#ff7f0e", "#2ca02c"), strict=True))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One whole run."""

    size: str
    recipe: str
    lr: float
    seed: int
    steps: int
    tokens: int
    loss: float
    cpu_seconds: float
    """A step."""
    parameters: int


class Results:
    """All runs, and the questions that the tables ask of them."""

    def __init__(self, runs: Iterable[dict[str, Any]], order: Sequence[str]) -> None:
        self.order = order
        self.points = [_point(run) for run in runs]
        self.sizes = list(dict.fromkeys(point.size for point in self.points))

    def of(self, size: str, recipe: str, *, seed: int = 0) -> list[Point]:
        """The runs of a recipe, all rates and lengths; shortest first."""
        return sorted(
            (point for point in self.points if (point.size, point.recipe, point.seed) == (size, recipe, seed)),
            key=lambda point: point.steps,
        )

    def best(self, size: str, recipe: str) -> Point | None:
        """The lowest loss of the longest runs."""
        longest = max((point.steps for point in self.points if point.size == size), default=0)
        whole = [point for point in self.of(size, recipe) if point.steps == longest]
        return min(whole, key=lambda point: point.loss, default=None)

    def best_of_each_length(self, size: str, recipe: str) -> list[Point]:
        """The rate with the lowest loss for every number of steps; shortest first."""
        runs = itertools.groupby(self.of(size, recipe), key=lambda point: point.steps)
        return [min(same, key=lambda point: point.loss) for _, same in runs]

    def share(self, size: str, recipe: str) -> str:
        """The share of AdamW's tokens from which a recipe reaches AdamW's best loss: see share_of_tokens.

        Empty where no shorter run tells.
        """
        goal, best = self.best(size, "adamw"), self.best(size, recipe)
        if goal is None or best is None:
            return ""
        runs = self.best_of_each_length(size, recipe)
        if runs[0].steps == goal.steps:
            return ""
        return share_of_tokens([(point.tokens, point.loss) for point in runs], goal.tokens, goal.loss)


def share_of_tokens(runs: Sequence[tuple[int, float]], tokens: int, goal: float) -> str:
    """The share of ``tokens`` from which whole runs reach the loss ``goal``, in per cent.

    Between a run that does not reach it and a longer one that does, the loss is taken to be a straight line over the
    logarithm of the tokens.

    Args:
        runs: (tokens, loss), the shortest first.
    """
    for (fewer, higher), (more, lower) in itertools.pairwise(runs):
        if higher > goal >= lower:
            part = (higher - goal) / (higher - lower)
            return f"{math.exp(math.log(fewer) + part * math.log(more / fewer)) / tokens:.0%}"
    if not runs or runs[-1][1] > goal:
        return f"more than {runs[-1][0] / tokens:.0%}" if runs else ""
    return f"at most {runs[0][0] / tokens:.0%}"


def write_report(folder: Path, runs: Iterable[dict[str, Any]], order: Sequence[str]) -> None:
    """Write the tables and the picture into ``folder``; ``order``: the recipes, each being the one before and more."""
    results = Results(runs, order)
    parts = [_rates(results), *(_changes(results, size) for size in results.sizes), _sizes(results), _seeds(results)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLES).write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    _draw(results, folder / PICTURE)


def _point(run: dict[str, Any]) -> Point:
    job, (steps, loss) = run["job"], run["losses"][-1]
    return Point(
        size=job["size"],
        recipe=job["recipe"],
        lr=job["lr"],
        seed=job["seed"],
        steps=steps,
        tokens=steps * run["tokens_per_step"],
        loss=loss,
        cpu_seconds=run["step_cpu_seconds"],
        parameters=run["parameters"],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _rates(results: Results) -> str:
    """Val loss by rate, each over all steps."""
    rates = sorted({point.lr for point in results.points if point.recipe in {"adamw", "muon"}})
    rows = []
    for size in results.sizes:
        for recipe in ("adamw", "muon"):
            best = results.best(size, recipe)
            if best is None:
                continue
            losses = {point.lr: point.loss for point in results.of(size, recipe) if point.steps == best.steps}
            shown = (f"{losses[lr]:.3f}" if lr in losses else "" for lr in rates)
            marked = (f"**{text}**" if lr == best.lr else text for lr, text in zip(rates, shown, strict=True))
            rows.append((size, {"adamw": "AdamW", "muon": "Muon"}[recipe], *marked))
    return _table(("size", "", *(f"{lr:g}" for lr in rates)), rows)


def _changes(results: Results, size: str) -> str:
    """One change at a time: val loss at equal tokens, against the change before, tokens to AdamW's best."""
    rows, before = [], None
    for name in results.order:
        best = results.best(size, name)
        if best is None:
            continue
        change = "" if before is None else f"{best.loss - before:+.3f}"
        share = "100%" if name == "adamw" else results.share(size, name)
        rows.append((name, f"{best.loss:.3f}", change, share, f"{best.cpu_seconds:.2f}", f"{best.parameters:,}"))
        before = best.loss
    head = ("val loss", "against the row above", "tokens to AdamW's best", "CPU s a step", "parameters")
    return _table((f"{size}: up to", *head), rows)


def _sizes(results: Results) -> str:
    """What each of the main recipes gains over AdamW, size by size."""
    rows = []
    for name in SHOWN[1:]:
        cells = []
        for size in results.sizes:
            goal, best = results.best(size, "adamw"), results.best(size, name)
            known = goal is not None and best is not None
            cells.append(f"{best.loss - goal.loss:+.3f}, {results.share(size, name)}" if known else "")  # type: ignore[union-attr]
        rows.append((name, *cells))
    return _table(("against AdamW's best: val loss, tokens to it", *results.sizes), rows)


def _seeds(results: Results) -> str:
    rows = []
    for size in results.sizes:
        for name in SHOWN:
            best = results.best(size, name)
            if best is None:
                continue
            same = {p.seed: p.loss for p in results.points if (p.size, p.recipe, p.lr, p.steps) == _key(best)}
            if len(same) > 1:
                losses = [same[seed] for seed in sorted(same)]
                listed = ", ".join(f"{loss:.3f}" for loss in losses)
                rows.append((size, name, listed, f"{statistics.mean(losses):.3f}", f"{statistics.stdev(losses):.3f}"))
    return _table(("size", "", "seeds", "mean", "standard deviation"), rows) if rows else ""


def _key(point: Point) -> tuple[str, str, float, int]:
    return point.size, point.recipe, point.lr, point.steps


def _draw(results: Results, path: Path) -> None:
    """One axis a size: val loss of whole runs over their tokens, and AdamW's best as a line."""
    import matplotlib
    from matplotlib.figure import Figure

    sizes = results.sizes
    figure = Figure(figsize=(4 * len(sizes), 3.6), layout="constrained")
    for axis, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for name in SHOWN:
            best = results.best(size, name)
            if best is None:
                continue
            runs = results.best_of_each_length(size, name)
            label = {"adamw": "AdamW", "muon": "Muon"}.get(name, f"{name}.yaml")
            tokens, losses = [point.tokens / 1000 for point in runs], [point.loss for point in runs]
            axis.plot(tokens, losses, marker="o", markersize=4, linewidth=1.2, label=label, color=COLORS[name])
            if name == "adamw":
                axis.axhline(best.loss, linestyle="--", linewidth=0.8, color=COLORS[name])
        axis.set(title=size, xlabel="thousand tokens of a whole run", ylabel="val loss, nats per token")
        axis.grid(alpha=0.3)
        axis.legend()
    with matplotlib.rc_context({"svg.hashsalt": "recipes", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
