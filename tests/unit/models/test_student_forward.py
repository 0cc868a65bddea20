"""What the student's forward pass returns does not depend on how many passes over the vocabulary it takes."""

import dataclasses

import pytest
import torch
from divergence_reference import batch_of, gradients, normal
from transformers import LlamaConfig, LlamaForCausalLM

from rlkd.losses.lm_head import OutputLayer
from rlkd.models.logprob_head import DivergenceSpec, Needs
from rlkd.models.student import Student

B, T, V, H = 3, 7, 19, 8


def student():
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": 16, "num_hidden_layers": 1}
    return Student(LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval(), V)


def batch():
    """The last token of each completion is not distilled."""
    weights = torch.zeros(B, T)
    weights[0, 2:6], weights[1, 1:3] = 0.1, 0.25
    completion = torch.zeros(B, T, dtype=torch.bool)
    completion[0, 2:7] = completion[1, 1:4] = completion[2, 3:5] = True
    layer = OutputLayer(weight=normal(1, V, H).float(), bias=None)
    made = batch_of(weights, hidden=normal(2, B, T, H).float(), layers=(layer,))
    ids = torch.arange(B * T).view(B, T) % V
    return dataclasses.replace(made, input_ids=ids, completion_mask=completion, lengths=torch.tensor([7, 4, 5]))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_log_probs_beside_a_divergence_are_those_of_a_pass_of_their_own(kind):
    model = student()
    apart = Needs(temperature=0.8, entropy=True, comparison=DivergenceSpec(kind=kind, temperature=0.8))
    together = dataclasses.replace(apart, policy_gradient=False)
    assert together.at_once
    one, other = model(batch(), apart), model(batch(), together)
    for part in ("logprobs", "entropy", "divergence", "token_divergence"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part), atol=1e-5, rtol=1e-5)
    assert (other.logprobs != 0).sum() == batch().completion_mask.sum()
    weights = list(model.parameters())
    for a, b in zip(gradients(one.divergence, *weights), gradients(other.divergence, *weights), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 1.0}, {"support": "given"}, {"ratio_cap": 2.0}],
    ids=["other temperature", "part of the vocabulary", "ratios"],
)
def test_they_need_a_pass_of_their_own_where_the_divergence_has_other_logits_or_needs_them_first(changes):
    comparison = DivergenceSpec(**{"kind": "jsd", "temperature": 0.8} | changes)
    assert not Needs(temperature=0.8, comparison=comparison, policy_gradient=False).at_once
    assert not Needs(temperature=0.8, policy_gradient=False).at_once
