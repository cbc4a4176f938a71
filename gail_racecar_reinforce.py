"""GAIL on the race car: learn to drive to the finish from four laps, without ever seeing a reward.

Generative adversarial imitation learning (Ho & Ermon 2016, https://arxiv.org/abs/1606.03476,
Algorithm 1), with REINFORCE (Williams 1992) and a learnt baseline:
    1. roll out the policy and keep its (state, action) pairs,
    2. train the discriminator D to tell the expert's pairs (label 1) from the policy's (label 0),
    3. reward each of the policy's pairs by D's output for it, for example -log(1 - D(s, a)),
    4. follow the policy gradient of that reward: no ratio, no clip, no trust region.

    python gail_racecar_reinforce.py --total-steps 20000      a quick try: ten seconds of training
    python gail_racecar_reinforce.py                          the default run: four minutes
    python gail_racecar_reinforce.py --resume runs/FOLDER     go on where a run stopped

Needs racecar_env.py and experts/RaceCar-v0.npz beside it. By the end of the default run, expect
nearly every lap to reach the finish; docs/gail_racecar_reinforce.md has results and reasons.

Deviations from the paper: (1) REINFORCE in place of TRPO; (2) a gradient penalty on D, scaled by
UNITS, and twenty D updates per rollout; (3) two absorbing states, one after the finish and one
after a wall, which D judges as well: the finish pays for ever, and a crash forfeits that. For
this, the script is told where the finish lies; (4) a standard deviation of the actions that falls
on a schedule, in place of an entropy bonus; (5) a moving average of the policies is evaluated and
kept; (6) a choice of reward forms: the paper's is `gail`.
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
import contextlib
import io
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections import namedtuple
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from random import seed as seed_python

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from racecar_env import FINISH, FINISH_RADIUS

# From the harness, below: number (a flag's type), check (else BadInput), take (a step, in a task's
# dtype), tensors (episodes' columns), Run (files, seeds, checkpoints), EVALUATION_SEEDS (the first
# of evaluation's seeds: training's are smaller), Failed.

SCRIPT = "gail_racecar_reinforce"
SIDE_BY_SIDE = 5  # environments in an evaluation; each takes 36 MB
FINAL_LR = 0.05  # D's step size falls to this share over --schedule, the policy's to its square
STD, FINAL_STD = 0.3, 0.045  # of actions, in the policy's units; falls over --schedule
AVERAGE = 0.98  # the policy that is kept: a moving average over about 50 iterations
METRE = 2  # one metre, as policy and critic see it; if small, they steer too softly
# D's inputs, Features' and more, are divided by these, two each: place (0.2 m), velocity, sine and
# cosine, steering angles, a tenth of their rates, action; then the absorbing states' flag. The
# gradient penalty lets one such unit change the logit by about 1.
UNITS = [0.2 * METRE] * 2 + [0.8, 0.8, 0.3, 0.3, 0.5, 0.5, 1, 1, 1, 1, 0.5]
LOW, HIGH = (-1.0, 0.0), (1.0, 1.0)  # of steering and throttle
# To compare. constant-reward: 1 a step, 0 after an end; it and frozen-discriminator: D is never
# trained; shuffled-expert: the expert's actions are permuted, for --bc-updates as well.
CONTROLS = ("none", "constant-reward", "frozen-discriminator", "shuffled-expert")


def add_settings(parser, argv):
    """The algorithm's flags; number(kind, low, high): at least low, at most high."""
    parser.set_defaults(env_id="RaceCar-v0", num_demos=4)  # the harness's flags
    count, size, real = number(int, 1), number(int, 1, 10**6), number(float, 0)
    flag = parser.add_argument_group("policy").add_argument
    flag("--total-steps", type=count, default=1_000_000, help="environment steps, rounded up")
    flag("--schedule", type=count, help="steps while std, policy's and D's step sizes fall")
    flag("--num-envs", type=number(int, 1, 500), default=16, help="environments side by side")
    flag("--num-steps", type=number(int, 3), default=64, help="steps of each, in a rollout")
    flag("--policy-lr", type=real, default=4e-4, help="Adam's step size at the start")
    flag("--critic-lr", type=real, default=1e-3, help="the critic's, which does not fall")
    flag("--hidden", type=number(int, 1, 4_096), default=64, help="width of the two hidden layers")
    flag("--gamma", type=number(float, 0, 0.9999), default=0.95, help="discount factor")
    flag("--gae-lambda", type=number(float, 0, 1), default=1.0, help="low: trust the critic more")
    flag("--epochs", type=count, default=5, help="the baseline's passes over a rollout")
    flag("--minibatch-size", type=size, default=256, help="pairs in one update")
    flag("--bc-updates", type=number(int, 0), default=0, help="steps of cloning alone, at first")
    flag = parser.add_argument_group("discriminator").add_argument
    forms = "-log(1-D), log D - log(1-D), or log D"
    flag("--reward", choices=("gail", "airl", "logd"), default="gail", help=forms)
    ends = "let D value what follows a wall or the finish; no: its value is 0"
    flag("--absorbing", choices=("yes", "no"), default="yes", help=ends)
    flag("--discriminator-updates", type=count, default=20, help="after each rollout")
    flag("--discriminator-batch", type=size, default=256, help="pairs of each kind, in an update")
    flag("--discriminator-lr", type=real, default=1e-3, help="Adam's step size at the start")
    flag("--gradient-penalty", type=real, default=0.5, help="the penalty's weight; 0: none")
    flag("--control", choices=CONTROLS, default="none", help="remove what the expert teaches")
    # By default two budgets; --resume restores the run's own (in the harness).
    parser.set_defaults(schedule=2 * parser.parse_known_args(argv)[0].total_steps)


# --- networks -------------------------------------------------------------------------------------


class Features(nn.Module):
    """(..., 9) -> (..., 10): the heading as sine and cosine; position and steering rates scaled."""

    def forward(self, observations):
        place, velocity, yaw, angles, rates = observations.split([2, 2, 1, 2, 2], -1)
        return torch.cat([METRE * place, velocity, yaw.sin(), yaw.cos(), angles, rates / 10], -1)


def mlp(inputs, hidden, outputs):
    """Two hidden layers of tanh: (..., inputs) -> (..., outputs)."""
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(hidden, outputs))


@torch.no_grad()
def spread(layer, inputs):
    """Set a first layer's biases so that each tanh is 0 at a random one of the inputs: (rows, in).

    With PyTorch's own biases most bend near place and speed 0, and far from there they are flat."""
    rows = torch.randint(len(inputs), layer.bias.shape, device=inputs.device)
    layer.bias.copy_(-(layer.weight * inputs[rows]).sum(-1))


class Policy(nn.Module):
    """Observations (..., 9) -> a Gaussian over steering and throttle, (..., 2), both scaled to
    [-1, 1]. So a new policy, with means around 0, drives about straight at half throttle."""

    def __init__(self, hidden):
        super().__init__()
        self.settings = {"hidden": hidden}  # policy.pt holds these beside the weights
        self.network = nn.Sequential(Features(), *mlp(10, hidden, 2))
        self.register_buffer("std", torch.tensor(STD))  # not learnt: train lowers it
        self.register_buffer("low", torch.tensor(LOW), persistent=False)
        self.register_buffer("high", torch.tensor(HIGH), persistent=False)

    def forward(self, observations):
        normal = Normal(self.network(observations), self.std, validate_args=False)
        return Independent(normal, 1, validate_args=False)

    @torch.no_grad()
    def act(self, observations, sample=False):
        """Actions for the environment, greedy or sampled; NumPy: (n, 9) -> (n, 2)"""
        observations = np.array(observations, np.float32, order="C")  # a copy that from_numpy takes
        distribution = self(torch.from_numpy(observations).to(self.std.device))
        return self.to_env(distribution.sample() if sample else distribution.mean)

    def to_env(self, actions):
        """From [-1, 1], clipped, to the car's own range, as NumPy: (..., 2) both."""
        return torch.lerp(self.low, self.high, (actions.clamp(-1, 1) + 1) / 2).cpu().numpy()

    def from_env(self, actions):
        """The inverse of to_env, as a tensor."""
        return 2 * (actions - self.low) / (self.high - self.low) - 1


class Discriminator(nn.Module):
    """D's logits, high if a pair is the expert's: (..., 13) -> (...)."""

    def __init__(self, hidden):
        super().__init__()
        self.features, self.network = Features(), mlp(13, hidden, 1)
        self.register_buffer("units", torch.tensor(UNITS))

    def forward(self, pairs):
        return self.network(pairs).squeeze(-1)

    def make_pairs(self, observations, actions):
        """What D sees: the features, the action, clipped, and 0 for "not absorbing"; in UNITS.
        (..., 9), (..., 2) -> (..., 13)"""
        pairs = torch.cat([self.features(observations), actions.clamp(-1, 1)], -1)
        return F.pad(pairs, (0, 1)) / self.units

    def absorbing_pairs(self, finished):
        """What follows a termination: zeros and a flag, finish 1, wall -1: (...) -> (..., 13).

        DEVIATION (3): DAC (Kostrikov et al. 2019) has one absorbing state. The expert's laps end,
        too, so with only one, crashing would look like finishing."""
        flag = torch.where(finished, 1.0, -1.0)[..., None]
        return F.pad(flag, (12, 0)) / self.units

    def add_absorbing_pairs(self, pairs, finished, gamma):
        """Append 1 / (1 - gamma) pairs for each termination: (n, 13), (ends,) bool -> (more, 13).

        An absorbing state lasts for ever. Discounted from the end on, it is as much as 1 + gamma +
        gamma^2 + ... = 1 / (1 - gamma) steps: D's batches draw from so many copies of it."""
        rows = round(1 / (1 - gamma))
        return torch.cat([pairs, self.absorbing_pairs(finished).repeat(rows, 1)])


# --- mathematics ----------------------------------------------------------------------------------


def at_finish(observations):
    """Is the car at the finish, even if at a wall? All that is known of the track:
    (..., 9) -> (...) bool."""
    finish = torch.tensor(FINISH, device=observations.device)
    return (observations[..., :2] - finish).norm(dim=-1) <= FINISH_RADIUS


def discriminator_loss(expert_logits, policy_logits):
    """Binary cross-entropy, expert = 1 (GAIL, eq. 17, labels swapped): two (batch,) -> ()."""
    return F.softplus(-expert_logits).mean() + F.softplus(policy_logits).mean()


def gradient_penalty(discriminator, expert_pairs, policy_pairs):
    """Mean of max(0, |logit gradient| - 1)^2 at mixed pairs: -> ().

    The one-sided penalty of Petzka et al. 2018, https://arxiv.org/abs/1709.08894."""
    mix = torch.rand(len(expert_pairs), 1, device=expert_pairs.device)
    between = (mix * expert_pairs + (1 - mix) * policy_pairs).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    return (gradient.norm(dim=-1) - 1).relu().square().mean()


def imitation_reward(logits, form):
    """The reward of pairs with these logits, computed without overflow: (...) -> (...). Without
    absorbing states, 0 follows an end: so rewards above 0 favour long episodes, below 0 short."""
    if form == "gail":
        return F.softplus(logits)  # -log(1 - D), above 0
    if form == "logd":
        return F.logsigmoid(logits)  # log D, below 0
    return logits  # log D - log(1 - D), of either sign (Fu et al. 2018)


def generalized_advantages(rewards, values, next_values, done, gamma, gae_lambda):
    """GAE (Schulman et al. 2016, eq. 16); all tensors are (num_steps, num_envs).

    `next_values` are the critic's, of the states that the steps lead to (at a truncation, too); at
    a termination, 0 or the absorbing state's value. `done`: terminated or truncated."""
    errors = rewards + gamma * next_values - values
    advantages, advantage = torch.zeros_like(rewards), 0.0
    for step in reversed(range(len(rewards))):
        advantage = errors[step] + gamma * gae_lambda * ~done[step] * advantage
        advantages[step] = advantage
    return advantages


def reinforce_loss(log_probs, advantages):
    """Minus the mean of log pi * advantage (Williams 1992, with a baseline): two (batch,) -> ()."""
    return -(log_probs * advantages).mean()


def behavioural_cloning_loss(policy, observations, actions):
    """Minus the mean log-likelihood of the expert's actions: two (batch, ...) -> ()."""
    return -policy(observations).log_prob(actions).mean()


# --- environments ---------------------------------------------------------------------------------


class Environments:
    """Environments side by side; rollout() begins an episode where one ended. A checkpoint holds
    each episode's seed and actions, to replay it. (Vector environments hide later seeds.)"""

    def __init__(self, env_id, num_envs):
        self.envs = [gym.make(env_id, disable_env_checker=True) for _ in range(num_envs)]
        shape = self.envs[0].observation_space.shape
        self.observations, self.returns = np.zeros((num_envs, *shape), np.float32), [0.0] * num_envs
        self.seeds, self.actions = [None] * num_envs, [None] * num_envs
        for i in range(num_envs):
            self.restart(i)

    def restart(self, i, seed=None):
        seed = int(torch.randint(EVALUATION_SEEDS, ())) if seed is None else seed
        self.seeds[i], self.actions[i], self.returns[i] = seed, [], 0.0
        self.observations[i], _ = self.envs[i].reset(seed=seed)

    def advance(self, i, action):
        """Step one environment; returns whether its episode is terminated, and truncated."""
        env = self.envs[i]
        self.observations[i], reward, terminated, truncated, _ = take(env, env.action_space, action)
        self.actions[i].append(action)
        self.returns[i] += np.float64(reward)  # for the log alone; a reward of None is NaN
        return terminated, truncated

    def state_dict(self):
        return {"seeds": self.seeds, "actions": self.actions}

    def load_state_dict(self, state):
        for i, (seed, actions) in enumerate(zip(state["seeds"], state["actions"])):
            self.restart(i, seed)
            for action in actions:
                self.advance(i, action)  # the race car's replay is exact


@torch.no_grad()
def rollout(envs, policy, num_steps, device):
    """[observations, actions, next observations (at an end: the episode's last), terminated,
    truncated], (num_steps, num_envs, ...) each; and each ended episode's (return, length)."""
    frames, ended = [], []
    for _ in range(num_steps):
        observations = envs.observations.copy()
        if not np.isfinite(observations).all():
            raise Failed("an observation is NaN or infinite")
        actions = policy(torch.as_tensor(observations, device=device)).sample()
        taken = policy.to_env(actions).tolist()  # plain numbers, for the checkpoint
        ends = np.array([envs.advance(*each) for each in enumerate(taken)], bool).T  # (2, num_envs)
        frames.append((observations, actions.cpu().numpy(), envs.observations.copy(), *ends))
        for i in np.flatnonzero(ends.any(0)):
            ended.append((envs.returns[i], len(envs.actions[i])))
            envs.restart(i)
    return [torch.as_tensor(np.stack(column), device=device) for column in zip(*frames)], ended


# --- updates --------------------------------------------------------------------------------------


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def update_discriminator(discriminator, optimizer, expert_pairs, policy_pairs, args):
    """Step 2, --discriminator-updates times. For the log: the mean loss, without the penalty."""
    if args.control in ("constant-reward", "frozen-discriminator"):
        return {}
    total, size = 0.0, (args.discriminator_batch,)
    for _ in range(args.discriminator_updates):
        expert = expert_pairs[torch.randint(len(expert_pairs), size)]
        learner = policy_pairs[torch.randint(len(policy_pairs), size)]
        expert_logits, policy_logits = discriminator(torch.stack([expert, learner]))
        loss = discriminator_loss(expert_logits, policy_logits)
        penalty = gradient_penalty(discriminator, expert, learner)
        descend(optimizer, loss + args.gradient_penalty * penalty)
        total += loss.detach()
    return {"losses/discriminator": float(total) / args.discriminator_updates}


def update_policy(policy, critic, optimizer, observations, actions, advantages, returns, args):
    """Step 4: each pair moves the policy once, in a minibatch (after the first of them a little off
    its own states); the baseline has --epochs passes."""
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    old_log_probs = policy(observations).log_prob(actions).detach()
    for rows in torch.randperm(len(actions)).split(args.minibatch_size):
        log_probs = policy(observations[rows]).log_prob(actions[rows])
        policy_loss = reinforce_loss(log_probs, advantages[rows])
        descend(optimizer, policy_loss)  # the critic has no gradient: Adam leaves it as it is
    for _ in range(args.epochs):
        for rows in torch.randperm(len(actions)).split(args.minibatch_size):
            value_loss = F.mse_loss(critic(observations[rows]), returns[rows])
            descend(optimizer, value_loss)
    with torch.no_grad():
        new = policy(observations)
        log_ratio = new.log_prob(actions) - old_log_probs
    return {
        "losses/policy": float(policy_loss.detach()),
        "losses/value": float(value_loss.detach()),
        "losses/entropy": float(new.entropy().mean()),
        "losses/approx_kl": float((log_ratio.exp() - 1 - log_ratio).mean()),
    }


def diagnose(scalars):
    """Advice from the last evaluation's scalars; `finish` prints it if the run is not solved.

    A reward whose deviation is below a tenth of its mean pays all pairs nearly alike. If D is right
    about 99 of 100 pairs of both kinds, it hardly says which of the policy's are better."""
    mean, std = scalars["discriminator/reward_mean"], scalars["discriminator/reward_std"]
    if std < 0.1 * abs(mean):
        return "the reward is nearly constant: it hardly tells one action from another"
    if min(scalars[f"discriminator/accuracy_{who}"] for who in ("expert", "policy")) > 0.99:
        return "the discriminator tells all pairs apart: more --gradient-penalty or --bc-updates"
    return ""


def train(args):
    """Run the algorithm; returns what summary.json holds. Raises BadInput and Failed."""
    known = args.env_id.split(":")[-1] == "RaceCar-v0"
    check(known, f"--env-id {args.env_id}: expected RaceCar-v0, which the features are made for")
    run = Run(args)  # reads the demonstrations and seeds torch; run.steps is 0
    # All demonstrations, (pairs, ...) each; ends: 1. at a pair that terminates an episode, else 0.
    expert_observations, expert_actions, _rewards, ends, _ = tensors(run.episodes, args.device)
    policy = Policy(args.hidden).to(args.device)
    expert_actions = policy.from_env(expert_actions)
    layers = *mlp(10, args.hidden, 1), nn.Flatten(-2)  # (..., n, 1) -> (..., n)
    critic = nn.Sequential(Features(), *layers).to(args.device)  # (..., n, 9) -> (..., n)
    discriminator = Discriminator(args.hidden).to(args.device)
    groups = {"params": policy.parameters()}, {"params": critic.parameters(), "lr": args.critic_lr}
    optimizer = torch.optim.Adam(groups, 1e-3, fused=True)  # 1e-3: for --bc-updates alone
    d_optimizer = torch.optim.Adam(discriminator.parameters(), args.discriminator_lr, fused=True)
    envs = Environments(args.env_id, args.num_envs)

    if args.control == "shuffled-expert":
        expert_actions = expert_actions[torch.randperm(len(expert_actions))]
    expert = expert_observations, expert_actions
    expert_pairs = discriminator.make_pairs(*expert)  # (pairs, 13)
    spread(discriminator.network[0], expert_pairs)
    for network in (critic, policy.network):
        spread(network[1], network[0](expert_observations))  # [0]: Features
    average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))  # 1st update copies
    absorbing = args.absorbing == "yes" and args.control != "constant-reward"
    if absorbing:
        check(not args.num_pairs, "--num-pairs: expected --absorbing no with it")
        laps = ends[ends > 0].bool()  # True, ...: each end of the expert counts as a finish
        expert_pairs = discriminator.add_absorbing_pairs(expert_pairs, laps, args.gamma)

    parts = {"policy": policy, "average": average, "critic": critic, "envs": envs}
    parts |= {"discriminator": discriminator, "optimizer": optimizer, "d_optimizer": d_optimizer}
    run.start(**parts)  # a checkpoint holds them; --resume loads them, and run.steps
    for _ in range(args.bc_updates if run.steps == 0 else 0):
        drawn = torch.randint(len(expert[0]), (64,))
        descend(optimizer, behavioural_cloning_loss(policy, *[x[drawn] for x in expert]))

    while run.steps < args.total_steps:
        share = max(1 - run.steps / args.schedule, FINAL_LR)
        optimizer.param_groups[0]["lr"] = args.policy_lr * share**2
        d_optimizer.param_groups[0]["lr"] = args.discriminator_lr * share
        policy.std.fill_(max(STD * share, FINAL_STD))

        # 1. Roll out the policy.
        frames, ended = rollout(envs, policy, args.num_steps, args.device)
        observations, actions, next_observations, terminated, truncated = frames
        run.steps += args.num_steps * args.num_envs
        pairs = discriminator.make_pairs(observations, actions)
        policy_pairs = pairs.flatten(0, 1)  # (num_steps * num_envs, 13)
        finished = at_finish(next_observations)  # (num_steps, num_envs)
        if absorbing:
            outcomes = finished[terminated]  # (ends,): at the finish, or at a wall?
            policy_pairs = discriminator.add_absorbing_pairs(policy_pairs, outcomes, args.gamma)

        # 2. Train the discriminator.
        scalars = update_discriminator(discriminator, d_optimizer, expert_pairs, policy_pairs, args)

        # 3. Reward the pairs and compute advantages. Both absorbing states last for ever; their
        # values are computed for all pairs, and used where an episode terminated.
        with torch.no_grad():
            logits = discriminator(pairs)
            rewards = imitation_reward(logits, args.reward)  # (num_steps, num_envs)
            if args.control == "constant-reward":
                rewards = torch.ones_like(rewards)
            end_logits = discriminator(discriminator.absorbing_pairs(finished))
            end_values = absorbing * imitation_reward(end_logits, args.reward) / (1 - args.gamma)
            values, next_values = critic(observations), critic(next_observations)
            next_values = torch.where(terminated, end_values, next_values)
            done = terminated | truncated
            factors = args.gamma, args.gae_lambda
            advantages = generalized_advantages(rewards, values, next_values, done, *factors)
            expert_logits = discriminator(expert_pairs[: len(expert_actions)])  # no absorbing ones
        returns = advantages + values  # estimated returns: the critic's targets

        # 4. Follow the policy gradient of the advantages.
        columns = (x.flatten(0, 1) for x in (observations, actions, advantages, returns))
        scalars |= update_policy(policy, critic, optimizer, *columns, args)
        average.update_parameters(policy)

        scalars["discriminator/accuracy_expert"] = float((expert_logits > 0).float().mean())
        scalars["discriminator/accuracy_policy"] = float((logits < 0).float().mean())
        scalars["discriminator/reward_mean"] = float(rewards.mean())
        scalars["discriminator/reward_std"] = float(rewards.std())
        if ended:
            charts = "charts/episodic_return", "charts/episodic_length"
            scalars |= zip(charts, np.mean(ended, 0).tolist())
        run.record(scalars, average.module)  # logs; evaluates and saves when due
    for env in envs.envs:
        env.close()
    return run.finish(average.module, diagnose(run.curve[-1]) if run.curve else "")


# ==================================================================================================
# The harness: flags, files, demonstrations, evaluation, run folder, main; the same text in every
# script with demonstrations. It uses SCRIPT, SIDE_BY_SIDE, add_settings, Policy and train.
# ==================================================================================================

EVALUATION_SEEDS = 1_000_000  # evaluation's seeds begin here; training's lie below
SOLVED = 0.95  # of the way from random to the expert: from there on, a task counts as solved
HELD_OUT = 20  # a file's last episodes: never trained on, for the occupancy distance
MAY_CHANGE = "total_steps demos resume eval_every eval_episodes capture_video device no_progress"
Failed = FloatingPointError  # a loss, an observation or an action is not finite: exit status 1


class BadInput(ValueError):
    """Something that the user can fix: one line on stderr, exit status 2."""


def check(condition, message):
    if not condition:
        raise BadInput(message)


@contextlib.contextmanager
def explained(subject):
    """Whatever goes wrong inside becomes one line about the subject, a file or a flag."""
    try:
        yield subject
    except Exception as error:  # damaged files fail in as many ways as there are readers
        what = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
        raise BadInput(f"{subject}: {what}{' '.join(str(error).split())[:300]}") from None


def say(text, stream=None):
    """Print a line. A stream that is missing, closed or narrow must not end a run."""
    with contextlib.suppress(Exception):
        tqdm.write(text, stream)  # above a bar, if there is one
        (stream or sys.stdout).flush()


def number(kind, low, high=10**9):
    """An argparse type: a finite int or float in [low, high]."""

    def parse(text):
        check(low <= kind(text) <= high, text)
        return kind(text)

    parse.__name__ = f"{kind.__name__} in [{low}, {high}]"  # argparse: invalid int in [...] value
    return parse


def parse_args(argv=None):
    """The settings, from a list of words or the command line; a resumed run brings its own."""
    argv = argv if argv is None else [str(word) for word in argv]
    parser = argparse.ArgumentParser(SCRIPT + ".py", "%(prog)s [FLAG VALUE ...]", add_help=False)
    parser.description = (__doc__ or SCRIPT).splitlines()[0]  # python -OO has no docstrings
    parser.formatter_class, parser.allow_abbrev = argparse.ArgumentDefaultsHelpFormatter, False
    parser.error = lambda text: check(False, text)  # in place of the usage and SystemExit
    flag = parser.add_argument_group("task and run").add_argument
    flag("--env-id", help="the task, as Gymnasium names it; module:Name-v0 imports the module")
    flag("--demos", metavar="FILE", help="learn from this .npz; None: experts/ENV_ID.npz")
    flag("--num-demos", type=number(int, 1), default=1, help="how many episodes of it")
    flag("--num-pairs", type=number(int, 1), help="random pairs of each, with its end; None: all")
    flag("--seed", type=number(int, 0, 99_999), default=1, help="fixes all randomness in a run")
    flag("--out", metavar="FOLDER", help="the run folder, a new one; None: a name in runs/")
    flag("--resume", metavar="FOLDER", help="go on with that run; its budget may be changed")
    flag("--evaluate", metavar="FILE", help="evaluate this policy.pt, greedy and sampled, and stop")
    flag("--eval-every", type=number(int, 1), help="steps; None: ten times in a run, if cheap")
    flag("--eval-episodes", type=number(int, 2, 1_000), default=20, help="finally 5 times as many")
    flag("--capture-video", action="store_true", help="at the end, MP4s of three episodes")
    flag("--device", choices=("cpu", "cuda"), default="cpu", help="of the networks; cpu is fast")
    flag("--no-progress", action="store_true", help="no progress bar")
    add_settings(parser, argv)
    flag("-h", "--help", action="help", help="show these flags, and stop")  # add_settings parses
    args = parser.parse_args(argv)
    check("" not in vars(args).values(), "a flag with an empty value, expected a name")
    if args.evaluate:  # without --env-id: on the file's task
        args.env_id = parser.parse_args(argv, argparse.Namespace(env_id=None)).env_id
    if args.resume:
        with explained(Path(args.resume, "checkpoint.pt")) as path:
            saved = load(path, "parts")["args"]
            args = parser.parse_args(argv, argparse.Namespace(**saved))  # in place of defaults
            changed = {name for name in saved if getattr(args, name) != saved[name]}
            changed -= set(MAY_CHANGE.split())
            check(not changed, f"{', '.join(sorted(changed))} cannot be changed")
    here = args.device == "cpu" or torch.cuda.is_available()
    check(here, f"--device {args.device}: not on this machine, expected --device cpu")
    return args


def write(path, content):
    """Write the whole file or nothing. JSON is strict: NaN and infinity become null."""
    file = io.BytesIO()  # first in memory: on a full disk torch.save would not raise an OSError
    if path.suffix == ".json":
        content = json.loads(json.dumps(content), parse_constant=lambda name: None)
        file.write(json.dumps(content, indent=2).encode())
    else:
        torch.save(content, file) if path.suffix == ".pt" else content.savefig(file, format="png")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder, path.name)
        whole.write_bytes(file.getbuffer())
        whole.replace(path)


def load(path, kind):
    """A file of torch.save, of plain values: a checkpoint has `parts`, a policy `settings`."""
    check(Path(path).is_file(), "not found, expected a file")  # a pipe could block
    with zipfile.ZipFile(path) as archive:
        check(archive.testzip() is None, "damaged, expected the file as it was written")
    saved = torch.load(path, weights_only=True, map_location="cpu")
    check(saved["script"] == SCRIPT, f"a file of {saved['script']}, expected one of {SCRIPT}")
    check(kind in saved, f"no {kind} in it: another kind of file, or an older version's")
    return saved


def load_policy(path):
    """The policy of a policy.pt that this script wrote, and its task's id. Raises BadInput."""
    with explained(path):
        saved = load(path, "settings")
        policy = Policy(**saved["settings"])
        policy.load_state_dict(saved["weights"])
        sound = all(x.isfinite().all() for x in policy.state_dict().values())
        check(sound, "weights that are NaN or infinite, expected finite ones")
        return policy, saved["env_id"].split(":")[-1]  # a file may import no module


def sizes(env_id):
    """What a Policy needs to know of a task, as plain numbers; BadInput for other kinds of task."""
    with explained(f"--env-id {env_id}"), gym.make(env_id, disable_env_checker=True) as env:
        seen, taken = spaces = env.observation_space, env.action_space
        flat = [isinstance(x, Box) and len(x.shape) == 1 and x.dtype.kind == "f" for x in spaces]
        check(flat[0], f"observations {seen}, expected a flat Box of floats")
        if isinstance(taken, Discrete):
            low, high = int(taken.start), int(taken.start) + int(taken.n) - 1
        else:
            widths = np.float32(taken.high) - np.float32(taken.low) if flat[1] else [0]
            fits = all(0 < 2 * width < math.inf for width in widths)  # from_env doubles: in float32
            check(fits, f"actions {taken}, expected Discrete or a bounded, flat Box of floats")
            low, high = taken.low.tolist(), taken.high.tolist()
        (first, _), (second, *scalars, info) = begin(env, 0), take(env, taken, taken.sample())
        for found in (first, second):
            sound = np.size(found) and np.shape(found) == seen.shape and np.isfinite(found).all()
            check(sound, f"an observation {found}, expected a finite one of {seen}")
        np.array([*scalars, info.get("is_success")], float)  # raises unless all are numbers or None
        return {"inputs": seen.shape[0], "low": low, "high": high}


# Arrays with a row for each step. is_success: the last row counts, NaN if unknown. terminated: 0;
# at an end 1, or with --num-pairs the share of pairs that it keeps.
Episode = namedtuple("Episode", "observations actions rewards terminated is_success")


def load_demos(args, inputs, low, high):
    """Three lists of episodes: to learn from (drawn from the second), not held out, held out."""
    kind, wanted = np.float32 if isinstance(low, list) else np.int64, args.env_id.split(":")[-1]
    low, high = np.array(low, kind), np.array(high, kind)
    here = Path(globals().get("__file__", "script")).resolve().parent
    path = Path(args.demos or here / "experts" / f"{wanted.replace('/', '_')}.npz")
    check(path.is_file(), f"{path}: not found; --demos FILE, or experts/train.py {args.env_id}")
    with explained(path), np.load(path, allow_pickle=False) as file:

        def column(name, kind, *shape):
            with explained(name):
                values = file[name].astype(kind, casting="same_kind")
                check(values.shape == shape, f"{values.shape}, expected {shape}")
                return values

        check(sum(x.file_size for x in file.zip.infolist()) < 2**31, "unpacks to over 2 GB")
        recorded = json.loads(str(file["metadata"]))["env_id"].split(":")[-1]
        names = [gym.envs.registration.parse_env_id(x)[:2] for x in (recorded, wanted)]
        check(names[0] == names[1], f"demonstrations of {recorded}, expected {wanted}")
        size, whole = len(file["actions"]), file["actions"].dtype.kind != "f"
        check(not (low.shape and whole), "actions: integers, expected floats for a Box")
        actions = column("actions", kind, size, *low.shape)
        check((actions.clip(low, high) == actions).all(), f"actions outside {low} to {high}")
        observations = column("observations", np.float32, size, inputs)
        check(np.isfinite(observations).all(), "observations that are NaN or infinite")
        starts = column("episode_starts", bool, size)
        check(size and starts[0], "no episode starts in the first row, expected one")
        ends = column("terminated", bool, int(starts.sum()))
        check(args.num_demos <= len(ends), f"--num-demos {args.num_demos} of {len(ends)}")
        unknown = np.full(size, np.nan)
        rewards = column("rewards", float, size) if "rewards" in file else unknown
    if recorded != wanted:
        say(f"{path}: recorded on {recorded}, used for {wanted}")
    terminated = np.float32(ends[np.cumsum(starts) - 1] & np.roll(starts, -1))
    columns = observations, actions, rewards, terminated, unknown
    episodes = np.split(np.arange(size), np.flatnonzero(starts)[1:])  # the rows of each
    cut = len(episodes) - HELD_OUT * (len(episodes) >= args.num_demos + HELD_OUT)
    rng = np.random.default_rng(args.seed)
    chosen = [episodes[i] for i in rng.permutation(cut)[: args.num_demos]]
    if args.num_pairs:  # an end always stays, so it counts only as the share of pairs that do
        terminated *= args.num_pairs * len(chosen) / sum(map(len, chosen))
        with explained(f"--num-pairs {args.num_pairs}"):  # an episode that is shorter
            for i, rows in enumerate(chosen):
                end, others = rows[terminated[rows] > 0], rows[terminated[rows] == 0]
                few = rng.choice(others, args.num_pairs - len(end), replace=False)
                chosen[i] = np.append(few, end)
    lists = chosen, episodes[:cut], episodes[cut:]
    return [[Episode(*(x[rows] for x in columns)) for rows in each] for each in lists]


def tensors(episodes, device="cpu"):
    """The columns of all episodes, observations and actions first: (pairs, ...) each."""
    return [torch.as_tensor(np.concatenate(column), device=device) for column in zip(*episodes)]


def seed_others(number):
    """A task may draw from these generators; the scripts draw from torch's alone."""
    seed_python(number)
    np.random.seed(number)


def begin(env, seed):
    """Reset a task, and seed what else it may draw from: its spaces, Python's and NumPy's."""
    seed_others(seed)
    spaces = env.action_space, env.unwrapped.action_space, env.unwrapped.observation_space
    for i, space in enumerate(spaces, 1):  # with one seed, they would draw the same as the reset
        space.seed(seed + i * 10**9)
    return env.reset(seed=seed)


def take(env, space, action):
    """A step. The task gets a copy of the action, as it may write to it, of its own dtype, and in
    the box: float32 may have rounded the bounds."""
    action = np.array(action, space.dtype)[()]
    return env.step(action.clip(space.low, space.high) if action.ndim else action)


def play(act, args, final=False, filmed=None):
    """Episodes in new environments, in the final evaluation five times as many, on other seeds; or
    three in the one that is `filmed`. `act` maps rows of observations to actions; None: random."""
    first = EVALUATION_SEEDS + 10_000 * args.seed + 5_000 * final
    episodes = 3 if filmed else args.eval_episodes * (5 if final else 1)
    at_once, played = 1 if filmed else SIDE_BY_SIDE, []
    while len(played) < episodes:
        seeds = range(first + len(played), first + episodes)[:at_once]
        envs = [filmed or gym.make(args.env_id, disable_env_checker=True) for _ in seeds]
        longest = envs[0].spec.max_episode_steps or 10_000  # without a limit, a task may never end
        space, shape = envs[0].action_space, envs[0].observation_space.shape
        running, steps = list(range(len(envs))), [[] for _ in envs]
        seen, success = np.zeros((len(envs), *shape), np.float32), [math.nan] * len(envs)
        for i, seed in enumerate(seeds):
            seen[i], _ = begin(envs[i], seed)
        space.seed(seeds[-1] + 1)  # for a random policy: tasks may make a new one at every look
        while running:
            rows = seen[running]
            actions = act(rows) if act else [space.sample() for _ in running]
            for i, row, action in zip(tuple(running), rows, actions):
                seen[i], reward, terminated, truncated, info = take(envs[i], space, action)
                steps[i].append((row, action, np.float64(reward), terminated))  # of None: NaN
                if terminated or truncated or len(steps[i]) == longest:
                    running.remove(i)
                    success[i] = np.float64(info.get("is_success", math.nan)).item()
                    if not filmed:
                        envs[i].close()
        columns = [map(np.array, zip(*each)) for each in steps]
        played += [Episode(*each, [last]) for each, last in zip(columns, success)]
    return played


def score(name, episodes, **more):
    """Print and return statistics of episodes, and what more is known of them."""
    returns, lengths = np.array([(x.rewards.sum(), len(x.rewards)) for x in episodes], float).T
    result = {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
    result |= {"length_mean": float(lengths.mean()), "episodes": len(episodes), **more}
    success = np.mean([episode.is_success[-1] for episode in episodes])
    if not np.isnan(success):
        result["success_rate"] = float(success)
    known = (f"{key} {value:.4g}" for key, value in result.items() if value is not None)
    say(f"{name:8}" + "  ".join(known))
    return result


def squared_energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, no row compared with itself: (n, d), (m, d) -> float."""
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]  # pdist is slower
    return np.float64(2 * torch.cdist(x, y).mean() - sum(within))


def occupancy_distances(held_out, samples):
    """How far each sample's pairs are from the held-out ones, in units of samples["random"]; of
    each at most 2,000, in units of the held-out ones' deviations."""
    if not held_out:
        say(f"no occupancy distance: it needs {HELD_OUT} episodes besides --num-demos")
        return dict.fromkeys(samples)
    groups = [held_out, *samples.values()]
    observations, actions, *_ = tensors([episode for group in groups for episode in group])
    if actions.ndim == 1:  # Discrete: one-hot
        actions = actions[:, None] == actions.unique()
    pairs = torch.cat([observations, actions], -1).double()
    pairs = pairs.split([sum(len(episode.actions) for episode in group) for group in groups])
    few = [x[np.random.default_rng(0).permutation(len(x))[:2_000]] for x in pairs]
    unit, centre = torch.std_mean(few[0], 0)  # centred: cdist rounds large numbers
    expert, *others = ((x - centre) / unit.where(unit > 1e-6 * centre.abs(), 1.0) for x in few)
    found = {x: squared_energy_distance(y, expert) for x, y in zip(samples, others)}
    return {name: distance / found["random"] for name, distance in found.items()}


def judge(curve, advice, random, expert, learner):
    """When was it solved: from which evaluation on are all good, the final one included?"""
    goal = random["return_mean"] + SOLVED * (expert["return_mean"] - random["return_mean"])
    returns = [point["return_mean"] for point in (*curve, learner)]
    bad = max((i for i, x in enumerate(returns) if not x >= goal), default=-1)  # the last; or NaN
    at, when = {}, " before the last evaluation" * (bad < len(curve))
    if not expert["return_mean"] > random["return_mean"]:
        verdict = "no verdict: the expert's return is not known to be above random's"
    elif bad + 1 < len(curve):
        at = curve[bad + 1]
        verdict = f"solved at {at['steps']:,} steps, {at['wall_seconds']:.1f} s"
    else:
        verdict = f"not solved: return {returns[bad]:.4g}{when}, solved from {goal:.4g} on"
        verdict += f"; {advice}" if advice else ""
    found = {"solved_at_steps": at.get("steps"), "solved_at_seconds": at.get("wall_seconds")}
    return {"solved_from": goal, **found, "verdict": verdict}


def draw(summary, path):
    """The learning curve, with expert and random. A run without a picture is still good."""
    with contextlib.suppress(Exception):  # MPLBACKEND, fonts: faults of the surroundings
        from matplotlib.figure import Figure

        axes = Figure().subplots()
        returns = {point["steps"]: point["return_mean"] for point in summary["curve"]}
        axes.plot(returns.keys(), returns.values(), "o-", label="learner")
        for name, style in (("expert", "--"), ("random", ":")):
            axes.axhline(summary[name]["return_mean"], color="gray", ls=style, label=name)
        axes.axhline(summary["solved_from"], color="gray", ls="-.", label="solved")
        axes.set(xlabel="steps", ylabel="mean return", title=summary["args"]["env_id"])
        axes.legend()
        write(path, axes.figure)


class Run:
    """One run: its demonstrations, folder, log, curve, checkpoints (`kept` is in them), result."""

    kept = ("demos", "setup_seconds", "steps", "wall_seconds", "eval_seconds", "curve")
    active = process = stopped_by = None  # run; main's process; signal that waits (0: it would)

    def __init__(self, args):
        self.args, self.clock = args, time.perf_counter()
        with explained("settings"):  # NumPy's scalars and paths become plain values
            plain = {"default": lambda x: x.item() if hasattr(x, "item") else os.fspath(x)}
            vars(args).update(json.loads(json.dumps(vars(args), allow_nan=False, **plain)))
        self.sizes = sizes(args.env_id)
        found = torch.is_grad_enabled(), torch.zeros(1).type()  # as the caller, or the task, has it
        check(found == (True, "torch.FloatTensor"), f"PyTorch has {found}: not its defaults")
        self.episodes, self.not_held_out, self.held_out = load_demos(args, **self.sizes)
        parts = tensors(self.episodes), tensors(self.held_out)
        columns = [x for part in parts for x in part[:2] + part[3:4]]  # neither rewards nor success
        digest = sha256(b"".join(x.numpy().tobytes() for x in columns)).hexdigest()
        self.demos = {"episodes": len(self.episodes), "pairs": len(columns[0]), "sha256": digest}
        self.demos |= self.sizes  # a run is not resumed if its task has changed
        self.setup_seconds = self.wall_seconds = self.eval_seconds = 0.0
        self.steps, self.curve = 0, []
        torch.set_num_threads(1)  # several would wait for one another: networks are small
        torch.manual_seed(args.seed)

    def start(self, **parts):
        """Name all that a checkpoint holds (by state_dict); if a run is resumed, load it."""
        args, self.parts = self.args, parts
        name = f"{SCRIPT}__{args.env_id}__{args.seed}__{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
        default = Path("runs", name.replace("/", "_").replace(":", "_"))
        self.folder = Path(args.resume or args.out or default)
        self.checkpoint = self.folder / "checkpoint.pt"
        if args.resume:
            with explained(self.checkpoint):
                state = load(self.checkpoint, "parts")
                check(state["demos"] == self.demos, "what its run learnt from has changed")
                for name, part in parts.items():
                    part.load_state_dict(state["parts"][name])
                for name in self.kept:
                    setattr(self, name, type(getattr(self, name))(state[name]))
                torch.set_rng_state(state["rng"])
        else:
            with explained(self.folder):
                check(not self.folder.exists(), "exists, expected a new folder")
                self.folder.mkdir(parents=True)
        Run.active, Run.stopped_by = self, 0  # from now on a signal waits
        write(self.folder / "args.json", {"script": SCRIPT, **vars(args)})
        self.log = SummaryWriter(str(self.folder), purge_step=self.steps + 1)
        self.setup_seconds = time.perf_counter() - self.clock
        self.save()  # so that a run that is killed soon can be resumed
        say(f"run     {self.folder}")
        hidden = args.no_progress or sys.stderr is not sys.__stderr__ or not os.isatty(2)
        self.bar = tqdm(total=args.total_steps, initial=self.steps, unit=" steps", disable=hidden)
        self.clock = time.perf_counter()

    def save(self):
        versions = {x.__name__: str(x.__version__) for x in (torch, gym, np)}
        self.facts = {"script": SCRIPT, "args": {**vars(self.args)}, "versions": versions}
        self.facts |= {name: getattr(self, name) for name in self.kept}  # in summary.json, too
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        self.log.flush()  # or TensorBoard would miss the last points of a run that is stopped
        write(self.checkpoint, {**self.facts, "parts": parts, "rng": torch.get_rng_state()})
        self.saved = time.perf_counter()

    def record(self, scalars, policy):
        """End an iteration: log it; evaluate, save and stop when due. Raises Failed on a NaN."""
        args, now, began = self.args, self.steps, time.perf_counter()
        self.wall_seconds += began - self.clock  # neither evaluating nor saving counts
        for tag, value in {**scalars, "charts/SPS": now / self.wall_seconds}.items():
            if tag.startswith("losses/") and not math.isfinite(value):
                raise Failed(f"{tag} is {value} at step {now}; last checkpoint: {self.checkpoint}")
            self.log.add_scalar(tag, value, now)
        every = args.eval_every or math.ceil(args.total_steps / 10)
        last = self.curve[-1]["steps"] if self.curve else 0
        cheap = args.eval_every or self.eval_seconds < self.wall_seconds / 5
        due = now >= args.total_steps or (cheap and now // every > last // every)
        if due:
            with torch.random.fork_rng(devices=[]):  # a task may draw from torch's, too
                result = score(f"{now:>9,} steps  ", play(policy.act, args))
            for name, value in result.items():
                self.log.add_scalar(f"eval/{name}", value, now)
            self.curve.append({"steps": now, "wall_seconds": self.wall_seconds} | result | scalars)
            self.eval_seconds += time.perf_counter() - began
        if due or Run.stopped_by or began - self.saved > 60:
            saved = {"script": SCRIPT, "env_id": args.env_id.split(":")[-1]}
            saved |= {"settings": policy.settings, "weights": policy.state_dict()}
            write(self.folder / "policy.pt", saved)
            self.save()
            if Run.stopped_by:
                raise KeyboardInterrupt
        self.bar.update(min(now, args.total_steps) - self.bar.n)
        self.clock = time.perf_counter()

    def finish(self, policy, advice=""):
        """Evaluate on fresh seeds; write summary.json and the picture; print the result."""
        folder, Run.stopped_by = self.folder, None
        self.bar.close()
        self.log.close()
        random, learner = (play(act, self.args, final=True) for act in (None, policy.act))
        samples = {"random": random, "expert": self.not_held_out, "learner": learner}
        distances = occupancy_distances(self.held_out, samples)
        samples["expert"] = self.not_held_out + self.held_out  # all: for the return
        results = {x: score(x, samples[x], occupancy_distance=distances[x]) for x in samples}
        end = {"steps": self.steps, "wall_seconds": self.wall_seconds} | results["learner"]
        summary = self.facts | results | judge(self.curve or [end], advice, **results)
        write(folder / "summary.json", summary)
        draw(summary, folder / "learning_curve.png")
        say(f"verdict {summary['verdict']}\nrun     {folder}")
        film(policy, self.args, folder / "videos")
        return summary


def film(policy, args, folder):
    if args.capture_video:
        with explained("--capture-video"):  # no encoder, nothing to draw with
            env = gym.make(args.env_id, disable_env_checker=True, render_mode="rgb_array")
            with gym.wrappers.RecordVideo(env, folder, lambda _: True, disable_logger=True) as env:
                play(policy.act, args, filmed=env)


def evaluate_file(args):
    """Print what a policy.pt reaches, greedy and sampled; with --out, write it there, too."""
    policy, env_id = load_policy(args.evaluate)
    args.env_id = args.env_id or env_id
    check(args.env_id.split(":")[-1] == env_id, f"{args.evaluate}: for {env_id}, not {args.env_id}")
    torch.manual_seed(args.seed)
    policy.to(args.device)
    folder = Path(args.out or Path(args.evaluate).parent)
    say(f"task    {args.env_id}")
    acts = {"greedy": policy.act, "sampled": lambda rows: policy.act(rows, True)}
    with explained(f"{args.evaluate} on {args.env_id} (or --env-id MODULE:{env_id})"):
        other = [x for x in sizes(args.env_id).items() if policy.settings.get(*x) != x[1]]
        check(not other, f"not the task that it was trained on: {other}")
        results = {name: score(name, play(act, args, final=True)) for name, act in acts.items()}
    if args.out:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "evaluation.json", results)
    film(policy, args, folder / "videos")


def stop(received, frame):
    """Ctrl-C or SIGTERM: let the iteration end; at once if there is none, or at the second time."""
    if os.getpid() != Run.process:  # a worker of the task's own; Ctrl-C reaches main, too
        if received == signal.SIGTERM:
            os._exit(143)
        return
    waits, Run.stopped_by = Run.stopped_by == 0, received
    if not waits:
        raise KeyboardInterrupt
    say("stopping when this iteration has ended; once more: at once")


def main(argv=None):
    """Run the command line; returns the exit status."""
    with contextlib.suppress(Exception):  # no stream, a closed one, or one of another kind
        sys.stdout.reconfigure(errors="replace")  # stderr never fails
    Run.active, Run.stopped_by, Run.process = None, None, os.getpid()
    with contextlib.suppress(ValueError):  # only a main thread may handle signals
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
    threading.excepthook = lambda _: None  # TensorBoard's writer; save() fails, too
    np.seterr(all="ignore")  # rewards may be infinite
    try:
        args = parse_args(argv)
        evaluate_file(args) if args.evaluate else train(args)
        return 0
    except (BadInput, Failed, OSError, UnicodeError) as error:
        say(f"{SCRIPT}.py: {error}", sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        flags = [f"--resume={Run.active.folder}"] if Run.active else sys.argv[1:]
        words = shlex.join([sys.executable, sys.argv[0], *flags])
        say(f"{SCRIPT}.py: stopped; go on with: {words}", sys.stderr)
        return 128 + (Run.stopped_by or signal.SIGINT)
    finally:  # Python would flush once more, and change the exit status if that fails
        for name in ("stdout", "stderr"):
            try:
                getattr(sys, name).flush()
            except Exception:  # none, closed or full
                setattr(sys, name, None)


if __name__ == "__main__":
    sys.exit(main())
