"""Everything up to the first rollout: `rlkd train --dry-run`."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.config.stages import Stage, with_values
from rlkd.distributed import RunStopped
from rlkd.pipeline.line import reward_item
from rlkd.pipeline.loader import RolloutLoader
from rlkd.run.fit import build_trainer, use_expandable_segments
from rlkd.run.publish import Publish
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule


class StopBeforeRollout(IterationCallback):
    """Calls the rewards on one row, and stops the run before its first rollout."""

    def __init__(self, config: Config, loader: RolloutLoader):
        self._config = config
        self._loader = loader

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Called after the first publish. Raises: RunStopped if a reward fails."""
        if module.algorithm.uses_rewards and self._config.reward.functions:
            line = distributed.on_rank_zero(lambda: _rewarded(self._loader))
            if distributed.rank() == 0:
                print(line, flush=True)
        trainer.should_stop = True


def dry_run(stage: Stage) -> int:
    """Load the models of a stage, start its servers, publish the weights, call the rewards; sample nothing.

    It uses a run directory of its own, `<run.dir>/<run.name>.dry-run`, which is deleted unless something fails.

    Returns: the exit code. Raises: RunStopped.
    """
    name = f"{stage.loaded.config.run.name}.dry-run"
    config = with_values(stage.loaded, {"run.name": name, "run.resume": "never"}).config
    use_expandable_segments(config)
    module = PolicyModule(config)
    loader = RolloutLoader(config, module.algorithm)
    try:
        trainer = build_trainer(config, [Publish(loader), StopBeforeRollout(config, loader)])
        trainer.fit(module, loader)
    finally:
        loader.close()
    if distributed.rank() == 0:
        shutil.rmtree(Path(config.run_dir), ignore_errors=True)  # it exists only if servers wrote logs
        which = "" if stage.name is None else f" of stage {stage.name}, the first"
        print(f"dry run{which}: models are loaded, servers answer, weights are published; nothing was sampled")
    return 0


def _rewarded(loader: RolloutLoader) -> str:
    """What the rewards return for a row whose completion is its own answer."""
    (prompt,) = loader.line.prompts.take(0, 1, 0, 1)
    completion = prompt.answer or ""
    (result,) = loader.line.rewards.submit([reward_item(prompt, completion)]).result()
    if result.error is not None:
        raise RunStopped(f"the rewards of row {prompt.id}, for the completion {completion[:40]!r}: {result.error}")
    return (
        f"row {prompt.id}: the reward of the completion {completion[:40]!r}, which is the answer, is {result.reward:g}"
    )
