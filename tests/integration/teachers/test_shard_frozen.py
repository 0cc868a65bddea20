"""Frozen models that are sharded over the ranks give the same bits as a copy on each."""

import json
from pathlib import Path

import pytest
from runs import run_code, train_ranks

from rlkd.config_file import load

pytestmark = [pytest.mark.process, pytest.mark.long]
QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")

TWO = """
import json, sys
import torch
import torch.distributed as dist
from rlkd.distributed import local_part
from rlkd.stream import Stream
from rlkd.teachers.local import LocalScorer
from rlkd.teachers.lockstep import Lockstep
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Signal

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

def scorer(name, lockstep=None):
    made = LocalScorer(
        f"builtin:{name}", vocabulary=50, temperature=1.0, batch_tokens=12, dtype=torch.float32, accelerator="cpu",
        attention=None, trust_remote_code=False, lockstep=lockstep,
    )
    made.open()
    return made

lockstep = Lockstep()
names = ("teacher", "student")
whole, sharded = [scorer(name) for name in names], [scorer(name, lockstep) for name in names]
held = [sum(local_part(p).numel() for p in one.hf.parameters()) for one in (*whole, *sharded)]
questions = [ScoreRequest(tuple(range(1, 3 + i)), tuple(range(4, 7 + 2 * i))) for i in range(5)]
"""

TURNS = """
asked = [(0, questions), (1, questions[:3]), (0, questions[:1])] if rank == 0 else [(1, questions[3:])]
stream = Stream(together=True, ahead=False)
answers = []

async def ask():
    loop = __import__("asyncio").get_running_loop()
    for which, some in asked:
        signal = Signal(tier="top_k", k=4)
        act = lambda: answers.append((which, some, sharded[which].score(some, signal)))
        await loop.run_in_executor(stream._models, act)
    if rank == 1:
        raise ValueError("lost")

try:
    stream.result(stream.submit(ask()), lockstep.turn)
    outcome = "done"
except ValueError as error:
    outcome = str(error)
same = [
    a.logprobs == b.logprobs and torch.equal(a.top_ids, b.top_ids) and torch.equal(a.top_logprobs, b.top_logprobs)
    for which, some, got in answers
    for a, b in zip(whole[which].score(some, Signal(tier="top_k", k=4)), got, strict=True)
]
stream.close()
print(json.dumps([outcome, len(same), all(same), held]))
"""


def test_ranks_that_score_different_models_at_different_times_get_the_same_scores(tmp_path):
    """One rank has three calls of two models, the other one call, and then an error: it still takes part to the end."""
    first, second = [json.loads(output.splitlines()[-1]) for output in run_code(TWO + TURNS, tmp_path, tmp_path)]
    assert first[:3] == ["done", 9, True] and second[:3] == ["lost", 2, True]
    for held in (first[3], second[3]):
        assert all(sharded < 0.6 * whole for whole, sharded in zip(held[:2], held[2:], strict=True))


def test_a_run_with_sharded_models_is_the_run_with_copies(tmp_path):
    rows = []
    for sharded in (False, True):
        folder = tmp_path / str(sharded)
        options = [
            *(f"run.dir={folder}", "run.iterations=2", "eval.every=0", "log.progress=false", "trainer.devices=2"),
            *("trainer.accelerator=cpu", f"trainer.shard_frozen={str(sharded).lower()}", "checkpoint.every=0"),
            *("teacher={backend: local, path: 'builtin:teacher', batch_tokens: 64}", "algorithm.reference_coef=0.1"),
            *("teacher.check_parity=true",),
        ]
        train_ranks(2, ["--config", QUICKSTART, *options], folder / "logs")
        lines = [json.loads(line) for line in next(folder.rglob("metrics.jsonl")).read_text().splitlines()]
        unstable = ("time", "memory", "tokens_per_s", "timestamp")
        rows.append([{k: v for k, v in line.items() if not k.startswith(unstable)} for line in lines])
    assert rows[0] == rows[1] and len(rows[0]) == 2


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (["rollout.max_staleness=1"], "rollout.max_staleness"),
        (["teacher={backend: self, weights: ema}", "algorithm={name: opsd}"], "teacher.weights"),
        (["algorithm={name: opd, others: teacher, student_share: 0.5}"], "teacher writes"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(override, key):
    with pytest.raises(Exception, match=rf"trainer.shard_frozen[^\n]*{key}"):
        load([QUICKSTART], ["trainer.shard_frozen=true", "trainer.devices=2", *override])
