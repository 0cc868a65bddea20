"""The servers of one role, as one rank uses them: tracks which are in service and distributes requests."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import tenacity

from rlkd import distributed
from rlkd.config.schema import Config, ServerConfig
from rlkd.distributed import on_every_rank, on_rank_zero
from rlkd.servers.client import ServerError, ServerLost, VLLMClient
from rlkd.servers.command import ServerRole
from rlkd.servers.given import refusal
from rlkd.servers.padding_probe import check_padding
from rlkd.servers.placement import seats
from rlkd.servers.process import VLLMServer, launch, new_key, server_key, wait_ready

Job = TypeVar("Job")
Answer = TypeVar("Answer")

RETRY_S = 5.0
"""Seconds between attempts to revive a lost server while others serve."""


class ServerPool:
    """Servers that all hold the same model. Rank 0 starts them where rlkd launches them; every rank sends requests to
    all.

    A server that fails a request is out of service until `revive` succeeds on it. What `revive` does depends on the
    role: a policy's server must be sent the weights again, a teacher's only has to serve the right model.
    """

    def __init__(self, role: ServerRole, config: ServerConfig, longest: int) -> None:
        """
        Args:
            longest: tokens of the longest request.
        """
        self.role = role
        self.config = config
        self.servers: list[VLLMServer] = []
        """The servers that this process started."""
        self._turns: dict[int, Callable[[], list[VLLMServer]]] = {}
        """turn → starts the servers of that turn; those that have started are no longer here."""
        self.clients: list[VLLMClient] = []
        self._models: dict[str, str] = {}
        """url → the name of its model there."""
        self._longest = longest
        self._lost: dict[str, str] = {}
        """url → what went wrong."""
        self._load: dict[str, int] = {}
        """url → requests under way."""
        self._changed = threading.Condition()
        self._reviving = threading.Lock()
        self._tried = -math.inf
        """When `run` last tried to revive servers."""
        self._key: str | None = None
        self.scores_given = False
        """Whether all servers return the log-probs of given tokens (given.py); `find_route` asks them."""

    # ---- starting and ending ------------------------------------------------------------------------------------

    def start(self, config: Config) -> None:
        """Start the servers that rlkd launches, except those that wait for another one (`Seat.turn`): `open` starts
        them. A collective.

        Raises: RunStopped when one cannot be started.
        """
        servers = [seat for seat in seats(config) if seat.role != "trainer"]
        mine = [seat for seat in servers if seat.role == self.role.name]

        def act() -> None:
            self._key = new_key(self.config)
            for turn in sorted({seat.turn for seat in mine}):
                self._turns[turn] = partial(
                    launch,
                    self.role,
                    self.config,
                    run_dir=config.run_dir,
                    entries=[i for i, seat in enumerate(mine) if seat.turn == turn],
                    slots=(servers.index(mine[0]), len(servers)),
                    key=self._key,
                )
            if 0 in self._turns:
                self.servers = self._turns.pop(0)()

        on_rank_zero(act)

    def open(self, urls: Sequence[str], model: str) -> None:
        """Connect to the launched servers once they answer, otherwise to those at `urls`. A collective.

        Args:
            model: see `VLLMClient.model_card`.

        Raises: RunStopped when one does not start, cannot be reached, or is unsuitable.
        """
        key = server_key(self.config)
        if self.config.launch:
            urls, key = on_rank_zero(lambda: (self._all_ready(), self._key))

        def connect() -> None:
            for url in urls:
                client = VLLMClient(url, self.config.request_timeout_s, key)
                self.clients.append(client)
                self._models[client.url] = client.model_card(model, self._longest)
                self._load[client.url] = 0

        on_every_rank(connect)  # if only one rank failed here, the others would hang in the next line
        on_rank_zero(self._check_padding)

    def _all_ready(self) -> list[str]:
        """The addresses of our servers, once all answer; those of a later turn start when the ones before them do."""
        wait_ready(self.servers)
        for turn in list(self._turns):
            later = self._turns.pop(turn)()
            self.servers += later
            wait_ready(later)
        return [server.url for server in self.servers]

    def _check_padding(self) -> None:
        for client in self.clients:
            check_padding(client, self._models[client.url], self.role.padding, self.role.samples)

    def find_route(self, needed: bool) -> None:
        """Ask each server once whether it scores given tokens; after this, `scores_given` is known. A collective.

        Args:
            needed: whether scores can be had in no other way.

        Raises: RunStopped on every rank if `needed` and a server does not.
        """

        def act() -> bool:
            refusals = [refusal(client, self._models[client.url]) for client in self.clients]
            for why in filter(None, refusals if needed else ()):
                raise ServerError(
                    f"expected a {self.role.name} server that scores given tokens, got one that does not: {why}; use "
                    "vLLM on a GPU with --enable-scale-out (python -m rlkd.serve), or set "
                    "algorithm.divergence.support to teacher"
                )
            return not any(refusals)

        self.scores_given = on_rank_zero(act)

    def close(self) -> None:
        """Stop the servers that we started and close all connections."""
        for server in self.servers:
            server.stop()
        for client in self.clients:
            client.close()
        self.servers, self.clients = [], []

    # ---- service ------------------------------------------------------------------------------------------------

    @property
    def serving(self) -> list[VLLMClient]:
        """The servers in service."""
        return [client for client in self.clients if client.url not in self._lost]

    @property
    def lost(self) -> Mapping[str, str]:
        """url → why the server is out of service."""
        return dict(self._lost)

    def agree(self, lost: Mapping[str, str]) -> None:
        """Adopt another rank's record of which servers are out of service."""
        self._lost = dict(lost)

    def lose(self, client: VLLMClient, why: str) -> None:
        """Take the server out of service and print the reason."""
        with self._changed:
            if client.url not in self._lost:
                print(f"{self.role.name} server {client.url} is out of service: {why}", file=sys.stderr, flush=True)
            self._lost[client.url] = why
            self._changed.notify_all()

    def everywhere(self, act: Callable[[VLLMClient], None], what: str) -> None:
        """Call `act` on all servers in service in parallel. Those on which it fails are taken out of service.

        Args:
            what: the act, for the message.

        Raises: ServerError, of the first that refuses. One that is gone raises nothing.
        """

        def attempt(client: VLLMClient) -> ServerError | None:
            try:
                act(client)
            except ServerError as error:
                self.lose(client, str(error))
                return error
            return None

        serving = self.serving
        with ThreadPoolExecutor(max(1, len(serving))) as threads:
            failures = list(threads.map(attempt, serving))
        for failure in failures:
            if failure is not None and not isinstance(failure, ServerLost):
                raise ServerError(f"{what} failed, and that server is lost: {failure}") from failure

    def revive(self, act: Callable[[VLLMClient], None]) -> None:
        """Put every lost server on which `act` raises no ServerLost back into service. One attempt each."""
        for client in self.clients:
            if client.url in self._lost and client.healthy():
                try:
                    act(client)
                except ServerLost as error:
                    self._lost[client.url] = str(error)
                else:
                    self._lost.pop(client.url, None)
                    print(f"{self.role.name} server {client.url} is in service again", file=sys.stderr, flush=True)

    def await_one(self, act: Callable[[VLLMClient], None]) -> None:
        """`revive` with growing pauses until a server is in service.

        Raises: ServerError when none is after `retry_s`, or when none of our servers will be restarted.
        """

        def attempt() -> bool:
            self.revive(act)
            if not self.serving and self.servers and all(server.ended for server in self.servers):
                self.servers[0].check_alive()
            return bool(self.serving)

        retry_s = self.config.retry_s
        try:
            tenacity.Retrying(
                retry=tenacity.retry_if_result(lambda one: not one),
                stop=tenacity.stop_after_delay(retry_s),
                wait=tenacity.wait_exponential(multiplier=0.25, max=10.0),
            )(attempt)
        except tenacity.RetryError:
            raise ServerError(
                f"no {self.role.name} server came back in {retry_s:g} s (retry_s): {self._why()}"
            ) from None

    def _why(self) -> str:
        return "; ".join(self._lost.values())

    def run(
        self,
        jobs: Sequence[Job],
        act: Callable[[VLLMClient, str, Job], Answer],
        at_once: int,
        reconnect: Callable[[VLLMClient], None] | None,
    ) -> list[Answer]:
        """`act(client, model, job)` for every job, each at one of the servers; the answers in the order of the jobs.

        A job goes to the server with the fewest jobs under way. Jobs beyond the limit of a server wait here, where
        another server may take them. A job whose server is lost is repeated at another.

        Args:
            at_once: the largest number of jobs under way at one server.
            reconnect: called to revive a lost server; when all are lost, this waits for one. None: raises ServerLost.

        Raises: ServerError when a request fails for another reason than a lost server.
        """

        def one(job: Job) -> Answer:
            while True:
                client = self._acquire(at_once, reconnect)
                try:
                    return act(client, self._models[client.url], job)
                except ServerLost as error:
                    self.lose(client, str(error))
                finally:
                    self._release(client)

        if reconnect is not None and self._lost:
            self._try_again(reconnect)
        if len(jobs) == 1:  # in the caller's thread
            return [one(jobs[0])]
        with ThreadPoolExecutor(max(1, min(at_once * len(self.clients), len(jobs)))) as pool:
            try:
                return list(pool.map(one, jobs))
            except ServerError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _try_again(self, reconnect: Callable[[VLLMClient], None]) -> None:
        """`revive` if no other thread is at it, and at most every RETRY_S seconds: each group of an iteration calls."""
        if time.monotonic() < self._tried + RETRY_S or not self._reviving.acquire(blocking=False):
            return
        try:
            self.revive(reconnect)
            self._tried = time.monotonic()
        finally:
            self._reviving.release()

    def _acquire(self, at_once: int, reconnect: Callable[[VLLMClient], None] | None) -> VLLMClient:
        """A server in service with room for one more, once there is one."""
        with self._changed:
            while True:
                serving = self.serving
                if not serving and reconnect is None:
                    raise ServerLost(f"no {self.role.name} server is in service: {self._why()}")
                if not serving and reconnect is not None:
                    self.await_one(reconnect)  # the others wait for the lock meanwhile
                    continue
                # ranks begin with different servers, so that few jobs on many ranks spread too
                first = distributed.rank() % len(serving)
                best = min(serving[first:] + serving[:first], key=lambda client: self._load[client.url])
                if self._load[best.url] < at_once:
                    self._load[best.url] += 1
                    return best
                self._changed.wait()

    def _release(self, client: VLLMClient) -> None:
        with self._changed:
            self._load[client.url] -= 1
            self._changed.notify_all()
