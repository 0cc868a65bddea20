"""Held-out accuracy during a run: greedy, avg@k and pass@k."""

from __future__ import annotations

import lightning

from rlkd import console, distributed
from rlkd.config.schema import Config
from rlkd.data.heldout import heldout_prompts
from rlkd.generation.sampler import Sampling
from rlkd.metrics import MetricAccumulator
from rlkd.pipeline.loader import RolloutLoader, check_errors
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch, Prompt, ScoredRollout


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 − C(n−c, k) / C(n, k): the probability that k of n samples, c of them correct, include a correct one.

    The unbiased estimator of arXiv 2107.03374, Eq. 1. Raises: ValueError unless 1 ≤ k ≤ n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k: expected 1 ≤ k ≤ {samples} samples, got k = {k}; sample more, or lower k")
    if samples - correct < k:
        return 1.0
    wrong = 1.0
    for i in range(samples - correct + 1, samples + 1):
        wrong *= 1.0 - k / i
    return 1.0 - wrong


def evaluate(config: Config, loader: RolloutLoader, prompts: list[Prompt], *, strict: bool = True) -> dict[str, float]:
    """eval/greedy, eval/avg@k and eval/pass@k (k = eval.samples) by the published weights.

    A collective: each rank evaluates its share of `prompts`. The noise is the same in every evaluation of a run.

    Raises: with `strict`, RunStopped if more rewards failed than `reward.max_error_rate` allows.
    """
    mine = prompts[distributed.rank() :: distributed.world_size()]
    meter, groups = loader.with_servers(lambda: _evaluated(config, loader, mine))
    if strict:
        check_errors(groups, config, "evaluation")
    return meter.reduce()


def _evaluated(
    config: Config, loader: RolloutLoader, mine: list[Prompt]
) -> tuple[MetricAccumulator, list[list[ScoredRollout]]]:
    """The metrics of this rank's share, and the scored completions that they are computed from."""
    meter, scored = MetricAccumulator(), []
    plans = (("greedy", 1, 0.0), ("sampled", config.eval.samples, config.eval.temperature))
    meter.total("eval/errors", 0.0)
    for name in ("eval/greedy", "eval/avg@k", "eval/pass@k"):
        meter.mean(name, 0.0, 0.0)
    for plan, n, temperature in plans:
        if not mine:
            continue
        # A different seed from training, so that evaluation never repeats a training sample.
        sampling = Sampling(temperature=temperature, max_tokens=config.rollout.max_tokens, seed=config.run.seed + 2**31)
        groups = loader.line.stream.run([loader.line.answers(prompt, n, sampling) for prompt in mine])
        scored += groups
        for group in groups:
            known = [s.is_correct(config.reward.correct_at) is True for s in group if s.reward is not None]
            meter.total("eval/errors", float(len(group) - len(known)))
            if plan == "greedy":
                meter.mean("eval/greedy", sum(known), len(known))
            elif known:
                meter.mean("eval/avg@k", sum(known) / len(known), 1.0)
                if len(known) == n:  # pass@n needs all n samples
                    meter.mean("eval/pass@k", pass_at_k(n, sum(known), n), 1.0)
    return meter, scored


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
                "form of data.path), or set eval.every to 0",
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
