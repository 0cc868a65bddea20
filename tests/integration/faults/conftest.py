"""The run that the faults are compared with."""

import pytest
from runs import arguments, train


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Six iterations of the small run (KDRL, local teacher), without faults."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(arguments(1, folder, "run.iterations=6"), folder.parent)
    return folder
