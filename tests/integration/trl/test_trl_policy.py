"""Parity with TRL 1.16: its own `_compute_loss` and `_generate_and_score_completions` and ours on the same tensors.

A trainer is made without `__init__` (which needs a model, a data set and an accelerator) and given the attributes that
the method reads; the model's forward and the generation are replaced by the tensors of the test. What is computed from
them is TRL's code, unchanged. Values and gradients agree within 1e-5 unless a test says why not.
"""

from collections import defaultdict, deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from builders import GRPO, config
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from rlkd.algorithms.advantages import group_relative, leave_one_out, overlong_penalty
from rlkd.algorithms.grpo import GRPO as GRPOModule
from rlkd.losses import importance_weights
from rlkd.models.logprob_head import PolicyOutput
from rlkd.training.loss_weights import with_loss_weights
from rlkd.types import Batch, BatchScores

pytestmark = pytest.mark.long

PROMPT = 3
LENGTHS = (5, 1, 12, 9, 3, 7)
LONGEST = 12
ROWS, COLUMNS = len(LENGTHS), PROMPT + LONGEST
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def trl(kind, **attributes):
    """A TRL trainer with the attributes that its loss and its scoring read, and those given."""
    trainer = object.__new__(kind)
    one_process = SimpleNamespace(
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        num_processes=1,
        process_index=0,
        sync_gradients=True,
        device=torch.device("cpu"),
    )
    arguments = {
        "use_bias_correction_kl": False,
        "delta": attributes.pop("delta", None),
        "steps_per_generation": 1,
        "per_device_train_batch_size": ROWS,
        "gradient_checkpointing_kwargs": None,
    }
    defaults = {
        "accelerator": one_process,
        "args": SimpleNamespace(**arguments),
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_logs": defaultdict(deque) | {"rewards": defaultdict(deque), "extra": defaultdict(deque)},
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "loss_type": "grpo",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LONGEST,
        "_entropy_bonus_enabled": "entropy_coef" in attributes,
        "use_adaptive_entropy": False,
    }
    for name, value in (defaults | attributes).items():
        setattr(trainer, name, value)
    return trainer


@pytest.fixture
def made():
    """A batch whose ratios, importance weights and distances to the reference are all well away from 1 and 0."""
    generator = torch.Generator().manual_seed(11)

    def noise(scale):
        return scale * torch.randn(ROWS, COLUMNS, generator=generator)

    logprobs = (-4 * torch.rand(ROWS, COLUMNS, generator=generator)).requires_grad_()
    columns = torch.arange(COLUMNS)
    lengths = torch.tensor(LENGTHS)
    mask = (columns >= PROMPT) & (columns < PROMPT + lengths[:, None])
    advantages = torch.tensor([1.2, -0.8, 0.5, -1.5, 0.0, 0.7])
    old = logprobs.detach() + noise(0.5)
    batch = Batch(
        iteration=0,
        input_ids=torch.zeros(ROWS, COLUMNS, dtype=torch.int64),
        lengths=PROMPT + lengths,
        prompt_lengths=torch.full((ROWS,), PROMPT),
        group=torch.arange(ROWS),
        completion_mask=mask,
        student_mask=mask,
        authors=torch.zeros(ROWS, COLUMNS, dtype=torch.int64),
        sampler_logprobs=torch.where(mask, old + noise(0.4), torch.nan),
        advantages=advantages[:, None].expand(ROWS, COLUMNS).clone(),
        rewards=torch.zeros(ROWS),
        weight_version=torch.zeros(ROWS, dtype=torch.int64),
        old_logprobs=old,
        scores={"reference": BatchScores(logprobs=logprobs.detach() + noise(0.6))},
    )
    return batch, logprobs, torch.rand(ROWS, COLUMNS, generator=generator, requires_grad=True)


def ours(made, *options):
    batch, logprobs, entropy = made
    options = [f"algorithm.{o}" for o in options]
    algorithm = GRPOModule(config(*GRPO, f"rollout.max_tokens={LONGEST}", *options))
    output = PolicyOutput(logprobs=logprobs, entropy=entropy)
    return algorithm.loss(output, with_loss_weights(batch, algorithm), 0).total


def theirs(made, importance=None, **attributes):
    batch, logprobs, entropy = made
    completion = slice(PROMPT, None)
    mask = batch.completion_mask[:, completion].long()
    trainer = trl(GRPOTrainer, use_vllm=importance is not None, **attributes)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        logprobs[:, completion],
        entropy[:, completion],
        None,
    )
    inputs = {
        "prompt_ids": batch.input_ids[:, :PROMPT],
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.int64),
        "completion_ids": batch.input_ids[:, completion],
        "completion_mask": mask,
        "advantages": batch.advantages[:, -1],
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": batch.old_logprobs[:, completion],
        "ref_per_token_logps": batch.scores["reference"].logprobs[:, completion],
        "importance_sampling_ratio": importance,
    }
    return trainer._compute_loss(None, inputs)


def assert_parity(made, got, wanted):
    _, logprobs, entropy = made
    torch.testing.assert_close(got, wanted, **CLOSE)
    for tensor in (logprobs, entropy):
        pair = [torch.autograd.grad(x, tensor, retain_graph=True, allow_unused=True)[0] for x in (got, wanted)]
        pair = [torch.zeros_like(tensor) if g is None else g for g in pair]
        torch.testing.assert_close(*pair, **CLOSE)
    slopes = torch.autograd.grad(wanted, logprobs)[0]
    assert slopes.abs().max() > 1e-2, "otherwise the tolerance would hide a difference"


CASES = {
    "grpo": (("reduction=sequence_mean",), {"loss_type": "grpo"}),
    # The rest of TRL's types that have a twin here normalise by another count. bnpo's and dapo's are the same on one
    # micro-batch; on several, bnpo, grpo and dr_grpo normalise each by itself, which ours never does.
    "bnpo": (("reduction=token_mean",), {"loss_type": "bnpo"}),
    "dapo": (("reduction=token_mean", "clip_high=0.28"), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": (("reduction=dr_grpo", "normalise=false"), {"loss_type": "dr_grpo"}),
    # TRL's epsilon_high is then the cap of the ratio itself, as our ratio_cap.
    "cispo": (("surrogate=cispo", "ratio_cap=1.3"), {"loss_type": "cispo", "epsilon_high": 1.3}),
    # TRL has one ratio a sequence, whose gradient reaches all of its tokens; ours is GSPO-token.
    "gspo": (
        ("ratio=sequence", "reduction=sequence_mean", "clip_low=0.03", "clip_high=0.04"),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    ),
    "gspo over tokens": (
        ("ratio=sequence", "clip_low=0.3", "clip_high=0.4"),
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon_low": 0.3, "epsilon_high": 0.4},
    ),
    "cispo of sequences": (
        ("surrogate=cispo", "ratio=sequence", "ratio_cap=1.05"),
        {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.05},
    ),
    # "Two-sided clipping" of INTELLECT-2: the same as dual clip where delta > 1 + ε_high.
    "dual clip": (("dual_clip=1.4",), {"loss_type": "dapo", "delta": 1.4}),
    "entropy bonus": (("entropy_coef=0.3",), {"loss_type": "dapo", "entropy_coef": 0.3}),
    # TRL, too, takes a token mean for the entropy whatever the type.
    "entropy bonus beside grpo": (("entropy_coef=0.3", "reduction=sequence_mean"), {"entropy_coef": 0.3}),
    "reference": (("reference_coef=0.2", "reference_estimator=k3"), {"loss_type": "dapo", "beta": 0.2}),
    "reference beside grpo": (("reference_coef=0.2", "reduction=sequence_mean"), {"beta": 0.2}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_trls(name, made):
    options, attributes = CASES[name]
    assert_parity(made, ours(made, *options, "importance=off"), theirs(made, **attributes))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_the_importance_weight_is_trls_and_spares_the_kl(mode, level, made):
    """TRL's weight from its own code, used in its own loss. In both it multiplies only the policy term."""
    weight = scored_by_trl(made, [0.0] * ROWS, vllm_importance_sampling_mode=f"{level}_{mode}")
    weight = weight["importance_sampling_ratio"]
    batch, mask = made[0], made[0].completion_mask[:, PROMPT:]
    own = importance_weights(batch.old_logprobs, batch.sampler_logprobs, batch.student_mask, mode, 1.3, level)
    torch.testing.assert_close(own[:, PROMPT:][mask], weight.expand(mask.shape)[mask], **CLOSE)
    assert 0 < (weight == (1.3 if mode == "truncate" else 0.0)).sum() < weight.numel(), "the cap is active for some"
    options = (f"importance={mode}", f"importance_level={level}", "importance_cap=1.3", "reference_coef=0.2")
    assert_parity(made, ours(made, *options), theirs(made, weight, loss_type="dapo", beta=0.2))


def scored_by_trl(made, rewards, kind=GRPOTrainer, **attributes):
    """TRL's advantages for the batch's completions with `rewards` from one reward function (NaN: None)."""
    batch, _, entropy = made
    old, sampler = batch.old_logprobs[:, PROMPT:], batch.sampler_logprobs[:, PROMPT:]
    prompts, completions = [[1] * PROMPT] * ROWS, [[2] * n for n in LENGTHS]
    texts = [""] * ROWS
    drawn = {
        GRPOTrainer: (
            *(prompts, completions, None, texts),
            *([row[:n].tolist() for row, n in zip(sampler, LENGTHS, strict=True)], {}, None, None),
        ),
        RLOOTrainer: (prompts, completions, texts),
    }
    trainer = trl(
        kind,
        **{
            "use_vllm": True,
            "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_min": None,
            "vllm_importance_sampling_clip_max": 1.3,
            "_tokenizer": SimpleNamespace(pad_token_id=0),
            "pad_to_multiple_of": None,
            "mask_truncated_completions": False,
            "environment_factories": None,
            "environments": None,
            "tools": None,
            "num_iterations": 1,
            "num_generations": 3,
            "reward_weights": torch.ones(1),
            "reward_func_names": ["given"],
            "reward_clip_range": None,
            "scale_rewards": "group",
            "multi_objective_aggregation": "sum_then_normalize",
        }
        | attributes,
    )
    trainer.args.gradient_accumulation_steps = 1
    trainer._generate = lambda _: drawn[kind]
    trainer._calculate_rewards = lambda *_: torch.tensor(rewards)[:, None]
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (old, entropy, None)
    return trainer._generate_and_score_completions([{"prompt": ""}] * ROWS)


NAN = float("nan")
REWARDS = [
    [1.0, 0.0, 0.25, 0.5, 0.5, 2.0],
    [1.0, NAN, 0.0, 0.3, 0.3, 0.3],  # a failed reward takes no part, in both
    [1.0, NAN, NAN, NAN, NAN, NAN],  # nothing to compare with: 0, in both
]


def credited(rewards, credit):
    known = [None if r != r else r for r in rewards]
    return torch.tensor(credit(known[:3]) + credit(known[3:]))


@pytest.mark.parametrize("rewards", REWARDS[:2])
@pytest.mark.parametrize("normalise", [True, False])
def test_group_relative_advantages_are_trls(rewards, normalise, made):
    """The same deviation: n − 1 in its denominator, plus 1e-4."""
    wanted = scored_by_trl(made, rewards, scale_rewards="group" if normalise else "none")["advantages"]
    torch.testing.assert_close(credited(rewards, lambda r: group_relative(r, normalise)), wanted, **CLOSE)


@pytest.mark.parametrize("rewards", REWARDS)
def test_leave_one_out_advantages_are_trls(rewards, made):
    """Without TRL's `normalize_advantages`, which is over the batch and off by default."""
    wanted = scored_by_trl(made, rewards, RLOOTrainer, normalize_advantages=False)["advantages"]
    torch.testing.assert_close(credited(rewards, leave_one_out), wanted, **CLOSE)


@pytest.mark.parametrize("cache", [0, 1, 20, 100])
def test_the_overlong_penalty_is_trls(cache):
    wanted = get_soft_overlong_punishment(100, cache)([[0] * n for n in range(1, 101)])
    assert [overlong_penalty(n, 100, cache) for n in range(1, 101)] == pytest.approx(wanted)


def test_rloos_loss_differs_from_trls_but_for_its_gradient_where_the_policy_has_not_moved(made):
    """TRL's RLOO has one ratio for the whole completion, a product over its tokens, and the mean over completions.

    We keep ratios of tokens. Both have the gradient of REINFORCE at ratio 1, where RLOO is: a sum over the tokens,
    which is Dr. GRPO's normaliser times the budget.
    """
    batch, logprobs, entropy = made
    completion, mask = slice(PROMPT, None), batch.completion_mask[:, PROMPT:].long()
    trainer = trl(RLOOTrainer)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        logprobs[:, completion],
        entropy[:, completion],
        None,
    )
    inputs = {
        "prompt_ids": batch.input_ids[:, :PROMPT],
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.int64),
        "completion_ids": batch.input_ids[:, completion],
        "completion_mask": mask,
        "advantages": batch.advantages[:, -1],
        "old_logps": (logprobs.detach()[:, completion] * mask).sum(1),
    }
    wanted = trainer._compute_loss(None, inputs)
    at_one = (replace(batch, old_logprobs=logprobs.detach()), logprobs, entropy)
    got = ours(at_one, "reduction=dr_grpo", "importance=off", "baseline=leave_one_out", "normalise=false")
    slopes = [torch.autograd.grad(x, logprobs)[0] for x in (LONGEST * got, wanted)]
    torch.testing.assert_close(*slopes, **CLOSE)
