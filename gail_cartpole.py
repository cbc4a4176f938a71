"""GAIL on CartPole: learn to balance a pole from one demonstration, without ever seeing a reward.

Generative adversarial imitation learning (Ho & Ermon 2016, https://arxiv.org/abs/1606.03476,
Algorithm 1) repeats:
    1. roll out the policy and keep its (state, action) pairs,
    2. train the discriminator D to tell the expert's pairs (label 1) from the policy's (label 0),
    3. reward each of the policy's pairs by what D thinks of it, for example -log(1 - D(s, a)),
    4. take a policy gradient step, PPO or REINFORCE, on that reward.

    python gail_cartpole.py --total-steps 20000      a look around: a few seconds
    python gail_cartpole.py                          the default run
    python gail_cartpole.py --resume runs/FOLDER     resume a run where it stopped

Expect a return of 500. By itself that proves nothing: `--control constant-reward` learns nothing
from the expert and balances too. `occupancy_distance` in summary.json tells them apart: 0 matches
the expert, 1 is as far off as a random policy. docs/gail_cartpole.md has the results.

Deviations from the paper: (1) PPO or REINFORCE in place of TRPO; (2) a gradient penalty on D, which
keeps its logits small; (3) twenty D updates per rollout; (4) the entropy bonus is weighed against
normalised advantages, not against the reward; (5) an average of the policies is kept, not the last;
(6) a choice of reward forms, of which `gail` is the paper's, and of an absorbing state.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "gymnasium[classic-control]>=1.1,<2",
#     "matplotlib>=3.8",
#     "moviepy>=2",
#     "numpy>=1.26",
#     "rich>=13",
#     "stable-baselines3>=2.6",
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
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import RecordVideo
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TASKS = {"CartPole-v1": 495.0, "CartPole-v0": 198.0}  # solved if METRIC >= this
# The metric, the unit of progress, the flag that limits it, and how often to evaluate:
METRIC, CLOCK, BUDGET, EVAL_EVERY = "return_mean", "env_steps", "total_steps", 5_000
EVAL_ENVS, NUM_DEMOS = 500, 1
DEMOS = "{env_id}_{expert}.npz"  # in experts/; if missing, made in --out
RECIPES = {  # REINFORCE: one large step per rollout, and less variance from a shorter horizon
    "ppo": dict(total_steps=100_000, num_envs=16, num_steps=64, policy_lr=3e-3, gamma=0.99),
    "reinforce": dict(total_steps=500_000, num_envs=8, num_steps=125, policy_lr=1e-2, gamma=0.97),
}
FINAL_LR = 0.02  # policy and critic step sizes fall to this share by the end of the default budget
CONTROLS = ("none", "constant-reward", "frozen-discriminator", "shuffled-expert")


def add_settings(parser):
    """The algorithm's flags. `number`, like `check`, `tensors` and `Run`, is in the harness."""

    def recipes(help, name):
        return f"{help} (default: {', '.join(f'{r[name]:,} with {k}' for k, r in RECIPES.items())})"

    flag = parser.add_argument_group("expert").add_argument
    flag("--expert", choices=("ppo", "dqn"), default="ppo", help="trained by stable-baselines3")
    flag("--bc-updates", type=number(int, 0), default=0, help="clone the expert first (warm start)")
    flag("--control", choices=CONTROLS, default="none", help="remove what the expert teaches")
    flag = parser.add_argument_group("policy").add_argument
    flag("--policy-gradient", choices=RECIPES, default="ppo", help="for step 4 above")
    flag("--total-steps", type=number(int, 1), help=recipes("environment steps", "total_steps"))
    flag("--num-envs", type=number(int, 1), help=recipes("environments at once", "num_envs"))
    flag("--num-steps", type=number(int, 3), help=recipes("steps of each per rollout", "num_steps"))
    flag("--policy-lr", type=number(float, 0), help=recipes("Adam's first step size", "policy_lr"))
    flag("--critic-lr", type=number(float, 0), default=3e-3, help="the same for the critic")
    flag("--hidden", type=number(int, 1, 4_096), default=64, help="width of the two hidden layers")
    flag("--gamma", type=number(float, 0, 0.9999), help=recipes("discount factor", "gamma"))
    lambdas = "1: sum the rewards to the rollout's end; less: trust the critic sooner"
    flag("--gae-lambda", type=number(float, 0, 1), default=1.0, help=lambdas)
    flag("--epochs", type=number(int, 1), default=10, help="passes over each rollout")
    flag("--minibatch-size", type=number(int, 1), default=256, help="pairs per step")
    flag("--clip", type=number(float, 0), default=0.2, help="how far PPO lets the ratio go from 1")
    flag("--entropy", type=number(float, 0), default=0.03, help="weight of the policy's entropy")
    flag = parser.add_argument_group("discriminator").add_argument
    forms = "-log(1-D), log D - log(1-D), or log D: docs/gail_cartpole.md compares them"
    flag("--reward", choices=("gail", "airl", "logd"), default="gail", help=forms)
    absorbing = "let D judge the state after a fall; otherwise its value is 0"
    flag("--absorbing", action=argparse.BooleanOptionalAction, default=False, help=absorbing)
    flag("--discriminator-updates", type=number(int, 1), default=20, help="for each rollout")
    flag("--discriminator-batch", type=number(int, 1), default=256, help="pairs of each kind")
    flag("--discriminator-lr", type=number(float, 0), default=1e-3, help="step size of Adam")
    flag("--gradient-penalty", type=number(float, 0), default=0.5, help="its weight; 0: none")


# --- networks -------------------------------------------------------------------------------------


def mlp(*sizes):
    """Linear layers with tanh between them: (..., sizes[0]) -> (..., sizes[-1])."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Policy(nn.Module):
    """CHANGE ME: a softmax policy; observations (..., 4) -> a distribution over two actions."""

    def __init__(self, hidden):
        super().__init__()
        self.settings = {"hidden": hidden}
        self.network = mlp(4, hidden, hidden, 2)

    def forward(self, observations):
        return Categorical(logits=self.network(observations), validate_args=False)

    @torch.no_grad()
    def act(self, observations):
        """The greedy actions, NumPy in and out: (batch, 4) -> (batch,)."""
        device = self.network[0].weight.device
        return self.network(torch.as_tensor(observations, device=device)).argmax(-1).cpu().numpy()


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


def make_pairs(observations, actions):
    """(..., 4), (...) -> (..., 7): the observation, the action one-hot, 0 for "not absorbing"."""
    one_hot = F.one_hot(actions, 2)
    return torch.cat([observations, one_hot, torch.zeros_like(one_hot[..., :1])], -1)


def standardisation(observations):
    """Mean and deviation of the observations; 0 and 1 for action and flag: (n, 4) -> (7,) both."""
    std, mean = torch.std_mean(observations, 0)
    return F.pad(mean, (0, 3)), F.pad(std + 1e-6, (0, 3), value=1.0)


def absorbing_pair(pairs):
    """The pair that stands for a terminated episode, 0 except for the flag: (1, size)."""
    return torch.eye(pairs.shape[-1], device=pairs.device)[-1:]


def add_absorbing_pairs(pairs, ends, gamma):
    """Add one absorbing pair per discounted step after each end: (n, size) -> (n + more, size).

    DEVIATION: DAC (Kostrikov et al. 2019) adds one per end."""
    rows = round(float(ends) / (1 - gamma))
    return torch.cat([pairs, absorbing_pair(pairs).expand(rows, -1)])


def discriminator_loss(expert_logits, policy_logits):
    """Binary cross-entropy, expert = 1 (eq. 17 with the labels exchanged): (batch,) twice -> ()."""
    return F.softplus(-expert_logits).mean() + F.softplus(policy_logits).mean()


def gradient_penalty(discriminator, expert_pairs, policy_pairs):
    """(|logit gradient| - 1)^2 between expert and policy pairs (Gulrajani et al. 2017, eq. 3).

    Mixtures with an absorbing pair are left out: it lies near the expert's pairs, and the penalty
    would tie its logit to theirs. -> ()"""
    mix = torch.rand(len(expert_pairs), 1, device=expert_pairs.device)
    between = mix * expert_pairs + (1 - mix) * policy_pairs
    between = discriminator.standardise(between).requires_grad_()
    logits = discriminator.network(between)
    (gradient,) = torch.autograd.grad(logits.sum(), between, create_graph=True)
    real = between[:, -1] == 0
    return ((gradient.norm(dim=-1) - 1).square() * real).mean()


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


def reinforce_loss(log_probs, advantages):
    """Minus log pi times advantage (Williams 1992, with a baseline): (batch,) twice -> ()."""
    return -(log_probs * advantages).mean()


def recent_average(average, weights, number):
    """The mean of all weights so far, the k-th counted k times; `number` came before these.

    The weighting is that of Lacoste-Julien et al. 2012, for strongly convex problems."""
    return average + 2 / (number + 2) * (weights - average)


def behavioural_cloning_loss(policy, observations, actions):
    """Minus the mean log-likelihood of the expert's actions: (batch, ...) twice -> ()."""
    return -policy(observations).log_prob(actions).mean()


# --- environment and expert -----------------------------------------------------------------------


def make_envs(env_id, num_envs):
    """CHANGE ME: the task. This one resets an environment on the step AFTER an episode's last."""
    envs = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point")
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    return envs


class CartPoles:
    """CartPoles in mid-episode, and all that a checkpoint needs to restore them."""

    def __init__(self, env_id, num_envs):
        self.envs = make_envs(env_id, num_envs)

    def reset(self, seed=None):
        self.observations, _ = self.envs.reset(seed=seed)
        self.returns = np.zeros(self.envs.num_envs)

    def step(self, actions):
        """Step each. `valid` is False where the step only reset one: that is no transition."""
        observations, valid = self.observations, ~self.envs.prev_done
        self.observations, rewards, terminated, truncated, _ = self.envs.step(actions)
        self.returns = self.returns * valid + rewards
        return observations, actions, self.observations, terminated, truncated, valid

    def state_dict(self):
        arrays = {k: torch.tensor(getattr(self.envs, k)) for k in ("state", "steps", "prev_done")}
        rng = self.envs.np_random.bit_generator.state
        return {**arrays, "returns": torch.tensor(self.returns), "rng": rng}

    def load_state_dict(self, state):
        self.returns = state["returns"].numpy()
        self.envs.np_random.bit_generator.state = state["rng"]
        for name in ("state", "steps", "prev_done"):
            setattr(self.envs, name, state[name].numpy())
        self.observations = self.envs.state.T.astype(np.float32)


@torch.no_grad()
def rollout(cartpoles, policy, num_steps, device):
    """`num_steps` steps of each: a dict of (num_steps, num_envs, ...), and the finished returns."""
    frames, returns = [], []
    for _ in range(num_steps):
        observations = torch.as_tensor(cartpoles.observations, device=device)
        frame = cartpoles.step(policy(observations).sample().cpu().numpy())
        frames.append(frame)
        _, _, _, terminated, truncated, _ = frame
        returns += cartpoles.returns[terminated | truncated].tolist()
    names = ("observations", "actions", "next_observations", "terminated", "truncated", "valid")
    columns = (torch.as_tensor(np.stack(column), device=device) for column in zip(*frames))
    return dict(zip(names, columns)), returns


def make_expert(args):
    """CHANGE ME: the expert; stable-baselines3's PPO or DQN with its zoo's settings, greedy."""
    from stable_baselines3 import DQN, PPO
    from stable_baselines3.common.env_util import make_vec_env

    common = {"seed": 0, "device": "cpu", "verbose": 0}
    if args.expert == "ppo":
        settings = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98}
        settings |= {"learning_rate": lambda left: 1e-3 * left, "gae_lambda": 0.8}
        settings |= {"clip_range": lambda left: 0.2 * left}
        expert = PPO("MlpPolicy", make_vec_env(args.env_id, 8, seed=0), **settings, **common)
        steps = 100_000
    else:
        settings = {"learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000}
        settings |= {"learning_starts": 1_000, "target_update_interval": 10, "train_freq": 256}
        settings |= {"gradient_steps": 128, "exploration_fraction": 0.16}
        settings |= {"exploration_final_eps": 0.04, "policy_kwargs": {"net_arch": [256, 256]}}
        expert = DQN("MlpPolicy", args.env_id, **settings, **common)
        steps = 50_000
    expert.learn(steps, progress_bar=sys.stderr.isatty() and not args.no_progress)
    return lambda observations: expert.predict(observations, deterministic=True)[0]


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
    """Step 4. PPO: policy and critic step on each minibatch. REINFORCE: the policy steps once, on
    the whole rollout, then the critic on each minibatch."""
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    with torch.no_grad():
        old_log_probs = policy(observations).log_prob(actions)
    if args.policy_gradient == "reinforce":
        new = policy(observations)
        policy_loss = reinforce_loss(new.log_prob(actions), advantages)
        descend(optimizer, policy_loss - args.entropy * new.entropy().mean())
    for _ in range(args.epochs):
        for rows in torch.randperm(len(actions)).split(args.minibatch_size):
            value_loss = F.mse_loss(critic(observations[rows]).squeeze(-1), returns[rows])
            loss = value_loss  # alone it leaves the policy without a gradient, and Adam skips it
            if args.policy_gradient == "ppo":
                new = policy(observations[rows])
                log_probs = new.log_prob(actions[rows])
                policy_loss = ppo_loss(log_probs, old_log_probs[rows], advantages[rows], args.clip)
                loss = loss + policy_loss - args.entropy * new.entropy().mean()
            descend(optimizer, loss)
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
    """A warning about the discriminator if there is cause, from the last logged scalars."""
    if scalars["discriminator/reward_std"] < 0.1 * abs(scalars["discriminator/reward_mean"]):
        return "the reward is nearly constant: it teaches how long to last, and little else"
    if min(scalars[f"discriminator/accuracy_{who}"] for who in ("expert", "policy")) > 0.99:
        return "the discriminator is saturated: it tells all pairs apart"
    return ""


def train(args):
    """Run the algorithm; returns what summary.json holds."""
    for name, value in RECIPES[args.policy_gradient].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    run = Run(args)
    observations, actions = tensors(run.demos, args.device)
    policy = Policy(args.hidden).to(args.device)
    critic = mlp(4, args.hidden, args.hidden, 1).to(args.device)
    if args.control == "shuffled-expert":
        actions = actions[torch.randperm(len(actions))]
    expert_pairs = make_pairs(observations, actions)  # (pairs, 7)
    discriminator = Discriminator(args.hidden, *standardisation(observations)).to(args.device)
    absorbing = args.absorbing and args.control != "constant-reward"
    if absorbing:
        falls = sum(episode["terminated"] for episode in run.demos)
        check(not (args.num_pairs and falls), "--num-pairs: expected --no-absorbing with it")
        expert_pairs = add_absorbing_pairs(expert_pairs, falls, args.gamma)
    groups = [{"params": policy.parameters()}, {"params": critic.parameters()}]
    optimizer = torch.optim.Adam(groups, lr=1e-3, fused=True)  # for cloning; GAIL sets its own
    d_optimizer = torch.optim.Adam(discriminator.parameters(), args.discriminator_lr, fused=True)
    average = AveragedModel(policy, avg_fn=recent_average)
    cartpoles = CartPoles(args.env_id, args.num_envs)
    cartpoles.reset(args.seed)
    parts = {"policy": policy, "average": average, "critic": critic, "cartpoles": cartpoles}
    parts |= {"discriminator": discriminator, "discriminator_optimizer": d_optimizer}
    run.start(**parts, optimizer=optimizer)
    if run.count["env_steps"] == 0:
        for _ in range(args.bc_updates):
            rows = torch.randint(len(actions), (64,))
            descend(optimizer, behavioural_cloning_loss(policy, observations[rows], actions[rows]))

    while not run.finished:
        default_budget = RECIPES[args.policy_gradient]["total_steps"]
        left = max(1 - run.count["env_steps"] / default_budget, FINAL_LR)
        for group, learning_rate in zip(optimizer.param_groups, (args.policy_lr, args.critic_lr)):
            group["lr"] = learning_rate * left

        if args.policy_gradient == "reinforce":
            cartpoles.reset()
        batch, returns = rollout(cartpoles, policy, args.num_steps, args.device)
        valid = batch["valid"]
        run.count["env_steps"] += int(valid.sum())
        run.count["updates"] += 1  # one iteration

        pairs = make_pairs(batch["observations"], batch["actions"])  # (num_steps, num_envs, 7)
        policy_pairs = pairs[valid]
        if absorbing:
            falls = batch["terminated"].sum()
            policy_pairs = add_absorbing_pairs(policy_pairs, falls, args.gamma)
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
            forever = imitation_reward(discriminator(absorbing_pair(expert_pairs)), args.reward)
            absorbing_value = absorbing * forever / (1 - args.gamma)  # 0 where there is none
            values = critic(batch["observations"]).squeeze(-1)  # (num_steps, num_envs)
            next_values = critic(batch["next_observations"]).squeeze(-1)
            next_values = torch.where(batch["terminated"], absorbing_value, next_values)
            done = batch["terminated"] | batch["truncated"]
            advantages = generalized_advantages(
                rewards, values, next_values, done, args.gamma, args.gae_lambda
            )
        columns = (batch["observations"], batch["actions"], advantages, advantages + values)
        losses |= update_policy(policy, critic, optimizer, *(x[valid] for x in columns), args)
        average.update_parameters(policy)

        scalars = {
            **losses,
            "discriminator/accuracy_expert": float((expert_logits > 0).float().mean()),
            "discriminator/accuracy_policy": float((logits[valid] < 0).float().mean()),
            "discriminator/reward_mean": float(rewards[valid].mean()),
            "discriminator/reward_std": float(rewards[valid].std()),
        }
        if returns:  # CartPole's return is its length
            mean = float(np.mean(returns))
            scalars |= {"charts/episodic_return": mean, "charts/episodic_length": mean}
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
