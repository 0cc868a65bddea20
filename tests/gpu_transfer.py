"""python tests/gpu_transfer.py CASE MODEL FOLDER SERVERS: weights sent by NCCL from GPU 0 to servers on the next GPUs.

A process of its own, since one that hangs in a CUDA call can only be killed. It prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_runs import sampling_config, serving
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm_fixtures import mismatch

from rlkd.config.schema import Config
from rlkd.models.weights import Weights, Whole

CASES = ("publish", "wrong_name", "kill")


def transfer_config(path: str, folder: Path, servers: int) -> Config:
    """A sampler with a server on each of GPU 1, 2 …; they are not restarted."""
    devices = [[1 + i] for i in range(servers)]
    nccl = ("rollout.server.weight_sync=nccl", f"rollout.server.devices={devices}", "rollout.server.restarts=0")
    return sampling_config(path, folder, *nccl, gpus=1 + servers)


class Halfway(Weights):
    """Weights in the middle of which something happens."""

    def __init__(self, tensors: dict[str, Tensor], act: Callable[[], None]) -> None:
        super().__init__(Weights.of(tensors)._parts)
        self._act, self._middle = act, len(tensors) // 2

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(super().__iter__()):
            if number == self._middle:
                self._act()
            yield pair


class Interrupted(Whole):
    """Publishes `Halfway` weights."""

    act: Callable[[], None]

    def checkpoint_weights(self, dtype: torch.dtype, vectors: bool = False) -> Weights:
        """See `Published`."""
        return Halfway(dict(super().checkpoint_weights(dtype, vectors)), self.act)


def main(case: str, path: str, folder: str, servers: str) -> None:
    """See the top of the file."""
    config = transfer_config(path, Path(folder), int(servers))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to("cuda:0").eval()
    found: dict[str, object] = {}
    with serving(config) as sampler:
        for version in (1, 2):
            with torch.no_grad():
                model.get_output_embeddings().weight.normal_(std=2.5 / model.config.hidden_size**0.5)
            began = time.perf_counter()
            sampler.publish(Whole(model.state_dict()), version)
            found[f"publish {version}"] = time.perf_counter() - began
        found["gap"] = mismatch(sampler, model, 2)
        if case != "publish":
            tensors = dict(model.state_dict())
            moments = []
            whole = Interrupted(tensors)
            if case == "wrong_name":
                some = tensors["model.norm.weight"].clone()
                whole = Interrupted({"model.layers.0.no_such.weight": some, **tensors})  # first, so all else follows it

            def act() -> None:
                moments.append(time.perf_counter())
                if case == "kill":
                    os.killpg(sampler.pool.servers[0].pid, signal.SIGKILL)

            object.__setattr__(whole, "act", act)
            try:
                sampler.publish(whole, 3)
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            found["seconds"] = time.perf_counter() - moments[0]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
