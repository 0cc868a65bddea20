"""A third term of a loss, a second teacher, and tokens of an environment: each is a class in this file, nothing else.

The classes stay out of the registry, so that no other test of the session meets them.
"""

from dataclasses import replace

import pytest
import torch
from builders import Captured, config, opened, real_batch

from rlkd.algorithms.base import Loss, Term
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.kdrl import KDRL
from rlkd.algorithms.registry import ALGORITHMS
from rlkd.losses import weighted_sum
from rlkd.models.weights import Whole
from rlkd.pipeline.build import build_reference
from rlkd.pipeline.line import Line
from rlkd.training.loss_weights import with_loss_weights
from rlkd.types import Segment, VersionSpan

pytestmark = pytest.mark.long
SMALL = ("data.limit=16", "rollout.prompts=4")


class FirstToken(KDRL):
    """KDRL and −Σ log π of the first token of each completion: a third term with a mask and a mean of its own."""

    def advantages(self, group):
        return [
            s.with_mask("first", (True,) + (False,) * (len(s.rollout.token_ids) - 1)) for s in super().advantages(group)
        ]

    @property
    def terms(self):
        return {**super().terms, "first": Term(mask="first")}

    def loss(self, output, batch, iteration):
        loss = super().loss(output, batch, iteration)
        first = weighted_sum(-output.logprobs, batch.loss_weights["first"])
        return Loss(total=loss.total + 0.5 * first, metrics=loss.metrics | {"loss/first": first.detach()})


class NoFirstToken(FirstToken):
    """The same loss on a rank none of whose rollouts has the mask, while those of others do."""

    def advantages(self, group):
        return KDRL.advantages(self, group)


class TwoTeachers(KDRL):
    """KDRL whose second teacher is the student's own start."""

    def scorers(self):
        return {"second": build_reference(self.config)}

    def loss(self, output, batch, iteration):
        loss = super().loss(output, batch, iteration)
        gap = (output.logprobs.detach() - batch.scores["second"].logprobs).abs()
        return Loss(
            total=loss.total, metrics=loss.metrics | {"second/gap": weighted_sum(gap, batch.loss_weights["token"])}
        )


class Environment(GRPO):
    """GRPO on completions into whose middle an environment has written two tokens."""

    async def rollout(self, prompt, policy, teacher, iteration):
        group = await super().rollout(prompt, policy, teacher, iteration)
        return [interrupted(rollout, (5, 6)) for rollout in group]


def interrupted(rollout, said):
    """The rollout with the token ids `said` after its first token."""
    end, length = 1 + len(said), len(rollout.token_ids) + len(said)
    (span,) = rollout.weight_versions
    spans = ((0, 1), (end, length)) if length > end else ((0, 1),)
    return replace(
        rollout,
        token_ids=(rollout.token_ids[0], *said, *rollout.token_ids[1:]),
        logprobs=(rollout.logprobs[0], *(None,) * len(said), *rollout.logprobs[1:]),
        weight_versions=tuple(VersionSpan(start=a, end=b, version=span.version) for a, b in spans),
        segments=(Segment(start=1, end=end, author="environment"),),
    )


@pytest.fixture
def known(monkeypatch):
    """Call the algorithm of a config by another class."""
    return lambda name, algorithm: monkeypatch.setitem(ALGORITHMS, name, algorithm)


def test_a_third_term_is_a_mask_and_an_entry(known):
    made = config(*SMALL)
    plain = Captured(made, real_batch(made))
    known("kdrl", FirstToken)
    batch = real_batch(made)
    found = Captured(made, batch)
    assert batch.masks["first"].sum() == len(batch) and set(batch.masks) == {"first", "kd"}
    weights = with_loss_weights(batch, FirstToken(made)).loss_weights["first"]
    assert weights.sum() == pytest.approx(1.0) and weights[batch.masks["first"]].unique().numel() == 1
    assert found.row["loss"] == pytest.approx(plain.row["loss"] + 0.5 * found.row["loss/first"], abs=1e-6)
    assert found.row["loss/kd"] == plain.row["loss/kd"] and found.row["loss/first"] > 0


def test_a_rank_without_a_row_of_a_term_trains_the_others(known):
    known("kdrl", NoFirstToken)
    made = config(*SMALL)
    batch = real_batch(made)
    assert not batch.masks["first"].any()
    assert Captured(made, batch).row["loss/first"] == 0


def test_a_second_teacher_is_a_scorer_with_a_name(known):
    known("kdrl", TwoTeachers)
    made = config(*SMALL)
    batch = real_batch(made)
    assert set(batch.scores) == {"teacher", "second"}
    gap = (batch.scores["second"].logprobs - batch.sampler_logprobs)[batch.student_mask]
    assert float(gap.abs().max()) < 1e-4, "the sampler holds the student's start"
    assert Captured(made, batch).row["second/gap"] < 1e-4


def test_tokens_of_an_environment_are_read_and_never_trained(known):
    known("grpo", Environment)
    made = config(*SMALL, "algorithm={name: grpo, group_size: 4}", "teacher=null")
    batch = real_batch(made)
    starts = [int(row.nonzero()[0]) for row in batch.completion_mask]
    for row, start in enumerate(starts):
        assert batch.input_ids[row, start + 1 : start + 3].tolist() == [5, 6]
        assert not batch.completion_mask[row, start + 1 : start + 3].any()
        assert batch.sampler_logprobs[row, start + 1 : start + 3].isnan().all()
    batch = replace(batch, advantages=torch.where(batch.completion_mask, 1.0, 0.0))
    weights = with_loss_weights(batch, Environment(made)).loss_weights
    assert all((value[~batch.completion_mask] == 0).all() for value in weights.values())
    found = Captured(made, batch)
    assert found.row["tokens/trained"] == int(batch.completion_mask.sum())
    louder = replace(batch, advantages=torch.where(batch.completion_mask, 1.0, 99.0))
    other = Captured(made, louder)  # whatever stands on them, no gradient changes
    assert all(torch.equal(found.gradients[name], other.gradients[name]) for name in found.gradients)


def test_the_layers_of_a_teacher_that_follows_do_not_change_in_a_batch():
    """A batch may still be trained on when the next weights are published (`weights: live`)."""
    made = config(
        *SMALL, "algorithm={name: opd, divergence: {kind: reverse_kl}}", "teacher={backend: self, weights: live}"
    )
    loader = opened(made)
    try:
        assert isinstance(loader.line, Line)
        batch = loader.batch(0)
        (layer,) = batch.scores["teacher"].layers
        before = layer.weight.clone()
        state = loader.line.teacher.hf.state_dict()
        loader.publish(Whole({name: value + 1.0 for name, value in state.items()}), 1)
        assert torch.equal(layer.weight, before)
        assert not torch.equal(loader.line.teacher.layers()[0].weight, before)
    finally:
        loader.close()
