"""AggreVaTeD: learn to walk from an expert that can be queried, and surpass it.

AggreVaTeD (Sun et al. 2017, https://arxiv.org/abs/1703.01030, Algorithm 1) improves the learner, in
the states that it visits, using the expert's cost-to-go; here rewards take the place of costs:
    1. roll in: each trajectory is walked by the expert (with probability alpha) or the learner up
       to a random time; from there the expert walks to the end, to show what its actions lead to,
    2. fit Q*, the value of an action if the expert takes over after it, to all transitions so far,
    3. increase A*(s, a) = Q*(s, a) - V*(s) of the learner's own actions in the visited states,
    4. validate, and keep the best policy.
DAgger (Ross et al. 2011) imitates the expert's actions in these states: `--algorithm dagger`.

    python aggrevated_bipedal.py --total-steps 2           a look around
    python aggrevated_bipedal.py                           the weak expert: five to nine minutes
    python aggrevated_bipedal.py --resume runs/FOLDER      go on where a run stopped
    python aggrevated_bipedal.py --env-id Pendulum-v1 --expert expert.pt       a task of yours

An expert is a .pt of plain weights: of experts/, or any policy.pt that this script wrote.
docs/aggrevated_bipedal.md has the results, and the reasons for the choices below.

Deviations from the paper: (1) the gradient goes through Q* (reparameterised), not through the score
function, and an iteration takes many Adam steps, not one online or natural gradient step; (2) the
learner is held near the expert's action, and A* is weighted by 1 - alpha; (3) Q* is discounted and
not a function of time, and only a fall has value 0; several networks are fitted, and the mean of
their A* minus its spread is maximised, as a lower bound; (4) roll-ins are greedy, with noise, and
the expert finishes them; (5) training uses all states so far, the expert's among them.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "gymnasium[box2d]>=1.2.3,<2",
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
import functools
import io
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import zipfile
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import RecordVideo
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = "aggrevated_bipedal"
MIXING = 5  # iterations over which alpha, the expert's share of roll-ins, falls from 1 to 0
STD = 0.1  # of the learner's actions, before tanh
BATCH = 256  # transitions in one update
CRITIC_LR, POLICY_LR = 5e-4, 2e-3  # of Adam; the policy's falls to 0 in each iteration
VALIDATION = 10  # times --eval-episodes: where falls are rare, with few episodes luck decides
LEAST_DEVIATION = 0.1  # when standardizing, so that nothing is scaled more than tenfold
HARDCORE = {"expert": "good", "total_steps": 12, "num_envs": 80, "noise": 0.3}
HARDCORE |= {"critic_hidden": 256, "critic_updates": 4_000, "policy_updates": 5_000}
HARDCORE |= {"hidden": 512, "caution": 0.5, "anchor": 8.0}  # this course is harder to fit


def add_settings(parser, argv):
    """The algorithm's flags. `number`, `load_policy` and `Run` are in the harness."""
    parser.set_defaults(env_id="BipedalWalker-v3", eval_every=4)
    flag = parser.add_argument_group("expert").add_argument
    shipped = "weak or good (shipped for the walkers), or a .pt of this script or experts/"
    flag("--expert", metavar="NAME", default="weak", help=shipped)
    flag = parser.add_argument_group("roll-in").add_argument
    flag("--total-steps", type=number(int, 1), default=20, help="iterations, in all")
    flag("--num-envs", type=number(int, 1, 10_000), default=20, help="trajectories in an iteration")
    noise = "largest standard deviation of the noise on roll-in actions; 0: none"
    flag("--noise", type=number(float, 0), default=0.5, help=noise)
    longest = "the expert takes over after a random number of steps below this"
    flag("--switch", type=number(int, 1), default=1_000, help=longest)
    flag = parser.add_argument_group("Q*").add_argument
    flag("--critic-hidden", type=number(int, 1, 4_096), default=128, help="width of both layers")
    flag("--critic-updates", type=number(int, 0), default=1_000, help="in an iteration")
    flag("--gamma", type=number(float, 0, 0.9999), default=0.99, help="discount factor")
    flag = parser.add_argument_group("policy").add_argument
    dagger = "dagger only imitates: no Q*, and in roll-ins no noise and no takeover by the expert"
    flag("--algorithm", choices=("aggrevated", "dagger"), default="aggrevated", help=dagger)
    flag("--policy-updates", type=number(int, 1), default=3_000, help="in an iteration")
    flag("--hidden", type=number(int, 1, 4_096), default=128, help="width of both hidden layers")
    caution = "standard deviations of the critics to subtract from their mean: a lower bound"
    flag("--caution", type=number(float, 0), default=1.5, help=caution)
    anchor = "weight of the squared distance to the expert's action (behaviour regularisation)"
    flag("--anchor", type=number(float, 0), default=4.0, help=anchor)
    if parser.parse_known_args(argv)[0].env_id == "BipedalWalkerHardcore-v3":
        parser.set_defaults(**HARDCORE)


def is_fall(env_id, reward, terminated):
    """CHANGE ME: is this an end after which nothing is earned? Right for Gymnasium's MuJoCo tasks.

    A walker's episode terminates at the end of its course, too, where it would walk on."""
    return reward <= -100 if env_id.startswith("BipedalWalker") else terminated


# --- networks -------------------------------------------------------------------------------------


def mlp(sizes, activation=nn.ReLU):
    """Linear layers with ReLU between them: (..., sizes[0]) -> (..., sizes[-1])."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class Standardised(nn.Module):
    """A network whose inputs are measured in deviations of a sample."""

    def __init__(self, sizes, activation=nn.ReLU):
        super().__init__()
        self.network = mlp(sizes, activation)
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("deviation", torch.ones(sizes[0]))

    def measure(self, sample):
        self.mean.copy_(sample.mean(0))
        self.deviation.copy_(sample.std(0).clamp(min=LEAST_DEVIATION))

    def outputs(self, inputs):
        return self.network((inputs - self.mean) / self.deviation)


class Policy(Standardised):
    """A squashed Gaussian, for learner and expert: (..., inputs) -> a distribution over [-1, 1].

    The tanh of the network's output is the greedy action; `low` and `high` are the box that the
    environment knows it by."""

    def __init__(self, sizes, activation, low, high):
        super().__init__(sizes, {"relu": nn.ReLU, "tanh": nn.Tanh}[activation])
        self.settings = {"sizes": sizes, "activation": activation, "low": low, "high": high}
        self.register_buffer("low", torch.tensor(low), persistent=False)
        self.register_buffer("high", torch.tensor(high), persistent=False)

    def forward(self, observations):
        gaussian = Normal(self.outputs(observations), STD, validate_args=False)
        return TransformedDistribution(gaussian, TanhTransform(cache_size=1), validate_args=False)

    def greedy(self, observations):
        return self.outputs(observations).tanh()

    @torch.no_grad()
    def act(self, observations, sample=False):
        """The environment's actions, greedy or sampled; NumPy: (n, inputs), real -> (n, size)."""
        observations = np.array(observations, np.float32, order="C")
        seen = torch.from_numpy(observations).to(self.low.device)
        return self.to_env(self(seen).sample() if sample else self.greedy(seen))

    def to_env(self, actions):
        """From [-1, 1] to the environment's box, as NumPy: (..., size) both."""
        return torch.lerp(self.low, self.high, (actions + 1) / 2).cpu().numpy()


class Critics(nn.Module):
    """Two networks for Q*(s, a): (batch, inputs), (batch, actions) -> (2, batch)."""

    def __init__(self, sizes):
        super().__init__()
        self.networks = nn.ModuleList(Standardised(sizes) for _ in range(2))

    def forward(self, observations, actions):
        pairs = torch.cat([observations, actions], -1)
        return torch.stack([network.outputs(pairs).squeeze(-1) for network in self.networks])


# --- mathematics ----------------------------------------------------------------------------------


def fitted_q_loss(critics, target, batch, gamma):
    """Squared error to r + gamma Q*(s', the EXPERT's action there), or to r after a fall.

    Fitted Q evaluation (Le et al. 2019, algorithm 3). The next action is the expert's even where
    the learner acted, so that what is learnt is the expert's Q. -> ()"""
    with torch.no_grad():
        following = target(batch["next_observations"], batch["next_expert_actions"])
        targets = batch["rewards"] + gamma * ~batch["fell"] * following  # (networks, batch)
    return F.mse_loss(critics(batch["observations"], batch["actions"]), targets)


def cautious_advantages(critics, observations, actions, expert_actions, caution):
    """A*(s, a) = Q*(s, a) - Q*(s, expert's): the networks' mean minus caution * spread. (batch,)"""
    difference = critics(observations, actions) - critics(observations, expert_actions)
    spread = (difference.var(0) + 1e-6).sqrt()  # at the expert's action sqrt(0) has gradient NaN
    return difference.mean(0) - caution * spread


def aggrevated_loss(policy, critics, observations, expert_actions, weight, caution, anchor):
    """Minus A* of the learner's own actions, reparameterised, held near the expert's. -> ()

    DEVIATION: the paper uses the score-function gradient of E[A*] in a state, and no anchor."""
    distribution = policy(observations)
    actions, greedy = distribution.rsample(), distribution.base_dist.mean.tanh()
    advantages = cautious_advantages(critics, observations, actions, expert_actions, caution)
    distances = (greedy - expert_actions).square().sum(-1)
    return (anchor * distances - weight * advantages).mean()


def dagger_loss(policy, observations, expert_actions):
    """Squared distance to the expert's actions (Ross et al. 2011): (batch, ...) twice -> ()."""
    return (policy.greedy(observations) - expert_actions).square().sum(-1).mean()


# --- roll-in --------------------------------------------------------------------------------------


def safe_step(env, action):
    """Step it. Box2D ends the whole process if an action is NaN: raise Failed before that."""
    if not np.isfinite(action).all():
        raise Failed("an action is NaN or infinite: the policy has diverged")
    return env.step(action)


@torch.no_grad()
def roll_in(policy, expert, alpha, args):
    """One trajectory from each environment: a dict of (steps, ...), one after the other.

    Each is started by the expert (with probability alpha) or the learner, with noise on the
    actions. From a random step below --switch on, the expert alone walks it to its end. DAgger's
    have neither noise nor takeover. The environments are new: Box2D remembers earlier episodes."""
    envs = [gym.make(args.env_id, disable_env_checker=True) for _ in range(args.num_envs)]
    first = int(torch.randint(EVALUATION_SEEDS - args.num_envs, ()))
    observations = [env.reset(seed=first + i)[0] for i, env in enumerate(envs)]
    observations = np.array(observations, np.float32)
    by_expert = torch.rand(args.num_envs, 1) < alpha
    switch = torch.randint(args.switch, (args.num_envs, 1))
    scale = args.noise * torch.rand(args.num_envs, 1)
    if args.algorithm == "dagger":
        switch[:], scale[:] = 10**9, 0.0
    noise = torch.randn(args.num_envs, len(policy.low))
    frames, over = [], np.zeros(args.num_envs, bool)
    while not over.all():
        seen, running = torch.as_tensor(observations, device=args.device), ~over
        expert_actions, greedy = expert.greedy(seen).cpu(), policy.greedy(seen).cpu()
        chosen = torch.where(by_expert, expert_actions, greedy) + scale * noise
        actions = torch.where(len(frames) >= switch, expert_actions, chosen.clamp(-1, 1))
        noise = 0.8 * noise + 0.6 * torch.randn_like(noise)  # correlated in time, deviation 1
        frame = {"running": running, "observations": observations, "actions": actions.numpy()}
        frame |= {"expert_actions": expert_actions.numpy(), "fell": np.zeros(args.num_envs, bool)}
        frame["rewards"] = np.zeros(args.num_envs, np.float32)
        observations, executed = observations.copy(), policy.to_env(actions.to(args.device))
        for i in np.flatnonzero(running):
            observations[i], reward, terminated, truncated, _ = safe_step(envs[i], executed[i])
            frame["rewards"][i], over[i] = reward, terminated or truncated
            frame["fell"][i] = is_fall(args.env_id, reward, terminated)
        frames.append({**frame, "next_observations": observations})
    for env in envs:
        env.close()
    columns = {name: np.stack([frame[name] for frame in frames], 1) for name in frames[0]}
    running = columns.pop("running")  # (envs, steps)
    batch = {name: torch.as_tensor(column[running]) for name, column in columns.items()}
    following = batch["next_observations"].to(args.device)
    batch["next_expert_actions"] = expert.greedy(following).cpu()
    return batch


class Transitions:
    """All transitions so far; a checkpoint holds every one of them."""

    def __init__(self):
        self.columns = {}

    def add(self, batch):
        for name, column in batch.items():
            self.columns[name] = torch.cat([self.columns.get(name, column[:0]), column])

    def sample(self, size, device):
        rows = torch.randint(len(self.columns["rewards"]), (size,))
        return {name: column[rows].to(device) for name, column in self.columns.items()}

    def state_dict(self):
        return self.columns

    def load_state_dict(self, state):
        self.columns = state


# --- updates --------------------------------------------------------------------------------------


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def refit(critics, target, optimizer, transitions, args):
    """Fitted Q evaluation, continued on all transitions so far; returns the last loss."""
    loss = torch.zeros(())
    for _ in range(args.critic_updates):
        batch = transitions.sample(BATCH, args.device)
        loss = fitted_q_loss(critics, target.module, batch, args.gamma)
        descend(optimizer, loss)
        target.update_parameters(critics)
    return {"losses/critics": float(loss.detach())}


def improve(policy, critics, optimizer, transitions, weight, args):
    """Step 3, on the states of all trajectories so far; returns the mean loss."""
    critics.requires_grad_(False)  # saves computing their gradients
    total = torch.zeros((), device=args.device)
    for update in range(args.policy_updates):
        optimizer.param_groups[0]["lr"] = POLICY_LR * (1 - update / args.policy_updates)
        batch = transitions.sample(BATCH, args.device)
        states, expert_actions = batch["observations"], batch["expert_actions"]
        if args.algorithm == "dagger":
            loss = dagger_loss(policy, states, expert_actions)
        else:
            loss = aggrevated_loss(
                policy, critics, states, expert_actions, weight, args.caution, args.anchor
            )
        descend(optimizer, loss)
        total += loss.detach()
    critics.requires_grad_(True)
    return {"losses/policy": float(total) / args.policy_updates}


def train(args):
    """Run the algorithm; returns what summary.json holds. Raises BadInput and Failed."""
    run = Run(args)
    expert = run.expert.to(args.device)
    inputs, outputs = run.sizes["inputs"], len(run.sizes["low"])
    sizes = [inputs, args.hidden, args.hidden, outputs]
    policy = Policy(sizes, "relu", run.sizes["low"], run.sizes["high"]).to(args.device)
    best = copy.deepcopy(policy)
    sizes = [inputs + outputs, args.critic_hidden, args.critic_hidden, 1]
    critics = Critics(sizes).to(args.device)
    ema = get_ema_multi_avg_fn(0.95)  # with 0.99 Q* rises too slowly
    target = AveragedModel(critics, multi_avg_fn=ema)
    transitions = Transitions()
    optimizer = torch.optim.Adam(policy.parameters(), POLICY_LR, fused=True)
    c_optimizer = torch.optim.Adam(critics.parameters(), CRITIC_LR, fused=True)
    networks = {"policy": policy, "best": best, "critics": critics, "target": target}
    optimizers = {"optimizer": optimizer, "c_optimizer": c_optimizer}
    run.start(**networks, **optimizers, transitions=transitions)

    while run.steps < args.total_steps:
        # 1. Roll in.
        alpha = max(0.0, 1 - run.steps / MIXING)
        batch = roll_in(policy, expert, alpha, args)
        if run.steps == 0:  # the expert began all
            policy.measure(batch["observations"])
            pairs = torch.cat([batch["observations"], batch["actions"]], -1)
            for network in critics.networks:
                network.measure(pairs)
            target.module.load_state_dict(critics.state_dict())  # for the first update
        transitions.add(batch)
        run.env_steps += len(batch["rewards"])
        run.steps += 1

        # 2. Fit Q*.
        scalars = {"charts/alpha": alpha, "charts/falls": float(batch["fell"].sum())}
        if args.algorithm == "aggrevated":
            scalars |= refit(critics, target, c_optimizer, transitions, args)

        # 3. Improve the policy. At first, while alpha is 1, the learner only imitates.
        scalars |= improve(policy, critics, optimizer, transitions, 1 - alpha, args)

        # 4. Validate, and keep the best policy.
        run.record(scalars, policy, best)
    return run.finish(best)


# ==================================================================================================
# The harness: flags, files, evaluation, run folder, main. It is no part of the algorithm, and the
# other scripts' text but where this one queries an expert and validates. From above it uses SCRIPT,
# add_settings, Policy and train.
# ==================================================================================================

EVALUATION_SEEDS = 1_000_000  # evaluation's seeds begin here; training's lie below
SOLVED = 0.95  # is a task at this share of the way from random to the expert
MAY_CHANGE = "total_steps expert resume eval_every eval_episodes capture_video device no_progress"


class BadInput(Exception):
    """Something that the user can fix: one line on stderr, exit status 2."""


class Failed(Exception):
    """A loss that is not finite: one line on stderr, exit status 1."""


def check(condition, message):
    if not condition:
        raise BadInput(message)


@contextlib.contextmanager
def explained(subject):
    """Whatever goes wrong inside becomes one line about the subject, a file or a flag."""
    try:
        yield
    except Exception as error:  # damaged files fail in as many ways as there are readers
        what = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
        raise BadInput(f"{subject}: {what}{' '.join(str(error).split())[:300]}") from None


def say(text, stream=None):
    """Print a line. A stream that is missing, closed or narrow must not end a run."""
    with contextlib.suppress(Exception):
        print(text, file=stream, flush=True)


def number(kind, low, high=10**9):
    """An argparse type: a finite int or float in [low, high]."""

    def parse(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise ValueError

    parse.__name__ = f"{kind.__name__} in [{low}, {high}]"  # argparse shows it
    return parse


def parse_args(argv=None):
    """The settings, from a list of words or the command line; a resumed run brings its own."""
    parser = argparse.ArgumentParser(SCRIPT + ".py", None, __doc__.splitlines()[0])
    parser.formatter_class, parser.allow_abbrev = argparse.ArgumentDefaultsHelpFormatter, False
    parser.error = functools.partial(check, False)  # in place of 25 lines of usage
    flag = parser.add_argument_group("task and run").add_argument
    flag("--env-id", help="the task, as Gymnasium names it; module:Name-v0 imports the module")
    flag("--seed", type=number(int, 0, 99_999), default=1, help="fixes all randomness in a run")
    flag("--out", metavar="FOLDER", help="the run folder, a new one; None: a name in runs/")
    flag("--resume", metavar="FOLDER", help="go on with that run; its budget may be changed")
    flag("--evaluate", metavar="FILE", help="evaluate this policy.pt, greedy and sampled, and stop")
    flag("--eval-every", type=number(int, 1), help="iterations between validations")
    many = "a fifth of the greedy episodes at the end, by the expert as well"
    flag("--eval-episodes", type=number(int, 2, 500), default=20, help=many)
    flag("--capture-video", action="store_true", help="at the end, MP4s of three episodes")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    flag("--device", choices=devices, default="cpu", help="where the networks are; cpu is fast")
    flag("--no-progress", action="store_true", help="no progress bar")
    add_settings(parser, argv)
    args = parser.parse_args(argv)
    check("" not in vars(args).values(), "a flag with an empty value, expected a name")
    if args.resume:
        saved = load(Path(args.resume, "checkpoint.pt"))
        with explained(args.resume):
            parser.set_defaults(**(saved := saved["args"]))
        args = parser.parse_args(argv)
        fixed = [x for x in saved.keys() - MAY_CHANGE.split() if getattr(args, x) != saved[x]]
        check(not fixed, f"--resume {args.resume}: {', '.join(fixed)} cannot be changed")
    return args


def write(path, content):
    """Write the whole file or nothing. JSON is strict: NaN and infinity become null."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    file = io.BytesIO()  # on a full disk torch.save would hide the OSError
    if path.suffix == ".json":
        content = json.loads(json.dumps(content), parse_constant=lambda name: None)
        file.write(json.dumps(content, indent=2).encode())
    else:
        torch.save(content, file) if path.suffix == ".pt" else content.savefig(file)
    try:
        temporary.write_bytes(file.getbuffer())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path):
    """What torch.save wrote: tensors and plain values. Anything else is refused, not unpickled."""
    with explained(path):
        check(Path(path).is_file(), "not found, expected a file")  # a pipe could block
        with zipfile.ZipFile(path) as archive:
            check(archive.testzip() is None, "damaged, expected the file as it was written")
        saved = torch.load(path, weights_only=True, map_location="cpu")
        check(saved["script"] == SCRIPT, f"a file of {saved['script']}, expected one of {SCRIPT}")
        check("parts" in saved or "settings" in saved, "an older version's, expected this one's")
        return saved


def load_policy(path):
    """The policy of a policy.pt that this script wrote, and its task's id. Raises BadInput."""
    saved = load(path)
    with explained(path):
        policy = Policy(**saved["settings"])
        policy.load_state_dict(saved["weights"])
        sound = all(x.isfinite().all() for x in policy.state_dict().values())
        check(sound, "weights that are NaN or infinite, expected finite ones")
        return policy, saved["env_id"]


# --- evaluation -----------------------------------------------------------------------------------


def sizes(env_id):
    """What a Policy needs to know of a task, as plain numbers; BadInput for other kinds of task."""
    with explained(f"--env-id {env_id}"), gym.make(env_id, disable_env_checker=True) as env:
        seen, taken = env.observation_space, env.action_space
        flat = isinstance(seen, Box) and len(seen.shape) == 1 and seen.dtype.kind == "f"
        check(flat, f"observations {seen}, expected a flat Box of floats")
        if isinstance(taken, Discrete):
            low, high = int(taken.start), int(taken.start + taken.n) - 1
        else:
            flat = isinstance(taken, Box) and len(taken.shape) == 1
            fits = flat and all(0 < width < math.inf for width in taken.high - taken.low)
            fits = fits and np.can_cast(np.float32, taken.dtype)
            check(fits, f"actions {taken}, expected Discrete or a bounded, flat Box of floats")
            low, high = taken.low.tolist(), taken.high.tolist()
        (_, _), (found, *_) = env.reset(seed=0), env.step(taken.sample())
        sound = np.shape(found) == seen.shape and np.isfinite(found).all()
        check(sound, f"an observation {found}, expected a finite one of {seen}")
        return {"inputs": seen.shape[0], "low": low, "high": high}


def tensors(episodes, device="cpu"):
    """The observations and the actions of all episodes: (pairs, ...) both."""
    names = ("observations", "actions")
    arrays = (np.concatenate([episode[name] for episode in episodes]) for name in names)
    return [torch.as_tensor(array, device=device) for array in arrays]


class OneEpisode(gym.Wrapper):
    """After the end of its episode an environment rests, until a seed begins another one."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.over, (self.last, _) = False, self.env.reset(seed=seed)
        return self.last, {}

    def step(self, action):
        if self.over:
            return self.last, 0.0, False, False, {}
        self.last, reward, terminated, truncated, info = self.env.step(action)
        self.over = terminated or truncated
        return self.last, reward, terminated, truncated, info


def play(act, env_id, episodes, seed, videos=None):
    """Episodes with seeds from this one on, side by side in new environments: dicts of arrays.

    `act` maps observations to actions, one row for each environment; None acts at random. They are
    filmed if `videos` is a folder."""

    def make():
        settings = {"render_mode": "rgb_array"} if videos else {}
        env = gym.make(env_id, disable_env_checker=True, **settings)
        if videos:
            env = RecordVideo(env, str(videos), lambda number: True, disable_logger=True)
        return OneEpisode(env)

    at_once = 1 if videos else min(episodes, 5)  # some simulators take 30 MB each
    vector = str(getattr(gym.registry.get(env_id.split(":")[-1]), "vector_entry_point", ""))
    if vector.startswith("gymnasium.") and not videos:  # CartPole in NumPy: 20 times as fast
        at_once = min(episodes, 500)
        envs = gym.make_vec(env_id, at_once, vectorization_mode="vector_entry_point")
    else:
        envs = SyncVectorEnv([make] * at_once)
    played = []
    while len(played) < episodes:
        envs.action_space.seed(seed + len(played))
        observations, _ = envs.reset(seed=seed + len(played))
        running, frames = np.ones(at_once, bool), []
        while running.any():
            seen = observations.astype(np.float32)
            actions = act(seen) if act else envs.action_space.sample()
            observations, rewards, terminated, truncated, info = envs.step(actions)
            success = np.array(info.get("is_success", [np.nan] * at_once), float)
            frames.append((running.copy(), seen, actions, rewards, terminated, success))
            running &= ~(terminated | truncated)
        lasted, *columns = (np.stack(column, 1) for column in zip(*frames))
        names = ("observations", "actions", "rewards", "terminated", "is_success")
        played += [dict(zip(names, (x[i, lasted[i]] for x in columns))) for i in range(at_once)]
    envs.close()
    return played[:episodes]


def evaluation_episodes(act, args, env_id, final=False):
    """--eval-episodes of them; for the final evaluation five times as many, on other seeds."""
    seed = EVALUATION_SEEDS + 10_000 * args.seed + 5_000 * final
    return play(act, env_id, args.eval_episodes * (5 if final else 1), seed)


def film(policy, env_id, folder):
    """Three greedy episodes, in videos/. Raises BadInput: no encoder, nothing to draw with."""
    with explained("--capture-video"):
        play(policy.act, env_id, 3, EVALUATION_SEEDS, folder / "videos")


def statistics(episodes):
    returns = np.array([episode["rewards"].sum() for episode in episodes], float)
    lengths = [len(episode["rewards"]) for episode in episodes]
    result = {"return_mean": float(returns.mean()), "return_std": float(returns.std())}
    result |= {"length_mean": float(np.mean(lengths)), "episodes": len(episodes)}
    success = np.mean([episode.get("is_success", [np.nan])[-1] for episode in episodes])
    return result if np.isnan(success) else {**result, "success_rate": float(success)}


def describe(result):
    shown = {"return_mean": "return {:.1f}", "return_std": "+- {:.1f}"}
    shown |= {"success_rate": "success {:.0%}", "occupancy_distance": "occupancy distance {:.4f}"}
    known = [name for name in shown if result.get(name) is not None]
    return "  ".join(shown[name].format(result[name]) for name in known)


def squared_energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, no row compared with itself: (n, d), (m, d) -> float."""
    return float(2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean())


def occupancy_distances(held_out, samples):
    """How far each sample's pairs are from the held-out ones, in units of samples["random"].

    Of each, at most 2,000 pairs, in units of the held-out ones' deviations."""

    def pairs(episodes):
        observations, actions = tensors(episodes)
        if actions.ndim == 1:  # Discrete: one-hot
            actions = actions[:, None] == torch.unique(tensors(samples["random"])[1])
        rows = torch.from_numpy(np.random.default_rng(0).permutation(len(actions))[:2_000])
        return torch.cat([observations[rows], actions[rows]], -1).double()

    if not held_out:
        return dict.fromkeys(samples)
    expert, distance = pairs(held_out), squared_energy_distance
    unit = expert.std(0).where(expert.std(0) > 0, 1.0)
    found = {name: distance(pairs(x) / unit, expert / unit) for name, x in samples.items()}
    return {name: distance / found["random"] for name, distance in found.items()}


def judge(curve, random, expert, learner):
    """The validation that solved it (the first good one, or else the best), and a verdict."""
    goal = random["return_mean"] + SOLVED * (expert["return_mean"] - random["return_mean"])
    if not learner["return_mean"] >= goal:
        return {}, f"not solved: return {learner['return_mean']:.4g} of {goal:.4g}"
    best = max(curve, key=lambda point: point["return_mean"])
    first = next((point for point in curve if point["return_mean"] >= goal), best)
    return first, f"solved at {first['steps']:,} steps, {first['wall_seconds']:.1f} s"


def draw(summary, path):
    """The learning curve, with expert and random. A run without a picture is still good."""
    with contextlib.suppress(Exception):  # MPLBACKEND, fonts: faults of the surroundings
        from matplotlib.figure import Figure

        figure, curve = Figure(figsize=(6, 3.6), layout="constrained"), summary["curve"]
        axes = figure.subplots()
        steps, returns = ([point[name] for point in curve] for name in ("steps", "return_mean"))
        axes.plot(steps, returns, "o-", label="learner")
        for name, style in (("expert", "--"), ("random", ":")):
            axes.axhline(summary[name]["return_mean"], color="gray", ls=style, label=name)
        axes.set(xlabel="steps", ylabel="mean return", title=summary["args"]["env_id"])
        axes.legend()
        write(path, figure)


# --- a run ----------------------------------------------------------------------------------------


class Run:
    """One run: its expert, folder, log, curve, checkpoints and result."""

    active, training, stopped_by = None, False, 0  # the last run, and the signal that is to end it
    kept = ("steps", "env_steps", "seconds", "curve", "digest")  # in checkpoints

    def __init__(self, args):
        self.args, self.clock, Run.active, Run.training = args, time.perf_counter(), None, False
        with explained("settings"):  # NumPy's scalars and paths become plain values
            plain = {"default": lambda x: x.item() if hasattr(x, "item") else os.fspath(x)}
            vars(args).update(json.loads(json.dumps(vars(args), allow_nan=False, **plain)))
        self.sizes = sizes(args.env_id)
        here = Path(globals().get("__file__", "script")).resolve().parent
        shipped = here / "experts" / f"{args.env_id}_{args.expert}.pt"
        path = shipped if shipped.exists() else Path(args.expert)
        self.expert, trained_on = load_policy(path)
        wanted = args.env_id.split(":")[-1]
        check(trained_on == wanted, f"{path}: for {trained_on}, expected {wanted}")
        layers, low, high = (self.expert.settings[name] for name in ("sizes", "low", "high"))
        found = {"inputs": layers[0], "low": low, "high": high}
        check(found == self.sizes, f"{path}: {found}, expected {self.sizes}")
        weights = (x.numpy().tobytes() for x in self.expert.state_dict().values())
        self.digest = sha256(b"".join(weights)).hexdigest()
        episodes = evaluation_episodes(self.expert.act, args, args.env_id, final=True)
        say(f"expert  {describe(statistics(episodes))}, {len(episodes)} episodes")
        cut = len(episodes) - len(episodes) // 5
        self.not_held_out, self.held_out = episodes[:cut], episodes[cut:]
        self.steps, self.env_steps, self.seconds, self.curve = 0, 0, 0.0, []
        torch.manual_seed(args.seed)

    def start(self, **parts):
        """Name all that a checkpoint holds (by state_dict); if a run is resumed, load it."""
        args, self.parts = self.args, parts
        name = f"{SCRIPT}__{args.env_id}__{args.seed}__{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
        default = Path("runs", name.replace("/", "_").replace(":", "_"))
        self.folder = Path(args.resume or args.out or default)
        self.checkpoint = self.folder / "checkpoint.pt"
        if args.resume:
            state = load(self.checkpoint)
            with explained(self.checkpoint):
                check(state["digest"] == self.digest, "what its run learnt from has changed")
                for name, part in parts.items():
                    part.load_state_dict(state["parts"][name])
                for name in self.kept:
                    setattr(self, name, type(getattr(self, name))(state[name]))
                torch.set_rng_state(state["rng"])
        else:
            check(not self.folder.exists(), f"{self.folder}: exists, expected a new folder")
            self.folder.mkdir(parents=True)
        Run.active, Run.training, Run.stopped_by = self, True, 0  # from now on a signal waits
        write(self.folder / "args.json", {"script": SCRIPT, **vars(args)})
        self.log = SummaryWriter(str(self.folder), purge_step=self.steps + 1)
        self.save()  # after SummaryWriter, which would recreate a deleted folder
        say(f"run     {self.folder}")
        hidden = args.no_progress or not os.isatty(2)
        self.bar = tqdm(total=args.total_steps, initial=self.steps, unit=" steps", disable=hidden)
        began, self.clock = self.clock, time.perf_counter()
        self.setup_seconds = self.clock - began

    def save(self):
        state = {name: getattr(self, name) for name in self.kept}
        state |= {"script": SCRIPT, "args": vars(self.args), "rng": torch.get_rng_state()}
        state["parts"] = {name: part.state_dict() for name, part in self.parts.items()}
        write(self.checkpoint, state)
        self.saved = time.perf_counter()

    def record(self, scalars, policy, best):
        """End an iteration: log it; validate, keep the best policy, save and stop when due. Raises
        Failed on a NaN."""
        args, now = self.args, self.steps
        self.seconds += time.perf_counter() - self.clock
        for tag, value in {**scalars, "charts/SPS": now / self.seconds}.items():
            if tag.startswith("losses/") and not math.isfinite(value):
                raise Failed(f"{tag} is {value} at step {now}; last checkpoint: {self.checkpoint}")
            self.log.add_scalar(tag, value, now)
        due = now >= args.total_steps or now % args.eval_every == 0
        if due:
            began, seed = time.perf_counter(), EVALUATION_SEEDS + 10_000 * args.seed
            walks = play(policy.act, args.env_id, VALIDATION * args.eval_episodes, seed)
            self.seconds += time.perf_counter() - began  # validating is part of the algorithm
            result = statistics(walks)
            if result["return_mean"] >= max(
                (x["return_mean"] for x in self.curve), default=-math.inf
            ):
                best.load_state_dict(policy.state_dict())
            for name in {"return_mean", "return_std", "success_rate"} & {*result}:
                self.log.add_scalar(f"eval/{name}", result[name], now)
            point = {"steps": now, "env_steps": self.env_steps, "wall_seconds": self.seconds}
            self.curve.append({**point, **result, **scalars})
            saved = {"script": SCRIPT, "env_id": args.env_id.split(":")[-1]}
            saved |= {"settings": best.settings, "weights": best.state_dict()}
            write(self.folder / "policy.pt", saved)
            self.bar.clear()
            say(f"{now:>9,} steps  {describe(result)}")
        if due or Run.stopped_by or time.perf_counter() - self.saved > 60:
            self.save()
        self.bar.update(min(now, args.total_steps) - self.bar.n)
        if Run.stopped_by:
            raise KeyboardInterrupt
        self.clock = time.perf_counter()  # saving does not count

    def finish(self, policy):
        """Evaluate on fresh seeds; write summary.json and the picture; print the result."""
        args, folder, Run.training = self.args, self.folder, False
        self.bar.close()
        self.log.close()
        samples = {
            "random": evaluation_episodes(None, args, args.env_id, final=True),
            "expert": self.not_held_out,
            "learner": evaluation_episodes(policy.act, args, args.env_id, final=True),
        }
        experts = self.not_held_out + self.held_out
        results = {name: statistics(episodes) for name, episodes in samples.items()}
        results["expert"] = statistics(experts)
        for name, distance in occupancy_distances(self.held_out, samples).items():
            results[name]["occupancy_distance"] = distance
            say(f"{name:8}{describe(results[name])}")
        both = (np.array([e["rewards"].sum() for e in x]) for x in (samples["learner"], experts))
        gains = np.subtract(*both)  # on the same seeds
        solved, verdict = judge(self.curve, **results)
        error = gains.std(ddof=1) / len(gains) ** 0.5
        verdict += f"; {gains.mean():+.1f} +- {error:.1f} (s.e.) relative to its expert"
        summary = {
            "script": SCRIPT,
            "args": vars(args),
            "versions": {module.__name__: module.__version__ for module in (torch, gym, np)},
            **results,
            "wall_seconds": self.seconds,
            "setup_seconds": self.setup_seconds,
            "steps": self.steps,
            "env_steps": self.env_steps,
            "solved_at_steps": solved.get("steps"),
            "solved_at_seconds": solved.get("wall_seconds"),
            "paired_differences": gains.tolist(),
            "curve": self.curve,
            "verdict": verdict,
        }
        write(folder / "summary.json", summary)
        draw(summary, folder / "learning_curve.png")
        say(f"verdict {verdict}\nrun     {folder}")
        if args.capture_video:
            film(policy, args.env_id, folder)
        return summary


def evaluate_file(args):
    """Print what a policy.pt reaches, greedy and sampled; with --out, write it there, too."""
    policy, env_id = load_policy(args.evaluate)
    env_id = args.env_id if args.env_id.endswith(f":{env_id}") else env_id
    torch.manual_seed(args.seed)
    policy.to(args.device)
    folder, results = Path(args.out or Path(args.evaluate).parent), {}
    for name in ("greedy", "sampled"):
        act = functools.partial(policy.act, sample=name == "sampled")
        with explained(args.evaluate):  # a policy whose task has other sizes
            results[name] = statistics(evaluation_episodes(act, args, env_id, final=True))
        say(f"{name:8}{describe(results[name])}, {results[name]['episodes']} episodes of {env_id}")
    if args.out:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "evaluation.json", results)
    if args.capture_video:
        film(policy, env_id, folder)


def stop(number, frame):
    """Ctrl-C or SIGTERM: let the iteration end; at once if there is none, or at the second time."""
    at_once, Run.stopped_by = Run.stopped_by or not Run.training, number
    if at_once:
        raise KeyboardInterrupt


def main(argv=None):
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # no stream, a closed one, or one of another kind
            stream.reconfigure(errors="replace")
    with contextlib.suppress(ValueError):  # only a main thread may handle signals
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
    threading.excepthook = lambda _: None  # TensorBoard's: a full disk ends the run all the same
    torch.set_num_threads(1)  # the networks are small: threads would wait for one another
    np.seterr(all="ignore")  # rewards may be infinite
    try:
        args = parse_args(argv)
        evaluate_file(args) if args.evaluate else train(args)
        return 0
    except (BadInput, Failed, OSError, UnicodeError) as error:
        say(f"{SCRIPT}.py: {error}", sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        flags = ["--resume", str(Run.active.folder)] if Run.active else sys.argv[1:]
        words = shlex.join([sys.executable, sys.argv[0], *flags])
        say(f"{SCRIPT}.py: stopped; go on with: {words}", sys.stderr)
        return 128 + (Run.stopped_by or signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
