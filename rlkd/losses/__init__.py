"""Losses: pure per-token functions of tensors. They use no config and no model, and do not average over tokens."""

from rlkd.config.kinds import DivergenceKind, Reduction
from rlkd.losses.divergence import (
    append_tail,
    divergence,
    forward_kl,
    generalized_jsd,
    renormalised,
    restrict_to,
    reverse_kl,
)
from rlkd.losses.estimators import importance_weights, kl_k1_advantage, kl_k2, kl_k3, token_ratios
from rlkd.losses.policy_gradient import (
    advantage_shaping,
    capped_tokens,
    cispo_surrogate,
    clipped_surrogate,
    clipped_tokens,
    sequence_old_logprobs,
)
from rlkd.losses.reduction import counts, reduction_weights, weighted_sum

__all__ = [
    "DivergenceKind",
    "Reduction",
    "advantage_shaping",
    "append_tail",
    "capped_tokens",
    "cispo_surrogate",
    "clipped_surrogate",
    "clipped_tokens",
    "counts",
    "divergence",
    "forward_kl",
    "generalized_jsd",
    "importance_weights",
    "kl_k1_advantage",
    "kl_k2",
    "kl_k3",
    "reduction_weights",
    "renormalised",
    "restrict_to",
    "reverse_kl",
    "sequence_old_logprobs",
    "token_ratios",
    "weighted_sum",
]
