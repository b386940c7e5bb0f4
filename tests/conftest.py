import os
from collections.abc import Iterator

# before torch is imported, here and in every process that a test starts: beside other work a second thread mostly waits
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from tests.command_line import CommandLine
from tests.distributed import ProcessPool, import_module

# a busy machine may take any time over an example
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _no_seed_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """`seed_everything` leaves the run's seed in the environment, where the data modules look for it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def two_processes() -> Iterator[ProcessPool]:
    pool = ProcessPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def two_ready_processes(two_processes: ProcessPool, request: pytest.FixtureRequest) -> ProcessPool:
    """Both have imported the test's module, which takes longer than the rest: it gets a time limit of its own."""
    two_processes(import_module, [(request.module.__name__,)] * 2)
    return two_processes


@pytest.fixture(scope="session")
def etflight_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    command = CommandLine(tmp_path_factory.mktemp("command_line"))
    yield command
    command.close()
