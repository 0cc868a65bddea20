"""The held-out prompts of a run."""

from __future__ import annotations

import sys

from transformers import PreTrainedTokenizerBase

from rlkd import distributed
from rlkd.config.schema import Config, DataConfig
from rlkd.data.sources import PromptList, load_source
from rlkd.data.split import Part
from rlkd.types import Prompt


def heldout(config: Config) -> DataConfig | None:
    """The data with held-out prompts: eval.path, or data.path for a part of it, or the built-in task's; None: none."""
    if not config.holds_out:
        return None
    limit: int | None = config.eval.prompts
    if config.eval.path is not None:
        path, split = config.eval.path, config.eval.split
    elif config.eval.fraction is not None:
        path, split, limit = config.data.path, config.data.split, config.data.limit
    else:
        path, split = config.data.path, "heldout"
    # What is only trained on need not be there.
    columns = dict.fromkeys(("privileged_column", "completion_column", "rejected_column"))
    return config.data.model_copy(update={"path": path, "split": split, "limit": limit, **columns})


def part_of(config: Config, *, held_out: bool) -> Part | None:
    """The part of data.path that is held out, or the one that is trained on; None if `eval.fraction` is not set."""
    if config.eval.fraction is None:
        return None
    return Part(fraction=config.eval.fraction, seed=config.eval.fraction_seed, held_out=held_out)


def heldout_source(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptList | None:
    """All held-out prompts; None when the run has no held-out data. Raises: DataError."""
    data = heldout(config)
    return None if data is None else load_source(data, tokenizer, part=part_of(config, held_out=True))


def heldout_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The first `eval.prompts` held-out prompts; none when the run has no held-out data."""
    source = heldout_source(config, tokenizer)
    if source is None:
        return []
    if distributed.rank() == 0:
        for note in source.notes:
            print(f"eval: {note}", file=sys.stderr, flush=True)
    return list(source)[: config.eval.prompts]
