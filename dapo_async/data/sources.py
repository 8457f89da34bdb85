"""Rows of a data set: a source comes in, its rows leave. `problems.py` calls it.

A source is a JSONL or Parquet file, a pattern or a folder of either, a folder of
`datasets.save_to_disk`, or a name on the hub. `datasets` is imported only for the last two, because
it costs each process 0.9 s. Nothing of a data set is executed: `datasets` 5 has no loading scripts,
and nothing is unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dapo_async.config import Source
from dapo_async.config.sources import matches
from dapo_async.data.json_rows import json_rows
from dapo_async.data.places import Places
from dapo_async.data.tables import first_line, is_parquet, parquet_rows, saved_rows
from dapo_async.utils.hub_faults import HubFault, hub_fault

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
PACKED = (".gz", ".gzip", ".zst")
HUB_S = 20.0  # deadline for the first answer of the hub
SPLIT = re.compile(r"(train|test|validation|valid|dev|val)(?=[-_.])")


def read_rows(
    source: Source,
    *,
    columns: Sequence[str | Sequence[str]],
    places: Places | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a source.

    Of a table only `columns` are read; a name with dots is a nested column, and of several names
    the first one that the table has is read. `places` learns the file of each row.

    Raises ValueError, in one line, for a source that can't be read.
    """
    places = Places() if places is None else places
    names = [(column,) if isinstance(column, str) else column for column in columns]
    if source.path is None:
        places.begin(source.where, 0)
        return saved_rows(_from_hub(source), names, places, source.where)
    if source.path.is_dir() and _is_saved(source.path):
        places.begin(str(source.path), 0)
        return saved_rows(_saved(source.path), names, places, str(source.path))
    return _rows_of_files(_files(source.path), names, places)


def _rows_of_files(
    files: Sequence[Path], columns: Sequence[Sequence[str]], places: Places
) -> Iterator[dict[str, Any]]:
    count = 0
    for file in files:
        places.begin(str(file), count)
        rows = parquet_rows(file, columns, places) if is_parquet(file) else json_rows(file)
        if len(files) == 1:
            yield from rows  # faster
            return
        for row in rows:
            yield row
            count += 1


def _files(path: Path) -> list[Path]:
    """The files of a path: of a file, of a pattern such as `train-*.parquet`, or of a folder."""
    if path.is_dir():
        return _folder_files(path)
    if path.is_file():
        return [path]
    files = [file for file in matches(path) if _is_there(file)]
    if not files and path.exists():
        raise ValueError(
            f"data file {path} is neither a file nor a folder, and data is read more than once; "
            "write it to a file"
        )
    if not files:
        raise ValueError(
            f"data file {path} does not exist; "
            "give the path of a JSONL or Parquet file, or of a folder"
        )
    if len(set(map(_kind, files))) > 1:
        raise ValueError(
            f"the pattern {path} matches files of different formats; "
            "give a pattern that matches only JSONL or only Parquet files"
        )
    return files


def _kind(file: Path) -> str | None:
    """`parquet`, `jsonl` or None, by the name of a file; it may end in the name of a packer."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote a folder. Raises ValueError if it has splits."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir()) or ["SPLIT"]
        raise ValueError(
            f"data folder {folder} holds the splits {', '.join(splits)}; "
            f"give one of them, such as {folder / splits[0]}"
        )
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _folder_files(folder: Path) -> list[Path]:
    """The data files in a folder and below, by name. Names that begin with a dot are skipped."""
    found = sorted(_below(folder))
    files = [path for path in found if _kind(path) is not None and _is_there(path)]
    if not files:
        others = [path for path in found if path.suffix == ".json"]
        remedy = f"give a file, such as {others[0]}" if others else "give another folder"
        raise ValueError(
            f"data folder {folder} has no *.parquet, no *.jsonl and nothing of "
            f"datasets.save_to_disk; {remedy}"
        )
    kinds = {_kind(path) for path in files}
    splits = sorted({match[1] for path in files if (match := SPLIT.match(path.name))})
    if len(kinds) > 1 or len(splits) > 1:
        mixed = f"the splits {', '.join(splits)}" if len(splits) > 1 else "Parquet and JSONL files"
        raise ValueError(
            f"data folder {folder} holds {mixed}, which must not be mixed; "
            "give one file, or a folder with one of them"
        )
    return files


def _below(folder: Path) -> Iterator[Path]:
    """The files in a folder and below; links to folders are followed once."""
    seen = set[str]()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if not name.startswith("."))


def _is_there(file: Path) -> bool:
    """Whether a path is a file. Raises ValueError for a link whose file is missing."""
    if file.is_symlink() and not file.exists():
        raise ValueError(
            f"data file {file} is a link to {os.readlink(file)}, which does not exist; "
            "correct the link, or remove it"
        )
    return file.is_file()


def _saved(folder: Path) -> Any:
    import pyarrow
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"data folder {folder} is no readable folder of datasets.save_to_disk "
            f"({first_line(error)}); save it again"
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
        fault = hub_fault(error, str(source.hub), source.revision) or HubFault(
            first_line(error).rstrip(".;"), "correct its subset and split"
        )
        earlier = ", set HF_HUB_OFFLINE=1 to use an earlier download" if fault.may_pass else ""
        raise ValueError(
            f"{source.where} can't be read from the Hugging Face hub: {fault.reason}; "
            f"{fault.remedy}{earlier}, or give a local file"
        ) from error
