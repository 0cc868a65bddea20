"""Ranks that exchange groups before training: nothing is lost, and the weights are those of a run that does not."""

import json
import shutil

import pytest
import torch
from run_results import assert_same_run, rows
from runs import arguments, run_code, train_ranks, train_small
from safetensors.torch import load_file

pytestmark = pytest.mark.process

EXCHANGE = """
import dataclasses, json, sys
import torch
import torch.distributed as dist
from builders import scored
from rlkd import distributed
from rlkd.metrics import MetricAccumulator
from rlkd.pipeline.balance import balanced
from rlkd.types import TeacherScores

rank, world, distributed.CHUNK = int(sys.argv[1]), int(sys.argv[2]), 1000
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)


def group(of, index):
    made = []
    for row in range(2):
        length = 3 + 2 * row + index + (60 + 10 * index) * (of == world - 1)
        seed = 100 * of + 10 * index + row
        noise = torch.rand(length, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
        scores = TeacherScores(logprobs=(-1.0,) * length, hidden=noise)
        made.append(scored(seed, length, 1.0, scores={"teacher": scores}, advantage=seed / 7))
    return made


def same(one, other):
    hidden = [row.scores["teacher"].hidden for row in (one, other)]
    plain = [dataclasses.replace(row, scores={}) for row in (one, other)]
    return plain[0] == plain[1] and torch.equal(*hidden) and hidden[0].dtype == hidden[1].dtype


meter = MetricAccumulator()
everything = [group(of, index) for of in range(world) for index in range(3)]
got = balanced([group(rank, index) for index in range(3)], False, meter)
found = [[i for i, one in enumerate(everything) if all(map(same, one, mine))] for mine in got]
tokens = sum(len(row.rollout.prompt.token_ids) + len(row.rollout.token_ids) for mine in got for row in mine)

refused = None
try:
    distributed.exchange({(rank + 1) % world: (lambda: 0) if rank == 1 else "text"})
except Exception as error:
    refused = str(error)
print(json.dumps([found, tokens, meter.reduce()["balance/tokens"], refused, distributed.exchange({0: rank})]))
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_groups_change_places_whole_and_an_object_that_cannot_be_sent_fails_everywhere(ranks, tmp_path):
    """With teachers' hidden states, in several pieces a group. The last rank has the long completions."""
    said = [json.loads(out) for out in run_code(EXCHANGE, tmp_path, ranks, tmp_path / "meet", ranks=ranks)]
    places = [place for found, *_ in said for place in found]
    assert all(len(place) == 1 for place in places)
    assert sorted(place[0] for place in places) == list(range(3 * ranks))
    assert places != [[i] for i in range(3 * ranks)], "otherwise nothing was exchanged"
    tokens = [count for _, count, *_ in said]
    assert {one[2] for one in said} == {max(tokens) * ranks / sum(tokens)}
    assert all(one[3] for one in said) and "pickle" in said[1][3] and "another rank failed" in said[0][3]
    assert [one[4] for one in said] == [{str(rank): rank for rank in range(ranks)}] + [{}] * (ranks - 1)


AS_SAMPLED = """
import sys
from rlkd.pipeline import balance
from rlkd.train import main

balance.ENOUGH = float("inf")
sys.exit(main(sys.argv[2:]))
"""
ARMS = {
    "kdrl": (2, ()),
    "three_ranks": (3, ("rollout.prompts=6",)),
    "hidden_states": (2, ("algorithm={name: opd, group_size: 4}", "trainer.share_prompts=true")),
    "ahead": (2, ("rollout.max_staleness=1", "trainer.updates_per_iteration=1")),
    "lora": (2, ("model.lora={r: 4}", "algorithm.reference_coef=0.1")),
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_weights_are_those_of_ranks_that_train_what_they_sampled(arm, tmp_path):
    ranks, settings = ARMS[arm]
    settings = ("run.iterations=2", "checkpoint.every=2", *settings)
    train_small(ranks, tmp_path / "balanced", *settings)
    argv = [AS_SAMPLED, *arguments(ranks, tmp_path / "as_sampled", *settings)]
    train_ranks(ranks, argv, tmp_path / "logs", main="runs:execute")
    exchanged, sampled = (load_file(tmp_path / name / "hf/model.safetensors") for name in ("balanced", "as_sampled"))
    assert exchanged.keys() == sampled.keys()
    for name in sampled:
        torch.testing.assert_close(exchanged[name], sampled[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    found = list(zip(rows(tmp_path / "balanced"), rows(tmp_path / "as_sampled"), strict=True))
    assert any(a["balance/tokens"] < b["balance/tokens"] for a, b in found), "otherwise nothing was exchanged"
    for a, b in found:
        assert a["balance/tokens"] <= b["balance/tokens"]
        for name in ("loss", "grad_norm", "reward/mean", "tokens/trained", "tokens/generated"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


def test_what_was_sampled_ahead_and_exchanged_resumes_bit_for_bit(tmp_path):
    settings = ("rollout.max_staleness=1", "rollout.max_tokens=8", "checkpoint.every=2", "checkpoint.keep=9")
    train_small(2, tmp_path / "straight", "run.iterations=4", *settings)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "iteration-000004")
    train_small(2, tmp_path / "resumed", "run.iterations=4", "run.resume=auto", *settings)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed", 4)
    assert all(row["balance/tokens"] < 1.2 for row in rows(tmp_path / "straight"))
