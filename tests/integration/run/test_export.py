"""The exported student: transformers and vLLM can load it, it is stored like its source, and this is checked early."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from builders import config
from safetensors import safe_open
from served_families import FAMILIES, trained
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_fixtures import save_model

from rlkd.builtin import resolve
from rlkd.config.load import ConfigError
from rlkd.data.chat import load_tokenizer
from rlkd.models.loader_names import loader_names
from rlkd.models.student import Student, load_causal_lm
from rlkd.planning.preflight import check
from rlkd.run.export import export_dtype, export_student


def variant(folder, **files):
    """The built-in student with other keys in its JSON files; a file given as None is missing."""
    shutil.copytree(resolve("builtin:student"), folder)
    for name, keys in files.items():
        path = folder / f"{name}.json"
        if keys is None:
            path.unlink()
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return str(folder)


def exported(path, folder, *overrides, change=True):
    """(the student, the folder of its export)."""
    settings = config(f"model.path={path}", f"run.dir={folder}", "run.name=r", *overrides)
    hf = load_causal_lm(path, torch.float32, attention=None, trust_remote_code=False)
    if change:
        trained(hf, 0)
    export_student(Student(hf, 56), settings, load_tokenizer("builtin:student", False), 3)
    return hf, folder / "r" / "hf"


def tensors(folder):
    """name → tensor in the files of a folder."""
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return found


def stored(folder):
    """name → (type, shape) of the tensors in its files."""
    return {name: (value.dtype, tuple(value.shape)) for name, value in tensors(folder).items()}


CHAT = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}


def test_a_generation_config_that_transformers_refuses_to_write_is_copied(tmp_path):
    """Greedy with a temperature, as some chat models ship it. It used to end the run after the last iteration."""
    path = variant(tmp_path / "chat", generation_config=CHAT)
    _, folder = exported(path, tmp_path)
    told = json.loads((folder / "generation_config.json").read_text())
    assert told == json.loads(Path(path, "generation_config.json").read_text()) and told["temperature"] == 0.9
    assert check(config(f"model.path={path}", f"run.dir={tmp_path}")) == []
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_source_without_generation_config_leaves_what_its_config_says(tmp_path):
    _, folder = exported(variant(tmp_path / "none", generation_config=None), tmp_path)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize(
    ("named", "overrides", "dtype"),
    [
        ("float32", (), torch.float32),
        ("bfloat16", (), torch.bfloat16),
        ("bfloat16", ("checkpoint.export_dtype=float32",), torch.float32),
        ("float32", ("checkpoint.export_dtype=float16",), torch.float16),
        (None, (), torch.float32),
    ],
)
def test_weights_are_stored_in_the_type_of_the_source(tmp_path, named, overrides, dtype):
    path = variant(tmp_path / "source", config={"dtype": named})
    hf, folder = exported(path, tmp_path, *overrides)
    assert {kind for kind, _ in stored(folder).values()} == {dtype}
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == dtype == AutoConfig.from_pretrained(folder).dtype
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again.state_dict()[name], hf.state_dict()[name].to(dtype))


def test_an_unknown_type_is_one_line():
    with pytest.raises(ConfigError) as caught:
        config("checkpoint.export_dtype=int8")
    (line,) = caught.value.lines
    assert "checkpoint.export_dtype: expected auto | float32 | bfloat16 | float16, got 'int8'" in line


@pytest.mark.parametrize(
    ("umask", "file", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o644, 0o755), (2, 0o664, 0o775)]
)
def test_others_may_read_the_export_whatever_the_umask(tmp_path, umask, file, folder_mode):
    before = os.umask(umask)
    try:
        _, folder = exported("builtin:student", tmp_path)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == folder_mode
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {file}


@pytest.mark.parametrize("family", ["llama", "qwen3_tied", "qwen3_moe", "mixtral", "gpt_neox", "granite_moe"])
def test_exported_and_published_names_are_those_of_the_source(tmp_path, family):
    """The source was written by transformers, so these are the names that vLLM loads. Most differ in memory."""
    torch.manual_seed(0)
    path = save_model(AutoModelForCausalLM.from_config(FAMILIES[family]()), tmp_path / "source")
    hf, folder = exported(path, tmp_path)
    assert stored(folder) == stored(path)
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], value) for name, value in hf.state_dict().items())
    student = Student(hf, len(hf.get_output_embeddings().weight))
    weights = student.checkpoint_weights(torch.float32)
    published = dict(weights)
    assert {info.name: info.shape for info in weights.infos} == {
        name: shape for name, (_, shape) in stored(path).items()
    }
    assert all(
        info == (name, value.dtype, value.shape) for info, (name, value) in zip(weights.infos, weights, strict=True)
    )
    files = tensors(folder)
    assert published.keys() == files.keys() and all(torch.equal(published[name], files[name]) for name in files)
    renamed = family not in ("llama", "qwen3_tied")
    assert renamed == bool(set(published) - set(hf.state_dict()))


def test_weights_that_transformers_keeps_in_fp32_stay_in_it(tmp_path):
    """The router's correction bias: bf16 would move the choice of experts."""
    torch.manual_seed(0)
    path = save_model(AutoModelForCausalLM.from_config(FAMILIES["glm4_moe"]()), tmp_path / "source")
    _, folder = exported(path, tmp_path, "checkpoint.export_dtype=bfloat16")
    kinds = {name: kind for name, (kind, _) in stored(folder).items()}
    bias = [name for name in kinds if name.endswith("e_score_correction_bias")]
    assert bias and all(kinds[name] == torch.float32 for name in bias)
    assert all(kind == torch.bfloat16 for name, kind in kinds.items() if name not in bias)


def test_a_model_of_other_weights_is_given_back_as_it_was_loaded():
    hf = load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)
    state = hf.state_dict()
    named = loader_names(hf, state)
    assert all(value is state[name] for name, value in named.items())
    assert set(state) - set(named) == {"lm_head.weight"}, "tied"
    assert export_dtype(config("checkpoint.export_dtype=bfloat16")) == torch.bfloat16
