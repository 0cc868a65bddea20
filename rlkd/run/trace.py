"""`--profile`: what every thread of the trainer did in one iteration, as a file for https://ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from torch.profiler import ProfilerActivity, profile

from rlkd import distributed
from rlkd.config.schema import Config
from rlkd.pipeline.loader import RolloutLoader
from rlkd.storage.disk_errors import writing
from rlkd.training.callback import IterationCallback
from rlkd.training.module import PolicyModule
from rlkd.types import Batch


class Trace(IterationCallback):
    """Traces the second iteration of this process, since the first one warms up; the only one, if there is one.

    Each rank writes `<run>/trace-rank<rank>.json.gz`: rollouts, rewards and scores in the background, the updates, and
    publishing.
    """

    phase = "log"

    def __init__(self, config: Config, loader: RolloutLoader):
        self.config = config
        self.loader = loader
        self._profile: profile | None = None
        self._done = False

    def run_started(self, trainer: lightning.Trainer, module: PolicyModule) -> None:
        """Begin if there is one iteration only."""
        if self.config.run.iterations - self.loader.iteration == 1:
            self._begin()

    def iteration_ended(self, trainer: lightning.Trainer, module: PolicyModule, batch: Batch) -> None:
        """Begin after the first iteration, and write the file after the one that was traced."""
        if self._profile is not None:
            self._profile.stop()
            path = Path(self.config.run_dir, f"trace-rank{distributed.rank()}.json.gz")
            with writing(str(path)):
                self._profile.export_chrome_trace(str(path))
            self._profile, self._done = None, True
            if distributed.rank() == 0:
                print(
                    f"--profile: iteration {batch.iteration + 1} is in {path}; open it at ui.perfetto.dev", flush=True
                )
        elif not self._done:
            self._begin()

    def _begin(self) -> None:
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu], experimental_config=every_thread)
        self._profile.start()
