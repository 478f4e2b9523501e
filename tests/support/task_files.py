"""Small files of tasks, in the formats in which the real ones are published, from this project's documentation."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.hellaswag_questions import make_questions

ROOT = Path(__file__).resolve().parents[2]
BASELINES = {"choices": 25.0, "blanks": 50.0, "words": 0.0}
"""Of the small bundle: random baselines in percent."""


def sentences(seed: int) -> Iterator[str]:
    """Sentences of the documentation in the order of a seed, again from the start when they are all gone."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    found = [" ".join(part.split()) for part in re.split(r"[.;:]\s", text) if 4 < len(part.split()) < 25]
    random.Random(seed).shuffle(found)
    while True:
        yield from found


def write_bundle(folder: Path, count: int = 12) -> Path:
    """A folder in the layout of CORE's, with one task of each kind and two examples before each question at most."""
    text, choose = sentences(1), random.Random(2)
    rows: dict[str, list[dict[str, Any]]] = {"choices": [], "blanks": [], "words": []}
    for _ in range(count):
        choices = [next(text)[: choose.randrange(6, 40)] for _ in range(4)]
        rows["choices"].append({"query": next(text) + " ", "choices": choices, "gold": choose.randrange(4)})
        before, after = next(text), next(text)[:30]
        options = [f"{before} the run", f"{before} one of its many workers"]
        rows["blanks"].append({"context_options": options, "continuation": after, "gold": choose.randrange(2)})
        words = next(text).split()
        rows["words"].append({"context": "  " + " ".join(words[:-1]) + " ", "continuation": words[-1]})
    kinds = {
        "choices": ("multiple_choice", 2, "\nAnswer: "),
        "blanks": ("schema", 0, None),
        "words": ("language_modeling", 1, None),
    }
    (folder / "eval_data" / "some").mkdir(parents=True)
    lines = ["icl_tasks:"]
    for label, (kind, num_fewshot, delimiter) in kinds.items():
        lines += [f"- label: {label}", f"  icl_task_type: {kind}", f"  dataset_uri: some/{label}.jsonl"]
        lines += [f"  num_fewshot: [{num_fewshot}]", "  has_categories: false"]
        if delimiter:
            lines.append(f"  continuation_delimiter: {json.dumps(delimiter)}")
        write_lines(folder / "eval_data" / "some" / f"{label}.jsonl", rows[label])
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    table = [f"{label},made here,{baseline}" for label, baseline in BASELINES.items()]
    (folder / "eval_meta_data.csv").write_text("\n".join(["Eval Task,Task Category,Random baseline", *table]) + "\n")
    return folder


def harness_rows(name: str, count: int) -> list[dict[str, Any]]:
    """Records of a task of lm-evaluation-harness, with the fields of its data set."""
    if name == "hellaswag":
        return make_questions(count)
    text, choose = sentences(sum(map(ord, name))), random.Random(3)
    return [_row(name, text, choose) for _ in range(count)]


def _row(name: str, text: Iterator[str], choose: random.Random) -> dict[str, Any]:
    if name in ("arc_easy", "arc_challenge", "openbookqa"):
        labels = choose.choice([["A", "B", "C", "D"], ["1", "2", "3", "4"], ["A", "B", "C"]])
        choices = {"text": [next(text)[: choose.randrange(5, 50)].strip() for _ in labels], "label": labels}
        asked = "question_stem" if name == "openbookqa" else "question"
        return {"id": "x", asked: next(text), "choices": choices, "answerKey": choose.choice(labels)}
    if name == "piqa":
        return {"goal": next(text), "sol1": next(text), "sol2": next(text)[:30].strip(), "label": choose.randrange(2)}
    if name == "boolq":
        return {"passage": next(text), "question": next(text).lower(), "idx": 0, "label": choose.randrange(2)}
    if name == "copa":
        ends = {"choice1": next(text), "choice2": next(text)}
        asked = choose.choice(["cause", "effect"])
        return {"premise": f"{next(text)}. ", **ends, "question": asked, "idx": 0, "label": choose.randrange(2)}
    if name == "winogrande":
        sentence = f"{next(text)} _ {next(text)}."
        return {"sentence": sentence, "option1": "Ray", "option2": "the driver", "answer": choose.choice(["1", "2"])}
    assert name == "lambada"
    return {"text": next(text)}


def write_harness(folder: Path, names: list[str], count: int) -> Path:
    """A folder with NAME.jsonl for each of these tasks of lm-evaluation-harness."""
    folder.mkdir(exist_ok=True)
    for name in names:
        write_lines(folder / f"{name}.jsonl", harness_rows(name, count))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
