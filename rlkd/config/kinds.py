"""Option types shared by the configuration and the losses, kept here so that the configuration needs no torch."""

from __future__ import annotations

from typing import Literal

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]
"""KL(T‖S), KL(S‖T), and the generalised Jensen-Shannon divergence."""

Reduction = Literal["token_mean", "sequence_mean", "dr_grpo"]
"""The normaliser of a loss: all tokens, tokens of a sequence then sequences, or sequences × longest completion."""
