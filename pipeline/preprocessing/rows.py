"""Rows between two stages of the Ray Data graph: a work item each, with arrays or an error.

All rows between two stages have one schema, as Ray joins them into blocks and cuts blocks between rows: an array is one
list in one row, and nothing of it is copied. An error is a row, too, because Ray passes on only an exception's text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa

from pipeline.errors import DamagedInputError, UserError
from pipeline.sources.plan import load_plan, save_plan
from pipeline.sources.work_items import WorkItem


@dataclass
class ItemRow:
    """One row of a table between two stages: an item, its figures, its arrays, or an error."""

    item: str
    """A plan of one work item, or of several that are fetched together (plan.save_plan)."""
    figures: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    """Arrow arrays, passed on without a copy."""
    error: str | None = None
    is_damage: bool = False
    """Whether the error is a DamagedInputError."""

    @classmethod
    def of(cls, *items: WorkItem, **values: Any) -> ItemRow:
        """The row of one work item, or of several that are fetched together."""
        return cls(item=save_plan(items).decode(), **values)

    def to_table(self) -> pa.Table:
        """A table of one row; an array becomes one list, because Ray may cut a table between rows only."""
        lists = {
            name: pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), array)
            for name, array in self.arrays.items()
        }
        columns = {
            "item": [self.item],
            "figures": [json.dumps(self.figures)],
            "error": pa.array([self.error], pa.string()),
            "is_damage": [self.is_damage],
        }
        return pa.table(columns | lists)

    @classmethod
    def from_table(cls, table: pa.Table) -> ItemRow:
        plain = ("item", "figures", "error", "is_damage")
        values = {name: table[name][0].as_py() for name in plain}
        arrays = {name: table[name][0].values for name in table.column_names if name not in plain}
        return cls(**{**values, "figures": json.loads(values["figures"])}, arrays=arrays)

    @property
    def work_item(self) -> WorkItem:
        return load_plan(self.item.encode())[0]

    def raise_error(self) -> None:
        if self.error is not None:
            raise DamagedInputError(self.error) if self.is_damage else UserError(self.error)


StageFunction: TypeAlias = Callable[..., Iterator[ItemRow]]
Columns: TypeAlias = dict[str, pa.DataType]


def stage_of(
    columns: Callable[[dict[str, Any]], Columns],
) -> Callable[[StageFunction], Callable[..., Iterator[pa.Table]]]:
    """Turn a function from a row to rows into one for map_batches; a UserError becomes a row.

    columns: the arrays of the rows that come out, given the function's arguments: rows without them get empty ones.
    """

    def decorate(function: StageFunction) -> Callable[..., Iterator[pa.Table]]:
        @functools.wraps(function)
        def stage(table: pa.Table, **arguments: Any) -> Iterator[pa.Table]:
            row = ItemRow.from_table(table)
            empty = {name: pa.array([], dtype) for name, dtype in columns(arguments).items()}
            try:
                for result in function(row, **arguments):
                    result.arrays = empty | result.arrays
                    yield result.to_table()
            except UserError as error:
                yield ItemRow(item=row.item, arrays=empty, **error_values(error)).to_table()

        return stage

    return decorate


def error_values(error: UserError) -> dict[str, Any]:
    """The fields of a row that carries an error on to the driver."""
    return {"error": str(error), "is_damage": isinstance(error, DamagedInputError)}
