"""Every decoder family of transformers has the model's own log-probs in trainer and sampler, or is refused.

The tables are for transformers 5.19. `make test` covers some families, `--soak` all of them.
"""

import numpy as np
import pytest
import torch
from builders import Captured, assert_same, config, opened
from families import FAMILIES, write
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from rlkd.distributed import RunStopped
from rlkd.generation.hf import check_decode, decode
from rlkd.models.logprob_head import token_logprobs
from rlkd.models.output_check import BOUND
from rlkd.models.student import blocks, load_causal_lm

pytestmark = pytest.mark.long

SOME = [
    "bert",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "gemma2",
    "gpt2",
    "llama",
    "llama4_text",
    "mamba",
    "mistral",
    "modernbert-decoder",
    "openai-gpt",
    "opt",
    "qwen2",
    "qwen3_5_text",
    "recurrent_gemma",
    "xlnet",
    "zamba2",
]
UNBUILT = {
    "cohere_compass_text": "its rotary embedding wants settings of its own",
    "emu3": "its text model, which it saves, is unknown to AutoModelForCausalLM",
    "gemma3n": "wants timm",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "mllama": "its text model, which it saves, is unknown to AutoModelForCausalLM",
    "musicgen": "wants a text encoder",
    "musicgen_melody": "wants a text encoder",
    "qwen4_exp": "its default config has no value for what it needs",
    "qwen4_exp_text": "its default config has no value for what it needs",
}
REFUSED = {
    family: why
    for why, families in (
        (
            "differ",
            "bert big_bird camembert data2vec-text electra ernie inkling_text megatron-bert minicpm3 "
            "modernbert-decoder prophetnet rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta "
            "xlm-roberta-xl xmod",
        ),
        ("RuntimeError", "blt"),
        ("not causal", "cpmant xlm xlnet"),
        ("AttributeError", "llama4 llama4_text"),
    )
    for family in families.split()
}
UNSAMPLED = {
    family: why
    for why, families in (
        (
            "with and without a cache differ",
            "bart bigbird_pegasus blenderbot-small deepseek_v4 falcon_mamba git mamba mamba2 marian mbart "
            "moshi mvp nemotron_h pegasus plbart recurrent_gemma rwkv trocr zamba2",
        ),
        ("IndexError", "blenderbot"),
        ("ValueError", "minimax xlstm"),
        ("RuntimeError", "openai-gpt reformer"),
    )
    for family in families.split()
}


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES if metafunc.config.getoption("--soak") else SOME)


def load(folder):
    return load_causal_lm(str(folder), torch.float32, attention=None, trust_remote_code=False)


@torch.no_grad()
def own_logprobs(folder, sequences):
    """Log-probs of all tokens from the model's own logits, loaded by transformers in evaluation mode."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scored = []
    for sequence in sequences:
        ids = torch.tensor([sequence])
        logprobs = plain(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        scored.append(logprobs.gather(1, ids[0, 1:, None]).squeeze(1))
    return scored


def test_logprobs_are_the_models_own_trained_and_sampled_or_it_is_refused(family, tmp_path):
    if family in UNBUILT:
        with pytest.raises(
            (ImportError, AttributeError, TypeError, ValueError, RuntimeError, StrictDataclassError)
        ) as failed:
            write(family, tmp_path)
            load(tmp_path)
        assert not isinstance(failed.value, RunStopped), "built, but refused: it belongs in REFUSED"
        return
    write(family, tmp_path, dropout=0.1)
    if family in REFUSED:
        with pytest.raises(RunStopped, match=r"^[^\n]*: rlkd computes log-probs from [^\n]*$") as caught:
            load(tmp_path)
        assert REFUSED[family] in str(caught.value)
        return
    hf = load(tmp_path)
    for block in blocks(hf):
        block.training = True  # as gradient checkpointing needs it
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 90, (2, 24), generator=generator)
    with torch.no_grad():
        hidden = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours, _ = token_logprobs(hidden, hf.get_output_embeddings(), ids, temperature=1.0, config=hf.config)
    own = torch.stack(own_logprobs(tmp_path, ids.tolist()))
    assert (ours[:, 1:] - own).abs().max() < BOUND
    assert blocks(hf) or not hf.supports_gradient_checkpointing
    hf.eval()
    if family in UNSAMPLED:
        with pytest.raises(RunStopped, match=r"^[^\n]*in process: [^\n]*rollout.backend: vllm[^\n]*$") as caught:
            check_decode(hf, str(tmp_path))
        assert UNSAMPLED[family] in str(caught.value)
        return
    check_decode(hf, str(tmp_path))
    prompts = [torch.randint(2, 90, (n,), generator=generator).tolist() for n in (13, 4, 21)]
    noise = np.random.default_rng(0).random((3, 14))
    completions = decode(hf, len(hf.get_output_embeddings().weight), prompts, noise, 1.0, ends=range(5, 95, 10))
    rows = list(zip(prompts, completions, strict=True))
    for (prompt, row), own_of_row in zip(
        rows, own_logprobs(tmp_path, [[*prompt, *row.token_ids] for prompt, row in rows]), strict=True
    ):
        assert (own_of_row[len(prompt) - 1 :] - torch.tensor(row.logprobs)).abs().max() < BOUND


@pytest.mark.parametrize("name", ["opt", "falcon"])
def test_gradient_checkpointing_drops_nothing(name, tmp_path):
    """The blocks of these families call functional dropout themselves, with the rate of the config."""
    write(name, tmp_path, dropout=0.1)
    options = (f"model.path={tmp_path}", "data.completion_column=answer", "data.max_completion_tokens=32")
    options += ("data.limit=16", "rollout.prompts=4", "log.rollouts_every=0", "optim.max_grad_norm=1000000.0")
    sft = config(*options, "algorithm={name: sft}", "teacher=null", group_size=None)
    loader = opened(sft)
    try:
        batch = loader.batch(0)
    finally:
        loader.close()
    plain = Captured(sft, batch)
    checkpointed = Captured(
        config(*options, "model.gradient_checkpointing=true", "algorithm={name: sft}", "teacher=null", group_size=None),
        batch,
    )
    assert checkpointed.row["loss"] == pytest.approx(plain.row["loss"], abs=1e-6)
    assert_same(checkpointed.gradients, plain.gradients, 1e-6)
