"""Fixtures: `case`, every row of the table in scripts.py, and `finished`, its run folder."""

import inspect

import gymnasium as gym
import pytest
import torch
from scripts import CASES, PYBULLET, SCRIPTS, TASKS, WATCHERS
from tqdm import tqdm

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # its thread may hold tqdm's lock at the moment that test_faults.py forks


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="test_faults.py: by the hundred")


def pytest_collection_modifyitems(config, items):
    """Deselect the parameters that `applies` rejects: a skip means that more could be run.

    A test that would have none left keeps them, and fails, unless pybullet is missing."""

    def applies(item):
        rules = [mark.args[0] for mark in item.iter_markers("applies")]
        names = [inspect.signature(rule).parameters for rule in rules]
        return all(r(*(item.callspec.params[n] for n in ns)) for r, ns in zip(rules, names))

    kept, left = [], []
    for item in items:
        (kept if applies(item) else left).append(item)
    used = {item.function for item in (kept if PYBULLET else items)}
    for item in left:
        item.runtest = lambda: pytest.fail("`applies` rejects every parameter")
    items[:] = kept + [item for item in left if item.function not in used]
    config.hook.pytest_deselected(items=[item for item in left if item.function in used])


def present(case):
    if not case.path.exists():
        pytest.skip(f"{case.path.name} does not exist yet")
    return case


@pytest.fixture(scope="session", params=CASES, ids=str)
def case(request):
    return present(request.param)


@pytest.fixture(scope="session", params=SCRIPTS, ids=lambda case: case.script)
def script(request):
    """One case of each script."""
    return present(request.param)


@pytest.fixture(scope="session", params=WATCHERS, ids=lambda case: case.script)
def watcher(request):
    """One case of each script that learns from demonstrations."""
    return present(request.param)


@pytest.fixture(scope="session", autouse=True)
def short_walks():
    """Cut the walker's episodes short: with an expert they would last a thousand steps."""
    spec = gym.registry[TASKS["bipedal"].env_id]
    full, spec.max_episode_steps = spec.max_episode_steps, 40
    yield full
    spec.max_episode_steps = full


@pytest.fixture
def long_walks(short_walks, monkeypatch):
    """Episodes of full length, as in a process of its own."""
    monkeypatch.setattr(gym.registry[TASKS["bipedal"].env_id], "max_episode_steps", short_walks)


@pytest.fixture(scope="session")
def finish(tmp_path_factory):
    """Gives the folder of a case's uninterrupted run; all of these runs are made up front."""
    folders = {}
    for case in CASES:
        if case.path.exists():
            folders[case] = tmp_path_factory.mktemp("finished") / str(case)
            case.run(folders[case])
    return folders.get


@pytest.fixture(scope="session")
def finished(case, finish):
    return finish(case)


@pytest.fixture
def quick(finish, monkeypatch):
    """Skip what takes longer than a tiny training run, for tests that compare only weights."""
    for module in {case.module for case in CASES if case.path.exists()}:
        monkeypatch.setattr(module, "draw", lambda *args: None)
        distances = lambda env_id, held_out, samples: dict.fromkeys(samples, 1.0)  # noqa: E731
        monkeypatch.setattr(module, "occupancy_distances", distances)
