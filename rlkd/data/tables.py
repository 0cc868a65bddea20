"""Rows of .csv and .parquet files.

A CSV file has only texts, so its values stay texts: an answer 007 is not the number 7. Parquet files have types.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV value. Python's own limit of 131,072 is too small for a long document."""


def read_csv(path: str) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """(`file:line`, columns) of every row of a CSV file with commas and a line of names, or why it is not one.

    Values in double quotes may contain commas and line breaks. The file may start with a byte order mark.

    Raises: ValueError, one line, if the file cannot be read, or its names cannot be used.
    """
    csv.field_size_limit(LONGEST_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, strict=True)
            names = next(table, [])
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{path}:1: the name {twice[:40]!r} is used for two columns; keep one")
            line = table.line_num + 1
            for values in table:
                where, line = f"{path}:{line}", table.line_num + 1
                if len(values) == len(names):
                    yield where, dict(zip(names, values, strict=True))
                elif values:  # not a blank line
                    yield (
                        where,
                        ValueError(
                            f"expected {len(names)} values, one for each name in line 1, got {len(values)}; put values "
                            "with commas in double quotes"
                        ),
                    )
    except csv.Error as error:
        raise ValueError(f"{path}:{table.line_num}: no CSV ({error}); correct or remove the line") from error
    except UnicodeDecodeError as error:
        got = error.object[error.start : error.start + 4]
        raise ValueError(f"{path}: not UTF-8: got {got!r} ({error.reason}); save the file as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def read_parquet(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file row N`, columns) of every row of a Parquet file, the first of which is row 0.

    Raises: ValueError, one line, if the file cannot be read.
    """
    import pyarrow  # here, since most runs do not need it
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())[:300]}") from error
