"""PolicyModule: the right half of the line. Forward → loss → backward → step, from nothing but a Batch.

It owns an `Algorithm`, asks it what the forward must give (`needs`) and what is minimised (`loss`), and only updates.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any, ClassVar

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlkd import distributed
from rlkd.algorithms.base import Algorithm
from rlkd.algorithms.registry import build_algorithm
from rlkd.config.schema import Config
from rlkd.distributed import RunStopped
from rlkd.metrics import MetricAccumulator
from rlkd.models.logprob_head import Needs, PolicyOutput
from rlkd.models.student import Student, build_student
from rlkd.training.loss_weights import with_loss_weights
from rlkd.training.micro_batches import split_by_tokens, updates, zero_weight_batch
from rlkd.types import Batch, BatchScores

RECENT = 20
"""Updates over which skipped ones are counted."""

SLACK = 4.0
"""How much sampler and trainer may disagree more after the first update of the weights than before it."""


class PolicyModule(lightning.LightningModule):
    """Builds and shards the student, and runs the updates of an iteration.

    It is cheap to construct: the model is loaded in `configure_model`. It needs
    `ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)`, on one device too.
    """

    Algorithm: ClassVar[type[Algorithm] | None] = None
    """The algorithm of this class (`module_class`); None: the one that `algorithm.name` names."""

    def __init__(self, config: Config):
        super().__init__()
        self.algorithm = build_algorithm(config) if self.Algorithm is None else self.Algorithm(config)
        self.config = config
        self.automatic_optimization = False
        self.student: Student | None = None
        self.row: dict[str, float] = {}
        """Figures of the iteration just trained, over all ranks."""
        self.updating = False
        """Whether an iteration's updates are under way: what the student is then, is no state to save."""
        self._first_gaps: list[float] = []
        """mismatch/mean of the weights that the sampler was given first, and of the first that differ from those."""
        self.skipped: list[bool] = []
        """Of the last RECENT updates, which were skipped."""

    def configure_model(self) -> None:
        if self.student is not None:  # Lightning calls this once a stage
            return
        mesh = self.device_mesh
        if mesh is None:
            raise ValueError(
                "rlkd modules want strategy=ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1), "
                "on one device too"
            )
        config = self.config
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
        """One iteration: every update of this rollout batch. Leaves its figures in `self.row`."""
        started = time.perf_counter()
        self.updating = True
        seed = self.config.run.seed
        torch.manual_seed(int(np.random.SeedSequence([seed, batch.iteration, distributed.rank()]).generate_state(1)[0]))
        optimizer = self.optimizers()
        assert isinstance(optimizer, lightning.pytorch.core.optimizer.LightningOptimizer)
        lr = self.config.optim.lr(batch.iteration)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = 0.0  # an older checkpoint may have brought another
        meter = MetricAccumulator()
        meter.merge(batch.metrics)
        meter.maximum("lr", lr)
        if self.algorithm.needs_reference and self.config.model.lora is not None:
            with self.model.without_adapters():  # the reference is in the student: no second copy
                reference = BatchScores(logprobs=self._own_logprobs(batch))
            batch = replace(batch, scores={**batch.scores, "reference": reference})
        per_iteration = self.config.trainer.updates_per_iteration
        if per_iteration > 1:
            batch = self._with_old_logprobs(batch, meter)
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
        sums: dict[str, float] = {}
        mismatch = MetricAccumulator()
        optimizer.zero_grad()
        for micro in self._micro_batches(batch):
            output: PolicyOutput = self.model(micro, self.algorithm.needs)
            if first:
                # With one update the policy has not moved since it sampled: its own forward is the old one.
                micro = replace(micro, old_logprobs=output.logprobs.detach())
                measure_mismatch(micro, mismatch)
            loss = self.algorithm.loss(output, micro, micro.iteration)
            # FSDP2 averages gradients over the ranks, but the weights are shares of a global sum.
            self.manual_backward(loss.total * distributed.world_size())
            for name, value in {"loss": loss.total.detach(), **loss.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        if first:
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
        for name, total in sums.items():
            meter.total(name, total / per_iteration)

    @torch.no_grad()
    def _decay(self, lr: float) -> None:
        """AdamW's decoupled decay, θ ← (1 − lr · weight_decay) θ, of all but vectors, biases and `A_log`.

        Not by groups of the optimizer: older checkpoints have one group and could not be loaded.
        """
        if self.config.optim.weight_decay > 0:
            for name, parameter in self.model.named_parameters():
                # Experts have biases, and Mamba a log-scale, of two dimensions.
                if parameter.requires_grad and parameter.dim() > 1 and not name.endswith(("bias", "A_log")):
                    parameter.mul_(1.0 - lr * self.config.optim.weight_decay)

    def _check_gap(self, mismatch: MetricAccumulator, iteration: int) -> None:
        """See `check_mismatch`. `self.row` still holds the figures of the iteration before."""
        served = self.config.rollout.backend == "vllm"  # in this process a strict load takes over all or fails
        moved = self.row.get("grad_norm", 0.0) > 0 and self.row.get("lr", 0.0) > 0  # a warm-up may begin at 0
        changed = served and len(self._first_gaps) == 1 and moved
        gap = check_mismatch(mismatch, self.config, iteration, self._first_gaps[0] if changed else None)
        if gap is not None and (changed or not self._first_gaps):
            self._first_gaps.append(gap)

    def _note_skipped(self, skipped: bool, norm: float, iteration: int) -> None:
        """One bad batch costs its update; many stop the run.

        Raises: RunStopped when more than `optim.max_skipped` of the last RECENT updates were skipped.
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
        checkpoint |= self.algorithm.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped = checkpoint["skipped"]
        self._first_gaps = checkpoint.get("first_gaps", [])  # absent in checkpoints from before there were any
        self.algorithm.load_state_dict(checkpoint)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """This rank's micro-batches, filled up with weightless ones to the largest number of any rank.

        FSDP gathers parameters in every forward and backward: a rank with fewer would deadlock the others.
        """
        parts = [batch.rows(i) for i in split_by_tokens(batch, self.config.trainer.micro_batch_tokens)]
        most = int(distributed.all_reduce([float(len(parts))], "max")[0])
        return parts + [zero_weight_batch(batch)] * (most - len(parts))

    def _with_old_logprobs(self, batch: Batch, meter: MetricAccumulator) -> Batch:
        """The trainer's own log-probs before the first of several updates, and the mismatch with the sampler's."""
        batch = replace(batch, old_logprobs=self._own_logprobs(batch))
        mismatch = MetricAccumulator()
        measure_mismatch(batch, mismatch)
        self._check_gap(mismatch, batch.iteration)
        meter.merge(mismatch)
        return batch

    @torch.no_grad()
    def _own_logprobs(self, batch: Batch) -> Tensor:
        """[B, T] log-probs by the student as it is now. A collective."""
        own = torch.zeros_like(batch.advantages)
        needs = Needs(temperature=self.config.rollout.temperature)
        indices = split_by_tokens(batch, self.config.trainer.micro_batch_tokens)
        most = int(distributed.all_reduce([float(len(indices))], "max")[0])
        for index in indices:
            logprobs = self.model(batch.rows(index), needs).logprobs
            own[index, : logprobs.shape[1]] = logprobs
        for _ in range(most - len(indices)):
            self.model(zero_weight_batch(batch), needs)
        return own


def module_class(algorithm: type[Algorithm]) -> type[PolicyModule]:
    """The LightningModule that trains by one algorithm: `rlkd.algorithms.GRPO` is that of `rlkd.algorithms.grpo.GRPO`.

    It refuses a config of another algorithm when it is made.
    """
    about = {"Algorithm": algorithm, "__doc__": algorithm.__doc__, "__module__": __name__}
    return type(f"{algorithm.__name__}Module", (PolicyModule,), about)


def check_finite(student: Student, iteration: int) -> None:
    """Broken weights go nowhere: neither to a sampler nor into a checkpoint. A collective; all raise together.

    Raises: RunStopped naming a tensor that is not finite.
    """
    broken = [name for name, p in student.hf.named_parameters() if not distributed.local_part(p).isfinite().all()]
    if distributed.all_reduce([float(len(broken))])[0]:
        which = broken[0] if broken else "on another rank"
        raise RunStopped(
            f"after iteration {iteration + 1} the weights are not finite: {which}; they were not published, and no "
            "checkpoint has them. Check optim.lr"
        )


def measure_mismatch(batch: Batch, meter: MetricAccumulator) -> None:
    """Add |log-prob by sampler − by trainer| of the student's own tokens, freshly sampled, to `meter`."""
    assert batch.old_logprobs is not None
    gap = (batch.old_logprobs - batch.sampler_logprobs).abs()[batch.student_mask].double()
    meter.mean("mismatch/mean", float(gap.sum()), float(gap.numel()))
    meter.maximum("mismatch/max", float(gap.max()) if gap.numel() else 0.0)


def check_mismatch(
    meter: MetricAccumulator, config: Config, iteration: int, at_start: float | None = None
) -> float | None:
    """Stop the run when sampler and trainer disagree. Every rank sees the same figures, so all stop together.

    Args:
        at_start: The gap measured on the start weights. Given only on the first iteration sampled with changed
            weights.

    Returns: mismatch/mean; None where no token was the student's. Raises: RunStopped above the bound.
    """
    row = meter.reduce()
    if "mismatch/mean" not in row:
        return None
    gap, bound = row["mismatch/mean"], config.rollout.max_mismatch
    which = f"rollout.max_mismatch = {bound}"
    if at_start is not None and max(SLACK * at_start, bound / 10) < bound:
        bound = max(SLACK * at_start, bound / 10)
        which = f"{bound:.3g}, the bound for the first changed weights (it was {at_start:.3g} before)"
    if not gap <= bound:
        raise RunStopped(
            f"iteration {iteration + 1}: sampler and trainer disagree by {gap:.3g} nats a token on average, more than "
            f"{which}; nothing was trained on these samples. The sampler holds other weights than the trainer (was the "
            "publish whole? is the output layer tied?), or computes otherwise (dtype, chat template, temperature)"
        )
    return gap
