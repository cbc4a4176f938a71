"""Behavioural cloning on CartPole: imitate an expert by classifying its actions.

The oldest form of imitation learning (Pomerleau 1991, https://doi.org/10.1162/neco.1991.3.1.88):
    repeat  draw a minibatch of the expert's (state, action) pairs
            take a step on -log pi(action | state)
No environment is stepped. Nothing teaches the policy what to do in states the expert never visited:
its errors lead it there, and there it makes more of them (Ross & Bagnell 2010). So its accuracy on
held-out pairs, all from states the expert did visit, can be high even though the pole falls.

    python bc_cartpole.py --updates 500             a look around: a second of training
    python bc_cartpole.py --num-demos 4             the default budget on four demonstrations
    python bc_cartpole.py --resume runs/FOLDER      resume a run where it stopped

Expect a return of about 460 of 500 from one demonstration, 500 from four, and 300 from 30 pairs
(--num-pairs 30), after a few seconds of training; the table is in docs/bc_cartpole.md.
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TASKS = {"CartPole-v1": 495.0, "CartPole-v0": 198.0}  # solved if METRIC >= this
# The metric, the unit of progress, the flag that limits it, and how often to evaluate:
METRIC, CLOCK, BUDGET, EVAL_EVERY = "return_mean", "updates", "updates", 500
EVAL_ENVS, NUM_DEMOS = 500, 1
DEMOS = "{env_id}_{expert}.npz"  # in experts/; if missing, made in --out
LOG_EVERY = 100  # updates


def add_settings(parser):
    """The algorithm's flags. `number`, like `check`, `tensors` and `Run`, is in the harness."""
    flag = parser.add_argument_group("algorithm").add_argument
    flag("--expert", choices=("ppo", "dqn"), default="ppo", help="trained by stable-baselines3")
    flag("--updates", type=number(int, 1), default=2_000, help="steps of the optimizer")
    flag("--batch-size", type=number(int, 1), default=64, help="pairs per step, with replacement")
    flag("--learning-rate", type=number(float, 0), default=3e-3, help="step size of Adam")
    flag("--hidden", type=number(int, 1, 4_096), default=64, help="width of the two hidden layers")


# --- networks and loss ----------------------------------------------------------------------------


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


def behavioural_cloning_loss(policy, observations, actions):
    """Minus the mean log-likelihood of the expert's actions: (batch, ...) twice -> ()."""
    return -policy(observations).log_prob(actions).mean()


def accuracy(policy, observations, actions):
    """The share of pairs whose greedy action is the expert's: (pairs, 4), (pairs,) -> float."""
    return float(np.mean(policy.act(observations) == actions.cpu().numpy()))


# --- environment and expert -----------------------------------------------------------------------


def make_envs(env_id, num_envs):
    """CHANGE ME: the task. This one resets an environment on the step AFTER an episode's last."""
    envs = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point")
    assert envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    return envs


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


def train(args):
    """Run the algorithm; returns what summary.json holds."""
    run = Run(args)
    observations, actions = tensors(run.demos, args.device)
    held_out = tensors(run.held_out, args.device) if run.held_out else None
    policy = Policy(args.hidden).to(args.device)
    optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, fused=True)
    run.start(policy=policy, optimizer=optimizer)

    while not run.finished:
        until_logged = LOG_EVERY - run.count["updates"] % LOG_EVERY
        for _ in range(min(until_logged, args.updates - run.count["updates"])):
            rows = torch.randint(len(actions), (args.batch_size,))
            loss = behavioural_cloning_loss(policy, observations[rows], actions[rows])
            descend(optimizer, loss)
            run.count["updates"] += 1
        scalars = {
            "losses/policy": float(loss.detach()),
            "accuracy/demonstrations": accuracy(policy, observations, actions),
        }
        if held_out:
            scalars["accuracy/held_out"] = accuracy(policy, *held_out)
        run.record(scalars, policy)
    return run.finish(policy)


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
