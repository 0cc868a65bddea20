"""The interface of an algorithm: who samples, what the teacher reads, who gets credit, and what is minimised.

An `Algorithm` is a plain object that the pipeline and the trainer call: the left half of the line calls `rollout`,
`has_gradient`, `scorer_prompt` and `advantages` to make a Batch, and `PolicyModule` calls `needs`, `terms` and `loss`
in an update. It imports no Lightning and holds no model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlkd.algorithms.registry import ALGORITHMS, OPTIONS
from rlkd.config.kinds import Reduction
from rlkd.config.schema import AlgorithmConfig, Config, NoTeacherConfig
from rlkd.data.chat import completion_text, load_tokenizer
from rlkd.generation.sampler import AsyncSampler, Sampling
from rlkd.metrics import MetricAccumulator
from rlkd.models.logprob_head import Needs, PolicyOutput
from rlkd.teachers.teacher import AsyncTeacher, Teacher
from rlkd.types import Batch, Prompt, Rollout, ScoredRollout, Signal


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What an algorithm minimises on one micro-batch: shares of global means, so they add up."""

    total: Tensor  # scalar, with gradient
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """name → scalar without gradient; adds up over micro-batches and ranks."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One weighted sum over tokens, of a loss or of a metric: which tokens it acts on, and what it is a mean over.

    Masks are `completion`, `student` (the tokens that the student sampled), and those that the algorithm puts into
    `ScoredRollout.masks`.
    """

    mask: str | tuple[str, ...] = "completion"
    """The mask of the tokens with a weight; of several masks, their intersection."""
    mean_over: str | None = None
    """The mask whose tokens and sequences are counted; None: `mask`."""
    reduction: Reduction = "token_mean"
    sequences_per_unit: int = 1
    """Number of sequences in one unit of the mean; 2 for pairs."""

    @property
    def masks(self) -> tuple[str, ...]:
        return (self.mask,) if isinstance(self.mask, str) else self.mask

    @property
    def counted(self) -> str:
        """The mask whose tokens are counted over all ranks and micro-batches of an update."""
        assert self.mean_over is not None or isinstance(self.mask, str), (
            "a term with several masks must name the one to count (mean_over)"
        )
        return self.masks[0] if self.mean_over is None else self.mean_over


class Algorithm:
    """Base class of all algorithms. Cheap to construct: no model is loaded."""

    Options: ClassVar[type[AlgorithmConfig]]
    uses_teacher: ClassVar[bool] = False
    uses_rewards: ClassVar[bool] = True
    """Whether rewards are computed, even if only for the log."""
    masks_failed: ClassVar[bool] = True
    """Whether rollouts whose reward could not be computed are left out of training."""

    def __init_subclass__(cls) -> None:
        """Register the algorithm under the `name` of its Options, for configs.

        A class that is defined again, as in a notebook, replaces the first. Raises: ValueError if another module has an
        algorithm of that name.
        """
        super().__init_subclass__()
        if "Options" not in cls.__dict__ or "name" not in cls.Options.__annotations__:
            return  # a variant without a name of its own, for use from Python or as module:Class
        for name in get_args(cls.Options.model_fields["name"].annotation):  # empty if it is a plain str
            home = f"rlkd.algorithms.{name}" if name in OPTIONS else ALGORITHMS.get(name, cls).__module__
            if cls.__module__ != home:
                raise ValueError(
                    f"{cls.__name__}.Options.name: expected a name that no other algorithm has, got {name!r}, which is "
                    f"that of one in {home}; choose another"
                )
            ALGORITHMS[name] = cls

    def __init__(self, config: Config):
        if not isinstance(config.algorithm, self.Options):
            again = config.algorithm.name in get_args(self.Options.model_fields["name"].annotation)
            fix = "load the configuration again, as the class is newer" if again else "set the name of this algorithm"
            raise ValueError(
                f"algorithm.name: expected {self.Options.__name__} for {type(self).__name__}, got "
                f"{config.algorithm.name}; {fix}"
            )
        self.config = config

    @property
    def options(self) -> Any:
        """The section `algorithm`: an instance of `Options`."""
        return self.config.algorithm

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return load_tokenizer(self.config.model.path, self.config.model.trust_remote_code)

    def text(self, rollout: Rollout) -> str:
        """The completion as rewards and teachers read it: without the end token that stopped it."""
        return completion_text(self.tokenizer, rollout.token_ids, rollout.finish_reason)

    @property
    def sampling(self) -> Sampling:
        """How training completions are drawn."""
        rollout = self.config.rollout
        return Sampling(temperature=rollout.temperature, max_tokens=rollout.max_tokens, seed=self.config.run.seed)

    @property
    def needs_rewards(self) -> bool:
        """Whether training depends on rewards; if so, too many failed ones stop the run."""
        return self.uses_rewards

    @property
    def teacher_temperature(self) -> float:
        """The temperature at which student and teacher are compared."""
        assert not isinstance(self.config.teacher, NoTeacherConfig)
        return self.config.teacher.temperature

    @property
    def longest_completion(self) -> int:
        """L_max: the maximum number of tokens of a completion, by any author."""
        lengths = self.config.algorithm.trained_lengths(self.config)
        return sum(lengths.values()) - self.config.data.max_prompt_tokens

    async def rollout(
        self, prompt: Prompt, policy: AsyncSampler, teacher: AsyncTeacher | None, iteration: int
    ) -> list[Rollout]:
        """The completions of one prompt of an iteration, while others are under way. It changes no state.

        Default: the student samples `group_size` of them.
        """
        size = self.config.algorithm.group_size
        return await policy.sample(prompt, n=size, iteration=iteration, sampling=self.sampling)

    def teacher_prompt(self, scored: ScoredRollout, group: Sequence[ScoredRollout]) -> tuple[int, ...] | None:
        """The tokens that the teacher reads before the completion. Default: the student's prompt.

        None: it is not asked, and nothing is distilled on this completion. `group` holds all rollouts of the prompt.
        """
        return scored.rollout.prompt.token_ids

    def scorers(self) -> Mapping[str, Teacher]:
        """Further scorers by name, besides the configured teacher and the reference, not yet opened. Default: none.

        Their scores are in `ScoredRollout.scores` and `Batch.scores` under that name.
        """
        return {}

    def scorer_prompt(self, name: str, scored: ScoredRollout, group: Sequence[ScoredRollout]) -> tuple[int, ...] | None:
        """The tokens that the scorer `name` reads before the completion; None: it is not asked."""
        return self.teacher_prompt(scored, group) if name == "teacher" else scored.rollout.prompt.token_ids

    def scorer_signal(self, name: str) -> Signal:
        """What the scorer `name` must return for each token."""
        return self.signal if name == "teacher" else Signal()

    def has_gradient(self, group: Sequence[ScoredRollout], iteration: int) -> bool:
        """Whether training on the group could change the student; called before any teacher is asked.

        An iteration that may sample more prompts than it trains on prefers such groups. Default: yes.
        """
        return True

    def advantages(self, group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        """The group of one prompt, with `advantage` and the masks of `terms` filled in."""
        raise NotImplementedError

    @property
    def signal(self) -> Signal:
        """What the teacher must return for each token."""
        return Signal()

    async def diagnose(
        self,
        trained: Sequence[Sequence[ScoredRollout]],
        drawn: Sequence[Sequence[ScoredRollout]],
        teacher: AsyncTeacher | None,
        iteration: int,
        meter: MetricAccumulator,
    ) -> None:
        """Add metrics of an iteration's rollouts. Every rank must add the same names. Default: none.

        Args:
            trained: the groups that are trained on, with their scores.
            drawn: all groups that were sampled; the same unless dynamic sampling left some out.
        """

    @property
    def needs(self) -> Needs:
        """What the forward pass must return for `loss`."""
        return Needs(temperature=self.config.rollout.temperature)

    @property
    def needs_reference(self) -> bool:
        """Whether `loss` reads `batch.scores["reference"]`."""
        return False

    @property
    def terms(self) -> Mapping[str, Term]:
        """The weighted sums of `loss`, by the names under which their weights are in `batch.loss_weights`.

        Two are always there, for metrics: `token`, 1/N on every completion token, and `student`, 1/N on every token
        that the student sampled.
        """
        return {"token": Term(), "student": Term(mask="student")}

    @property
    def mask_names(self) -> list[str]:
        """The masks in `ScoredRollout.masks` that `terms` use, sorted; not `completion` and `student`."""
        used = {mask for term in self.terms.values() for mask in (*term.masks, term.counted)}
        return sorted(used - {"completion", "student"})

    def loss(self, output: PolicyOutput, batch: Batch, iteration: int) -> Loss:
        """The loss on one micro-batch."""
        raise NotImplementedError

    def iteration_ended(self, iteration: int, row: Mapping[str, float]) -> dict[str, float]:
        """Update the algorithm's state between iterations. `row`, the iteration's metrics, is equal on all ranks.

        Returns: further metrics of the iteration. Default: none.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The algorithm's part of a checkpoint, under keys that nothing else uses. Default: empty."""
        return {}

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, from the complete checkpoint. Default: nothing."""
