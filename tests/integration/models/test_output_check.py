"""The check at loading that rlkd computes a model's own log-probs."""

import json
import shutil

import pytest
import torch
from builders import GRPO, Captured, config
from families import write
from transformers import AutoModelForCausalLM

from rlkd.builtin import resolve
from rlkd.distributed import RunStopped
from rlkd.generation.hf import check_decode
from rlkd.models.output_check import check_output
from rlkd.models.student import blocks, load_causal_lm


def load(path, dtype=torch.float32, attention=None):
    return load_causal_lm(str(path), dtype, attention=attention, trust_remote_code=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_built_in_models_pass_in_every_type(dtype):
    hf = load("builtin:teacher", dtype)
    assert hf.dtype == dtype and not hf.training
    check_decode(hf, "builtin:teacher")


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "falcon_h1"])
def test_a_scale_or_soft_cap_rounds_as_in_the_model_itself(family, tmp_path):
    write(family, tmp_path)
    load(tmp_path, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_output_than_the_config_names_is_refused_in_one_line(dtype):
    hf = load("builtin:student", dtype)
    hf.config.logit_scale = 0.9  # a Llama ignores it
    with pytest.raises(RunStopped) as caught:
        check_output(hf, "builtin:student")
    line = str(caught.value)
    assert "\n" not in line and line.startswith("builtin:student: rlkd computes log-probs from the trunk's last hidden")
    assert "LlamaForCausalLM" in line and "nats" in line


def test_a_model_with_remaining_noise_is_refused(tmp_path):
    write("opt", tmp_path, dropout=0.1)
    noisy = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    with pytest.raises(RunStopped, match="differ by up to"):
        check_output(noisy, "noisy")
    check_output(load(tmp_path).train(), "rates are 0")


def test_the_check_leaves_the_chosen_attention():
    """Flash attention does not run on the CPU in fp32, so the check uses eager attention temporarily."""
    hf = load("builtin:student", attention="flex_attention")
    during = []
    hf.register_forward_pre_hook(lambda module, _: during.append(module.config._attn_implementation))
    check_output(hf, "builtin:student")
    assert set(during) == {"eager"}
    assert hf.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize(("quantised", "where"), [(False, "cpu"), (True, "meta")])
def test_a_quantised_model_is_checked_after_its_move(quantised, where, tmp_path):
    """Most quantised types run on a GPU only. Here the meta device stands for one: nothing can be computed there."""
    shutil.copytree(resolve("builtin:student"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "modeling_watched.py").write_text(WATCHED)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"architectures": ["Watched"], "auto_map": {"AutoModelForCausalLM": "modeling_watched.Watched"}}
    settings["marked_as_quantised"] = quantised
    (tmp_path / "config.json").write_text(json.dumps(settings))
    seen = tmp_path / "seen"

    def load_there():
        device = torch.device("meta")
        load_causal_lm(str(tmp_path), torch.float32, attention=None, trust_remote_code=True, device=device)

    if quantised:
        with pytest.raises(RunStopped, match="which is not what Watched does: "):
            load_there()
    else:
        load_there()
    assert set(seen.read_text().split()) == {where}


WATCHED = """
import os
from transformers import LlamaForCausalLM

class Watched(LlamaForCausalLM):
    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        loaded = super().from_pretrained(folder, *args, **kwargs)
        model = loaded[0]
        model.seen = os.path.join(folder, "seen")
        if model.config.marked_as_quantised:  # after loading, where transformers would look for its quantiser
            model.config.quantization_config = {"quant_method": "made up"}
        return loaded

    def forward(self, *args, **kwargs):
        with open(self.seen, "a") as file:
            file.write(f"{self.device.type}\\n")
        return super().forward(*args, **kwargs)
"""


def test_loading_changes_no_weight_and_no_dropout_free_config():
    ours, plain = load("builtin:student"), AutoModelForCausalLM.from_pretrained(resolve("builtin:student"))
    assert ours.config.to_dict() == plain.config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_dropout_is_zero_wherever_a_config_has_it(tmp_path):
    write("mpt", tmp_path, dropout=0.1)
    found = load(tmp_path).config.to_dict()
    assert found["resid_pdrop"] == found["emb_pdrop"] == found["attn_config"]["attn_pdrop"] == 0


@pytest.mark.parametrize(("family", "each"), [("mbart", 4), ("zamba", 6), ("biogpt", 4), ("gemma2", 4)])
def test_blocks_are_the_layers_none_inside_another(family, each, tmp_path):
    """MBart declares attention as well as its layers; Zamba's hybrid layers contain Mamba's; BioGPT declares none."""
    write(family, tmp_path)
    hf = load(tmp_path)
    found = blocks(hf)
    inside = {id(module) for block in found for module in block.modules() if module is not block}
    assert len(found) == each and not inside & {id(block) for block in found}


@pytest.mark.long
def test_blocks_that_share_weights_are_trained(tmp_path):
    """Zamba's hybrid layers share one transformer, which no single block can own."""
    write("zamba", tmp_path)
    captured = Captured(config(*GRPO, f"model.path={tmp_path}", "model.gradient_checkpointing=true"))
    shared = [gradient for name, gradient in captured.gradients.items() if "shared_transf" in name]
    assert shared and all(gradient.abs().max() > 0 for gradient in shared)


@pytest.mark.long
def test_a_family_without_gradient_checkpointing_is_refused_in_one_line(tmp_path):
    write("openai-gpt", tmp_path)
    with pytest.raises(RunStopped, match="^model.gradient_checkpointing: [^\n]*; set it to false$"):
        Captured(config(*GRPO, f"model.path={tmp_path}", "model.gradient_checkpointing=true"))
