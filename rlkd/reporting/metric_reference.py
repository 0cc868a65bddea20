"""Every metric that rlkd writes, declared once: name, unit, title, plot and help.

The declarations feed the plots of report.html, the line on the console and docs/metrics.md (written by
`python benchmarks/metrics_reference.py`). A metric that is not declared here, such as one of a user's own algorithm, is
written to metrics.jsonl and W&B all the same, and plotted under "Other metrics".
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """One plot: the names of its metrics, and how to draw them."""

    title: str
    keys: tuple[str, ...]
    note: str = ""
    share: bool = False
    """The axis spans 0 to 1, so that plots of shares are easy to compare."""
    smooth: bool = False
    """With enough points, draw a running mean over the curve and mention it in the caption."""
    rounding: float = 0.0
    """Values that differ by less are treated as equal up to rounding, for example a loss of 1e-9 and one of −1e-9."""


@dataclass(frozen=True)
class Metric:
    """One column of metrics.jsonl."""

    name: str
    unit: str
    """Also the note under its plot; empty: a number without a unit."""
    title: str
    help: str
    """One or two sentences: what it measures, over what it is averaged, and what a bad value means."""
    panel: str = ""
    """Title of the plot that it shares with the metrics of its section that name the same one; empty: its own plot."""
    plotted: bool = True
    console: int | None = None
    """Place in the console's line, from the left; None: not shown there."""
    share: bool = False
    """See `Panel`, also for the next two; in a shared plot those of the first metric count."""
    smooth: bool = False
    rounding: float = 0.0


SECTIONS: tuple[tuple[str, tuple[Metric, ...]], ...] = (
    (
        "Counters",
        (
            Metric(
                "iteration",
                "iterations",
                "Iteration",
                "Iterations completed, from 1; an iteration is one batch of rollouts. Row 0, where there is one, holds "
                "the evaluation before training.",
                plotted=False,
            ),
            Metric(
                "update",
                "updates",
                "Update",
                "Optimizer steps up to here: `iteration` times `trainer.updates_per_iteration`, skipped steps "
                "included.",
                plotted=False,
            ),
        ),
    ),
    (
        "Learning",
        (
            Metric(
                "reward/mean",
                "reward",
                "Reward",
                "Mean reward of all completions that the iteration sampled; those whose reward could not be computed "
                "are left out. If it stays flat, nothing is learned from rewards; if it rises while `eval/greedy` does "
                "not, read the samples for a reward that is being gamed.",
                console=1,
                smooth=True,
            ),
            Metric(
                "accuracy",
                "share of completions",
                "Accuracy",
                "Share of the sampled completions whose reward reaches `reward.correct_at`; those without a reward are "
                "left out. Close to 0 or to 1, most groups have equal rewards and teach group-relative algorithms "
                "nothing: the data is too hard or too easy.",
                console=2,
                share=True,
                smooth=True,
            ),
            Metric(
                "eval/greedy",
                "share of prompts",
                "Greedy accuracy",
                "Share of the held-out prompts whose greedy completion is correct. A fall while `accuracy` rises means "
                "overfitting to the training prompts.",
                panel="Held-out evaluation",
                console=7,
                share=True,
            ),
            Metric(
                "eval/avg@k",
                "share of prompts",
                "Average of k samples",
                "Share of correct completions among k = `eval.samples` of each held-out prompt, averaged over prompts. "
                "It has less noise than `eval/greedy`; a fall means that the student got worse.",
                panel="Held-out evaluation",
                share=True,
            ),
            Metric(
                "eval/pass@k",
                "share of prompts",
                "Any of k samples",
                "Share of the held-out prompts for which at least one of k = `eval.samples` completions is correct; "
                "prompts with a failed reward are left out. If it falls while `eval/avg@k` rises, the student loses "
                "variety.",
                panel="Held-out evaluation",
                share=True,
            ),
            Metric(
                "reward/std",
                "reward",
                "Spread of rewards",
                "Standard deviation of the rewards within one prompt's group (n − 1 in the denominator), averaged over "
                "groups. Close to 0, the completions of a group earn the same and their advantages vanish.",
                smooth=True,
            ),
        ),
    ),
    (
        "Losses",
        (
            Metric(
                "loss",
                "",
                "Loss",
                "What is minimised: all terms with their coefficients, averaged over the iteration's updates. With "
                "advantages that are centred its level means little; null means that it was not finite.",
                console=3,
                smooth=True,
                rounding=1e-7,
            ),
            Metric(
                "loss/pg",
                "",
                "Policy gradient",
                "The policy-gradient term alone (GRPO and its relatives, KDRL, ThinkTuning), normalised as "
                "`algorithm.reduction` selects; with KDRL's `form: advantage` the teacher's share is in it. It should "
                "stay close to 0; large values mean that few tokens outweigh the rest.",
                smooth=True,
                rounding=1e-7,
            ),
            Metric(
                "loss/kd",
                "",
                "Distillation",
                "The distillation term, normalised as `algorithm.reduction` selects: in KDRL before the factor "
                "`kd/coef`, in OPD, OPSD, SDPO and TAID the whole loss. It should fall; forms on sampled tokens may be "
                "negative, for which read `kd/kl`.",
                smooth=True,
                rounding=1e-7,
            ),
            Metric(
                "loss/guided",
                "",
                "Tokens of the teacher",
                "ThinkTuning: the part of the loss on tokens that the student did not write and that have a loss of "
                "their own (`teacher_tokens`, `glue_tokens`), with the policy term's weights. If it outweighs "
                "`loss/pg`, training is mostly imitation.",
                smooth=True,
                rounding=1e-7,
            ),
            Metric(
                "nll",
                "nats per token",
                "Negative log-likelihood",
                "SFT and REDI: mean of −log π over all trained tokens of the data's completions. It should fall "
                "slowly; close to 0 the student knows the completions by heart.",
                smooth=True,
            ),
            Metric(
                "chosen/logprob",
                "nats per token",
                "Chosen",
                "REDI: mean log-probability of a token of the chosen completions, averaged over tokens, then pairs. A "
                "fall together with `rejected/logprob` is the collapse to which this loss is prone: lower `optim.lr` "
                "or `algorithm.alpha`.",
                panel="Chosen and rejected completions",
                smooth=True,
            ),
            Metric(
                "rejected/logprob",
                "nats per token",
                "Rejected",
                "REDI: the same of the rejected completions. It should fall below `chosen/logprob`, but not without "
                "end.",
                panel="Chosen and rejected completions",
                smooth=True,
            ),
            Metric(
                "kd/kl",
                "nats per token",
                "KL to the teacher",
                "KL(π‖teacher), estimated (k3) on tokens that the student sampled and averaged over them. It should "
                "fall; a rise means that the student moves away from the teacher.",
                console=5,
                smooth=True,
            ),
            Metric(
                "kd/divergence",
                "nats per token",
                "Divergence from the teacher",
                "OPD, OPSD, SDPO and TAID with `tier: full` or `top_k`: the divergence that is minimised, averaged "
                "over the distilled tokens. It should fall; with `divergence.clip` it may be negative.",
                smooth=True,
            ),
            Metric(
                "kd/coef",
                "",
                "Weight of distillation",
                "KDRL: β of this iteration, the factor of the distillation term, as `algorithm.kd.coef` sets it.",
            ),
            Metric(
                "kd/flipped",
                "share of tokens",
                "Teacher over reward",
                "KDRL: share of the completion tokens whose advantage the teacher reverses, (A + βR)·A < 0. A large "
                "share means that teacher and rewards disagree and the teacher wins: lower `algorithm.kd.coef` if "
                "rewards should count.",
                smooth=True,
            ),
            Metric(
                "taid/t",
                "",
                "Share of the teacher",
                "TAID: t of this iteration, how much of the target's logits is the teacher's. It never falls, and "
                "reaches `algorithm.t_end` after `algorithm.over` iterations; if `loss/kd` rises with it, raise "
                "`over`.",
            ),
            Metric(
                "reference/kl",
                "nats per token",
                "KL to the reference",
                "KL(π‖reference), estimated (k3) on tokens that the student sampled and averaged over them; only with "
                "`algorithm.reference_coef`. A fast rise means that the student leaves its start.",
                smooth=True,
            ),
            Metric(
                "entropy",
                "nats per token",
                "Entropy",
                "Entropy of the student's next-token distribution at the rollout temperature (SFT and REDI: at 1), "
                "averaged over completion tokens. A fall towards 0 means that samples no longer differ; a steady rise "
                "means that text falls apart.",
                smooth=True,
            ),
            Metric(
                "lr",
                "",
                "Learning rate",
                "Learning rate of this iteration's updates, from the schedule `optim.lr`.",
            ),
        ),
    ),
    (
        "Contexts and feedback",
        (
            Metric(
                "context/share",
                "share of completions",
                "Completions with a context",
                "OPSD and SDPO: share of completions for which the teacher had something more to read than the "
                "student; the others are left out of the loss. If it is small, there is little to learn from.",
                share=True,
            ),
            Metric(
                "leakage/kl_right",
                "nats per token",
                "Right hint",
                "OPSD and SDPO with `algorithm.leakage_every`: mean of log π − log T over the tokens of up to 32 "
                "completions of each rank, an estimate of KL(π‖teacher), with the teacher reading this prompt's hint.",
                panel="What the hint adds",
            ),
            Metric(
                "leakage/kl_shuffled",
                "nats per token",
                "Another prompt's hint",
                "The same with another prompt's hint. If both are equal, hints carry style and no content.",
                panel="What the hint adds",
            ),
            Metric(
                "guided/fraction",
                "share of completions",
                "Completions with feedback",
                "ThinkTuning: share of trained completions to which the teacher's feedback was appended. Far below "
                "what `algorithm.guided` asks for, look at the failures below and at `completion/truncated`.",
                share=True,
            ),
            Metric(
                "guided/reward",
                "reward",
                "With feedback",
                "ThinkTuning: mean reward of completions with feedback; those without a reward are left out. Below "
                "`guided/plain_reward` the feedback does harm.",
                panel="Reward with feedback",
                smooth=True,
            ),
            Metric(
                "guided/plain_reward",
                "reward",
                "Without feedback",
                "ThinkTuning: mean reward of completions without feedback; those without a reward are left out.",
                panel="Reward with feedback",
                smooth=True,
            ),
            Metric(
                "guided/format_failures",
                "completions",
                "Wrong form",
                "ThinkTuning: completions whose feedback was dropped because the teacher's text did not have the form "
                "of `algorithm.feedback.pattern` or did not end, a sum over ranks. Many: change the feedback prompt.",
                panel="Feedback that was dropped",
            ),
            Metric(
                "guided/budget_failures",
                "completions",
                "Too long",
                "ThinkTuning: completions without feedback because the teacher's prompt or the completion with its "
                "feedback would have been too long, a sum over ranks. Many: raise "
                "`algorithm.feedback.max_prompt_tokens` or `max_tokens`.",
                panel="Feedback that was dropped",
            ),
        ),
    ),
    (
        "Health",
        (
            Metric(
                "mismatch/mean",
                "nats per token",
                "Sampler against trainer, mean",
                "|log π of the sampler − log π of the trainer|, averaged over freshly sampled tokens. If "
                "its mean over 10 iterations is above `rollout.max_mismatch`, or one value above 4 times that, the run "
                "stops: the sampler holds other weights or computes otherwise.",
                smooth=True,
            ),
            Metric(
                "mismatch/max",
                "nats",
                "Sampler against trainer, largest",
                "The largest such difference of a single token of the iteration. Single tokens differ more in bf16 "
                "than in fp32; a large value with a small mean is one odd token.",
            ),
            Metric(
                "grad_norm",
                "",
                "Gradient norm",
                "Norm of the whole gradient before clipping to `optim.max_grad_norm`, averaged over the iteration's "
                "updates with a finite one. Spikes mean unstable training: lower `optim.lr`.",
                smooth=True,
            ),
            Metric(
                "updates/skipped",
                "updates",
                "Skipped updates",
                "How many of the last 20 updates were skipped because their gradient was not finite. Above "
                "`optim.max_skipped` the run stops.",
            ),
            Metric(
                "clip_fraction",
                "share of tokens",
                "Clipped tokens",
                "Share of completion tokens on which the surrogate's clip or cap binds, averaged over the iteration's "
                "updates. It is 0 with one update an iteration; a large share means that updates are too large.",
            ),
            Metric(
                "staleness/mean",
                "iterations",
                "Staleness",
                "How many iterations the oldest weights that sampled a completion are behind the trainer's, averaged "
                "over completions. It is 0 unless `rollout.max_staleness` allows more.",
            ),
            Metric(
                "staleness/gap",
                "nats per token",
                "Drift since sampling",
                "With `rollout.max_staleness`: |log π of the sampler − log π of the trainer| averaged over the tokens "
                "that are trained on, which older weights sampled. If it grows towards 1, importance weights remove "
                "most of the gradient: lower `rollout.max_staleness` or `optim.lr`.",
            ),
            Metric(
                "reward/errors",
                "completions",
                "Reward errors",
                "Sampled completions whose reward could not be computed, a sum over ranks. Where training needs "
                "rewards, a share above `reward.max_error_rate` stops the run.",
            ),
            Metric(
                "eval/errors",
                "completions",
                "Reward errors, held-out",
                "Held-out completions whose reward could not be computed, a sum over ranks. They are left out of the "
                "accuracies, which many errors make unreliable.",
            ),
        ),
    ),
    (
        "Sizes",
        (
            Metric(
                "completion/length",
                "tokens",
                "Completion length",
                "Length of the completions of all authors, averaged over all that were drawn. A sudden change in "
                "either direction often comes before a collapse.",
                smooth=True,
                console=4,
            ),
            Metric(
                "completion/truncated",
                "share of completions",
                "Truncated completions",
                "Share of completions that were cut off at `rollout.max_tokens`. If it is large, right answers are cut "
                "off and earn nothing: raise the limit.",
            ),
            Metric(
                "groups/all_correct",
                "share of groups",
                "All correct",
                "Share of the groups in which every completion with a reward is correct. Large: the data is too easy.",
                panel="Groups that teach nothing",
                share=True,
            ),
            Metric(
                "groups/all_wrong",
                "share of groups",
                "All wrong",
                "Share of the groups in which no completion is correct. Large: the data is too hard.",
                panel="Groups that teach nothing",
                share=True,
            ),
            Metric(
                "groups/no_gradient",
                "share of groups",
                "Without a gradient",
                "Share of the groups that were drawn and, by the algorithm's own rule, cannot change the student. With "
                "`algorithm.resample_rounds` others are drawn in their place; if it is large, sampling is wasted.",
                panel="Groups that teach nothing",
                share=True,
            ),
            Metric(
                "prompts/drawn",
                "prompts",
                "Prompts drawn",
                "Prompts for which completions were drawn, a sum over ranks. Above `rollout.prompts` dynamic sampling "
                "needed further rounds.",
            ),
            Metric(
                "tokens/generated",
                "tokens",
                "Sampled by the student",
                "Tokens that the student sampled, a sum over ranks; 0 where it learns from given completions.",
                panel="Tokens",
            ),
            Metric(
                "tokens/trained",
                "tokens",
                "Trained on",
                "Completion tokens in the trained batch, a sum over ranks. Far below `tokens/generated`, much of what "
                "is sampled is not used.",
                panel="Tokens",
            ),
            Metric(
                "balance/tokens",
                "",
                "Heaviest rank",
                "With several ranks: tokens, prompts included, of the rank that trains on the most, by the mean over "
                "ranks, after they have exchanged groups. Well above 1, single groups are so long that no exchange "
                "helps, and the other ranks wait in training.",
            ),
        ),
    ),
    (
        "Time and memory",
        (
            Metric(
                "time/rollout",
                "seconds",
                "Sampling",
                "Time that the trainer waits for completions, from the student and from a teacher that writes; the "
                "slowest rank's. Where groups are in several stages at once, a moment counts for the earliest one.",
                panel="Where the time goes",
            ),
            Metric(
                "time/reward",
                "seconds",
                "Rewards",
                "Time that the trainer waits for rewards while nothing is sampled; the slowest rank's. If it is large, "
                "raise `reward.workers`.",
                panel="Where the time goes",
            ),
            Metric(
                "time/teacher",
                "seconds",
                "Scoring",
                "Time that the trainer waits for the scores of teacher and reference while nothing is sampled or "
                "rewarded; the slowest rank's.",
                panel="Where the time goes",
            ),
            Metric(
                "time/train",
                "seconds",
                "Training",
                "Time of all updates of the iteration; the slowest rank's.",
                panel="Where the time goes",
            ),
            Metric(
                "time/publish",
                "seconds",
                "Publishing",
                "Time to hand the new weights to the sampler, on rank 0.",
                panel="Where the time goes",
            ),
            Metric(
                "time/join",
                "seconds",
                "Waiting for samples",
                "With `rollout.max_staleness`: time that a publish waits until the iteration that is sampled ahead has "
                "all its completions, on rank 0. Large: sampling takes longer than training.",
                panel="Where the time goes",
            ),
            Metric(
                "time/wait",
                "seconds",
                "Waiting",
                "Time that a rank with rollouts in hand waits for the others, and for servers that are brought back or "
                "put to sleep; the longest of any rank. Large: ranks have unequal work.",
                panel="Where the time goes",
            ),
            Metric(
                "time/dump",
                "seconds",
                "Writing rollouts",
                "Time that the trainer waits for the file of `rollouts/`, which is written while it trains, on rank 0. "
                "If it is large, raise `log.rollouts_every` or use another disk.",
            ),
            Metric(
                "time/probe",
                "seconds",
                "Probe",
                "With `rollout.max_staleness`: time to get a few short completions by the newest weights, on which "
                "sampler and trainer are compared; the slowest rank's.",
            ),
            Metric(
                "time/collate",
                "seconds",
                "Collating",
                "Time to exchange groups between ranks and make tensors of the rollouts; the slowest rank's.",
            ),
            Metric(
                "time/transfer",
                "seconds",
                "Handing over",
                "Time from the batch to the start of its training, on rank 0: copies to the device, and waiting for "
                "Python, which the file of `rollouts/` uses meanwhile.",
            ),
            Metric(
                "time/evaluate",
                "seconds",
                "Evaluation",
                "Time of the evaluation, on rank 0.",
                panel="Where the time goes",
            ),
            Metric(
                "time/log",
                "seconds",
                "Logging",
                "Time to write the row before this one, and to log it to W&B and the console, on rank 0.",
            ),
            Metric(
                "time/checkpoint",
                "seconds",
                "Checkpoint",
                "Time of the checkpoint that was saved after the row before this one, on rank 0.",
                panel="Where the time goes",
            ),
            Metric(
                "time/overhead",
                "seconds",
                "Overhead",
                "`time/total` without rollouts, rewards, teacher, training, publishing, evaluation and checkpoint: "
                "what rlkd and Lightning add, on rank 0.",
            ),
            Metric(
                "time/total",
                "seconds",
                "Whole iteration",
                "Time since the row before, on rank 0. The times above add up to it, but for `time/overhead`, which "
                "contains some of them.",
            ),
            Metric(
                "tokens_per_s",
                "tokens per second",
                "Throughput",
                "`tokens/generated` (`tokens/trained` where nothing is generated) by `time/total`, over all ranks. It "
                "falls where an evaluation or a checkpoint is part of the iteration.",
                console=6,
            ),
            Metric(
                "memory/peak_gb",
                "GiB",
                "Peak memory",
                "Most memory that tensors of a trainer process have taken on its GPU so far; the largest of any rank. "
                "Close to the device's size: lower `trainer.micro_batch_tokens`.",
            ),
        ),
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for _, metrics in SECTIONS for metric in metrics}
CONSOLE: tuple[str, ...] = tuple(
    metric.name for metric in sorted(METRICS.values(), key=lambda m: m.console or 0) if metric.console is not None
)


def panels() -> tuple[tuple[str, tuple[Panel, ...]], ...]:
    """The plots of report.html by section, each with the metrics that share it."""
    found = []
    for section, metrics in SECTIONS:
        shared: defaultdict[str, list[Metric]] = defaultdict(list)
        for metric in metrics:
            if metric.plotted:
                shared[metric.panel or metric.title].append(metric)
        plots = tuple(
            Panel(
                title,
                keys=tuple(metric.name for metric in those),
                note=those[0].unit,
                share=those[0].share,
                smooth=those[0].smooth,
                rounding=those[0].rounding,
            )
            for title, those in shared.items()
        )
        found.append((section, plots))
    return tuple(found)
