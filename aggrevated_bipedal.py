"""AggreVaTeD: learn to walk from an expert that can be queried, and surpass it.

AggreVaTeD (Sun et al. 2017, https://arxiv.org/abs/1703.01030, Algorithm 1) improves the learner, in
the states that it visits, using the expert's cost-to-go; here rewards take the place of costs:
    1. roll in: the expert (with probability alpha) or the learner walks up to a random time; from
       there the expert walks to the end (AggreVaTe, Ross & Bagnell 2014); all of it is kept,
    2. fit Q*, the value of an action if the expert takes over after it, to all transitions so far,
    3. increase A*(s, a) = Q*(s, a) - V*(s) of the learner's own actions in the visited states,
    4. validate, and keep the best policy.
DAgger (Ross et al. 2011) only imitates the expert, in visited states: `--algorithm dagger`.

    python aggrevated_bipedal.py --total-steps 2           two iterations: a quick try
    python aggrevated_bipedal.py                           ten minutes; a weak expert
    python aggrevated_bipedal.py --resume runs/FOLDER      go on where a run stopped
    python aggrevated_bipedal.py --env-id Hopper-v5 --expert half              another task
    python aggrevated_bipedal.py --env-id mine:Task-v0 --expert expert.pt      a task of yours

An expert is a .pt: a network with a tanh at its end, from experts/ (README.md has the format, and
converters) or this script's policy.pt. docs/aggrevated_bipedal.md has the results, and reasons.

Deviations from the paper: (1) the gradient goes through Q* (reparameterised), not through the score
function; an iteration takes many Adam steps; (2) the learner is held near the expert's action, and
A* is weighted by 1 - alpha: little while Q* is young; (3) Q* is discounted, bootstrapped (where a
time limit cuts a walk, too), without a time index; A* is two networks' mean minus --caution times
their spread; (4) one coin a trajectory decides who starts it; actions are greedy plus correlated
noise; (5) all states so far train the learner, also the expert's.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "gymnasium[box2d,mujoco]>=1.2.3,<2",
#     "matplotlib>=3.8",
#     "moviepy>=2",
#     "numpy>=1.26",
#     "tensorboard>=2.16",
#     "torch==2.13.0",
#     "tqdm>=4.66",
# ]
# ///

import argparse
import contextlib
import copy
import io
import itertools
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
from gymnasium.spaces import Box
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "aggrevated_bipedal"
MIXING = 5  # iterations in which alpha, the expert's share of roll-ins, falls from 1 to 0
STD = 0.1  # of a sampled action, before tanh: aggrevated_loss averages Q* near the learner's mean
BATCH = 256  # transitions in one update
CRITIC_LR, POLICY_LR = 5e-4, 2e-3  # of Adam; the policy's falls to 0 in each iteration
VALIDATION = 10  # a validation has so many times --eval-episodes walks: fewer would miss rare falls
TARGET_DECAY = 0.95  # of the target, a moving average of the critics, at each update; 0.99 lags
LEAST_DEVIATION = 0.1  # when standardising: nothing is scaled up more than tenfold
LONGEST = 10_000  # steps of an episode: without a time limit, a task may never end
HARDCORE = dict(expert="good", total_steps=12, num_envs=80, noise=0.3, caution=0.5, anchor=8.0)
HARDCORE |= dict(hidden=512, critic_hidden=256, critic_updates=4_000, policy_updates=5_000)


def add_settings(parser, argv):
    """Flags, after the harness's own; its number(type, least, most) bounds a value."""
    parser.set_defaults(env_id="BipedalWalker-v3", eval_every=4, algorithm="aggrevated")
    flag = parser.add_argument_group("algorithm").add_argument
    flag("--expert", metavar="NAME", default="weak", help="weak, good, half (experts/); or a .pt")
    flag("--algorithm", choices=("aggrevated", "dagger"), help="dagger only imitates, without Q*")
    flag("--total-steps", type=number(int, 1), default=20, help="iterations (the harness's steps)")
    flag("--num-envs", type=number(int, 1, 10_000), default=20, help="trajectories in an iteration")
    flag("--noise", type=number(float, 0), default=0.5, help="largest std of a roll-in's noise")
    flag("--switch", type=number(int, 1), default=1_000, help="expert takes over before this step")
    flag("--gamma", type=number(float, 0, 0.9999), default=0.99, help="discount factor")
    flag("--critic-hidden", type=number(int, 1, 4_096), default=128, help="width of both layers")
    flag("--critic-updates", type=number(int, 1), default=1_000, help="in an iteration")
    flag("--hidden", type=number(int, 1, 4_096), default=128, help="width of the policy's layers")
    flag("--policy-updates", type=number(int, 1), default=3_000, help="in an iteration")
    flag("--caution", type=number(float, 0), default=1.5, help="A* loses this times the spread")
    anchor = "pull towards the expert's action; rewards k times as large need k times this"
    flag("--anchor", type=number(float, 0), default=4.0, help=anchor)
    if parser.parse_known_args(argv)[0].env_id.endswith("BipedalWalkerHardcore-v3"):
        parser.set_defaults(**HARDCORE)  # this course is harder to fit


def is_fall(env_id, reward, terminated):
    """CHANGE ME: did this step lead to a state of value 0 (a fall; or a goal that ends an episode)?

    In Gymnasium's MuJoCo tasks: if it terminates. BipedalWalker also terminates at the end of its
    course: that is treated as a time limit, as if the walk went on."""
    walkers = "BipedalWalker-v3", "BipedalWalkerHardcore-v3", "HardcoreMemory-v0"
    return reward < -50 if env_id.split(":")[-1] in walkers else terminated  # a fall: -100


# --- networks -------------------------------------------------------------------------------------


class Standardised(nn.Module):
    """Linear layers of these sizes; inputs are standardised by a sample's mean and deviation."""

    def __init__(self, sizes, activation=nn.ReLU):
        super().__init__()
        layers = [x for pair in itertools.pairwise(sizes) for x in (nn.Linear(*pair), activation())]
        self.network = nn.Sequential(*layers[:-1])
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("deviation", torch.ones(sizes[0]))

    def measure(self, sample):
        self.mean.copy_(sample.mean(0))
        least = (1e-6 * self.mean.abs()).clamp(LEAST_DEVIATION)  # float32 rounds the mean
        self.deviation.copy_(sample.std(0, unbiased=len(sample) > 1).maximum(least))

    def forward(self, inputs):
        return self.network((inputs - self.mean) / self.deviation)


class Policy(Standardised):
    """Learner or expert: observations (..., inputs) -> means (..., outputs) before tanh.
    Its actions lie in [-1, 1]; to_env scales them to the environment's box, `low` to `high`."""

    def __init__(self, sizes, activation, low, high):
        super().__init__(sizes, {"relu": nn.ReLU, "tanh": nn.Tanh}[activation])
        check(len(low) == len(high) == sizes[-1], f"{sizes[-1]} outputs, box {low} to {high}")
        self.settings = {"sizes": sizes, "activation": activation, "low": low, "high": high}
        self.register_buffer("low", torch.tensor(low, dtype=torch.float), persistent=False)
        self.register_buffer("high", torch.tensor(high, dtype=torch.float), persistent=False)

    def greedy(self, observations):
        return self(observations).tanh()

    def sample(self, observations):
        means = self(observations)
        return (means + STD * torch.randn_like(means)).tanh()

    @torch.no_grad()
    def act(self, observations, sample=False):
        """For evaluations: actions, greedy or sampled; NumPy: (n, inputs) -> (n, outputs)."""
        seen = torch.tensor(np.array(observations, np.float32, order="C"), device=self.low.device)
        return self.to_env(self.sample(seen) if sample else self.greedy(seen))

    def to_env(self, actions):
        """From [-1, 1] to the box, as NumPy. Raises Failed on NaN: Box2D would end the process."""
        if not actions.isfinite().all():
            raise Failed("an action is NaN, as an observation or a weight is NaN or infinite")
        return torch.lerp(self.low, self.high, (actions + 1) / 2).cpu().numpy()


class Critics(nn.Module):
    """Two networks for Q*(s, a): (batch, inputs), (batch, actions) -> (2, batch)."""

    def __init__(self, sizes):
        super().__init__()
        self.networks = nn.ModuleList(Standardised(sizes) for _ in range(2))

    def forward(self, observations, actions):
        pairs = torch.cat([observations, actions], -1)
        return torch.stack([network(pairs).squeeze(-1) for network in self.networks])


# --- mathematics ----------------------------------------------------------------------------------


def fitted_q_loss(critics, target, batch, gamma):
    """Squared error to r + gamma Q*(s', the EXPERT's action there), or to r after a fall.

    Fitted Q evaluation (Le et al. 2019, algorithm 3). The next action is the expert's even where
    the learner acted, so that what is learnt is the expert's Q. -> ()"""
    with torch.no_grad():
        following = target(batch["next_observations"], batch["next_expert_actions"])  # (2, batch)
        targets = batch["rewards"] + gamma * following.masked_fill(batch["fell"], 0)  # a NaN, too
    return F.mse_loss(critics(batch["observations"], batch["actions"]), targets)


def aggrevated_loss(policy, critics, states, expert_actions, weight, args):
    """anchor * (distance to the expert's action)^2 - weight * A* of the learner's own actions.

    The weight is 1 - alpha; 0 gives DAgger's (Ross et al. 2011). The expert is deterministic: V*(s)
    is Q*(s, its action). DEVIATIONS (1) to (3): the gradient goes through Q*; the anchor holds the
    learner near the data of Q*. states, expert_actions: (batch, ...) -> ()"""
    distances = (policy.greedy(states) - expert_actions).square().sum(-1)
    if not weight:
        return args.anchor * distances.mean()
    difference = critics(states, policy.sample(states)) - critics(states, expert_actions)
    spread = (difference.var(0) + 1e-6).sqrt()  # equal actions: sqrt(0)'s gradient is NaN
    advantages = difference.mean(0) - args.caution * spread
    return (args.anchor * distances - weight * advantages).mean()


# --- roll-in (EVALUATION_SEEDS: evaluation's begin there; begin, take: the harness's reset, step) -


@torch.no_grad()
def roll_in(policy, expert, alpha, args):
    """--num-envs trajectories, one after the other -> a dict of columns, (steps, ...) each. The
    expert (with probability alpha) or the learner begins, with noise; from a random step below
    --switch on, the expert walks, without noise. DAgger: no noise, no takeover."""
    first = int(torch.randint(EVALUATION_SEEDS - args.num_envs, ()))
    dagger, frames = args.algorithm == "dagger", []
    for seed in range(first, first + args.num_envs):
        starter = expert if torch.rand(()) < alpha else policy
        switch = math.inf if dagger else int(torch.randint(args.switch, ()))
        scale = 0.0 if dagger else args.noise * torch.rand(())
        noise = torch.randn(len(policy.low))
        env = gym.make(args.env_id, disable_env_checker=True)  # anew: Box2D keeps state over resets
        observation, _ = begin(env, seed)
        for step in range(env.spec.max_episode_steps or LONGEST):
            seen = torch.tensor(np.array(observation, np.float32, order="C"), device=args.device)
            action = (starter if step < switch else expert).greedy(seen).cpu()
            if step < switch:
                action = (action + scale * noise).clamp(-1, 1)
                noise = 0.8 * noise + 0.6 * torch.randn_like(noise)  # correlated, deviation 1
            executed = policy.to_env(action.to(args.device))  # the expert has the same box
            observation, reward, terminated, truncated, _ = take(env, executed)
            fell = bool(is_fall(args.env_id, reward, terminated))
            outcome = np.float32(reward), fell, np.array(observation, np.float32)
            frames.append((seen.cpu().numpy(), action.numpy(), *outcome))
            if terminated or truncated:
                break
        env.close()
    names = ("observations", "actions", "rewards", "fell", "next_observations")
    batch = {name: torch.as_tensor(np.stack(x)) for name, x in zip(names, zip(*frames))}
    batch["expert_actions"] = expert.greedy(batch["observations"].to(args.device)).cpu()
    batch["next_expert_actions"] = expert.greedy(batch["next_observations"].to(args.device)).cpu()
    return batch


class Transitions(dict):
    """All transitions so far, by column; checkpoints save it as a module, in a plain dict."""

    state_dict, load_state_dict = dict.copy, dict.update

    def add(self, batch):
        for name, column in batch.items():
            self[name] = torch.cat([self.get(name, column[:0]), column])

    def sample(self, size, device):
        rows = torch.randint(len(self["rewards"]), (size,))
        return {name: column[rows].to(device) for name, column in self.items()}


# --- updates --------------------------------------------------------------------------------------


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def refit(critics, target, optimizer, transitions, args):
    """Step 2: fitted Q evaluation, continued on all transitions so far; returns the last loss."""
    for _ in range(args.critic_updates):
        loss = fitted_q_loss(critics, target, transitions.sample(BATCH, args.device), args.gamma)
        descend(optimizer, loss)
        target.update_parameters(critics)
    return {"losses/critics": float(loss.detach())}


def improve(policy, critics, optimizer, transitions, weight, args):
    """Step 3, on the states of all trajectories so far; returns the last loss."""
    critics.requires_grad_(False)  # saves computing their gradients
    for update in range(args.policy_updates):
        optimizer.param_groups[0]["lr"] = POLICY_LR * (1 - update / args.policy_updates)
        batch = transitions.sample(BATCH, args.device)
        states, expert_actions = batch["observations"], batch["expert_actions"]
        loss = aggrevated_loss(policy, critics, states, expert_actions, weight, args)
        descend(optimizer, loss)
    critics.requires_grad_(True)
    return {"losses/policy": float(loss.detach())}


def train(args):
    """Run the algorithm; returns what summary.json holds. Raises BadInput and Failed."""
    run = Run(args)  # seeds torch, walks with the expert (a Policy); has the sizes and the counts
    expert = run.expert.to(args.device)
    low, high, inputs = run.sizes["low"], run.sizes["high"], run.sizes["inputs"]
    policy = Policy([inputs, args.hidden, args.hidden, len(low)], "relu", low, high).to(args.device)
    best = copy.deepcopy(policy)
    critics = Critics([inputs + len(low), *[args.critic_hidden] * 2, 1]).to(args.device)
    target = AveragedModel(critics, multi_avg_fn=get_ema_multi_avg_fn(TARGET_DECAY))
    transitions = Transitions()
    optimizer = torch.optim.Adam(policy.parameters(), POLICY_LR, fused=True)
    c_optimizer = torch.optim.Adam(critics.parameters(), CRITIC_LR, fused=True)
    parts = {"policy": policy, "best": best, "critics": critics, "target": target}
    parts |= {"optimizer": optimizer, "c_optimizer": c_optimizer, "transitions": transitions}
    run.start(**parts)  # --resume: loads them, and the counts

    while run.steps < args.total_steps:  # iterations
        # 1. Roll in.
        alpha = max(0.0, 1 - run.steps / MIXING)
        batch = roll_in(policy, expert, alpha, args)
        if run.steps == 0:  # alpha is 1: all states are the (noisy) expert's
            policy.measure(batch["observations"])
            pairs = torch.cat([batch["observations"], batch["actions"]], -1)
            for network in critics.networks:
                network.measure(pairs)
            target.module.load_state_dict(critics.state_dict())  # later, update_parameters does it
        transitions.add(batch)
        run.env_steps += len(batch["rewards"])
        run.steps += 1

        # 2. Fit Q*.
        scalars = {"charts/alpha": alpha, "charts/falls": float(batch["fell"].sum())}
        if args.algorithm == "aggrevated":
            scalars |= refit(critics, target, c_optimizer, transitions, args)

        # 3. Improve the policy. While alpha is 1, the learner only imitates.
        weight = 0.0 if args.algorithm == "dagger" else 1 - alpha
        scalars |= improve(policy, critics, optimizer, transitions, weight, args)

        # 4. Validate, every --eval-every iterations and at the end; `best` becomes the best so far.
        run.record(scalars, policy, best)
    return run.finish(best)


# ==================================================================================================
# The harness: flags, files, evaluation, run folder, main. The other scripts have the same, except
# for the expert and evaluation. It uses SCRIPT, LONGEST, VALIDATION, add_settings, Policy, train.
# ==================================================================================================

EVALUATION_SEEDS = 1_000_000  # evaluation's seeds begin here; training's lie below
SOLVED = 0.95  # of the way from random to the expert: from there on, a task counts as solved
MAY_CHANGE = "total_steps expert resume eval_every eval_episodes capture_video device no_progress"
Failed = FloatingPointError  # a loss or an action is not finite: one line, exit status 1


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
    flag("--seed", type=number(int, 0, 99_999), default=1, help="fixes all randomness in a run")
    flag("--out", metavar="FOLDER", help="the run folder, a new one; None: a name in runs/")
    flag("--resume", metavar="FOLDER", help="go on with that run; its budget may be changed")
    flag("--evaluate", metavar="FILE", help="evaluate this policy.pt, greedy and sampled, and stop")
    flag("--eval-every", type=number(int, 1), help="iterations between validations")
    flag("--eval-episodes", type=number(int, 2, 500), default=20, help="finally x5; validating x10")
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
            args = parser.parse_args(argv, argparse.Namespace(**saved))
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
        widths = np.float32(taken.high) - np.float32(taken.low) if flat[1] else [0]
        fits = all(0 < 2 * width < math.inf for width in widths)  # in float32, as networks are
        check(fits, f"actions {taken}, expected a bounded, flat Box of floats")
        (first, _), (second, *scalars, info) = begin(env, 0), take(env, taken.sample())
        for found in (first, second):
            sound = np.size(found) and np.shape(found) == seen.shape and np.isfinite(found).all()
            check(sound, f"an observation {found}, expected a finite one of {seen}")
        np.array([*scalars, info.get("is_success")], float)  # raises unless all are numbers or None
        return {"inputs": len(first), "low": taken.low.tolist(), "high": taken.high.tolist()}


Episode = namedtuple("Episode", "rewards is_success")  # arrays, a row a step; NaN: not known


def begin(env, seed):
    """Reset a task, and seed what else it may draw from: its spaces, Python's and NumPy's."""
    seed_python(seed)
    np.random.seed(seed)
    spaces = env.action_space, env.unwrapped.action_space, env.unwrapped.observation_space
    for i, space in enumerate(spaces, 1):  # with one seed, they would draw the same as the reset
        space.seed(seed + i * 10**9)
    return env.reset(seed=seed)


def take(env, action):
    """A step. The task gets a copy of the action, as it may write to it, of its own dtype, and in
    the box: float32 may have rounded the bounds."""
    box = env.action_space
    return env.step(np.array(action, box.dtype).clip(box.low, box.high))


def play(act, args, final=False, filmed=None):
    """Validation episodes, VALIDATION times --eval-episodes; finally five times, on other seeds; or
    three, in the one that is `filmed`. `act`: rows of observations to actions; None: random."""
    first = EVALUATION_SEEDS + 10_000 * args.seed + 5_000 * final
    episodes = 3 if filmed else args.eval_episodes * (5 if final else VALIDATION)
    at_once, played = 1 if filmed else 5, []
    while len(played) < episodes:
        envs = [filmed or gym.make(args.env_id, disable_env_checker=True) for _ in range(at_once)]
        running, steps = list(range(at_once)), [[] for _ in envs]
        seen = np.zeros((at_once, *envs[0].observation_space.shape), np.float32)
        space, longest = envs[0].action_space, envs[0].spec.max_episode_steps or LONGEST
        for i, env in enumerate(envs):
            seen[i], _ = begin(env, first + len(played) + i)
        space.seed(first + len(played) + at_once)  # for a random policy, which has one for all
        while running:
            actions = act(seen[running]) if act else [space.sample() for _ in running]
            for i, action in zip(tuple(running), actions):
                seen[i], reward, terminated, truncated, info = take(envs[i], action)
                success = np.float64(info.get("is_success", math.nan)).item()  # None becomes NaN
                steps[i].append((np.float64(reward), success))
                if terminated or truncated or len(steps[i]) == longest:
                    running.remove(i)
                    if not filmed:
                        envs[i].close()
        played += [Episode(*np.transpose(rows)) for rows in steps]
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


def judge(curve, random, expert, learner):
    """Solved if the end is good: at the first good validation or, if none was, at the best."""
    goal = random["return_mean"] + SOLVED * (expert["return_mean"] - random["return_mean"])
    at, verdict = {}, f"not solved: return {learner['return_mean']:.4g}, solved from {goal:.4g} on"
    if not goal > random["return_mean"]:
        verdict = "no verdict: the expert's return is not known to be above random's"
    elif learner["return_mean"] >= goal:
        best = max(curve, key=lambda point: point["return_mean"])
        at = next((point for point in curve if point["return_mean"] >= goal), best)
        verdict = f"solved at {at['steps']:,} steps, {at['wall_seconds']:.1f} s"
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
    """One run: its expert, folder, log, curve, checkpoints and result."""

    kept = ("demos", "setup_seconds", "steps", "env_steps", "wall_seconds", "curve")
    active = process = stopped_by = None  # the run, main's process, the signal to end it (or 0)

    def __init__(self, args):
        self.args, self.clock = args, time.perf_counter()
        with explained("settings"):  # NumPy's scalars and paths become plain values
            plain = {"default": lambda x: x.item() if hasattr(x, "item") else os.fspath(x)}
            vars(args).update(json.loads(json.dumps(vars(args), allow_nan=False, **plain)))
        self.sizes = sizes(args.env_id)
        found = torch.is_grad_enabled(), torch.zeros(1).type()  # as the caller, or the task, has it
        check(found == (True, "torch.FloatTensor"), f"PyTorch has {found}: not its defaults")
        here = Path(globals().get("__file__", "script")).resolve().parent
        wanted = args.env_id.split(":")[-1]
        shipped = here / "experts" / f"{wanted}_{args.expert}.pt"
        path = shipped if shipped.exists() else Path(args.expert)
        check(path.exists(), f"--expert {path}: no such file, nor {shipped}: see {here}/experts")
        self.expert, trained_on = load_policy(path)
        check(trained_on == wanted, f"{path}: for {trained_on}, expected {wanted}")
        found = self.expert.settings | {"inputs": self.expert.settings["sizes"][0]}
        check(self.sizes.items() <= found.items(), f"{path}: {found}, expected {self.sizes}")
        digest = sha256(path.read_bytes()).hexdigest()
        self.demos = {"sha256": digest}  # where the other scripts have demonstrations
        torch.manual_seed(args.seed)
        self.walks = play(self.expert.act, args, final=True)
        self.setup_seconds = self.wall_seconds = 0.0
        self.steps, self.env_steps, self.curve = 0, 0, []
        torch.set_num_threads(1)  # several would wait for one another: networks are small

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

    def record(self, scalars, policy, best):
        """End an iteration: log; validate, keep the best, save, stop when due. Failed on a NaN."""
        args, now = self.args, self.steps
        self.wall_seconds += time.perf_counter() - self.clock
        for tag, value in {**scalars, "charts/SPS": now / self.wall_seconds}.items():
            if tag.startswith("losses/") and not math.isfinite(value):
                raise Failed(f"{tag} is {value} at step {now}; last checkpoint: {self.checkpoint}")
            self.log.add_scalar(tag, value, now)
        due = now >= args.total_steps or now % args.eval_every == 0
        if not self.curve:  # until the first validation, the newest is the best
            best.load_state_dict(policy.state_dict())
        if due:
            began = time.perf_counter()
            with torch.random.fork_rng(devices=[]):  # a task may draw from torch's, too
                result = score(f"{now:>9,} steps  ", play(policy.act, args))
            self.wall_seconds += time.perf_counter() - began  # validating is part of the algorithm
            if not any(result["return_mean"] < point["return_mean"] for point in self.curve):
                best.load_state_dict(policy.state_dict())
            for name, value in result.items():
                self.log.add_scalar(f"eval/{name}", value, now)
            point = {"steps": now, "env_steps": self.env_steps, "wall_seconds": self.wall_seconds}
            self.curve.append({**point, **result, **scalars})
        if due or Run.stopped_by or time.perf_counter() - self.saved > 60:
            saved = {"script": SCRIPT, "env_id": args.env_id.split(":")[-1]}
            saved |= {"settings": best.settings, "weights": best.state_dict()}
            write(self.folder / "policy.pt", saved)
            self.save()
            if Run.stopped_by:
                raise KeyboardInterrupt
        self.bar.update(now - self.bar.n)
        self.clock = time.perf_counter()  # saving does not count

    def finish(self, policy):
        """Evaluate on fresh seeds; write summary.json and the picture; print the result."""
        folder, Run.stopped_by = self.folder, None
        self.bar.close()
        self.log.close()
        random, learner = (play(act, self.args, final=True) for act in (None, policy.act))
        samples = {"random": random, "expert": self.walks, "learner": learner}
        results = {name: score(name, episodes) for name, episodes in samples.items()}
        gains = np.array([x.rewards.sum() - y.rewards.sum() for x, y in zip(learner, self.walks)])
        end = {"steps": self.steps, "wall_seconds": self.wall_seconds} | results["learner"]
        summary = self.facts | results | judge(self.curve or [end], **results)
        error = gains.std(ddof=1) / len(gains) ** 0.5
        summary["verdict"] += f"; {gains.mean():+.1f} +- {error:.1f} (s.e.) relative to its expert"
        summary["paired_differences"] = gains.tolist()
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
