"""Questions in HellaSwag's published format, made from this project's documentation: real text, no download."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def make_questions(count: int) -> list[dict[str, Any]]:
    """Every field of hellaswag_val.jsonl, with the brackets and double spaces that the real ones have."""
    choose = random.Random(5)
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    sentences = [" ".join(part.split()) for part in re.split(r"[.;:]\s", text) if 4 < len(part.split()) < 40]
    questions = []
    for number in range(count):
        first, second, *endings = choose.sample(sentences, 6)
        wikihow = number % 3 == 0
        ctx_a = f"[header] {first} [title] {first[:20]}  twice" if wikihow else first
        ctx_b = "" if number % 4 == 1 else second
        questions.append(
            {
                "ind": number,
                "activity_label": choose.choice(["Home and Garden", "Playing squash", "Health"]),
                "ctx_a": ctx_a,
                "ctx_b": ctx_b,
                "ctx": f"{ctx_a} {ctx_b}",
                "endings": [
                    ending[: choose.randrange(10, 80)] + (" [substeps] x" if wikihow else "") for ending in endings
                ],
                "label": number % 4,
                "source_id": f"activitynet~v_{number}",
                "split": "val",
                "split_type": "indomain",
            }
        )
    return questions


def write_questions(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in make_questions(count)))
    return path
