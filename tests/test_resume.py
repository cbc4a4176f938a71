"""A run that is stopped, however, and resumed ends with the bits of one that was not."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from scripts import AGGREVATED, BC, CASES, DAGGER, FEW, PPO, REINFORCE, demos, environment, expert
from written import checkpoint, read_json, same, weights

STOPS = [(case, signal.SIGKILL) for case in CASES]
STOPS += [(REINFORCE, signal.SIGTERM), (DAGGER, signal.SIGINT)]


@pytest.mark.parametrize("case, how", STOPS, ids=lambda x: getattr(x, "name", str(x)))
def test_stopped_at_any_moment_and_resumed(case, how, tmp_path, capfd):
    folder = tmp_path / "a run's folder"
    assert case.module  # imported before it forks
    flags = [] if how == signal.SIGKILL else ["--eval-every", 10**9]  # saved for the signal alone
    argv = case.argv("--out", folder, *flags, iterations=10**6)
    process = case.fork(*argv, until=folder / ("checkpoint.pt" if flags else "policy.pt"))
    time.sleep(1.5 * bool(flags) + random.uniform(0.0, 0.3))
    os.kill(process.pid, how)
    process.join(60)
    process.kill()
    stopped, steps = shutil.copytree(folder, tmp_path / "stopped"), checkpoint(folder)["steps"]
    errors = capfd.readouterr().err
    if how == signal.SIGKILL:
        assert process.exitcode == -how and not errors
    else:
        assert process.exitcode == 128 + how
        assert steps % case.every == 0 < steps  # the iteration ended
        (line,) = errors.splitlines()
        assert line.endswith(shlex.join([f"--resume={folder}"]))
    budget = ["--total-steps", steps + 1]
    assert case.main("--resume", folder, *budget) == 0
    assert same(weights(folder), case.run(tmp_path / "never stopped", *budget, *flags))
    if flags:  # it was not evaluated: with a lower budget it ends at once, with a policy
        policy = weights(stopped)
        assert case.main("--resume", stopped, "--total-steps", 1) == 0
        found = read_json(stopped / "summary.json")
        assert same(weights(stopped), policy) and "before the last" not in found["verdict"]
        assert found["solved_at_steps"] in (None, steps)


def test_the_command_that_is_printed_can_be_pasted(tmp_path):
    argv = PPO.argv("--out", "a run's folder", "--env-id", "toys:Toy-v0", iterations=10**6)
    process = PPO.start(*argv, cwd=tmp_path)
    try:
        while not (tmp_path / "a run's folder" / "policy.pt").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.terminate()
        (line,) = process.communicate(timeout=60)[1].splitlines()
    finally:
        process.kill()
    assert process.returncode == 143
    settings = {"shell": True, "cwd": tmp_path, "env": environment(), "capture_output": True}
    pasted = line.split("go on with: ")[1] + " --total-steps 1"
    assert b"verdict" in subprocess.run(pasted, check=True, **settings).stdout
    argv = ["--evaluate", tmp_path / "a run's folder" / "policy.pt", "--env-id", "toys:Toy-v0"]
    assert PPO.start(*argv).wait(120) == 0  # nor does evaluation know the task without its module


@pytest.mark.parametrize("case", FEW, ids=str)
def test_with_a_higher_budget_it_goes_on_and_with_a_lower_one_it_ends(case, tmp_path):
    """What was changed on the way is kept, the curve and the clock go on."""
    folder = tmp_path / "run"
    case.run(folder, iterations=1)
    first = read_json(folder / "summary.json")
    assert same(case.resume(folder, "--eval-episodes", 3), weights(case.finished))
    assert case.main("--resume", folder) == 0
    assert same(weights(folder), weights(case.finished))
    ours, theirs = (read_json(path / "summary.json") for path in (folder, case.finished))
    assert ours["learner"]["episodes"] == 15 and ours["args"]["total_steps"] == 3 * case.every
    assert ours["curve"][:1] == first["curve"] and len(ours["curve"]) == len(theirs["curve"])
    assert ours["curve"][1]["wall_seconds"] > first["wall_seconds"]
    assert ours["steps"] == theirs["steps"] and ours.get("demos") == theirs.get("demos")
    (folder / "summary.json").unlink()
    assert same(case.resume(folder, "--total-steps", 1), weights(case.finished))
    assert read_json(folder / "summary.json")["steps"] == 3 * case.every


@pytest.mark.parametrize("name", ["Hidden-v0", "Gusts-v0"])
def test_what_a_task_draws_elsewhere_is_drawn_again(name, tmp_path):
    """From its spaces, or from generators that are not its own: at its reset, or late."""
    case = PPO.on(name)
    whole = case.run(tmp_path / "a")
    assert same(case.run(tmp_path / "b"), whole)
    case.run(tmp_path / "c", iterations=1)
    assert same(case.resume(tmp_path / "c"), whole)


@pytest.mark.parametrize("case", [BC, AGGREVATED], ids=str)
def test_on_a_machine_without_its_device(case, tmp_path, refused):
    folder = shutil.copytree(case.finished, tmp_path / "run")
    whole = checkpoint(folder)
    torch.save({**whole, "args": {**whole["args"], "device": "cuda:9"}}, folder / "checkpoint.pt")
    refused(case, ["--resume", folder], "cuda:9", "--device cpu")
    assert same(case.resume(folder, "--device", "cpu"), weights(case.finished))


@pytest.mark.parametrize("case", [BC, PPO], ids=str)
def test_demonstrations_may_move_but_not_change(case, tmp_path, refused):
    """Neither those that are learnt from nor, at the end of the file, those that are held out."""
    first, moved = tmp_path / "demos.npz", tmp_path / "moved.npz"
    shutil.copy(demos(case.env_id), first)
    case.run(tmp_path / "run", "--demos", first, iterations=1)
    arrays = dict(np.load(first))
    first.rename(moved)
    learnt, held_out = arrays["observations"].copy(), arrays["observations"].copy()
    learnt[arrays["episode_starts"].nonzero()[0][:4]] += 1
    held_out[-1] += 1
    changes = {"observations": learnt}, {"observations": held_out}
    for changed in (*changes, {"terminated": ~arrays["terminated"]}):
        np.savez(first, **{**arrays, **changed})
        argv = ["--resume", tmp_path / "run", "--total-steps", 2 * case.every]
        refused(case, argv, "has changed", tmp_path / "run")
    policy = case.resume(tmp_path / "run", "--demos", moved, iterations=2)
    assert same(policy, case.run(tmp_path / "again", iterations=2))


def test_an_expert_may_move_but_not_change(tmp_path, refused):
    path = shutil.copy(expert("ToyBox-v0"), tmp_path / "expert.pt")
    AGGREVATED.run(tmp_path / "run", "--expert", path, iterations=1)
    shutil.copy(expert("ToyBox-v0", gain=2.0), path)
    refused(AGGREVATED, ["--resume", tmp_path / "run", "--total-steps", 2], "has changed")
    policy = AGGREVATED.resume(tmp_path / "run", "--expert", expert("ToyBox-v0"), iterations=2)
    assert same(policy, AGGREVATED.run(tmp_path / "again", iterations=2))


@pytest.mark.parametrize("flag", ["--hidden=5", "--seed=3", "--env-id=CartPole-v1"])
def test_other_settings_are_refused(case, flag, tmp_path, refused):
    folder, name = shutil.copytree(case.finished, tmp_path / "run"), flag.strip("-").split("=")[0]
    argv = ["--resume", folder, "--total-steps", 4 * case.every, flag]
    refused(case, argv, folder, name.replace("-", "_"))


def test_a_task_that_cannot_be_replayed_begins_new_episodes(tmp_path, capsys):
    PPO.on("Remembering-v0").run(tmp_path / "run", iterations=2)
    capsys.readouterr()
    PPO.resume(tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "replayed" in line]
    assert len(lines) == 1 and "new ones begin" in lines[0]


def test_a_replay_that_goes_on_after_an_end(capsys):
    """Where the task refuses such a step, a new episode begins as well."""
    envs = PPO.module.Environments("toys:Toy-v0", 2)
    state = envs.state_dict()
    state["actions"][0] = torch.full((12,), 3)
    envs.load_state_dict(state)
    assert [len(actions) for actions in envs.actions] == [0, 0]
    assert capsys.readouterr().out.startswith("1 episodes cannot be replayed")


def test_a_checkpoint_without_one_of_its_parts(case, tmp_path, refused):
    folder = shutil.copytree(case.finished, tmp_path / "run")
    whole = checkpoint(folder)
    for name in {*whole, *whole["parts"]} - {"versions", "setup_seconds"}:
        parts = {key: part for key, part in whole["parts"].items() if key != name}
        less = {key: x for key, x in {**whole, "parts": parts}.items() if key != name}
        torch.save(less, folder / "checkpoint.pt")
        refused(case, ["--resume", folder, "--total-steps", 4 * case.every], folder)


@pytest.mark.parametrize("case", [PPO, AGGREVATED], ids=str)
def test_a_checkpoint_with_any_damage(case, tmp_path, capsys, pytestconfig):
    """It is refused, unless the damage is where it changes nothing."""
    whole, rng = (case.finished / "checkpoint.pt").read_bytes(), random.Random(0)
    policy, statuses = case.run(tmp_path / "more", iterations=4), []
    for number in range(1_000 if pytestconfig.getoption("--long") else 40):
        folder = shutil.copytree(case.finished, tmp_path / str(number))
        damaged, at, size = bytearray(whole), rng.randrange(len(whole)), rng.choice([1, 64])
        damaged[at : at + size] = rng.randbytes(size)
        (folder / "checkpoint.pt").write_bytes(damaged)
        capsys.readouterr()
        statuses.append(case.main("--resume", folder, "--total-steps", 4 * case.every))
        errors = capsys.readouterr().err
        assert errors.count(str(folder)) == errors.count("\n") == (statuses[-1] == 2)
        assert statuses[-1] == 2 or same(weights(folder), policy)
        shutil.rmtree(folder)
    assert statuses.count(2) > 0.8 * len(statuses)
