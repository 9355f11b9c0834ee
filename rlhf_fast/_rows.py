"""Rows of a data source, each with its place: files of several formats, and things in memory."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz", ".parquet")

Source = str | Path | Iterable[Any]
# A place and what stands there; a DataError stands for a row that could not be read.
Rows = Iterator[tuple[str, object]]


class DataError(ValueError):
    """A source or a row of it cannot be used; the message names the place, value and remedy."""


def short(value: object, length: int = 60) -> str:
    """`repr(value)`, with its middle left out where it is longer than `length`."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 20]} ... {text[-15:]}"


def kind(value: object) -> str:
    """Says of what type a value is, in words for an error message."""
    return f"of type {type(value).__name__}"


def names(keys: Iterable[object]) -> str:
    """Key names in braces, for an error message."""
    return "{" + ", ".join(map(str, keys)) + "}"


def rows_of(source: Source) -> tuple[str, Rows]:
    """Finds out what a source is.

    Returns:
        A name for messages, and the source's rows, read while they are iterated over.

    Raises:
        DataError: For what is no source; while iterating, where the rest cannot be read.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            there = "is a folder" if path.is_dir() else "is no file"
            raise DataError(
                f"{short(str(source), 200)} {there}; give the path of a {', '.join(SUFFIXES)} "
                "file, a list of rows, or a split of a dataset "
                "(datasets.load_dataset(name, split='train'))"
            )
        suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
        if suffix is None:
            raise DataError(
                f"{path} has an unknown suffix {path.suffix!r}; expected {', '.join(SUFFIXES)}"
            )
        readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
        reader = next(read for begin, read in readers.items() if suffix.startswith(begin))
        return str(path), reader(path)
    if isinstance(source, Mapping) or hasattr(source, "iterrows"):
        remedy = (
            "give one of its values, such as data['train']"
            if isinstance(source, Mapping)
            else "give its rows: frame.to_dict('records')"
        )
        raise DataError(f"the data is {kind(source)}, whose items are no rows; {remedy}")
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise DataError(f"the data is {short(source)}; give a path or an iterable of rows")
    return "the given rows", ((f"row {i}", row) for i, row in enumerate(source, 1))


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: not a whole gzip file ({error}); copy it again, or rename it if it is not "
            "compressed"
        ) from error


def _decode(line: bytes, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line); "
            "save the file as UTF-8"
        ) from error


def _json_rows(path: Path) -> Rows:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            row: object
            try:
                text = _decode(line, number == 1)
                if not text.strip():
                    continue
                row = json.loads(text)
            except DataError as error:
                row = error
            except (ValueError, RecursionError) as error:
                row = DataError(
                    f"not JSON ({error}): {short(text.strip())}; write one JSON object a line"
                )
            if isinstance(row, str):
                row = DataError(f"is the string {short(row)}; write an object such as {{...}}")
            yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Rows:
    start = 1

    def lines(file: IO[bytes]) -> Iterator[str]:
        for number, line in enumerate(file, 1):
            try:
                yield _decode(line, number == 1)
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from error

    limit = csv.field_size_limit(2**31 - 1)
    try:
        with _opened(path) as file:
            reader = csv.reader(lines(file), strict=True)
            header: list[str] | None = None
            for cells in reader:
                place, start = f"{path}:{start}", reader.line_num + 1
                if header is None:
                    header = _header(place, cells) if cells else None
                elif cells:
                    yield place, _csv_row(header, cells)
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: the row that begins here is not CSV ({error}); put text with commas, "
            'quotes or line breaks in "...", and write a quote in it as ""'
        ) from error
    finally:
        csv.field_size_limit(limit)


def _header(place: str, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise DataError(f"{place}: the header names {names(doubled)} twice; rename one")
    return header


def _csv_row(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return DataError(
            f"has {len(cells)} fields, but the header names {len(header)} ({', '.join(header)}); "
            'put text with commas in "..."'
        )
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    if "margin" in row:
        try:
            row["margin"] = float(row["margin"]) if row["margin"].strip() else None
        except ValueError:
            return DataError(f"margin is {short(row['margin'])}; expected a number")
    return row


def _parquet_rows(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not readable as Parquet after row {number} ({error}); write the file again"
        ) from error
