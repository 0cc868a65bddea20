"""LoRA: what is trained, what the adapters compute, and that exports compute the same."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from builders import GRPO, Captured, assert_same, config, groups
from run_results import rows
from runs import RECIPE, arguments, train_small
from safetensors.torch import load_file
from served_families import EXPERTS, FAMILIES, SIZES
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from vllm_fixtures import save_model

from rlkd.algorithms.kdrl import KDRL
from rlkd.builtin import resolve
from rlkd.config.load import ConfigError
from rlkd.config_file import load_stages
from rlkd.data.chat import load_tokenizer
from rlkd.models import lora
from rlkd.models.logprob_head import Needs
from rlkd.models.student import Student, load_causal_lm
from rlkd.pipeline.collate import collate
from rlkd.planning.preflight import check
from rlkd.run.export import export_student
from rlkd.run.fit import run_stages
from rlkd.storage.run_folder import checkpoints
from rlkd.train import main

LORA = "model.lora={r: 4, alpha: 8}"
IDS = torch.tensor([[5, 9, 14, 7, 8, 21, 3, 30], [4, 4, 6, 11, 25, 2, 9, 17]])


def start():
    return load_causal_lm("builtin:student", torch.float32, attention=None, trust_remote_code=False)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(settings, one large step): adapters that matter."""
    folder = tmp_path_factory.mktemp("runs")
    settings = config(LORA, "optim.lr=0.1", f"run.dir={folder}", "run.name=trained")
    return settings, Captured(settings)


def test_before_the_first_step_the_student_is_the_base_bit_for_bit():
    whole, adapted = Captured(config()), Captured(config(LORA))
    for name in ("loss", "loss/pg", "kd/kl", "entropy", "mismatch/mean"):
        assert adapted.row[name] == whole.row[name], name


def test_only_adapters_are_trained(trained):
    _, captured = trained
    base = start().state_dict()
    assert captured.gradients and all(lora.is_adapter(name) for name in captured.gradients)
    for name, value in captured.parameters.items():
        if lora.is_adapter(name):
            assert value.dtype == torch.float32
        else:
            assert torch.equal(value, base[name.replace(".base_layer.", ".")]), name
    ups = [value for name, value in captured.parameters.items() if ".lora_B." in name]
    assert len(ups) == 2 * 7 and all(value.abs().max() > 0.01 for value in ups)


def test_adapters_are_a_function_of_the_seed():
    def drawn(seed):
        hf = start()
        lora.inject(hf, config(LORA).model.lora, seed)
        return hf.state_dict()["model.layers.0.mlp.up_proj.lora_A.default.weight"]

    state = torch.get_rng_state()
    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))
    assert torch.equal(torch.get_rng_state(), state), "adapters do not change any other random numbers"


def test_both_exports_compute_what_the_student_does(trained):
    settings, captured = trained
    export_student(captured.student, settings, load_tokenizer("builtin:student", False), 1)
    folder = Path(settings.run_dir)
    batch = collate(groups(KDRL(settings)), 0)
    with torch.no_grad():
        ours = captured.student(batch, Needs(temperature=1.0)).logprobs[:, 1:]

    def of(model):
        with torch.no_grad():
            scored = model(batch.input_ids).logits[:, :-1].log_softmax(-1)
        return torch.where(batch.completion_mask[:, 1:], scored.gather(2, batch.input_ids[:, 1:, None]).squeeze(2), 0.0)

    merged = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(start(), folder / "adapter")
    torch.testing.assert_close(of(merged), ours, atol=1e-4, rtol=0)
    torch.testing.assert_close(of(adapted), ours, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=0)
    assert (of(start()) - ours).abs().max() > 1, "otherwise a lost adapter would not show"
    told = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["base_model_name_or_path"]) == (4, 8, resolve("builtin:student"))
    for name in ("chat_template.jinja", "generation_config.json"):
        assert {(folder / part / name).read_text() for part in ("hf", "adapter")} == {
            Path(resolve("builtin:student"), name).read_text()
        }
    assert {path.stat().st_mode & 0o777 for path in (folder / "adapter").iterdir()} == {0o644}
    assert "library_name: peft" in (folder / "adapter" / "README.md").read_text()


def test_without_adapters_the_student_is_the_reference(trained):
    settings, captured = trained
    batch = collate(groups(KDRL(settings)), 0)
    needs = Needs(temperature=settings.rollout.temperature)
    with torch.no_grad():
        moved = captured.student(batch, needs).logprobs
        with captured.student.without_adapters():
            base = captured.student(batch, needs).logprobs
        assert torch.equal(captured.student(batch, needs).logprobs, moved)
        truth = start()(batch.input_ids).logits[:, :-1].log_softmax(-1)
    truth = truth.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(base[:, 1:], torch.where(batch.completion_mask[:, 1:], truth, 0.0), atol=1e-5, rtol=0)
    assert (moved - base).abs().max() > 1


def test_the_kl_to_the_reference_needs_no_second_model():
    """The batch has no reference scores. In the second update the student has changed, the reference has not."""
    reference = (*GRPO, LORA, "algorithm.reference_coef=1", "optim.lr=0.03")
    one = Captured(config(*reference))
    two = Captured(config(*reference, "trainer.updates_per_iteration=2"))
    assert one.row["reference/kl"] == 0
    assert two.row["reference/kl"] > 1e-3


def test_half_precision_adapters_keep_fp32_masters():
    half, full = Captured(config(LORA, "trainer.precision=bf16")), Captured(config(LORA))
    assert all(value.dtype == torch.float32 for value in [*half.parameters.values(), *half.gradients.values()])
    assert half.row["entropy"] == pytest.approx(full.row["entropy"], rel=0.1)
    assert half.row["entropy"] != full.row["entropy"]


def test_gradient_checkpointing_changes_no_gradient():
    plain, again = Captured(config(LORA)), Captured(config(LORA, "model.gradient_checkpointing=true"))
    assert plain.gradients.keys() == again.gradients.keys()
    for name, value in plain.gradients.items():
        torch.testing.assert_close(again.gradients[name], value, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "model.lora={target_modules: q_proj}",
            "target_modules: expected all-linear, or a list of texts, got 'q_proj'",
        ),
        ("model.lora={target_modules: []}", "target_modules: expected all-linear, or a list of texts, got []"),
        ("model.lora={r: 0}", "model.lora.r: expected an integer >= 1, got 0"),
        ("model.lora={dropout: 0.1}", "model.lora.dropout: unknown key; model.lora has r, alpha, target_modules"),
    ],
)
def test_a_wrong_key_is_one_line(override, line):
    with pytest.raises(ConfigError) as caught:
        config(override)
    assert len(caught.value.lines) == 1 and line in caught.value.lines[0], caught.value.lines


def test_without_adapters_the_policys_servers_hold_no_fixed_teacher():
    served = ("rollout.backend=vllm", "rollout.server.launch=true", "algorithm={name: opsd}")
    top_k = "algorithm.divergence={tier: top_k}"
    teacher = "teacher={backend: self, weights: fixed, scorer: policy_server}"
    with pytest.raises(ConfigError) as caught:
        config(*served, top_k, teacher)
    (line,) = caught.value.lines
    assert "teacher.weights: is fixed, but with teacher.scorer: policy_server and no model.lora" in line
    assert config(LORA, *served, top_k, teacher).publishes_adapter


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rollout.server.weight_sync=nccl", "rollout.server.weight_sync: is nccl, but model.lora publishes an adapter"),
        ("model.lora.r=1024", "model.lora.r: is 1024, but vLLM serves adapters only up to rank 512"),
    ],
)
def test_what_a_server_cannot_do_is_one_line(override, line):
    with pytest.raises(ConfigError) as caught:
        config(LORA, "rollout.backend=vllm", "rollout.server.launch=true", override)
    assert len(caught.value.lines) == 1 and line in caught.value.lines[0], caught.value.lines


def test_a_layer_that_cannot_be_adapted_is_known_before_the_model_is_loaded(tmp_path):
    for target in ("q_prj", "embed_tokens", "lm_head"):
        with pytest.raises(ValueError, match=f"target_modules: '{target}' is not a linear layer of LlamaForCausalLM"):
            lora.layer_names(start(), config(f"model.lora={{target_modules: [q_proj, {target}]}}").model.lora)
    fresh = f"run.dir={tmp_path}"  # runs/ may hold a run already
    (line,) = check(config("model.lora={target_modules: [q_proj, lm_head]}", fresh))
    assert line.startswith("model.lora.target_modules: 'lm_head' is not a linear layer of LlamaForCausalLM that can be")
    assert line.endswith("use some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")
    assert check(config("model.lora={target_modules: [q_proj, layers.0.mlp.up_proj]}", fresh)) == []


def mixture(family, folder):
    torch.manual_seed(0)
    return save_model(AutoModelForCausalLM.from_config(FAMILIES[family]()), folder)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "granite_moe", "phi_moe", "qwen3_next"])
def test_in_a_mixture_of_experts_one_list_says_which_layers_have_adapters(tmp_path, family):
    """For PEFT, "all-linear" includes fused experts and the router; here, as documented, only linear layers."""
    path = mixture(family, tmp_path / "model")
    settings = config(LORA, f"model.path={path}", f"run.dir={tmp_path}", "run.name=r")
    model = settings.model
    names = lora.layers(lora.skeleton(model), model.lora)
    assert {name.rsplit(".", 1)[-1] for name in names} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not any(".experts." in name or name.endswith((".gate", ".router")) for name in names), names
    hf = load_causal_lm(path, torch.float32, attention=None, trust_remote_code=False)
    before = logits(hf)
    lora.inject(hf, model.lora, 0)
    trained = {name.removesuffix(".lora_A.default.weight") for name in hf.state_dict() if ".lora_A." in name}
    assert trained == set(names) and torch.equal(logits(hf), before)
    for name, parameter in hf.named_parameters():
        if lora.is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.3)
    student, folder = Student(hf, len(hf.get_output_embeddings().weight), model.lora), tmp_path / "r"
    export_student(student, settings, load_tokenizer("builtin:student", False), 1)
    merged = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    base = load_causal_lm(path, torch.float32, attention=None, trust_remote_code=False)
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(logits(merged), logits(hf), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(adapted), logits(hf), atol=1e-4, rtol=0)
    assert (logits(hf) - before).abs().max() > 0.5, "otherwise a lost adapter would not show"


@pytest.mark.long
@pytest.mark.parametrize("adapters", [(LORA,), ()])
def test_a_mixture_of_experts_is_trained_published_and_exported(tmp_path, adapters):
    """With the in-process sampler, which uses names in memory. With adapters it used to fail immediately."""
    path = tmp_path / "model"
    shutil.copytree(resolve("builtin:student"), path)
    size = {"vocab_size": start().config.vocab_size, "max_position_embeddings": 512, "dtype": "bfloat16"}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**{**SIZES, **EXPERTS, **size, "head_dim": 32})).save_pretrained(
        path
    )
    where = (f"run.dir={tmp_path}", "run.name=r", "run.iterations=2", "eval.every=0", "log.rollouts_every=0")
    small = (*GRPO, "rollout.prompts=4", "rollout.max_tokens=8", "data.limit=16", "rollout.max_mismatch=1.0e-4")
    assert run_stages(load_stages(["configs/quickstart.yaml"], [f"model.path={path}", *adapters, *where, *small])) == 0
    assert all(row["mismatch/mean"] < 1e-5 for row in rows(tmp_path / "r"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "hf")
    assert exported.dtype == torch.bfloat16 and (tmp_path / "r" / "adapter").exists() == bool(adapters)


def test_matrices_without_adapters_are_listed(tmp_path):
    settings = config(LORA, f"model.path={mixture('mixtral', tmp_path / 'model')}").model
    found = lora.unadapted(lora.skeleton(settings), settings.lora)
    assert found == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate"]
    assert lora.unadapted(start(), config(LORA).model.lora) == []
    few = lora.unadapted(start(), config("model.lora={target_modules: [q_proj, v_proj]}").model.lora)
    assert few == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj"]


@pytest.mark.parametrize(
    ("family", "target", "line"),
    [
        ("mixtral", "w1", "'w1' is not a linear layer of MixtralForCausalLM that can be adapted; use some of k_proj"),
        ("mixtral", "gate", "'gate' is not a linear layer of MixtralForCausalLM that can be adapted; use some of"),
        ("phi_moe", "router", "'router' is not a linear layer of PhimoeForCausalLM that can be adapted; use some of"),
        ("qwen3_next", "up_proj", "can be adapted (up_proj is PEFT's name for the fused experts); use some of"),
    ],
)
def test_experts_and_routers_are_refused_in_one_line(tmp_path, family, target, line):
    path = mixture(family, tmp_path / "model")
    problems = check(config(f"model.lora={{target_modules: [q_proj, {target}]}}", f"model.path={path}"))
    (said,) = [problem for problem in problems if problem.startswith("model.lora.target_modules: ")]
    assert line in said and "\n" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU serves them")
def test_a_cpu_server_of_adapters_for_a_mixture_is_refused_in_one_line(tmp_path):
    """vLLM 0.32 starts, and crashes at the first request."""
    served = ("rollout.backend=vllm", "rollout.server.launch=true", f"run.dir={tmp_path}")
    path = f"model.path={mixture('mixtral', tmp_path / 'model')}"
    line = "model.lora: vLLM serves no adapters of a mixture of experts on a CPU"
    assert any(said.startswith(line) for said in check(config(LORA, path, *served)))
    assert not any(said.startswith("model.lora") for said in check(config(path, *served)))
    assert not any(said.startswith("model.lora") for said in check(config(LORA, *served)))


def test_adapters_of_a_stage_are_on_top_of_the_stage_before(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("rewarded:", "rewarded:\n    model: {lora: {r: 4}}"))
    assert load_stages([str(recipe)], [])[-1].starts_from == "runs/recipe/taught/hf"
    (own,) = load_stages([str(recipe)], ["stages.rewarded.model.path=builtin:mentor"])[2:]
    assert own.starts_from is None and own.loaded.config.model.path == "builtin:mentor"


@pytest.mark.process
def test_adapters_learn(tmp_path):
    where = (LORA, f"run.dir={tmp_path}", "run.name=r", "run.iterations=12", "optim.lr=0.003", "eval.every=0")
    few = ("data.limit=512", "log.rollouts_every=0")
    assert run_stages(load_stages(["configs/quickstart.yaml"], [*where, *few])) == 0
    figures = rows(tmp_path / "r")
    assert figures[0]["accuracy"] == 0
    assert sum(row["accuracy"] for row in figures[-4:]) / 4 > 0.1
    assert all(row["mismatch/mean"] < 1e-5 for row in figures), "the merged copy that samples and the trained adapters"
    (checkpoint,) = checkpoints(tmp_path / "r")
    kept = [name for name in FileSystemReader(checkpoint).read_metadata().state_dict_metadata if "layers" in name]
    assert len(kept) > 28 and all(lora.is_adapter(name) for name in kept), "the base is at model.path"


@pytest.mark.process
def test_two_ranks_agree_with_one(tmp_path):
    """Four prompts in micro-batches of three rows, so that the ranks need unequal numbers of them."""
    same = ("run.iterations=2", "optim.lr=0.003", "log.rollouts_every=0")
    train_small(2, tmp_path / "two", LORA, *same)
    assert main(arguments(1, tmp_path / "one", LORA, *same)) == 0
    one, two = (load_file(tmp_path / name / "adapter" / lora.FILE) for name in ("one", "two"))
    assert_same(one, two, 1e-5)
    assert max(value.abs().max() for name, value in one.items() if "lora_B" in name) > 1e-3
