"""OPD: its tiers agree, its mixture takes the prompts that were drawn for it, and contradictions are reported."""

import dataclasses

import builders
import pytest
import torch
from builders import Captured, assert_moved, assert_same, config, groups, local_scorer, own_logprobs, real_batch

from rlkd.algorithms.opd import OPD
from rlkd.config.load import ConfigError
from rlkd.distributed import RunStopped
from rlkd.generation.sampler import Sampling
from rlkd.losses import divergence as teacher_divergence
from rlkd.losses import restrict_to
from rlkd.models.student import load_causal_lm
from rlkd.pipeline.collate import collate
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Prompt, Rollout, ScoredRollout, VersionSpan

NO_CLIP = "optim.max_grad_norm=1000000.0"
TIERS = {
    "full": "{tier: full}",
    "clipped jsd": "{tier: full, kind: jsd, beta: 0.3, clip: 0.05, rescale: true}",
    "teacher's top k": "{tier: top_k, k: 5, kind: forward_kl}",
    "student's top k": "{tier: top_k, k: 5, support: student}",
    "sampled": "{tier: sampled}",
}


def settings(*overrides, divergence=None, **algorithm):
    options = {"name": "opd", "group_size": 4 if algorithm.get("student_share", 1) == 1 else 1} | algorithm
    if divergence is not None:
        options["divergence"] = divergence
    text = ", ".join(f"{key}: {value}" for key, value in options.items())
    return config(f"algorithm={{{text}}}", NO_CLIP, *overrides, group_size=None)


@pytest.fixture(scope="module")
def teacher():
    return local_scorer()


def captured(made, teacher):
    module = OPD(made)
    layers = {"teacher": teacher.layers()} if module.signal.tier == "hidden" else {}
    return Captured(made, collate(groups(module, teacher=teacher), 0, layers))


@pytest.mark.parametrize("tier", TIERS)
def test_micro_batches_change_no_gradient(teacher, tier):
    whole = captured(settings(divergence=TIERS[tier]), teacher)
    split = captured(
        settings("trainer.micro_batch_tokens=48", "rollout.max_tokens=12", divergence=TIERS[tier]), teacher
    )
    assert_moved(whole)
    assert_same(whole.gradients, split.gradients, 2e-6)
    names = {"loss", "loss/kd", "kd/kl", "entropy"} | ({"kd/divergence"} if tier != "sampled" else set())
    for name in names:
        assert whole.row[name] == pytest.approx(split.row[name], rel=1e-5), name


def test_both_forms_of_the_sampled_tier_have_the_same_gradient_on_policy(teacher):
    advantage = captured(settings(divergence="{tier: sampled}"), teacher)
    k2 = captured(settings(divergence="{tier: sampled, form: k2}"), teacher)
    assert_moved(advantage)
    assert_same(advantage.gradients, k2.gradients, 2e-6)


@pytest.mark.parametrize("tier", ["{tier: top_k, k: 56}", "{tier: top_k, k: 56, support: student, tail: false}"])
def test_top_k_of_the_whole_vocabulary_is_full(teacher, tier):
    full, top = captured(settings(divergence="{tier: full}"), teacher), captured(settings(divergence=tier), teacher)
    assert_moved(full)
    assert_same(full.gradients, top.gradients, 1e-5)
    assert full.row["kd/divergence"] == pytest.approx(top.row["kd/divergence"], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("rest", ["", ", tail: false", ", kind: jsd, clip: 0.05"])
def test_on_policy_the_samplers_top_k_is_the_students(rest):
    """They come from the weights that the update starts from; the teacher gives log-probs of no other tokens."""
    first, later = (
        settings("rollout.prompts=2", divergence=f"{{tier: top_k, k: 5, support: {whose}{rest}}}")
        for whose in ("student", "sampler")
    )
    batch = real_batch(later)
    assert batch.scores["teacher"].hidden is None and batch.scores["teacher"].top_ids.shape[-1] == 5
    now, then = Captured(first, real_batch(first)), Captured(later, batch)
    assert_moved(now)
    assert_same(now.gradients, then.gradients, 1e-5)
    assert now.row["kd/divergence"] == pytest.approx(then.row["kd/divergence"], rel=1e-5)


def test_a_student_that_is_its_own_teacher_learns_nothing():
    own = local_scorer("builtin:student")
    for tier in TIERS.values():
        found = captured(settings(divergence=tier), own)
        assert max(g.abs().max() for g in found.gradients.values()) < 1e-5, tier


def test_the_full_tier_is_the_mean_reverse_kl_by_a_plain_forward(teacher):
    made = settings()
    module = OPD(made)
    rows = [s for group in groups(module, teacher=teacher) for s in group]
    student, values = local_scorer("builtin:student"), []
    for s in rows:
        ids = torch.tensor([[*s.rollout.prompt.token_ids, *s.rollout.token_ids]])
        log_s, log_t = (
            x.hf(ids).logits[0, -len(s.rollout.token_ids) - 1 : -1].log_softmax(-1) for x in (student, teacher)
        )
        values += (log_s.exp() * (log_s - log_t)).sum(-1).tolist()
    assert captured(made, teacher).row["loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)


def moved_on(made, teacher):
    """A batch whose tokens an older policy sampled, with a sampler that differs from both."""
    module = OPD(made)
    layers = {"teacher": teacher.layers()} if module.signal.tier == "hidden" else {}
    batch = collate(groups(module, teacher=teacher), 0, layers)
    own = own_logprobs(made, batch)
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(5))
    sampler = torch.where(batch.student_mask, own - 0.5 * noise.flip(1), torch.nan)
    return dataclasses.replace(batch, old_logprobs=own - 0.7 * noise, sampler_logprobs=sampler)


CAPPED = {
    "full": "{tier: full, kind: jsd}",
    "teacher's top k": "{tier: top_k, k: 5, kind: forward_kl}",
    "student's top k": "{tier: top_k, k: 5, support: student, kind: jsd}",
}


@pytest.mark.parametrize("tier", CAPPED)
def test_a_ratio_cap_weighs_each_token_as_written_out(teacher, tier):
    """min(π/π_old, c) · min(π_old/π_sampler, c), detached, against autograd over whole distributions."""
    cap = 1.3
    made = settings(divergence=CAPPED[tier], ratio_cap=cap)
    options, batch = made.algorithm.divergence, moved_on(made, teacher)
    hf = load_causal_lm(made.model.path, torch.float32, attention=None, trust_remote_code=False)
    log_s = hf(batch.input_ids).logits[:, :-1].log_softmax(-1)
    log_t = teacher.hf(batch.input_ids).logits[:, :-1].log_softmax(-1).detach()
    own = log_s.gather(2, batch.input_ids[:, 1:, None]).squeeze(2).detach()
    if options.tier == "top_k":
        ids = (log_t if options.support == "teacher" else log_s.detach()).topk(5).indices
        log_s, log_t = restrict_to(log_s, ids, tail=True), restrict_to(log_t, ids, tail=True)
    mask, old = batch.completion_mask[:, 1:], batch.old_logprobs[:, 1:]
    factor = torch.exp(own - old).clamp(max=cap) * torch.exp(old - batch.sampler_logprobs[:, 1:]).clamp(max=cap)
    assert (torch.exp(own - old)[mask] > cap).any() and (factor[mask] < 0.9).any()
    values = teacher_divergence(log_s, log_t, options.kind, options.beta)
    loss = (values[mask] * factor[mask]).sum() / mask.sum()
    loss.backward()
    found = Captured(made, batch)
    assert_moved(found)
    assert found.row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same(found.gradients, {n: p.grad for n, p in hf.named_parameters()}, 5e-6)
    assert found.row["kd/divergence"] == pytest.approx(values[mask].mean().item(), rel=1e-5), "a mean of divergences"
    split = Captured(settings("trainer.micro_batch_tokens=48", "rollout.max_tokens=12", **options_of(made)), batch)
    assert_same(found.gradients, split.gradients, 5e-6)


def options_of(made):
    given = made.algorithm.divergence
    text = f"{{tier: {given.tier}, k: {given.k}, support: {given.support}, kind: {given.kind}}}"
    return {"divergence": text, "ratio_cap": made.algorithm.ratio_cap}


def test_on_policy_and_on_others_tokens_a_ratio_cap_changes_nothing(teacher):
    plain, capped = settings(), settings(ratio_cap=2.0)
    batch = moved_on(plain, teacher)
    own = own_logprobs(plain, batch)
    fresh = dataclasses.replace(batch, old_logprobs=None, sampler_logprobs=own)
    assert_same(Captured(plain, fresh).gradients, Captured(capped, fresh).gradients, 1e-5)
    others = dataclasses.replace(batch, student_mask=torch.zeros_like(batch.student_mask))
    assert_same(Captured(plain, others).gradients, Captured(capped, others).gradients, 0)
    apart = Captured(capped, batch).gradients
    assert max(float((apart[n] - g).abs().max()) for n, g in Captured(plain, batch).gradients.items()) > 1e-3


def test_mask_eos_spares_the_last_token_of_finished_completions_only(teacher):
    for plain in (settings(), settings(COMPLETIONS, student_share=0.5)):
        algorithm = OPD(plain.model_copy(update={"algorithm": plain.algorithm.model_copy(update={"mask_eos": True})}))
        for s in (s for group in groups(algorithm) for s in group):
            ended = s.rollout.finish_reason == "stop"
            assert s.masks["kd"] == (True,) * (len(s.masks["kd"]) - 1) + (not ended,)
    assert all(all(s.masks["kd"]) for group in groups(OPD(settings())) for s in group)
    made = settings(mask_eos="true")
    batch = collate(groups(OPD(made), teacher=teacher), 0, {"teacher": teacher.layers()})
    last = (torch.arange(len(batch)), batch.lengths - 1)
    other = batch.input_ids.index_put(last, torch.where(batch.masks["kd"][last], batch.input_ids[last], 9))
    a, b = Captured(made, batch), Captured(made, dataclasses.replace(batch, input_ids=other))
    assert_moved(a)
    assert_same(a.gradients, b.gradients, 0)


@pytest.mark.parametrize("options", [{}, {"reduction": "sequence_mean"}, {"reduction": "dr_grpo"}])
def test_the_kl_that_is_logged_is_a_mean_over_tokens_whatever_the_reduction(teacher, options):
    """k3 under the current policy, corrected for the older one that sampled the tokens."""
    made = settings(**options)
    batch = moved_on(made, teacher)
    unscored = batch.masks["kd"].index_fill(0, torch.tensor([0]), False)  # a completion without a context
    batch = dataclasses.replace(batch, masks={"kd": unscored})
    own, mask = own_logprobs(made, batch), batch.masks["kd"]
    ratio = torch.exp(own - batch.old_logprobs) * torch.exp(batch.old_logprobs - batch.sampler_logprobs).clamp(max=2.0)
    gap = batch.scores["teacher"].logprobs - own
    wanted = ((gap.expm1() - gap) * ratio)[mask].mean()
    assert Captured(made, batch).row["kd/kl"] == pytest.approx(wanted.item(), rel=1e-4)


def test_dr_grpo_divides_by_the_longest_completion_that_there_can_be(teacher):
    """Completions from the data count too if they are trained on."""
    sampled = settings(reduction="dr_grpo")
    mixed = settings(COMPLETIONS, "data.max_completion_tokens=64", student_share=0.5, reduction="dr_grpo")
    assert [OPD(made).longest_completion for made in (sampled, mixed)] == [16, 64]
    batch = collate(groups(OPD(sampled), teacher=teacher), 0, {"teacher": teacher.layers()})
    one, other = Captured(sampled, batch), Captured(mixed, batch)
    assert_same(one.gradients, {n: 4 * g for n, g in other.gradients.items()}, 1e-6)


# ---- the mixture -----------------------------------------------------------------------------------------------------


class Policy:
    """Records the prompts it gets; its completions contain their index in the group."""

    def __init__(self):
        self.asked = []

    def sample(self, prompts, *, n, iteration, sampling):
        self.asked += [prompt.id for prompt in prompts]
        return [[self.one(prompt, i) for i in range(n)] for prompt in prompts]

    def one(self, prompt, i):
        return Rollout(
            prompt=prompt,
            token_ids=(10 + i, 1),
            logprobs=(-1.0, -1.0),
            weight_versions=(VersionSpan(start=0, end=2, version=0),),
            finish_reason="stop",
        )


PROMPTS = [
    Prompt(id=f"p{i}", messages=(), token_ids=(4, 20 + i % 8), completion=(30 + i % 8, 31, 1)) for i in range(40)
]
COMPLETIONS = "data.completion_column=answer"


def rolled(made, teacher, iteration=3, prompts=PROMPTS):
    policy = Policy()
    return builders.rolled(OPD(made), prompts, policy, teacher, iteration), policy.asked


def students(rollouts):
    return [group[0].prompt.id for group in rollouts if group[0].authors()[0] == "student"]


def test_the_mixture_is_a_function_of_seed_iteration_and_prompt():
    half = settings(COMPLETIONS, student_share=0.5)
    rollouts, asked = rolled(half, None)
    assert [group[0].prompt for group in rollouts] == PROMPTS, "in the order of the prompts"
    assert asked == students(rollouts)
    assert 10 < len(asked) < 30
    assert rolled(half, None)[1] == asked
    assert rolled(half, None, prompts=PROMPTS[5:9])[1] == [name for name in asked if name in ("p5", "p6", "p7", "p8")]
    assert rolled(half, None, iteration=4)[1] != asked
    assert rolled(settings(COMPLETIONS, "run.seed=9", student_share=0.5), None)[1] != asked
    more = rolled(settings(COMPLETIONS, student_share=0.8), None)[1]
    assert set(asked) < set(more), "a larger share adds prompts and removes none"
    assert rolled(settings(COMPLETIONS, student_share=0), None)[1] == []
    assert rolled(settings(student_share=1), None)[1] == [prompt.id for prompt in PROMPTS]


def test_others_data_gives_the_completions_of_the_data():
    rollouts, asked = rolled(settings(COMPLETIONS, student_share=0.5), None)
    for group in rollouts:
        if group[0].prompt.id in asked:
            assert [r.token_ids for r in group] == [(10, 1)]
        else:
            (rollout,) = group
            assert rollout.token_ids == rollout.prompt.completion
            assert set(rollout.authors()) == {"data"} and rollout.logprobs == (None,) * 3
    with pytest.raises(RunStopped, match=r"prompt 'p0': .* data.completion_column"):
        rolled(settings(COMPLETIONS, student_share=0), None, prompts=[dataclasses.replace(PROMPTS[0], completion=None)])


def test_others_teacher_lets_the_teacher_write(teacher):
    rollouts, asked = rolled(settings(student_share=0.5, others="teacher"), teacher)
    sampling = Sampling(temperature=1.0, max_tokens=16, seed=0)
    theirs = [group for group in rollouts if group[0].prompt.id not in asked]
    questions = [ScoreRequest(group[0].prompt.token_ids, name=group[0].prompt.id) for group in theirs]
    for (rollout,), wanted in zip(theirs, teacher.write(questions, sampling, 3), strict=True):
        assert (rollout.token_ids, rollout.finish_reason) == (wanted.token_ids, wanted.finish_reason)
        assert set(rollout.authors()) == {"teacher"}


def test_gkd_at_lambda_one_is_opd_bit_for_bit(teacher):
    opd = captured(settings(), teacher)
    gkd = captured(settings(COMPLETIONS, student_share=1.0, others="data"), teacher)
    assert_moved(opd)
    assert_same(opd.gradients, gkd.gradients, 0)
    assert_same(opd.parameters, gkd.parameters, 0)


def test_completions_by_others_are_distilled_and_do_not_count_as_mismatch(teacher):
    made = settings(COMPLETIONS, student_share=0)
    module = OPD(made)
    rollouts, _ = rolled(made, None, prompts=PROMPTS[:4])
    rows = [ScoredRollout(rollout=group[0], reward=None) for group in rollouts]
    scores = teacher.score([ScoreRequest(s.rollout.prompt.token_ids, s.rollout.token_ids) for s in rows], module.signal)
    rows = [s.with_scores("teacher", score) for s, score in zip(rows, scores, strict=True)]
    found = Captured(made, collate([module.advantages([s]) for s in rows], 0, {"teacher": teacher.layers()}))
    assert_moved(found)
    assert found.row["kd/divergence"] > 0.01
    assert "mismatch/mean" not in found.row


# ---- contradictions --------------------------------------------------------------------------------------------------

SERVED = "teacher={backend: served, path: builtin:teacher, url: 'http://127.0.0.1:9'}"


@pytest.mark.parametrize(
    ("overrides", "options", "line"),
    [
        ((SERVED,), {}, r"algorithm.divergence.tier: is full, which needs .* the teacher runs on a server"),
        (
            (SERVED,),
            {"divergence": "{tier: top_k, support: student}"},
            r"algorithm.divergence.tier: is top_k, which needs .* runs on a server",
        ),
        (
            ("teacher={backend: served, path: builtin:teacher, server: {launch: true}}",),
            {"divergence": "{tier: top_k, support: sampler}"},
            r"algorithm.divergence.support: is sampler, but vLLM on a CPU cannot score given tokens",
        ),
        (
            ("rollout.temperature=0.7",),
            {"divergence": "{tier: sampled}"},
            r"teacher.temperature: is 1.0, but rollout.temperature is 0.7",
        ),
        (
            (COMPLETIONS,),
            {"student_share": 0.5, "divergence": "{tier: top_k, support: sampler}"},
            r"algorithm.divergence.support: is sampler, but completions by others have no sampler",
        ),
        ((), {"student_share": 0.5}, r"algorithm.student_share: is 0.5, but data.completion_column is null"),
        (
            (),
            {"student_share": 0.5, "others": "teacher", "divergence": "{tier: sampled}"},
            r"algorithm.divergence.tier: is sampled, which is correct only on the student's own samples",
        ),
        (
            (),
            {"divergence": "{tier: sampled, kind: forward_kl}"},
            r"algorithm.divergence.kind: is forward_kl, but tier: sampled supports only reverse_kl",
        ),
        (
            (),
            {"student_share": 0.5, "others": "teacher", "group_size": 4},
            r"algorithm.group_size: is 4, but others complete a prompt once .* set it to 1",
        ),
        (("teacher=null",), {}, r"teacher.backend: is none, but algorithm.name opd imitates one"),
    ],
)
def test_each_contradiction_is_one_line(overrides, options, line):
    with pytest.raises(ConfigError, match=line) as caught:
        settings(*overrides, **options)
    assert len(caught.value.lines) == 1


def test_what_a_server_can_do_is_allowed():
    for divergence in ("{tier: top_k, k: 100}", "{tier: top_k, support: sampler}", "{tier: sampled}"):
        settings(SERVED, divergence=divergence)
