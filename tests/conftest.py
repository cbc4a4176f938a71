"""Fixtures: `case`, every row of the table in scripts.py; `refused`, for what is wrong."""

import pytest
import torch
from scripts import CASES, PYBULLET
from written import contents

torch.set_num_threads(1)
collect_ignore = [] if PYBULLET else ["test_racecar_env.py"]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="random faults and input by the thousand")


def pytest_collection_modifyitems(items):
    for item in items:
        if not PYBULLET and "[gail_racecar" in item.name:  # of pages and scripts
            item.add_marker(pytest.mark.skip(reason="no pybullet"))


@pytest.fixture
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture
def refused(tmp_path, capsys, recwarn):
    """Run a command line that must be refused in one line that holds these words."""

    def run(case, argv, *words):
        before = contents(tmp_path)
        capsys.readouterr()
        try:
            status = case.main(*argv)
        except SystemExit as stopped:  # so do some programs under experts/
            status = stopped.code
        assert status == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not [x for x in recwarn if x.category is RuntimeWarning]  # they are more lines
        assert line.startswith(f"{case.script}.py: ") and len(line) < 700, line
        for word in words:
            assert str(word) in line, line
        assert contents(tmp_path) == before

    return run
