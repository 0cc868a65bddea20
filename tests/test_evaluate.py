import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from builders import config, opened

from rlkd.data.chat import load_tokenizer
from rlkd.evaluate import evaluate, heldout, heldout_prompts, pass_at_k
from rlkd.rollout.sampler import Sampling


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct, k):
    subsets = list(itertools.combinations([True] * correct + [False] * (5 - correct), k))
    assert pass_at_k(5, correct, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


@pytest.mark.parametrize(("samples", "correct", "k"), [(2, 0, 4), (2, 2, 4), (3, 1, 0)])
def test_pass_at_k_of_fewer_samples_is_no_number(samples, correct, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {samples} samples: wants 1 ≤ k ≤ samples"):
        pass_at_k(samples, correct, k)


def test_the_built_in_task_holds_out_its_own_words():
    settings = config("eval.prompts=20")
    prompts = heldout_prompts(settings, load_tokenizer("builtin:student", False))
    assert len(prompts) == 20 and all(p.id.startswith("heldout") for p in prompts)


def test_own_data_is_held_out_only_where_the_config_says(tmp_path):
    assert heldout(config("data.path=train.jsonl")) is None
    named = heldout(config("data.path=train.jsonl", "data.limit=3", "eval.path=test.jsonl", "eval.split=validation"))
    assert (named.path, named.split, named.limit) == ("test.jsonl", "validation", 128)


PAIRS = ("data.completion_column=answer", "data.rejected_column=wrong", "data.privileged_column=hint")


def test_what_is_only_trained_on_need_not_be_in_the_held_out_data(tmp_path):
    held_out = tmp_path / "test.jsonl"
    held_out.write_text('{"prompt": "reverse: abc", "answer": "cba"}\n')
    settings = config("data.path=train.jsonl", f"eval.path={held_out}", *PAIRS)
    (prompt,) = heldout_prompts(settings, load_tokenizer("builtin:student", False))
    assert (prompt.answer, prompt.completion, prompt.rejected, prompt.privileged) == ("cba", None, None, None)


def test_an_algorithm_that_asks_for_no_rewards_is_evaluated_all_the_same():
    settings = config(
        *("algorithm={name: sft}", "teacher=null", "data.completion_column=answer"),
        *("eval.prompts=32", "eval.samples=2"),
        group_size=None,
    )
    loader = opened(settings)
    try:
        figures = evaluate(settings, loader, heldout_prompts(settings, loader.tokenizer))
    finally:
        loader.close()
    assert figures["eval/errors"] == 0 and 0 < figures["eval/greedy"] < 0.5


def test_a_prompt_with_a_failed_reward_has_no_pass_at_k(monkeypatch):
    """pass@3 is no pass@4: such a prompt counts for avg@k alone."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    some = (
        "reward.functions=[{name: 'reward_that_raises:on_some_completions'}, {name: format, options: {pattern: .*a.*}}]"
    )
    settings = config(some, "reward.max_error_rate=1.0", "eval.prompts=16", "eval.samples=4", "eval.temperature=1.5")
    loader = opened(settings)
    try:
        prompts = heldout_prompts(settings, loader.tokenizer)
        figures = evaluate(settings, loader, prompts)
        sampling = Sampling(temperature=1.5, max_tokens=settings.rollout.max_tokens, seed=2**31)
        groups = loader.reward(loader.policy.sample(prompts, n=4, iteration=0, sampling=sampling))
    finally:
        loader.close()
    right = [[s.is_correct(1.0) for s in group] for group in groups]
    whole = [any(group) for group in right if None not in group]
    assert 0 < len(whole) < 16
    assert figures["eval/pass@k"] == pytest.approx(sum(whole) / len(whole))
    some = [True in group for group in right if any(one is not None for one in group)]
    assert figures["eval/pass@k"] != pytest.approx(sum(some) / len(some))


def test_an_evaluation_whose_rewards_fail_says_so():
    settings = config("data.answer_column=null", "eval.prompts=4", "eval.samples=2")
    loader = opened(settings)
    prompts = [replace(p, answer=None) for p in heldout_prompts(settings, loader.tokenizer)]
    try:
        with pytest.raises(RuntimeError, match="evaluation: 12 of 12 rewards failed.*needs an answer"):
            evaluate(settings, loader, prompts)
    finally:
        loader.close()
