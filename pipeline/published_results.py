"""Results that others have published for models of this kind, for tables beside one's own. Imports nothing of pipeline.

A val loss compares only over the same tokens: theirs, unless a row says otherwise, is over the first 10,485,760 tokens
of FineWeb's fineweb_val_000000.bin, in windows of 1,024. HellaSwag is acc_norm over 10,042 questions, CORE nanochat's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """One row; a figure that its source does not give is empty."""

    model: str
    tokens: str = ""
    """Number of tokens that it was trained on."""
    val_loss: str = ""
    """Nats per token."""
    hellaswag: str = ""
    core: str = ""
    source: str


PUBLISHED = (
    PublishedResult(
        model="GPT-2, 124M, OpenAI's weights",
        val_loss="3.2924",
        hellaswag="0.3114",
        source="build-nanogpt: play.ipynb, hellaswag.py",
    ),
    PublishedResult(model="GPT-2, 1.6B, OpenAI's weights", core="0.2565", source="nanochat, README, leaderboard"),
    PublishedResult(
        model="GPT-2.5, 124M, its author's",
        tokens="10.49 B",
        val_loss="3.3041 (own test file)",
        hellaswag="0.3059",
        source="GPT-2.5, README of 30 March 2026",
    ),
    PublishedResult(model="GPT-2, 124M, trained by llm.c", tokens="10 B", val_loss="3.28 to 3.29", source="llm.c"),
    PublishedResult(model="GPT-2, 124M, AdamW", tokens="5.00 B", val_loss="3.2760", source="modded-nanogpt, June 2024"),
    PublishedResult(
        model="GPT-2, 124M, Muon", tokens="3.25 B", val_loss="3.2785", source="modded-nanogpt, October 2024"
    ),
    PublishedResult(model="nanochat, depth 24, baseline", core="0.2585", source="nanochat, README, leaderboard"),
)
