"""A tiny model and one real vLLM server for all tests of a session."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlkd.config.schema import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    NoTeacherConfig,
    RolloutConfig,
    RolloutServerConfig,
    RunConfig,
    ServedTeacherConfig,
)
from rlkd.generation.sampler import Sampling
from rlkd.generation.vllm import VLLMSampler, policy_role
from rlkd.servers.command import ServerRole
from rlkd.servers.process import VLLMServer, cpu_cores
from rlkd.types import Prompt

VOCABULARY = 60  # vLLM pads it to 64: a padded vocabulary must not disturb anything
EOS = 1
MAX_LEN = 96
KEY = "the tests' key"
os.environ["RLKD_SERVER_KEY"] = KEY  # for servers that tests start themselves


def tiny_model(seed: int, tied: bool = True) -> LlamaForCausalLM:
    """A random fp32 model whose logits spread over several nats, so that a wrong weight shows."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LEN,
        tie_word_embeddings=tied,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def save_model(model: PreTrainedModel, directory: Path) -> str:
    """Save the model with a tokenizer that has one character per token."""
    model.save_pretrained(directory)
    save_tokenizer(model.config.vocab_size, directory)
    return str(directory)


def save_tokenizer(vocabulary: int, directory: Path) -> None:
    """Save a tokenizer of `vocabulary` tokens, of which the first are one character each; no text has the others."""
    words = {"<pad>": 0, "<eos>": EOS} | {chr(48 + i) if i < 1000 else f"<{i}>": i for i in range(2, vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)


def true_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """[len(completion)] fp32, on the CPU, by a plain transformers forward where the model is."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()


def own_address() -> str:
    """An address of this machine that others can reach; loopback if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(("192.0.2.1", 9)) != 0:  # a datagram socket: nothing is sent
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def start_server(
    name: str, model: str, log_dir: Path, host: str = "127.0.0.1", restarts: int = 0, **environment: str
) -> VLLMServer:
    """A policy server with the file engine; the caller waits for it and stops it."""
    role = ServerRole(
        name=name,
        model=model,
        max_model_len=MAX_LEN,
        arguments=policy_role(run_config("builtin:student")).arguments,  # the same for every model
        environment=environment,
    )
    config = RolloutServerConfig(launch=True, host=host, start_timeout_s=300.0, restarts=restarts)
    return VLLMServer(role, config, key=KEY, log_dir=log_dir, cores=cpu_cores(0, 1))


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tiny_model(0), tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def policy_server(policy_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """Serves tiny_model(0) at the start. Tests publish the weights they need and must not assume any."""
    server = start_server(
        "policy", policy_path, tmp_path_factory.mktemp("logs"), host=own_address(), VLLM_LOGGING_LEVEL="INFO"
    )
    server.wait_ready()
    yield server
    server.stop()


def run_config(policy_path: str, *urls: str, max_tokens: int = 24, run_dir: str = "runs") -> Config:
    """A config that uses the given servers as sampler and the first one as teacher; without any, it starts its own."""
    server = RolloutServerConfig(urls=list(urls), launch=not urls, start_timeout_s=300.0)
    return Config(
        run=RunConfig(dir=run_dir),
        model=ModelConfig(path=policy_path),
        data=DataConfig(path="unused.jsonl", max_prompt_tokens=32),
        algorithm=AlgorithmConfig(name="none"),
        rollout=RolloutConfig(backend="vllm", max_tokens=max_tokens, server=server),
        teacher=ServedTeacherConfig(backend="served", path=policy_path, url=urls[0]) if urls else NoTeacherConfig(),
    )


def prompts(count: int) -> list[Prompt]:
    """Prompts of different lengths and tokens."""
    ids = [[2 + (7 * i + 3 * t) % (VOCABULARY - 2) for t in range(3 + i % 5)] for i in range(count)]
    return [Prompt(id=f"p{i}", messages=(), token_ids=tuple(tokens)) for i, tokens in enumerate(ids)]


SAMPLING = Sampling(temperature=1.0, max_tokens=16, seed=0)


def mismatch(sampler: VLLMSampler, model: PreTrainedModel, version: int) -> float:
    """Largest |log-prob by server − by model| on fresh samples, all of which must be of `version`."""
    worst = 0.0
    for group in sampler.sample(prompts(4), n=4, iteration=0, sampling=SAMPLING):
        for rollout in group:
            assert [span.version for span in rollout.weight_versions] == [version]
            truth = true_logprobs(model, rollout.prompt.token_ids, rollout.token_ids)
            worst = max(worst, float((torch.tensor(rollout.logprobs) - truth).abs().max()))
    return worst


def opened(policy_path: str, server: VLLMServer) -> VLLMSampler:
    sampler = VLLMSampler(run_config(policy_path, server.url), eos_ids=[EOS])
    sampler.open()
    return sampler
