"""Held-out accuracy during a run: greedy, avg@k and pass@k."""

from __future__ import annotations

from dataclasses import dataclass

import lightning

from rlkd import console, distributed
from rlkd.config.schema import Config
from rlkd.data.heldout import heldout_prompts
from rlkd.generation.sampler import Sampling
from rlkd.metrics import MetricAccumulator
from rlkd.pipeline.loader import RolloutLoader, check_errors
from rlkd.run.statistics import pass_at_k
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch, Prompt, ScoredRollout


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A held-out prompt and the completions of it, with rewards."""

    prompt: Prompt
    greedy: ScoredRollout
    samples: list[ScoredRollout]


def evaluate(config: Config, loader: RolloutLoader, prompts: list[Prompt], *, strict: bool = True) -> dict[str, float]:
    """eval/greedy, eval/avg@k and eval/pass@k (k = eval.samples) by the published weights.

    A collective: each rank evaluates its share of `prompts`. The noise is the same in every evaluation of a run.

    Raises: with `strict`, RunStopped if more rewards failed than `reward.max_error_rate` allows.
    """
    mine = prompts[distributed.rank() :: distributed.world_size()]
    found = answered(config, loader, mine, strict=strict)
    meter = MetricAccumulator()
    meter.total("eval/errors", 0.0)
    for name in ("eval/greedy", "eval/avg@k", "eval/pass@k"):
        meter.mean(name, 0.0, 0.0)
    for one in found:
        greedy = is_correct(one.greedy, config)
        known = [right for sample in one.samples if (right := is_correct(sample, config)) is not None]
        meter.total("eval/errors", float(greedy is None) + len(one.samples) - len(known))
        if greedy is not None:
            meter.mean("eval/greedy", float(greedy), 1.0)
        if known:
            meter.mean("eval/avg@k", sum(known) / len(known), 1.0)
        if len(known) == len(one.samples):  # pass@n needs all n samples
            meter.mean("eval/pass@k", pass_at_k(len(known), sum(known), len(known)), 1.0)
    return meter.reduce()


def answered(config: Config, loader: RolloutLoader, mine: list[Prompt], *, strict: bool = True) -> list[Answered]:
    """A greedy completion and `eval.samples` others of each of this rank's prompts. A collective.

    Raises: as `evaluate`.
    """

    def act() -> list[Answered]:
        groups = []
        for n, temperature in ((1, 0.0), (config.eval.samples, config.eval.temperature)):
            # A different seed from training, so that evaluation never repeats a training sample.
            sampling = Sampling(
                temperature=temperature, max_tokens=config.rollout.max_tokens, seed=config.run.seed + 2**31
            )
            groups.append(loader.line.stream.run([loader.line.answers(prompt, n, sampling) for prompt in mine]))
        return [
            Answered(prompt=prompt, greedy=greedy[0], samples=samples)
            for prompt, greedy, samples in zip(mine, *groups, strict=True)
        ]

    found = loader.with_servers(act)
    if strict:
        check_errors([[one.greedy, *one.samples] for one in found], config, "evaluation")
    return found


def is_correct(scored: ScoredRollout, config: Config) -> bool | None:
    """Whether a completion is correct; None if its reward failed."""
    return scored.is_correct(config.reward.correct_at)


class Evaluate(IterationCallback):
    """Evaluates before the first iteration, every `eval.every` iterations and after the last one."""

    phase = "evaluate"

    def __init__(self, config: Config, loader: RolloutLoader):
        self.config = config
        self.loader = loader
        self.prompts = heldout_prompts(config, loader.tokenizer) if config.eval.every else []

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Evaluate the initial student, unless the run was resumed."""
        if self.config.eval.every and not self.prompts and distributed.rank() == 0:
            print(
                "eval.path: not set, so this run has no held-out accuracy; set it to your own held-out data (in the "
                "form of data.path), hold out a share of data.path by eval.fraction=0.1, or set eval.every to 0",
                flush=True,
            )
        if self.prompts and self.loader.iteration == 0:
            with console.phase("evaluating the initial student", self.config.log.progress):
                self._evaluate(module)

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Evaluate if it is due."""
        done = batch.iteration + 1
        if self.prompts and (done % self.config.eval.every == 0 or done == self.config.run.iterations):
            self._evaluate(module)

    def _evaluate(self, module: PolicyModule) -> None:
        # Failed rewards end a run only if training depends on rewards.
        module.row.update(evaluate(self.config, self.loader, self.prompts, strict=module.algorithm.needs_rewards))
