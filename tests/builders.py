"""Small real objects that several tests need: configs, scored rollouts, one training step."""

from dataclasses import replace

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from rlkd.algorithms.registry import build_algorithm
from rlkd.config.schema import Config
from rlkd.config_file import load
from rlkd.data.chat import read_prompt
from rlkd.models.student import load_causal_lm
from rlkd.models.weights import Whole
from rlkd.pipeline.collate import collate
from rlkd.pipeline.loader import RolloutLoader
from rlkd.pipeline.stages import BatchedSampler, BatchedTeacher
from rlkd.stream import Stream
from rlkd.teachers.local import LocalScorer
from rlkd.teachers.teacher import ScoreRequest
from rlkd.training.module import PolicyModule
from rlkd.types import Batch, BatchScores, Prompt, Rollout, ScoredRollout, TeacherScores, VersionSpan

GRPO = ("algorithm={name: grpo, group_size: 4}", "teacher=null")


def encode_prompt(*args, **settings):
    """(messages, token ids) of `read_prompt`."""
    reading = read_prompt(*args, **settings)
    return reading.messages, reading.token_ids


def config(*overrides: str, group_size: int | None = 4) -> Config:
    """The quickstart with overrides, on few prompts, and without a mismatch bound since these rollouts are made up."""
    size = [] if group_size is None else [f"algorithm.group_size={group_size}"]
    own = ["run.name=of_a_test", "data.limit=128", "rollout.max_mismatch=1000.0"]
    return load(["configs/quickstart.yaml"], [*own, *size, *overrides]).config


def scored(seed: int, length: int, reward: float | None, **changes) -> ScoredRollout:
    """A made-up rollout of `length` random tokens, with everything filled in."""
    generator = torch.Generator().manual_seed(seed)
    prompt = Prompt(id=f"p{seed}", messages=(), token_ids=tuple(range(5, 5 + 3 + seed % 4)))
    ids = torch.randint(4, 30, (length,), generator=generator)
    logprobs = -4 * torch.rand(3, length, generator=generator)
    rollout = Rollout(
        prompt=prompt,
        token_ids=tuple(ids.tolist()),
        # Low, like the student's own on random tokens; otherwise every importance weight would be about 0.
        logprobs=tuple((8 * logprobs[0]).tolist()),
        weight_versions=(VersionSpan(start=0, end=length, version=0),),
        finish_reason="stop" if seed % 2 else "length",
    )
    filled = {
        "rollout": rollout,
        "reward": reward,
        "error": "failed" if reward is None else None,
        "scores": {
            "teacher": TeacherScores(logprobs=tuple(logprobs[1].tolist())),
            "reference": TeacherScores(logprobs=tuple(logprobs[2].tolist())),
        },
    }
    return ScoredRollout(**(filled | changes))


def with_scores(batch: Batch, name: str, **changes) -> Batch:
    """The batch with other tensors in what `name` said of it."""
    before = batch.scores.get(name) or BatchScores(logprobs=torch.zeros_like(batch.advantages))
    return replace(batch, scores={**batch.scores, name: replace(before, **changes)})


LENGTHS = (5, 1, 9, 3, 7, 12, 2, 4)
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def groups(algorithm, lengths=LENGTHS, rewards=REWARDS, teacher=None):
    """Two groups of four, credited by the algorithm; scored by a real teacher where one is given."""
    rows = [scored(i, n, r) for i, (n, r) in enumerate(zip(lengths, rewards, strict=True))]
    if teacher is not None:
        questions = [ScoreRequest(s.rollout.prompt.token_ids, s.rollout.token_ids) for s in rows]
        answers = teacher.score(questions, algorithm.signal)
        rows = [s.with_scores("teacher", answer) for s, answer in zip(rows, answers, strict=True)]
    return [algorithm.advantages(rows[:4]), algorithm.advantages(rows[4:])]


def assert_same(a, b, tolerance):
    """Equal up to `tolerance`, in units of the largest entry (or of 1, if that is larger)."""
    assert a.keys() == b.keys()
    atol = tolerance * max(1.0, *(float(x.abs().max()) for x in a.values()))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


class OneBatch:
    """A loader of one batch, or of the same one several times (Lightning takes a bare list for several loaders)."""

    def __init__(self, batch, times=1):
        self.batches = [batch] * times

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def bare_trainer(settings: Config, *callbacks) -> lightning.Trainer:
    """A Trainer of one rank that only trains."""
    return lightning.Trainer(
        accelerator=settings.trainer.accelerator,
        devices=1,
        strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
        max_epochs=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Captured:
    """One iteration through a real Trainer: full gradients, metrics, and parameters after the step."""

    def __init__(self, settings: Config, batch=None):
        module = PolicyModule(settings)
        trainer = bare_trainer(settings)
        trainer.fit(module, OneBatch(batch if batch is not None else collate(groups(module.algorithm), 0)))
        self.student = module.model
        named = dict(module.model.hf.named_parameters())
        self.gradients = {name: p.grad.full_tensor().clone() for name, p in named.items() if p.requires_grad}
        self.parameters = {name: p.detach().full_tensor().clone() for name, p in named.items()}
        self.optimizer = trainer.optimizers[0]
        self.row = module.row


def opened(settings: Config, weights=None) -> RolloutLoader:
    """A loader whose sampler and teacher hold the student's start, ready for `batch`. Close it."""
    loader = RolloutLoader(settings, build_algorithm(settings))
    loader.open()
    hf = load_causal_lm(settings.model.path, torch.float32, attention=None, trust_remote_code=False)
    loader.publish(Whole(hf.state_dict() if weights is None else weights), 0)
    return loader


def real_batch(settings: Config, iteration: int = 0) -> Batch:
    """A batch of the student's own samples, scored by the teacher that the config names."""
    loader = opened(settings)
    try:
        return loader.batch(iteration)
    finally:
        loader.close()


def rolled(algorithm, prompts, policy, teacher=None, iteration=0) -> list[list[Rollout]]:
    """What the algorithm rolls out for each prompt, with a sampler and a teacher in this process."""
    stream = Stream(together=True, ahead=False)
    sampler = BatchedSampler(stream, lambda prompts, **how: enumerate(policy.sample(prompts, **how)))
    asked = None if teacher is None else BatchedTeacher(stream, teacher)
    try:
        return stream.run([algorithm.rollout(prompt, sampler, asked, iteration) for prompt in prompts])
    finally:
        stream.close()


NO_CLIP = "optim.max_grad_norm=1000000.0"


def assert_moved(captured):
    assert max(g.abs().max() for g in captured.gradients.values()) > 1e-3


def own_logprobs(settings, batch):
    hf = load_causal_lm(settings.model.path, torch.float32, attention=None, trust_remote_code=False)
    with torch.no_grad():
        logits = hf(batch.input_ids).logits[:, :-1] / settings.rollout.temperature
    logprobs = logits.log_softmax(-1).gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    return torch.nn.functional.pad(logprobs, (1, 0))


def local_scorer(path="builtin:teacher", **changes):
    filled = {
        "vocabulary": 56,
        "temperature": 1.0,
        "batch_tokens": 4096,
        "dtype": torch.float32,
        "accelerator": "cpu",
        "attention": None,
        "trust_remote_code": False,
    }
    made = LocalScorer(path, **(filled | changes))
    made.open()
    return made
