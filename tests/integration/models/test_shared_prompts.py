"""`trainer.share_prompts`: completions of one prompt as one sequence give what sequences of their own give."""

from dataclasses import replace

import pytest
import torch
from builders import Captured, assert_moved, assert_same, config, real_batch
from families import tiny_config
from transformers import AutoModelForCausalLM

from rlkd.distributed import RunStopped
from rlkd.models.shared_prompts import check_sharing, shared_hidden
from rlkd.training.micro_batches import micro_batches

SHARED = "trainer.share_prompts=true"
SMALL = ("data.limit=16", "rollout.prompts=4", "algorithm.group_size=4", "trainer.micro_batch_tokens=200")
ALGORITHMS = {
    "kdrl": (),
    "full_vocabulary": ("algorithm={name: opd, divergence: {tier: full, kind: reverse_kl}}",),
    "two_updates": ("trainer.updates_per_iteration=2",),
    "reference": ("algorithm={name: grpo, reference_coef: 0.1}", "teacher=null", "model.lora={r: 4, alpha: 8}"),
}


@pytest.fixture(scope="module", params=ALGORITHMS)
def trained(request):
    """(on sequences of their own, shared): one iteration on the same batch."""
    settings = (*ALGORITHMS[request.param], *SMALL)
    batch = real_batch(config(*settings))
    # As if some rewards were right, so that advantages are not all zero.
    batch = replace(batch, advantages=torch.where(batch.completion_mask, torch.randn(len(batch))[:, None], 0.0))
    return [Captured(config(*settings, *more), batch) for more in ((), (SHARED,))]


def test_gradients_and_metrics_are_equal(trained):
    apart, shared = trained
    assert_moved(apart)
    assert_same(apart.gradients, shared.gradients, 1e-5)
    for name, value in apart.row.items():
        if not name.startswith(("time/", "tokens_per_s")):
            assert shared.row[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "phi", "olmo2"])
def test_states_are_those_of_sequences_of_their_own(family, attention):
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation=attention).eval()
    check_sharing(hf, "x")
    prompts, lengths = torch.tensor([5, 5, 5, 3]), torch.tensor([9, 6, 12, 7])
    ids = torch.randint(2, 90, (4, 12))
    ids[1, :5] = ids[2, :5] = ids[0, :5]
    with torch.no_grad():
        shared = shared_hidden(hf, ids, prompts, lengths, [[2, 0], [1], [3]])
        own = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
    for row in range(4):
        part = slice(int(prompts[row]) - 1, int(lengths[row]) - 1)
        torch.testing.assert_close(shared[row, part], own[row, part], atol=1e-5, rtol=1e-5)
        assert not shared[row, : part.start].any() and not shared[row, part.stop :].any()


@pytest.mark.parametrize("family", ["mamba", "bloom", "mistral", "gemma2"])
def test_a_model_that_cannot_is_refused_in_one_line(family):
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    with pytest.raises(RunStopped, match=r"^trainer.share_prompts: [^\n]* set it to false$"):
        check_sharing(hf, "x")


def test_micro_batches_hold_every_row_once_within_the_budget():
    batch = real_batch(config(*SMALL))
    for budget in (60, 90, 200, 10_000):
        found = micro_batches(batch, budget, width=64)
        rows = torch.cat([index for index, _ in found])
        assert sorted(rows.tolist()) == list(range(len(batch)))
        for index, part in found:
            assert sorted(row for rows in part.sequences for row in rows) == list(range(len(part)))
            assert torch.equal(part.lengths, batch.lengths[index])
            tokens = []
            for of in part.sequences:
                assert len({int(part.group[row]) for row in of}) == 1
                start = int(part.prompt_lengths[of[0]])
                assert len({tuple(part.input_ids[row, :start].tolist()) for row in of}) == 1
                tokens.append(start + sum(int(part.lengths[row]) - start for row in of))
            assert len(tokens) * max(tokens) <= budget
    assert max(len(of) for of in found[0][1].sequences) == 4, "with room, all completions of a prompt are one sequence"


def test_long_completions_are_not_joined():
    """Where attention to masked places would cost more than the prompt saves."""
    batch = real_batch(config(*SMALL))
    long = replace(batch, prompt_lengths=torch.ones_like(batch.prompt_lengths), lengths=batch.lengths)
    (_, part), *_ = micro_batches(long, 10_000, width=1)
    assert {len(of) for of in part.sequences} == {1}
