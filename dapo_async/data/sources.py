"""Rows of a data set, wherever it is: a JSONL or Parquet file, a folder of either, a folder of `datasets.save_to_disk`, or a name on the hub.

JSONL has a reader of its own: `datasets` costs each process 0.9 s of imports and a copy of the file in its cache, this one milliseconds, and it
names the line of a mistake. Parquet is read by pyarrow, everything else by `datasets`, which is imported only for that. No code of a data set is ever
run: `datasets` 5 has no loading scripts, and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dapo_async.config import Source

BATCH_ROWS = 4096
HUB_S = 20.0  # for the hub's first answer
SPLIT = re.compile(r"(train|test|validation|valid|dev|val)(?=[-_.])")


def read_rows(source: Source, *, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Row by row. Of a table only those of `columns` (dotted paths) that it has, or all if it has fewer than two of them.

    Raises ValueError with one clear line for what can't be read.
    """
    if source.path is None:
        return _table_rows(_from_hub(source), columns)
    if source.path.is_file():
        return _table_rows(_parquet([source.path]), columns) if source.path.suffix == ".parquet" else _json_rows(source.path)
    if not source.path.is_dir():
        raise ValueError(f"data file {source.path} does not exist; give the path of a JSONL or Parquet file, or of a folder")
    return _folder_rows(source.path, columns)


def _folder_rows(folder: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir()) or ["SPLIT"]
        raise ValueError(f"data folder {folder} holds the splits {', '.join(splits)}; give one of them, such as {folder / splits[0]}")
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _table_rows(_saved(folder), columns)
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".jsonl") and path.is_file())
    kinds, splits = {path.suffix for path in files}, sorted({match[1] for path in files if (match := SPLIT.match(path.name))})
    if not files:
        raise ValueError(f"data folder {folder} has no *.parquet, no *.jsonl and nothing of datasets.save_to_disk; give a folder that has")
    if len(kinds) > 1 or len(splits) > 1:
        mixed = f"the splits {', '.join(splits)}" if len(splits) > 1 else "Parquet and JSONL files"
        raise ValueError(f"data folder {folder} holds {mixed}, which would be mixed up; give one file, or a folder with one of them")
    if kinds == {".parquet"}:
        return _table_rows(_parquet(files), columns)
    return (row for file in files for row in _json_rows(file))


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"data file {path} can't be read: {error.strerror}; give a readable JSONL file") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of {path} is not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not valid JSON ({error}); write one JSON object per line") from error
        if not isinstance(values, dict):
            raise ValueError(f"line {number} of {path} holds a {type(values).__name__}; write one JSON object per line")
        yield values


def _table_rows(table: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of a pyarrow table, in batches: a set of a million rows need not be in memory as Python objects all at once."""
    known = [name for name in table.column_names if name in {column.partition(".")[0] for column in columns} | set(columns)]
    if len(known) >= 2:
        table = table.select(known)
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        yield from batch.to_pylist()


def _parquet(files: Sequence[Path]) -> Any:
    import pyarrow
    from pyarrow import parquet

    tables = []
    for file in files:
        try:
            tables.append(parquet.read_table(file, partitioning=None))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"data file {file} is no readable Parquet file ({_first_line(error)}); give another one") from error
    try:
        return pyarrow.concat_tables(tables)
    except pyarrow.ArrowException as error:
        raise ValueError(f"the Parquet files of {files[0].parent} differ in their columns ({_first_line(error)}); give one of them") from error


def _saved(folder: Path) -> Any:
    import pyarrow
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder)).with_format("arrow")[:]
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise ValueError(f"data folder {folder} is no readable folder of datasets.save_to_disk ({_first_line(error)}); save it again") from error


def _from_hub(source: Source) -> Any:
    import httpx
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:
            HfApi().dataset_info(str(source.hub), revision=source.revision, timeout=HUB_S)  # `datasets` alone tries for half a minute, aloud
        loaded = load_dataset(source.hub, source.subset, split=source.split or "train", revision=source.revision)
    except (DatasetsError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source.where} can't be had from the Hugging Face hub: {_first_line(error)}; check name and network, set HF_HUB_OFFLINE=1 to use what "
            "was downloaded before, or give a local file"
        ) from error
    return loaded.with_format("arrow")[:]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
