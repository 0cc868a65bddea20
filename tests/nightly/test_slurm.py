"""The Slurm script with stand-ins for Slurm's programs: which role gets which machine, and how the job ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from launch_scripts import CONFIG, OVERRIDES, assert_known, assert_snapshot, with_python

# Slurm's programs as far as the script uses them. A job step that serves runs until it is stopped; one that trains
# prints what it would run, and then ends immediately or when it is signalled.
STUBS = {
    "scontrol": 'if [[ $1 = show ]]; then tr "," "\n" <<<"$3"; else echo "scontrol $*"; fi',
    "squeue": 'echo "7.0 policy"; echo "7.1 teacher"; echo "7.2 trainer"',
    "scancel": 'echo "scancel $*"; touch "$STUBS/signalled"',
    # A server is healthy once it has printed its role; otherwise the job may end before all have.
    "curl": """
host=${*: -1}; host=${host#http://}; host=${host%%:*}
for ((i = 0; i < 400; i++)); do [[ -e $STUBS/up-$host ]] && exit 0; sleep 0.05; done
exit 1
""",
    "srun": """
echo "$RLKD_SERVER_KEY" > "$STUBS/key"
while [[ $1 = --* ]]; do step+=("$1"); shift; done
DRY_RUN=1 "$@"
for option in "${step[@]}"; do [[ $option = --nodelist=* ]] && up=${option#--nodelist=}; done
touch "$STUBS/up-$up"
if [[ ${step[0]} != --job-name=trainer ]]; then [[ -n ${SERVERS_DIE:-} ]] || exec sleep 100; exit 3; fi
while [[ -n ${TRAINS_ON:-} && ! -e "$STUBS/signalled" ]]; do sleep 0.1; done
exit "${TRAINER_EXIT:-0}"
""",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A fake Slurm with two trainers, two policy servers and a teacher's server."""
    found = with_python(tmp_path, STUBS) | {"STUBS": str(tmp_path), "SLURM_JOB_ID": "7"}
    found |= {"SLURM_JOB_NODELIST": "n0,n1,n2,n3,n4", "SLURM_GPUS_PER_NODE": "8"}
    return found | {"TRAINER_NODES": "2", "POLICY_NODES": "2", "TEACHER_NODES": "1"}


class Job:
    """Run the batch script with real job steps."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._output = folder / "output.txt"
        command = ["launch/slurm.sbatch", *CONFIG, *OVERRIDES]
        with open(self._output, "w") as output:
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait(self) -> int:
        return self._process.wait(30)

    def signal_when_it_says(self, text: str, number: int) -> None:
        deadline = time.monotonic() + 30
        while text not in self.output:
            assert self._process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.05)
        self._process.send_signal(number)

    def end(self) -> None:
        """End the job with all its remaining steps, as Slurm does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def slurm(environment: dict[str, str], tmp_path: Path) -> Iterator:
    """Starts a job."""
    jobs: list[Job] = []

    def start(**more: str) -> Job:
        (folder := tmp_path / f"job{len(jobs)}").mkdir()
        jobs.append(Job(environment | more, folder))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def test_slurm_gives_each_role_its_machines_and_ends_with_the_trainers(environment, slurm, monkeypatch):
    job = slurm(TEACHER_TENSOR_PARALLEL="8")
    assert job.wait() == 0, job.output
    steps = sorted(job.output.splitlines(keepends=True))  # servers start side by side
    assert_snapshot("slurm", "".join(steps))
    key = Path(environment["STUBS"], "key").read_text().strip()
    assert len(key) == 32 and key not in job.output
    monkeypatch.setenv("RLKD_SERVER_KEY", key)
    for line in steps:
        if not line.startswith("srun"):
            assert_known(line)


def test_slurm_near_the_time_limit_signals_the_trainers_alone_and_queues_the_job_again(slurm):
    job = slurm(TRAINS_ON="1", TRAINER_EXIT="1")
    job.signal_when_it_says("rlkd.train", signal.SIGUSR1)  # as --signal=B:USR1@900 does, to the batch script
    assert job.wait() == 0, job.output
    said = [line for line in job.output.splitlines() if line.startswith(("scancel", "scontrol"))]
    assert said == ["scancel --signal=TERM 7.2", "scontrol requeue 7"]


def test_slurm_ends_with_the_trainers_own_exit_code(slurm):
    assert slurm(TRAINER_EXIT="4").wait() == 4
    job = slurm(POLICY_NODES="1")
    assert job.wait() == 2
    assert "expected TRAINER_NODES + POLICY_NODES + TEACHER_NODES = 2 + 1 + 1, got 5" in job.output


def test_slurm_ends_with_a_server(slurm):
    job = slurm(SERVERS_DIE="1", TRAINS_ON="1")
    assert job.wait() == 1 and "a server exited during the run" in job.output
