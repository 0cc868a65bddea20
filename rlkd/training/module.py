"""PolicyModule: the right half of the line. Forward → loss → backward → step, from nothing but a Batch.

It owns an `Algorithm`, which defines what the forward pass must return (`needs`) and what is minimised (`loss`).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlkd import distributed
from rlkd.algorithms.base import Algorithm
from rlkd.algorithms.registry import build_algorithm
from rlkd.config.schema import Config
from rlkd.console import phase
from rlkd.distributed import RunStopped
from rlkd.metrics import MetricAccumulator
from rlkd.models.logprob_head import Needs, PolicyOutput
from rlkd.models.student import Student, build_student
from rlkd.training.loss_weights import with_loss_weights
from rlkd.training.micro_batches import micro_batches, updates, zero_weight_batch
from rlkd.types import Batch, BatchScores

RECENT = 20
"""Updates over which skipped ones are counted."""

SLACK = 4.0
"""By what factor the mismatch may grow when the sampler gets changed weights for the first time."""

WINDOW = 10
"""Iterations over which `rollout.max_mismatch` bounds the mean of the mismatch."""

AT_ONCE = 4.0
"""By this times `rollout.max_mismatch`, a single iteration ends the run. Between vLLM and a trainer in bf16 the
mismatch of a healthy batch is 0.02 to 0.04 nats, and that of a token is below 0.113 in 95 % of cases (trl#6789,
Fast-LLM#525): one batch can exceed the default of 0.05 by chance, but hardly 0.2."""


class PolicyModule(lightning.LightningModule):
    """Builds and shards the student, and runs the updates of an iteration.

    It is cheap to construct: the model is loaded in `configure_model`. It needs
    `ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)`, even on one device.
    """

    Algorithm: ClassVar[type[Algorithm] | None] = None
    """The algorithm class, set by `module_class`; None: the one that `algorithm.name` selects."""

    def __init_subclass__(cls) -> None:
        """Raises: TypeError if a subclass answers for its algorithm, since it would not be asked."""
        super().__init_subclass__()
        asked = [n for n in vars(cls) if not n.startswith("_") and hasattr(cls.Algorithm or Algorithm, n)]
        ignored = [name for name in asked if not hasattr(lightning.LightningModule, name)]
        if ignored:
            raise TypeError(
                f"{cls.__name__}: expected an algorithm that defines {', '.join(ignored)}, got a LightningModule, "
                "which is not asked for them; derive it from a class such as rlkd.algorithms.grpo.GRPO"
            )

    def __init__(self, config: Config):
        super().__init__()
        self.algorithm = build_algorithm(config) if self.Algorithm is None else self.Algorithm(config)
        self.config = config
        self.automatic_optimization = False
        self.student: Student | None = None
        self.row: dict[str, float] = {}
        """Metrics of the last trained iteration, over all ranks."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """By phase: the time since the last row of metrics, on this rank."""
        self.by_token: dict[str, Tensor] = {}
        """What the trainer found at the start of the last iteration, each [B, T]: `logprobs`, and with one update an
        iteration `entropies`, if the algorithm needs them. In the order of the batch's rows."""
        self.updating = False
        """Whether an iteration's updates are in progress; the student must not be saved meanwhile."""
        self._first_gaps: list[float] = []
        """mismatch/mean with the sampler's initial weights, and with the first changed ones."""
        self._recent_gaps: list[float] = []
        """mismatch/mean of the last WINDOW iterations in which it was measured."""
        self.skipped: list[bool] = []
        """For each of the last RECENT updates, whether it was skipped."""

    def configure_model(self) -> None:
        if self.student is not None:  # Lightning calls this once per stage
            return
        mesh = self.device_mesh
        if mesh is None:
            raise ValueError(
                "strategy: expected ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1), got one "
                "without a device mesh; set it in the Trainer, even on one device"
            )
        config = self.config
        with phase("loading the student", config.log.progress):
            self.student = build_student(config.model, config.trainer, mesh["data_parallel"], config.run.seed)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        return torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=optim.lr(0),
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            weight_decay=0.0,  # `_decay` does it
        )

    @property
    def model(self) -> Student:
        assert self.student is not None, "the student exists after configure_model"
        return self.student

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One iteration: all updates on this rollout batch. Puts its metrics into `self.row`."""
        started = time.perf_counter()
        self.updating = True
        seed = self.config.run.seed
        torch.manual_seed(int(np.random.SeedSequence([seed, batch.iteration, distributed.rank()]).generate_state(1)[0]))
        optimizer = self.optimizers()
        assert isinstance(optimizer, lightning.pytorch.core.optimizer.LightningOptimizer)
        lr = self.config.optim.lr(batch.iteration)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = 0.0  # an older checkpoint may have set another value
        meter = MetricAccumulator()
        meter.merge(batch.metrics)
        meter.maximum("lr", lr)
        if self.algorithm.needs_reference and self.config.model.lora is not None:
            with self.model.without_adapters():  # the student without adapters is the reference: no second copy
                reference = BatchScores(logprobs=self._own_logprobs(batch))
            batch = replace(batch, scores={**batch.scores, "reference": reference})
        per_iteration = self.config.trainer.updates_per_iteration
        if batch.probe is not None:
            self._compare_on(replace(batch.probe, old_logprobs=self._own_logprobs(batch.probe)), meter)
        if per_iteration > 1:
            batch = replace(batch, old_logprobs=self._own_logprobs(batch))
            assert batch.old_logprobs is not None
            self.by_token = {"logprobs": batch.old_logprobs}
            if self._on_policy:
                self._compare_on(batch, meter)
            else:
                measure_gap([gaps(batch)], meter, "staleness/gap")
        for part in updates(batch, per_iteration, seed):
            self._update(part, optimizer, meter)
        meter.total("tokens/trained", float(batch.completion_mask.sum()))
        meter.maximum("time/train", time.perf_counter() - started)
        if self.device.type == "cuda":
            meter.maximum("memory/peak_gb", torch.cuda.max_memory_allocated() / 2**30)
        self.row = meter.reduce() | {
            "iteration": batch.iteration + 1,
            "update": (batch.iteration + 1) * per_iteration,
        }
        self.row |= self.algorithm.iteration_ended(batch.iteration, self.row)
        check_finite(self.model, batch.iteration)
        self.updating = False

    def _update(self, batch: Batch, optimizer: Any, meter: MetricAccumulator) -> None:
        """One optimizer step on `batch`, this rank's share of the update."""
        batch = with_loss_weights(batch, self.algorithm)
        first = batch.old_logprobs is None
        measured: list[dict[str, Tensor]] = []
        differences: list[Tensor] = []
        optimizer.zero_grad()
        if first:
            names = ("logprobs", "entropies") if self.algorithm.needs.entropy else ("logprobs",)
            self.by_token = {name: torch.zeros_like(batch.advantages) for name in names}
        for index, micro in self._micro_batches(batch):
            output: PolicyOutput = self.model(micro, self.algorithm.needs)
            if first:
                self._note(index, output)
                # With one update the policy has not changed since it sampled: the old log-probs are those of this
                # forward.
                micro = replace(micro, old_logprobs=output.logprobs.detach())
                differences.append(gaps(micro))
            loss = self.algorithm.loss(output, micro, micro.iteration)
            # FSDP2 averages gradients over the ranks, but the weights are shares of a global sum.
            self.manual_backward(loss.total * distributed.world_size())
            measured.append({"loss": loss.total.detach(), **loss.metrics})
        if first:
            mismatch = MetricAccumulator()
            measure_gap(differences, mismatch, "mismatch" if self._on_policy else "staleness/gap")
            if self._on_policy:
                self._check_gap(mismatch, batch.iteration)
            meter.merge(mismatch)
        sharded = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.max_grad_norm)
        assert isinstance(sharded, DTensor)
        norm = float(sharded.full_tensor())  # the same on every rank
        finite = math.isfinite(norm)
        if finite:
            self._decay(optimizer.param_groups[0]["lr"])
            optimizer.step()
        self._note_skipped(not finite, norm, batch.iteration)
        per_iteration = self.config.trainer.updates_per_iteration
        meter.mean("grad_norm", norm if finite else 0.0, float(finite))
        meter.maximum("updates/skipped", float(sum(self.skipped)))
        sums: dict[str, float] = {}
        for name, value in read(measured):
            sums[name] = sums.get(name, 0.0) + value
        for name, total in sums.items():
            meter.total(name, total / per_iteration)

    @torch.no_grad()
    def _decay(self, lr: float) -> None:
        """AdamW's decoupled decay, θ ← (1 − lr · weight_decay) θ, of all parameters but vectors, biases and `A_log`.

        Optimizer groups would do the same, but older checkpoints have one group and could not be loaded.
        """
        if self.config.optim.weight_decay > 0:
            for name, parameter in self.model.named_parameters():
                # The biases of experts and Mamba's log-scale have two dimensions.
                if parameter.requires_grad and parameter.dim() > 1 and not name.endswith(("bias", "A_log")):
                    parameter.mul_(1.0 - lr * self.config.optim.weight_decay)

    def _check_gap(self, mismatch: MetricAccumulator, iteration: int) -> None:
        """See `check_mismatch`. `self.row` still holds the metrics of the previous iteration."""
        checks = self.config.rollout.backend != "hf"  # the hf sampler's strict load takes all weights or fails
        moved = self.row.get("grad_norm", 0.0) > 0 and self.row.get("lr", 0.0) > 0  # a warm-up may start at 0
        changed = checks and len(self._first_gaps) == 1 and moved
        at_start = self._first_gaps[0] if changed else None
        gap = check_mismatch(mismatch, self.config, iteration, self._recent_gaps, at_start)
        if gap is None:
            return
        self._recent_gaps = [*self._recent_gaps, gap][-WINDOW:]
        if changed or not self._first_gaps:
            self._first_gaps.append(gap)

    def _note_skipped(self, skipped: bool, norm: float, iteration: int) -> None:
        """Record whether an update was skipped; too many skipped ones stop the run.

        Raises: RunStopped if more than `optim.max_skipped` of the last RECENT updates were skipped.
        """
        self.skipped = [*self.skipped, skipped][-RECENT:]
        if sum(self.skipped) > self.config.optim.max_skipped:
            raise RunStopped(
                f"the gradient norm of iteration {iteration + 1} is {norm}: {sum(self.skipped)} of the last "
                f"{len(self.skipped)} updates had no finite gradient and were skipped, more than optim.max_skipped = "
                f"{self.config.optim.max_skipped}; check optim.lr and the scale of rewards"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped"] = self.skipped
        checkpoint["first_gaps"] = self._first_gaps
        checkpoint["recent_gaps"] = self._recent_gaps
        checkpoint |= self.algorithm.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped = checkpoint["skipped"]
        self._first_gaps = checkpoint.get("first_gaps", [])  # older checkpoints do not have them
        self._recent_gaps = checkpoint.get("recent_gaps", [])
        self.algorithm.load_state_dict(checkpoint)

    def _note(self, index: Tensor, output: PolicyOutput) -> None:
        """Keep what is known of the tokens of the rows `index`."""
        for name, value in (("logprobs", output.logprobs), ("entropies", output.entropy)):
            if value is not None and name in self.by_token:
                self.by_token[name][index, : value.shape[1]] = value.detach()[: len(index)]

    def _micro_batches(self, batch: Batch) -> list[tuple[Tensor, Batch]]:
        """This rank's micro-batches, each with the indices of its rows, padded with zero-weight ones, of no row, to the
        largest number of any rank.

        FSDP gathers parameters in every forward and backward, so a rank with fewer passes would deadlock the others.
        """
        parts = self._split(batch)
        most = int(distributed.all_reduce([float(len(parts))], "max")[0])
        return parts + [(parts[0][0][:0], zero_weight_batch(batch))] * (most - len(parts))

    def _split(self, batch: Batch) -> list[tuple[Tensor, Batch]]:
        trainer = self.config.trainer
        width = self.model.hf.config.get_text_config().hidden_size if trainer.share_prompts else None
        return micro_batches(batch, trainer.micro_batch_tokens, width)

    @property
    def _on_policy(self) -> bool:
        """Whether the batch was sampled by the weights that are trained, up to rounding."""
        return self.config.rollout.max_staleness == 0

    def _compare_on(self, batch: Batch, meter: MetricAccumulator) -> None:
        """Compare trainer and sampler on a batch by the newest weights, and stop the run if they disagree."""
        mismatch = MetricAccumulator()
        measure_gap([gaps(batch)], mismatch, "mismatch")
        self._check_gap(mismatch, batch.iteration)
        meter.merge(mismatch)

    @torch.no_grad()
    def _own_logprobs(self, batch: Batch) -> Tensor:
        """[B, T] log-probs of the current student. A collective."""
        own = torch.zeros_like(batch.advantages)
        needs = Needs(temperature=self.config.rollout.temperature)
        parts = self._split(batch)
        most = int(distributed.all_reduce([float(len(parts))], "max")[0])
        for index, part in parts:
            logprobs = self.model(part, needs).logprobs
            own[index, : logprobs.shape[1]] = logprobs
        for _ in range(most - len(parts)):
            self.model(zero_weight_batch(batch), needs)
        return own


def module_class(algorithm: type[Algorithm]) -> type[PolicyModule]:
    """A LightningModule of one algorithm: `rlkd.algorithms.GRPO` trains by `rlkd.algorithms.grpo.GRPO`.

    Its constructor refuses a config of another algorithm.
    """
    # pickle finds a class by its module and name, so those of the built-in ones are where users find them.
    attributes = {"Algorithm": algorithm, "__doc__": algorithm.__doc__, "__module__": "rlkd.algorithms"}
    return type(algorithm.__name__, (PolicyModule,), attributes)


def check_finite(student: Student, iteration: int) -> None:
    """Stop the run before weights that are not finite are published or saved. A collective; all ranks raise together.

    Raises: RunStopped with the name of such a tensor.
    """
    named = dict(student.hf.named_parameters())
    finite = torch.stack([distributed.local_part(p).isfinite().all() for p in named.values()]).tolist()
    broken = [name for name, whole in zip(named, finite, strict=True) if not whole]
    if distributed.all_reduce([float(len(broken))])[0]:
        which = broken[0] if broken else "on another rank"
        raise RunStopped(
            f"iteration {iteration + 1}: expected finite weights, got inf or NaN in {which}; nothing was published "
            "or saved; check optim.lr"
        )


def read(measured: Sequence[Mapping[str, Tensor]]) -> list[tuple[str, float]]:
    """The names and numbers of all of them in order. They are read from the device together, since the host waits for
    each read.

    Raises: ValueError for a metric that is not one number.
    """
    named = [(name, torch.as_tensor(value).detach()) for each in measured for name, value in each.items()]
    for name, value in named:
        if value.numel() != 1:
            raise ValueError(
                f"metric {name} of the loss: expected one number, got a tensor of shape {list(value.shape)}"
            )
    device = named[0][1].device if named else None
    values = torch.stack([value.double().reshape(()).to(device) for _, value in named]).tolist() if named else []
    return [(name, value) for (name, _), value in zip(named, values, strict=True)]


def gaps(batch: Batch) -> Tensor:
    """[B · T] |sampler log-prob − trainer log-prob|, and −1 for tokens that the student did not sample."""
    assert batch.old_logprobs is not None
    return (batch.old_logprobs - batch.sampler_logprobs).abs().masked_fill(~batch.student_mask, -1.0).flatten()


def measure_gap(parts: Sequence[Tensor], meter: MetricAccumulator, name: Literal["mismatch", "staleness/gap"]) -> None:
    """Add the `gaps` of batches to `meter`. All are read from the device together.

    Args:
        name: `mismatch` where both have the same weights: its mean and maximum. `staleness/gap` where the sampler had
            older ones: its mean.
    """
    mean = "mismatch/mean" if name == "mismatch" else name
    for part in torch.cat(list(parts)).cpu().split([len(part) for part in parts]):
        gap = part[part != -1.0].double()
        meter.mean(mean, float(gap.sum()), float(gap.numel()))
        if name == "mismatch":
            meter.maximum("mismatch/max", float(gap.max()) if gap.numel() else 0.0)


def check_mismatch(
    meter: MetricAccumulator,
    config: Config,
    iteration: int,
    recent: Sequence[float] = (),
    at_start: float | None = None,
) -> float | None:
    """Stop the run if sampler and trainer disagree. All ranks see the same numbers, so they stop together.

    One noisy batch does not stop a run: the mean over WINDOW iterations is bounded by `rollout.max_mismatch`, and a
    single one by AT_ONCE times that. Alone it counts in the first iteration, where there is no other, and in the first
    with changed weights, since a publish that does not work shows there.

    Args:
        recent: the gaps of earlier iterations, the newest last.
        at_start: the gap that was measured with the initial weights; given only on the first iteration that was
            sampled with changed weights.

    Returns: mismatch/mean; None if the student sampled no token. Raises: RunStopped above a bound.
    """
    row = meter.reduce()
    if "mismatch/mean" not in row:
        return None
    gap, bound = row["mismatch/mean"], config.rollout.max_mismatch
    which = f"rollout.max_mismatch = {bound}"
    last = [gap] if at_start is not None else [*recent, gap][-WINDOW:]
    found, over = sum(last) / len(last), f" over the last {len(last)} iterations" if len(last) > 1 else ""
    if at_start is not None and max(SLACK * at_start, bound / 10) < bound:
        bound = max(SLACK * at_start, bound / 10)
        which = f"{bound:.3g}, the bound for the first changed weights (it was {at_start:.3g} before)"
    elif len(last) > 1 and gap > AT_ONCE * bound:
        found, over, bound = gap, "", AT_ONCE * bound
        which = f"{bound:.3g}, the bound for one iteration ({AT_ONCE:g} times {which})"
    if not found <= bound:
        raise RunStopped(
            f"iteration {iteration + 1}: sampler and trainer disagree by {found:.3g} nats a token on average{over}, "
            f"more than {which}; nothing was trained on these samples. The sampler has different weights (was the "
            "publish complete? is the output layer tied?) or computes differently; check dtype, chat template and "
            "temperature"
        )
    return gap
