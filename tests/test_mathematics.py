"""The mathematics of the scripts against definitions written out another way."""

import copy
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from scripts import GAIL, Case, linear_rule
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

gail = pytest.importorskip("gail_cartpole")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- advantages -----------------------------------------------------------------------------------

STEPS, ENVS, GAMMA = 12, 3, 0.9


@pytest.fixture
def recorded():
    """Rewards, values, values of the next states, terminated and truncated of a rollout.

    Environment 0: terminates at step 3 and at the last one. Environment 1: truncated at step 5,
    cut off by the end of the rollout. Environment 2: one episode, cut off."""
    rewards, values, next_values = torch.randn(3, STEPS, ENVS, dtype=torch.double)
    terminated, truncated = torch.zeros(2, STEPS, ENVS, dtype=torch.bool)
    terminated[3, 0] = terminated[-1, 0] = truncated[5, 1] = True
    next_values = torch.where(terminated, 0.0, next_values)
    return rewards, values, next_values, terminated, truncated


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_advantages_by_their_definition(recorded, gae_lambda):
    """A(t) = sum over k of (gamma lambda)^k delta(t + k), to the end of t's episode."""
    rewards, values, next_values, terminated, truncated = recorded
    done = terminated | truncated
    found = gail.generalized_advantages(rewards, values, next_values, done, GAMMA, gae_lambda)
    for env in range(ENVS):
        for step in range(STEPS):
            expected, k = 0.0, 0
            while True:
                at = (step + k, env)
                delta = rewards[at] + GAMMA * next_values[at] - values[at]
                expected += (GAMMA * gae_lambda) ** k * float(delta)
                k += 1
                if done[at] or step + k == STEPS:
                    break
            assert found[step, env] == pytest.approx(expected, abs=1e-5)


def test_with_lambda_1_advantages_are_returns_minus_the_baseline(recorded):
    """The return of a truncated or cut-off episode goes on with the next state's value."""
    rewards, values, next_values, terminated, truncated = recorded
    # The next state's value is the next step's value, except where the episode ends
    done = terminated | truncated
    next_values[:-1] = torch.where(done[:-1], next_values[:-1], values[1:])
    found = gail.generalized_advantages(rewards, values, next_values, done, GAMMA, 1.0)
    for env in range(ENVS):
        for step in range(STEPS):
            end = next(t for t in range(step, STEPS) if done[t, env] or t == STEPS - 1)
            expected = sum(GAMMA ** (t - step) * rewards[t, env] for t in range(step, end + 1))
            if not terminated[end, env]:
                expected = expected + GAMMA ** (end + 1 - step) * next_values[end, env]
            found_return = float(found[step, env] + values[step, env])
            assert found_return == pytest.approx(float(expected), abs=1e-5)


# --- policy gradients -----------------------------------------------------------------------------


def test_reinforce_against_enumeration():
    """A tabular softmax policy on two states: every trajectory of three steps is enumerated.

    Averaged over all of them, the loss's gradient is the derivative of the expected return,
    whatever the baseline."""
    horizon, gamma = 3, 0.8
    moves = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.3, 0.7]]])  # state, action
    rewards = torch.tensor([[1.0, -0.5], [0.3, 2.0]])
    baseline = torch.tensor([0.7, -1.1])
    theta = torch.tensor([[0.2, -0.4], [1.0, 0.3]], requires_grad=True)

    def trajectories(state, left):
        """All of them, as lists of (state, action, probability of the step's outcome)."""
        if left == 0:
            yield []
            return
        for action in (0, 1):
            for following in (0, 1):
                step = (state, action, float(moves[state, action, following]))
                for rest in trajectories(following, left - 1):
                    yield [step, *rest]

    states, actions, chances = (
        torch.tensor(column) for column in zip(*(zip(*t) for t in trajectories(0, horizon)))
    )  # (number, horizon) each
    assert len(states) == 4**horizon
    log_probs = Categorical(logits=theta[states]).log_prob(actions)
    probability = log_probs.exp().prod(1) * chances.prod(1)
    assert float(probability.detach().sum()) == pytest.approx(1)
    discounts = gamma ** torch.arange(horizon)
    expected_return = (probability * (rewards[states, actions] * discounts).sum(1)).sum()
    (expected,) = torch.autograd.grad(expected_return, theta, retain_graph=True)

    values = baseline[states].T  # (horizon, number)
    next_values = torch.cat([values[1:], torch.zeros_like(values[:1])])
    done = torch.zeros_like(values, dtype=torch.bool)
    done[-1] = True
    returns = rewards[states, actions].T
    advantages = gail.generalized_advantages(returns, values, next_values, done, gamma, 1.0).T
    # A weighted mean: by the probability of each trajectory, instead of sampling it
    weighted = advantages * discounts * probability.detach()[:, None] * probability.numel()
    loss = gail.reinforce_loss(log_probs.flatten(), weighted.flatten()) * horizon
    (found,) = torch.autograd.grad(-loss, theta)
    assert torch.allclose(found, expected, atol=1e-6)
    assert expected.abs().max() > 0.1


def test_before_the_first_update_ppo_is_reinforce():
    old = torch.randn(50).requires_grad_()
    advantages = torch.randn(50)
    ppo = gail.ppo_loss(old, old.detach(), advantages, clip=0.2)
    assert ppo == -advantages.mean()  # every ratio is exactly 1
    (ours,) = torch.autograd.grad(ppo, old)
    (reinforce,) = torch.autograd.grad(gail.reinforce_loss(old, advantages), old)
    assert torch.equal(ours, reinforce)


def test_ppo_clips_as_in_equation_7():
    log_probs = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, 0.1]).requires_grad_()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0])
    loss = gail.ppo_loss(log_probs, torch.zeros(6), advantages, clip=0.2)
    ratios = [math.exp(x) for x in (0.5, 0.5, -0.5, -0.5, 0.1, 0.1)]
    terms = [min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios, advantages.tolist())]
    assert float(loss.detach()) == pytest.approx(-sum(terms) / 6, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    clipped = torch.tensor([True, False, False, True, False, False])
    assert torch.equal(gradient == 0, clipped)


def test_the_average_counts_the_kth_k_times():
    weights = [torch.nn.Linear(2, 3) for _ in range(7)]
    average = torch.optim.swa_utils.AveragedModel(weights[0], avg_fn=gail.recent_average)
    for each in weights:
        average.update_parameters(each)
    expected = sum(k * each.weight.double() for k, each in enumerate(weights, 1)) / 28
    assert torch.allclose(average.module.weight.double(), expected, atol=1e-6)


def test_what_is_kept_is_the_average(tmp_path, quick):
    """It is evaluated and saved; the policy itself acts, and the checkpoint holds both."""
    Case("gail_cartpole", GAIL, 360, 200, "", 0).run(tmp_path / "run")
    kept = torch.load(tmp_path / "run" / "policy.pt", weights_only=True)["weights"]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["average"]["n_averaged"] == checkpoint["count"]["updates"] > 1
    for name, weight in kept.items():
        assert torch.equal(weight, checkpoint["average"][f"module.{name}"])
        assert not torch.equal(weight, checkpoint["policy"][name])


def test_policy_against_torch_distributions():
    policy = gail.Policy(hidden=8)
    observations, actions = torch.randn(20, 4), torch.randint(2, (20,))
    logits = policy.network(observations)
    expected = torch.distributions.Categorical(probs=logits.softmax(-1))
    assert torch.allclose(policy(observations).log_prob(actions), expected.log_prob(actions))
    assert torch.allclose(policy(observations).entropy(), expected.entropy())
    assert policy.act(observations.numpy()).tolist() == logits.argmax(-1).tolist()
    assert set(policy.act(observations.numpy() * 100)) == {0, 1}


def test_behavioural_cloning_loss_against_cross_entropy():
    policy = gail.Policy(hidden=8)
    observations, actions = torch.randn(20, 4), torch.randint(2, (20,))
    expected = F.cross_entropy(policy.network(observations), actions)
    assert torch.allclose(gail.behavioural_cloning_loss(policy, observations, actions), expected)


# --- discriminator --------------------------------------------------------------------------------


def test_discriminator_loss_against_binary_cross_entropy():
    expert, learner = torch.randn(2, 30) * 10
    entropy = F.binary_cross_entropy_with_logits
    expected = entropy(expert, torch.ones(30)) + entropy(learner, torch.zeros(30))
    assert torch.allclose(gail.discriminator_loss(expert, learner), expected)


def log_d(x):
    """log of 1 / (1 + exp(-x)) in double precision, without overflow."""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


@pytest.mark.parametrize("logit", [-50.0, -20.0, -1.0, 0.0, 1.0, 20.0, 50.0])
def test_reward_forms(logit):
    """In single precision; 1 - D(x) is D(-x)."""
    expected = {
        "gail": -log_d(-logit),
        "logd": log_d(logit),
        "airl": log_d(logit) - log_d(-logit),
    }
    for form, reward in expected.items():
        found = gail.imitation_reward(torch.tensor(logit), form)
        assert float(found) == pytest.approx(reward, rel=1e-6, abs=1e-30), form


def some_pairs(number):
    return gail.make_pairs(torch.randn(number, 4) * 3 + 1, torch.randint(2, (number,)))


def discriminator_of(pairs, hidden):
    return gail.Discriminator(hidden, *gail.standardisation(pairs[:, :4]))


def test_make_pairs():
    pairs = gail.make_pairs(torch.arange(16.0).view(2, 2, 4), torch.tensor([[0, 1], [1, 0]]))
    assert pairs.shape == (2, 2, 7)
    assert pairs[0, 0].tolist() == [0, 1, 2, 3, 1, 0, 0]
    assert pairs[0, 1].tolist() == [4, 5, 6, 7, 0, 1, 0]


def test_absorbing_pairs_are_the_rest_of_the_discounted_occupancy():
    pairs = some_pairs(10)
    longer = gail.add_absorbing_pairs(pairs, 3, gamma=0.95)
    assert len(longer) == 10 + 3 * 20 and torch.equal(longer[:10], pairs)
    assert (longer[10:] == torch.tensor([0, 0, 0, 0, 0, 0, 1.0])).all()
    assert torch.equal(gail.add_absorbing_pairs(pairs, torch.tensor(0), gamma=0.95), pairs)


def test_discriminator_standardises_observations_only():
    pairs = some_pairs(1_000)
    standardised = discriminator_of(pairs, 8).standardise(pairs)
    assert torch.allclose(standardised[:, :4].mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(standardised[:, :4].std(0), torch.ones(4), atol=1e-4)
    assert torch.equal(standardised[:, 4:], pairs[:, 4:])
    constant = pairs[:1].expand(9, -1)
    assert torch.isfinite(discriminator_of(constant, 8)(constant)).all()


def test_gradient_penalty_against_finite_differences():
    expert, learner = some_pairs(40), some_pairs(40)
    learner[:5] = gail.absorbing_pair(learner)
    discriminator = discriminator_of(expert, 16).double()
    expert, learner = expert.double(), learner.double()
    rng = torch.get_rng_state()
    found = gail.gradient_penalty(discriminator, expert, learner)
    torch.set_rng_state(rng)
    mix = torch.rand(40, 1)
    between = discriminator.standardise(mix * expert + (1 - mix) * learner)  # (40, 7)
    slopes = []
    for step in torch.eye(7, dtype=torch.double) * 1e-5:
        rise = discriminator.network(between + step) - discriminator.network(between - step)
        slopes.append(rise.detach()[:, 0] / 2e-5)
    norms = torch.stack(slopes, -1).norm(dim=-1)
    assert float(found.detach()) == pytest.approx(
        float(((norms[5:] - 1) ** 2).sum() / 40), rel=1e-5
    )
    found.backward()
    assert all(p.grad.abs().sum() > 0 for p in list(discriminator.parameters())[::2])


def test_the_discriminator_learns_that_the_expert_is_label_1():
    expert, learner = some_pairs(100), some_pairs(100)
    expert[:, 0] += 30
    discriminator = discriminator_of(torch.cat([expert, learner]), 8)
    optimizer = torch.optim.Adam(discriminator.parameters(), 0.05)
    settings = {"discriminator_updates": 50, "discriminator_batch": 64, "gradient_penalty": 0.1}
    args = gail.argparse.Namespace(**settings)
    gail.update_discriminator(discriminator, optimizer, expert, learner, args)
    assert (discriminator(expert) > 0).all() and (discriminator(learner) < 0).all()


# --- offline: in expectation over both actions ----------------------------------------------------


@pytest.fixture
def offline():
    module = pytest.importorskip("gail_offline_cartpole")
    logits, actions = torch.randn(20, 2) * 3, torch.randint(2, (20,))
    return module, logits, actions, torch.randn(20, 2).log_softmax(-1)


def test_expected_discriminator_loss_against_binary_cross_entropy(offline):
    module, logits, actions, log_probs = offline
    expected, entropy = 0.0, F.binary_cross_entropy_with_logits
    for row in range(20):
        expected += entropy(logits[row, actions[row]], torch.tensor(1.0)) / 20
        for action in (0, 1):
            chance = log_probs[row, action].exp()
            expected += chance * entropy(logits[row, action], torch.tensor(0.0)) / 20
    assert torch.allclose(module.expected_discriminator_loss(logits, actions, log_probs), expected)


def test_natural_policy_loss_against_the_fisher_matrix(offline):
    """Fisher times the natural gradient is the gradient of the expected reward, enumerated."""
    module, rewards, _, log_probs = offline
    theta = log_probs.clone().requires_grad_()
    loss = module.natural_policy_loss(theta.log_softmax(-1), rewards)
    (found,) = torch.autograd.grad(-len(theta) * loss, theta)
    chances = theta.softmax(-1)
    (expected,) = torch.autograd.grad((chances * rewards).sum(), theta)
    for p, natural, plain in zip(chances.detach(), found, expected):
        assert torch.allclose((p.diag() - p.outer(p)) @ natural, plain, atol=1e-6)


def test_offline_discriminator_is_undecided_where_the_policy_is_the_softmax_of_f(offline):
    """Then D is 1/2 everywhere, whatever the policy: nothing is left to learn."""
    module, f, _, _ = offline
    f = f.log_softmax(-1)
    logits = module.discriminator_logits(lambda observations: f, None, f)
    assert torch.equal(logits.sigmoid(), torch.full((20, 2), 0.5))


# --- rollouts -------------------------------------------------------------------------------------


def true_transition(env, observation, action):
    """One step of Gymnasium's single CartPole from there: the next observation, terminated."""
    env.reset()
    env.unwrapped.state = observation.astype(np.float64)
    following, _, terminated, _, _ = env.step(int(action))
    return following, terminated


class LinearRule(nn.Module):
    """The rule that balances the pole, as a policy."""

    def forward(self, observations):
        right = observations.double() @ torch.tensor([0.1, 0.5, 3, 1], dtype=torch.double) > 0
        right = right.float()
        return Categorical(logits=torch.stack([1 - right, right], -1) * 1e3)


@pytest.fixture
def cartpoles():
    """Three of them, the last of them 10 steps from its time limit of 500."""
    cartpoles = gail.CartPoles("CartPole-v1", 3)
    cartpoles.reset(7)
    cartpoles.envs.steps[-1] = 490
    cartpoles.returns[-1] = 490
    return cartpoles


@pytest.mark.parametrize("make_policy", [lambda: gail.Policy(8), LinearRule], ids=["falls", "not"])
def test_rollouts_hold_true_transitions(cartpoles, make_policy):
    policy = make_policy()
    batch, returns = gail.rollout(cartpoles, policy, 60, "cpu")
    batch = {name: array.numpy() for name, array in batch.items()}
    done = batch["terminated"] | batch["truncated"]
    env = gym.make("CartPole-v1")
    for index in np.ndindex(60, 3):
        row = {name: array[index] for name, array in batch.items()}
        following, terminated = true_transition(env, row["observations"], row["actions"])
        true = np.allclose(following, row["next_observations"], atol=1e-5)
        assert row["valid"] == true
        if row["valid"]:
            assert row["terminated"] == terminated
    assert np.array_equal(batch["observations"][1:], batch["next_observations"][:-1])
    assert batch["valid"][0].all()
    assert np.array_equal(batch["valid"][1:], ~done[:-1])  # the step after the last resets
    assert not (done & ~batch["valid"]).any()

    lengths = []  # of the episodes, counted by hand
    for env in range(3):
        length = 490 * (env == 2)
        for step in range(60):
            length += batch["valid"][step, env]
            if done[step, env]:
                lengths.append((step, env, length))
                assert batch["truncated"][step, env] == (length == 500)
                length = 0
    assert returns == [length for _, _, length in sorted(lengths)]
    if isinstance(policy, LinearRule):
        assert returns == [500] and not batch["terminated"].any()
    else:
        assert batch["terminated"].sum() > 3


def test_a_reset_begins_the_count_of_the_return_anew(cartpoles):
    """An episode that the reset cuts off does not count in the next one's return."""
    policy = gail.Policy(8)
    gail.rollout(cartpoles, policy, 5, "cpu")
    cartpoles.reset()
    batch, returns = gail.rollout(cartpoles, policy, 100, "cpu")
    first = int(np.flatnonzero((batch["terminated"]).any(1))[0])
    assert returns[0] == first + 1


def test_cartpoles_go_on_from_their_state(cartpoles):
    policy = gail.Policy(8)
    while not cartpoles.envs.prev_done.any():  # one of them is to be reset by its next step
        gail.rollout(cartpoles, policy, 1, "cpu")
    state, rng = cartpoles.state_dict(), torch.get_rng_state()
    expected, _ = gail.rollout(cartpoles, policy, 100, "cpu")
    others = gail.CartPoles("CartPole-v1", 3)
    others.reset()
    others.load_state_dict(state)
    torch.set_rng_state(rng)
    found, _ = gail.rollout(others, policy, 100, "cpu")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not expected["valid"].all()


# --- one iteration of GAIL, from the rollout to what the policy is updated with -------------------


@pytest.fixture
def spied(monkeypatch, tmp_path):
    """Train for one iteration; returns what went into update_policy and how it came about."""

    def train(*flags):
        seen = {"discriminator updates": 0}

        def make_envs(*args):
            envs = make_envs_as_it_is(*args)
            envs.max_episode_steps = 14  # so that some episodes are truncated, others fall
            return envs

        def rollout(*args):
            seen["batch"], returns = rollout_as_it_is(*args)
            return seen["batch"], returns

        def update_discriminator(discriminator, optimizer, expert_pairs, policy_pairs, args):
            seen["discriminator updates"] += 1
            seen["expert pairs"], seen["policy pairs"] = expert_pairs, policy_pairs
            return update_as_it_is(discriminator, optimizer, expert_pairs, policy_pairs, args)

        def make_discriminator(*args):
            seen["discriminator"] = make_discriminator_as_it_is(*args)
            return seen["discriminator"]

        def update_policy(policy, critic, optimizer, *rest):
            with torch.no_grad():
                batch = seen["batch"]
                seen["values"] = critic(batch["observations"])[..., 0]
                seen["next values"] = critic(batch["next_observations"])[..., 0]
            for group in optimizer.param_groups:
                seen.setdefault("learning rates", []).append(group["lr"])
            names = ("observations", "actions", "advantages", "returns", "args")
            seen.update(zip(names, rest))
            return update_policy_as_it_is(policy, critic, optimizer, *rest)

        with monkeypatch.context() as patch:
            make_envs_as_it_is, rollout_as_it_is = gail.make_envs, gail.rollout
            update_as_it_is = gail.update_discriminator
            make_discriminator_as_it_is = gail.Discriminator
            update_policy_as_it_is = gail.update_policy
            patch.setattr(gail, "make_envs", make_envs)
            patch.setattr(gail, "rollout", rollout)
            patch.setattr(gail, "update_discriminator", update_discriminator)
            patch.setattr(gail, "Discriminator", make_discriminator)
            patch.setattr(gail, "update_policy", update_policy)
            patch.setattr(gail, "draw", lambda *args: None)
            patch.setattr(gail, "occupancy_distances", lambda *args: dict.fromkeys(args[-1]))
            case = Case("gail_cartpole", GAIL, 1, 1, "", 0)
            case.run(tmp_path / str(len(list(tmp_path.iterdir()))), *flags)
        return seen

    return train


@pytest.mark.parametrize(
    "flags",
    [
        "--reward gail --no-absorbing",
        "--reward gail --gae-lambda 0.9",
        "--reward airl --absorbing",
        "--reward logd --absorbing --policy-gradient reinforce",
        "--control constant-reward",
        "--control frozen-discriminator --absorbing",
    ],
)
def test_what_the_policy_is_updated_with(spied, flags):
    """Reset frames are left out; truncated states are bootstrapped; terminated ones are not."""
    seen = spied(*flags.split())
    args, batch = seen["args"], seen["batch"]
    valid, terminated, truncated = (batch[k] for k in ("valid", "terminated", "truncated"))
    assert terminated.any() and truncated.any() and not valid.all()

    constant = args.control == "constant-reward"
    absorbing = args.absorbing and not constant
    with torch.no_grad():
        pairs = gail.make_pairs(batch["observations"], batch["actions"])
        rewards = gail.imitation_reward(seen["discriminator"](pairs), args.reward)
        end = gail.imitation_reward(seen["discriminator"](torch.eye(7)[-1:]), args.reward)
    if constant:
        rewards = torch.ones_like(rewards)
    end = float(end) / (1 - args.gamma) if absorbing else 0.0  # the reward of every step from then

    decay = args.gamma * args.gae_lambda
    expected = torch.zeros(valid.shape)
    for env in range(valid.shape[1]):
        for step in range(len(valid)):
            weight = 1.0
            for t in range(step, len(valid)):
                following = end if terminated[t, env] else seen["next values"][t, env]
                delta = rewards[t, env] + args.gamma * following - seen["values"][t, env]
                expected[step, env] += weight * delta
                weight *= decay
                if terminated[t, env] or truncated[t, env]:
                    break
    assert torch.equal(seen["observations"], batch["observations"][valid])
    assert torch.equal(seen["actions"], batch["actions"][valid])
    assert torch.allclose(seen["advantages"], expected[valid], atol=1e-3, rtol=1e-4)
    assert torch.allclose(seen["returns"], (expected + seen["values"])[valid], atol=1e-3, rtol=1e-4)
    assert seen["learning rates"] == [args.policy_lr, args.critic_lr]

    trained = args.control == "none"
    assert seen["discriminator updates"] == trained
    if trained:
        real = seen["policy pairs"][:, -1] == 0
        assert torch.equal(seen["policy pairs"][real], pairs[valid])
        falls = int(terminated.sum()) if absorbing else 0
        assert (~real).sum() == round(falls / (1 - args.gamma))
        assert (seen["expert pairs"][:, -1] == 0).all()  # this expert never falls


def test_shuffled_expert_keeps_states_and_actions_but_not_which_belong_together(spied):
    shuffled, plain = (spied(*f)["expert pairs"] for f in (["--control", "shuffled-expert"], []))
    assert torch.equal(shuffled[:, :4], plain[:, :4])
    assert torch.equal(shuffled[:, 4:].sum(0), plain[:, 4:].sum(0))
    agree = (shuffled[:, 4] == plain[:, 4]).float().mean()
    assert 0.4 < agree < 0.6


def test_the_ratio_is_1_before_the_first_update_of_an_iteration(spied, monkeypatch):
    ppo_loss, ratios = gail.ppo_loss, []

    def spy(log_probs, old_log_probs, *args):
        ratios.append((log_probs - old_log_probs).detach().exp())
        return ppo_loss(log_probs, old_log_probs, *args)

    monkeypatch.setattr(gail, "ppo_loss", spy)
    spied()
    assert torch.allclose(ratios[0], torch.ones(()), atol=1e-6)
    assert not torch.allclose(ratios[-1], torch.ones(()), atol=1e-6)


# --- evaluation -----------------------------------------------------------------------------------


def test_play_with_a_rule_that_balances():
    episodes = gail.play(linear_rule, "CartPole-v1", 5, seed=3)
    assert [len(episode["actions"]) for episode in episodes] == [500] * 5
    assert not any(episode["terminated"] for episode in episodes)
    assert gail.statistics(episodes)["return_mean"] == 500


def test_play_gives_the_first_episode_of_each_environment():
    episodes = gail.play(None, "CartPole-v1", 6, seed=3)
    firsts, _ = gail.make_envs("CartPole-v1", 6).reset(seed=3)
    env = gym.make("CartPole-v1")
    for episode, first in zip(episodes, firsts):
        observations, actions = episode["observations"], episode["actions"]
        assert np.array_equal(observations[0], first)
        for i, (observation, action) in enumerate(zip(observations, actions)):
            following, terminated = true_transition(env, observation, action)
            assert terminated == (i == len(actions) - 1)
            if not terminated:
                assert np.allclose(following, observations[i + 1], atol=1e-5)
        assert episode["terminated"] and episode["rewards"].sum() == len(actions)
        assert 0 < actions.mean() < 1
    lengths = [len(episode["actions"]) for episode in episodes]
    assert len(set(lengths)) > 1
    result = gail.statistics(episodes)
    assert result["return_mean"] == result["length_mean"] == np.mean(lengths)
    assert result["return_std"] == pytest.approx(np.std(lengths))


def energy(x, y, count_itself=False):
    """By two loops over all pairs; with `count_itself`, the biased form."""
    between = np.mean([np.linalg.norm(a - b) for a in x for b in y])
    total = 2 * between
    for z in (x, y):
        distances = [np.linalg.norm(a - b) for i, a in enumerate(z) for b in z[:i]]
        pairs = len(z) ** 2 if count_itself else len(z) * (len(z) - 1)
        total -= 2 * sum(distances) / pairs
    return total


def test_squared_energy_distance_by_its_definition():
    x, y = torch.randn(7, 3).double(), torch.randn(5, 3).double() + 1
    found = gail.squared_energy_distance(x, y)
    assert found == pytest.approx(energy(x.numpy(), y.numpy()))


def test_squared_energy_distance_is_unbiased():
    draws = torch.randn(800, 2, 5, 2).double()
    found = np.array([gail.squared_energy_distance(x, y) for x, y in draws])
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean()) < 3 * error
    biased = [energy(x, y, count_itself=True) for x, y in draws[:100].numpy()]
    assert np.mean(biased) > 10 * error  # the test would notice


def test_occupancy_distances():
    experts, random = (gail.play(p, "CartPole-v1", 4, seed=5) for p in (linear_rule, None))
    others = gail.play(linear_rule, "CartPole-v1", 4, seed=6)
    samples = {"random": random, "expert": others, "itself": experts}
    found = gail.occupancy_distances("CartPole-v1", experts, samples)
    assert found["random"] == 1
    assert -0.05 < found["expert"] < 0.2 and found["itself"] < 0.01

    def scaled(episodes):
        unit = np.array([1, 100, 0.01, 1], np.float32)
        return [{**e, "observations": e["observations"] * unit} for e in episodes]

    again = {name: scaled(episodes) for name, episodes in samples.items()}
    again = gail.occupancy_distances("CartPole-v1", scaled(experts), again)
    assert again == pytest.approx(found, rel=1e-3, abs=1e-4)  # units do not matter


# --- one iteration --------------------------------------------------------------------------------


CASE = Case("gail_cartpole", GAIL, 360, 200, "", 0)


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_a_step_of_the_policy_is_down_the_slope_of_its_loss(name):
    """Where one minibatch is the whole rollout every ratio is 1, and both take the same step."""
    policy, critic = gail.Policy(8), gail.mlp(4, 8, 1)
    observations, actions = torch.randn(40, 4), torch.randint(2, (40,))
    advantages, returns = torch.randn(40) * 3 + 1, torch.randn(40)
    log_probs = policy.network(observations).log_softmax(-1)
    standard = (advantages - advantages.mean()) / advantages.std()
    gain = (standard * log_probs[range(40), actions]).mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    error = (critic(observations)[:, 0] - returns).square().mean()
    parameters = [*policy.parameters(), *critic.parameters()]
    slopes = torch.autograd.grad(error - gain - 0.7 * entropy, parameters)
    expected = [x.detach() - 0.1 * slope for x, slope in zip(parameters, slopes)]
    args = gail.parse_args(["--policy-gradient", name, "--entropy", "0.7", "--epochs", "1"])
    optimizer = torch.optim.SGD(parameters, 0.1)
    gail.update_policy(policy, critic, optimizer, observations, actions, advantages, returns, args)
    for found, exact in zip(parameters, expected):
        assert torch.allclose(found, exact, atol=1e-6)


def test_a_step_of_the_discriminator_counts_the_penalty_by_its_weight(monkeypatch):
    monkeypatch.setattr(gail, "gradient_penalty", lambda d, expert, _: d(expert).square().mean())
    expert, learner, discriminator = (
        some_pairs(1),
        some_pairs(1),
        discriminator_of(some_pairs(9), 8),
    )
    label_1, label_0 = discriminator(expert), discriminator(learner)
    entropy = F.binary_cross_entropy_with_logits
    loss = entropy(label_1, torch.ones(1)) + entropy(label_0, torch.zeros(1))
    loss = loss + 0.3 * label_1.square().mean()
    parameters = list(discriminator.parameters())
    slopes = torch.autograd.grad(loss, parameters)
    expected = [x.detach() - 0.1 * slope for x, slope in zip(parameters, slopes)]
    settings = {"discriminator_updates": 1, "discriminator_batch": 16, "gradient_penalty": 0.3}
    optimizer, args = torch.optim.SGD(parameters, 0.1), gail.argparse.Namespace(**settings)
    gail.update_discriminator(discriminator, optimizer, expert, learner, args)
    for found, exact in zip(parameters, expected):
        assert torch.allclose(found, exact, atol=1e-6)


@pytest.fixture
def watched(monkeypatch, tmp_path, quick):
    """A run of three iterations: each rollout, each policy that acted, was updated, evaluated."""

    def train(*flags):
        seen = {"batches": [], "acted": [], "updated": [], "evaluated": []}
        rollout, update_policy, evaluate = gail.rollout, gail.update_policy, gail.Run.evaluate

        def keep(name, policy):
            seen[name].append(copy.deepcopy(policy.state_dict()))

        def watched_rollout(cartpoles, policy, *rest):
            keep("acted", policy)
            result = rollout(cartpoles, policy, *rest)
            seen["batches"].append(result[0])
            return result

        def watched_update(policy, *rest):
            result = update_policy(policy, *rest)
            keep("updated", policy)
            return result

        def watched_evaluate(run, policy, offset):
            keep("evaluated", policy)
            return evaluate(run, policy, offset)

        with monkeypatch.context() as patch:
            patch.setattr(gail, "rollout", watched_rollout)
            patch.setattr(gail, "update_policy", watched_update)
            patch.setattr(gail.Run, "evaluate", watched_evaluate)
            CASE.run(tmp_path / "run", "--eval-every", 1, *flags)
        seen["summary"] = json.loads((tmp_path / "run" / "summary.json").read_text())
        seen["checkpoint"] = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        return seen

    return train


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_step_sizes_fall_with_the_steps_that_are_transitions(watched, monkeypatch, name):
    monkeypatch.setitem(gail.RECIPES[name], "total_steps", 1_000)
    seen = watched("--policy-gradient", name, "--policy-lr", 0.5, "--critic-lr", 0.25)
    steps = [int(batch["valid"].sum()) for batch in seen["batches"]]
    assert not all(batch["valid"].all() for batch in seen["batches"])
    assert [point["env_steps"] for point in seen["summary"]["curve"]] == np.cumsum(steps).tolist()
    left = 1 - sum(steps[:-1]) / 1_000
    found = [group["lr"] for group in seen["checkpoint"]["optimizer"]["param_groups"]]
    assert found == pytest.approx([0.5 * left, 0.25 * left])
    fresh = [bool((batch["observations"][0].abs() <= 0.05).all()) for batch in seen["batches"]]
    assert fresh == [True] * 3 if name == "reinforce" else not all(fresh)


def test_the_average_is_of_the_updated_policies_and_is_what_is_evaluated(watched):
    seen = watched()
    assert len(seen["updated"]) == len(seen["evaluated"]) - 1 == 3  # and once more at the end
    for n, found in enumerate([*seen["evaluated"][:3], seen["evaluated"][3]], 1):
        n = min(n, 3)
        for name, weight in found.items():
            policies = enumerate(seen["updated"][:n], 1)
            exact = sum(k * policy[name].double() for k, policy in policies) / (n * (n + 1) / 2)
            assert torch.allclose(weight.double(), exact, atol=1e-6)


def test_a_warm_start_clones_before_the_first_rollout(watched):
    seen = watched("--bc-updates", 300)
    policy = gail.Policy(8)
    policy.load_state_dict(seen["acted"][0])
    demos, _, _ = gail.load_demos(gail.argparse.Namespace(**seen["summary"]["args"]))
    loss = gail.behavioural_cloning_loss(policy, *gail.tensors(demos))
    assert float(loss.detach()) < 0.5  # log 2 = 0.69 without


def test_the_accuracies_are_those_of_the_last_discriminator(watched):
    seen = watched()
    demos, _, _ = gail.load_demos(gail.argparse.Namespace(**seen["summary"]["args"]))
    discriminator = gail.Discriminator(8, torch.zeros(7), torch.ones(7))
    discriminator.load_state_dict(seen["checkpoint"]["discriminator"])
    batch = seen["batches"][-1]
    learner = gail.make_pairs(batch["observations"], batch["actions"])[batch["valid"]]
    scalars = seen["summary"]["curve"][-1]
    for who, pairs in (("expert", gail.make_pairs(*gail.tensors(demos))), ("policy", learner)):
        d = discriminator(pairs).sigmoid()
        right = d > 0.5 if who == "expert" else d < 0.5
        share = float(right.double().mean())
        assert scalars[f"discriminator/accuracy_{who}"] == pytest.approx(share, abs=1e-6)
        assert 0 < share < 1


@pytest.mark.parametrize(
    "mean, std, expert, policy, word",
    [(2, 0.1, 1, 1, "constant"), (-2, 0.1, 0, 0, "constant"), (2, 1, 1, 1, "saturated"),
     (2, 1, 1, 0.9, None), (2, 1, 0.9, 1, None)],
)  # fmt: skip
def test_diagnose(mean, std, expert, policy, word):
    names = ("reward_mean", "reward_std", "accuracy_expert", "accuracy_policy")
    values = (mean, std, expert, policy)
    found = gail.diagnose({f"discriminator/{n}": v for n, v in zip(names, values)})
    assert word in found if word else found == ""


def test_occupancy_distances_by_their_definition():
    rng = np.random.default_rng(0)

    def episodes(shift):
        steps = {"observations": rng.normal(shift, [1, 9, 0.1, 3], (2, 8, 4)).astype(np.float32)}
        steps["actions"] = rng.integers(2, size=(2, 8))
        return [{name: array[i] for name, array in steps.items()} for i in range(2)]

    def pairs(played):
        rows = [np.concatenate([e[k] for e in played]) for k in ("observations", "actions")]
        return np.concatenate([rows[0], np.eye(2)[rows[1]]], 1)

    held_out, samples = episodes(0), {"random": episodes(2), "learner": episodes(0.5)}
    mean, std = pairs(held_out).mean(0), pairs(held_out).std(0, ddof=1)
    exact = {
        k: energy((pairs(v) - mean) / std, (pairs(held_out) - mean) / std)
        for k, v in samples.items()
    }
    found = gail.occupancy_distances("CartPole-v1", held_out, samples)
    assert found["learner"] == pytest.approx(exact["learner"] / exact["random"], rel=1e-4)


def test_an_expert_that_falls_is_seen_to(spied, monkeypatch):
    load = gail.load_demos

    def fallen(args):
        demos, *others = load(args)
        return [{**demo, "terminated": True} for demo in demos], *others

    monkeypatch.setattr(gail, "load_demos", fallen)
    seen = spied("--absorbing")
    flags = seen["expert pairs"][:, -1]
    assert int(flags.sum()) == round(1 / (1 - seen["args"].gamma))


def test_offline_discriminator_by_its_definition(offline):
    """D = exp f / (exp f + pi), Fu et al. 2018."""
    module, f, _, log_probs = offline
    found = module.discriminator_logits(lambda observations: f, None, log_probs).sigmoid()
    assert torch.allclose(found, f.exp() / (f.exp() + log_probs.exp()), atol=1e-6)
