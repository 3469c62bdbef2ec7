"""The columns of tables, as pyarrow reads them, which takes long to load: from CSV and Parquet to arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from coterie.core.errors import ConfigError, DataError
from coterie.data.sources import read_bytes
from coterie.data.splits import moments
from coterie.data.types import Column, Floats, Rows

MOST_CLASSES = 20  # whole numbers with more values than this are a regression, unless task says otherwise
MOST_CATEGORIES = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Files of the same columns, one after the other."""

    data: pa.Table
    sources: tuple[tuple[Path, int], ...]  # each file, and how many of the rows are from it, in order

    def place(self, row: int, column: str) -> str:
        """Where a cell stands, in words."""
        for path, rows in self.sources:
            if row < rows:
                return f"{path}: data row {row + 1}, column {column!r}"
            row -= rows
        raise AssertionError(row)

    def column(self, name: str) -> pa.ChunkedArray[Any]:
        """A column. Raises ConfigError when there is none of this name."""
        names = self.data.column_names
        if name not in names:
            near = get_close_matches(name, names, n=1)
            raise ConfigError(
                f"column {name!r}: not in {self.sources[0][0]}",
                f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}",
            )
        return self.data.column(name)


def read(path: Path) -> pa.Table:
    """A file's table. Raises DataError when it is none."""
    with path.open("rb") as file:
        is_parquet = ".parquet" in path.name or file.read(4) == b"PAR1"
    return _read_parquet(path) if is_parquet else _read_csv(path)


def _read_csv(path: Path) -> pa.Table:
    try:
        # One thread: only then do pyarrow's errors name the row.
        return pyarrow.csv.read_csv(
            BytesIO(read_bytes(path)), read_options=pyarrow.csv.ReadOptions(use_threads=False)
        )
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: not a CSV table: {error}", "each line needs as many cells as the header"
        ) from error


def _read_parquet(path: Path) -> pa.Table:
    place = "the file's footer"
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            groups = []
            for group in range(file.num_row_groups):
                place = f"row group {group}"
                groups.append(file.read_row_group(group, use_threads=False))
            return pa.concat_tables(groups) if groups else file.schema_arrow.empty_table()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: {place} cannot be read: {error}", "the file is damaged, or is not Parquet; get it again"
        ) from error


def joined(parts: Sequence[tuple[Path, pa.Table]]) -> Table:
    """The files' tables as one. Raises DataError when their columns do not fit together."""
    for path, table in parts:
        names = table.column_names
        if len(set(names)) < len(names):
            raise DataError(f"{path}: two columns have the same name", "rename one in the file's header")
        if table.num_rows == 0:
            raise DataError(f"{path}: the table has no rows")
        if set(names) != set(parts[0][1].column_names):
            odd = sorted(set(names) ^ set(parts[0][1].column_names))
            raise DataError(f"{path}: its columns differ from {parts[0][0]}: {', '.join(odd)}")
    columns = {}
    try:
        for name in parts[0][1].column_names:
            pieces = [_decoded(table.column(name)) for _, table in parts]
            # A bad cell turns a file's whole column into text; as text in both it can be found and named.
            if len({_is_text(piece) for piece in pieces}) == 2:
                pieces = [piece.cast(pa.string()) for piece in pieces]
            tables = [pa.table({name: piece}) for piece in pieces]
            columns[name] = pa.concat_tables(tables, promote_options="permissive").column(name)
    except pa.ArrowException as error:
        raise DataError(f"{parts[-1][0]}: its columns do not fit those of {parts[0][0]}: {error}") from error
    return Table(pa.table(columns), tuple((path, table.num_rows) for path, table in parts))


def _decoded(column: pa.ChunkedArray[Any]) -> pa.ChunkedArray[Any]:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _is_text(column: pa.ChunkedArray[Any]) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _is_number(column: pa.ChunkedArray[Any]) -> bool:
    is_a = pa.types
    kinds = (is_a.is_integer, is_a.is_floating, is_a.is_boolean, is_a.is_decimal, is_a.is_null)
    return any(kind(column.type) for kind in kinds)


def plain(column: pa.ChunkedArray[Any]) -> Column:
    """Numbers as int64 or, with fractions or gaps, float64 (NaN); everything else as text ("" for a gap)."""
    if not _is_number(column):
        return np.array(["" if value is None else str(value) for value in column.to_pylist()], dtype=np.str_)
    if column.null_count == 0 and (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        return np.asarray(column.to_numpy()).astype(np.int64)
    return np.array([np.nan if value is None else float(value) for value in column.to_pylist()])


def _numbers(table: Table, name: str, missing: str) -> Floats:
    column = table.column(name)
    if _is_text(column):
        values = np.empty(len(column))
        for row, cell in enumerate(column.to_pylist()):
            number = np.nan if cell in (None, "") else _number(cell)
            if number is None:
                raise DataError(
                    f"{table.place(row, name)}: {cell!r} is not a number",
                    f"correct the cell, or list {name!r} in categorical or drop",
                )
            values[row] = number
    elif _is_number(column):
        values = plain(column).astype(np.float64)
    else:
        raise DataError(
            f"{table.sources[0][0]}: column {name!r} holds {column.type}, neither numbers nor text",
            "convert it, or list it in drop",
        )
    if missing == "error" and np.isnan(values).any():
        raise DataError(
            f"{table.place(int(np.isnan(values).argmax()), name)}: no value",
            f'set missing = "mean" to fill such cells, or list {name!r} in drop',
        )
    if np.isinf(values).any():
        raise DataError(f"{table.place(int(np.isinf(values).argmax()), name)}: infinite", "correct the cell")
    return values


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _is_category(column: pa.ChunkedArray[Any], name: str, categorical: Sequence[str] | None) -> bool:
    if categorical is not None:
        return name in categorical
    if not _is_text(column):
        return False
    cells = [cell for cell in column.unique().to_pylist() if cell]
    # Mostly numbers: a few bad cells made it text, and `_numbers` will say which.
    return 2 * sum(_number(cell) is not None for cell in cells) <= len(cells)


def encoded(
    table: Table, name: str, categorical: Sequence[str] | None, train: Rows, missing: str
) -> NDArray[np.float32]:
    """One feature column as float32 [n, 1], or [n, categories]."""
    column = table.column(name)
    if not _is_category(column, name, categorical):
        values = _numbers(table, name, missing)
        known = values[train][~np.isnan(values[train])]
        if len(known) == 0:
            raise DataError(f"{table.sources[0][0]}: column {name!r} has no values", "list it in drop")
        mean, std = moments(known.reshape(-1, 1))
        scaled = (values.reshape(-1, 1) - mean) / std
        return np.where(np.isnan(scaled), 0, scaled).astype(np.float32)
    values = plain(column)
    categories = np.unique(values[train])
    if len(categories) > MOST_CATEGORIES:
        raise DataError(
            f"{table.sources[0][0]}: column {name!r} has {len(categories)} categories, too many to encode",
            f"list {name!r} in drop, or in keys to partition by it",
        )
    return np.asarray(values.reshape(-1, 1) == categories, dtype=np.float32)


def targets(table: Table, name: str, task: str) -> tuple[Column, tuple[str, ...] | None]:
    """What is to be predicted, [n], and the names of its classes; None for a regression."""
    column = table.column(name)
    values = plain(column)
    gaps = values == "" if values.dtype.kind == "U" else np.isnan(values)
    if gaps.any():
        raise DataError(f"{table.place(int(gaps.argmax()), name)}: the target has no value", "remove the row")
    distinct = np.unique(values)
    if task == "auto":
        few = values.dtype.kind == "U" or (len(distinct) <= MOST_CLASSES and (distinct % 1 == 0).all())
        task = "classification" if few else "regression"
    if task == "regression":
        return _numbers(table, name, "error").astype(np.float32), None
    if values.dtype.kind == "f" and (distinct % 1 == 0).all():
        distinct, values = distinct.astype(np.int64), values.astype(np.int64)
    if pa.types.is_boolean(column.type):
        return values, ("False", "True")
    return np.searchsorted(distinct, values).astype(np.int64), tuple(map(str, distinct.tolist()))
