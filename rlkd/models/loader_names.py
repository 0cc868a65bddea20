"""Converts a model's tensors in memory to the names and shapes of its checkpoint files.

When it loads a checkpoint, transformers renames some tensors and fuses others, mainly the experts of a mixture. A
program that reads checkpoints, such as vLLM, knows only the names in the files.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def loader_names(hf: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under the names and in the shapes that `hf.save_pretrained` would write.

    Tensors that were not renamed or fused are returned as they are. A tied tensor appears once, under the name from
    which it is loaded.

    Args:
        hf: the model that the weights belong to, sharded or not. The conversions of its loading are reversed.
        weights: its full state, unsharded, under the names in memory.
    """
    second = {name for name, first in hf.all_tied_weights_keys.items() if first in weights}
    once = {name: tensor for name, tensor in weights.items() if name not in second}
    return dict(revert_weight_conversion(hf, once))
