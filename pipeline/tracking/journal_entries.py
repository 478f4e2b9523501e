"""The schemas of a line of tracking.jsonl, one for each kind of entry, and of tracking_sent.json.

The journal may be that of somebody else's run, so a line that does not fit is left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypeAlias

from pydantic import Field
from typing_extensions import TypedDict

from pipeline.storage.json_files import FileName

Step: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Milliseconds: TypeAlias = Annotated[int, Field(ge=0, lt=10**14)]
"""Since 1970, up to the year 5138."""


class _Entry(TypedDict):
    time: Milliseconds


class Start(_Entry):
    """A process begins to write."""

    kind: Literal["start"]


class Params(_Entry):
    """Settings of the run."""

    kind: Literal["params"]
    values: dict[str, Any]


class Tags(_Entry):
    """Commit, versions, hardware."""

    kind: Literal["tags"]
    values: dict[str, str | int | float | None]


class _Input(TypedDict):
    name: str
    fingerprint: str
    source: str
    context: str
    profile: dict[str, str | int | float | None]
    weight: NotRequired[float]


class Inputs(_Entry):
    """The fields of tracker.RunInput."""

    kind: Literal["inputs"]
    values: list[_Input]


class Metrics(_Entry):
    """Points of curves."""

    kind: Literal["metrics"]
    step: Step
    values: dict[str, float]


class Sample(_Entry):
    """A generated text."""

    kind: Literal["sample"]
    step: Step
    prompt: str
    text: str


class Checkpoint(_Entry):
    """A checkpoint, or further metrics of one."""

    kind: Literal["checkpoint"]
    step: Step
    path: str
    values: dict[str, float]
    best: bool


class File(_Entry):
    """A file of this node."""

    kind: Literal["file"]
    path: str


class Page(_Entry):
    """A file of the run's folder."""

    kind: Literal["page"]
    name: FileName


class Rollback(_Entry):
    """Training goes on from an earlier step with other settings: what is above of later steps counts no more."""

    kind: Literal["rollback"]
    step: Step
    changed: dict[str, tuple[Any, Any]]
    """Setting -> its values before and now."""


class Status(_Entry):
    """The end of a process of the run."""

    kind: Literal["status"]
    status: Literal["FINISHED", "FAILED", "KILLED"]


AnyEntry: Any = Annotated[
    Start | Params | Tags | Inputs | Metrics | Sample | Checkpoint | File | Page | Rollback | Status,
    Field(discriminator="kind"),
]


class Sent(TypedDict):
    """The content of tracking_sent.json."""

    run_id: str
    num_bytes: Annotated[int, Field(ge=0)]
