"""What the race car's scripts add to CartPole's: features, actions, absorbing states, resuming."""

import importlib
import math

import numpy as np
import pytest
import torch
from scripts import CASES, TASKS
from torch.distributions import Normal

pytest.importorskip("pybullet")
racecar_env = importlib.import_module("racecar_env")
RaceCarEnv, RaceCarVectorEnv = racecar_env.RaceCarEnv, racecar_env.RaceCarVectorEnv
LEARNERS = [case for case in CASES if case.task is TASKS["racecar"]]


@pytest.fixture(params=LEARNERS, ids=str)
def learner(request):
    return request.param


@pytest.fixture
def module(learner):
    return learner.module


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def driving(number, steps, seed=0):
    """Actions (steps, number, 2) that drive ahead, some into a wall sooner than others."""
    random = np.random.default_rng(seed)
    steering = random.uniform(-0.3, 0.3, (1, number)) + random.uniform(-0.1, 0.1, (steps, number))
    return np.stack([steering, np.full_like(steering, 0.9)], -1).astype(np.float32)


# --- the vector of cars ---------------------------------------------------------------------------


def test_cars_in_a_vector_drive_as_alone_and_rest_after_the_end():
    envs, alone = RaceCarVectorEnv(3), [RaceCarEnv() for _ in range(3)]
    observations, _ = envs.reset(seed=7)
    expected = np.stack([env.reset(seed=7 + i)[0] for i, env in enumerate(alone)])
    assert np.array_equal(observations, expected)
    over = np.zeros(3, bool)
    for actions in driving(3, 120):
        observations, rewards, terminated, truncated, info = envs.step(actions)
        for i, env in enumerate(alone):
            result = (expected[i], 0.0, False, False)
            if not over[i]:
                *result, facts = env.step(actions[i])
                expected[i] = result[0]
                assert info["is_success"][i] == facts["is_success"]
            found = (observations[i], rewards[i], terminated[i], truncated[i])
            assert all(np.array_equal(a, b) for a, b in zip(found, result, strict=True))
        over |= terminated | truncated
        if over.all():
            break
    assert over.all()
    observations, _ = envs.reset(options={"reset_mask": np.array([False, True, False])})
    expected[1], _ = alone[1].reset()
    assert np.array_equal(observations, expected)
    envs.close()
    for env in alone:
        env.close()


def test_progress_along_a_lap():
    controller, env = racecar_env.WaypointController(), RaceCarEnv()
    observation, _ = env.reset(seed=3)
    over, way = False, []
    while not over:
        way.append(racecar_env.progress(observation))
        observation, _, over, _, info = env.step(controller(observation))
    assert info["is_success"] and racecar_env.progress(observation) == 1
    assert way[0] == 0 and way == sorted(way) and 0.8 < way[-1] < 1
    env.close()


# --- mathematics ----------------------------------------------------------------------------------


def test_features(module):
    observations = torch.randn(5, 9)
    found = module.features(observations)
    assert found.shape == (5, 10)
    assert torch.equal(found[:, :2], observations[:, :2] * module.METRE)
    assert torch.allclose(torch.atan2(found[:, 4], found[:, 5]), observations[:, 4], atol=1e-5)
    turned = observations.clone()
    turned[:, 4] += 2 * math.pi
    assert torch.allclose(module.features(turned), found, atol=1e-5)


def test_actions_are_mapped_onto_the_cars_box(module):
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [-7.0, 7.0]])
    assert module.to_box(corners).tolist() == [[-1, 0], [1, 1], [0, 0.5], [-1, 1]]
    actions = torch.rand(50, 2) * 2 - 1
    assert torch.allclose(module.from_box(torch.as_tensor(module.to_box(actions))), actions)
    env = RaceCarEnv()
    assert np.array_equal([module.LOW, module.HIGH], [env.action_space.low, env.action_space.high])
    env.close()


def test_the_policy_is_a_gaussian(module):
    policy, observations, actions = module.Policy(8), torch.randn(6, 9), torch.randn(6, 2)
    policy.std.fill_(0.2)
    mean = policy(observations).mean
    expected = Normal(mean, 0.2).log_prob(actions).sum(-1)
    assert torch.allclose(policy(observations).log_prob(actions), expected)
    assert np.allclose(policy.act(observations.numpy()), module.to_box(mean.detach()))
    restored = module.Policy(**policy.settings)
    restored.load_state_dict(policy.state_dict())
    assert restored.std == policy.std


def test_every_unit_turns_at_one_of_the_inputs(module):
    layer, inputs = torch.nn.Linear(10, 64), 50 * torch.randn(30, 10)
    weight = layer.weight.clone()
    module.spread(layer, inputs)
    distance = layer(inputs).abs() / layer.weight.norm(dim=-1)  # (rows, units)
    assert distance.min(0).values.max() < 1e-4
    assert len(distance.min(0).indices.unique()) > 15  # of the rows
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 3.0])
def test_the_penalty_is_for_slopes_above_one_in_units(module, slope):
    units = torch.tensor(module.UNITS)
    discriminator = module.Discriminator(4, torch.zeros(13), units)
    discriminator.network = torch.nn.Linear(13, 1)
    with torch.no_grad():
        discriminator.network.weight.copy_(slope * torch.nn.functional.one_hot(torch.tensor(3), 13))
    pairs = torch.randn(5, 13), torch.randn(5, 13)
    penalty = module.gradient_penalty(discriminator, *pairs)
    assert float(penalty.detach()) == pytest.approx(max(0.0, slope - 1) ** 2)
    (gradient,) = torch.autograd.grad(penalty, discriminator.network.weight)
    assert float(gradient[0, 3]) == pytest.approx(2 * max(0.0, slope - 1))


def test_absorbing_pairs(module):
    pairs = module.make_pairs(torch.randn(10, 9), torch.randn(10, 2))
    assert (pairs[:, 12] == 0).all() and (pairs[:, 10:12].abs() <= 1).all()
    finished = torch.tensor([True, False])
    longer = module.add_absorbing_pairs(pairs, finished, gamma=0.95)
    assert torch.equal(longer[:10], pairs) and len(longer) == 10 + 2 * 20
    assert (longer[10:, :12] == 0).all()
    assert longer[10:, 12].tolist() == [1, -1] * 20
    assert torch.equal(module.add_absorbing_pairs(pairs, finished[:0], gamma=0.95), pairs)


def test_the_finish_is_the_environments(module):
    """On the last state of laps and of crashes, and nowhere else."""
    controller, env = racecar_env.WaypointController(), RaceCarEnv()
    for act, success in ((controller, True), (lambda observation: np.array([0, 1.0]), False)):
        observation, _ = env.reset(seed=3)
        over = False
        while not over:
            assert not module.at_finish(torch.as_tensor(observation))
            observation, _, over, _, info = env.step(act(observation))
        assert info["is_success"] == success == module.at_finish(torch.as_tensor(observation))
    env.close()


@pytest.mark.parametrize("flags", [["--absorbing"], ["--no-absorbing"]])
def test_what_follows_an_end(learner, module, flags, tmp_path, monkeypatch, quick):
    """The value after an end is D's reward for ever, or 0; elsewhere it is the critic's."""
    seen = {}

    def spy(name):
        original = getattr(module, name)

        def wrapped(*args):
            result = original(*args)
            seen.setdefault(name, []).append((args, result))
            return result

        monkeypatch.setattr(module, name, wrapped)

    for name in ("rollout", "Discriminator", "Critic", "generalized_advantages", "update_policy"):
        spy(name)
    # Full throttle from the start ends some episodes within the rollout
    monkeypatch.setattr(module, "STD", 1.0)
    flags = [*flags, "--num-steps", 100, "--policy-lr", 0, "--critic-lr", 0]
    learner.run(tmp_path / "run", *flags, budget=1)
    ((_, (batch, ended)),) = seen["rollout"]
    ((_, discriminator),), ((_, critic),) = seen["Discriminator"], seen["Critic"]
    ((arguments, _),) = seen["generalized_advantages"]
    rewards, values, next_values, done, gamma, _ = arguments
    args = seen["update_policy"][0][0][-1]
    terminated = batch["terminated"]
    assert terminated.any() and not terminated.all() and len(ended) == int(terminated.sum())
    pairs = module.make_pairs(batch["observations"], batch["actions"])
    with torch.no_grad():
        assert torch.allclose(rewards, module.imitation_reward(discriminator(pairs), args.reward))
        assert torch.allclose(values, critic(batch["observations"]))
        expected = critic(batch["next_observations"])
        ends = torch.zeros(int(terminated.sum()), 13)
        ends[:, 12] = -1  # at a wall, all of them
        forever = module.imitation_reward(discriminator(ends), args.reward) / (1 - gamma)
        expected[terminated] = forever * args.absorbing
    assert torch.allclose(next_values, expected, atol=1e-4)
    assert torch.equal(done, terminated | batch["truncated"])
    # No reset frame is in the batch: one state leads to the next, but for an end
    same = (batch["next_observations"][:-1] == batch["observations"][1:]).all(-1)
    assert torch.equal(same, ~done[:-1])


def test_the_ratio_is_1_before_the_first_update_of_an_iteration(tmp_path, monkeypatch, quick):
    """The actions of its log-probabilities are the Gaussian's, not those clipped to the box."""
    script = importlib.import_module("gail_racecar_ppo")
    case = next(case for case in LEARNERS if case.module is script)
    ppo_loss, rollout, ratios, samples = script.ppo_loss, script.rollout, [], []

    def spy(log_probs, old_log_probs, *args):
        ratios.append((log_probs - old_log_probs).detach().exp())
        return ppo_loss(log_probs, old_log_probs, *args)

    def watched(*args):
        result = rollout(*args)
        samples.append(result[0]["actions"])
        return result

    monkeypatch.setattr(script, "ppo_loss", spy)
    monkeypatch.setattr(script, "rollout", watched)
    monkeypatch.setattr(script, "STD", 1.0)
    assert script.main(case.argv(tmp_path / "run")) == 0
    assert torch.allclose(ratios[0], torch.ones(()), atol=1e-5)
    assert not torch.allclose(ratios[-1], torch.ones(()), atol=1e-5)
    assert (samples[0].abs() > 1).any()  # what a box would have clipped


# --- resuming -------------------------------------------------------------------------------------


def test_cars_in_mid_episode_go_on_from_a_checkpoint(module):
    cars, restored = (module.Cars("RaceCar-v0", 2) for _ in range(2))
    cars.reset(5)
    actions = driving(2, 90, seed=1)
    for action in actions[:60]:
        cars.step(action)
    assert len(cars.histories[0]) != len(cars.histories[1])  # one of them has ended
    restored.load_state_dict(cars.state_dict())
    assert np.array_equal(restored.observations, cars.observations)
    for action in actions[60:]:
        for ours, theirs in zip(cars.step(action)[0], restored.step(action)[0], strict=True):
            assert np.array_equal(ours, theirs)
    cars.envs.close()
    restored.envs.close()


def test_the_schedule_is_counted_in_steps(learner, tmp_path):
    """Over so many steps that it has ended; in the middle; as by default, hardly begun."""
    module = learner.module
    for schedule, left in ((64, module.FINAL_STD / module.STD), (256, 0.5), (10**9, 1.0)):
        folder = tmp_path / str(schedule)
        learner.run(folder, "--schedule", str(schedule))
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        steps = checkpoint["run"]["count"]["env_steps"] - 64  # before the last rollout of 2 x 32
        assert schedule != 256 or steps == 128
        assert math.isclose(checkpoint["policy"]["std"], left * module.STD, rel_tol=1e-5)


def test_a_default_run_lies_within_the_schedule(module):
    args = module.parse_args([])
    assert args.total_steps <= args.schedule and args.absorbing
