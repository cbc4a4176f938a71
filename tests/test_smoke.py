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
from types import NoneType, SimpleNamespace

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
    """Strict JSON: NaN and Infinity are refused."""

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
    assert np.isnan(learner["return_mean"])  # the rewards really were hidden


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
    else:  # roughly, reset frames included: test_mathematics counts them
        assert 0 < sum(steps) * 0.8 < summary["env_steps"] <= sum(steps)


# --- stopped and resumed --------------------------------------------------------------------------


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def done(case, folder):
    return checkpoint(folder)["count"][case.module.CLOCK]


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
    for path in (script.path, ROOT / "racecar_env.py"):  # which is all that a script may need
        shutil.copy(path, tmp_path)
    folder = tmp_path / "runs" / "run"
    demos = ("--demos", script.task.demos) if script.task.demos else ()
    if not demos:  # with this expert an episode is soon over
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
    assert (python, name, argv) == ("python", script.path.name, ["--resume", str(folder)])

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
    assert done(script, tmp_path / "run") > 0 and not checkpoint(tmp_path / "run")["curve"]
    budget = f"--{script.module.BUDGET.replace('_', '-')}"
    capsys.readouterr()
    assert script.module.main(["--resume", str(tmp_path / "run"), budget, "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not evaluated yet" in line and not (tmp_path / "run" / "policy.pt").exists()


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


def test_no_seed_is_shared(case, tmp_path, monkeypatch, quick):
    """By training, validation and final evaluation; AggreVaTeD's expert shares the final one's."""
    module, evaluated, trained, playing = case.module, [], set(), []
    play, make_envs = module.play, module.make_envs

    def watched_play(act, env_id, episodes, seed):
        if act:
            evaluated.append(set(range(seed, seed + episodes)))
        playing.append(True)
        played = play(act, env_id, episodes, seed)
        playing.pop()
        return played

    def watched_envs(env_id, num_envs):
        envs = make_envs(env_id, num_envs)
        reset = envs.reset

        def watched_reset(**settings):
            if not playing and settings.get("seed") is not None:
                trained.update(range(settings["seed"], settings["seed"] + num_envs))
            return reset(**settings)

        envs.reset = watched_reset
        return envs

    monkeypatch.setattr(module, "play", watched_play)
    monkeypatch.setattr(module, "make_envs", watched_envs)
    case.run(tmp_path / "run")
    if not case.task.demos:
        assert evaluated.pop(0) >= evaluated[-1]  # the expert's
    *validated, final = evaluated
    assert validated and len(final) == 4 and not final & set().union(*validated)
    assert not trained & final.union(*validated)
    assert bool(trained) == (module.CLOCK == "env_steps" or not case.task.demos)


@pytest.mark.applies(lambda script: script.script == "bc_cartpole")  # the harness is the same text
@pytest.mark.parametrize(
    "marks, solved", [("-+-+++", 3), ("++++++", 0), ("++++-+", None), ("+++++-", None)]
)
def test_solved_is_the_first_evaluation_from_which_on_all_are_good(
    script, marks, solved, tmp_path, monkeypatch, quick
):
    module, evaluate, left = script.module, script.module.Run.evaluate, iter(marks)

    def marked(run, policy, offset):
        result = evaluate(run, policy, offset)
        return {**result, "return_mean": 495.0 if next(left) == "+" else 494.9}

    monkeypatch.setattr(module.Run, "evaluate", marked)
    script.run(tmp_path / "run", budget=500)
    summary = read_json(tmp_path / "run" / "summary.json")
    assert len(summary["curve"]) == 5
    if solved is None:
        assert summary["solved_at_seconds"] is summary["solved_at_env_steps"] is None
        assert summary["verdict"].startswith("not solved")
    else:
        assert summary["solved_at_seconds"] == summary["curve"][solved]["wall_seconds"]
        assert summary["verdict"].startswith(f"solved at {100 * (solved + 1)} updates")


@pytest.mark.applies(lambda script: script.script == "bc_cartpole")
def test_when_it_evaluates(script, tmp_path, quick):
    """After the first iteration at or beyond each multiple, and at the end."""
    script.run(tmp_path / "run", "--eval-every", 150)  # 100, 200, 300 updates
    curve = read_json(tmp_path / "run" / "summary.json")["curve"]
    assert [point["updates"] for point in curve] == [200, 300]


def test_other_demonstrations_on_the_way(watcher, tmp_path, capsys, quick):
    """A file that was written anew between stop and resume: the run would not be the same."""
    arrays = dict(np.load(watcher.task.demos))
    np.savez(tmp_path / "demos.npz", **arrays)
    watcher.run(tmp_path / "run", "--demos", tmp_path / "demos.npz", budget=watcher.half)
    for episode in np.flatnonzero(arrays["episode_starts"]):  # whichever is learnt from
        arrays["observations"][episode, 0] += 1
    np.savez(tmp_path / "demos.npz", **arrays)
    capsys.readouterr()
    assert watcher.module.main(["--resume", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "what it learnt from" in line and str(tmp_path / "run") in line


def test_what_may_change_on_the_way_is_kept(script, tmp_path, monkeypatch, quick):
    """From the start on: a larger budget is not forgotten where the run is stopped once more."""
    script.run(tmp_path / "run", budget=script.half)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.module.Run, "record", stop)
        argv = ["--resume", str(tmp_path / "run"), script.budget, str(script.full)]
        assert script.module.main([*argv, "--eval-episodes", "3"]) == 130
    assert script.module.main(["--resume", str(tmp_path / "run")]) == 0
    assert done(script, tmp_path / "run") >= script.full
    assert read_json(tmp_path / "run" / "summary.json")["learner"]["episodes"] == 3
    assert read_json(tmp_path / "run" / "args.json")[script.module.BUDGET] == script.full


def test_a_resumed_runs_curve_and_clock_go_on(script, tmp_path, quick):
    script.run(tmp_path / "run", budget=script.half)
    half = read_json(tmp_path / "run" / "summary.json")
    script.resume(tmp_path / "run")
    whole = read_json(tmp_path / "run" / "summary.json")
    points = len(half["curve"])
    assert whole["curve"][:points] == half["curve"] and len(whole["curve"]) > points
    assert whole["curve"][points]["wall_seconds"] > half["wall_seconds"]


@pytest.mark.applies(lambda script: script.script in ("bc_cartpole", "aggrevated_bipedal"))
def test_the_seconds_are_of_training_alone(script, tmp_path, monkeypatch, quick):
    """And of AggreVaTeD's validation, which is part of it."""
    module, play = script.module, script.module.play
    now = itertools.count()
    passed = [0.0]

    def slow_play(*args):
        passed[0] += 1_000.0
        return play(*args)

    clock = SimpleNamespace(perf_counter=lambda: passed[0] + 1e-3 * next(now))
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "play", slow_play)
    script.run(tmp_path / "run")
    summary = read_json(tmp_path / "run" / "summary.json")
    validations = 0 if script.task.demos else len(summary["curve"])
    assert summary["wall_seconds"] == pytest.approx(1_000 * validations, abs=10)


def test_what_the_summary_tells_of_whom(watcher, tmp_path, monkeypatch, quick):
    module, seen, played = watcher.module, [], []
    play = module.play

    def watched_play(*args):
        played.append(play(*args))
        return played[-1]

    def distances(*args):
        seen.append(args)
        return {"random": 1.0, "expert": 0.25, "learner": 0.5}

    monkeypatch.setattr(module, "play", watched_play)
    monkeypatch.setattr(module, "occupancy_distances", distances)
    watcher.run(tmp_path / "run")
    summary = read_json(tmp_path / "run" / "summary.json")
    _, others, held_out = module.load_demos(argparse.Namespace(**summary["args"]))
    ((_, apart, samples),) = seen
    random, learner = played[-1], played[-2]

    def same(ours, theirs):
        pairs = itertools.zip_longest(ours, theirs)
        return all(np.array_equal(a["observations"], b["observations"]) for a, b in pairs)

    assert same(apart, held_out) and same(samples["expert"], others)
    assert samples["learner"] is learner and samples["random"] is random
    for name, episodes in (("random", random), ("learner", learner), ("expert", others + held_out)):
        distance = {"random": 1.0, "expert": 0.25, "learner": 0.5}[name]
        assert summary[name] == {**module.statistics(episodes), "occupancy_distance": distance}


@pytest.mark.applies(lambda script: script.module.METRIC == "success_rate")
def test_success_is_a_return_above_0(script):
    """A lap that was cut off has return 0, which is no success."""
    episodes = [{"rewards": np.array([0.0, last])} for last in (-1, 0, 3, 3)]
    assert script.module.statistics(episodes)["success_rate"] == 0.5


@pytest.mark.applies(lambda script: "bc" in script.script or "offline" in script.script)
def test_it_learns_from_every_pair_and_tells_how_well(script, tmp_path, monkeypatch, quick):
    module, drawn, tensors = script.module, [], script.module.tensors
    flags = ("--policy-lr", 1e-2) if "offline" in script.script else ("--learning-rate", 1e-2)
    forward = module.Policy.forward

    def watched(policy, observations):
        drawn.append(observations)
        return forward(policy, observations)

    monkeypatch.setattr(module.Policy, "forward", watched)
    script.run(tmp_path / "run", *flags, budget=600)
    summary = read_json(tmp_path / "run" / "summary.json")
    saved = torch.load(tmp_path / "run" / "policy.pt", weights_only=True)
    policy = module.Policy(8)
    policy.load_state_dict(saved["weights"])
    demos, _, held_out = module.load_demos(argparse.Namespace(**summary["args"]))
    for name, episodes in (("demonstrations", demos), ("held_out", held_out)):
        observations, actions = tensors(episodes)
        greedy = policy.network(observations).softmax(-1)[:, 1] > 0.5
        share = float((greedy == (actions == 1)).double().mean())
        assert summary["curve"][-1][f"accuracy/{name}"] == pytest.approx(share, abs=1e-9)
        assert share > 0.7  # a half by chance
    observations, _ = tensors(demos)
    assert len(torch.cat(drawn).unique(dim=0)) == len(observations.unique(dim=0))


@pytest.mark.applies(lambda script: "offline" in script.script)
def test_an_offline_iteration(script, tmp_path, monkeypatch, quick):
    """Rewards are D's logits for the very policy that is updated; both step sizes fall."""
    module, logits, sizes, given = script.module, [], [], []
    names = ("discriminator_logits", "natural_policy_loss", "descend")
    as_it_is = {name: getattr(module, name) for name in names}

    def watched_logits(network, observations, log_probs):
        logits.append(
            (log_probs, as_it_is["discriminator_logits"](network, observations, log_probs))
        )
        return logits[-1][1]

    def watched_loss(log_probs, rewards):
        given.append(log_probs is logits[-1][0] and rewards is logits[-1][1])
        return as_it_is["natural_policy_loss"](log_probs, rewards)

    def watched_descend(optimizer, loss):
        sizes.append(optimizer.param_groups[0]["lr"])
        as_it_is["descend"](optimizer, loss)

    for name, spy in zip(names, (watched_logits, watched_loss, watched_descend)):
        monkeypatch.setattr(module, name, spy)
    monkeypatch.setattr(module, "SCHEDULE", 200)
    flags = ("--policy-updates", 3, "--policy-lr", 0.5, "--discriminator-lr", 0.25)
    script.run(tmp_path / "run", *flags)
    assert given == [True] * 900
    left = [max(1 - i / 200, module.FINAL_LR) for i in range(300)]
    assert sizes == pytest.approx([size * x for x in left for size in (0.25, 0.5, 0.5, 0.5)])
