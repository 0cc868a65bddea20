"""The completions of one prompt as one sequence: the prompt once, and each completion sees it and itself only.

    prompt  a a a a  b b  c c c        positions  0 1 2 3  4 5 6 7  4 5  4 5 6

A token's state is then the same as in a sequence of its own, up to rounding, and the prompt is computed once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlkd.distributed import RunStopped
from rlkd.models.output_check import BOUND

_MASKED = ("sdpa", "eager")
"""Attention implementations that take a mask [rows, 1, T, T]."""


def shared_hidden(
    hf: PreTrainedModel, input_ids: Tensor, prompt_lengths: Tensor, lengths: Tensor, sequences: Sequence[Sequence[int]]
) -> Tensor:
    """[B, T, H] last hidden states from which the completion tokens are predicted; zero elsewhere.

    Args:
        input_ids: [B, T], prompt and completion, padded on the right.
        prompt_lengths, lengths: [B], tokens of the prompt, and of prompt and completion.
        sequences: the rows of each sequence, which have the same prompt; together all rows, once each.
    """
    laid = _layout(prompt_lengths.cpu(), lengths.cpu(), sequences)
    row, column, segments = laid.row, laid.column, laid.segments
    device = input_ids.device
    ids = input_ids[row.to(device), column.to(device)]
    places = torch.arange(row.shape[1])
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    seen = (seen & (segments[:, None, :] != -1) | (segments[:, :, None] == -1)) & (places <= places[:, None])
    mask = seen[:, None].to(device)
    if hf.config._attn_implementation == "eager":  # adds its mask
        mask = torch.zeros(mask.shape, device=device, dtype=hf.dtype).masked_fill(~mask, torch.finfo(hf.dtype).min)
    trunk = hf.base_model(input_ids=ids, attention_mask=mask, position_ids=column.to(device), use_cache=False)
    hidden: Tensor = trunk.last_hidden_state
    to_row, to_column, from_sequence, from_place = laid.predictors.to(device)
    full = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
    return full.index_put((to_row, to_column), hidden[from_sequence, from_place])


class _Layout(NamedTuple):
    row: Tensor  # [N, L], the row of each token; 0 for padding
    column: Tensor  # [N, L], its column there, which is also its position
    segments: Tensor  # [N, L], 0 for the prompt, 1, 2, … for completions, −1 for padding
    predictors: Tensor
    """[4, tokens]: row and column of each state that predicts a completion token, and its sequence and place there."""


def _layout(prompt_lengths: Tensor, lengths: Tensor, sequences: Sequence[Sequence[int]]) -> _Layout:
    """How N sequences hold the rows."""
    rows = torch.tensor([row for of in sequences for row in of])
    sizes = torch.tensor([len(of) for of in sequences])
    owner, first = torch.arange(len(sequences)).repeat_interleave(sizes), sizes.cumsum(0) - sizes
    starts = prompt_lengths[rows[first]]  # of the completions in each sequence
    own = lengths[rows] - prompt_lengths[rows]
    before = own.cumsum(0) - own  # completion tokens of the rows before it
    ends = starts.new_zeros(len(sequences)).index_add(0, owner, own) + starts
    shape = (len(sequences), int(ends.max()))
    row, column = torch.zeros(2, *shape, dtype=torch.int64)
    segments = torch.full(shape, -1)  # padding sees padding, so that no row of the attention is empty

    sequence, place = _places(starts)
    row[sequence, place], column[sequence, place], segments[sequence, place] = rows[first][sequence], place, 0
    index, step = _places(own)
    sequence = owner[index]
    place = starts[sequence] + (before - before[first][owner])[index] + step
    at = starts[sequence] + step
    number = torch.arange(len(rows)) - first[owner] + 1
    row[sequence, place], column[sequence, place], segments[sequence, place] = rows[index], at, number[index]
    # A completion's first token is predicted by the prompt's last one, others by the token before.
    source = torch.where(step == 0, starts[sequence], place) - 1
    return _Layout(row, column, segments, torch.stack([rows[index], at - 1, sequence, source]))


def _places(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For all tokens of parts with `counts` tokens each: the part, and the token's place in it."""
    part = torch.arange(len(counts)).repeat_interleave(counts)
    return part, torch.arange(len(part)) - (counts.cumsum(0) - counts)[part]


@torch.no_grad()
def check_sharing(hf: PreTrainedModel, path: str) -> None:
    """Compare the states of two completions of one prompt, as one sequence and apart.

    Args:
        path: the model's path, for the error message.

    Raises: RunStopped, one line, if they differ or the model cannot compute them so.
    """

    def refuse(why: str) -> RunStopped:
        return RunStopped(
            f"trainer.share_prompts: {path} ({type(hf).__name__}) cannot train completions that share a prompt: {why}; "
            "set it to false"
        )

    config = hf.config.get_text_config()
    if hf.config._attn_implementation not in _MASKED:
        raise refuse(f"its attention is {hf.config._attn_implementation}, not one of {', '.join(_MASKED)}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise refuse("its layers are not all full attention")
    embeddings: Any = hf.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    ids = torch.tensor([[(7 * t + 5 * t * row * (t > 3)) % vocabulary for t in range(8)] for row in (0, 1)])
    prompts, lengths = torch.tensor([4, 4]), torch.tensor([8, 6])
    try:
        shared = shared_hidden(hf, ids, prompts, lengths, [[0, 1]])
    except Exception as error:  # an unknown model can raise any type; report it to the user
        raise refuse(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    apart = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
    gaps = [(shared[row, 3 : end - 1] - apart[row, 3 : end - 1]).abs().max() for row, end in ((0, 8), (1, 6))]
    if not max(gaps) <= BOUND * max(1.0, float(apart.abs().max())):
        raise refuse(f"its states differ by {float(max(gaps)):.2g} from those of sequences of their own")
