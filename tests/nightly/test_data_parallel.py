"""Several copies of the model behind one address, with an API process for each: new weights reach all of them."""

import os
import re
import signal
import socket
import subprocess
import time

import httpx
import pytest
from vllm_fixtures import KEY, MAX_LEN, mismatch, policy_role, run_config, save_model, tiny_model

from rlkd.config.schema import RolloutServerConfig
from rlkd.generation.vllm import VLLMSampler
from rlkd.models.weights import Whole
from rlkd.servers.command import ServerRole, server_command, server_environment

pytestmark = pytest.mark.server


def test_two_copies_serve_every_version(tmp_path):
    path = save_model(tiny_model(0), tmp_path / "model")
    arguments = policy_role(run_config("builtin:student")).arguments
    role = ServerRole(name="policy", model=path, max_model_len=MAX_LEN, arguments=arguments)
    config, port = RolloutServerConfig(launch=True, kv_cache_gb=0.25), free_port()
    url = f"http://127.0.0.1:{port}"
    command = server_command(role, config, host="127.0.0.1", port=port, data_parallel=2)
    environment = server_environment(role, config, host="127.0.0.1", key=KEY, cores="0|1")
    log = tmp_path / "log"
    with open(log, "w", encoding="utf-8") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        until = time.monotonic() + 300
        while not healthy(url):
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1.0)
        sampler = VLLMSampler(run_config(path, url), eos_ids=())
        sampler.open()
        gaps = []
        for version in range(1, 6):
            model = tiny_model(version)
            sampler.publish(Whole(model.state_dict()), version)
            gaps += [mismatch(sampler, model, version) for _ in range(3)]
        sampler.close()
        print(f"mismatch/max of 5 versions: {max(gaps):.1e}")
        assert max(gaps) < 1e-4
        processes = set(re.findall(r"\(ApiServer_(\d) pid", log.read_text()))
        assert processes == {"0", "1"}
        assert {httpx.get(f"{url}/v1/models").status_code for _ in range(8)} == {401}, "each asks for the key"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def healthy(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
