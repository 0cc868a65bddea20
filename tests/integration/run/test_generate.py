"""Completions by the exported student of a run, or by any model: those that the run's sampler would write."""

import json
from pathlib import Path

import pytest
from builders import config, opened
from lines import assert_lines

from rlkd.data.chat import completion_text, load_tokenizer
from rlkd.data.heldout import heldout_prompts
from rlkd.generate import main, settings_for
from rlkd.generation.sampler import Sampling
from rlkd.run.completions import given_prompts

WORDS = ("--data", "builtin:reverse", "data.split=heldout", "data.limit=8", "--out", "out.jsonl")


@pytest.mark.parametrize("named", ["runs/x", "runs/x/hf"])
def test_it_writes_what_the_sampler_of_a_run_with_these_weights_does(finished_run, monkeypatch, named):
    assert main([named, *WORDS, "--samples", "2", "--temperature", "0.7", "--max-tokens", "9"]) == 0
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    monkeypatch.chdir(Path(__file__).parents[3])
    settings = config("eval.prompts=8", "model.path=builtin:teacher")
    prompts = heldout_prompts(settings, load_tokenizer("builtin:student"))
    loader = opened(settings)
    try:
        sampling = Sampling(temperature=0.7, max_tokens=9, seed=settings.run.seed)
        groups = loader.policy.sample(prompts, n=2, iteration=0, sampling=sampling)
    finally:
        loader.close()
    assert found == [
        {
            "id": rollout.prompt.id,
            "sample": sample,
            "messages": list(rollout.prompt.messages),
            "completion": completion_text(loader.tokenizer, rollout.token_ids, rollout.finish_reason),
            "finish_reason": rollout.finish_reason,
            "tokens": len(rollout.token_ids),
        }
        for group in groups
        for sample, rollout in enumerate(group)
    ]
    assert {line["finish_reason"] for line in found} == {"stop", "length"}


def test_the_student_of_a_run_answers_on_the_console(finished_run, capsys):
    assert main(["runs/x", "reverse: lemkonijv", "reverse: hlpnggd", "--temperature", "0"]) == 0
    shown = "--- prompt 0, sample 0\nvjinokmel\n--- prompt 1, sample 0\ndggnplh\n"
    assert capsys.readouterr().out == shown
    assert main(["builtin:teacher", "reverse: lemkonijv", "--temperature", "0", "--max-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "vjin\n" and "cut off after 4 tokens" in printed.err


def test_prompts_are_read_as_those_of_the_run(finished_run):
    Path("p.jsonl").write_text('{"prompt": "reverse: <eos>"}\n')
    settings = settings_for("runs/x", (), ["data.system=be brief"])
    (typed,) = given_prompts(settings, ["reverse: <eos>"], None)
    (read,) = given_prompts(settings, [], "p.jsonl")
    assert (typed.messages, typed.token_ids) == (read.messages, read.token_ids)
    assert typed.messages[0] == {"role": "system", "content": "be brief"}
    end = load_tokenizer("builtin:student").eos_token_id
    assert end not in typed.token_ids, "a special token in a prompt is text"
    spelled = settings_for("runs/x", (), ["data.special_tokens=tokens"])
    assert end in given_prompts(spelled, ["reverse: <eos>"], None)[0].token_ids


def test_the_sampler_is_in_this_process_unless_it_is_asked_for_vllm(finished_run):
    file = finished_run / "config.yaml"
    file.write_text(
        file.read_text().replace("backend: hf", "backend: vllm").replace("urls: []", "urls: [http://127.0.0.1:1]")
    )
    file.write_text(file.read_text().replace("limit: null", "limit: 1"))
    here = settings_for("runs/x", (), [])
    assert here.data.limit is None, "the run's is for its own data"
    assert settings_for("runs/x", (), ["data.limit=3"]).data.limit == 3
    assert (here.rollout.backend, here.rollout.server.urls, here.model.path) == ("hf", [], "runs/x/hf")
    served = settings_for("runs/x", (), ["rollout.backend=vllm"])
    assert served.rollout.server.launch and served.rollout.server.urls == []
    running = settings_for("runs/x", (), ["rollout.backend=vllm", "rollout.server.urls=[http://127.0.0.1:2]"])
    assert (running.rollout.server.launch, running.rollout.server.urls) == (False, ["http://127.0.0.1:2"])
    Path("other.yaml").write_text("rollout: {max_tokens: 5}\n")
    assert settings_for("runs/x", ["other.yaml"], []).rollout.max_tokens == 5


def test_mistakes_are_one_line_each(finished_run, capsys):
    Path("p.jsonl").write_text('{"prompt": "x"}\n{"question": "x"}\n')
    for words in (
        ["runs/x"],
        ["runs/x", "a prompt", "--data", "p.jsonl"],
        ["runs/x", "a prompt", "--out", "none/out.jsonl"],
        ["runs/x", "a prompt", "rollout.max_token=3"],
        ["./none", "a prompt"],
        ["runs/x", "--data", "p.jsonl"],
        ["runs/x", " "],
        ["runs/x", "reverse: abc", "--max-tokens", "200"],
        ["runs/x", "reverse: abc", "--temperature", "-1"],
    ):
        assert main(words) == 2
    assert_lines(
        capsys.readouterr().err.splitlines(),
        ("command line: ", "--data", "neither"),
        ("command line: ", "--data", "both"),
        ("command line: ", "--out", "none"),
        ("command line: ", "max_token", "max_tokens"),
        ("model.path", "./none"),
        ("p.jsonl:2", "'prompt'"),
        ("prompt 0", "empty"),
        ("rollout.max_tokens", "data.max_prompt_tokens", 128),
        ("command line: ", "--temperature", "-1"),
    )
