"""Fixtures: `case`, every row of the table in scripts.py, and `finished`, the folder of its run."""

import pytest
import torch
from scripts import CASES, PYBULLET

torch.set_num_threads(1)
collect_ignore = [] if PYBULLET else ["test_racecar_env.py"]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="random faults and input by the thousand")


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture(scope="session")
def finish(tmp_path_factory):
    """Gives the folder of a case's uninterrupted run."""
    folders = {}

    def folder(case):
        if case not in folders:
            folders[case] = tmp_path_factory.mktemp("finished") / "run"
            case.run(folders[case])
        return folders[case]

    return folder


@pytest.fixture(scope="session")
def finished(case, finish):
    return finish(case)
