"""The training data of a run: `data.path`, and with it the other data of `data.mix`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rlkd.config.schema import DataConfig
from rlkd.data import sources
from rlkd.data.faults import DataError
from rlkd.data.prompts import MixedStream, PromptStream, Stream
from rlkd.data.sources import Identity, load_source
from rlkd.data.split import Part
from rlkd.types import Prompt


@dataclass(frozen=True)
class TrainingData:
    """All prompts that a run may draw, by the path that they come from; those of `data.path` come first."""

    parts: dict[str, list[Prompt]]
    """Ids in all parts but the first begin with the path, so that no two are equal."""
    shares: tuple[float, ...]
    """The share of each part in every iteration."""
    identity: Identity
    notes: tuple[str, ...]

    @property
    def prompts(self) -> list[Prompt]:
        """Those of all parts."""
        return [prompt for part in self.parts.values() for prompt in part]

    def stream(self, seed: int) -> Stream:
        """The prompts in the order of a run with this seed."""
        if len(self.parts) == 1:
            return PromptStream(self.prompts, seed)
        return MixedStream(list(self.parts.values()), self.shares, list(self.parts), seed)

    def check(self, count: int, blocks: int) -> None:
        """Raises: ValueError, one line, where an iteration of `blocks` times `count` prompts cannot be drawn."""
        stream = self.stream(0)
        stream.take(0, count, blocks=blocks)
        if isinstance(stream, MixedStream) and 0 in stream.counts(count):
            path = list(self.parts)[stream.counts(count).index(0)]
            raise ValueError(
                f"data.mix: of rollout.prompts = {count}, the share of {path} is no whole prompt; raise either"
            )


def load_training_data(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = (), part: Part | None = None
) -> TrainingData:
    """The prompts of `data.path` and `data.mix`; see `load_source`.

    Args:
        part: of `data.path`, the part that is trained on. All of the other data is.

    Raises: DataError with a line for each fault.
    """
    parts: dict[str, list[Prompt]] = {}
    identities, notes, lines = [], [], []
    for path in _paths(data):
        other = path != data.path
        try:
            found = load_source(data, tokenizer, path, ends, part=None if other else part)
        except DataError as error:
            lines += error.lines
            continue
        parts[path] = [replace(prompt, id=f"{path}:{prompt.id}") if other else prompt for prompt in found]
        notes += [f"{path}: {note}" if other else note for note in found.notes]
        identities.append(found.identity)
    if lines:
        raise DataError(lines)
    shares = (1 - sum(data.mix.values()), *data.mix.values())
    return TrainingData(parts, shares, _together(identities), tuple(notes))


def identity(data: DataConfig, part: Part | None = None) -> Identity:
    """The identity of the training data as it is now; `part` as in `load_training_data`. Raises: DataError."""
    others = [sources.identity(data.model_copy(update={"path": path})) for path in data.mix]
    return _together([sources.identity(data, part), *others])


def _paths(data: DataConfig) -> list[str]:
    return [data.path, *data.mix]


def _together(parts: Sequence[Identity]) -> Identity:
    """The identity of several data sets in this order; that of a single one is its own."""
    if len(parts) == 1:
        return parts[0]
    digest = hashlib.sha256("\n".join(part.digest for part in parts).encode()).hexdigest()
    return Identity(sum(part.rows for part in parts), digest)
