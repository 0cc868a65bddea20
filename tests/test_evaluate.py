import itertools

import pytest
from builders import config

from rlkd.data.chat import load_tokenizer
from rlkd.evaluate import heldout, heldout_prompts, pass_at_k


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(correct, k):
    subsets = list(itertools.combinations([True] * correct + [False] * (5 - correct), k))
    assert pass_at_k(5, correct, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_the_built_in_task_holds_out_its_own_words():
    settings = config("eval.prompts=20")
    prompts = heldout_prompts(settings, load_tokenizer("builtin:student", False))
    assert len(prompts) == 20 and all(p.id.startswith("heldout") for p in prompts)


def test_own_data_is_held_out_only_where_the_config_says(tmp_path):
    assert heldout(config("data.path=train.jsonl")) is None
    named = heldout(config("data.path=train.jsonl", "data.limit=3", "eval.path=test.jsonl", "eval.split=validation"))
    assert (named.path, named.split, named.limit) == ("test.jsonl", "validation", 128)
