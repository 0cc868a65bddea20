"""The held-out prompts of a run."""

from __future__ import annotations

import sys

from transformers import PreTrainedTokenizerBase

from rlkd import distributed
from rlkd.builtin import BUILTIN
from rlkd.config.schema import Config, DataConfig
from rlkd.data.sources import load_source
from rlkd.types import Prompt


def heldout(config: Config) -> DataConfig | None:
    """Where held-out prompts come from: eval.path, else the built-in task's own split, else nowhere."""
    if config.eval.path is not None:
        path, split = config.eval.path, config.eval.split
    elif config.data.path.startswith(BUILTIN):
        path, split = config.data.path, "heldout"
    else:
        return None
    # What is only trained on need not be there.
    columns = dict.fromkeys(("privileged_column", "completion_column", "rejected_column"))
    return config.data.model_copy(update={"path": path, "split": split, "limit": config.eval.prompts, **columns})


def heldout_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The first `eval.prompts` held-out prompts; none when the run has no held-out data."""
    data = heldout(config)
    if data is None:
        return []
    source = load_source(data, tokenizer)
    if distributed.rank() == 0:
        for note in source.notes:
            print(f"eval: {note}", file=sys.stderr, flush=True)
    return list(source)
