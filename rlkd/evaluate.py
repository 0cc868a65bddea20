"""Held-out accuracy: greedy, avg@k and pass@k, during a run and as a command.

python -m rlkd.evaluate --config X.yaml model.path=runs/x/hf
"""

from __future__ import annotations

import json
import sys

import lightning
from transformers import PreTrainedTokenizerBase

from rlkd import distributed
from rlkd.config import Config, DataConfig
from rlkd.data.sources import load_source
from rlkd.iteration_callback import IterationCallback
from rlkd.metrics import Meter
from rlkd.module import PolicyModule
from rlkd.rollout.loader import RolloutLoader, check_errors
from rlkd.rollout.sampler import Sampling
from rlkd.tiny import BUILTIN
from rlkd.types import Batch, Prompt, ScoredRollout


def heldout(config: Config) -> DataConfig | None:
    """Where held-out prompts come from: eval.path, else the built-in task's own split, else nowhere."""
    if config.eval.path is not None:
        path, split = config.eval.path, config.eval.split
    elif config.data.path.startswith(BUILTIN):
        path, split = config.data.path, "heldout"
    else:
        return None
    # What is only trained on need not be there.
    columns = dict.fromkeys(("privileged_column", "completion_column", "rejected_column"))
    return config.data.model_copy(update={"path": path, "split": split, "limit": config.eval.prompts, **columns})


def heldout_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The first `eval.prompts` held-out prompts; none when the run has no held-out data."""
    data = heldout(config)
    if data is None:
        return []
    source = load_source(data, tokenizer)
    if distributed.rank() == 0:
        for note in source.notes:
            print(f"eval: {note}", file=sys.stderr, flush=True)
    return list(source)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 − C(n−c, k) / C(n, k): the chance that k of n samples, c of them correct, hold a correct one.

    The unbiased estimator of arXiv 2107.03374, Eq. 1. Raises: ValueError where k of n samples cannot be drawn.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: wants 1 ≤ k ≤ samples; sample more, or lower k")
    if samples - correct < k:
        return 1.0
    wrong = 1.0
    for i in range(samples - correct + 1, samples + 1):
        wrong *= 1.0 - k / i
    return 1.0 - wrong


def evaluate(config: Config, loader: RolloutLoader, prompts: list[Prompt], *, strict: bool = True) -> dict[str, float]:
    """eval/greedy, eval/avg@k and eval/pass@k (k = eval.samples) by the published weights.

    A collective: each rank takes its share of `prompts`. The noise is the same at every evaluation of a run.

    Raises: with `strict`, RunStopped when more rewards failed than `reward.max_error_rate` allows.
    """
    mine = prompts[distributed.rank() :: distributed.world_size()]
    meter, groups = loader.with_servers(lambda: _evaluated(config, loader, mine))
    if strict:
        check_errors(groups, config, "evaluation")
    return meter.reduce()


def _evaluated(config: Config, loader: RolloutLoader, mine: list[Prompt]) -> tuple[Meter, list[list[ScoredRollout]]]:
    """The figures of this rank's share, and all that they are of."""
    meter, scored = Meter(), []
    plans = (("greedy", 1, 0.0), ("sampled", config.eval.samples, config.eval.temperature))
    meter.total("eval/errors", 0.0)
    for name in ("eval/greedy", "eval/avg@k", "eval/pass@k"):
        meter.mean(name, 0.0, 0.0)
    for plan, n, temperature in plans:
        if not mine:
            continue
        # Another seed than training's, so that no training sample is ever drawn again here.
        sampling = Sampling(temperature=temperature, max_tokens=config.rollout.max_tokens, seed=config.run.seed + 2**31)
        groups = loader.reward(loader.policy.sample(mine, n=n, iteration=0, sampling=sampling))
        scored += groups
        for group in groups:
            known = [s.is_correct(config.reward.correct_at) is True for s in group if s.reward is not None]
            meter.total("eval/errors", float(len(group) - len(known)))
            if plan == "greedy":
                meter.mean("eval/greedy", sum(known), len(known))
            elif known:
                meter.mean("eval/avg@k", sum(known) / len(known), 1.0)
                if len(known) == n:  # of fewer there is no pass@n
                    meter.mean("eval/pass@k", pass_at_k(n, sum(known), n), 1.0)
    return meter, scored


class Evaluate(IterationCallback):
    """Evaluates before the first iteration, every `eval.every` iterations and after the last."""

    def __init__(self, config: Config, loader: RolloutLoader):
        self.config = config
        self.loader = loader
        self.prompts = heldout_prompts(config, loader.tokenizer) if config.eval.every else []

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        if self.prompts and self.loader.iteration == 0:
            self._evaluate(module)

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        done = batch.iteration + 1
        if self.prompts and (done % self.config.eval.every == 0 or done == self.config.run.iterations):
            self._evaluate(module)

    def _evaluate(self, module: PolicyModule) -> None:
        # What training does not depend on does not end it.
        module.row.update(evaluate(self.config, self.loader, self.prompts, strict=module.needs_rewards))


def main(argv: list[str]) -> int:
    """Evaluate `model.path` on the held-out data of a config; prints one JSON object."""
    from rlkd.config_file import ConfigError, load, parse_args
    from rlkd.preflight import check_evaluation
    from rlkd.student import load_causal_lm

    try:
        args = parse_args(argv)
        config = load(args.files, args.overrides).config
    except ConfigError as error:
        print("\n".join(error.lines), file=sys.stderr)
        return 2
    # What is evaluated is whole: model.path is the base, or an export with its adapter merged.
    config = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    problems = check_evaluation(config)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    import torch

    from rlkd.algorithms import ALGORITHMS

    loader = RolloutLoader(config, ALGORITHMS[config.algorithm.name](config))
    prompts = heldout_prompts(config, loader.tokenizer)
    try:
        loader.policy.start()
        loader.policy.open()
        loader.rewards.open()
        model = load_causal_lm(
            config.model.path,
            torch.float32,
            attention=config.model.attention,
            trust_remote_code=config.model.trust_remote_code,
        )
        loader.policy.publish(model.state_dict(), 0)
        print(json.dumps(evaluate(config, loader, prompts)))
    finally:
        loader.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
