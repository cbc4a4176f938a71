"""Faults by the hundred: runs killed, interrupted and robbed of their disk, files with any damage.

    python -m pytest -m faults              the short form, which the suite has too
    python -m pytest -m faults -n 0 --long  the long form, which docs/reliability.md reports

Every run is a fork of this process, which has imported everything already: started anew, each would
take some seconds. The long form writes what it counted into benchmark/results/reliability.json.
"""

import contextlib
import copy
import gc
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import ROOT, falling_expert, finite, same, weights
from test_bad_input import Payload
from tqdm import tqdm

pytestmark = pytest.mark.faults
RESULT = ROOT / "benchmark" / "results" / "reliability.json"
COMMAND = "python -m pytest -m faults -n 0 --long"


@pytest.fixture
def long(request):
    return request.config.getoption("--long")


@pytest.fixture
def report(script, long):
    """Put a line into the result of the long form."""

    def add(what, **figures):
        if long:
            rows = json.loads(RESULT.read_text())["table"] if RESULT.exists() else []
            about = {"what": what, "script": f"{script.script}.py"}
            rows = [row for row in rows if {k: row[k] for k in about} != about]
            rows.append({**about, "figures": ", ".join(f"{v} {k}" for k, v in figures.items())})
            rows.sort(key=lambda row: row["what"])
            RESULT.write_text(json.dumps({"command": COMMAND, "table": rows}, indent=1))

    return add


class Fork:
    """A function in a fork of this process; what it prints goes into a file."""

    def __init__(self, function, *args, printed):
        self.printed = printed
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                with open(printed, "w") as file:
                    os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(i, "w", closefd=False) for i in (1, 2))
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.write(writing, b"!")
                status = function(*args)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)

    def wait(self, seconds=120):
        """The exit status, or minus the number of the signal; None if it is still running."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def text(self):
        return self.printed.read_text()


@pytest.fixture(scope="session")
def begin(script, tmp_path_factory):
    """Starts a command line in a fork."""
    printed = tmp_path_factory.mktemp("printed") / "printed.txt"

    def start(argv, before=lambda: None):
        def main():
            before()
            script.module.Run.latest = None  # as in a process of its own
            return script.module.main([str(argument) for argument in argv])

        return Fork(main, printed=printed)

    return start


@pytest.fixture(scope="session")
def argv(script, tmp_path_factory):
    """The command line of a run with many checkpoints, and an expert that soon falls."""
    file = tmp_path_factory.mktemp("expert") / "expert.zip"
    expert = [] if script.task.demos else ["--expert", falling_expert(file)]
    every = {"env_steps": 50, "updates": 20, "iterations": 1}.get(script.module.CLOCK, 1)

    def make(folder, *flags):
        return script.argv(folder, "--eval-every", every, *expert, *flags, budget=2 * script.full)

    return make


@pytest.fixture(scope="session")
def whole(begin, argv, tmp_path_factory):
    """The folder of an uninterrupted run, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    began, run = time.monotonic(), begin(argv(folder))
    assert run.wait() == 0, run.text()
    return folder, time.monotonic() - began


def readable(script, folder):
    return finite(script.module.read_checkpoint(folder / "checkpoint.pt"))


STOPS = {"kill -9": (signal.SIGKILL, 2, 50), "Ctrl-C": (signal.SIGINT, 1, 20)}


@pytest.mark.parametrize("name", STOPS)
def test_stopped_at_random_moments(name, script, begin, argv, whole, tmp_path, quick, long, report):
    number, short, many = STOPS[name]
    policy, seconds = weights(whole[0]), whole[1]
    rng, folder = np.random.default_rng(number), tmp_path / "run"
    stops = finished = restarted = 0
    while stops < (many if long else short):
        if not (folder / "checkpoint.pt").exists():  # stopped before there was anything to keep
            restarted += folder.exists()
            shutil.rmtree(folder, ignore_errors=True)
        resumed, began = folder.exists(), time.monotonic()
        run = begin(["--resume", folder] if resumed else argv(folder))
        status = run.wait(rng.uniform(0.005, seconds))
        if status is None:
            stops += 1
            run.send(number)
            status = run.wait()
        if number == signal.SIGINT and status != 0:
            assert status == 130 and "Traceback" not in run.text(), run.text()
            if f"--resume {folder}" not in run.text():
                assert "as before" in run.text()
        else:
            assert status in (0, -number), run.text()
        if (folder / "checkpoint.pt").exists():
            assert readable(script, folder)
        if status == 0:
            finished += 1
            seconds = seconds if resumed else min(seconds, time.monotonic() - began)
            assert same(weights(folder), policy)
            shutil.rmtree(folder)
    if folder.exists() and (folder / "checkpoint.pt").exists():
        run = begin(["--resume", folder])
        assert run.wait() == 0, run.text()
        assert same(weights(folder), policy)
        finished += 1
    figures = {"stops": stops, "runs that ended with the uninterrupted run's bits": finished}
    report(f"{name} at random moments", **figures, **{"stopped before a checkpoint": restarted})


def one_line(run, status=1):
    assert run.wait() == status, run.text()
    lines = [line for line in run.text().splitlines() if not line.startswith("expert  ")]
    assert len(lines) == 1, run.text()
    return lines[0]


def limit_files(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_disk_full(begin, argv, whole, tmp_path, quick, long, report):
    """No file may grow beyond a random size, into which some, none or all checkpoints fit."""
    policy = weights(whole[0])
    largest = (whole[0] / "checkpoint.pt").stat().st_size
    rng, stopped = np.random.default_rng(0), 0
    for i in range(20 if long else 1):
        folder, size = tmp_path / f"run{i}", int(rng.uniform(0.2, 1) * largest)
        run = begin(argv(folder), partial(limit_files, size))
        assert "File too large" in one_line(run)
        stopped += 1
        if (folder / "checkpoint.pt").exists():
            again = begin(["--resume", folder])
            assert again.wait() == 0, again.text()
            assert same(weights(folder), policy)
    report("a file-size limit", stopped=stopped)


def test_a_folder_that_cannot_be_written(begin, argv, quick):
    """Not even by root."""
    assert "/proc/runs" in one_line(begin(argv(Path("/proc/runs/run"))))


def test_the_run_folder_disappears(script, begin, argv, tmp_path, quick):
    folder = tmp_path / "run"
    run = begin(argv(folder, script.budget, 10**7))
    while not (folder / "checkpoint.pt").exists():
        assert run.wait(0.01) is None, run.text()
    while folder.exists():  # it may be writing a file there
        shutil.rmtree(folder, ignore_errors=True)
    assert str(folder) in one_line(run)


def test_the_run_folder_disappears_after_its_first_checkpoint(script, begin, argv, tmp_path, quick):
    """Nothing recreates it: a run without its settings could not be resumed."""
    folder, save = tmp_path / "run", script.module.Run.save

    def save_and_lose(run):
        save(run)
        shutil.rmtree(folder)
        script.module.Run.save = save

    run = begin(argv(folder), lambda: setattr(script.module.Run, "save", save_and_lose))
    assert str(folder) in one_line(run)
    assert not folder.exists()


class Silence:
    """In place of TensorBoard's writer."""

    def __init__(self, *args, **kwargs):
        self.add_scalar = self.close = lambda *args: None


def test_looking_on_changes_nothing(script, argv, begin, whole, tmp_path, quick, monkeypatch):
    """Without TensorBoard, and with the progress bar that a terminal would show."""

    def bar(**settings):
        return tqdm(**{**settings, "disable": False})

    monkeypatch.setattr(script.module, "SummaryWriter", Silence)
    monkeypatch.setattr(script.module, "tqdm", bar)
    run = begin(argv(tmp_path / "run"))
    assert run.wait() == 0 and script.module.CLOCK in run.text()
    assert same(weights(tmp_path / "run"), weights(whole[0]))
    assert not list((tmp_path / "run").glob("events*"))


# --- racecar_env.py's own recordings --------------------------------------------------------------


def recording(path, episodes, before=lambda: None):
    """Record laps of the controller, in a process of its own."""
    pytest.importorskip("pybullet")
    command = [sys.executable, ROOT / "racecar_env.py", "--record-demos", path]
    command += ["--episodes", str(episodes)]

    def begin():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()

    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=begin)


def test_a_recording_that_finds_the_disk_full(tmp_path):
    process = recording(tmp_path / "laps.npz", 2, partial(limit_files, 2_000))
    (line,) = [x for x in process.communicate(timeout=60)[1].splitlines() if "racecar_env.py:" in x]
    assert process.returncode == 2 and "File too large" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_recording_that_is_stopped(number, status, tmp_path):
    process = recording(tmp_path / "laps.npz", 100_000)
    while "pybullet" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(2)  # it drives
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == status and "Traceback" not in error
    assert not (tmp_path / "laps.npz").exists()


# --- damaged files --------------------------------------------------------------------------------


def damage(data, rng):
    """Damage bytes in one of several ways."""
    data, at = bytearray(data), int(rng.integers(len(data)))
    count = int(rng.integers(1, 64))
    way = rng.integers(6)
    if way == 0:
        del data[at:]
    elif way == 1:
        del data[at : at + count]
    elif way == 2:
        data[at:at] = rng.bytes(count)
    elif way == 3:
        data[at : at + count] = bytes(min(count, len(data) - at))
    elif way == 4:  # a number of the format, perhaps a size
        at = int(rng.integers(max(len(data) - 8, 1)))
        sizes = [b"\xff" * 8, b"\xff\xff\xff\x7f\0\0\0\0", b"\0" * 8]
        data[at : at + 8] = sizes[rng.integers(3)]
    else:
        for _ in range(int(rng.integers(1, 9))):
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(data)


VALUES = [
    None,
    True,
    -1,
    30_000,
    2**62,
    0.5,
    float("nan"),
    "x",
    "x" * 10_000,
    b"x",
    [],
    {},
    [[]],
    {"x": 1},
]
VALUES += [torch.tensor(float("nan")), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int8)]
VALUES += [torch.zeros(1).expand(10**7)]


def places(content, path=()):
    """The path of every leaf and every branch in a nest of dicts and lists."""
    yield path
    if isinstance(content, dict | list | tuple):
        keys = content if isinstance(content, dict) else range(len(content))
        for key in keys:
            yield from places(content[key], (*path, key))


def swap_value(content, rng, *more):
    """`content` with a random place of its nest removed, or one of VALUES or `more` put there."""
    content = copy.deepcopy(content)
    found = list(places(content))
    path = found[rng.integers(1, len(found))]
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if isinstance(parent, tuple):
        return content
    if isinstance(parent[path[-1]], torch.Tensor) and rng.random() < 0.3:
        tensor = parent[path[-1]]
        ways = [tensor * float("nan"), tensor.to(torch.float64), tensor[:0] if tensor.ndim else 0]
        parent[path[-1]] = ways[rng.integers(3)]
    elif rng.random() < 0.2:
        del parent[path[-1]]
    else:
        values = [*VALUES, *more]
        parent[path[-1]] = values[rng.integers(len(values))]
    return content


def huge(path, rng):
    """An .npz with one array that claims to be many terabytes."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name, header = rng.choice(list(members)), io.BytesIO()
    kind = rng.choice(["<f4", "|b1", "<U4", "|O"])
    about = {"descr": str(kind), "fortran_order": False, "shape": (int(rng.choice([1, 10])) << 40,)}
    np.lib.format.write_array_header_1_0(header, about)
    members[name] = header.getvalue() + bytes(100)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def other_arrays(path, rng):
    """An .npz with one of its arrays replaced, cut, of another type or missing."""
    if rng.random() < 0.2:
        return huge(path, rng)
    arrays = dict(np.load(path))
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    env_id = str(rng.choice(["CartPole-v0", "x" * 9_999, ""]))
    ways = [
        lambda: array.astype(rng.choice(["f2", "f8", "i1", "u8", "S3", "U3", "?"])),
        lambda: array[:-1],
        lambda: array[None],
        lambda: np.broadcast_to(np.float32(0), (10**5, *array.shape[1:])),
        lambda: array * np.float32("nan"),
        lambda: np.array(json.dumps({"env_id": env_id})),
        lambda: np.array([Payload(path.with_name("canary"))] * len(array), object),
    ]
    with contextlib.suppress(ValueError, TypeError, IndexError):
        arrays[name] = ways[rng.integers(len(ways))]()
    np.savez(path, **arrays)


def other_tensors(path, rng):
    payload = Payload(path.with_name("canary"))
    torch.save(swap_value(torch.load(path, weights_only=True), rng, *[payload] * 5), path)


def other_expert(path, rng):
    with zipfile.ZipFile(path) as archive:
        weights, about = io.BytesIO(archive.read("policy.pth")), json.loads(archive.read("data"))
    weights, file = torch.load(weights, weights_only=True), io.BytesIO()
    if rng.random() < 0.3:
        about = swap_value(about, rng)
    else:
        weights = swap_value(weights, rng, *[Payload(path.with_name("canary"))] * 5)
    torch.save(weights, file)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("policy.pth", file.getvalue())
        archive.writestr("data", json.dumps(about, default=str))


def few_demonstrations(script, path):
    arrays = dict(np.load(script.task.demos))
    rows = slice(np.flatnonzero(arrays["episode_starts"])[3])
    for name in arrays.keys() - {"metadata", "terminated"}:
        arrays[name] = arrays[name][rows]
    np.savez(path, **{**arrays, "terminated": arrays["terminated"][:3]})
    return path


LOADERS = {
    "demonstrations": other_arrays,
    "expert": other_expert,
    "checkpoint": other_tensors,
    "policy": other_tensors,
}


def load(loader, script, finished, tmp_path):
    """The command line that loads it, and the file."""
    folder, run = shutil.copytree(finished, tmp_path / "finished"), tmp_path / "run"
    if loader == "demonstrations":
        path = few_demonstrations(script, tmp_path / "demos.npz")
        return script.argv(run, "--demos", path, "--num-demos", 1), path
    if loader == "expert":
        path = falling_expert(tmp_path / "expert.zip")
        return script.argv(run, "--expert", path), path
    if loader == "policy":
        path = folder / "policy.pt"
        return ["--evaluate", str(path), "--eval-episodes", "2"], path
    argv = ["--resume", str(folder), "--no-progress", script.budget, str(10**7)]  # trains on
    return argv, folder / "checkpoint.pt"


class Loaded(Exception):
    """Nothing was noticed, and the run would begin."""


def mutate(script, argv, path, other, many, tmp_path, errors):
    """Runs in a fork. Damages the file `many` times and writes what came of it to counts.json.

    A checkpoint that loads is also trained on, for one iteration."""
    original, module, run = path.read_bytes(), script.module, tmp_path / "run"
    counts = {"refused": 0, "unnoticed": 0, "s the longest": 0.0, "MB at most": 0}
    played = module.play(None, script.task.env_id, 4, 0)

    def play(act, env_id, episodes, seed):
        if act:
            act(played[0]["observations"][:1])
        return played

    def loaded(*args, **parts):
        raise Loaded

    module.play, module.Run.record, module.SummaryWriter = play, loaded, Silence
    if "--resume" not in argv:
        module.Run.start = loaded
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.freeze()  # so that garbage collection has little to scan
    for seed in range(many):
        rng = np.random.default_rng(seed)
        path.write_bytes(original)
        while path.read_bytes() == original:  # damage may have changed nothing
            if rng.random() < 0.5:
                path.write_bytes(damage(original, rng))
            else:
                other(path, rng)
        at, began = errors.stat().st_size, time.monotonic()
        try:
            status = module.main(argv)
        except Loaded:
            status = 0
        except BaseException:
            shutil.copy(path, tmp_path / "failed")
            print(f"mutation {seed} of {path.name}", file=sys.stderr)
            raise
        sys.stdout.flush(), sys.stderr.flush()
        printed = errors.read_bytes()[at:].decode()
        lines = [line for line in printed.splitlines() if line.startswith(f"{script.script}.py:")]
        assert status in (0, 1, 2) and (len(lines) == 1) == (status != 0), f"{seed}: {printed}"
        assert status == 0 or len(lines[0]) < 500, f"{seed}: {printed}"
        assert not path.with_name("canary").exists(), seed
        counts["unnoticed" if status == 0 else "refused"] += 1
        counts["s the longest"] = max(counts["s the longest"], round(time.monotonic() - began, 1))
        before, highest = highest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        counts["MB at most"] = max(counts["MB at most"], (highest - before) // 1024)
        shutil.rmtree(run, ignore_errors=True)
        gc.collect()  # the environments of this run
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    return 0


@pytest.mark.applies(
    lambda script, loader: loader != ("expert" if script.task.demos else "demonstrations")
)
@pytest.mark.parametrize("loader", LOADERS)
def test_any_damage_to_a_file(script, loader, finish, tmp_path, quick, long, report):
    argv, path = load(loader, script, finish(script), tmp_path)
    many, printed = 1_000 if long else 15, tmp_path / "printed.txt"
    run = Fork(
        mutate, script, argv, path, LOADERS[loader], many, tmp_path, printed, printed=printed
    )
    status = run.wait(30 + many)
    assert status == 0, run.text()[-3_000:]
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["s the longest"] < 20 and counts["MB at most"] < 500
    assert counts["refused"] > 0.2 * many
    assert loader != "checkpoint" or counts["unnoticed"] == 0  # its digest notices all
    report(f"damage to {loader}", **counts)
