"""GAIL on the race car: learn to drive to the finish from four laps, without ever seeing a reward.

Generative adversarial imitation learning (Ho & Ermon 2016, https://arxiv.org/abs/1606.03476,
Algorithm 1), with PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347):
    1. roll out the policy and keep its (state, action) pairs,
    2. train the discriminator D to tell the expert's pairs (label 1) from the policy's (label 0),
    3. reward each of the policy's pairs by what D thinks of it, for example -log(1 - D(s, a)),
    4. take PPO's steps on that reward.

    python gail_racecar_ppo.py --total-steps 20000      a look around: ten seconds of training
    python gail_racecar_ppo.py                          the default run: a few minutes
    python gail_racecar_ppo.py --resume runs/FOLDER     resume a run where it stopped

Needs racecar_env.py in the same folder. By the end of the default run, expect nearly every lap to
reach the finish; docs/gail_racecar_ppo.md has the results, and the reasons for the choices below.

Deviations from the paper: (1) PPO in place of TRPO; (2) a gradient penalty on D, in fixed units,
and forty D updates per rollout; (3) two absorbing states, one after the finish and one after a
wall: what follows an end is imitated too, so that a crash does more than stop the reward. For this,
the script is told where the finish lies, and thus which ends are good; (4) a standard deviation of
the actions that falls on a schedule, in place of an entropy bonus; (5) a moving average of the
policies is evaluated and kept; (6) a choice of reward forms, of which `gail` is the paper's.
"""

# /// script
# requires-python = ">=3.11,<3.12"
# dependencies = [
#     "gymnasium>=1.1,<2",
#     "matplotlib>=3.8",
#     "moviepy>=2",
#     "numpy>=1.26",
#     "pybullet",
#     "tensorboard>=2.16",
#     "torch==2.13.0",
#     "tqdm>=4.66",
# ]
# ///

import argparse
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import sys
import time
import zipfile
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import RecordVideo
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from racecar_env import FINISH, FINISH_RADIUS, RaceCarVectorEnv, WaypointController, progress

TASKS = {"RaceCar-v0": 0.98}  # solved if METRIC >= this
# The metric, the unit of progress, the flag that limits it, and how often to evaluate:
METRIC, CLOCK, BUDGET, EVAL_EVERY = "success_rate", "env_steps", "total_steps", 50_000
EVAL_ENVS, NUM_DEMOS = 10, 4
DEMOS = "{env_id}.npz"  # in experts/; if missing, made in --out
FINAL_LR = 0.05  # policy's and D's step sizes fall to this share, over --schedule
STD, FINAL_STD = 0.3, 0.045  # of the actions, over --schedule too: explore, then be precise
AVERAGE = 0.95  # the policy that is kept: a moving average over about 20 iterations
METRE = 0.5  # one metre of position as the networks see it; much less blurs the corners
# D's units: the gradient penalty lets a difference of one unit change the logit by about 1.
UNITS = [0.2 * METRE] * 2 + [0.8, 0.8, 0.3, 0.3, 0.5, 0.5, 1, 1, 1, 1, 0.5]  # see make_pairs
CONTROLS = ("none", "constant-reward", "frozen-discriminator", "shuffled-expert")


def add_settings(parser):
    """The algorithm's flags. `number`, like `check`, `tensors` and `Run`, is in the harness."""
    flag = parser.add_argument_group("expert").add_argument
    flag("--bc-updates", type=number(int, 0), default=0, help="clone the expert first (warm start)")
    flag("--control", choices=CONTROLS, default="none", help="remove what the expert teaches")
    flag = parser.add_argument_group("policy").add_argument
    flag("--total-steps", type=number(int, 1), default=600_000, help="environment steps")
    schedule = "steps over which the actions' deviation and the policy's and D's step sizes fall"
    flag("--schedule", type=number(int, 1), default=600_000, help=schedule)
    flag("--num-envs", type=number(int, 1, 500), default=8, help="environments at once")
    flag("--num-steps", type=number(int, 3), default=256, help="steps of each per rollout")
    flag("--policy-lr", type=number(float, 0), default=1e-3, help="Adam's first step size")
    flag("--critic-lr", type=number(float, 0), default=1e-3, help="the same for the critic")
    flag("--hidden", type=number(int, 1, 4_096), default=64, help="width of the two hidden layers")
    flag("--gamma", type=number(float, 0, 0.9999), default=0.98, help="discount factor")
    lambdas = "1: sum the rewards to the rollout's end; less: trust the critic sooner"
    flag("--gae-lambda", type=number(float, 0, 1), default=0.95, help=lambdas)
    flag("--epochs", type=number(int, 1), default=10, help="passes over each rollout")
    flag("--minibatch-size", type=number(int, 1), default=256, help="pairs per step")
    flag("--clip", type=number(float, 0), default=0.2, help="how far PPO lets the ratio go from 1")
    flag = parser.add_argument_group("discriminator").add_argument
    forms = "-log(1-D), which also works without absorbing states; log D - log(1-D); or log D"
    flag("--reward", choices=("gail", "airl", "logd"), default="gail", help=forms)
    absorbing = "let D judge what follows an end, at a wall or the finish; otherwise its value is 0"
    flag("--absorbing", action=argparse.BooleanOptionalAction, default=True, help=absorbing)
    flag("--discriminator-updates", type=number(int, 1), default=40, help="for each rollout")
    flag("--discriminator-batch", type=number(int, 1), default=256, help="pairs of each kind")
    flag("--discriminator-lr", type=number(float, 0), default=1e-3, help="Adam's first step size")
    flag("--gradient-penalty", type=number(float, 0), default=0.5, help="its weight; 0: none")


# --- networks -------------------------------------------------------------------------------------


def features(observations):
    """(..., 9) -> (..., 10): the heading as sine and cosine; position and steering rates scaled."""
    place, velocity, yaw, angles, rates = observations.split([2, 2, 1, 2, 2], -1)
    return torch.cat([METRE * place, velocity, yaw.sin(), yaw.cos(), angles, rates / 10], -1)


def mlp(*sizes):
    """Linear layers with tanh between them: (..., sizes[0]) -> (..., sizes[-1])."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def spread(layer, inputs):
    """Choose a first layer's biases so that each tanh is centred on one of the inputs: (rows, in).

    PyTorch's own centre them all near the track's origin; far from there, D would be flat."""
    rows = torch.randint(len(inputs), layer.bias.shape, device=inputs.device)
    layer.bias.copy_(-(layer.weight * inputs[rows]).sum(-1))


class Policy(nn.Module):
    """CHANGE ME: a Gaussian; observations (..., 9) -> a distribution over (2,), for to_box()."""

    def __init__(self, hidden):
        super().__init__()
        self.settings = {"hidden": hidden}
        self.network = mlp(10, hidden, hidden, 2)
        self.register_buffer("std", torch.tensor(STD))

    def forward(self, observations):
        mean = self.network(features(observations))
        return Independent(Normal(mean, self.std.expand_as(mean), validate_args=False), 1)

    @torch.no_grad()
    def act(self, observations):
        """The mean actions, NumPy in and out: (batch, 9) -> (batch, 2)."""
        return to_box(self(torch.as_tensor(observations, device=self.std.device)).mean)


class Critic(nn.Module):
    """The value of observations: (..., 9) -> (...)."""

    def __init__(self, hidden):
        super().__init__()
        self.network = mlp(10, hidden, hidden, 1)

    def forward(self, observations):
        return self.network(features(observations)).squeeze(-1)


class Discriminator(nn.Module):
    """Logits of D, "this pair is the expert's": (..., size of a pair) -> (...)."""

    def __init__(self, hidden, mean, std):
        super().__init__()
        self.network = mlp(len(mean), hidden, hidden, 1)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pairs):
        return self.network(self.standardise(pairs)).squeeze(-1)

    def standardise(self, pairs):
        return (pairs - self.mean) / self.std


# --- mathematics ----------------------------------------------------------------------------------


LOW, HIGH = np.array([[-1, 0], [1, 1]], np.float32)  # of steering and throttle


def to_box(actions):
    """From [-1, 1], clipped, to the car's own range, as NumPy: (..., 2) -> (..., 2).

    So a new policy, with means near 0, drives straight at half throttle and explores around it."""
    return LOW + (HIGH - LOW) * (actions.clamp(-1, 1).cpu().numpy() + 1) / 2


def from_box(actions):
    """The inverse of to_box: (..., 2) -> (..., 2)."""
    low, high = torch.as_tensor(LOW), torch.as_tensor(HIGH)
    return 2 * (actions - low) / (high - low) - 1


def make_pairs(observations, actions):
    """(..., 9), (..., 2) -> (..., 13): features, the executed action, 0 for "not absorbing"."""
    actions = actions.clamp(-1, 1)
    return torch.cat([features(observations), actions, torch.zeros_like(actions[..., :1])], -1)


def at_finish(observations):
    """Is the car at the finish? All that is known of the track: (..., 9) -> (...) bool."""
    finish = torch.tensor(FINISH, device=observations.device)
    return (observations[..., :2] - finish).norm(dim=-1) <= FINISH_RADIUS


def absorbing_pairs(finished):
    """What follows an end for ever, at the finish or at a wall: (...) bool -> (..., 13).

    DEVIATION: DAC (Kostrikov et al. 2019) has one absorbing state. The expert's laps end too, so
    with only one, crashing would look like finishing."""
    flag = torch.where(finished, 1.0, -1.0)
    return F.pad(flag[..., None], (12, 0))


def add_absorbing_pairs(pairs, finished, gamma):
    """Add 1 / (1 - gamma) pairs per end, one per discounted step: (n, 13), (ends,) bool."""
    return torch.cat([pairs, absorbing_pairs(finished).repeat(round(1 / (1 - gamma)), 1)])


def discriminator_loss(expert_logits, policy_logits):
    """Binary cross-entropy, expert = 1 (eq. 17 with the labels exchanged): (batch,) twice -> ()."""
    return F.softplus(-expert_logits).mean() + F.softplus(policy_logits).mean()


def gradient_penalty(discriminator, expert_pairs, policy_pairs):
    """max(0, |logit gradient| - 1)^2 between expert and policy pairs: -> ().

    The one-sided penalty of Petzka et al. 2018, https://arxiv.org/abs/1709.08894."""
    mix = torch.rand(len(expert_pairs), 1, device=expert_pairs.device)
    between = mix * expert_pairs + (1 - mix) * policy_pairs
    between = discriminator.standardise(between).requires_grad_()
    logits = discriminator.network(between)
    (gradient,) = torch.autograd.grad(logits.sum(), between, create_graph=True)
    return (gradient.norm(dim=-1) - 1).relu().square().mean()


def imitation_reward(logits, form):
    """The reward of pairs with these logits, in forms that do not overflow: (...) -> (...)."""
    if form == "gail":
        return F.softplus(logits)  # -log(1 - D), above 0: favours long episodes
    if form == "logd":
        return F.logsigmoid(logits)  # log D, below 0: favours short ones
    return logits  # log D - log(1 - D), of either sign (Fu et al. 2018)


def generalized_advantages(rewards, values, next_values, done, gamma, gae_lambda):
    """GAE (Schulman et al. 2016, eq. 16); all tensors are (num_steps, num_envs).

    `next_values` are those of the states that the steps lead to, even if an episode is truncated
    there; where it terminates, 0 or the absorbing state's value."""
    errors = rewards + gamma * next_values - values
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        advantage = errors[step] + gamma * gae_lambda * ~done[step] * advantage
        advantages[step] = advantage
    return advantages


def ppo_loss(log_probs, old_log_probs, advantages, clip):
    """Minus the clipped surrogate (Schulman et al. 2017, eq. 7): (batch,) each -> ()."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def behavioural_cloning_loss(policy, observations, actions):
    """Minus the mean log-likelihood of the expert's actions: (batch, ...) twice -> ()."""
    return -policy(observations).log_prob(actions).mean()


# --- environment and expert -----------------------------------------------------------------------


def make_envs(env_id, num_envs):
    """CHANGE ME: the task, with features, UNITS, LOW and HIGH, and the sizes in Policy, Critic,
    make_pairs and absorbing_pairs. These cars rest when their episode is over, until reset."""
    return RaceCarVectorEnv(num_envs)


class Cars:
    """Race cars in mid-episode, and all that a checkpoint needs to restore them."""

    def __init__(self, env_id, num_envs):
        self.envs = make_envs(env_id, num_envs)

    def reset(self, seed):
        self.observations, _ = self.envs.reset(seed=seed)
        self.histories = [[] for _ in self.envs.envs]  # each car's actions since then

    def step(self, actions):
        """One transition of each car. Those whose episode ends are put back at the start."""
        observations = self.observations
        next_observations, _, terminated, truncated, _ = self.envs.step(actions)
        done = terminated | truncated
        for history, action in zip(self.histories, actions):
            history.append(action)
        ends = np.flatnonzero(done)
        ended = [self.describe(i, next_observations[i], terminated[i]) for i in ends]
        self.observations, _ = self.envs.reset(options={"reset_mask": done})
        self.histories = [[] if over else h for over, h in zip(done, self.histories)]
        return (observations, next_observations, terminated, truncated), ended

    def describe(self, i, observation, terminated):
        """The episode that car i has just ended, for the log: steps, progress, finish, wall."""
        length, way = len(self.histories[i]), progress(observation)
        return length, way, float(terminated and way == 1), float(terminated and way < 1)

    def state_dict(self):
        seeds = [env.np_random_seed for env in self.envs.envs]
        actions = [torch.tensor(np.reshape(x, (-1, 2)).astype(np.float32)) for x in self.histories]
        return {"episodes": list(zip(seeds, actions))}

    def load_state_dict(self, state):
        """Replay every car's episode up to where it was."""
        self.reset(0)
        for i, (seed, actions) in enumerate(state["episodes"]):
            self.observations[i], _ = self.envs.envs[i].reset(seed=seed)
            self.histories[i] = list(actions.numpy())
            for action in self.histories[i]:
                self.observations[i] = self.envs.envs[i].step(action)[0]


@torch.no_grad()
def rollout(cars, policy, num_steps, device):
    """`num_steps` steps of each car: a dict of (num_steps, num_envs, ...), and ended episodes."""
    frames, ended = [], []
    for _ in range(num_steps):
        actions = policy(torch.as_tensor(cars.observations, device=device)).sample()
        frame, ends = cars.step(to_box(actions))
        frames.append((*frame, actions.cpu().numpy()))
        ended += ends
    names = ("observations", "next_observations", "terminated", "truncated", "actions")
    columns = (torch.as_tensor(np.stack(column), device=device) for column in zip(*frames))
    return dict(zip(names, columns)), ended


def make_expert(args):
    """CHANGE ME: the expert; the waypoint controller, noise of 0.1 on both actions."""
    controller, random = WaypointController(0.5), np.random.default_rng(0)

    def act(observations):
        actions = np.stack([controller(observation) for observation in observations])
        noisy = actions + 0.1 * random.standard_normal(actions.shape)
        return np.clip(noisy, LOW, HIGH).astype(np.float32)

    return act


# --- the algorithm --------------------------------------------------------------------------------


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def minibatch(pairs, number):
    return pairs[torch.randint(len(pairs), (number,))]


def update_discriminator(discriminator, optimizer, expert_pairs, policy_pairs, args):
    """Step 2, --discriminator-updates times; returns what to log."""
    total = 0.0
    for _ in range(args.discriminator_updates):
        expert = minibatch(expert_pairs, args.discriminator_batch)
        learner = minibatch(policy_pairs, args.discriminator_batch)
        loss = discriminator_loss(*discriminator(torch.stack([expert, learner])))
        penalty = gradient_penalty(discriminator, expert, learner)
        descend(optimizer, loss + args.gradient_penalty * penalty)
        total += loss.detach()
    return {"losses/discriminator": float(total) / args.discriminator_updates}


def update_policy(policy, critic, optimizer, observations, actions, advantages, returns, args):
    """Step 4: PPO on minibatches of the rollout; returns what to log."""
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    with torch.no_grad():
        old_log_probs = policy(observations).log_prob(actions)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(actions)).split(args.minibatch_size):
            new = policy(observations[rows])
            log_probs = new.log_prob(actions[rows])
            policy_loss = ppo_loss(log_probs, old_log_probs[rows], advantages[rows], args.clip)
            value_loss = F.mse_loss(critic(observations[rows]), returns[rows])
            descend(optimizer, policy_loss + value_loss)
    with torch.no_grad():
        log_ratio = policy(observations).log_prob(actions) - old_log_probs
    return {
        "losses/policy": float(policy_loss.detach()),
        "losses/value": float(value_loss.detach()),
        "losses/entropy": float(new.entropy().mean()),
        "losses/approx_kl": float((log_ratio.exp() - 1 - log_ratio).mean()),
    }


def diagnose(scalars):
    """A warning about the discriminator if there is cause, from the last logged scalars."""
    if scalars["discriminator/reward_std"] < 0.1 * abs(scalars["discriminator/reward_mean"]):
        return "the reward is nearly constant: it teaches how long to last, and little else"
    if min(scalars[f"discriminator/accuracy_{who}"] for who in ("expert", "policy")) > 0.99:
        return "the discriminator is saturated: it tells all pairs apart"
    return ""


def train(args):
    """Run the algorithm; returns what summary.json holds."""
    run = Run(args)
    observations, actions = tensors(run.demos)
    observations, actions = observations.to(args.device), from_box(actions).to(args.device)
    policy = Policy(args.hidden).to(args.device)
    average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    critic = Critic(args.hidden).to(args.device)
    if args.control == "shuffled-expert":
        actions = actions[torch.randperm(len(actions))]
    expert_pairs = make_pairs(observations, actions)  # (pairs, 13)
    discriminator = Discriminator(args.hidden, torch.zeros(13), torch.tensor(UNITS)).to(args.device)
    spread(discriminator.network[0], discriminator.standardise(expert_pairs))
    for network in (critic, policy):
        spread(network.network[0], features(observations))
    absorbing = args.absorbing and args.control != "constant-reward"
    if absorbing:
        laps = sum(episode["terminated"] for episode in run.demos)  # assumed to be finishes
        check(not (args.num_pairs and laps), "--num-pairs: expected --no-absorbing with it")
        finished = torch.ones(laps, dtype=torch.bool, device=args.device)
        expert_pairs = add_absorbing_pairs(expert_pairs, finished, args.gamma)
    groups = [{"params": policy.parameters()}]
    groups += [{"params": critic.parameters(), "lr": args.critic_lr}]
    optimizer = torch.optim.Adam(groups, lr=1e-3, fused=True)  # for cloning; GAIL sets the policy's
    d_optimizer = torch.optim.Adam(discriminator.parameters(), args.discriminator_lr, fused=True)
    cars = Cars(args.env_id, args.num_envs)
    cars.reset(int(torch.randint(2**62, ())))  # from --seed, runs 1 and 2 would share most starts
    parts = {"policy": policy, "average": average, "critic": critic, "cars": cars}
    parts |= {"discriminator": discriminator, "discriminator_optimizer": d_optimizer}
    run.start(**parts, optimizer=optimizer)
    if run.count["env_steps"] == 0:
        for _ in range(args.bc_updates):
            rows = torch.randint(len(actions), (64,))
            descend(optimizer, behavioural_cloning_loss(policy, observations[rows], actions[rows]))

    while not run.finished:
        left = max(1 - run.count["env_steps"] / args.schedule, FINAL_LR)
        optimizer.param_groups[0]["lr"] = args.policy_lr * left
        d_optimizer.param_groups[0]["lr"] = args.discriminator_lr * left
        policy.std.fill_(max(STD * left, FINAL_STD))

        batch, ended = rollout(cars, policy, args.num_steps, args.device)
        run.count["env_steps"] += args.num_steps * args.num_envs
        run.count["updates"] += 1  # one iteration

        pairs = make_pairs(batch["observations"], batch["actions"])  # (num_steps, num_envs, 13)
        policy_pairs, finished = pairs.flatten(0, 1), at_finish(batch["next_observations"])
        if absorbing:
            ends = finished[batch["terminated"]]
            policy_pairs = add_absorbing_pairs(policy_pairs, ends, args.gamma)
        losses = {}
        if args.control not in ("constant-reward", "frozen-discriminator"):
            losses = update_discriminator(
                discriminator, d_optimizer, expert_pairs, policy_pairs, args
            )

        with torch.no_grad():
            logits = discriminator(pairs)
            expert_logits = discriminator(expert_pairs[: len(actions)])  # not the absorbing ones
            rewards = imitation_reward(logits, args.reward)
            if args.control == "constant-reward":
                rewards = torch.ones_like(rewards)
            forever = imitation_reward(discriminator(absorbing_pairs(finished)), args.reward)
            absorbing_value = absorbing * forever / (1 - args.gamma)  # (num_steps, num_envs)
            values = critic(batch["observations"])  # (num_steps, num_envs)
            next_values = critic(batch["next_observations"])
            next_values = torch.where(batch["terminated"], absorbing_value, next_values)
            done = batch["terminated"] | batch["truncated"]
            advantages = generalized_advantages(
                rewards, values, next_values, done, args.gamma, args.gae_lambda
            )
        columns = (batch["observations"], batch["actions"], advantages, advantages + values)
        columns = (column.flatten(0, 1) for column in columns)
        losses |= update_policy(policy, critic, optimizer, *columns, args)
        average.update_parameters(policy)

        scalars = {
            **losses,
            "charts/speed": float(batch["observations"][..., 2:4].norm(dim=-1).mean()),
            "discriminator/accuracy_expert": float((expert_logits > 0).float().mean()),
            "discriminator/accuracy_policy": float((logits < 0).float().mean()),
            "discriminator/reward_mean": float(rewards.mean()),
            "discriminator/reward_std": float(rewards.std()),
        }
        if ended:
            names = ("episodic_length", "progress", "ended_at_finish", "ended_at_wall")
            means = np.mean(ended, 0).tolist()
            scalars |= {f"charts/{name}": mean for name, mean in zip(names, means)}
        run.record(scalars, average.module)
    return run.finish(average.module, diagnose(run.curve[-1]))


# ==================================================================================================
# The harness: flags, files, demonstrations, evaluation, run folder, main. It is the same text in
# every script with demonstrations and no part of the algorithm, so read it once. From above it
# uses TASKS, METRIC, CLOCK, BUDGET, EVAL_EVERY, EVAL_ENVS, NUM_DEMOS, DEMOS, add_settings, Policy,
# make_envs, make_expert and train.
# ==================================================================================================

SCRIPT = Path(__file__).stem
EVALUATION_SEEDS = 1_000_000  # evaluation seeds begin here, apart from training's
RECORDED, HELD_OUT = 30, 20  # episodes in a new file; those at a file's end, never trained on
MAY_CHANGE = {BUDGET, "resume", "eval_every", "eval_episodes", "capture_video", "render", "out"}
MAY_CHANGE |= {"device", "num_threads", "no_progress"}  # together with --resume


class BadInput(Exception):
    """Something that the user can fix: one line on stderr, exit status 2."""


class Failed(Exception):
    """A loss that is not finite, an expert that is too weak, a failed video: exit status 1."""


def check(condition, message):
    if not condition:
        raise BadInput(message)


# --- flags ----------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def number(kind, low, high=10**9):
    """An argparse type: a finite int or float in [low, high]."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    """The flags; if a run is resumed, its settings take the place of the defaults."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", None, __doc__, formatter_class=HelpFormatter)
    add_settings(parser)
    flag = parser.add_argument_group("run").add_argument
    flag("--env-id", choices=TASKS, default=next(iter(TASKS)), help="the task")
    flag("--seed", type=number(int, 0, 99_999), default=1, help="fixes all randomness in a run")
    flag("--demos", metavar="FILE", help="learn from this .npz (default: shipped, or a new one)")
    flag("--num-demos", type=number(int, 1), default=NUM_DEMOS, help="how many expert episodes")
    flag("--num-pairs", type=number(int, 2), help="random pairs of each episode (default: all)")
    flag("--record-demos", metavar="FILE", help="make an expert, write its episodes and stop")
    flag("--eval-every", type=number(int, 1), default=EVAL_EVERY, help=f"how often, in {CLOCK}")
    flag("--eval-episodes", type=number(int, 2, 500), default=100, help="greedy, on unseen seeds")
    flag("--evaluate", metavar="FILE", help="evaluate this policy.pt and stop")
    flag("--resume", metavar="RUN_FOLDER", help="resume that run; its budget may be raised")
    flag("--out", default="runs", help="the folder for run folders and new experts")
    flag("--run-name", help="the run folder (default: script, seed, date and time)")
    flag("--capture-video", action="store_true", help="at the end, MP4s of three episodes")
    flag("--render", action="store_true", help="at the end, three episodes in a window")
    flag("--device", choices=("cpu", "cuda", "auto"), default="cpu", help="cpu is fast enough")
    flag("--num-threads", type=number(int, 1), default=1, help="for torch; one is fastest here")
    flag("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    named = (args.resume, args.evaluate, args.record_demos)
    check("" not in named, "--resume, --evaluate or --record-demos: expected a name")
    if args.resume:
        saved = read(Path(args.resume, "checkpoint.pt"), read_checkpoint)["args"]
        args = parser.parse_args(argv, argparse.Namespace(**saved))
        fixed = [k for k in saved if getattr(args, k) != saved[k] and k not in MAY_CHANGE]
        check(not fixed, f"--resume {args.resume}: {', '.join(fixed)} cannot be changed")
    cuda = torch.cuda.is_available()
    check(cuda or args.device != "cuda", "--device cuda: no CUDA device found, expected one")
    if args.device == "auto":
        args.device = "cuda" if cuda else "cpu"
    return args


# --- files ----------------------------------------------------------------------------------------


def read(path, reader):
    """What `reader(path)` returns; whatever goes wrong in it becomes a one-line BadInput."""
    try:
        return reader(Path(path))
    except Exception as error:  # damaged files fail in as many ways as there are readers
        reason = " ".join(str(error).split())[:240]  # it may quote the file
        if not isinstance(error, BadInput):
            reason = f"cannot be read: {type(error).__name__}: {reason.partition('. ')[0]}"
        raise BadInput(f"{path}: {reason}") from None


def write(path, writer):
    """Write what `writer(file)` writes: the whole file or nothing."""
    content, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    writer(content)
    with open(temporary, "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, content):
    write(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


def write_checkpoint(path, state):
    """Write the state, followed by its digest so that a damaged file is noticed."""

    def writer(file):
        torch.save({"script": SCRIPT, **state}, file)
        file.write(sha256(file.getvalue()).digest())

    write(path, writer)


def read_checkpoint(path):
    content = path.read_bytes()
    state, digest = content[:-32], content[-32:]
    check(sha256(state).digest() == digest, "not as it was written, expected an intact checkpoint")
    state = torch.load(io.BytesIO(state), weights_only=True, map_location="cpu")
    check(state["script"] == SCRIPT, f"a checkpoint of {state['script']}, expected {SCRIPT}")
    return state


def read_policy(path):
    """The environment's id and the policy of a policy.pt."""
    saved = torch.load(path, weights_only=True, map_location="cpu")
    check(saved["script"] == SCRIPT, f"a policy of {saved['script']}, expected {SCRIPT}")
    check(saved["env_id"] in TASKS, f"a policy for {saved['env_id']}, expected {list(TASKS)}")
    with torch.device("meta"):  # allocates nothing, whatever sizes the file declares
        policy = Policy(**saved["network"])
    policy.load_state_dict(saved["weights"], assign=True)
    check_finite(policy.float())
    return saved["env_id"], policy


def check_finite(network):
    sound = all(x.isfinite().all() for x in network.state_dict().values())
    check(sound, "weights that are NaN or infinite, expected finite ones")


# --- demonstrations -------------------------------------------------------------------------------


def read_demos(path, env_id):
    """The episodes of an .npz: dicts of observations, actions, rewards (or None), terminated."""
    unpacked = sum(member.file_size for member in zipfile.ZipFile(path).infolist())
    check(unpacked < 2**31, "unpacks to more than 2 GB")
    needed = {"observations", "actions", "episode_starts", "terminated", "metadata"}
    with np.load(path, allow_pickle=False) as archive:
        missing = sorted(needed - set(archive))
        check(not missing, f"no {missing}, expected {sorted(needed)}")
        arrays = {name: archive[name] for name in set(archive) & {*needed, "rewards"}}
    recorded_on = json.loads(str(arrays["metadata"]))["env_id"]
    check(recorded_on == env_id, f"demonstrations of {recorded_on}, expected {env_id}")
    env, size, starts = gym.make(env_id), len(arrays["observations"]), arrays["episode_starts"]
    expected = {
        "observations": (np.float32, (size, *env.observation_space.shape)),
        "actions": (env.action_space.dtype, (size, *env.action_space.shape)),
        "episode_starts": (bool, (size,)),
        "terminated": (bool, (np.count_nonzero(starts),)),
        "rewards": (np.float32, (size,)),
    }
    for name in expected.keys() & arrays.keys():
        found, (dtype, shape) = arrays[name], expected[name]
        message = f"{name}: {found.dtype} {found.shape}, expected {np.dtype(dtype)} {shape}"
        check(found.dtype == dtype and found.shape == shape, message)
        check(np.isfinite(found).all(), f"{name}: NaN or infinity, expected finite numbers")
    check(size and starts[0], "no episode starts in the first row, expected one")
    valid = batch_space(env.action_space, size).contains(arrays["actions"])
    check(valid, f"actions out of range, expected {env.action_space}")
    cuts = np.flatnonzero(starts)[1:]
    columns = {k: np.split(arrays[k], cuts) for k in ("observations", "actions")}
    columns["terminated"] = arrays["terminated"]
    columns["rewards"] = [None] * len(arrays["terminated"])
    if "rewards" in arrays:
        columns["rewards"] = np.split(arrays["rewards"], cuts)
    return [dict(zip(columns, episode)) for episode in zip(*columns.values())]


def record_demos(path, args):
    """Make an expert, check it over 100 episodes and write the first 30 of them to an .npz."""
    check(not path.exists(), f"{path}: exists already, expected a new file")
    path.parent.mkdir(parents=True, exist_ok=True)
    check(os.access(path.parent, os.W_OK), f"{path.parent}: cannot be written to")
    print(f"{SCRIPT}.py: making an expert for {path}", file=sys.stderr)
    episodes = play(make_expert(args), args.env_id, 100, EVALUATION_SEEDS - 1_000)
    score = statistics(episodes)
    if score[METRIC] < TASKS[args.env_id]:
        raise Failed(f"expert too weak: {METRIC} {score[METRIC]:.4g} of {TASKS[args.env_id]}")
    kept = episodes[:RECORDED]
    names = ("observations", "actions", "rewards")
    arrays = {name: np.concatenate([episode[name] for episode in kept]) for name in names}
    arrays["rewards"] = arrays["rewards"].astype(np.float32)
    arrays["terminated"] = np.array([episode["terminated"] for episode in kept])
    arrays["episode_starts"] = np.concatenate([np.arange(len(e["rewards"])) == 0 for e in kept])
    about = {"env_id": args.env_id, "expert": DEMOS.format(**vars(args)), "score": score}
    arrays["metadata"] = json.dumps({**about, "versions": versions()})
    write(path, lambda file: np.savez_compressed(file, **arrays))


def load_demos(args):
    """Three lists of episodes: to learn from (drawn from the second), not held out, held out."""
    name = DEMOS.format(**vars(args))
    shipped, made = Path(__file__).parent / "experts" / name, Path(args.out, name)
    path = Path(args.demos or (shipped if shipped.exists() else made))
    if not args.demos and not path.exists():
        record_demos(path, args)
    episodes = read(path, lambda path: read_demos(path, args.env_id))
    many = args.num_demos
    check(many <= len(episodes), f"--num-demos {many}: {path} holds {len(episodes)}")
    cut = len(episodes) - HELD_OUT if len(episodes) >= many + HELD_OUT else len(episodes)
    rng = np.random.default_rng(args.seed)
    chosen = [dict(episodes[i]) for i in rng.permutation(cut)[:many]]
    for episode in chosen if args.num_pairs else []:
        length = len(episode["actions"])
        check(args.num_pairs <= length, f"--num-pairs {args.num_pairs}: an episode has {length}")
        rows = rng.choice(length, args.num_pairs, replace=False)
        episode.update({k: episode[k][rows] for k in ("observations", "actions")})
    return chosen, episodes[:cut], episodes[cut:]


def tensors(episodes, device="cpu"):
    """The observations and the actions of all episodes: (pairs, ...) both."""
    names = ("observations", "actions")
    arrays = (np.concatenate([episode[name] for episode in episodes]) for name in names)
    return [torch.as_tensor(array, device=device) for array in arrays]


# --- evaluation -----------------------------------------------------------------------------------


def play(act, env_id, episodes, seed):
    """The first episode of each of many environments, so that short ones are not favoured.

    `act` maps observations to actions, one row per environment; None acts at random."""
    played = []
    while len(played) < episodes:
        envs = make_envs(env_id, min(EVAL_ENVS, episodes - len(played)))
        envs.action_space.seed(seed + len(played))
        observations, _ = envs.reset(seed=seed + len(played))
        running, frames = np.ones(envs.num_envs, bool), []
        while running.any():
            actions = act(observations) if act else envs.action_space.sample()
            frame = (running.copy(), observations, actions)
            observations, rewards, terminated, truncated, _ = envs.step(actions)
            frames.append((*frame, rewards, terminated))
            running &= ~(terminated | truncated)
        envs.close()
        running, *columns = (np.stack(column, 1) for column in zip(*frames))
        names = ("observations", "actions", "rewards", "terminated")
        for i, steps in enumerate(running):
            played.append({name: column[i, steps] for name, column in zip(names, columns)})
            played[-1]["terminated"] = bool(played[-1]["terminated"][-1])
    return played


def statistics(episodes):
    returns = np.array([episode["rewards"].sum() for episode in episodes], float)
    result = {
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "length_mean": float(np.mean([len(episode["rewards"]) for episode in episodes])),
        "episodes": len(episodes),
    }
    if METRIC == "success_rate":  # a task that pays for success alone
        result["success_rate"] = float((returns > 0).mean())
    return result


def squared_energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, no row compared with itself: (n, d), (m, d) -> float."""
    return float(2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean())


def occupancy_distances(env_id, held_out, samples):
    """How far each sample of episodes is from the held-out ones, in units of samples["random"]."""
    if not held_out:
        return dict.fromkeys(samples)
    space = gym.make(env_id).action_space

    def pairs(episodes):
        observations, actions = tensors(episodes)
        rows = torch.from_numpy(np.random.default_rng(0).permutation(len(actions))[:2_000])
        if isinstance(space, gym.spaces.Discrete):
            actions = torch.eye(int(space.n))[actions]
        return torch.cat([observations[rows], actions[rows]], -1).double()

    expert = pairs(held_out)
    mean, std = expert.mean(0), expert.std(0)
    std = std.where(std > 0, 1.0)
    distances = {
        name: squared_energy_distance((pairs(episodes) - mean) / std, (expert - mean) / std)
        for name, episodes in samples.items()
    }
    return {name: distance / distances["random"] for name, distance in distances.items()}


# --- run folder -----------------------------------------------------------------------------------


class Run:
    """One run: its demonstrations, folder, log, curve, checkpoints and result."""

    latest = None  # for the command that Ctrl-C prints

    def __init__(self, args):
        began = time.perf_counter()
        self.args, self.curve, self.seconds = args, [], 0.0
        self.count = {"env_steps": 0, "updates": 0, "evaluated": 0}
        name = args.run_name or f"{SCRIPT}__{args.seed}__{datetime.now():%Y-%m-%d_%H-%M-%S}"
        self.folder = Path(args.resume or Path(args.out, name))
        fresh = args.resume or not self.folder.exists()
        check(fresh, f"{self.folder}: exists already, expected a new folder")
        self.demos, self.not_held_out, self.held_out = load_demos(args)
        self.digest = sha256(b"".join(x.numpy().tobytes() for x in tensors(self.demos))).hexdigest()
        torch.manual_seed(args.seed)
        self.setup_seconds = time.perf_counter() - began

    def start(self, **parts):
        """Name all that a checkpoint holds (by state_dict); if a run is resumed, load it."""
        self.parts, args = parts, self.args
        if args.resume:
            read(self.folder / "checkpoint.pt", self.load)
            evaluated = self.curve or not self.finished
            check(evaluated, f"{self.folder}: not evaluated yet, expected a larger budget")
        else:
            self.folder.mkdir(parents=True)
        write_json(self.folder / "args.json", {"script": SCRIPT, **vars(args)})
        now = self.count[CLOCK]
        self.log = SummaryWriter(str(self.folder), purge_step=now + 1 if args.resume else None)
        self.save()  # after SummaryWriter, which would recreate a deleted folder
        Run.latest = self
        hidden = args.no_progress or None  # None: hidden unless stderr is a terminal
        self.bar = tqdm(total=getattr(args, BUDGET), initial=now, unit=f" {CLOCK}", disable=hidden)
        self.saved, self.clock = time.perf_counter(), time.perf_counter() - self.seconds

    def save(self):
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"args": vars(self.args), "count": self.count, "curve": self.curve}
        state |= {"seconds": self.seconds, "digest": self.digest, "rng": torch.get_rng_state()}
        if self.args.device == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        write_checkpoint(self.folder / "checkpoint.pt", state)

    def load(self, path):
        state = read_checkpoint(path)
        check(state["digest"] == self.digest, "what it learnt from has changed since the run began")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.count, self.curve, self.seconds = (state[k] for k in ("count", "curve", "seconds"))
        torch.set_rng_state(state["rng"])
        if self.args.device == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])

    @property
    def finished(self):
        return self.count[CLOCK] >= getattr(self.args, BUDGET)

    def record(self, scalars, policy):
        """End an iteration: log it, evaluate and save when due. Raises Failed on a NaN loss."""
        now, every = self.count[CLOCK], self.args.eval_every
        self.seconds = time.perf_counter() - self.clock
        for tag, value in {**scalars, "charts/SPS": now / self.seconds}.items():
            if tag.startswith("losses/") and not math.isfinite(value):
                last = f"last checkpoint: {self.folder / 'checkpoint.pt'}"
                raise Failed(f"{tag} is {value} at {now} {CLOCK}; {last}")
            self.log.add_scalar(tag, value, now)
        due = self.finished or now // every > self.count["evaluated"] // every
        if due:
            result = self.evaluate(policy, 0)
            self.count["evaluated"] = now
            self.curve.append({**self.count, "wall_seconds": self.seconds, **result, **scalars})
            for name in ("return_mean", "return_std", "success_rate"):
                if name in result:
                    self.log.add_scalar(f"eval/{name}", result[name], now)
            self.bar.set_postfix({METRIC: f"{result[METRIC]:.4g}"}, refresh=False)
        if due or time.perf_counter() - self.saved > 10:
            self.save()
            self.saved = time.perf_counter()
        self.bar.update(min(now, self.bar.total) - self.bar.n)
        self.clock = time.perf_counter() - self.seconds  # neither evaluating nor saving counts

    def evaluate(self, policy, offset):
        seed = EVALUATION_SEEDS + 1_000 * self.args.seed + offset
        self.played = play(policy.act, self.args.env_id, self.args.eval_episodes, seed)
        return statistics(self.played)

    def finish(self, policy, diagnosis=""):
        """Evaluate on fresh seeds; write policy.pt, summary.json and the plot; print the result."""
        args, folder, env_id = self.args, self.folder, self.args.env_id
        self.bar.close()
        self.log.close()
        saved = {"script": SCRIPT, "env_id": env_id, "network": policy.settings}
        saved["weights"] = policy.state_dict()
        write(folder / "policy.pt", lambda file: torch.save(saved, file))
        results = {"learner": self.evaluate(policy, 500), "expert": None}
        samples = {"learner": self.played, "expert": self.not_held_out}
        samples["random"] = play(None, env_id, args.eval_episodes, EVALUATION_SEEDS)
        results["random"] = statistics(samples["random"])
        if all(episode["rewards"] is not None for episode in self.not_held_out):
            results["expert"] = statistics(self.not_held_out + self.held_out)
        distances = occupancy_distances(env_id, self.held_out, samples)
        for name, result in results.items():
            if result:
                result["occupancy_distance"] = distances[name]
        solved, verdict = self.judge(results["learner"])
        pairs = sum(len(episode["actions"]) for episode in self.demos)
        demos = {"episodes": len(self.demos), "pairs": pairs, "sha256": self.digest}
        summary = {"script": SCRIPT, "args": vars(args), "versions": versions(), **results}
        summary |= {name: self.count[name] for name in ("env_steps", "updates")}
        summary |= {"wall_seconds": self.seconds, "setup_seconds": self.setup_seconds}
        summary |= {"demos": demos, "curve": self.curve}
        summary["solved_at_env_steps"] = solved.get("env_steps")
        summary["solved_at_seconds"] = solved.get("wall_seconds")
        summary["verdict"] = "; ".join(filter(None, [verdict, diagnosis]))
        write_json(folder / "summary.json", summary)
        draw(summary, folder / "learning_curve.png")
        show(policy, args, folder)
        for name in ("random", "expert", "learner"):
            print(f"{name:8}{describe(results[name])}")
        print(f"verdict {summary['verdict']}\nrun     {folder}")
        return summary

    def judge(self, learner):
        """The first evaluation from which on all are good, final one included, and a verdict."""
        good, points = TASKS[self.args.env_id], [*self.curve, learner]
        failures = [i for i, point in enumerate(points) if point[METRIC] < good]
        stable = self.curve[failures[-1] + 1 if failures else 0 :]
        if not stable:
            return {}, f"not solved: {METRIC} {points[failures[-1]][METRIC]:.4g} of {good:g}"
        seconds = f"{stable[0]['wall_seconds']:.1f} s"
        return stable[0], f"solved at {stable[0][CLOCK]:,} {CLOCK}, {seconds}"


def versions():
    names = ("torch", "gymnasium", "numpy", "tensorboard")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


def describe(result):
    if result is None:
        return "unknown: the demonstrations hold no rewards"
    text = f"return {result['return_mean']:.1f} +- {result['return_std']:.1f}"
    if "success_rate" in result:
        text += f", success {result['success_rate']:.0%}"
    distance = result.get("occupancy_distance")
    return text if distance is None else f"{text}, occupancy distance {distance:.4f}"


def draw(summary, path):
    """The learning curve, with expert and random as lines."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes, curve = figure.subplots(), summary["curve"]
    x, y = [point[CLOCK] for point in curve], [point[METRIC] for point in curve]
    axes.plot(x, y, "o-", markersize=3, label="learner")
    for name, style in (("expert", "--"), ("random", ":")):
        if summary[name]:
            axes.axhline(summary[name][METRIC], color="gray", linestyle=style, label=name)
    axes.set(xlabel=CLOCK, ylabel=METRIC, title=f"{SCRIPT}, seed {summary['args']['seed']}")
    axes.legend()
    write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def show(policy, args, folder):
    """Three episodes as MP4 files, in a window, or both. Raises Failed if that is impossible."""
    for mode in ["rgb_array"] * args.capture_video + ["human"] * args.render:
        try:
            env = gym.make(args.env_id, render_mode=mode)
            if mode == "rgb_array":
                env = RecordVideo(env, str(folder / "videos"), episode_trigger=lambda episode: True)
            with env:
                for seed in range(EVALUATION_SEEDS, EVALUATION_SEEDS + 3):
                    (observation, _), over = env.reset(seed=seed), False
                    while not over:
                        action = policy.act(observation[None])[0]
                        observation, _, terminated, truncated, _ = env.step(action)
                        over = terminated or truncated
        except Exception as error:  # no display, no encoder: each backend has errors of its own
            raise Failed(f"showing the policy failed: {error}") from error


# --- main -----------------------------------------------------------------------------------------


def evaluate_file(args):
    """Evaluate a policy.pt, write evaluation.json beside it and print one line."""
    args.env_id, policy = read(args.evaluate, read_policy)
    policy.to(args.device)
    folder, seed = Path(args.evaluate).parent, EVALUATION_SEEDS + 1_000 * args.seed + 500
    result = statistics(play(policy.act, args.env_id, args.eval_episodes, seed))
    write_json(folder / "evaluation.json", result)
    show(policy, args, folder)
    episodes = f"{result['episodes']} episodes of {args.env_id}"
    print(f"{args.evaluate}: {describe(result)} over {episodes}")


def main(argv=None):
    """Run the command line; returns the exit status."""
    try:
        args = parse_args(argv)
        torch.set_num_threads(args.num_threads)
        if args.record_demos:
            record_demos(Path(args.record_demos), args)
        elif args.evaluate:
            evaluate_file(args)
        else:
            train(args)
        return 0
    except (BadInput, Failed, OSError) as error:
        print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        command = "the same command as before"
        if Run.latest:
            command = f"python {SCRIPT}.py --resume {Run.latest.folder}"
        print(f"\n{SCRIPT}.py: interrupted; go on with: {command}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
