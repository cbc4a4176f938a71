"""Every script runs from its command line, on tasks of all kinds, and writes what it promises."""

import re

import gymnasium as gym
import pytest
import torch
from scripts import BC, FEW, OFFLINE, PPO, ROOT, SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from written import read_json, same, weights

FOLDER = {"args.json", "checkpoint.pt", "policy.pt", "summary.json", "learning_curve.png"}
NUMBERS = {"return_mean", "return_std", "length_mean", "occupancy_distance"}
SUMMARY = {"script", "args", "versions", "steps", "wall_seconds", "setup_seconds", "curve"}
SUMMARY |= {"random", "expert", "learner", "solved_at_steps", "solved_at_seconds", "verdict"}
TAG = r"((?:charts|losses|discriminator|eval|accuracy)/\w+)"
SOME = {"eval/success_rate", "losses/critics", "eval/length_mean", "eval/episodes"}
TASKS = ["Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "LunarLanderContinuous-v3"]
TASKS += ["LunarLander-v3", "InvertedPendulum-v5"]


@pytest.mark.parametrize("case", SCRIPTS, ids=lambda case: case.script)
def test_the_default_task(case, tmp_path, monkeypatch, capsys):
    """From anywhere; the folder comes first, then a line per evaluation, then the result."""
    short = ["--noise", 2, "--switch", 20] if case.queries else []
    flags = [*case.flags.split(), *short, "--eval-episodes", 2, "--eval-every", case.every]
    monkeypatch.chdir(tmp_path)
    assert case.main(*flags, "--total-steps", 2 * case.every) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    (folder,) = (tmp_path / "runs").iterdir()
    env_id = read_json(folder / "args.json")["env_id"]
    assert folder.name.startswith(f"{case.script}__{env_id}__1__")
    assert lines[0] == lines[-1] == f"run     runs/{folder.name}"
    words = [line.split()[:2] for line in lines[1:]]
    curve = read_json(folder / "summary.json")["curve"]
    assert words[:-5] == [[f"{point['steps']:,}", "steps"] for point in curve] and len(curve) == 2
    assert [w[0] for w in words[-5:]] == ["random", "expert", "learner", "verdict", "run"]
    assert not printed.err


def test_what_a_run_writes(case):
    names = {path.name for path in case.finished.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert names == FOLDER | events and len(events) == 1
    args = read_json(case.finished / "args.json")
    assert args["script"] == case.script and args["total_steps"] == 3 * case.every
    policy = torch.load(case.finished / "policy.pt", weights_only=True)
    assert (policy["script"], policy["env_id"]) == (case.script, case.env_id)
    assert (case.finished / "learning_curve.png").read_bytes()[1:4] == b"PNG"
    summary = read_json(case.finished / "summary.json")
    assert summary.keys() >= SUMMARY and summary["script"] == case.script and summary["verdict"]
    for name, many in (("expert", 10 if case.queries else 24), ("random", 10), ("learner", 10)):
        numbers = NUMBERS - {"occupancy_distance"} if case.queries else NUMBERS
        assert all(isinstance(summary[name][key], float) for key in numbers)
        many = 30 if (name, case.env_id) == ("expert", "RaceCar-v0") else many
        assert summary[name]["episodes"] == many
    assert case.queries or summary["random"]["occupancy_distance"] == 1
    assert {"torch", "gymnasium", "numpy"} <= summary["versions"].keys()
    steps = [point["steps"] for point in summary["curve"]]
    assert steps == [case.every * i for i in (1, 2, 3)] and summary["steps"] == steps[-1]


def test_tensorboard(case):
    """The tags are those of the script's page. Success, critics: of some runs only."""
    events = EventAccumulator(str(case.finished)).Reload()
    page = (ROOT / "docs" / f"{case.script}.md").read_text()
    assert set(events.Tags()["scalars"]) ^ set(re.findall(TAG, page)) <= SOME
    logged = events.Scalars("eval/return_mean")
    curve = read_json(case.finished / "summary.json")["curve"]
    assert [event.step for event in logged] == [point["steps"] for point in curve]
    assert [event.value for event in logged] == pytest.approx([p["return_mean"] for p in curve])


def test_evaluate_repeats_the_final_evaluation(case, tmp_path, capsys):
    argv = ["--evaluate", case.finished / "policy.pt", "--eval-episodes", 2]
    argv += ["--out", tmp_path / "a" / "b"]
    before = sorted(case.finished.iterdir())
    capsys.readouterr()
    assert case.main(*argv) == 0
    task, greedy, sampled = capsys.readouterr().out.splitlines()
    assert task == f"task    {case.env_id}"
    assert greedy.startswith("greedy") and sampled.startswith("sampled")
    (path,) = (tmp_path / "a" / "b").iterdir()
    learner = read_json(case.finished / "summary.json")["learner"]
    assert read_json(path)["greedy"].items() <= learner.items()
    assert sorted(case.finished.iterdir()) == before
    assert case.main(*argv, "--out", "/proc/none") == 1
    printed = capsys.readouterr()
    assert "\ngreedy" in printed.out and len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("case", [BC, PPO, OFFLINE], ids=lambda case: case.script)
def test_another_task_by_its_id_alone(case, env_id, tmp_path):
    task = gym.make(env_id)
    argv = ["--env-id", env_id, "--out", tmp_path / "run", "--eval-episodes", 2]
    argv += [*case.flags.split(), "--total-steps", case.every]
    if case is OFFLINE and not isinstance(task.action_space, gym.spaces.Discrete):
        assert case.main(*argv) == 2
        return
    assert case.main(*argv) == 0
    policy, found = case.module.load_policy(tmp_path / "run" / "policy.pt")
    assert found == env_id
    observation, _ = task.reset(seed=0)
    assert task.action_space.contains(policy.act(observation[None])[0])
    if case is PPO:
        case.resume(tmp_path / "run", iterations=2)
        assert case.main("--evaluate", tmp_path / "run" / "policy.pt", "--eval-episodes", 2) == 0


@pytest.mark.parametrize("case", FEW, ids=str)
def test_another_seed_gives_another_policy(case, tmp_path):
    assert not same(case.run(tmp_path / "run", "--seed", 2), weights(case.finished))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_evaluations_change_nothing(case, tmp_path):
    """Nor do they take random numbers from training; AggreVaTeD keeps the policy they prefer."""
    flags = ["--eval-episodes", 3]
    flags += [] if case.queries else ["--eval-every", 10**6]
    assert same(case.run(tmp_path / "run", *flags), weights(case.finished))


def test_videos(tmp_path):
    flags = ["--eval-episodes", 2, "--total-steps", 100, "--capture-video"]
    assert PPO.main("--out", tmp_path / "run", *flags) == 0
    videos = list((tmp_path / "run" / "videos").rglob("*.mp4"))
    assert len(videos) == 3 and all(b"ftyp" in path.read_bytes()[:16] for path in videos)
