import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import config, opened

from rlkd.builtin import resolve
from rlkd.config_file import ConfigError, load
from rlkd.data.chat import load_tokenizer
from rlkd.data.heldout import heldout, heldout_prompts
from rlkd.evaluate import main
from rlkd.generation.hf import HFSampler
from rlkd.generation.sampler import Sampling
from rlkd.run.evaluation import evaluate, pass_at_k
from rlkd.run.measure import asked_for, check_sampler, measured


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


QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
FEW = ("eval.prompts=8", "eval.samples=2")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The files of a run of 200 iterations that has exported its student; its config began with builtin:student."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/x")
    shutil.copytree(resolve("builtin:teacher"), folder / "hf")
    (folder / "hf" / "rlkd.json").write_text('{"iteration": 200}')
    (folder / "config.yaml").write_text(load([QUICKSTART], ["run.name=x"]).text)
    (folder / "metrics.jsonl").write_text("")
    return folder


def test_a_run_is_evaluated_by_its_own_student(run):
    for words in (
        ["runs/x"],
        ["--config", "runs/x"],
        ["--config", "runs/x/config.yaml"],
        ["--config=./runs/x/config.yaml", *FEW],
        ["runs/x/"],
    ):
        assert Path(asked_for(words).model.path) == run / "hf"
    assert asked_for(["runs/x", "eval.prompts=9"]).eval.prompts == 9


def test_a_model_that_is_named_wins_over_the_runs_own_student(run):
    Path("other.yaml").write_text("model: {path: somewhere}")
    assert asked_for(["runs/x", "model.path=builtin:student"]).model.path == "builtin:student"
    assert asked_for(["runs/x", "--config", "other.yaml"]).model.path == "somewhere"
    assert Path(asked_for(["--config", "other.yaml", "runs/x"]).model.path) == run / "hf"
    assert asked_for(["--config", QUICKSTART]).model.path == "builtin:student", "no file of a run"
    Path("config.yaml").write_text(Path(QUICKSTART).read_text())
    assert asked_for(["--config", "config.yaml"]).model.path == "builtin:student", "nor is this one"


def test_a_run_without_a_student_yet_is_one_line_and_never_its_start(run, capsys):
    shutil.rmtree(run / "hf")
    Path(run, "checkpoints", "iteration-000050").mkdir(parents=True)
    assert main(["runs/x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "runs/x has no exported student (runs/x/hf) yet; its last checkpoint is of iteration 50 of 200: train it to "
        "its end, by run.resume=auto, or name the model to evaluate by model.path=FOLDER"
    )
    with pytest.raises(ConfigError, match="run.resume=auto and checkpoint.export=true"):
        asked_for(["runs/x", "checkpoint.export=false"])


def test_what_is_measured_is_said_and_is_the_student(run, capsys):
    assert main(["runs/x", *FEW]) == 0
    said = capsys.readouterr()
    assert said.err == (
        "evaluating runs/x/hf, after 200 iterations; data builtin:reverse, split heldout: 8 prompts, greedy and 2 "
        "samples each at temperature 1\n"
    )
    assert json.loads(said.out)["eval/greedy"] > 0.8, "the teacher's weights, which stand for the student's"
    assert main(["--config", QUICKSTART, *FEW]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("evaluating builtin:student, which is no student that a run has exported; data")
    assert json.loads(said.out)["eval/greedy"] < 0.5


def test_its_help_says_how_to_call_it(capsys):
    assert main(["--help"]) == 0
    assert "python -m rlkd.evaluate runs/x [key=value" in capsys.readouterr().out


def test_other_mistakes_are_one_line_each(run, capsys):
    Path("own.jsonl").write_text('{"prompt": "reverse: abc", "answer": "cba"}\n' * 20)
    assert main(["runs/x", "data.path=own.jsonl"]) == 2
    assert main(["runs/x", "eval.path=none.jsonl", "eval.every=0"]) == 2
    assert main(["--config", QUICKSTART, "stages={a: {}}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "eval.path: got nothing, wants held-out data; give it by eval.path=FILE"
    assert lines[1].startswith("eval.path: none.jsonl: cannot be read: ")
    assert lines[2].startswith("stages: evaluate one stage")
    assert len(lines) == 3


def test_nothing_is_published_by_an_evaluation(monkeypatch):
    monkeypatch.delattr(HFSampler, "publish")
    assert measured(config(*FEW))["eval/errors"] == 0


def test_a_sampler_of_other_weights_is_not_measured():
    settings = config(*FEW, "rollout.max_mismatch=0.001")
    loader = opened(settings)
    prompts = heldout_prompts(settings, loader.tokenizer)
    try:
        check_sampler(settings, loader, prompts)
        with torch.no_grad():
            loader.policy._model.get_output_embeddings().weight.mul_(1.05)
        with pytest.raises(RuntimeError, match="the sampler and builtin:student disagree by .* nothing was measured"):
            check_sampler(settings, loader, prompts)
    finally:
        loader.close()
