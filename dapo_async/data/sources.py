"""Rows of a data set: a source comes in, its rows leave. `prompts.py` calls it.

A source is a JSONL or Parquet file, a folder of either, a folder of `datasets.save_to_disk`, or a
name on the hub.

JSONL has its own reader, which takes milliseconds and names the line of a mistake; `datasets` costs
each process 0.9 s of imports and a copy of the file in its cache. pyarrow reads Parquet. `datasets`
reads the rest and is imported only for that. Nothing of a data set is executed: `datasets` 5 has no
loading scripts, and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dapo_async.config import Source

BATCH_ROWS = 4096
HUB_S = 20.0  # deadline for the first answer of the hub
SPLIT = re.compile(r"(train|test|validation|valid|dev|val)(?=[-_.])")


def read_rows(source: Source, *, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a source.

    Of a table only `columns` are read; a name with dots is a nested column. A table that has fewer
    than two of them is read whole, so that a message can name the columns that it has. Raises
    ValueError, in one line, for a source that can't be read.
    """
    if source.path is None:
        return _saved_rows(_from_hub(source), columns)
    if source.path.is_file():
        return (
            _parquet_rows(source.path, columns)
            if source.path.suffix == ".parquet"
            else _json_rows(source.path)
        )
    if not source.path.is_dir():
        raise ValueError(
            f"data file {source.path} does not exist; "
            "give the path of a JSONL or Parquet file, or of a folder"
        )
    return _folder_rows(source.path, columns)


def _folder_rows(folder: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir()) or ["SPLIT"]
        raise ValueError(
            f"data folder {folder} holds the splits {', '.join(splits)}; "
            f"give one of them, such as {folder / splits[0]}"
        )
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved_rows(_saved(folder), columns)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".parquet", ".jsonl") and path.is_file()
    )
    kinds = {path.suffix for path in files}
    splits = sorted({match[1] for path in files if (match := SPLIT.match(path.name))})
    if not files:
        raise ValueError(
            f"data folder {folder} has no *.parquet, no *.jsonl and nothing of "
            "datasets.save_to_disk; give another folder"
        )
    if len(kinds) > 1 or len(splits) > 1:
        mixed = f"the splits {', '.join(splits)}" if len(splits) > 1 else "Parquet and JSONL files"
        raise ValueError(
            f"data folder {folder} holds {mixed}, which must not be mixed; "
            "give one file, or a folder with one of them"
        )
    return (
        row
        for file in files
        for row in (_parquet_rows(file, columns) if kinds == {".parquet"} else _json_rows(file))
    )


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(
            f"data file {path} can't be read: {error.strerror}; give a readable JSONL file"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"line {number} of {path} is not UTF-8 ({error.reason} at byte {error.start}); "
                "convert the file to UTF-8"
            ) from error
        except (ValueError, RecursionError) as error:  # also for huge numbers and deep lists
            raise ValueError(
                f"line {number} of {path} is not valid JSON ({error}); "
                "write one JSON object per line"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(
                f"line {number} of {path} holds a {type(values).__name__}; "
                "write one JSON object per line"
            )
        yield values


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            known = _known(table.schema_arrow.names, columns)
            for batch in table.iter_batches(BATCH_ROWS, columns=known):
                yield from _batch_rows(
                    pyarrow.Table.from_batches([batch]), columns if known else ()
                )
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"data file {file} is no readable Parquet file ({_first_line(error)}); give another"
        ) from error


def _saved_rows(dataset: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    known = _known(dataset.column_names, columns)
    for batch in (
        dataset.select_columns(known or dataset.column_names).with_format("arrow").iter(BATCH_ROWS)
    ):
        yield from _batch_rows(batch, columns if known else ())


def _known(names: Sequence[str], columns: Sequence[str]) -> list[str] | None:
    """The columns of a table to read; None, which means all, when it has fewer than two of them."""
    wanted = {*columns, *(column.partition(".")[0] for column in columns)}
    known = [name for name in names if name in wanted]
    return known if len(known) >= 2 else None


def _batch_rows(batch: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow table.

    A nested column has its dotted name, which is many times faster than making all of its objects.
    """
    leaves = {column: leaf for column in columns if (leaf := _leaf(batch, column)) is not None}
    whole = [
        name
        for name in batch.column_names
        if not any(column.partition(".")[0] == name for column in leaves)
    ]
    values = {name: leaf.to_pylist() for name, leaf in leaves.items()} | {
        name: batch[name].to_pylist() for name in whole
    }
    return (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))


def _leaf(batch: Any, column: str) -> Any:
    """The values at a dotted name; None when a row lacks it or the names do not fit."""
    import pyarrow
    from pyarrow import compute

    if column in batch.column_names:
        return batch[column]
    name, *parts = column.split(".")
    if name not in batch.column_names:
        return None
    leaf = batch[name]
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


def _saved(folder: Path) -> Any:
    import pyarrow
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"data folder {folder} is no readable folder of datasets.save_to_disk "
            f"({_first_line(error)}); save it again"
        ) from error


def _from_hub(source: Source) -> Any:
    import httpx
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:  # without this, `datasets` retries for half a minute
            HfApi().dataset_info(str(source.hub), revision=source.revision, timeout=HUB_S)
        return load_dataset(
            source.hub, source.subset, split=source.split or "train", revision=source.revision
        )
    except (DatasetsError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source.where} can't be read from the Hugging Face hub: {_first_line(error)}; "
            "check name and network, set HF_HUB_OFFLINE=1 to use an earlier download, "
            "or give a local file"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
