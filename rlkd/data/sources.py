"""Prompts from a JSONL file, a Hugging Face data set, the built-in task, or a class from outside the package.

Reading has two steps. `read_rows` checks everything that can be checked without a tokenizer and reports the line of a
bad row; `load_source` turns the rows into prompts.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

from transformers import PreTrainedTokenizerBase

from rlkd.config.schema import DataConfig
from rlkd.data import rows
from rlkd.data.chat import Reading, encode_completion, read_as_configured
from rlkd.data.faults import DataError, Faults
from rlkd.data.jsonl import read_jsonl
from rlkd.data.notes import Notes
from rlkd.data.rows import LEAVE_OUT, Row
from rlkd.plugins import DATA_SOURCE, find, is_outside, one_line, where
from rlkd.types import Prompt

BUILTIN_TASK = "builtin:reverse"
BUILTIN_COLUMNS = {f"{column}_column": column for column in ("id", "prompt", "answer", "privileged")}


@dataclass(frozen=True)
class Identity:
    """Identifies the content of a data set, wherever it is read from."""

    rows: int
    digest: str
    """SHA-256 of the rows' content, in order."""


class PromptList(Sequence[Prompt]):
    """Prompts in memory, in the order of the data."""

    def __init__(self, prompts: Sequence[Prompt], skipped: int, identity: Identity, notes: Sequence[str]) -> None:
        self._prompts = tuple(prompts)
        self.skipped = skipped
        """Number of rows left out because their prompt or a completion is longer than the configuration allows."""
        self.identity = identity
        """Of all rows, including the skipped ones."""
        self.notes = tuple(notes)
        """Notices about the data, one line each."""

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int, /) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice, /) -> Sequence[Prompt]: ...

    def __getitem__(self, index: int | slice, /) -> Prompt | Sequence[Prompt]:
        return self._prompts[index]


def load_source(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, path: str | None = None, ends: Sequence[int] = ()
) -> PromptList:
    """All prompts of `path` (default: data.path), as the student of `tokenizer` reads them.

    `ends`: the tokens that end a completion (`sampler.eos_ids`), for data with completions; without them, the
    tokenizer's end of sequence.

    Raises: DataError with a line for each fault in the data.
    """
    path = data.path if path is None else path
    faults, prompts, skipped, digest = Faults(path), [], 0, _Digest()
    notes = Notes(data, tokenizer)
    if not ends and tokenizer.eos_token_id is not None:
        ends = (int(tokenizer.eos_token_id),)
    for row in _rows(data, path, faults):
        digest.add(row)
        faults.reached("tokenizer")
        try:
            prompt = _encoded(data, tokenizer, row, ends)
        except _Refused as error:
            faults.add(f"{row.where}: {error}", "tokenizer", str(error))
            continue
        except _TooLong as error:
            if data.too_long == "skip":
                skipped += 1
            else:
                faults.add(f"{row.where}: {error}; raise it, or leave such rows out by data.too_long: skip")
            continue
        except ValueError as error:
            faults.add(f"{row.where}: {error}")
            continue
        notes.look(row, prompt)
        prompts.append(prompt)
    faults.check()
    if not prompts:
        raise DataError(
            [
                f"{path}: all {skipped} rows are longer than data.max_prompt_tokens = {data.max_prompt_tokens} or "
                f"data.max_completion_tokens = {data.max_completion_tokens}; raise them"
            ]
        )
    rendered = notes.rendered_beforehand(len(prompts))
    if rendered is not None:
        raise DataError([f"{path}: {rendered}"])
    lines = notes.lines(len(prompts))
    if skipped:
        lines.append(f"{skipped} rows over data.max_prompt_tokens or data.max_completion_tokens were skipped")
    return PromptList(prompts, skipped, digest.identity(), lines)


class _Refused(ValueError):
    """A row that the tokenizer or its template refuses. If it refuses all rows, a setting is wrong."""


class _TooLong(ValueError):
    """A row that is longer than the configuration allows."""


def _encoded(data: DataConfig, tokenizer: PreTrainedTokenizerBase, row: Row, ends: Sequence[int]) -> Prompt:
    """The row as the student reads it. Raises: ValueError, one line; _TooLong because of its length."""
    variables = dict(data.template_variables) | ({} if row.tools is None else {"tools": list(row.tools)})
    try:
        reading = read_as_configured(data, tokenizer, row.prompt, variables, data.system)
    except ValueError as error:
        raise _Refused(str(error)) from error
    count = len(reading.token_ids)
    if not count:
        raise ValueError(f"prompt {row.id[:80]!r} has no tokens for this tokenizer; {LEAVE_OUT}")
    if count > data.max_prompt_tokens:
        raise _TooLong(
            f"prompt {row.id[:80]!r} has {count} tokens, more than data.max_prompt_tokens = {data.max_prompt_tokens}"
        )
    return Prompt(
        id=row.id,
        messages=reading.messages,
        token_ids=reading.token_ids,
        variables=variables,
        answer=row.answer,
        privileged=row.privileged,
        completion=_completion(data, tokenizer, row, reading, "completion", row.completion, ends),
        rejected=_completion(data, tokenizer, row, reading, "rejected", row.rejected, ends),
        meta=row.meta,
    )


def _completion(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    prompt: Reading,
    name: str,
    text: str | None,
    ends: Sequence[int],
) -> tuple[int, ...] | None:
    """The ids of a completion in the data, which end with a token of `ends`; None if the row has none."""
    if text is None:
        return None
    if not ends:
        raise _Refused(
            "nothing ends a completion: the tokenizer has no EOS token, and the model's generation_config.json no "
            "eos_token_id; add one"
        )
    token_ids = encode_completion(tokenizer, prompt, text, ends)
    if len(token_ids) > data.max_completion_tokens:
        raise _TooLong(
            f"the {name} of {row.id[:80]!r} has {len(token_ids)} tokens, more than "
            f"data.max_completion_tokens = {data.max_completion_tokens}"
        )
    return token_ids


class _Digest:
    """Builds an `Identity` row by row."""

    def __init__(self) -> None:
        self._rows, self._hash = 0, hashlib.sha256()

    def add(self, row: Row) -> None:
        self._rows += 1
        self._hash.update(row.canonical() + b"\n")

    def identity(self) -> Identity:
        return Identity(self._rows, self._hash.hexdigest())


def identity(data: DataConfig) -> Identity:
    """The identity of the data as it is now. Raises: DataError."""
    digest = _Digest()
    for row in read_rows(data):
        digest.add(row)
    return digest.identity()


def read_rows(data: DataConfig, path: str | None = None) -> Iterator[Row]:
    """The rows of `path` (default: data.path), at most data.limit of them.

    Raises: DataError, after the last row, with a line for each fault: no such data, a broken line, a missing column, a
    wrong type, an empty prompt, a duplicate id, no rows at all.
    """
    path = data.path if path is None else path
    faults = Faults(path)
    yield from _rows(data, path, faults)
    faults.check()


def _rows(data: DataConfig, path: str, faults: Faults) -> Iterator[Row]:
    """The valid rows; the faults of the others are added to `faults`."""
    if not path.strip():
        raise DataError([f"expected a .jsonl file, a data set, or {BUILTIN_TASK}, got the empty path {path!r}"])
    if path.startswith("builtin:"):
        data = data.model_copy(update=BUILTIN_COLUMNS)  # the built-in task has columns of its own
    seen: dict[str, str] = {}
    number = -1
    try:
        for number, (where, columns) in enumerate(itertools.islice(_tables(data, path), data.limit)):
            faults.next_row()
            if isinstance(columns, ValueError):
                faults.add(f"{where}: {columns}")
                continue
            nulls = not path.startswith("builtin:") and not path.endswith(".jsonl")
            faults.reached("columns")
            row = rows.read(data, columns, where, number, nulls)
            if isinstance(row, list):
                for fault in row:
                    faults.add(fault.line, "columns" if fault.setting else "", fault.setting)
            elif row.id in seen:
                faults.add(f"{where}: id {row.id[:80]!r} was already used at {seen[row.id]}; ids must be unique")
            else:
                seen[row.id] = where
                yield row
    except DataError:
        raise
    except ValueError as error:
        raise DataError([*faults.lines(), str(error)]) from error
    if number < 0:
        raise DataError([f"{path}: the data set is empty"])


def _tables(data: DataConfig, path: str) -> Iterator[tuple[str, Mapping[str, Any] | ValueError]]:
    """(where, columns) of every row, or (where, the fault of its line)."""
    if path == BUILTIN_TASK:
        from rlkd.builtin import task

        rows = task.rows(cast(task.Split, data.split))  # checks the split itself
        return ((f"{path}[{data.split}] row {i}", row) for i, row in enumerate(rows))
    if path.startswith("builtin:"):
        raise ValueError(f"{path!r} is unknown; the built-in task is {BUILTIN_TASK}")
    if path.endswith(".jsonl"):
        return read_jsonl(path)
    if os.path.isfile(path):
        raise ValueError(f"{path}: only .jsonl files are read; put other formats into a folder of their own")
    if "/" not in path and not os.path.exists(path) and is_outside(path, DATA_SOURCE):
        return _own(path, data.split)
    return _hugging_face(path, data.split)


def _own(path: str, split: str) -> Iterator[tuple[str, Mapping[str, Any] | ValueError]]:
    """The rows that a class or function from outside the package gives for `split`: an iterable of dicts."""
    try:
        source = find(path, DATA_SOURCE, lambda found: found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    number = -1
    try:
        for number, row in enumerate(source(split)):
            fault = ValueError(f"expected a dict of columns, got {type(row).__name__} {str(row)[:40]!r}")
            yield f"{path}[{split}] row {number}", row if isinstance(row, Mapping) else fault
    except Exception as error:  # the user's code may raise anything
        raise ValueError(
            f"{path}: with split {split!r}, after {number + 1} rows it raised {one_line(error)}{where(error)}"
        ) from error


def _hugging_face(path: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets  # here, since it takes two seconds

    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(path)
            assert isinstance(splits, datasets.DatasetDict)
            if split not in splits:
                raise ValueError(f"it has no split {split!r} (data.split), but {', '.join(splits)}")
            table = splits[split]
        elif (folder / "state.json").is_file():
            table = datasets.load_from_disk(path)
            if table.split is not None and str(table.split) != split:
                raise ValueError(f"it is split {str(table.split)!r}, but data.split is {split!r}")
        else:
            table = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        raise ValueError(f"cannot load data set {path!r}: {' '.join(str(reason).split())[:300]}") from error
    assert isinstance(table, datasets.Dataset)
    for number, row in enumerate(table):
        yield f"{path}[{split}] row {number}", row
