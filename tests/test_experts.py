"""The shipped demonstrations, how episodes are chosen from them, and how new ones are made."""

import json

import gymnasium as gym
import numpy as np
import pytest
from scripts import ROOT, TASKS, linear_rule, same

FILES = sorted((ROOT / "experts").glob("*.npz"))


def parse(watcher, *argv):
    return watcher.module.parse_args([str(argument) for argument in argv])


def test_there_are_some():
    assert FILES


@pytest.mark.applies(lambda watcher, path: path.stem.split("_")[0] in watcher.module.TASKS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_demonstrations(watcher, path):
    env_id = path.stem.split("_")[0]
    assert path.stat().st_size < 400_000
    episodes = watcher.module.read_demos(path, env_id)
    assert len(episodes) == 30
    score = watcher.module.statistics(episodes)[watcher.module.METRIC]
    assert score >= watcher.module.TASKS[env_id]
    for episode in episodes:
        assert len(episode["observations"]) == len(episode["actions"]) == len(episode["rewards"])
        if "CartPole" in env_id:  # one that reaches the time limit is not terminated
            limit = gym.spec(env_id).max_episode_steps
            assert episode["terminated"] == (len(episode["actions"]) < limit)
            assert np.abs(episode["observations"][0]).max() <= 0.05
    metadata = json.loads(str(np.load(path)["metadata"]))
    assert metadata["env_id"] == env_id and metadata["expert"]


def test_held_out_episodes_are_never_learnt_from(watcher):
    chosen = set()
    for seed in range(1, 21):
        args = parse(watcher, "--seed", seed, "--num-demos", 4)
        demos, others, held_out = watcher.module.load_demos(args)
        assert (len(demos), len(others), len(held_out)) == (4, 10, 20)
        firsts = [{e["observations"].tobytes() for e in x} for x in (demos, others, held_out)]
        assert len(firsts[0]) == 4 and firsts[0] <= firsts[1] and not firsts[1] & firsts[2]
        chosen |= firsts[0]
    assert len(chosen) == 10  # each of the others is chosen by some seed


def test_where_all_are_learnt_from_none_is_held_out(watcher):
    demos, others, held_out = watcher.module.load_demos(parse(watcher, "--num-demos", 11))
    assert (len(demos), len(others), len(held_out)) == (11, 30, 0)


def test_num_pairs(watcher):
    """That many random pairs of each episode, none twice, each state with its own action."""
    (demo,), (*others,), _ = watcher.module.load_demos(
        parse(watcher, "--num-demos", 1, "--num-pairs", 30)
    )
    observations, actions = watcher.module.tensors([demo])
    assert observations.shape == (30, *watcher.task.observation)
    assert actions.shape == (30, *watcher.task.action)
    assert len(observations.unique(dim=0)) == 30
    (source,) = [e for e in others if (e["observations"] == demo["observations"][0]).all(1).any()]
    for observation, action in zip(demo["observations"], demo["actions"]):
        (row,) = np.flatnonzero((source["observations"] == observation).all(1))
        assert np.array_equal(source["actions"][row], action)


# --- making new ones ------------------------------------------------------------------------------


# The race car's scripts have the same text as the CartPole scripts, and a hundred laps take long.
for_cartpoles = pytest.mark.applies(lambda watcher: watcher.task is TASKS["cartpole"])


@pytest.mark.applies(lambda watcher: watcher.script != "gail_racecar_reinforce")
def test_a_bad_expert_is_refused(watcher, tmp_path, monkeypatch, capsys):
    def always_right(observations):
        return np.ones((len(observations), *watcher.task.action), watcher.task.action_dtype)

    monkeypatch.setattr(watcher.module, "make_expert", lambda args: always_right)
    path = tmp_path / "new" / "demos.npz"
    assert watcher.module.main(["--record-demos", str(path)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "expert" in line and str(watcher.module.TASKS[watcher.task.env_id]) in line
    assert not list(path.parent.iterdir())


@for_cartpoles
def test_a_good_expert_is_recorded(watcher, tmp_path, monkeypatch):
    module, path = watcher.module, tmp_path / "new" / "demos.npz"
    env_id = watcher.task.env_id
    monkeypatch.setattr(module, "make_expert", lambda args: linear_rule)
    assert module.main(["--record-demos", str(path)]) == 0
    assert [p.name for p in path.parent.iterdir()] == ["demos.npz"]
    recorded = module.read_demos(path, env_id)
    seed = module.EVALUATION_SEEDS - 1_000
    played = module.play(linear_rule, env_id, 100, seed)[:30]
    assert len(recorded) == 30
    for ours, theirs in zip(recorded, played):
        assert ours["terminated"] == theirs["terminated"]
        for name in ("observations", "actions", "rewards"):
            assert np.array_equal(ours[name], theirs[name])


@pytest.mark.applies(lambda watcher: watcher.task is TASKS["racecar"])
def test_the_shipped_laps_are_the_experts(watcher):
    """The first ten, which are driven in one batch."""
    module = watcher.module
    recorded = module.read_demos(watcher.task.demos, "RaceCar-v0")
    seed = module.EVALUATION_SEEDS - 1_000
    played = module.play(module.make_expert(None), "RaceCar-v0", module.EVAL_ENVS, seed)
    for ours, theirs in zip(recorded, played):
        for name in ("observations", "actions", "rewards"):
            assert np.array_equal(ours[name], theirs[name])


@for_cartpoles
def test_missing_demonstrations_are_made_once(watcher, tmp_path, monkeypatch, quick):
    """Where none are shipped, they are kept in the folder of the runs."""
    monkeypatch.setattr(watcher.module, "DEMOS", "new_{env_id}_{expert}.npz")
    monkeypatch.setattr(watcher.module, "make_expert", lambda args: linear_rule)
    policy = watcher.run(tmp_path / "first")
    assert (tmp_path / "new_CartPole-v1_ppo.npz").exists()
    monkeypatch.delattr(watcher.module, "make_expert")
    assert same(watcher.run(tmp_path / "second"), policy)
