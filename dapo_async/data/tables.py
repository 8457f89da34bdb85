"""Rows of a table: a Parquet file or a data set of `datasets` comes in, its rows leave.

`sources.py` calls it. Only the asked columns become Python values. Nothing of a table is executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_async.data.conversation import FORMS, USER
from dapo_async.data.formats import foreign_format
from dapo_async.data.places import Places

if TYPE_CHECKING:  # it takes 0.1 s to import
    import pyarrow

BATCH_ROWS = 4096
MAGIC = b"PAR1"


def is_parquet(path: Path) -> bool:
    """Whether a file is Parquet, by its name or by its first bytes."""
    if path.suffix.lower() == ".parquet":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False  # the JSON reader then reports the error


def parquet_rows(
    file: Path, columns: Sequence[Sequence[str]], places: Places
) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file; of each of `columns` the first one that the file has.

    Raises ValueError, in one line, for a file or a value that can't be read.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            places.example = _example(schema)
            chosen = _chosen(schema, columns)
            roots = _roots(chosen, schema)
            if len({*roots}) < len(roots):
                raise ValueError(
                    f"data file {file} has two columns of one name (it reads "
                    f"{', '.join(roots)}); keep one"
                )
            batches = table.iter_batches(BATCH_ROWS, columns=roots)
            tables = (pyarrow.Table.from_batches([batch]) for batch in batches)
            yield from _rows(tables, chosen, str(file))
    except (pyarrow.ArrowException, OSError) as error:
        foreign = foreign_format(file)
        raise ValueError(
            f"data file {file} {foreign}"
            if foreign
            else f"data file {file} is no readable Parquet file ({first_line(error)}); give another"
        ) from error


def saved_rows(
    dataset: Any, columns: Sequence[Sequence[str]], places: Places, where: str
) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset`, like `parquet_rows`."""
    import pyarrow

    schema = dataset.features.arrow_schema
    places.example = _example(schema)
    chosen = _chosen(schema, columns)
    roots = _roots(chosen, schema)
    try:
        tables = dataset.select_columns(roots).with_format("arrow").iter(BATCH_ROWS)
        yield from _rows(tables, chosen, where)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"data set {where} can't be read ({first_line(error)}); save it again"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _chosen(schema: pyarrow.Schema, columns: Sequence[Sequence[str]]) -> list[str]:
    """Of each alternative columns the first one that the schema has or may have."""
    import pyarrow

    def has(column: str) -> bool:
        if column in schema.names:
            return True
        name, *parts = column.split(".")
        if name not in schema.names:
            return False
        kind = schema.field(name).type
        if not pyarrow.types.is_struct(kind):
            return True  # lists, and texts that hold a struct as JSON, differ from row to row
        return parts[0] in {field.name for field in kind}

    chosen = (next(filter(has, known), known[0]) for known in columns)
    return [name for name in chosen if {name, name.partition(".")[0]} & {*schema.names}]


def _roots(chosen: Sequence[str], schema: pyarrow.Schema) -> list[str]:
    """The top-level columns to read. At least one is read, so that rows are counted."""
    wanted = {*chosen, *(column.partition(".")[0] for column in chosen)}
    return [name for name in schema.names if name in wanted] or schema.names[:1]


def _rows(
    tables: Iterator[pyarrow.Table], chosen: Sequence[str], where: str
) -> Iterator[dict[str, Any]]:
    """The rows of pyarrow tables.

    A nested column has its dotted name, which is many times faster than making all of its objects.
    """
    start = 0
    for table in tables:
        leaves: dict[str, pyarrow.ChunkedArray] = {}
        for column in chosen:
            leaf = _leaf(table, column)
            name = column if leaf is not None else column.partition(".")[0]
            leaves[name] = table[name] if leaf is None else leaf
        values = {
            name: _values(leaf, f"column {name!r} in row", start, where)
            for name, leaf in leaves.items()
        }
        if values:
            for row in zip(*values.values(), strict=True):
                yield dict(zip(values, row, strict=True))
        else:
            yield from ({} for _ in range(table.num_rows))
        start += table.num_rows


def _leaf(table: pyarrow.Table, column: str) -> pyarrow.ChunkedArray | None:
    """The values at a dotted name; None when a row lacks it or the names do not fit."""
    import pyarrow
    from pyarrow import compute

    if column in table.column_names:
        return table[column]
    name, *parts = column.split(".")
    leaf = table[name]
    try:
        for part in parts:
            leaf = (
                compute.list_element(leaf, int(part))
                if part.isdecimal()
                else compute.struct_field(leaf, part)
            )
    except (pyarrow.ArrowException, KeyError, NotImplementedError):
        return None
    return leaf


def _values(leaf: pyarrow.ChunkedArray, what: str, start: int, where: str) -> list[Any]:
    """The values of a column as Python objects. Raises ValueError that names the bad row."""
    import pyarrow

    texts = _lone_user_turns(leaf)
    leaf = leaf if texts is None else texts
    try:
        if pyarrow.types.is_float32(leaf.type) or pyarrow.types.is_float16(leaf.type):
            # As a Python float, 0.1 would have the digits 0.10000000149011612.
            texts = leaf.cast(pyarrow.float32()).cast(pyarrow.string()).to_pylist()
            return [None if text is None else Decimal(text) for text in texts]
        values: list[Any] = leaf.to_pylist(maps_as_pydicts="lossy")
        return values
    except (ValueError, OverflowError, pyarrow.ArrowException) as whole:
        for row, value in enumerate(leaf, start=start + 1):
            try:
                value.as_py()
            except (ValueError, OverflowError, pyarrow.ArrowException) as error:
                wrong = "is not UTF-8" if isinstance(error, UnicodeError) else "can't be read"
                raise ValueError(
                    f"{what} {row} of {where} {wrong} ({first_line(error)}); correct the row"
                ) from error
        raise ValueError(
            f"{what}s {start + 1} to {start + len(leaf)} of {where} can't be read "
            f"({first_line(whole)}); correct the rows"
        ) from whole


def _lone_user_turns(column: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray | None:
    """The texts of a column of chats that all have one turn, a user's; None for any other column.

    This saves the objects of the published data sets, whose prompts have this form.
    """
    import pyarrow
    from pyarrow import compute

    kind = column.type
    if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        return None
    if not pyarrow.types.is_struct(kind.value_type):
        return None
    names = {field.name for field in kind.value_type}
    form = next((form for form in FORMS if {*form} == names), None)
    if form is None or column.null_count or not len(column):
        return None
    if not compute.all(compute.equal(compute.list_value_length(column), 1)).as_py():
        return None
    role, content = (compute.struct_field(compute.list_element(column, 0), name) for name in form)
    is_text = all(pyarrow.types.is_string(each.type) for each in (role, content))
    if not is_text or role.null_count or content.null_count:
        return None
    return content if compute.all(compute.equal(role, USER)).as_py() else None


def _example(schema: pyarrow.Schema) -> dict[str, Any]:
    """Values like those of a row: an empty text for each text, 0 for each number."""
    return {field.name: _like(field.type) for field in schema}


def _like(kind: pyarrow.DataType) -> Any:
    from pyarrow import types

    if types.is_struct(kind):
        return {field.name: _like(field.type) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_like(kind.value_type)]
    if types.is_dictionary(kind):
        return _like(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return ""
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    return 0 if is_number else None
