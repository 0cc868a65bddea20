"""Servers that sleep while the student trains, so that both can use the same GPUs (`rollout.server.sleep`).

On POST /sleep, vLLM (0.32, `entrypoints/serve/dev/sleep`) gives the memory of its weights and its cache back. At
level 1 it keeps the weights in main memory. At level 2 it keeps nothing but the model's buffers, so new weights must
follow before anything is sampled. It wakes up in two steps, weights first: new ones can then be loaded before the cache
takes its memory. Until both are awake it holds requests back.

    awake: sample, evaluate → fall_asleep → train → make_room → wake "weights" → publish → wake "kv_cache" → awake
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch

from rlkd import distributed
from rlkd.servers.client import ServerLost, VLLMClient
from rlkd.servers.pool import ServerPool

ARGUMENTS = ("--enable-sleep-mode",)
"""What a server must be started with."""


def fall_asleep(pool: ServerPool, level: int) -> None:
    """Put all servers in service to sleep, in parallel. They must have no requests. One that is gone is out of service.

    Args:
        level: 1 or 2.

    Raises: ServerError, one line, if a server refuses.
    """

    def one(client: VLLMClient) -> None:
        try:
            client.order("/sleep", query={"level": str(level), "mode": "wait"})
        except ServerLost as error:
            pool.lose(client, str(error))

    with ThreadPoolExecutor(max(1, len(pool.serving))) as threads:
        list(threads.map(one, pool.serving))


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
