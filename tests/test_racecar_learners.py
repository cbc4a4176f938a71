"""What the race car's scripts add to CartPole's: features, actions, absorbing states, resuming."""

import argparse
import copy
import importlib
import json
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
    """True in the last state of a lap, false in that of a crash and everywhere else."""
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
    # No reset frame is in the batch: each state leads to the next, except at an end
    same = (batch["next_observations"][:-1] == batch["observations"][1:]).all(-1)
    assert torch.equal(same, ~done[:-1])


def test_the_ratio_is_1_before_the_first_update_of_an_iteration(tmp_path, monkeypatch, quick):
    """Log-probabilities are those of the Gaussian's samples, not of actions clipped to the box."""
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
    """With schedules that have ended, are half-way, and (as by default) have hardly begun."""
    module = learner.module
    for schedule, left in ((64, module.FINAL_STD / module.STD), (256, 0.5), (10**9, 1.0)):
        folder = tmp_path / str(schedule)
        learner.run(folder, "--schedule", str(schedule))
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        steps = checkpoint["count"]["env_steps"] - 64  # before the last rollout of 2 x 32
        assert schedule != 256 or steps == 128
        assert math.isclose(checkpoint["policy"]["std"], left * module.STD, rel_tol=1e-5)


def test_a_default_run_lies_within_the_schedule(module):
    args = module.parse_args([])
    assert args.total_steps <= args.schedule and args.absorbing


def test_a_step_of_the_policy_is_down_the_slope_of_its_loss(module):
    policy, critic = module.Policy(8), module.Critic(8)
    observations, actions = torch.randn(40, 9), torch.randn(40, 2)
    advantages, returns = torch.randn(40) * 3 + 1, torch.randn(40)
    standard = (advantages - advantages.mean()) / advantages.std()
    gain = (standard * policy(observations).log_prob(actions)).mean()
    error = (critic(observations) - returns).square().mean()
    parameters = [*policy.parameters(), *critic.parameters()]
    slopes = torch.autograd.grad(error - gain, parameters)
    expected = [x.detach() - 1e-3 * slope for x, slope in zip(parameters, slopes)]
    args, optimizer = module.parse_args(["--epochs", "1"]), torch.optim.SGD(parameters, 1e-3)
    module.update_policy(
        policy, critic, optimizer, observations, actions, advantages, returns, args
    )
    for found, exact in zip(parameters, expected):
        assert torch.allclose(found, exact, atol=1e-6)


@pytest.fixture
def watched(learner, module, monkeypatch, tmp_path, quick):
    """One iteration on a rollout in which car 0 finishes and is cut off, and car 1 hits walls."""

    def train(*flags):
        seen = {"discriminator updates": 0}
        rollout, update = module.rollout, module.update_policy
        update_d, make_d = module.update_discriminator, module.Discriminator

        def doctored(*args):
            batch, ended = rollout(*args)
            batch["terminated"][:], batch["truncated"][:] = False, False
            batch["terminated"][10, 0] = batch["terminated"][[20, 25], 1] = True
            batch["truncated"][15, 0] = True
            batch["next_observations"][10, 0, :2] = torch.tensor(racecar_env.FINISH)
            seen["batch"] = batch
            return batch, ended

        def watched_d(discriminator, optimizer, expert_pairs, policy_pairs, args):
            seen["discriminator updates"] += 1
            seen["expert pairs"], seen["policy pairs"] = expert_pairs, policy_pairs
            return update_d(discriminator, optimizer, expert_pairs, policy_pairs, args)

        def watched_make(*args):
            seen["discriminator"] = make_d(*args)
            return seen["discriminator"]

        def watched_update(policy, critic, optimizer, *rest):
            with torch.no_grad():
                seen["values"] = critic(seen["batch"]["observations"])
                seen["next values"] = critic(seen["batch"]["next_observations"])
            seen.update(zip(("observations", "actions", "advantages", "returns", "args"), rest))
            return update(policy, critic, optimizer, *rest)

        with monkeypatch.context() as patch:
            for name, spy in (
                ("rollout", doctored),
                ("update_discriminator", watched_d),
                ("Discriminator", watched_make),
                ("update_policy", watched_update),
            ):
                patch.setattr(module, name, spy)
            learner.run(tmp_path / str(len(list(tmp_path.iterdir()))), *flags, budget=1)
        return seen

    return train


@pytest.mark.parametrize(
    "flags",
    [
        "--absorbing --reward gail --gae-lambda 0.9",
        "--no-absorbing --reward airl --gae-lambda 0.8",
        "--absorbing --control constant-reward",
        "--absorbing --control frozen-discriminator",
    ],
)
def test_what_policy_and_discriminator_are_updated_with(watched, module, flags):
    seen = watched(*flags.split())
    args, batch = seen["args"], seen["batch"]
    constant = args.control == "constant-reward"
    absorbing = args.absorbing and not constant
    with torch.no_grad():
        pairs = module.make_pairs(batch["observations"], batch["actions"])
        rewards = module.imitation_reward(seen["discriminator"](pairs), args.reward)
        flags = torch.tensor([[1.0], [-1.0]]) * torch.eye(13)[-1]  # after the finish; after a wall
        after = module.imitation_reward(seen["discriminator"](flags), args.reward)
    rewards = torch.ones_like(rewards) if constant else rewards
    after = after / (1 - args.gamma) * absorbing
    ends = {(10, 0): after[0], (20, 1): after[1], (25, 1): after[1]}
    expected = torch.zeros(32, 2)
    for car in range(2):
        for step in range(32):
            weight = 1.0
            for t in range(step, 32):
                following = ends.get((t, car), seen["next values"][t, car])
                delta = rewards[t, car] + args.gamma * following - seen["values"][t, car]
                expected[step, car] += weight * delta
                weight *= args.gamma * args.gae_lambda
                if (t, car) in {*ends, (15, 0)}:
                    break
    close = {"atol": 1e-3, "rtol": 1e-4}
    assert torch.allclose(seen["advantages"], expected.flatten(), **close)
    assert torch.allclose(seen["returns"], (expected + seen["values"]).flatten(), **close)
    assert seen["discriminator updates"] == (args.control == "none")
    if args.control == "none":
        later = round(1 / (1 - args.gamma)) * absorbing
        learners, experts = seen["policy pairs"], seen["expert pairs"]
        assert torch.equal(learners[:64], pairs.flatten(0, 1))
        assert sorted(learners[64:, 12].tolist()) == [-1] * 2 * later + [1] * later
        demos, _, _ = module.load_demos(args)
        observations, actions = module.tensors(demos)
        assert torch.equal(experts[: len(actions), :10], module.features(observations))
        executed = actions * torch.tensor([1, 2]) - torch.tensor([0, 1])  # throttle, -1 to 1
        assert torch.allclose(experts[: len(actions), 10:12], executed, atol=1e-6)
        assert experts[len(actions) :, 12].tolist() == [1] * 4 * later  # all demonstrated laps end


def test_shuffled_expert_keeps_states_and_actions_but_not_which_belong_together(watched):
    shuffled, plain = (
        watched("--no-absorbing", *f)["expert pairs"]
        for f in (["--control", "shuffled-expert"], [])
    )
    assert torch.equal(shuffled[:, :10], plain[:, :10])
    assert torch.equal(shuffled[:, 10].sort().values, plain[:, 10].sort().values)
    assert (shuffled[:, 10:12] == plain[:, 10:12]).all(-1).float().mean() < 0.1


def test_the_average_is_of_the_updated_policies_and_is_what_is_evaluated(
    learner, module, tmp_path, monkeypatch, quick
):
    """With the last policy's deviation."""
    updated, evaluated = [], []
    update_policy, evaluate = module.update_policy, module.Run.evaluate

    def watched_update(policy, *rest):
        result = update_policy(policy, *rest)
        updated.append(copy.deepcopy(policy.state_dict()))
        return result

    def watched_evaluate(run, policy, offset):
        evaluated.append(copy.deepcopy(policy.state_dict()))
        return evaluate(run, policy, offset)

    monkeypatch.setattr(module, "update_policy", watched_update)
    monkeypatch.setattr(module.Run, "evaluate", watched_evaluate)
    learner.run(tmp_path / "run", "--eval-every", 1, "--policy-lr", 0.1, "--schedule", 300)
    assert len(updated) == len(evaluated) - 1 == 3
    for name in updated[0].keys() - {"std"}:
        exact = updated[0][name]
        for found, policy in zip(evaluated, [*updated, updated[-1]]):
            if found is not evaluated[0] and found is not evaluated[-1]:
                exact = module.AVERAGE * exact + (1 - module.AVERAGE) * policy[name]
            assert torch.allclose(found[name], exact, atol=1e-6)
    for found, policy in zip(evaluated, [*updated, updated[-1]]):
        assert found["std"] == policy["std"]


def test_step_sizes_by_the_schedule(learner, module, tmp_path, quick):
    """Step sizes, where test_the_schedule_is_counted_in_steps has the actions' deviation."""
    power = 2 if "reinforce" in learner.script else 1
    for schedule, left in ((64, module.FINAL_LR), (256, 0.5)):
        flags = ("--policy-lr", 0.5, "--critic-lr", 0.25, "--discriminator-lr", 0.125)
        learner.run(tmp_path / str(schedule), "--schedule", schedule, *flags)
        checkpoint = torch.load(tmp_path / str(schedule) / "checkpoint.pt", weights_only=True)
        names = ("optimizer", "discriminator_optimizer")
        found = [group["lr"] for name in names for group in checkpoint[name]["param_groups"]]
        assert found == pytest.approx([0.5 * left**power, 0.25, 0.125 * left])


def test_how_episodes_ended(learner, module, tmp_path, monkeypatch, quick):
    """As in test_what_follows_an_end, where all episodes end at a wall."""
    monkeypatch.setattr(module, "STD", 1.0)
    learner.run(tmp_path / "run", "--num-steps", 100, budget=1)
    scalars = json.loads((tmp_path / "run" / "summary.json").read_text())["curve"][-1]
    ended = [scalars[f"charts/ended_at_{where}"] for where in ("wall", "finish")]
    assert ended == [1, 0]


def test_the_discriminators_units_turn_where_the_expert_was(learner, module, tmp_path, quick):
    learner.run(tmp_path / "run", "--no-absorbing", "--control", "frozen-discriminator", budget=1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["discriminator"]
    demos, _, _ = module.load_demos(argparse.Namespace(**summary["args"]))
    observations, actions = module.tensors(demos)
    pairs = module.make_pairs(observations, module.from_box(actions)) / torch.tensor(module.UNITS)
    weight, bias = (saved[f"network.0.{name}"] for name in ("weight", "bias"))
    assert (pairs @ weight.T + bias).abs().min(0).values.max() < 1e-4
