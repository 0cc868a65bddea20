"""A sampler from a user's file, which answers by an hf sampler of its own, is built by its name and trains the same."""

import sys

import pytest
import torch
from builders import config, real_batch
from lines import one_line
from packages import install

from rlkd.config_file import ConfigError
from rlkd.distributed import RunStopped
from rlkd.pipeline.build import build_sampler

SOURCE = """
from rlkd.generation.hf import HFSampler

class Asks:
    in_process = True

    def __init__(self, config, ends):
        self.asked, self.hf = [], HFSampler(config, ends)

    def sample(self, prompts, **how):
        self.asked += prompts
        return self.hf.sample(prompts, **how)

    def __getattr__(self, name):
        return getattr(self.hf, name)

class Half:
    def __init__(self, config, ends):
        pass

    def sample(self, prompts, **how):
        pass
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    install(tmp_path, "plg-sampler", {"rlkd.samplers": {"asks": "plg_sampler:Asks", "torn": "plg_nowhere:X"}}, SOURCE)


def sampled(backend: str):
    return real_batch(config(f"rollout={{backend: '{backend}', prompts: 4, max_tokens: 8}}", "teacher=null", *GRPO))


GRPO = ("algorithm={name: grpo, group_size: 4}",)


@pytest.mark.parametrize("name", ["plg_sampler:Asks", "asks"])
def test_it_samples_for_the_line(site, name):
    own, ours = sampled(name), sampled("hf")
    for tensor in ("input_ids", "sampler_logprobs", "advantages"):
        torch.testing.assert_close(getattr(own, tensor), getattr(ours, tensor), rtol=0, atol=0, equal_nan=True)


def test_what_it_lacks_and_what_is_no_sampler_is_one_line(site):
    with pytest.raises(RunStopped, match=one_line("plg_sampler:Half", "in_process, start, open, publish")):
        build_sampler(config("rollout.backend=plg_sampler:Half"))
    wrong = {
        "plg_sampler:Asked": ("no class Asked", "did you mean Asks?"),
        "torn": ("plg-sampler 1.0", "No module named 'plg_nowhere'"),
        "askes": ("hf | vllm | asks | torn | module:Class", "got 'askes'; did you mean asks?"),
    }
    for name, parts in wrong.items():
        with pytest.raises(ConfigError, match=one_line("rollout.backend", name, *parts)):
            config(f"rollout.backend={name}")
