"""The student as its own teacher: its initial weights, a moving average, or the weights that sampled."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlkd import distributed
from rlkd.config.schema import Config, SelfTeacherConfig
from rlkd.losses.lm_head import OutputLayer
from rlkd.models.vocabulary import vocabulary_size
from rlkd.models.weights import Weights, copy_into
from rlkd.teachers.local import LocalScorer
from rlkd.teachers.lockstep import Lockstep

FILE = "self_teacher.safetensors"


class SelfTeacher(LocalScorer):
    """A copy of the student in every trainer process, which follows the student according to `teacher.weights`.

    fixed: it keeps the initial weights. live: it uses the weights published to the sampler. ema: once per iteration
    w ← decay · w + (1 − decay) · published, in fp32.
    """

    def __init__(self, config: Config, lockstep: Lockstep | None = None) -> None:
        """`lockstep`: see `LocalScorer`; only for fixed weights."""
        teacher = config.teacher
        assert isinstance(teacher, SelfTeacherConfig)
        super().__init__(
            config.model.path,
            vocabulary=vocabulary_size(config.model),
            temperature=teacher.temperature,
            batch_tokens=teacher.batch_tokens,
            dtype=getattr(torch, teacher.dtype),
            accelerator=config.trainer.accelerator,
            attention=config.model.attention,
            trust_remote_code=config.model.trust_remote_code,
            lockstep=lockstep,
            fp32_head=config.model.fp32_head,
        )
        self.weights = teacher.weights
        self.decay = teacher.decay
        self.version = 0
        """The student's version that the weights have followed so far."""
        self._average: dict[str, Tensor] = {}

    def open(self) -> None:
        """See `LocalScorer.open`."""
        super().open()
        if self.weights == "ema":
            self._average = {name: value.float().clone() for name, value in self.hf.state_dict().items()}

    @property
    def follows(self) -> bool:
        return self.weights != "fixed"

    def layers(self) -> tuple[OutputLayer, ...]:
        """A copy where the weights move: a batch may still be trained on when the next ones are published."""
        layers = super().layers()
        return tuple(layer.copy() for layer in layers) if self.follows else layers

    def publish(self, weights: Weights, version: int) -> None:
        """Follow the student to `version`. The current version (in a resumed run, the first) changes nothing."""
        if self.weights == "live":
            copy_into(self.hf, weights)
        elif self.weights == "ema" and version != self.version:
            assert version == self.version + 1, f"the average is at version {self.version}, the student at {version}"
            for name, value in weights:
                average = self._average[name]
                average.lerp_(value.to(average), 1.0 - self.decay)
            self.hf.load_state_dict(self._average, strict=True)
        self.version = version

    def save(self, folder: Path) -> None:
        """Save the average, which a resumed run cannot recompute, in a checkpoint's folder. All ranks have the same."""
        if self.weights == "ema" and distributed.rank() == 0:
            save_file({name: value.contiguous() for name, value in self._average.items()}, folder / FILE)

    def restore(self, folder: Path, version: int) -> None:
        """Load the state that `save` wrote at `version`."""
        if self.weights == "ema":
            saved = load_file(folder / FILE)
            self._average = {name: saved[name].to(value) for name, value in self._average.items()}
            self.hf.load_state_dict(self._average, strict=True)
        self.version = version
