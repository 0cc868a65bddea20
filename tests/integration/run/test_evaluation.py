"""Evaluation by a real sampler and real rewards."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import config, opened

from rlkd.builtin import resolve
from rlkd.data.heldout import heldout_prompts
from rlkd.evaluate import main
from rlkd.generation.hf import HFSampler
from rlkd.generation.sampler import Sampling
from rlkd.run.evaluation import evaluate
from rlkd.run.measure import check_sampler, measured


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
    """pass@3 is not pass@4, so such a prompt counts only for avg@k."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    some = (
        "reward.functions=[{name: 'reward_that_raises:on_some_completions'}, {name: format, options: {pattern: .*a.*}}]"
    )
    settings = config(some, "reward.max_error_rate=1.0", "eval.prompts=16", "eval.samples=4", "eval.temperature=1.5")
    loader = opened(settings)
    try:
        prompts = heldout_prompts(settings, loader.tokenizer)
        figures = evaluate(settings, loader, prompts)
        sampling = Sampling(temperature=1.5, max_tokens=settings.rollout.max_tokens, seed=2**31)
        groups = loader.line.stream.run([loader.line.answers(prompt, 4, sampling) for prompt in prompts])
    finally:
        loader.close()
    right = [[s.is_correct(1.0) for s in group] for group in groups]
    whole = [any(group) for group in right if None not in group]
    assert 0 < len(whole) < 16
    assert figures["eval/pass@k"] == pytest.approx(sum(whole) / len(whole))
    some = [True in group for group in right if any(one is not None for one in group)]
    assert figures["eval/pass@k"] != pytest.approx(sum(some) / len(some))


def test_an_evaluation_whose_rewards_fail_stops():
    settings = config("data.answer_column=null", "eval.prompts=4", "eval.samples=2")
    loader = opened(settings)
    prompts = [replace(p, answer=None) for p in heldout_prompts(settings, loader.tokenizer)]
    try:
        with pytest.raises(RuntimeError, match="evaluation: 12 of 12 rewards failed.*needs an answer"):
            evaluate(settings, loader, prompts)
    finally:
        loader.close()


QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")


FEW = ("eval.prompts=8", "eval.samples=2")


def test_the_evaluated_model_is_printed_and_is_the_student(finished_run, capsys):
    assert main(["runs/x", *FEW]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(
        "evaluating runs/x/hf, after 200 iterations; data builtin:reverse, split heldout: 8 prompts, greedy and 2 "
        "samples each at temperature 1, rewarded by exact_match\n"
    )
    assert json.loads(said.out)["eval/greedy"] > 0.8, "the teacher's weights, used here as the student's"
    assert main(["--config", QUICKSTART, *FEW]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("evaluating builtin:student, which is not a student exported by a run; data")
    assert json.loads(said.out)["eval/greedy"] < 0.5


def test_several_files_with_one_model_and_their_records(finished_run, capsys):
    words = [json.dumps({"question": f"reverse: {word}", "answer": f"#### {word[::-1]}"}) for word in ("abc", "dbca")]
    Path("gsm.jsonl").write_text("\n".join(words))
    Path("own.jsonl").write_text('{"prompt": "reverse: fedcbak", "answer": "kabcdef"}\n')
    command = ["runs/x", *FEW, "reward.functions=[{name: exact_match}]", "--k", "2"]
    assert main([*command, "--data", "gsm8k:gsm.jsonl", "--data", "own.jsonl", "--out", "both"]) == 0
    said = capsys.readouterr()
    assert len([line for line in said.err.splitlines() if line.startswith("evaluating ")]) == 1
    summary = json.loads(said.out)
    assert summary == json.loads(Path("both/summary.json").read_text())
    assert [one["prompts"] for one in summary["benchmarks"].values()] == [2, 1]
    assert {"greedy", "avg@2", "pass@2", "majority@2"} < summary["benchmarks"]["own"].keys()
    assert "pass@1" not in summary["benchmarks"]["own"]
    first, second = (json.loads(line) for line in Path("both/gsm8k.jsonl").read_text().splitlines())
    assert (first["answer"], second["id"], second["prompt"][-1]["content"]) == ("cba", "1", "reverse: dbca")
    for completion in (first["greedy"], second["greedy"], *first["samples"], *second["samples"]):
        right = completion["completion"] in ("cba", "acbd")
        assert (completion["correct"], completion["reward"], completion["error"]) == (right, float(right), None)
        assert completion["vote"] == "".join(completion["completion"].split()) and 0 < completion["tokens"] <= 16
    assert len(first["samples"]) == 2
    greedy = [one["greedy"]["mean"] for one in summary["benchmarks"].values()]
    assert summary["eval/greedy"] == pytest.approx(sum(greedy) / 2)
    assert main([*command, "--data", "own.jsonl", "--out", "alone"]) == 0
    alone = json.loads(capsys.readouterr().out)["benchmarks"]["own"]
    assert alone == summary["benchmarks"]["own"], "beside another benchmark as alone"


def test_a_run_and_its_start_are_evaluated_and_compared(finished_run, capsys):
    assert main(["runs/x", *FEW]) == main(["runs/x", *FEW, "model.path=builtin:student"]) == 0
    capsys.readouterr()
    assert main(["--compare", "evaluation/builtin-student", "runs/x"]) == 0
    found = json.loads(capsys.readouterr().out)["benchmarks"]["reverse"]
    assert found["differences"]["greedy"]["low"] > 0 and found["greedy"]["wrong to right"] >= 5
    assert found["greedy"]["wrong to right"] == len(found["changed"]) - found["greedy"]["right to wrong"]


def test_a_model_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(resolve("builtin:teacher"), "model")
    Path("own.jsonl").write_text('{"prompt": "reverse: fedcbak", "answer": "kabcdef"}\n')
    few = ["rollout.max_tokens=16", "rollout.backend=hf", "eval.samples=2", "data.max_prompt_tokens=32"]
    assert main(["model", "--data", "own.jsonl", *few]) == 0
    assert json.loads(capsys.readouterr().out)["eval/greedy"] == 1.0
    assert {path.name for path in Path("evaluation/model").iterdir()} == {"summary.json", "own.jsonl"}


def test_nothing_is_published_by_an_evaluation(monkeypatch, tmp_path):
    monkeypatch.delattr(HFSampler, "publish")
    assert measured({"reverse": config(*FEW)}, tmp_path, [1])["eval/errors"] == 0


def test_a_sampler_of_other_weights_is_not_measured():
    settings = config(*FEW, "rollout.max_mismatch=0.001")
    loader = opened(settings)
    prompts = heldout_prompts(settings, loader.tokenizer)
    try:
        check_sampler(settings, loader, prompts)
        with torch.no_grad():
            loader.policy._model.get_output_embeddings().weight.mul_(1.05)
        with pytest.raises(
            RuntimeError, match="the sampler and of builtin:student to differ by at most .* nothing was evaluated"
        ):
            check_sampler(settings, loader, prompts)
    finally:
        loader.close()
