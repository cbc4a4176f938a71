"""The mathematics of the scripts against definitions written out another way."""

import copy
import math
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from scripts import BC, OFFLINE, PPO, RACECAR, REINFORCE
from torch.distributions import Categorical, MultivariateNormal
from torch.nn import functional as F
from written import checkpoint, same

gail, offline = PPO.module, OFFLINE.module
pytestmark = pytest.mark.usefixtures("seeded")


def discrete_policy():
    policy = gail.Policy(3, 1, 4, 8)
    policy.standardise.measure(torch.randn(50, 3) * 3 + 1)
    return policy


def box_policy():
    policy = gail.Policy(3, [-1.0, 0.0], [1.0, 4.0], 8)
    torch.nn.init.normal_(policy.log_std, -1, 0.3)
    return policy


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_advantages_by_their_definition(gae_lambda):
    """A(t) = sum over k of (gamma lambda)^k delta(t + k), to the end of t's episode."""
    rewards, values, next_values = torch.randn(3, 12, 3)
    done = torch.zeros(12, 3, dtype=torch.bool)
    done[3, 0] = done[-1, 0] = done[5, 1] = True
    found = gail.generalized_advantages(rewards, values, next_values, done, 0.9, gae_lambda)
    for t, env in np.ndindex(12, 3):
        end = next(i for i in range(t, 12) if done[i, env] or i == 11)
        steps = [(i, env) for i in range(t, end + 1)]
        deltas = (rewards[at] + 0.9 * next_values[at] - values[at] for at in steps)
        exact = sum((0.9 * gae_lambda) ** k * delta for k, delta in enumerate(deltas))
        assert float(found[t, env]) == pytest.approx(float(exact), abs=1e-5)


def test_reinforce_against_enumeration():
    """A softmax policy on two states, all trajectories of two steps: the loss's gradient is that of
    the expected return, whatever the baseline."""
    gamma, baseline = 0.8, torch.tensor([0.7, -1.1])
    moves = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.3, 0.7]]])  # state, action
    pays = torch.tensor([[1.0, -0.5], [0.3, 2.0]])
    theta = torch.tensor([[0.2, -0.4], [1.0, 0.3]], requires_grad=True)
    first, action, state, then = torch.cartesian_prod(torch.tensor([0]), *[torch.arange(2)] * 3).T
    states, actions = torch.stack([first, state]), torch.stack([action, then])  # (2, trajectories)
    log_probs = Categorical(logits=theta[states]).log_prob(actions)
    probability = log_probs.sum(0).exp() * moves[first, action, state]
    assert float(probability.sum().detach()) == pytest.approx(1)
    rewards = pays[states, actions]
    expected = (probability * (rewards[0] + gamma * rewards[1])).sum()
    (exact,) = torch.autograd.grad(expected, theta, retain_graph=True)
    values, done = baseline[states], torch.tensor([[False], [True]]).expand(2, 8)
    following = torch.stack([values[1], torch.zeros(8)])
    advantages = gail.generalized_advantages(rewards, values, following, done, gamma, 1.0)
    weighted = advantages * torch.tensor([[1.0], [gamma]]) * probability.detach() * 16
    loss = gail.reinforce_loss(log_probs.flatten(), weighted.flatten())
    (found,) = torch.autograd.grad(-loss, theta)
    assert torch.allclose(found, exact, atol=1e-6) and exact.abs().max() > 0.1


def test_ppo_clips_as_in_equation_7():
    logs, advantages = [0.5, 0.5, -0.5, -0.5, 0.1, 0.1], [2.0, -2.0, 2.0, -2.0, 2.0, -2.0]
    log_probs, advantages = torch.tensor(logs, requires_grad=True), torch.tensor(advantages)
    loss = gail.ppo_loss(log_probs, torch.zeros(6), advantages, clip=0.2)
    ratios = [math.exp(x) for x in logs]
    terms = [min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratios, advantages.tolist())]
    assert float(loss.detach()) == pytest.approx(-sum(terms) / 6, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    slopes = torch.tensor(ratios) * advantages / -6  # where it does not clip
    assert torch.allclose(gradient, slopes * torch.tensor([0, 1, 1, 0, 1, 1]))


def test_a_policy_that_has_moved_too_far_waits_for_the_next_rollout(tmp_path):
    policies = {}
    for epochs, limit in [(1, 9), (5, 0), (5, 9)]:
        flags = ["--epochs", epochs, "--target-kl", limit]
        policies[epochs, limit] = PPO.run(tmp_path / f"{epochs}, {limit}", *flags, iterations=1)
    assert same(policies[5, 0], policies[1, 9]) and not same(policies[5, 9], policies[1, 9])


AVERAGED = [(BC, 1, 0), (PPO, 48, 1), (PPO.on("ToyBox-v0"), 48, 8)]


@pytest.mark.parametrize("case, update, power", AVERAGED, ids=str)
def test_what_is_kept_is_an_average_of_the_policies(case, update, power, tmp_path):
    """The k-th counts k times; of a Gaussian, k (k + 1) ... (k + 7) times; of clones, once."""
    policies = []
    for k in range(1, 7):
        folder = tmp_path / f"{k}"
        kept = case.run(folder, "--total-steps", k * update, "--eval-every", 10**6)
        policies.append(checkpoint(folder)["parts"]["policy"])
    counts = [math.prod(range(k, k + power)) for k in range(1, 7)]
    for name, value in kept.items():
        exact = sum(n * policy[name].double() for n, policy in zip(counts, policies)) / sum(counts)
        assert torch.allclose(value.double(), exact, atol=1e-6), name


def test_a_policy_over_discrete_actions():
    policy, seen, taken = discrete_policy(), torch.randn(20, 3), torch.randint(4, (20,))
    logits = policy.network(policy.standardise(seen))
    exact = Categorical(probs=logits.softmax(-1))
    assert torch.allclose(policy(seen).log_prob(taken), exact.log_prob(taken), atol=1e-6)
    assert torch.allclose(policy(seen).entropy(), exact.entropy(), atol=1e-6)
    loss = gail.behavioural_cloning_loss(policy, seen, taken)
    assert torch.allclose(loss, F.cross_entropy(logits, taken), atol=1e-6)
    assert policy.act(seen.numpy()).tolist() == (logits.argmax(-1) + 1).tolist()
    assert {1, 2, 3, 4} == set(policy.act(np.zeros((500, 3)), sample=True))
    frozen = np.broadcast_to(np.float32([1, 2, 3]), (2, 3))  # cannot be written to
    for other in (frozen, frozen.astype(int)[::-1], [[1, 2, 3]] * 2, np.asfortranarray(frozen)):
        assert (policy.act(other) == policy.act(frozen[0])).all()
    assert torch.equal(policy.from_env(torch.as_tensor(policy.to_env(taken))), taken)


def test_a_policy_over_a_box():
    policy, seen, taken = box_policy(), torch.randn(20, 3), torch.rand(20, 2) * 2 - 1
    mean = policy.network(policy.standardise(seen))
    std = 0.1 + policy.log_std.exp()  # never less than a tenth
    exact = MultivariateNormal(mean, torch.diag(std**2))
    assert torch.allclose(policy(seen).log_prob(taken), exact.log_prob(taken), atol=1e-5)
    assert torch.allclose(policy(seen).entropy(), exact.entropy(), atol=1e-5)
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.5], [-9.0, 9.0]])
    assert policy.to_env(corners).tolist() == [[-1, 0], [1, 4], [0, 3], [-1, 4]]
    assert torch.allclose(policy.from_env(torch.as_tensor(policy.to_env(taken))), taken, atol=1e-6)
    assert np.allclose(policy.act(seen.numpy()), policy.to_env(mean.detach()))
    draws = policy.act(np.zeros((4000, 3)), sample=True)
    assert draws.std(0)[0] > 0.1 and (draws >= [-1, 0]).all() and (draws <= [1, 4]).all()


def test_a_clone_of_a_box_is_squashed():
    """It learns what is before tanh; its bounds have a finite place there, too."""
    policy, before = BC.module.Policy(3, [-1.0, 0.0], [1.0, 4.0], 8), torch.randn(20, 2)
    box = torch.as_tensor(policy.to_env(before))
    assert torch.allclose(box, torch.tensor([0.0, 2.0]) + before.tanh() * torch.tensor([1.0, 2.0]))
    kept = before.tanh().abs() < 0.99
    assert torch.allclose(policy.from_env(box)[kept], before[kept], atol=1e-4) and kept.any()
    bounds = policy.from_env(torch.tensor([[-1.0, 4.0]]))
    assert torch.allclose(bounds.tanh(), torch.tensor([[-0.99, 0.99]]))


def test_cloning_beside_ppo_moves_the_means_of_a_gaussian_alone():
    policy, seen, taken = box_policy(), torch.randn(20, 3), torch.rand(20, 2) * 2 - 1
    layers = list(policy.network.parameters())
    exact = -policy(seen).log_prob(taken).mean()
    loss = gail.behavioural_cloning_loss(policy, seen, taken)
    assert torch.allclose(loss, exact, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x, layers, retain_graph=True) for x in (loss, exact))
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(ours, theirs))
    assert torch.autograd.grad(loss, policy.log_std, allow_unused=True) == (None,)


@pytest.mark.parametrize("way", ["ppo", "reinforce"])
def test_only_discrete_actions_get_an_entropy_bonus(way, tmp_path):
    """A Gaussian's entropy has no upper end: by a bonus its actions would leave the box."""
    for case, box in ((PPO, False), (REINFORCE, True)):
        found = []
        for weight in (0, 100):
            folder = tmp_path / f"{box}{weight}"
            case.run(folder, "--policy-gradient", way, "--entropy", weight)
            found.append(checkpoint(folder)["parts"]["policy"]["network.0.weight"])
        assert torch.equal(*found) == box


def test_defaults_among_random_pairs(tmp_path):
    """Cloning has a tenth of its weight, unless that is given, and lambda is smaller; REINFORCE's
    stay. A resumed run keeps them."""

    def found(*words):
        args = gail.parse_args(words)
        return args.bc_weight, args.gae_lambda

    few, reinforce = ["--num-pairs", "5"], ["--policy-gradient", "reinforce"]
    assert found() == (1, 0.95) and found(*few) == (0.1, 0.9)
    assert found(*few, "--bc-weight", "2") == (2, 0.9)
    assert found(*reinforce) == found(*few, *reinforce) == (0, 1)
    PPO.run(tmp_path / "run", *few, iterations=1)
    assert found("--resume", str(tmp_path / "run")) == (0.1, 0.9)


@pytest.mark.parametrize("case", [PPO, OFFLINE, *RACECAR], ids=str)
def test_step_sizes_fall_over_the_first_budget(case, tmp_path):
    """On REINFORCE's race car over two. A run that is resumed keeps its own schedule."""
    parse, budgets = case.module.parse_args, 2 if case in RACECAR[1:] else 1
    assert parse(["--total-steps", "777"]).schedule == 777 * budgets
    assert parse(["--total-steps", "777", "--schedule", "5"]).schedule == 5
    case.run(tmp_path / "run", "--schedule", 778, iterations=1)
    assert parse(["--resume", str(tmp_path / "run"), "--total-steps", "9999"]).schedule == 778


def test_episodes_of_one_length_do_not_end_together():
    """They last three steps, in three environments; a copy goes on where the first one is."""
    first, copied = (gail.Environments("toys:Truncating-v0", 3) for _ in range(2))
    policy = gail.Policy(**gail.sizes("toys:Truncating-v0"), hidden=8)
    for _ in range(9):
        copied.load_state_dict(copy.deepcopy(first.state_dict()))
        (*_, terminated, truncated), now = gail.rollout(first, policy, 1, "cpu")
        assert not terminated.any() and truncated.sum() == len(now) == 1
        (*_, again), _ = gail.rollout(copied, policy, 1, "cpu")
        assert (again == truncated).all()


def test_a_task_s_spaces_and_its_reset_draw_apart():
    env = gym.make("toys:Toy-v0")
    _, info = gail.begin(env, 3)
    drawn = [space.np_random.random() for space in (env.action_space, env.observation_space)]
    assert len({round(x, 6) for x in (*drawn, (info["x"] + 0.7) / 1.4)}) == 3


def test_a_random_policy_does_not_know_what_the_task_has_drawn():
    """Though an episode's seed is that of the task's generator and of its spaces'."""
    args = gail.parse_args(["--env-id", "toys:Truncating-v0"])
    first = [episode.rewards[0] for episode in gail.play(None, args, final=True)]
    assert len(first) == 100 and 0.3 < np.mean(first) < 0.7


def test_a_task_may_spoil_the_actions_that_it_is_given():
    """What is replayed, and what an evaluation holds, is as the policy chose it."""
    first, copied = (gail.Environments("toys:ToyBox-v0", 2) for _ in range(2))
    for i in range(2):
        first.advance(i, np.float32([0.6, 0.6]))
    copied.load_state_dict(copy.deepcopy(first.state_dict()))
    assert np.array_equal(copied.observations, first.observations)
    assert all((actions[0] > 0.5).all() for actions in first.actions)
    args = gail.parse_args(REINFORCE.argv())
    played = gail.play(lambda seen: np.full((len(seen), 2), 0.6, np.float32), args)
    assert all((episode.actions > 0.5).all() for episode in played)


def test_observations_are_standardised_and_a_constant_is_only_shifted():
    sample = torch.randn(500, 3) * torch.tensor([2.0, 1e-3, 0.0]) + torch.tensor([1.0, 0.0, 5.0])
    layer = gail.Standardise(3)
    assert torch.equal(layer(sample), sample)
    layer.measure(sample)
    assert torch.allclose(layer(sample).mean(0), torch.zeros(3), atol=1e-3)
    assert torch.allclose(layer(sample).std(0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-2)
    assert layer(torch.tensor([1e9, -1e9, 5.5])).tolist() == [10, -10, 0.5]
    layer.measure(sample[:1])
    assert layer(sample[:1]).tolist() == [[0, 0, 0]]


def test_discriminator_loss_against_binary_cross_entropy():
    expert, learner = torch.randn(2, 30) * 10
    entropy = F.binary_cross_entropy_with_logits
    exact = entropy(expert, torch.ones(30)) + entropy(learner, torch.zeros(30))
    assert torch.allclose(gail.discriminator_loss(expert, learner), exact)


@pytest.mark.parametrize("logit", [-50.0, -20.0, -1.0, 0.0, 1.0, 20.0, 50.0])
def test_reward_forms(logit):
    """In double precision, where 1 - D(x) is D(-x)."""
    log_d, log_other = (np.log(1 / (1 + np.exp(np.longdouble(x)))) for x in (-logit, logit))
    exact = {"gail": -log_other, "logd": log_d, "airl": log_d - log_other}
    for form, reward in exact.items():
        found = float(gail.imitation_reward(torch.tensor(logit), form))
        assert found == pytest.approx(float(reward), rel=1e-5, abs=1e-19), form


@pytest.mark.parametrize("make", [discrete_policy, box_policy])
def test_what_a_discriminator_sees(make):
    policy = make()
    discriminator, seen = gail.Discriminator(policy, 8), torch.randn(2, 5, 3)
    taken = torch.randint(4, (2, 5)) if policy.discrete else torch.randn(2, 5, 2) * 2
    pairs = discriminator.make_pairs(seen, taken)
    acted = torch.eye(4)[taken] if policy.discrete else taken.clamp(-1, 1)
    assert torch.equal(pairs[..., :3], policy.standardise(seen))
    assert torch.equal(pairs[..., 3:-1], acted) and (pairs[..., -1] == 0).all()
    assert discriminator(pairs).shape == (2, 5)


def test_absorbing_pairs_are_the_rest_of_the_discounted_occupancy():
    """1 + gamma + gamma^2 + ... for each end; they know the last observation, made small, and no
    action."""
    discriminator = gail.Discriminator(discrete_policy(), 8)
    pairs, ends = torch.randn(10, 8), torch.arange(10) % 4 == 3
    longer = discriminator.add_absorbing_pairs(pairs, ends, gamma=0.95)
    assert len(longer) == 10 + 2 * 20 and torch.equal(longer[:10], pairs)
    for last in (3, 7):
        after = torch.tensor([*(0.3 * pairs[last, :3]), 0, 0, 0, 0, 1.0])
        assert (longer[10:] == after).all(-1).sum() == 20
    assert torch.equal(discriminator.add_absorbing_pairs(pairs, ends & False, 0.95), pairs)
    weights = torch.where(ends, 0.25, 0.0)  # of episodes of which a quarter is left
    assert len(discriminator.add_absorbing_pairs(pairs, weights, 0.95)) == 10 + 2 * 5
    assert len(discriminator.add_absorbing_pairs(pairs, weights / 25, 0.95)) == 10 + 2  # not none


@pytest.mark.parametrize("absorbing", ["yes", "no"])
def test_with_an_absorbing_state_d_learns_from_ten_rollouts(absorbing, tmp_path):
    """Otherwise from the newest, of 48 steps."""
    with mock.patch.object(gail, "update_discriminator", wraps=gail.update_discriminator) as learn:
        PPO.run(tmp_path / "run", "--absorbing", absorbing, iterations=12)
    seen = [len(policy_pairs) for (_, _, _, policy_pairs, _), _ in learn.call_args_list]
    kept = checkpoint(tmp_path / "run")["parts"]["recent"]
    if absorbing == "no":
        assert seen == [48] * 12 and kept == []
    else:  # 100 copies of each end; a checkpoint has none of them
        many = [len(pairs) + 100 * int(ends.sum()) for pairs, ends in kept]
        assert len(many) == 10 and min(many) >= 48 and max(many) > 48
        assert seen[-1] == sum(many) and seen[0] < seen[4] < seen[9]
        assert {len(pairs) for pairs, _ in kept} == {48}


def test_gradient_penalty_against_finite_differences():
    """Mixtures of an absorbing pair with another are left out."""
    discriminator = gail.Discriminator(discrete_policy(), 16).double()
    expert, learner = torch.randn(2, 40, 8).double()
    expert[:, -1] = learner[:, -1] = 0
    learner[:7] = discriminator.absorbing_pairs(learner[:7])
    expert[5:7] = discriminator.absorbing_pairs(expert[5:7])
    rng = torch.get_rng_state()
    found = gail.gradient_penalty(discriminator, expert, learner)
    torch.set_rng_state(rng)
    mix = torch.rand(40, 1)
    between = mix * expert + (1 - mix) * learner
    steps = torch.eye(8).double() * 1e-5
    rises = [discriminator(between + step) - discriminator(between - step) for step in steps]
    norms = (torch.stack(rises, -1) / 2e-5).norm(dim=-1)
    exact = ((norms[5:] - 1) ** 2).sum() / 40
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    found.backward()
    assert all(layer.grad.abs().sum() > 0 for layer in list(discriminator.parameters())[::2])


@pytest.fixture
def table():
    """Of 20 states and 3 actions: f or rewards, the expert's actions, log pi."""
    return torch.randn(20, 3) * 3, torch.randint(3, (20,)), torch.randn(20, 3).log_softmax(-1)


def test_expected_discriminator_loss_against_enumeration(table):
    logits, actions, log_probs = table
    exact, entropy = 0.0, F.binary_cross_entropy_with_logits
    for row, expert in enumerate(actions):
        exact += entropy(logits[row, expert], torch.tensor(1.0)) / 20
        for action, chance in enumerate(log_probs[row].exp()):
            exact += chance * entropy(logits[row, action], torch.tensor(0.0)) / 20
    assert torch.allclose(offline.expected_discriminator_loss(logits, actions, log_probs), exact)


def test_natural_policy_loss_against_the_fisher_matrix(table):
    """Fisher times the natural gradient is the expected reward's; log pi in it is a constant."""
    f, _, theta = table
    log_probs = theta.requires_grad_().log_softmax(-1)
    rewards = offline.discriminator_logits(lambda observations: f, None, log_probs)
    loss = offline.natural_policy_loss(log_probs, rewards)
    rewards = rewards.detach()
    (found,) = torch.autograd.grad(-20 * loss, theta)
    chances = theta.softmax(-1)
    (exact,) = torch.autograd.grad((chances * rewards).sum(), theta)
    for p, natural, plain in zip(chances.detach(), found, exact):
        assert torch.allclose((p.diag() - p.outer(p)) @ natural, plain, atol=1e-6)


def test_offline_discriminator_by_its_definition(table):
    """D = exp f / (exp f + pi), Fu et al. 2018."""
    f, _, log_probs = table
    found = offline.discriminator_logits(lambda observations: f, None, log_probs).sigmoid()
    assert torch.allclose(found, f.exp() / (f.exp() + log_probs.exp()), atol=1e-6)


def energy(x, y):
    total = 2 * np.mean([np.linalg.norm(a - b) for a in x for b in y])
    for z in (x, y):
        total -= np.mean([np.linalg.norm(a - b) for i, a in enumerate(z) for b in z[:i]])
    return total


def test_occupancy_distances_by_their_definition():
    rng = np.random.default_rng(0)

    def episodes(shift, many=4):
        seen = rng.normal(shift, [1, 9, 0.1, 0, 1e-4], (many, 8, 5)).astype(np.float32)
        seen[..., 3:] += 2**30, 2**10  # large, and constant; or constant up to rounding
        last = 4 if shift < 2 else 3  # the random policy never took the last action
        return [gail.Episode(x, rng.integers(1, last, 8), *np.zeros((3, 8))) for x in seen]

    def pairs(played):
        seen, taken = (np.concatenate([e[k] for e in played]) for k in (0, 1))
        return np.concatenate([seen, np.eye(3)[taken - 1]], 1)

    held_out, samples = episodes(0), {"random": episodes(2), "learner": episodes(0.5, many=5)}
    unit = pairs(held_out).std(0, ddof=1)
    unit[3:5] = 1  # these keep their own units
    exact = {k: energy(pairs(v) / unit, pairs(held_out) / unit) for k, v in samples.items()}
    found = gail.occupancy_distances(held_out, samples)
    assert found["random"] == 1
    assert found["learner"] == pytest.approx(exact["learner"] / exact["random"], rel=1e-4)


@pytest.mark.parametrize(
    "marks, solved", [("-+-+++", 3), ("++++++", 0), ("++++-+", None), ("+++++-", None)]
)
def test_solved_is_the_first_evaluation_from_which_on_all_are_good(marks, solved):
    """The last mark is the final evaluation's; good is 95 % of the way from random to expert."""
    scores = [{"+": 480.0, "-": 470.0}[mark] for mark in marks]
    curve = [{"steps": i, "wall_seconds": 2.0 * i, "return_mean": x} for i, x in enumerate(scores)]
    random, expert = {"return_mean": 20.0}, {"return_mean": 500.0}
    blind = gail.judge(curve[:-1], "advice", random, random, {"return_mean": scores[-1]})
    assert blind["solved_at_steps"] is None and blind["verdict"].startswith("no verdict")
    found = gail.judge(curve[:-1], "advice", random, expert, {"return_mean": scores[-1]})
    seconds = None if solved is None else 2.0 * solved
    assert (found["solved_at_steps"], found["solved_at_seconds"]) == (solved, seconds)
    text = "not solved: return 470" if solved is None else f"solved at {solved} steps"
    assert found["verdict"].startswith(text)
    assert found["verdict"].endswith("advice") == (solved is None)


@pytest.mark.parametrize("case", RACECAR, ids=str)
def test_the_race_cars_discriminator_sees_headings_as_angles(case):
    script = case.module
    discriminator, seen, taken = script.Discriminator(8), torch.randn(9, 9), torch.randn(9, 2) * 2
    pairs = discriminator.make_pairs(seen, taken)
    natural = pairs * torch.tensor(script.UNITS)
    assert pairs.shape == (9, 13) and (pairs[:, -1] == 0).all()
    assert torch.allclose(natural[:, :2], seen[:, :2] * script.METRE, atol=1e-5)
    assert torch.allclose(torch.atan2(natural[:, 4], natural[:, 5]), seen[:, 4], atol=1e-4)
    assert torch.allclose(natural[:, -3:-1], taken.clamp(-1, 1), atol=1e-6)
    turned = seen + 2 * math.pi * (torch.arange(9) == 4)
    assert torch.allclose(discriminator.make_pairs(turned, taken), pairs, atol=1e-4)


@pytest.mark.parametrize("case", RACECAR, ids=str)
def test_a_finish_and_a_wall_are_absorbed_apart(case):
    script = case.module
    discriminator, pairs = script.Discriminator(8), torch.randn(10, 13)
    longer = discriminator.add_absorbing_pairs(pairs, torch.tensor([True, False]), gamma=0.95)
    assert torch.equal(longer[:10], pairs) and len(longer) == 10 + 2 * 20
    signs = longer[10:, 12].sign().tolist()
    assert (longer[10:, :12] == 0).all() and sorted(signs) == [-1] * 20 + [1] * 20
    seen = torch.rand(500, 9) * 2 + torch.tensor([13.5, 6.5, *[0] * 7])
    near = [math.dist(place, (14.5, 7.5)) <= 1 for place in seen[:, :2].tolist()]  # success there
    assert script.at_finish(seen).tolist() == near and 0 < sum(near) < 500


@pytest.mark.parametrize("case", RACECAR, ids=str)
@pytest.mark.parametrize("slope", [0.5, 3.0])
def test_the_race_cars_penalty_is_for_slopes_above_one(case, slope):
    line = torch.nn.Linear(13, 1)
    with torch.no_grad():
        line.weight.copy_(slope * torch.eye(13)[3])
    penalty = case.module.gradient_penalty(line, torch.randn(5, 13), torch.randn(5, 13))
    assert float(penalty.detach()) == pytest.approx(max(0.0, slope - 1) ** 2)


@pytest.mark.parametrize("case", RACECAR, ids=str)
def test_the_actions_deviation_falls_by_the_schedule(case, tmp_path):
    """Half of it has passed when the third iteration begins."""
    case.run(tmp_path / "run", "--schedule", 256, "--eval-every", 10**6)
    std = checkpoint(tmp_path / "run")["parts"]["policy"]["std"]
    assert float(std) == pytest.approx(case.module.STD / 2, rel=1e-5)
