"""The names and shapes of a checkpoint's tensors, which a loader expects, from those that a model has in memory.

On loading, transformers renames tensors and fuses several into one, the experts of a mixture above all. What reads a
checkpoint, as vLLM does, knows the names in the file alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def loader_names(hf: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` as `hf.save_pretrained` would write them: the same tensors where nothing was renamed or fused.

    A tied tensor stands once, under the name that is loaded.

    Args:
        hf: the model that they belong to, sharded or not. What was done when it was loaded is what is undone.
        weights: all of its state, unsharded, under the names in memory.
    """
    second = {name for name, first in hf.all_tied_weights_keys.items() if first in weights}
    once = {name: tensor for name, tensor in weights.items() if name not in second}
    return dict(revert_weight_conversion(hf, once))
