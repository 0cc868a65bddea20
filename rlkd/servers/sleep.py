"""Servers that sleep while the student trains, so that both can use the same GPUs (`rollout.server.sleep`).

On POST /sleep, vLLM (0.32, `entrypoints/serve/dev/sleep`) gives the memory of its weights and its cache back. At
level 1 it keeps the weights in main memory. At level 2 it keeps nothing but the model's buffers, so new weights must
follow before anything is sampled. It wakes up in two steps, weights first: new ones can then be loaded before the cache
takes its memory. Until both are awake it holds requests back.

    awake: sample, evaluate → fall_asleep → train → make_room → wake "weights" → publish → wake "kv_cache" → awake
"""

from __future__ import annotations

from typing import Literal

import torch

from rlkd import distributed
from rlkd.servers.client import VLLMClient

ARGUMENTS = ("--enable-sleep-mode",)
"""What a server must be started with."""


def fall_asleep(client: VLLMClient, level: int) -> None:
    """Take a server's memory from it. It must have no requests.

    Args:
        level: 1 or 2.

    Raises: ServerLost, ServerError.
    """
    client.order("/sleep", query={"level": str(level), "mode": "wait"})


def wake(client: VLLMClient, part: Literal["weights", "kv_cache"]) -> None:
    """Give a server the memory of one part back. Does nothing where it is awake, for example after a restart.

    A server that is awake also stops to hold requests back, so wake it before `/pause`, not after.

    Raises: ServerLost, ServerError, for example if the GPU has too little memory left.
    """
    client.order("/wake_up", query={"tags": part})


def make_room() -> None:
    """Return the memory that torch keeps for later to the GPU, on every rank. A collective."""
    torch.cuda.empty_cache()
    distributed.barrier()
