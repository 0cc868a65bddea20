"""Prompts from a JSONL file, a Hugging Face data set or the built-in task.

Reading has two steps. `read_rows` checks everything that can be checked without a tokenizer and says where a bad row
stands; `load_source` turns the rows into prompts.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

from transformers import PreTrainedTokenizerBase

from rlkd.config import DataConfig
from rlkd.data.chat import encode_prompt
from rlkd.data.jsonl import read_jsonl
from rlkd.types import Prompt

BUILTIN_TASK = "builtin:reverse"
_LEAVE_OUT = "leave the row out of the data"
BUILTIN_COLUMNS = {f"{column}_column": column for column in ("id", "prompt", "answer", "privileged")}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example, checked, not yet tokenized."""

    where: str
    """For messages: file and line, or data set and row."""
    id: str
    prompt: str | tuple[Mapping[str, str], ...]
    answer: str | None
    privileged: str | None
    completion: str | None
    rejected: str | None
    meta: Mapping[str, Any]
    """All other columns. Rewards get them."""


class PromptList(Sequence[Prompt]):
    """Prompts in memory, in the order of the data."""

    def __init__(self, prompts: Sequence[Prompt], skipped: int = 0) -> None:
        self._prompts = tuple(prompts)
        self.skipped = skipped
        """Rows left out because their prompt is longer than data.max_prompt_tokens."""

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int, /) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice, /) -> Sequence[Prompt]: ...

    def __getitem__(self, index: int | slice, /) -> Prompt | Sequence[Prompt]:
        return self._prompts[index]


def load_source(data: DataConfig, tokenizer: PreTrainedTokenizerBase, path: str | None = None) -> PromptList:
    """All prompts of `path` (default: data.path), as the student of `tokenizer` reads them.

    Raises: ValueError, one line, for whatever is wrong with the data.
    """
    prompts = []
    skipped = 0
    for row in read_rows(data, path):
        try:
            messages, token_ids = encode_prompt(tokenizer, row.prompt, data.system, data.chat_template)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        if not token_ids:
            raise ValueError(f"{row.where}: prompt {row.id[:80]!r} has no tokens for this tokenizer; {_LEAVE_OUT}")
        if len(token_ids) > data.max_prompt_tokens:
            if data.too_long == "error":
                raise ValueError(
                    f"{row.where}: prompt {row.id[:80]!r} has {len(token_ids)} tokens, more than "
                    f"data.max_prompt_tokens = {data.max_prompt_tokens}; raise it, or leave such prompts out by "
                    "data.too_long: skip"
                )
            skipped += 1
            continue
        prompts.append(
            Prompt(
                id=row.id,
                messages=messages,
                token_ids=token_ids,
                answer=row.answer,
                privileged=row.privileged,
                completion=_completion(data, tokenizer, row, "completion"),
                rejected=_completion(data, tokenizer, row, "rejected"),
                meta=row.meta,
            )
        )
    if not prompts:
        raise ValueError(
            f"{path or data.path}: all {skipped} prompts are longer than data.max_prompt_tokens = "
            f"{data.max_prompt_tokens}; raise it"
        )
    return PromptList(prompts, skipped)


def _completion(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, row: Row, name: Literal["completion", "rejected"]
) -> tuple[int, ...] | None:
    """The ids of a completion that the data has, end of sequence included; None where it has none."""
    text = row.completion if name == "completion" else row.rejected
    if text is None:
        return None
    assert isinstance(tokenizer.eos_token_id, int)
    token_ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
    if len(token_ids) > data.max_completion_tokens:
        raise ValueError(
            f"{row.where}: the {name} of {row.id[:80]!r} has {len(token_ids)} tokens, more than "
            f"data.max_completion_tokens = {data.max_completion_tokens}; raise it, or leave such rows out of the data"
        )
    return token_ids


def read_rows(data: DataConfig, path: str | None = None) -> Iterator[Row]:
    """The rows of `path` (default: data.path), at most data.limit of them.

    Raises: ValueError, one line: no such data, a broken line, a missing column, a wrong type, an empty prompt, an id
    that comes twice, no rows at all.
    """
    path = data.path if path is None else path
    if not path.strip():
        raise ValueError(f"got the empty path {path!r}; wants a .jsonl file, a data set, or {BUILTIN_TASK}")
    if path.startswith("builtin:"):
        data = data.model_copy(update=BUILTIN_COLUMNS)  # the built-in task has columns of its own
    seen: dict[str, str] = {}
    for number, (where, columns) in enumerate(itertools.islice(_tables(data, path), data.limit)):
        row = _row(data, columns, where, number)
        if row.id in seen:
            raise ValueError(f"{where}: id {row.id[:80]!r} was already used at {seen[row.id]}; ids must be unique")
        seen[row.id] = where
        yield row
    if not seen:
        raise ValueError(f"{path}: the data set is empty")


def _tables(data: DataConfig, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, columns) of every row."""
    if path == BUILTIN_TASK:
        from rlkd.tiny import task

        rows = task.rows(cast(task.Split, data.split))  # checks the split itself
        return ((f"{path}[{data.split}] row {i}", row) for i, row in enumerate(rows))
    if path.startswith("builtin:"):
        raise ValueError(f"{path!r} is unknown; the built-in task is {BUILTIN_TASK}")
    if path.endswith(".jsonl"):
        return read_jsonl(path)
    if os.path.isfile(path):
        raise ValueError(f"{path}: only .jsonl files are read; put other formats into a folder of their own")
    return _hugging_face(path, data.split)


def _hugging_face(path: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets  # two seconds that only its users pay

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
                raise ValueError(f"it holds split {str(table.split)!r}, but data.split is {split!r}")
        else:
            table = datasets.load_dataset(path, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        raise ValueError(f"cannot load data set {path!r}: {' '.join(str(reason).split())[:300]}") from error
    assert isinstance(table, datasets.Dataset)
    for number, row in enumerate(table):
        yield f"{path}[{split}] row {number}", row


def _row(data: DataConfig, columns: Mapping[str, Any], where: str, number: int) -> Row:
    used = {
        "data.prompt_column": data.prompt_column,
        "data.answer_column": data.answer_column,
        "data.privileged_column": data.privileged_column,
        "data.completion_column": data.completion_column,
        "data.rejected_column": data.rejected_column,
        "data.id_column": data.id_column,
    }
    for key, column in used.items():
        if column is not None and column not in columns:
            has = " ".join(", ".join(columns).split())
            raise ValueError(
                f"{where}: no column {column!r} ({key}); it has: {has[:200]}{'…' if len(has) > 200 else ''}"
            )

    def text(column: str | None, key: str) -> str | None:
        if column is None:
            return None
        value = columns[column]
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise ValueError(f"{where}: column {column!r} ({key}) is {_kind(value)}, wants a text{_as_text(value)}")
        return value

    meta = {key: value for key, value in columns.items() if key not in used.values()}
    for column, value in meta.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: column {column!r} is not JSON ({error}); drop it from the data") from error
    name = text(data.id_column, "data.id_column")
    return Row(
        where=where,
        id=str(number) if name is None else name,
        prompt=_prompt(columns[data.prompt_column], f"{where}: column {data.prompt_column!r} (data.prompt_column)"),
        answer=text(data.answer_column, "data.answer_column"),
        privileged=text(data.privileged_column, "data.privileged_column"),
        completion=text(data.completion_column, "data.completion_column"),
        rejected=text(data.rejected_column, "data.rejected_column"),
        meta=meta,
    )


def _prompt(value: Any, where: str) -> str | tuple[Mapping[str, str], ...]:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where} is empty, wants a text; {_LEAVE_OUT}")
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_kind(value)}, wants a text or a list of messages")
    if not value:
        raise ValueError(f"{where} is empty, wants messages; {_LEAVE_OUT}")
    for message in value:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(f"{where}: each message wants a text 'role' and a text 'content', got {str(message)[:80]}")
    if not any(message["content"].strip() for message in value):
        raise ValueError(f"{where}: every message is empty, wants a text in one; {_LEAVE_OUT}")
    return tuple(value)


def _as_text(value: Any) -> str:
    return f'; write it in quotes: "{value}"' if isinstance(value, float) else ""


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
