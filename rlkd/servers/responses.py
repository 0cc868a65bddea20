"""The answers of a server: one strict class per route, with only the fields that we read.

A status of 200 proves little: a proxy may answer with a page, another program with other fields, a faulty server with
NaN. So every answer is parsed here once: it has the right types and is finite and complete, or it is a one-line error.
The caller compares it with its request (number of completions, tokens, model).
"""

from __future__ import annotations

import base64
import io
import math
import tokenize
from collections.abc import Sequence
from typing import Annotated, TypeVar

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

_SHOWN = 60

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Answer(BaseModel):
    """The JSON object of one route. A number is never given as text, and is never NaN or infinite."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


A = TypeVar("A", bound=Answer)


class ModelCard(Answer):
    """One entry of GET /v1/models."""

    id: str
    root: str | None = None
    parent: str | None = None
    """For a LoRA adapter: the model that it adapts."""
    max_model_len: int | None = Field(None, gt=0)
    """None for an adapter."""


class ModelList(Answer):
    """GET /v1/models."""

    data: list[ModelCard]


class WeightInfo(Answer):
    """GET /weight_info."""

    weight_version: str


class _ModelSettings(Answer):
    dtype: str


class _SchedulerSettings(Answer):
    max_num_seqs: int = Field(gt=0)


class _Settings(Answer):
    model_config_: _ModelSettings = Field(alias="model_config")
    scheduler_config: _SchedulerSettings


class ServerInfo(Answer):
    """GET /server_info?config_format=json."""

    vllm_config: _Settings

    @property
    def dtype(self) -> str:
        """That of the model, e.g. torch.bfloat16."""
        return self.vllm_config.model_config_.dtype

    @property
    def sequences(self) -> int:
        """How many it batches."""
        return self.vllm_config.scheduler_config.max_num_seqs


class CacheReset(Answer):
    """POST /reset_prefix_cache."""

    success: bool


class WorldSize(Answer):
    """GET /get_world_size."""

    world_size: int = Field(ge=1, lt=2**16)


class LogprobEntry(Answer):
    """A token's log-prob; vLLM writes −9999 for NaN, −inf and a missing one."""

    logprob: float | None


class TokenEntry(LogprobEntry):
    token_id: TokenId


class SampledToken(TokenEntry):
    top_logprobs: list[TokenEntry] = []


class SampledTokens(Answer):
    content: list[SampledToken] | None


class Span(Answer):
    """Tokens [start, end) sampled by the weights of one version."""

    start: int
    end: int
    version: str


class Generated(Answer):
    """One completion of POST /inference/v1/generate."""

    index: int
    token_ids: list[TokenId] | None = None
    logprobs: SampledTokens | None = None
    finish_reason: str | None = None
    weight_versions: list[Span] | None = None


class GenerateAnswer(Answer):
    """POST /inference/v1/generate, asked for completions."""

    model: str
    choices: list[Generated]


class GivenAnswer(Answer):
    """POST /inference/v1/generate, asked for the log-probs of given tokens."""

    model: str
    prompt_token_id_logprobs: str | None = None
    """Base64 of a .npy file."""


class TokenLogprobs(Answer):
    token_logprobs: list[float | None]


class Completed(Answer):
    """One entry of POST /v1/completions."""

    index: int
    token_ids: list[TokenId] | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[dict[TokenId, LogprobEntry] | None] | None = None


class CompletionsAnswer(Answer):
    """POST /v1/completions."""

    model: str
    choices: list[Completed]


def parse(content: bytes, kind: type[A]) -> A:
    """The answer `content` as a `kind`.

    Raises: ValueError, one line: the field, what is wrong with it, and its value.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        got = content.decode(errors="replace") if first["type"] == "json_invalid" else repr(first["input"])
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        line = " ".join(f"{field[:120] or 'the answer'}: {first['msg']}, got {got[:_SHOWN]}{more}".split())
        raise ValueError(line) from error


def float_array(encoded: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """The array of a base64 .npy file, which must be of `shape`.

    Raises: ValueError, one line. The header is checked first: it may claim more than fits in memory.
    """
    raw = base64.b64decode(encoded, validate=True)
    file = io.BytesIO(raw)
    if npy.read_magic(file) != (1, 0):  # type: ignore[no-untyped-call]
        raise ValueError("expected a .npy file of version 1.0, got another version")
    try:
        got, _, kind = npy.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
    except (SyntaxError, tokenize.TokenError) as error:  # numpy reads a broken header as one of Python 2
        raise ValueError("expected a .npy file, got a broken header") from error
    if got != tuple(shape) or kind.kind != "f":
        raise ValueError(f"expected floats of shape {list(shape)}, got {kind.name} of shape {list(got)}")
    if len(raw) - file.tell() != math.prod(shape) * kind.itemsize:
        raise ValueError(f"expected a .npy file as long as its header states, got {len(raw)} bytes")
    values: NDArray[np.float32] = np.load(io.BytesIO(raw), allow_pickle=False).astype(np.float32)
    return values


def in_order(indices: Sequence[int], count: int) -> list[int]:
    """The positions of choices 0 … count − 1 in the answer. Raises: ValueError unless each occurs once."""
    if sorted(indices) != list(range(count)):
        raise ValueError(f"expected {count} completions numbered from 0, got {len(indices)}")
    return sorted(range(count), key=lambda place: indices[place])
