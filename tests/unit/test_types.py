"""The data types of the pipeline reject invalid values."""

import dataclasses
import math

import pytest
import torch
from builders import config, groups, scored

from rlkd.algorithms.kdrl import KDRL
from rlkd.pipeline.collate import collate, describe
from rlkd.types import Rollout, Segment, TeacherScores, VersionSpan


def rollout(**changes):
    return dataclasses.replace(scored(0, 4, 1.0).rollout, **changes)


@pytest.mark.parametrize("bad", [None, math.nan, -math.inf])
def test_a_token_of_the_student_needs_a_finite_logprob(bad):
    with pytest.raises(ValueError, match="token 2 was sampled by the student"):
        rollout(logprobs=(-1.0, -1.0, bad, -1.0))


def test_a_teachers_token_has_no_logprob_and_no_version():
    made = rollout(
        logprobs=(-1.0, -1.0, None, None),
        segments=(Segment(start=2, end=4, author="teacher"),),
        weight_versions=(VersionSpan(start=0, end=2, version=3),),
    )
    assert made.student_tokens() == (True, True, False, False)
    batch = collate([[dataclasses.replace(scored(0, 4, 1.0), rollout=made)]], 3)
    start = len(made.prompt.token_ids)
    assert batch.student_mask[0, start : start + 4].tolist() == [True, True, False, False]
    assert batch.completion_mask[0, start : start + 4].all()
    assert batch.sampler_logprobs[0, start + 2 :].isnan().all()


def test_versions_must_cover_every_sampled_token():
    with pytest.raises(ValueError, match="weight versions must cover"):
        rollout(weight_versions=(VersionSpan(start=0, end=3, version=0),))


def test_teacher_scores_must_fit_and_be_finite():
    with pytest.raises(ValueError, match="the teacher scored 3 tokens of a completion of 4"):
        scored(0, 4, 1.0).with_scores("teacher", TeacherScores(logprobs=(-1.0,) * 3))
    with pytest.raises(ValueError, match="log-prob of completion token 1 is -inf"):
        TeacherScores(logprobs=(-1.0, -math.inf))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="4 tokens but 3 log-probs"):
        rollout(logprobs=(-1.0,) * 3)
    with pytest.raises(ValueError, match="has no tokens"):
        Rollout(prompt=rollout().prompt, token_ids=(), logprobs=(), weight_versions=(), finish_reason="stop")


def test_column_t_is_about_token_t():
    made = groups(KDRL(config()))
    batch = collate(made, 0)
    for row, s in enumerate(s for group in made for s in group):
        start, end = len(s.rollout.prompt.token_ids), int(batch.lengths[row])
        assert tuple(batch.input_ids[row, start:end].tolist()) == s.rollout.token_ids
        assert batch.sampler_logprobs[row, start:end].tolist() == pytest.approx(s.rollout.logprobs)
        assert batch.scores["teacher"].logprobs[row, start:end].tolist() == pytest.approx(s.teacher.logprobs)
        assert batch.completion_mask[row].nonzero().squeeze(1).tolist() == list(range(start, end))


def test_a_failed_reward_masks_its_row_and_is_counted():
    made = groups(KDRL(config()), rewards=(1.0, None, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    batch = collate(made, 0)
    assert not batch.completion_mask[1].any() and not batch.masks["kd"][1].any()
    row = describe(made, 0, 1.0).reduce()
    assert row["reward/errors"] == 1 and row["reward/mean"] == pytest.approx(1 / 7)
    assert row["groups/all_wrong"] == 0.5


def test_a_batch_refuses_masks_on_padding_and_shapes_that_differ():
    batch = collate(groups(KDRL(config())), 0)
    with pytest.raises(AssertionError, match="covers padding"):
        dataclasses.replace(batch, completion_mask=torch.ones_like(batch.completion_mask)).checked()
    with pytest.raises(AssertionError, match="advantages: expected"):
        dataclasses.replace(batch, advantages=batch.advantages[:, :-1])


def test_rows_cut_to_their_longest():
    batch = collate(groups(KDRL(config())), 7)
    part = batch.rows(torch.tensor([1, 3]))
    assert part.input_ids.shape[1] == int(batch.lengths[[1, 3]].max()) and part.iteration == 7
    assert part.lengths.tolist() == batch.lengths[[1, 3]].tolist()
