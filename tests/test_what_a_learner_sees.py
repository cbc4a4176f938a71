"""Training reads observations, actions, terminated and truncated: no reward, no info, no test."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import WrapperSpec
from scripts import AGGREVATED, BC, OFFLINE, PPO, RACECAR, REINFORCE, demos
from written import checkpoint, read_json, same, weights


class Blind(gym.Wrapper):
    """Every reward is None, info is empty."""

    def reset(self, **settings):
        return self.env.reset(**settings)[0], {}

    def step(self, action):
        observation, _, terminated, truncated, _ = self.env.step(action)
        return observation, None, terminated, truncated, {}


class Diary(gym.Wrapper):
    """Remembers the seed of each reset, or of the one it draws from, and the number of steps."""

    pages, page = [], (None, 0)

    def reset(self, **settings):
        self.page = [settings.get("seed", self.page[0]), 0]
        self.pages.append(self.page)
        return self.env.reset(**settings)

    def step(self, action):
        self.page[1] += 1
        return self.env.step(action)


def wrap(env_id, wrapper, monkeypatch):
    """Put a wrapper around every environment of a task that is made from now on."""
    spec = copy.copy(gym.spec(env_id))
    spec.vector_entry_point = None
    spec.additional_wrappers = (WrapperSpec("Test", f"{__name__}:{wrapper.__name__}", {}),)
    monkeypatch.setitem(gym.registry, env_id, spec)


@pytest.mark.parametrize("case", [BC, PPO, OFFLINE, REINFORCE, *RACECAR], ids=str)
def test_rewards_and_info_change_nothing(case, tmp_path, monkeypatch):
    expected = weights(case.finished)
    wrap(case.env_id, Blind, monkeypatch)
    assert same(case.run(tmp_path / "run"), expected)
    learner = read_json(tmp_path / "run" / "summary.json")["learner"]
    assert learner["return_mean"] is None and "success_rate" not in learner  # they were hidden


@pytest.mark.parametrize("case", [BC, PPO], ids=str)
def test_recorded_rewards_and_held_out_episodes_change_nothing(case, tmp_path):
    arrays = dict(np.load(demos(case.env_id)))
    del arrays["rewards"]
    arrays["observations"][arrays["episode_starts"].cumsum() > 4] += 1  # the last 20 of 24
    np.savez(tmp_path / "demos.npz", **arrays)
    policy = case.run(tmp_path / "run", "--num-demos", 4, "--demos", tmp_path / "demos.npz")
    assert same(policy, case.run(tmp_path / "again", "--num-demos", 4))
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["expert"]["return_mean"] is None and summary["verdict"].startswith("no verdict")


SEEDED = [BC, PPO, OFFLINE, AGGREVATED, AGGREVATED.on("SeedingBox-v0")]  # this one seeds PyTorch


@pytest.mark.parametrize("case", SEEDED, ids=str)
def test_no_seed_is_shared(case, tmp_path, monkeypatch):
    """Nor is a task stepped by what learns without it. AggreVaTeD's expert plays twice."""
    case.argv()  # records the demonstrations
    wrap(case.env_id, Diary, monkeypatch)
    steps, evaluated = 0, set()
    for seed in (1, 2):
        Diary.pages.clear()
        case.run(tmp_path / str(seed), "--seed", seed)
        pages = [page for page in Diary.pages if page[0] != 0]  # a task is tried before a run
        seeds = [number for number, _ in pages]
        assert None not in seeds
        ours = {number for number in seeds if number >= 1_000_000}
        assert len(ours) == (30 if case.queries else 12)  # 20 or 2 to evaluate, 10 at the end
        assert not ours & evaluated
        evaluated |= ours
        others = [number for number in seeds if number < 1_000_000]
        assert len(others) == len(set(others))
        steps += sum(n for number, n in pages if number in others)
    in_training = 0 if case in (BC, OFFLINE) else 2 * 3 * case.every
    assert steps > in_training if case.queries else steps == in_training


CRITIC = "--gamma 0.9 --critic-lr 0.02 --num-envs 4 --num-steps 30 --epochs 5 --schedule 1000000"
CRITIC += " --eval-every 1000000 --total-steps 4800"


@pytest.mark.parametrize("env_id, value", [("Truncating-v0", 10.0), ("Terminating-v0", 1.9)])
def test_a_truncated_episode_is_bootstrapped_and_a_terminated_one_ends(env_id, value, tmp_path):
    """The critic's value, if every step pays 1: 1 / (1 - gamma), or the mean over three steps."""
    PPO.on(env_id).run(tmp_path / "run", *CRITIC.split(), "--control", "constant-reward")
    assert critic_value(tmp_path / "run") == pytest.approx(value, abs=0.15)


def test_after_an_end_the_absorbing_state_pays_for_ever(tmp_path):
    """Here a discriminator that does not learn judges it."""
    flags = ["--control", "frozen-discriminator", "--policy-lr", 0, "--absorbing", "yes"]
    PPO.on("Terminating-v0").run(tmp_path / "run", *CRITIC.split(), *flags)
    gail, parts = PPO.module, checkpoint(tmp_path / "run")["parts"]
    policy, _ = gail.load_policy(tmp_path / "run" / "policy.pt")
    discriminator = gail.Discriminator(policy, 8)
    discriminator.load_state_dict(parts["discriminator"])
    with torch.no_grad():
        seen = torch.ones(2, 1)
        pairs = discriminator.make_pairs(seen, torch.arange(2))
        pays = gail.imitation_reward(discriminator(pairs), "gail")
        pay = float((policy(seen[:1]).probs[0] * pays).sum())
        after = discriminator(discriminator.absorbing_pairs(pairs))
        forever = gail.imitation_reward(after, "gail")
    assert forever[0] == forever[1]
    end = float(forever[0]) / (1 - 0.9)
    steps = [pay * sum(0.9**i for i in range(n)) + 0.9**n * end for n in (1, 2, 3)]
    assert critic_value(tmp_path / "run") == pytest.approx(np.mean(steps), rel=0.05)


def critic_value(folder):
    """Of the one state there is, which is 0 when it is standardised, in units of a reward: the
    script learns from rewards times 1 - gamma, and gamma is 0.9."""
    critic, value = checkpoint(folder)["parts"]["critic"], torch.zeros(1)
    layers = [weight for name, weight in critic.items() if name.endswith(("weight", "bias"))]
    for weight, bias in zip(layers[::2], layers[1::2]):
        value = weight @ value.tanh() + bias
    return float(value) / (1 - 0.9)


def test_an_end_stays_among_few_pairs_and_weighs_less():
    flags = ["--env-id", "Acrobot-v1", "--num-demos", "4", "--num-pairs", "10"]
    args = PPO.module.parse_args(flags)
    chosen, whole, _ = PPO.module.load_demos(args, **PPO.module.sizes(args.env_id))
    ends = {tuple(episode.observations[-1]): episode for episode in whole}
    learnt = [ends[tuple(few.observations[-1])] for few in chosen]
    share = 40 / sum(len(episode.actions) for episode in learnt)
    for few, episode in zip(chosen, learnt):
        assert len(few.actions) == 10 and len(np.unique(few.observations, axis=0)) == 10
        assert {*map(tuple, few.observations)} < {*map(tuple, episode.observations)}
        assert few.terminated.tolist() == pytest.approx([0] * 9 + [share])


BEST = [  # by the loss on other pairs; by the validated return, which falls without an anchor
    (BC, "losses/checked", np.argmin, "--learning-rate 0.1 --num-demos 2 --num-pairs 10"),
    (AGGREVATED, "return_mean", np.argmax, "--anchor 0 --policy-updates 50 --critic-updates 1"),
]


@pytest.mark.parametrize("case, measure, best_of, flags", BEST, ids=["cloning", "aggrevated"])
def test_the_best_policy_is_kept(case, measure, best_of, flags, tmp_path):
    """And evaluated: a run that ends with the best ends with the same policy and result."""
    kept = case.run(tmp_path / "whole", *flags.split(), iterations=8)
    whole = read_json(tmp_path / "whole" / "summary.json")
    best = int(best_of([point[measure] for point in whole["curve"]]))
    assert best < 7
    assert same(kept, case.run(tmp_path / "short", *flags.split(), iterations=best + 1))
    assert whole["learner"] == read_json(tmp_path / "short" / "summary.json")["learner"]


@pytest.mark.parametrize("case", [PPO, *RACECAR[:1]], ids=str)
def test_cloning_beside_ppo_pulls_towards_the_expert(case, tmp_path):
    """Where the discriminator is not trained, nothing else does."""
    losses = []
    for weight in (0, 100):
        folder = tmp_path / f"{weight}"
        flags = ["--control", "frozen-discriminator", "--epochs", 40, "--bc-weight", weight]
        case.run(folder, *flags, iterations=6)
        args = case.module.parse_args(case.argv())
        chosen, *_ = case.module.load_demos(args, **case.module.sizes(args.env_id))
        observations, actions, *_ = case.module.tensors(chosen)
        policy, _ = case.module.load_policy(folder / "policy.pt")
        with torch.no_grad():
            pairs = observations, policy.from_env(actions)
            losses.append(float(case.module.behavioural_cloning_loss(policy, *pairs)))
    assert losses[1] < losses[0] - 0.1


@pytest.mark.parametrize("case", [BC, AGGREVATED], ids=str)
def test_an_episode_of_an_evaluation_has_no_past(case, tmp_path):
    """Some tasks, Box2D's for one, remember at a reset what came before it. So does this one, and
    all of its environments write to the same array."""
    found = []
    for name in (case.env_id, case.env_id.replace("Toy", "Remembering")):
        case.on(name).run(tmp_path / name, "--eval-episodes", 10, iterations=1)
        summary = read_json(tmp_path / name / "summary.json")
        found.append([summary["random"], summary["learner"]])
    assert found[0] == found[1]


def test_an_episode_without_an_end_is_cut(tmp_path):
    BC.on("Endless-v0").run(tmp_path / "run", iterations=1)
    assert read_json(tmp_path / "run" / "summary.json")["learner"]["length_mean"] == 10_000


CARELESS = [BC.on("Careless-v0"), PPO.on("Careless-v0"), AGGREVATED.on("CarelessBox-v0")]


@pytest.mark.parametrize("case", CARELESS, ids=str)
def test_a_task_that_draws_from_other_generators(case, tmp_path):
    """The seed fixes these, too; and evaluating, as often as there is time for, changes nothing."""
    first = case.run(tmp_path / "a")
    second = case.run(tmp_path / "b", *(() if case.queries else ("--eval-every", 10**6)))
    a, b = (read_json(tmp_path / name / "summary.json") for name in "ab")
    assert same(first, second) and a["learner"] == b["learner"] and a["expert"] == b["expert"]


@pytest.mark.parametrize("env_id", ["Rounding-v0", "HalfBox-v0", "Last-v0", "Late-v0"])
def test_actions_are_in_the_task_s_space(env_id, tmp_path):
    """A box whose bounds no float32 has, or of narrower floats; Discrete up to its dtype's end."""
    PPO.on(env_id).run(tmp_path / "run")
    success = read_json(tmp_path / "run" / "summary.json")["learner"].get("success_rate")
    assert success == (1 if env_id == "Late-v0" else None)
