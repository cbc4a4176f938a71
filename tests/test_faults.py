"""The surroundings are the user's: streams, locale, threads, disk, folders. None may break it."""

import io
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import AGGREVATED, BC, OFFLINE, PPO, ROOT, SCRIPTS, demos, environment, python
from written import checkpoint, read_json, same, weights

BROKEN = {PPO.on("ToyBox-v0"): ["--policy-lr", 1e9], AGGREVATED.on("PayingNaN-v0"): []}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_loss_that_is_not_finite(case, tmp_path, capsys):
    """Which quantity, at which step, and where the last checkpoint is."""
    folder = tmp_path / "run"
    assert case.main(*case.argv("--out", folder, *BROKEN[case], iterations=200)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    found = re.search(rf"losses/\w+ is (nan|-?inf) at step (\d+).*{folder}/checkpoint.pt", line)
    assert found and int(found[2]) > checkpoint(folder)["steps"]


def test_an_observation_that_is_not_finite(tmp_path, capsys):
    case = PPO.on("Growing-v0")
    assert case.main(*case.argv("--out", tmp_path / "run", iterations=200)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "observation" in line and checkpoint(tmp_path / "run")["steps"] == 0


def test_a_full_disk(tmp_path, capsys):
    """AggreVaTeD's checkpoints grow: one of them no longer fits. The last that did is whole."""
    folder, soft = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    AGGREVATED.run(folder, iterations=2)
    size = (folder / "checkpoint.pt").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2_000, resource.RLIM_INFINITY))
        assert AGGREVATED.main("--resume", folder, "--total-steps", 60, "--eval-episodes", 2) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    (line,) = capsys.readouterr().err.splitlines()
    assert "File too large" in line and not list(folder.glob("*.tmp"))
    steps = checkpoint(folder)["steps"]
    assert 2 <= steps < 60 and AGGREVATED.main("--resume", folder, "--total-steps", steps + 1) == 0
    again = AGGREVATED.run(tmp_path / "again", "--total-steps", steps + 1)
    assert same(weights(folder), again)


@pytest.mark.parametrize("case", SCRIPTS, ids=lambda case: case.script)
def test_a_folder_that_cannot_be_made(case, tmp_path, capsys):
    """Not even by root."""
    (tmp_path / "file").touch()
    for folder in ("/proc/run", tmp_path / "file" / "run"):
        assert case.main(*case.argv("--out", folder)) in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert str(folder).removesuffix("/run") in line


def test_the_run_folder_disappears(tmp_path, capfd):
    """Nothing recreates it: a run without its settings could not be resumed."""
    folder = tmp_path / "run"
    argv = BC.argv("--out", folder, iterations=10**6)
    process = BC.fork(*argv, until=folder / "policy.pt")
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    process.join(60)
    (line,) = capfd.readouterr().err.splitlines()
    assert process.exitcode == 1 and str(folder) in line and not folder.exists()


def test_a_narrow_locale_a_wide_name_and_a_backend_that_is_none(tmp_path):
    """And stdout is a pipe whose reader has gone."""
    narrow = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "MPLBACKEND": "none"}
    folder = tmp_path / "Übung ☃"
    argv = BC.argv("--out", folder, "--env-id", "toys:Toy-v0")
    process = BC.start(*argv, env=environment(**narrow))
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in errors
    assert read_json(folder / "summary.json")["verdict"]


Tee = type("Tee", (), {"write": lambda self, text: None})  # a stream that can do no more


@pytest.mark.parametrize("stream", [None, io.StringIO, Tee, "closed"])
def test_other_streams(stream, tmp_path, monkeypatch):
    """A process without a console; a notebook's; a program's own; one that is closed."""
    made = stream() if callable(stream) else stream
    if stream == "closed":
        made = io.TextIOWrapper(io.BytesIO())
        made.close()
    monkeypatch.setattr(os, "isatty", lambda number: True)  # that no stream is a terminal
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setattr(sys, "stderr", made)
    argv = BC.argv("--out", tmp_path / "run")
    argv.remove("--no-progress")
    assert BC.main(*argv) == 0 and same(weights(tmp_path / "run"), weights(BC.finished))


RUN = BC.argv("--env-id", "toys:Toy-v0", "--out", "run")
PROGRAMS = [f"experts/{name}.py" for name in ("convert", "from_minari", "racecar", "train")]
FULL = [("bc_cartpole.py", RUN, 0), ("bc_cartpole.py", ["--seed", "x"], 2)]
FULL += [(program, ["--help"], 0) for program in ("bc_cartpole.py", *PROGRAMS)]


@pytest.mark.parametrize("program, words, status", FULL)
def test_a_full_stream(program, words, status, tmp_path):
    """Python tries to write what is left once more at its end; that must not change the status."""
    with open("/dev/full", "w") as full:
        streams = {"stdout": full, "stderr": full, "cwd": tmp_path, "env": environment()}
        done = subprocess.run([sys.executable, ROOT / program, *words], **streams, timeout=120)
    assert done.returncode == status


def test_a_name_in_another_encoding(tmp_path):
    """In Latin-1, as the file system has it; Python hides such bytes in surrogates."""
    assert BC.main(*BC.argv("--out", tmp_path / "caf\udce9")) in (0, 1, 2)


@pytest.mark.parametrize("case", [BC, PPO, AGGREVATED], ids=str)
def test_two_runs_at_once_in_threads(case, tmp_path, monkeypatch):
    """They get folders of their own, even if they start in the same moment."""
    monkeypatch.chdir(tmp_path)
    argv = case.argv(iterations=1)
    with ThreadPoolExecutor(2) as pool:
        status = list(pool.map(lambda _: case.main(*argv), range(2)))
    assert status == [0, 0] and len(list(Path("runs").iterdir())) == 2


@pytest.mark.parametrize("case", [BC.on("Worker-v0"), PPO.on("Worker-v0")], ids=str)
def test_a_task_with_a_process_of_its_own(case, tmp_path):
    """It ends when the task says so, and none is left."""
    process = case.fork(*case.argv("--out", tmp_path / "run", iterations=1))
    process.join(60)
    ended = process.exitcode
    process.kill()
    assert ended == 0 and read_json(tmp_path / "run" / "summary.json")["verdict"]


def test_a_run_that_is_stopped_leaves_no_process_of_its_task(tmp_path):
    argv = PPO.on("Worker-v0").argv("--out", tmp_path / "run", iterations=10**6)
    process = PPO.start(*argv, "--env-id", "toys:Worker-v0")
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)  # its streams are open for as long as any process has them
    assert process.returncode == 143


def test_each_result_has_the_settings_of_its_run(tmp_path):
    args = BC.module.parse_args(BC.argv(iterations=1))
    results = []
    for args.seed in (1, 2):
        args.out = str(tmp_path / str(args.seed))
        results.append(BC.module.train(args))
    assert [result["args"]["seed"] for result in results] == [1, 2]


def test_numpys_scalars_and_paths(tmp_path):
    args = BC.module.parse_args(BC.argv())
    args.out, args.demos, args.hidden = tmp_path / "run", Path(args.demos), np.int64(args.hidden)
    args.learning_rate, args.total_steps = np.float64(args.learning_rate), np.int32(300)
    BC.module.train(args)
    assert same(weights(tmp_path / "run"), weights(BC.finished))
    assert same(BC.resume(tmp_path / "run"), weights(BC.finished))


@pytest.mark.parametrize("value", [Decimal(1), np.zeros(2), {1, 2}, float("nan")])
def test_settings_that_no_file_holds(value, tmp_path):
    args = BC.module.parse_args(BC.argv("--out", tmp_path / "run"))
    args.learning_rate = value
    with pytest.raises(BC.module.BadInput, match="settings"):
        BC.module.train(args)
    assert not (tmp_path / "run").exists()


SET_UP = [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")]


@pytest.mark.parametrize("set_up", SET_UP)
def test_pytorch_as_a_notebook_left_it(set_up, tmp_path):
    args = BC.module.parse_args(BC.argv("--out", tmp_path / "run"))
    with set_up(), pytest.raises(BC.module.BadInput, match="not its defaults"):
        BC.module.train(args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", SCRIPTS, ids=lambda case: case.script)
def test_pasted_into_a_notebook(case, tmp_path, monkeypatch):
    """There is no __file__; the demonstrations are in experts/ of the working directory, if any."""
    (tmp_path / "experts").symlink_to(ROOT / "experts")
    monkeypatch.chdir(tmp_path)
    cell = {"__name__": "notebook"}
    exec((ROOT / f"{case.script}.py").read_text(), cell)
    out = ["--out", "run", *case.flags.split(), "--eval-episodes", "2", "--total-steps", "1"]
    summary = cell["train"](cell["parse_args"](case.argv(*out)))
    assert summary["steps"] >= 1


def test_a_link_to_a_script_finds_what_is_shipped(tmp_path):
    (tmp_path / "bc.py").symlink_to(ROOT / "bc_cartpole.py")
    done = python("bc.py", "--num-demos", "31", cwd=tmp_path)
    assert done.returncode == 2 and "CartPole-v1.npz" in done.stderr and "30" in done.stderr


GOOD = dict(np.load(demos("Toy-v0")))
EVERY = np.ones(len(GOOD["actions"]), bool)
DEGENERATE = {
    "one pair": {name: array[:1] for name, array in GOOD.items() if name != "metadata"},
    "constant observations": {"observations": 0 * GOOD["observations"]},
    "an action that is never taken": {"actions": np.ones_like(GOOD["actions"])},
    "episodes of one step": {"episode_starts": EVERY, "terminated": EVERY},
    "huge observations": {"observations": GOOD["observations"] * np.float32(1e37)},
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("case", [BC, PPO, OFFLINE], ids=str)
def test_degenerate_demonstrations(case, name, tmp_path):
    np.savez(tmp_path / "demos.npz", **{**GOOD, **DEGENERATE[name]})
    task = ["--demos", tmp_path / "demos.npz", "--env-id", "Toy-v0"]
    case.run(tmp_path / "run", *task, iterations=2)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["verdict"] and summary["learner"]["return_mean"] is not None
    if name == "one pair":
        assert summary["learner"]["occupancy_distance"] is None
