"""Log-probs of a server on a GPU against those of the trainer."""

import time

import pytest
import torch
from gpu_models import tiny_qwen
from gpu_runs import checked, sampling_config, serving
from vllm_fixtures import VOCABULARY, prompts, save_model

from rlkd.generation.sampler import Sampling
from rlkd.models.vocabulary import vocabulary_size
from rlkd.teachers.local import LocalScorer
from rlkd.teachers.served import ServedTeacher
from rlkd.teachers.teacher import ScoreRequest
from rlkd.types import Signal

pytestmark = pytest.mark.gpu

PROMPT = 3 * 2048 + 7
"""Tokens, where 2,048 are prefilled at a time."""
COMPLETION, K = 40, 5


def scorer(path: str, dtype: torch.dtype, vocabulary: int, **more: object) -> LocalScorer:
    return LocalScorer(
        path,
        vocabulary=vocabulary,
        temperature=1.0,
        batch_tokens=32768,
        dtype=dtype,
        accelerator="gpu",
        attention=None,
        trust_remote_code=False,
        **more,
    )


def questions() -> list[ScoreRequest]:
    """Long prompts, random completions, and given tokens with absent ones among them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(32):
        tokens = torch.randint(2, VOCABULARY, (PROMPT + COMPLETION,), generator=generator).tolist()
        given = torch.rand(COMPLETION, VOCABULARY, generator=generator).argsort(-1)[:, :K]
        given[torch.rand(COMPLETION, K, generator=generator) < 0.3] = -1
        found.append(ScoreRequest(tokens[:PROMPT], tokens[PROMPT:], ids=given))
    return found


def test_g2_a_server_scores_long_prompts_as_a_local_model_does(tmp_path, figure):
    """The sampled token by both routes, the top 5 and given tokens, of prompts that are prefilled in four parts."""
    path, asked = save_model(tiny_qwen(0), tmp_path / "model"), questions()
    extra = "[--enforce-eager, --max-num-batched-tokens, '2048']"
    server = f"server: {{launch: true, dtype: float32, memory: 0.3, extra_args: {extra}}}"
    config = checked(
        ["quickstart"],
        [
            *(f"model.path={path}", f"run.dir={tmp_path}", "data.chat_template=false", "trainer.accelerator=gpu"),
            *(f"data.max_prompt_tokens={PROMPT}", f"rollout.max_tokens={COMPLETION}"),
            f"teacher={{backend: served, path: {path}, {server}}}",
        ],
    )
    local, served = scorer(path, torch.float32, VOCABULARY), ServedTeacher(config, config.teacher)
    sampled = Signal()
    # (the figure's name, the signal, whether the server returns an array)
    asks = [
        ("sampled", sampled, True),
        ("sampled by JSON", sampled, False),
        ("top_k", Signal(tier="top_k", k=K), True),
        ("given", Signal(tier="given"), True),
    ]
    torch.cuda.init()
    local.open()
    try:
        served.start()
        served.open()
        assert served.pool.scores_given, "vLLM on a GPU has the V2 runner"
        worst, found, ms = {}, {}, {}
        for name, signal, as_array in asks:
            served.pool.scores_given = as_array
            served.score(asked, signal)  # the first use compiles kernels
            started = time.perf_counter()
            found[name] = served.score(asked, signal)
            ms[name] = (time.perf_counter() - started) * 1000 / (len(asked) * (PROMPT + COMPLETION))
            gaps = [0.0]
            for there, here in zip(found[name], local.score(asked, signal), strict=True):
                gaps.append(float((torch.tensor(there.logprobs) - torch.tensor(here.logprobs)).abs().max()))
                if here.top_logprobs is not None:
                    known = here.top_ids >= 0
                    assert torch.equal(there.top_ids >= 0, known)
                    gaps.append(float((there.top_logprobs - here.top_logprobs.cpu())[known].abs().max()))
            worst[name] = max(gaps)
        routes = [torch.tensor([one.logprobs for one in found[name]]) for name in ("sampled", "sampled by JSON")]
        apart = float((routes[0] - routes[1]).abs().max())
    finally:
        served.close()
    figure(
        "largest |Δ log-prob| in fp32: "
        + ", ".join(f"{name} {gap:.1e} ({ms[name]:.4f} ms a token)" for name, gap in worst.items())
        + f"; both routes of sampled {apart:.1e} apart"
    )
    assert max(worst.values()) < 0.02
    assert apart < 1e-3


@pytest.mark.parametrize("fp32_head", ["false", "true"], ids=["bf16_head", "fp32_head"])
def test_g4_how_far_sampler_and_trainer_differ_in_bf16(fp32_head, qwen, tmp_path, figure):
    """The right value of `rollout.max_mismatch`: 51,200 tokens by a random model of Qwen2.5-0.5B's shape."""
    config = sampling_config(qwen.path, tmp_path, "rollout.max_tokens=128", f"model.fp32_head={fp32_head}")
    vocabulary = vocabulary_size(config.model)
    assert vocabulary == qwen.config.vocab_size
    local = scorer(qwen.saved(), torch.bfloat16, vocabulary, fp32_head=config.model.fp32_head)
    with serving(config) as sampler:
        sampler.keep_loaded()
        how = Sampling(temperature=1.0, max_tokens=128, seed=0)
        rollouts = [one for group in sampler.sample(prompts(100), n=4, iteration=0, sampling=how) for one in group]
    local.open()
    scores = local.score([ScoreRequest(one.prompt.token_ids, one.token_ids) for one in rollouts], Signal())
    gaps = torch.cat(
        [torch.tensor(one.logprobs) - torch.tensor(score.logprobs) for one, score in zip(rollouts, scores, strict=True)]
    )
    size = gaps.abs()
    ordered = size.sort().values
    figure(
        f"{len(gaps)} tokens, random weights: mean |Δ| {size.mean():.4f}, sd {gaps.std():.4f}, "
        f"99 % below {ordered[int(0.99 * len(ordered))]:.4f}, largest {ordered[-1]:.3f}"
    )
    assert len(gaps) > 40_000
    assert 0 < size.mean() < 0.05, "rollout.max_mismatch's default would stop this run"
