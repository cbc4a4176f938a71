"""experts/train.py: tiny real trainings through its command line, and what it writes."""

import json
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import train
from scripts import AGGREVATED, Case
from test_converters import check_same


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the program in a new folder; gives its exit status and what it wrote to stderr."""
    monkeypatch.setattr(train, "CHECKED", 4)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = train.main([*words, "--eval-episodes", "2"])
        return status, capsys.readouterr().err

    return run


def build(algorithm, env_id):
    """A model that has not been trained, and a few states as it sees them."""
    if algorithm == "tqc":
        pytest.importorskip("sbx")
    words = (env_id, "--algorithm", algorithm, "--total-steps", "128", "--demos", "x.npz")
    model = train.build(train.parse_args([*words, "--out", "x"]), 0)
    states = np.random.default_rng(0).normal(size=(50, *model.observation_space.shape))
    return model, states.astype(np.float32)


def test_demonstrations_of_discrete_actions(run, tmp_path):
    few = ("--total-steps", "512", "--episodes", "3", "--out", "run", "--demos", "new/a.npz")
    assert run("CartPole-v1", *few) == (0, "")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"]
    demos = np.load("new/a.npz", allow_pickle=False)
    starts, rewards = demos["episode_starts"], demos["rewards"]
    assert (demos["actions"].dtype, rewards.dtype, starts.dtype) == (np.int64, np.float32, bool)
    assert starts.sum() == 3 and starts[0] and demos["terminated"].tolist() == [True] * 3
    about = json.loads(str(demos["metadata"]))
    assert about["returns"] == np.add.reduceat(rewards, np.flatnonzero(starts)).tolist()
    assert about["env_id"] == "CartPole-v1" and about["score"]["episodes"] == 4


def test_float64_observations_are_recorded_as_the_policy_saw_them(run):
    few = ("--algorithm", "sac", "--total-steps", "24", "--out", "run", "--episodes", "2")
    few += ("--set", "ent_coef=0.1")
    assert run("ToyBox-v0", *few, "--demos", "a.npz", "--expert", "a.pt") == (0, "")
    demos, (policy, *_) = np.load("a.npz"), train.load_policy("a.pt")
    assert (demos["observations"].dtype, demos["actions"].dtype) == (np.float32, np.float32)
    assert np.array_equal([policy.act(o) for o in demos["observations"]], demos["actions"])


def test_an_expert_at_the_edge_of_its_box_stays_inside():
    """In float32, -0.1 + (0.2 + 0.1) is more than 0.2."""
    space = gym.spaces.Box(np.float32([-0.1]), np.float32([0.2]))
    policy = train.Policy("td3", [torch.zeros(1, 3), torch.tensor([20.0])], space)
    assert space.contains(policy.act(np.zeros(3, np.float32)))


def test_a_policy_is_picked_on_its_own_task(run):
    """Its box stays, here one of float64."""
    few = ("--algorithm", "sac", "--total-steps", "24", "--out", "run", "--expert", "a.pt")
    assert run("toys:Rounding-v0", *few) == (0, "")
    pick = ("--pick", "-1000", "1000", "--out", "run", "--expert", "b.pt")
    assert run("toys:Rounding-v0", *pick) == (0, "")
    first, picked = (torch.load(name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert picked["env_id"] == "Rounding-v0" and picked["settings"] == first["settings"]
    record = ("--record", "b.pt", "--episodes", "3", "--demos", "b.npz")
    for words in (("--pick", "-1000", "1000", "--out", "run"), record):
        status, line = run("Pendulum-v1", *words)
        assert status == 2 and "for Rounding-v0, not Pendulum-v1" in line
    assert run("toys:Rounding-v0", *record) == (0, "")
    demos, (policy, *_) = np.load("b.npz"), train.load_policy("b.pt")
    assert np.array_equal([policy.act(o) for o in demos["observations"]], demos["actions"])
    assert demos["episode_starts"].sum() == 3


def test_a_weak_expert_is_refused_and_nothing_is_written(run, tmp_path):
    few = ("--total-steps", "256", "--out", "run", "--demos", "new/a.npz", "--at-least", "500")
    status, errors = run("CartPole-v1", *few)
    assert status == 1 and "500" in errors and errors.count("\n") == 1
    learnt = ("--algorithm", "ppo", "--out", "b", "--set", "n_steps=8", "--set", "batch_size=8")
    status, errors = run("PayingNaN-v0", *few, *learnt)
    assert status == 1 and "ppo on PayingNaN-v0" in errors and errors.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_an_existing_file_is_refused_before_training(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("a.npz").write_bytes(b"mine")
    refused(Case("train"), ["CartPole-v1", "--demos", "a.npz", "--out", "run"], "a.npz")
    refused(Case("train"), ["CartPole-v1", "--set", "use_sde=true", "--out", "run"], "use_sde")
    record = ["--record", "a.pt", "--demos", "b.npz", "--sampled"]
    refused(Case("train"), record, "--sampled")


@pytest.mark.parametrize("algorithm", ["ppo", "sac", "tqc"])
def test_a_stopped_run_goes_on(run, algorithm):
    model, _ = build(algorithm, "ToyBox-v0")
    few = ("--algorithm", algorithm, "--total-steps", "128", "--eval-every", "64", "--out", "run")
    assert run("ToyBox-v0", *few, "--demos", "a.npz") == (0, "")
    (state,) = train.read("run/checkpoint.pt", "state")
    train.load_state(model, algorithm, state)
    again = train.state_of(model, algorithm)
    assert again.pop("jax", None) == state.pop("jax", None)
    torch.testing.assert_close(again, state, rtol=0, atol=0)
    assert run("--resume", "run", "--demos", "b.npz", "--total-steps", "192", "--sampled")[0] == 0
    with open("run/curve.json") as file:
        assert [point["steps"] // 64 for point in json.load(file)["curve"]] == [1, 2, 3]


def test_a_full_buffer_goes_on_from_its_oldest_row():
    words = ["ToyBox-v0", "--algorithm", "sac", "--total-steps", "60", "--out", "x"]
    args = train.parse_args([*words, "--set", "learning_starts=1000", "--demos", "x.npz"])
    model, again = (train.build(args, 0) for _ in range(2))
    model.learn(90)
    train.load_state(again, "sac", train.state_of(model, "sac"))
    assert (again.replay_buffer.pos, again.replay_buffer.full) == (0, True)
    in_order = np.roll(model.replay_buffer.rewards, -model.replay_buffer.pos, 0)
    assert np.array_equal(again.replay_buffer.rewards, in_order)


def test_the_command_after_a_signal_is_complete(run, monkeypatch):
    monkeypatch.setattr(train, "train", lambda args: signal.raise_signal(signal.SIGTERM))
    status, line = run("ToyBox-v0", "--out", "a run", "--demos", "d.npz", "--at-least", "3")
    assert status == 143 and line.endswith(" '--resume=a run' --demos=d.npz --at-least=3.0\n")
    status, line = run("--pick", "1", "2", "--out", "none")
    assert status == 1 and "none of 0 policies" in line


def test_a_file_that_was_made_meanwhile_is_kept(run, monkeypatch):
    monkeypatch.setattr(train, "train", lambda args: (args.demos.write_text("mine"), 1))
    status, line = run("ToyBox-v0", "--out", "a", "--demos", "d.npz")
    assert status == 2 and "d.npz: exists by now" in line and Path("d.npz").read_text() == "mine"


QUERIED = ["sac", "td3", "tqc"]
GREEDY = [("ppo", "CartPole-v1"), ("dqn", "CartPole-v1")]
GREEDY += [(name, box) for name in QUERIED for box in ("Pendulum-v1", "ToyBox-v0")]


@pytest.mark.parametrize("algorithm, env_id", GREEDY)
def test_greedy_actions_are_those_of_the_model(algorithm, env_id, tmp_path):
    model, states = build(algorithm, env_id)
    policy = train.Policy(algorithm, train.layers_of(model, algorithm), model.action_space)
    expected = model.predict(states, deterministic=True)[0]
    assert np.abs([policy.act(state) for state in states] - expected).max() < 1e-5
    assert len(np.unique(expected)) > 1
    if algorithm in QUERIED:
        policy.save(tmp_path / "a.pt", env_id, {})
        check_same(tmp_path / "a.pt", model)


def test_an_episode_without_an_end_is_cut():
    always = type("Always", (), {"act": lambda self, observation, generator: 1})()
    (played,) = train.play(always, "toys:Endless-v0", 1, 0)
    assert len(played["rewards"]) == 10_000 and not played["terminated"]


def test_a_walker_with_a_memory_walks_the_same_course():
    """Two steps of it for each action, the last three observations, the same returns and ends."""
    env = gym.make("hardcore_memory:HardcoreMemory-v0")
    course = gym.make("BipedalWalkerHardcore-v3")
    seen, _ = env.reset(seed=3)
    frames = [course.reset(seed=3)[0]] * 3
    terminated, generator = False, np.random.default_rng(0)
    while not terminated:
        assert np.array_equal(seen, np.concatenate(frames[-3:]))
        action, paid, fell = generator.uniform(-1, 1, 4).astype(np.float32), 0.0, False
        seen, reward, terminated, *_ = env.step(action)
        for _ in range(2):
            if not fell:
                observation, more, fell, *_ = course.step(action)
                paid += more
        frames.append(observation)
        assert (reward, terminated) == (paid, fell)
    fall = AGGREVATED.module.is_fall
    assert fall(env.spec.id, reward, True) and not fall(env.spec.id, 0.3, True)  # it fell; the end
