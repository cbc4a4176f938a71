"""Behavioural cloning: imitate an expert by predicting its actions.

The oldest form of imitation learning (Pomerleau 1991, https://doi.org/10.1162/neco.1991.3.1.88):
    repeat  draw a minibatch of the expert's (state, action) pairs
            take a step on -log pi(action | state)
No environment is stepped. Nothing teaches the policy what to do in states the expert never visited:
its errors lead it there, and there it makes more of them (Ross & Bagnell 2010). A loss on held-out
pairs does not show this: their states, too, are the expert's. What is kept is a moving average of
the policy's weights, as it was when its loss on a fifth of the pairs, set aside, was least.

    python bc_cartpole.py --total-steps 500         a quick try, 500 updates: a second of training
    python bc_cartpole.py --num-demos 4             four demonstrations; 8,000 updates, the default
    python bc_cartpole.py --resume runs/FOLDER      go on where a run stopped
    python bc_cartpole.py --env-id Pendulum-v1      another task whose demonstrations are shipped
    python bc_cartpole.py --env-id mine:Task-v0 --demos mine.npz     your own task, in mine.py
    uv run bc_cartpole.py --env-id Hopper-v5        with uv, which installs all that it needs

Any task with a flat Box of observations, and actions that are Discrete or a bounded Box. Expect on
CartPole a return of about 410 of 500 from one demonstration, 500 from four, and 280 from 30 pairs
(--num-pairs 30), after some seconds of training; the table is in docs/bc_cartpole.md.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "gymnasium[classic-control,mujoco]>=1.1,<2",
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
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "bc_cartpole"
SIDE_BY_SIDE = 50  # environments in an evaluation
LEAST_STD = 0.1  # of a Gaussian: below it, single pairs weigh too much in the gradient
SATURATED = 0.99  # Box actions, scaled to [-1, 1], are clipped to it: atanh(0.99) is 2.6
LOG_EVERY = 100  # updates
AVERAGED = 1_000  # updates: how far the average of the weights reaches back, about


def add_settings(parser, argv):
    """The algorithm's flags. number(type, least, most), tensors and Run are in the harness."""
    parser.set_defaults(env_id="CartPole-v1")
    flag = parser.add_argument_group("algorithm").add_argument
    flag("--total-steps", type=number(int, 1), default=8_000, help="updates of the policy, in all")
    flag("--batch-size", type=number(int, 1, 10**6), default=64, help="pairs in an update")
    flag("--learning-rate", type=number(float, 0), default=3e-3, help="step size of Adam")
    flag("--hidden", type=number(int, 1, 4_096), default=64, help="width of the two hidden layers")


# --- networks and loss ----------------------------------------------------------------------------


def mlp(inputs, hidden, outputs):
    """Two hidden layers of tanh: (..., inputs) -> (..., outputs)."""
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(hidden, outputs))


class Standardise(nn.Module):
    """(x - the expert's mean) / its deviation, clamped to [-10, 10]: (..., size) -> (..., size)."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))

    def measure(self, sample):
        """Mean and deviation of a sample, (n, size). What varies by rounding is not scaled."""
        deviation, self.mean = torch.std_mean(sample, 0, correction=0)
        self.deviation = deviation.where(deviation > 1e-6 * self.mean.abs(), 1.0)

    def forward(self, observations):
        return ((observations - self.mean) / self.deviation).clamp(-10, 10)


class Policy(nn.Module):
    """A softmax over Discrete actions, here counted from 0; or a Gaussian over u, where tanh(u),
    scaled, is the action in the Box. to_env and from_env convert from and to these units.

    Why tanh: in a Box, experts are often SAC's, whose noise is added to u. The mean of tanh(u +
    noise) is nearer to 0 than tanh(u): a clone of it is too timid (docs/studies/cloning.md).

    Observations (..., inputs) -> a distribution; its samples: (...) or (..., size of an action).
    `low`, `high`: the first and last action (two ints), or the bounds of the box (two lists)."""

    def __init__(self, inputs, low, high, hidden):
        super().__init__()
        # policy.pt has these, too; so its weights leave out low and high: persistent=False, below.
        self.settings = {"inputs": inputs, "low": low, "high": high, "hidden": hidden}
        self.discrete = isinstance(low, int)
        outputs = high - low + 1 if self.discrete else len(low)
        self.standardise = Standardise(inputs)
        self.network = mlp(inputs, hidden, outputs)
        self.register_buffer("low", torch.tensor(low), persistent=False)
        self.register_buffer("high", torch.tensor(high), persistent=False)
        if not self.discrete:
            self.log_std_before_tanh = nn.Parameter(torch.full((outputs,), -0.5))  # std: 0.6 + 0.1

    def forward(self, observations):
        outputs = self.network(self.standardise(observations))
        if self.discrete:
            return Categorical(logits=outputs, validate_args=False)
        std = LEAST_STD + self.log_std_before_tanh.exp()
        return Independent(Normal(outputs, std, validate_args=False), 1)

    @torch.no_grad()
    def act(self, observations, sample=False):
        """Actions for the environment, greedy or sampled; NumPy: (n, inputs) -> (n, ...)"""
        observations = np.array(observations, np.float32, order="C")  # a copy that from_numpy takes
        observations = torch.from_numpy(observations).to(self.low.device)
        if sample:
            return self.to_env(self(observations).sample())
        outputs = self.network(self.standardise(observations))  # greedy: by argmax, or u's mean
        return self.to_env(outputs.argmax(-1) if self.discrete else outputs)

    def to_env(self, actions):
        """From the policy's own units to the environment's, as NumPy."""
        if self.discrete:
            return (actions + self.low).cpu().numpy()
        return torch.lerp(self.low, self.high, (actions.tanh() + 1) / 2).cpu().numpy()

    def from_env(self, actions):
        """From the environment's units to the policy's, both as tensors."""
        if self.discrete:
            return actions - self.low
        squashed = 2 * (actions - self.low) / (self.high - self.low) - 1
        return squashed.clamp(-SATURATED, SATURATED).atanh()


def behavioural_cloning_loss(policy, observations, actions):
    """Minus the mean log-likelihood of actions, in the policy's units: two (batch, ...) -> ()."""
    return -policy(observations).log_prob(actions).mean()


# --- the algorithm --------------------------------------------------------------------------------


@torch.no_grad()
def move_average(averages, parameters, rate):
    """Move the averages, tensors, towards the policy's parameters, by the share `rate`."""
    for average, parameter in zip(averages, parameters):
        average += rate * (parameter - average)


def train(args):
    """Run the algorithm; returns what summary.json holds. Raises BadInput and Failed."""
    run = Run(args)  # reads the demonstrations, seeds torch, and counts the steps
    policy = Policy(**run.sizes, hidden=args.hidden).to(args.device)  # sizes: inputs, low, high
    observations, actions, *_ = tensors(run.episodes, args.device)  # (pairs, ...) each
    actions = policy.from_env(actions)
    policy.standardise.measure(observations)
    optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, fused=True)
    # Each minibatch pulls the weights another way. The loss hardly shows it; the return does, for
    # small errors add up. So an average is kept (Block et al. 2024, arXiv:2310.11428).
    average = copy.deepcopy(policy)
    weights = [list(network.parameters()) for network in (average, policy)]  # found once: faster
    # The average with the least loss on a fifth of the pairs, in a module that holds this loss.
    best = nn.Sequential(copy.deepcopy(policy))
    best.register_buffer("loss", torch.tensor(math.inf))
    fifth, rows = len(actions) // 5, torch.randperm(len(actions))  # by --seed: the same if resumed
    checked, learnt = rows[: max(fifth, 1)], rows[fifth:]  # below five pairs, one is in both
    run.start(policy=policy, average=average, best=best, optimizer=optimizer)  # --resume loads them

    while run.steps < args.total_steps:
        rows = learnt[torch.randint(len(learnt), (args.batch_size,))]
        loss = behavioural_cloning_loss(policy, observations[rows], actions[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.steps += 1
        move_average(*weights, 1 / min(run.steps, AVERAGED))  # at first, the plain mean

        if run.steps % LOG_EVERY == 0 or run.steps == args.total_steps:
            scalars = {"losses/policy": float(loss.detach())}
            with torch.no_grad():
                loss = behavioural_cloning_loss(average, observations[checked], actions[checked])
                scalars["losses/checked"] = float(loss)
                if loss < best.loss:
                    best[0].load_state_dict(average.state_dict())
                    best.loss.copy_(loss)
                if run.held_out:  # other episodes, for the log; of the policy, not the average
                    seen, taken, *_ = tensors(run.held_out, args.device)
                    loss = behavioural_cloning_loss(policy, seen, policy.from_env(taken))
                    scalars["losses/held_out"] = float(loss)
            run.record(scalars, best[0])  # logs; evaluates and saves when due
    return run.finish(best[0])


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
