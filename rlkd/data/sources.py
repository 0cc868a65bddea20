"""Prompts from a file (JSONL, CSV, Parquet), a Hugging Face data set, the built-in task or code from outside the
package, or a part of them.

Reading has two steps. `read_rows` checks everything that can be checked without a tokenizer and reports the line of a
bad row; `load_source` turns the rows into prompts.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from rlkd.config.schema import DataConfig
from rlkd.data import formats, rows
from rlkd.data.faults import DataError, Faults
from rlkd.data.jsonl import read_jsonl
from rlkd.data.rows import LEAVE_OUT, Row
from rlkd.data.split import Part
from rlkd.data.tables import read_csv, read_parquet
from rlkd.plugins import DATA_SOURCE, find, is_outside, one_line
from rlkd.raised import place
from rlkd.storage import hub
from rlkd.storage.near import did_you_mean

if TYPE_CHECKING:  # `read_rows` is called before these are imported, which takes ten seconds
    from transformers import PreTrainedTokenizerBase

    from rlkd.data.chat import Reading
    from rlkd.types import Prompt

BUILTIN_TASK = "builtin:reverse"
FILES: Mapping[str, Callable[[str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
"""End of a file's name → what reads its rows: (where, columns), or (where, the ValueError of a row)."""
_KINDS = ", ".join(FILES)
BUILTIN_COLUMNS = {f"{column}_column": column for column in ("id", "prompt", "answer", "privileged")}


@dataclass(frozen=True)
class Identity:
    """Identifies the content of a data set, wherever it is read from."""

    rows: int
    digest: str
    """SHA-256 of the rows' content, in order."""


class PromptList(Sequence["Prompt"]):
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
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    path: str | None = None,
    ends: Sequence[int] = (),
    part: Part | None = None,
) -> PromptList:
    """All prompts of `path` (default: data.path), as the student of `tokenizer` reads them.

    Args:
        ends: the tokens that end a completion (`sampler.eos_ids`), for data with completions; without them, the
            tokenizer's end of sequence.
        part: which rows; None: all. The held-out part is in a random order, so its first prompts are like the others.

    Raises: DataError with a line for each fault in the data.
    """
    from rlkd.data.notes import Notes

    path = data.path if path is None else path
    faults, prompts, skipped, digest = Faults(path), [], 0, _Digest()
    notes = Notes(data, tokenizer)
    if not ends and tokenizer.eos_token_id is not None:
        ends = (int(tokenizer.eos_token_id),)
    left_out = 0
    places: list[float] = []
    for row in _rows(data, path, faults):
        if part is not None and not part.has(row):
            left_out += 1
            continue
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
                line = f"{row.where}: {error}; raise it, or leave such rows out by data.too_long: skip"
                faults.add(line, "tokenizer", "too_long")  # if all rows are, the limit is wrong
            continue
        except ValueError as error:
            faults.add(f"{row.where}: {error}")
            continue
        notes.look(row, prompt)
        prompts.append(prompt)
        places.append(part.place(row) if part is not None and part.held_out else 0.0)
    faults.check()
    if part is not None and left_out and not digest.rows:
        kind = "in" if part.held_out else "not in"
        raise DataError(
            [
                f"{path}: none of {left_out} rows is {kind} the held-out part, with eval.fraction = {part.fraction:g}; "
                f"{'raise' if part.held_out else 'lower'} it, or use more data"
            ]
        )
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
    if part is not None:
        others = "trained on" if part.held_out else "held out"
        lines.append(f"{digest.rows} of {digest.rows + left_out} rows; the others are {others} (eval.fraction)")
    if skipped:
        lines.append(f"{skipped} rows over data.max_prompt_tokens or data.max_completion_tokens were skipped")
    prompts = [prompts[i] for i in sorted(range(len(prompts)), key=places.__getitem__)]
    return PromptList(prompts, skipped, digest.identity(), lines)


class _Refused(ValueError):
    """A row that the tokenizer or its template refuses. If it refuses all rows, a setting is wrong."""


class _TooLong(ValueError):
    """A row that is longer than the configuration allows."""


def _encoded(data: DataConfig, tokenizer: PreTrainedTokenizerBase, row: Row, ends: Sequence[int]) -> Prompt:
    """The row as the student reads it. Raises: ValueError, one line; _TooLong because of its length."""
    from rlkd.data.chat import read_as_configured
    from rlkd.types import Prompt

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
    from rlkd.data.chat import encode_completion

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
        self.rows, self._hash = 0, hashlib.sha256()

    def add(self, row: Row) -> None:
        self.rows += 1
        self._hash.update(row.canonical() + b"\n")

    def identity(self) -> Identity:
        return Identity(self.rows, self._hash.hexdigest())


def identity(data: DataConfig, part: Part | None = None) -> Identity:
    """The identity of the data, or of a part of it, as it is now. Raises: DataError."""
    digest = _Digest()
    for row in read_rows(data):
        if part is None or part.has(row):
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
        raise DataError([f"expected a {_KINDS} file, a data set, or {BUILTIN_TASK}, got the empty path {path!r}"])
    if path.startswith("builtin:"):
        data = data.model_copy(update=BUILTIN_COLUMNS)  # the built-in task has columns of its own
    form, path = formats.named(path)
    if form is not None:
        data = data.model_copy(update=dict(form.columns))
    nulls = not path.startswith("builtin:") and _reader(path) not in (read_jsonl, read_csv)
    seen: dict[str, str] = {}
    number = -1
    try:
        for number, (where, columns) in enumerate(itertools.islice(_tables(data, path), data.limit)):
            faults.next_row()
            if form is not None and not isinstance(columns, ValueError):
                try:
                    columns = form.read(columns)
                except ValueError as error:
                    columns = error
            if isinstance(columns, ValueError):
                faults.add(f"{where}: {columns}")
                continue
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
    reader = _reader(path)
    if reader is not None:
        return reader(path)
    if os.path.isfile(path):
        raise ValueError(f"{path}: only {_KINDS} files are read; put other formats into a folder of their own")
    if "/" not in path and not os.path.exists(path) and is_outside(path, DATA_SOURCE):
        return _own(path, data.split)
    return _hugging_face(path, data.split)


def _reader(path: str) -> Callable[[str], Iterator[tuple[str, Any]]] | None:
    """What reads the file; None for a data set, which may be a folder called data.parquet."""
    reader = next((reader for end, reader in FILES.items() if path.endswith(end)), None)
    return None if reader is not read_jsonl and os.path.isdir(path) else reader


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
            f"{path}: with split {split!r}, after {number + 1} rows it raised {one_line(error)}{place(error)}"
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
            if not folder.exists() and path[:1] not in "/.~" and not _in_cache(path):
                hub.require(path, "dataset", did_you_mean(path))
            table = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        raise ValueError(f"cannot load data set {path!r}: {' '.join(str(reason).split())[:300]}") from error
    assert isinstance(table, datasets.Dataset)
    for number, row in enumerate(table):
        yield f"{path}[{split}] row {number}", row


def _in_cache(path: str) -> bool:
    """Whether `datasets` has prepared the data set of that hub id before, so that it needs no hub."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE, path.replace("/", "___")).exists()
