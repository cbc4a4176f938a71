"""Random flags and files: a script ends with status 0, 1 or 2, and never with a traceback."""

import contextlib
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from hypothesis.extra import numpy as arrays
from scripts import AGGREVATED, BC, PPO, demos, expert

FLAGS = {
    PPO: ["--num-envs", "--num-steps", "--gamma", "--clip", "--reward", "--control", "--num-pairs"],
    BC: ["--batch-size", "--learning-rate", "--num-demos", "--demos", "--seed", "--env-id"],
    AGGREVATED: ["--expert", "--noise", "--anchor", "--caution", "--switch"],
}
COMMON = ["--out", "--resume", "--evaluate", "--device", "--eval-every", "--total-steps"]
COSTLY = ("--total-steps", "--num-envs", "--num-steps")
NUMBERS = some.integers(-5, 40) | some.integers() | some.floats(-2, 2) | some.floats()
LETTERS = some.characters(exclude_characters="/~.\0", exclude_categories=["Cs"])  # in the folder
KNOWN = some.sampled_from(["yes", "none", "airl", "reinforce", "cuda", "Toy-v0", "demos.npz"])
VALUE = NUMBERS.map(str) | some.text(LETTERS, max_size=9) | KNOWN


@pytest.fixture
def example(pytestconfig):
    """Calls the decorated function with random arguments, 50 times or 2,000."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    long = pytestconfig.getoption("--long")
    plan = {"max_examples": 2_000 if long else 50, "derandomize": not long, "database": None}
    limit = settings(deadline=None, suppress_health_check=checks, **plan)
    return lambda **arguments: lambda function: limit(given(**arguments)(function))()


def ends_well(case, argv, capsys):
    capsys.readouterr()
    status = case.main(*argv)
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.startswith(f"{case.script}.py: ")]
    assert status in (0, 1, 2) and len(lines) == (status != 0), argv


@pytest.mark.parametrize("case", FLAGS, ids=str)
def test_any_flags(case, example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = case.argv("--out", "run", iterations=1)
    flag = some.tuples(some.sampled_from(FLAGS[case] + COMMON), VALUE)
    cheap = flag.filter(lambda x: x[0] not in COSTLY or len(x[1]) < 3)

    @example(flags=some.lists(cheap, max_size=3))
    def any_flags(flags):
        ends_well(case, [*tiny, *(f"{name}={value}" for name, value in flags)], capsys)
        for path in tmp_path.iterdir():
            shutil.rmtree(path, ignore_errors=True)


DTYPES = arrays.scalar_dtypes() | arrays.unicode_string_dtypes() | arrays.byte_string_dtypes()
SHAPES = some.sampled_from([(288, 3), (288,), (24,), (), (1,), (0, 3), (287, 3), (3, 288)])
FIELDS = ["observations", "actions", "episode_starts", "terminated", "rewards", "metadata"]


def test_any_demonstrations(example, tmp_path, capsys):
    """An array is cast to another type, laid out in another order, or has one value all over."""
    good, path = dict(np.load(demos("Toy-v0"))), tmp_path / "demos.npz"

    @example(name=some.sampled_from(FIELDS), dtype=DTYPES, shape=SHAPES, data=some.data())
    def any_array(name, dtype, shape, data):
        value = data.draw(arrays.from_dtype(dtype))
        array = np.full(data.draw(some.sampled_from([shape, good[name].shape])), value, dtype)
        if data.draw(some.booleans()):
            with contextlib.suppress(ValueError), np.errstate(all="ignore"):
                array = good[name].astype(dtype, order="F")
        np.savez(path, **{**good, name: array})
        argv = BC.argv("--demos", path, "--out", tmp_path / "run", "--total-steps", 1)
        ends_well(BC, argv, capsys)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


OTHER = [None, True, -1, 2**40, 0.5, float("nan"), "x", b"x", [], {}, [[1]], {"x": 1}]
OTHER += [torch.tensor(float("nan")), torch.zeros(3, 4), torch.zeros(0), torch.zeros(2).char()]
FILES = {"policy": BC, "checkpoint": PPO, "expert": AGGREVATED}


def places(content, path=()):
    """The paths of all that is in a nest of dicts and lists."""
    kinds = {dict: lambda: content, list: lambda: range(len(content))}
    for key in kinds.get(type(content), list)():
        yield (*path, key)
        yield from places(content[key], (*path, key))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of networks without a neuron
@pytest.mark.parametrize("kind", FILES)
def test_any_change_to_what_torch_wrote(kind, example, tmp_path, capsys, pytestconfig):
    """A value is replaced or removed somewhere in it. A checkpoint that loads takes time."""
    if kind == "checkpoint" and not pytestconfig.getoption("--long"):
        pytest.skip("needs --long")
    case = FILES[kind]
    folder = shutil.copytree(case.finished, tmp_path / "run")
    path = folder / f"{kind}.pt"
    if kind == "expert":
        shutil.copy(expert(case.env_id), path)
    evaluate = ["--evaluate", path, "--eval-episodes", 2]
    argv = {"policy": evaluate, "checkpoint": ["--resume", folder]}
    argv["expert"] = AGGREVATED.argv("--out", tmp_path / "new", "--expert", path, iterations=1)
    original = path.read_bytes()
    found = list(places(torch.load(path, weights_only=True)))
    if kind == "checkpoint":  # whose counters and settings are taken at their word
        found = [place for place in found if place[0] == "parts"]

    @example(place=some.sampled_from(found), value=some.sampled_from(OTHER), less=some.booleans())
    def any_change(place, value, less):
        path.write_bytes(original)
        content = parent = torch.load(path, weights_only=True)
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
        if less:
            del parent[place[-1]]
        torch.save(content, path)
        ends_well(case, argv[kind], capsys)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
