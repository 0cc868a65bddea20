"""A damaged or inconsistent model folder is reported in one line, and missing weights are never initialised."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlkd.builtin import resolve
from rlkd.config.errors import ConfigError
from rlkd.config_file import load
from rlkd.distributed import RunStopped
from rlkd.models.loading import check_whole
from rlkd.models.student import load_causal_lm
from rlkd.planning.preflight import check

QUICKSTART = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(resolve("builtin:student"), "m")
    return Path("m")


def config(*overrides):
    return load(
        [QUICKSTART], ["run.name=of_a_test", "eval.every=0", "teacher=null", "algorithm={name: grpo}", *overrides]
    ).config


def loaded(path="m", attention=None):
    return load_causal_lm(str(path), torch.float32, attention=attention, trust_remote_code=False)


def edit(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def replace_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(said):
    with pytest.raises(RunStopped, match=said) as caught:
        loaded()
    assert "\n" not in str(caught.value)


def test_a_whole_model_is_loaded(folder):
    replace_weights(folder, lambda weights: weights.update(more=torch.zeros(1)))  # unused weights do no harm
    assert loaded().num_parameters() > 0


def test_weights_that_are_cut_off_or_absent(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused("the model m cannot be loaded: SafetensorError: .*not fully covered")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 123\n")
    refused("the model m cannot be loaded: SafetensorError: ")
    (folder / "model.safetensors").unlink()
    refused("the model m cannot be loaded: OSError: .*no file named model.safetensors")


def test_missing_weights_are_refused(folder):
    replace_weights(folder, lambda weights: weights.pop(DOWN))
    refused(f"the model m: 1 weight is missing that its config.json requires: {DOWN}; copy the complete folder again")


def test_weights_of_another_model(folder):
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    edit(folder, num_hidden_layers=layers + 1)
    refused(f"the model m: 9 weights are missing that its config.json requires: model.layers.{layers}.")
    edit(folder, num_hidden_layers=layers, vocab_size=120)
    refused(
        r"the model m: 1 weight is not of the shape .*: expected model.embed_tokens.weight \[120, 64\], got \[56, 64\]"
    )


def test_weights_that_are_not_finite(folder):
    replace_weights(folder, lambda weights: weights[DOWN].fill_(float("nan")))
    refused(f"the model m: 1 weight is not finite: {DOWN}; use another model")


def test_an_attention_that_is_not_installed(folder):
    with pytest.raises(
        RunStopped, match='the model m cannot be loaded: ValueError: Specified `attn_implementation="fl'
    ):
        loaded(attention="flash")


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_an_architecture_that_writes_no_text_is_known_before_anything_is_loaded(folder, kind):
    edit(folder, model_type=kind)
    assert check(config("model.path=m")) == [
        "model.path: expected a model that writes text from left to right, got m "
        f"of type {kind}, for which transformers has no causal language model"
    ]


def test_a_config_json_of_wrong_types(folder):
    edit(folder, hidden_size="big")
    (line,) = check(config("model.path=m"))
    assert line.startswith("model.path: m: ") and "'hidden_size' expected int, got str" in line


def test_betas_are_below_one():
    with pytest.raises(ConfigError, match=r"optim.betas: expected two numbers >= 0 and < 1, got \[1.5, 0.9\]"):
        config("optim.betas=[1.5, 0.9]")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_of_8_bits_are_looked_at_too(dtype):
    layer = torch.nn.Linear(2, 2, dtype=torch.float32)
    layer.weight = torch.nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    report = {"missing_keys": [], "mismatched_keys": []}
    check_whole(layer, "m", report)
    if dtype.is_floating_point:
        layer.weight = torch.nn.Parameter(torch.full((2, 2), torch.nan).to(dtype), requires_grad=False)
        with pytest.raises(RunStopped, match="^the model m: 1 weight is not finite: weight; use another model$"):
            check_whole(layer, "m", report)
