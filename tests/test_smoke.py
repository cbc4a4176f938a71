"""Every script runs, writes what it promises, and goes on exactly where it was stopped."""

import argparse
import importlib
import itertools
import json
import math
import re
import shutil
import signal
import time
from hashlib import sha256
from types import NoneType

import numpy as np
import pytest
import torch
from gymnasium.envs.box2d.bipedal_walker import BipedalWalker
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv
from matplotlib.image import imread
from scripts import PYBULLET, ROOT, falling_expert, finite, same, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLDER = {"args.json", "checkpoint.pt", "policy.pt", "summary.json", "learning_curve.png"}
SUMMARY = {
    "script": str,
    "args": dict,
    "versions": dict,
    "env_steps": int,
    "updates": int,
    "wall_seconds": float,
    "setup_seconds": float,
    "expert": dict,
    "random": dict,
    "learner": dict,
    "curve": list,
    "solved_at_env_steps": (int, NoneType),
    "solved_at_seconds": (float, NoneType),
    "verdict": str,
}
RESULT = {
    "return_mean": float,
    "return_std": float,
    "length_mean": float,
    "episodes": int,
    "occupancy_distance": float,
}
POINT = {"env_steps": int, "wall_seconds": float, "return_mean": float}


def read_json(path):
    """JSON as the standard has it: NaN and Infinity are none."""

    def refuse(name):
        raise ValueError(f"{path}: {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def check_types(content, types):
    assert types.keys() <= content.keys()
    for key, expected in types.items():
        assert isinstance(content[key], expected), f"{key}: {content[key]!r}"


# --- one run --------------------------------------------------------------------------------------


def test_run_folder(case, finished):
    names = {path.name for path in finished.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert names == FOLDER | events and len(events) == 1
    args = read_json(finished / "args.json")
    assert args["script"] == case.script and args[case.module.BUDGET] == case.full
    policy = torch.load(finished / "policy.pt", weights_only=True)
    assert policy["script"] == case.script and finite(policy["weights"])
    case.module.Policy(**policy["network"]).load_state_dict(policy["weights"])
    image = imread(finished / "learning_curve.png", format="png")
    assert image.ndim == 3 and image.std() > 0


def test_summary(case, finished):
    summary, clock = read_json(finished / "summary.json"), case.module.CLOCK
    check_types(summary, SUMMARY)
    for name in ("expert", "random", "learner"):
        check_types(summary[name], RESULT)
    assert summary["random"]["occupancy_distance"] == 1
    assert summary["learner"]["episodes"] == 4
    assert {"python", "torch", "gymnasium", "numpy"} <= summary["versions"].keys()
    assert summary["script"] == case.script and summary["verdict"]
    assert summary[clock] >= case.full and summary["updates"] > 0
    assert summary["curve"][-1][clock] == summary[clock]
    for point in summary["curve"]:
        check_types(point, POINT)
    for key in (clock, "wall_seconds"):
        values = [point[key] for point in summary["curve"]]
        assert values == sorted(values) and len(values) > 1

    if not case.task.demos:
        assert summary["expert"]["episodes"] == 5
        differences = summary["paired_differences"]  # of the first four on the same seeds
        assert len(differences) == 4 and finite(differences)
        return
    assert summary["expert"]["return_mean"] == case.task.expert_return
    demos = summary["demos"]
    chosen, _, _ = case.module.load_demos(argparse.Namespace(**summary["args"]))
    pairs = [np.concatenate([e[k] for e in chosen]) for k in ("observations", "actions")]
    assert demos == {
        "episodes": case.module.NUM_DEMOS,
        "pairs": len(pairs[1]),
        "sha256": sha256(b"".join(array.tobytes() for array in pairs)).hexdigest(),
    }


def test_events(case, finished):
    events = EventAccumulator(str(finished)).Reload()
    curve = read_json(finished / "summary.json")["curve"]
    logged = events.Scalars("eval/return_mean")
    clock = case.module.CLOCK
    assert [event.step for event in logged] == [point[clock] for point in curve]
    assert [event.value for event in logged] == pytest.approx([p["return_mean"] for p in curve])
    assert "charts/SPS" in events.Tags()["scalars"]


def test_evaluate_repeats_the_final_evaluation(case, finished, capsys):
    argv = ["--evaluate", str(finished / "policy.pt"), "--eval-episodes", "4"]
    assert case.module.main(argv) == 0
    result = read_json(finished / "evaluation.json")
    (finished / "evaluation.json").unlink()
    learner = read_json(finished / "summary.json")["learner"]
    assert result["return_mean"] == learner["return_mean"]
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{result['return_mean']:.1f}" in line


@pytest.mark.applies(lambda script: script.script != "gail_racecar_reinforce")  # PyBullet is slow
def test_videos(script, finish, tmp_path):
    shutil.copy(finish(script) / "policy.pt", tmp_path)
    argv = ["--evaluate", str(tmp_path / "policy.pt"), "--eval-episodes", "2", "--capture-video"]
    assert script.module.main(argv) == 0
    videos = list((tmp_path / "videos").glob("*.mp4"))
    assert len(videos) == 3 and all(b"ftyp" in path.read_bytes()[:16] for path in videos)


# --- the same bits --------------------------------------------------------------------------------


@pytest.mark.applies(lambda case: case.task.demos)  # AggreVaTeD keeps the one that validates best
def test_evaluation_changes_nothing(case, finished, tmp_path, quick):
    flags = ("--eval-every", 10**9, "--eval-episodes", 3)
    assert same(case.run(tmp_path / "run", *flags), weights(finished))


def test_another_seed_gives_another_policy(script, tmp_path, quick):
    """From the same demonstration, which a seed would otherwise choose too."""
    flags = ()
    if script.task.demos:
        arrays = dict(np.load(script.task.demos))
        rows = slice(np.flatnonzero(arrays["episode_starts"])[1])
        for name in arrays.keys() - {"metadata", "terminated"}:
            arrays[name] = arrays[name][rows]
        np.savez(tmp_path / "one.npz", **{**arrays, "terminated": arrays["terminated"][:1]})
        flags = ("--demos", tmp_path / "one.npz", "--num-demos", 1)
    one, two = (script.run(tmp_path / f"{seed}", "--seed", seed, *flags) for seed in (1, 2))
    assert not same(one, two)


@pytest.mark.applies(lambda case: case.task.demos)  # AggreVaTeD learns from them
def test_rewards_and_info_change_nothing(case, finished, tmp_path, monkeypatch, quick):
    make_envs = case.module.make_envs

    def make_envs_without_rewards(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        step, reset = envs.step, envs.reset

        def blind_step(actions):
            observations, rewards, terminated, truncated, _ = step(actions)
            return observations, np.full_like(rewards, np.nan), terminated, truncated, {}

        envs.step, envs.reset = blind_step, lambda **options: (reset(**options)[0], {})
        return envs

    monkeypatch.setattr(case.module, "make_envs", make_envs_without_rewards)
    assert same(case.run(tmp_path / "run"), weights(finished))
    learner = json.loads((tmp_path / "run" / "summary.json").read_text())["learner"]
    assert np.isnan(learner["return_mean"])  # the rewards were hidden indeed


def test_recorded_rewards_change_nothing(watcher, finish, tmp_path, quick):
    arrays = dict(np.load(watcher.task.demos))
    del arrays["rewards"]
    np.savez(tmp_path / "demos.npz", **arrays)
    policy = watcher.run(tmp_path / "run", "--demos", tmp_path / "demos.npz")
    assert same(policy, weights(finish(watcher)))
    assert read_json(tmp_path / "run" / "summary.json")["expert"] is None


def test_environments_are_stepped_in_training_only_where_they_are_meant_to_be(
    case, tmp_path, monkeypatch, quick
):
    module, steps, playing = case.module, [], []

    def count(owner):
        step = owner.step

        def counted(self, *args):
            if not playing:
                steps.append(getattr(self, "num_envs", 1))
            return step(self, *args)

        monkeypatch.setattr(owner, "step", counted)

    def play(*args):
        playing.append(True)
        episodes = module_play(*args)
        playing.pop()
        return episodes

    module_play = module.play
    monkeypatch.setattr(module, "play", play)
    count(CartPoleEnv)
    count(CartPoleVectorEnv)
    count(BipedalWalker)
    if PYBULLET:
        count(importlib.import_module("racecar_env").RaceCarEnv)
    case.run(tmp_path / "run")
    summary = read_json(tmp_path / "run" / "summary.json")
    if "bc" in case.script or "offline" in case.script:
        assert not steps and summary["env_steps"] == 0
    else:  # the frames that only reset an environment are not counted as steps
        assert 0 < sum(steps) * 0.8 < summary["env_steps"] <= sum(steps)


# --- stopped and resumed --------------------------------------------------------------------------


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def done(case, folder):
    return checkpoint(folder)["run"]["count"][case.module.CLOCK]


def test_resumed_half_way(case, finished, tmp_path):
    case.run(tmp_path / "run", budget=case.half)
    assert case.half <= done(case, tmp_path / "run") < case.full
    assert same(case.resume(tmp_path / "run"), weights(finished))
    ours, theirs = (read_json(f / "summary.json") for f in (tmp_path / "run", finished))
    for name in ("learner", "env_steps", "updates", "demos"):
        assert ours.get(name) == theirs.get(name)


def test_resuming_a_finished_run_changes_nothing(case, finished, tmp_path, quick):
    shutil.copytree(finished, tmp_path / "run")
    assert same(case.resume(tmp_path / "run"), weights(finished))


def test_interrupted(script, tmp_path, quick, capsys, long_walks):
    """A copy alone in a folder; Ctrl-C; the command that it prints, to the end."""
    for path in (script.path, ROOT / "racecar_env.py"):  # which is all that one may need
        shutil.copy(path, tmp_path)
    folder = tmp_path / "runs" / "run"
    demos = ("--demos", script.task.demos) if script.task.demos else ()
    if not demos:  # an expert with whom an episode is soon over
        demos = ("--expert", falling_expert(tmp_path / "expert.zip"))
    argv = script.argv(folder, *demos, budget=10**9)
    process, until = script.start(argv, tmp_path), time.monotonic() + 180
    try:
        while not (folder / "checkpoint.pt").exists() or done(script, folder) == 0:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    python, name, *argv = errors.split("go on with: ")[1].split()
    budget = f"--{script.module.BUDGET.replace('_', '-')}"
    assert (python, name, argv) == (
        *("python", script.path.name),
        ["--resume", str(folder), budget, "1000000000"],
    )

    budget = done(script, folder) + 1
    policy = script.resume(folder, budget)
    last = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[0] for line in last] == ["random", "expert", "learner", "verdict", "run"]
    assert last[-1].endswith(str(folder))
    assert same(policy, script.run(tmp_path / "never stopped", *demos, budget=budget))


def test_resumed_with_less_before_the_first_evaluation(script, tmp_path, monkeypatch, capsys):
    """A checkpoint may be made before there is a curve."""
    run = script.module.Run
    start, record = run.start, run.record

    def due_at_once(self, **parts):
        start(self, **parts)
        self.saved = -math.inf

    def stop(self, *args):
        record(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "start", due_at_once)
        patch.setattr(run, "record", stop)
        argv = script.argv(tmp_path / "run", "--eval-every", 10**9)
        assert script.module.main(argv) == 130
    assert done(script, tmp_path / "run") > 0 and not checkpoint(tmp_path / "run")["run"]["curve"]
    budget = f"--{script.module.BUDGET.replace('_', '-')}"
    capsys.readouterr()
    assert script.module.main(["--resume", str(tmp_path / "run"), budget, "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not evaluated yet" in line and not (tmp_path / "run" / "policy.pt").exists()


@pytest.mark.parametrize("good", ["curve", "end", "both"])
def test_solved_is_what_stays_solved_to_the_end(watcher, good, tmp_path, monkeypatch, quick):
    module = watcher.module
    evaluate, solved = module.Run.evaluate, next(iter(module.TASKS.values()))

    def set_score(self, policy, offset):
        well = good in ("both", "curve" if offset == 0 else "end")
        return evaluate(self, policy, offset) | {module.METRIC: solved if well else solved / 2}

    monkeypatch.setattr(module.Run, "evaluate", set_score)
    watcher.run(tmp_path / "run")
    summary = read_json(tmp_path / "run" / "summary.json")
    if good == "both":
        assert summary["solved_at_seconds"] == summary["curve"][0]["wall_seconds"]
        assert summary["verdict"].startswith("solved at")
    else:
        assert summary["solved_at_seconds"] is None
        assert summary["verdict"].startswith(f"not solved: {module.METRIC} {solved / 2:.4g} of")


def test_nan_in_a_loss(case, finished, tmp_path, monkeypatch, capsys, quick):
    module, folder, calls = case.module, tmp_path / "run", itertools.count()
    loss = getattr(module, case.loss)

    def broken(*args):
        return loss(*args) * (float("nan") if next(calls) >= case.calls else 1)

    monkeypatch.setattr(module, case.loss, broken)
    assert module.main(case.argv(folder)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    found = re.search(rf"losses/\w+ is nan at (\d+) {module.CLOCK}\b.*{folder}/checkpoint.pt", line)
    assert found and int(found[1]) > done(case, folder) > 0
    assert finite(checkpoint(folder))
    assert not (folder / "policy.pt").exists()
    monkeypatch.undo()
    assert same(case.resume(folder), weights(finished))


def test_the_run_folder_cannot_be_made(script, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file")
    assert script.module.main(script.argv(tmp_path / "runs" / "run")) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "runs") in line
