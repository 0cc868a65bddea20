"""Work for several servers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rlkd import distributed
from rlkd.rollout.client import ServerError, VLLMClient
from rlkd.rollout.server import VLLMServer

Job = TypeVar("Job")
Answer = TypeVar("Answer")


def spread(
    jobs: Sequence[Job],
    act: Callable[[VLLMClient, str, Job], Answer],
    servers: Sequence[VLLMServer],
    clients: Sequence[VLLMClient],
    models: Sequence[str],
    at_once: int,
) -> list[Answer]:
    """`act(client, model, job)` for every job, each at one of the servers; the answers in the order of the jobs.

    Args:
        servers: those that we started, if any.
        clients, models: one of each server, and the name of its model.
        at_once: most requests under way.

    Raises: RuntimeError when a request fails, or that a server of ours has died.
    """

    def one(numbered: tuple[int, Job]) -> Answer:
        # ranks start at different servers, so that few jobs on many ranks spread too
        which = (numbered[0] + distributed.rank()) % len(clients)
        return act(clients[which], models[which], numbered[1])

    with ThreadPoolExecutor(max(1, min(at_once, len(jobs)))) as pool:
        try:
            return list(pool.map(one, enumerate(jobs)))
        except ServerError:
            pool.shutdown(wait=False, cancel_futures=True)
            for server in servers:
                server.check_alive()  # a death says more than a broken connection
            raise
