"""A share of the data that is held out."""

import json

import pytest
from builders import config
from lines import assert_lines

from rlkd.algorithms.registry import build_algorithm
from rlkd.config_file import ConfigError
from rlkd.data.chat import load_tokenizer
from rlkd.data.faults import DataError
from rlkd.data.heldout import heldout_prompts, part_of
from rlkd.data.sources import load_source
from rlkd.pipeline.loader import RolloutLoader
from rlkd.planning.preflight import check

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [a + b + c for a in LETTERS[:8] for b in LETTERS[:8] for c in LETTERS[:8]]
TOKENIZER = load_tokenizer("builtin:student", False)


@pytest.fixture
def settings(tmp_path):
    """A function from words and overrides to a configuration that holds out a quarter of them."""
    path = tmp_path / "own.jsonl"

    def of(words, *overrides):
        lines = [json.dumps({"prompt": f"reverse: {word}", "answer": word[::-1]}) for word in words]
        path.write_text("\n".join(lines))
        return config(f"data.path={path}", "eval.fraction=0.25", "eval.prompts=1000", "data.limit=null", *overrides)

    return of


def texts(prompts):
    return [prompt.messages[-1]["content"].removeprefix("reverse: ") for prompt in prompts]


def trained_on(settings):
    return texts(RolloutLoader(settings, build_algorithm(settings)).line.prompts._source)


def test_each_prompt_is_trained_on_or_held_out_as_the_seed_draws(settings):
    trained, held = trained_on(settings(WORDS)), texts(heldout_prompts(settings(WORDS), TOKENIZER))
    assert sorted(trained + held) == sorted(WORDS) and trained == [word for word in WORDS if word in set(trained)]
    assert 0.19 < len(held) / 512 < 0.31, "a quarter, up to three standard deviations"
    assert held == texts(heldout_prompts(settings(WORDS, "run.seed=7"), TOKENIZER)), "seeds can be compared"
    other = texts(heldout_prompts(settings(WORDS, "eval.fraction_seed=1"), TOKENIZER))
    assert 0.1 < len(set(held) & set(other)) / len(held) < 0.45, "independent of the first draw"


def test_a_word_stays_where_it_is_when_rows_are_added_repeated_or_reordered(settings):
    held = set(texts(heldout_prompts(settings(WORDS), TOKENIZER)))
    fewer = texts(heldout_prompts(settings(WORDS[100:200]), TOKENIZER))
    assert set(fewer) == held & set(WORDS[100:200])
    twice = settings([*WORDS[::-1], *WORDS])
    assert not set(trained_on(twice)) & set(texts(heldout_prompts(twice, TOKENIZER)))
    assert set(texts(heldout_prompts(settings(WORDS, "data.system=Be brief."), TOKENIZER))) == held
    assert held < set(texts(heldout_prompts(settings(WORDS, "eval.fraction=0.5"), TOKENIZER)))


def test_the_first_held_out_prompts_are_no_corner_of_sorted_data(settings):
    first = texts(heldout_prompts(settings(WORDS, "eval.prompts=24"), TOKENIZER))
    assert len(first) == 24 and len({word[0] for word in first}) > 5
    assert first == texts(heldout_prompts(settings(WORDS), TOKENIZER))[:24]


def test_the_identity_of_the_data_is_that_of_the_part(settings):
    whole = settings(WORDS)
    identity = load_source(whole.data, TOKENIZER, part=part_of(whole, held_out=False)).identity
    assert identity == RolloutLoader(whole, build_algorithm(whole)).data
    assert identity.rows == len(trained_on(whole)) < 512
    assert identity != load_source(whole.data, TOKENIZER).identity


def test_an_empty_part_is_one_line(settings, tmp_path):
    with pytest.raises(DataError) as caught:
        heldout_prompts(settings(WORDS[:4], "eval.fraction=0.01"), TOKENIZER)
    assert_lines(caught.value.lines, (tmp_path, "own.jsonl: none of 4 rows", "eval.fraction = 0.01", "raise it"))
    lines = check(settings(WORDS[:4], "eval.fraction=0.999", "eval.every=1", "run.name=new"))
    assert_lines(lines, ("data.path: ", "own.jsonl: none of 4 rows", "eval.fraction = 0.999", "lower it"))


def test_two_kinds_of_held_out_data_contradict_each_other(settings):
    with pytest.raises(ConfigError) as caught:
        settings(WORDS, "eval.path=test.jsonl")
    assert_lines(caught.value.lines, ("command line: eval.fraction: is 0.25", "eval.path is test.jsonl"))
