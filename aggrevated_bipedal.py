"""AggreVaTeD on BipedalWalker: learn to walk from an expert that can be queried, and surpass it.

AggreVaTeD (Sun et al. 2017, https://arxiv.org/abs/1703.01030, Algorithm 1) improves the learner, in
the states that it visits, using the expert's cost-to-go; here rewards take the place of costs:
    1. roll in: each trajectory is walked by the expert (with probability alpha) or the learner up
       to a random time; from there the expert walks to the end, to show what its actions lead to,
    2. fit Q*, the value of an action if the expert takes over after it, to all transitions so far,
    3. increase A*(s, a) = Q*(s, a) - V*(s) of the learner's own actions in the visited states,
    4. validate, and keep the best policy.
DAgger (Ross et al. 2011) imitates the expert's actions in these states: `--algorithm dagger`.

    python aggrevated_bipedal.py --iterations 2            a look around
    python aggrevated_bipedal.py                           the weak expert: five to nine minutes
    python aggrevated_bipedal.py --resume runs/FOLDER      resume a run where it stopped

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
import copy
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import signal
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
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TASKS = {"BipedalWalker-v3": 300.0, "BipedalWalkerHardcore-v3": 300.0}  # solved if METRIC >= this
# The metric, the unit of progress, the flag that limits it, and how often to evaluate:
METRIC, CLOCK, BUDGET, EVAL_EVERY = "return_mean", "updates", "iterations", 4
EVAL_ENVS = 50
DEFAULTS = {  # for each of TASKS, in their order; the hardcore course is harder to fit
    "expert": ("weak", "good"),
    "iterations": (20, 12),
    "num_envs": (20, 80),
    "noise": (0.5, 0.3),
    "critic_hidden": (128, 256),
    "critic_updates": (1_000, 4_000),
    "policy_updates": (3_000, 5_000),
    "standardize": (False, True),
    "hidden": (128, 512),
    "caution": (1.5, 0.5),
    "anchor": (4.0, 8.0),
}
LEAST_DEVIATION = 0.1  # when standardizing, so that nothing is scaled more than tenfold
FALL = -100.0  # the task's reward for a fall; any other step pays or costs a fraction of 1


def add_settings(parser):
    """The algorithm's flags. `number`, like `check`, `read` and `Run`, is in the harness."""

    def by_task(help, name):
        level, hardcore = DEFAULTS[name]
        return f"{help} (default: {level}, on the hardcore course {hardcore})"

    flag = parser.add_argument_group("expert").add_argument
    shipped = "weak or good (shipped; hardcore: good), or a .zip of stable-baselines3's SAC or TD3"
    flag("--expert", metavar="NAME", help=by_task(shipped, "expert"))
    flag("--expert-episodes", type=number(int, 5, 500), default=100, help="to measure its score")
    few = "to select the best policy; where falls are rare, with few episodes luck decides"
    flag("--validation-episodes", type=number(int, 2, 500), default=200, help=few)
    flag = parser.add_argument_group("roll-in").add_argument
    three = "of roll-in, refit and improvement"
    flag("--iterations", type=number(int, 1), help=by_task(three, "iterations"))
    one = "environments, one trajectory each"
    flag("--num-envs", type=number(int, 1, 10_000), help=by_task(one, "num_envs"))
    mixing = "iterations over which alpha, the expert's share of roll-ins, falls from 1 to 0"
    flag("--mixing", type=number(int, 1), default=5, help=mixing)
    noise = "largest standard deviation of the noise on roll-in actions; 0: none"
    flag("--noise", type=number(float, 0), help=by_task(noise, "noise"))
    longest = "the expert takes over after a random number of steps below this"
    flag("--switch", type=number(int, 1), default=1_000, help=longest)
    flag = parser.add_argument_group("Q*").add_argument
    refit = "fit Q* to the transitions seen; otherwise the critics in the expert's file are used"
    flag("--refit-critic", action=argparse.BooleanOptionalAction, default=True, help=refit)
    flag("--critics", type=number(int, 2), default=2, help="how many to fit; spread = uncertainty")
    layers = "hidden layers' width"
    flag("--critic-hidden", type=number(int, 1, 4_096), help=by_task(layers, "critic_hidden"))
    per = "per iteration"
    flag("--critic-updates", type=number(int, 0), help=by_task(per, "critic_updates"))
    flag("--critic-lr", type=number(float, 0), default=5e-4, help="step size of Adam")
    flag("--gamma", type=number(float, 0, 0.9999), default=0.99, help="discount factor")
    flag = parser.add_argument_group("policy").add_argument
    dagger = "dagger only imitates: no Q*, and in roll-ins no noise and no takeover by the expert"
    flag("--algorithm", choices=("aggrevated", "dagger"), default="aggrevated", help=dagger)
    flag("--policy-updates", type=number(int, 1), help=by_task(per, "policy_updates"))
    flag("--policy-lr", type=number(float, 0), default=2e-3, help="step size of Adam")
    anneal = "let --policy-lr fall to 0 in each iteration"
    flag("--anneal", action=argparse.BooleanOptionalAction, default=True, help=anneal)
    flag("--batch-size", type=number(int, 1), default=256, help="for both updates")
    standard = by_task("the networks' inputs, by the expert's first trajectories", "standardize")
    flag("--standardize", action=argparse.BooleanOptionalAction, help=standard)
    width = "width of the two hidden layers"
    flag("--hidden", type=number(int, 1, 4_096), help=by_task(width, "hidden"))
    flag("--std", type=number(float, 1e-3, 2), default=0.1, help="of the actions, before tanh")
    caution = "standard deviations of the critics to subtract from their mean: a lower bound"
    flag("--caution", type=number(float, 0), help=by_task(caution, "caution"))
    anchor = "weight of the squared distance to the expert's action (behaviour regularisation)"
    flag("--anchor", type=number(float, 0), help=by_task(anchor, "anchor"))


# --- networks -------------------------------------------------------------------------------------


def relu_mlp(*sizes):
    """Linear layers with ReLU between them: (..., sizes[0]) -> (..., sizes[-1])."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Standardize(nn.Module):
    """(x - mean) / max(deviation, LEAST_DEVIATION), of a sample: (..., size) -> (..., size)."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))

    def measure(self, sample):
        self.mean.copy_(sample.mean(0))
        self.deviation.copy_(sample.std(0).clamp(min=LEAST_DEVIATION))

    def forward(self, x):
        return (x - self.mean) / self.deviation


class Actor(nn.Module):
    """Has a `network`; the tanh of its output is the greedy action: (..., 24) -> (..., 4)."""

    def greedy(self, observations):
        return self.network(observations).tanh()

    @torch.no_grad()
    def act(self, observations):
        """The greedy actions, NumPy in and out: (batch, 24) -> (batch, 4)."""
        device = self.network[-1].weight.device
        return self.greedy(torch.as_tensor(observations, device=device)).cpu().numpy()


class Policy(Actor):
    """CHANGE ME: a squashed Gaussian; observations (..., 24) -> a distribution over (..., 4)."""

    def __init__(self, hidden, std):
        super().__init__()
        self.settings = {"hidden": hidden, "std": std}
        self.network = nn.Sequential(Standardize(24), *relu_mlp(24, hidden, hidden, 4))

    def forward(self, observations):
        gaussian = Normal(self.network(observations), self.settings["std"], validate_args=False)
        return TransformedDistribution(gaussian, TanhTransform(cache_size=1), validate_args=False)


class Critics(nn.Module):
    """Several networks for Q*(s, a): (batch, 24), (batch, 4) -> (networks, batch)."""

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.standardize = Standardize(self.networks[0][0].in_features)

    def forward(self, observations, actions):
        pairs = self.standardize(torch.cat([observations, actions], -1))
        return torch.stack([network(pairs).squeeze(-1) for network in self.networks])


class Expert(Actor):
    """The greedy actor and the critics of a stable-baselines3 SAC or TD3, from its weights.

    `weights` are named as in that model. Anything else raises KeyError, IndexError or
    RuntimeError."""

    def __init__(self, weights):
        super().__init__()
        layers = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
        actor = [x for x in layers if x.startswith("actor.") and not x.endswith("log_std")]
        self.network = self.network_of(weights, actor)
        self.critics = Critics(
            self.network_of(weights, [f"critic.qf{i}.{j}" for j in range(0, 2 * len(actor), 2)])
            for i in range(2)
        )

    @staticmethod
    def network_of(weights, names):
        shapes = [weights[f"{name}.weight"].shape for name in names]
        network = relu_mlp(shapes[0][1], *(outputs for outputs, _ in shapes))
        for layer, name in zip(network[::2], names):
            layer.load_state_dict({k: weights[f"{name}.{k}"].float() for k in ("weight", "bias")})
        return network


# --- mathematics ----------------------------------------------------------------------------------


def discounted_returns(rewards, gamma):
    """The cost-to-go, with rewards in place of costs: sum of gamma^k r_{t+k}; (steps,) both."""
    returns = torch.zeros_like(rewards)
    following = torch.zeros(())
    for step in reversed(range(len(rewards))):
        following = returns[step] = rewards[step] + gamma * following
    return returns


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


def correlation(x, y):
    """Pearson's; 0 where one of them does not vary: (n,) twice -> float."""
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-12))


# --- environment and expert -----------------------------------------------------------------------


class Walkers:
    """One episode in each of several environments; a walker whose episode is over rests.

    Reset it only once: Box2D remembers what went before, and a second episode with the same seed
    may turn out differently."""

    def __init__(self, env_id, num_envs):
        self.envs = [gym.make(env_id) for _ in range(num_envs)]
        self.num_envs = num_envs
        self.action_space = batch_space(self.envs[0].action_space, num_envs)

    def reset(self, seed):
        resets = [env.reset(seed=seed + i) for i, env in enumerate(self.envs)]
        self.observations = np.stack([observation for observation, _ in resets])
        self.over = np.zeros(self.num_envs, bool)
        return self.observations.copy(), {}

    def step(self, actions):
        """Like a vector environment's. Raises Failed on a NaN, which would make Box2D abort.

        Ctrl-C waits for the step to end: inside Box2D it may turn into a TypeError."""
        if actions.shape != (len(self.envs), *self.action_space.shape[1:]):
            raise Failed(
                f"actions {actions.shape} of {len(self.envs)} open walkers, expected 4 each"
            )
        if not np.isfinite(actions).all():
            raise Failed("an action is NaN or infinite, expected numbers in [-1, 1]")
        rewards, pressed = np.zeros(self.num_envs), []
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
        try:
            for i in np.flatnonzero(~self.over):
                step = self.envs[i].step(actions[i])
                self.observations[i], rewards[i], terminated[i], truncated[i], _ = step
        finally:
            signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)
        self.over |= terminated | truncated
        return self.observations.copy(), rewards, terminated, truncated, {}

    def close(self):
        while self.envs:
            self.envs.pop().close()


def make_envs(env_id, num_envs):
    """CHANGE ME: the task, FALL (the only end with value 0), and the sizes 24, 4 and 28."""
    return Walkers(env_id, num_envs)


def make_expert(args):
    """CHANGE ME: the expert, from a file that is never unpickled."""

    def load(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            check(size < 2**28, "unpacks to more than 256 MB")
            about = json.loads(archive.read("data"))
            file = io.BytesIO(archive.read("policy.pth"))
            weights = torch.load(file, weights_only=True, map_location="cpu")
        trained_on = about.get("env_id", args.env_id)  # stable-baselines3 does not say
        check(trained_on == args.env_id, f"an expert for {trained_on}, expected {args.env_id}")
        check(not about.get("use_sde"), "uses gSDE, expected a plain SAC or TD3")
        activation = str(dict(about.get("policy_kwargs") or {}).get("activation_fn", ".ReLU'"))
        check(".ReLU'" in activation, f"layers with {activation}, expected ReLU")
        critics = {name.split(".")[1] for name in weights if name.startswith("critic.")}
        check(critics == {"qf0", "qf1"}, f"critics {sorted(critics)}, expected ['qf0', 'qf1']")
        expert = Expert(weights)
        check_finite(expert)
        observations, actions = torch.zeros(1, 24), torch.zeros(1, 4)
        check(expert.greedy(observations).shape == actions.shape, "wrong action size, expected 4")
        values = expert.critics(observations, actions).shape
        check(values == (2, 1), f"critics with outputs {tuple(values)}, expected two with one each")
        return expert.requires_grad_(False)

    shipped = Path(__file__).parent / "experts" / f"{args.env_id}_{args.expert}.zip"
    path = shipped if args.expert in ("good", "weak") else Path(args.expert)
    return read(path, load).to(args.device)


@torch.no_grad()
def roll_in(envs, policy, expert, alpha, args):
    """One trajectory from each environment, one after the other: a dict of (steps, ...).

    Each is started by the expert (with probability alpha) or the learner, with noise on the
    actions. From a random step below --switch on, the expert alone walks it to its end: `tail`.
    DAgger's have neither noise nor tail."""
    below = EVALUATION_SEEDS - envs.num_envs  # evaluation's seeds are never trained on
    observations, _ = envs.reset(seed=int(torch.randint(below, ())))
    by_expert = torch.rand(envs.num_envs, 1) < alpha
    switch = torch.randint(args.switch, (envs.num_envs, 1))
    scale = args.noise * torch.rand(envs.num_envs, 1)
    if args.algorithm == "dagger":
        switch[:], scale[:] = 10**9, 0.0
    noise, frames, running = torch.randn(envs.num_envs, 4), [], []
    while not envs.over.all():
        running.append(~envs.over)
        seen = torch.as_tensor(observations, device=args.device)
        expert_actions, greedy = expert.greedy(seen).cpu(), policy.greedy(seen).cpu()
        chosen = torch.where(by_expert, expert_actions, greedy) + scale * noise
        tail = len(frames) >= switch
        actions = torch.where(tail, expert_actions, chosen.clamp(-1, 1)).numpy()
        noise = 0.8 * noise + 0.6 * torch.randn_like(noise)  # correlated in time, deviation 1
        frame = {"observations": observations, "actions": actions, "tail": tail[:, 0].numpy()}
        frame["expert_actions"] = expert_actions.numpy()
        observations, rewards, *_ = envs.step(actions)
        frame |= {"next_observations": observations, "rewards": rewards.astype(np.float32)}
        frames.append({**frame, "fell": rewards <= FALL})
    envs.close()
    running = np.stack(running, 1)  # (envs, steps): picks the steps of one trajectory after another
    columns = {name: np.stack([frame[name] for frame in frames], 1) for name in frames[0]}
    batch = {name: torch.as_tensor(column[running]) for name, column in columns.items()}
    batch["last"] = torch.zeros(len(batch["rewards"]), dtype=torch.bool)
    batch["last"][torch.as_tensor(running.sum(1).cumsum() - 1)] = True
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


# --- training -------------------------------------------------------------------------------------


def cost_to_go(batch, gamma):
    """For logging only: where the expert's cost-to-go is known, and the returns: (steps,) both.

    It is known in the expert's tail. If that ends without a fall, the rewards stop although Q*
    assumes that the walk goes on, so its last 5 / (1 - gamma) steps are left out."""
    known, returns, begin = torch.zeros_like(batch["tail"]), [], 0
    for end in (batch["last"].nonzero()[:, 0] + 1).tolist():
        returns.append(discounted_returns(batch["rewards"][begin:end], gamma))
        until = end if batch["fell"][end - 1] else max(begin, end - round(5 / (1 - gamma)))
        known[begin:until] = batch["tail"][begin:until]
        begin = end
    return known, torch.cat(returns)


@torch.no_grad()
def agreement(critics, batch, args):
    """Correlation of Q* with the cost-to-go that followed, over the expert's steps of `batch`."""
    known, returns = cost_to_go(batch, args.gamma)
    pairs = (batch[name][known].to(args.device) for name in ("observations", "actions"))
    return correlation(critics(*pairs).mean(0).cpu(), returns[known])


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def refit(critics, target, optimizer, transitions, args):
    """Fitted Q evaluation, continued on all transitions so far; returns the last loss."""
    loss = torch.zeros(())
    for _ in range(args.critic_updates):
        batch = transitions.sample(args.batch_size, args.device)
        loss = fitted_q_loss(critics, target.module, batch, args.gamma)
        descend(optimizer, loss)
        target.update_parameters(critics)
    return {"losses/critics": float(loss.detach())}


def improve(policy, critics, optimizer, transitions, weight, args):
    """Step 3, on the states of all trajectories so far; returns the mean loss."""
    critics.requires_grad_(False)  # saves computing their gradients
    total = torch.zeros((), device=args.device)
    for update in range(args.policy_updates):
        if args.anneal:
            left = 1 - update / args.policy_updates
            optimizer.param_groups[0]["lr"] = args.policy_lr * left
        batch = transitions.sample(args.batch_size, args.device)
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
    """Run the algorithm; returns what summary.json holds."""
    run = Run(args)
    expert = run.expert
    policy = Policy(args.hidden, args.std).to(args.device)
    best = copy.deepcopy(policy)
    critics = expert.critics
    if args.refit_critic:
        sizes = (28, args.critic_hidden, args.critic_hidden, 1)
        critics = Critics(relu_mlp(*sizes) for _ in range(args.critics)).to(args.device)
    ema = get_ema_multi_avg_fn(0.95)  # with 0.99 Q* rises too slowly
    target = AveragedModel(critics, multi_avg_fn=ema)
    transitions = Transitions()
    optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critics.parameters(), args.critic_lr, fused=True)
    networks = {"policy": policy, "best": best, "critics": critics, "target": target}
    optimizers = {"optimizer": optimizer, "critic_optimizer": critic_optimizer}
    run.start(**networks, **optimizers, transitions=transitions)

    while not run.finished:
        alpha = max(0.0, 1 - run.count["updates"] / args.mixing)
        envs = make_envs(args.env_id, args.num_envs)
        batch = roll_in(envs, policy, expert, alpha, args)
        if args.standardize and run.count["updates"] == 0:  # the expert began all
            policy.network[0].measure(batch["observations"])
            if args.refit_critic:
                pairs = torch.cat([batch["observations"], batch["actions"]], -1)
                critics.standardize.measure(pairs)
                target.module.load_state_dict(critics.state_dict())  # for the first update
        transitions.add(batch)
        run.count["env_steps"] += len(batch["rewards"])
        run.count["updates"] += 1  # one iteration

        scalars = {"charts/alpha": alpha, "charts/falls": float(batch["fell"].sum())}
        if args.algorithm == "aggrevated":
            scalars["critics/correlation_before"] = agreement(critics, batch, args)
            if args.refit_critic:
                scalars |= refit(critics, target, critic_optimizer, transitions, args)
            scalars["critics/correlation_after"] = agreement(critics, batch, args)
        weight = 1 - alpha  # at first the learner only imitates
        scalars |= improve(policy, critics, optimizer, transitions, weight, args)
        run.record(scalars, policy, best)
    return run.finish(best)


# ==================================================================================================
# The harness: flags, evaluation, run folder, main. It is no part of the algorithm, so read it once.
# It is the other scripts' harness, except where this script queries an expert in place of reading
# demonstrations, and where it validates. From above it uses TASKS, METRIC, CLOCK, BUDGET,
# EVAL_EVERY, EVAL_ENVS, DEFAULTS, add_settings, Policy, make_envs, make_expert and train.
# ==================================================================================================

SCRIPT = Path(__file__).stem
EVALUATION_SEEDS = 1_000_000  # evaluation seeds begin here, apart from training's
MAY_CHANGE = {BUDGET, "resume", "eval_episodes", "capture_video", "render", "out"}
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
    flag("--eval-every", type=number(int, 1), default=EVAL_EVERY, help=f"how often, in {BUDGET}")
    flag("--eval-episodes", type=number(int, 2, 500), default=100, help="greedy, on unseen seeds")
    flag("--evaluate", metavar="FILE", help="evaluate this policy.pt and stop")
    flag("--resume", metavar="RUN_FOLDER", help="resume that run; its budget may be raised")
    flag("--out", default="runs", help="the folder that run folders go into")
    flag("--run-name", help="the run folder (default: script, seed, date and time)")
    flag("--capture-video", action="store_true", help="at the end, MP4s of three episodes")
    flag("--render", action="store_true", help="at the end, three episodes in a window")
    flag("--device", choices=("cpu", "cuda", "auto"), default="cpu", help="cpu is fast enough")
    flag("--num-threads", type=number(int, 1), default=1, help="for torch; one is fastest here")
    flag("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    check("" not in (args.resume, args.evaluate), "--resume or --evaluate: expected a name")
    if args.resume:
        saved = read(Path(args.resume, "checkpoint.pt"), read_checkpoint)["args"]
        args = parser.parse_args(argv, argparse.Namespace(**saved))
        fixed = [k for k in saved if getattr(args, k) != saved[k] and k not in MAY_CHANGE]
        check(not fixed, f"--resume {args.resume}: {', '.join(fixed)} cannot be changed")
    for name, defaults in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, dict(zip(TASKS, defaults))[args.env_id])
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


def tensors(episodes, device="cpu"):
    """The observations and the actions of all episodes: (pairs, ...) both."""
    names = ("observations", "actions")
    arrays = (np.concatenate([episode[name] for episode in episodes]) for name in names)
    return [torch.as_tensor(array, device=device) for array in arrays]


# --- run folder -----------------------------------------------------------------------------------


class Run:
    """One run: its expert, folder, log, curve, checkpoints and result."""

    latest = None  # for the command that Ctrl-C prints

    def __init__(self, args):
        began = time.perf_counter()
        self.args, self.curve, self.seconds = args, [], 0.0
        self.count = {"env_steps": 0, "updates": 0, "evaluated": 0}
        name = args.run_name or f"{SCRIPT}__{args.seed}__{datetime.now():%Y-%m-%d_%H-%M-%S}"
        self.folder = Path(args.resume or Path(args.out, name))
        fresh = args.resume or not self.folder.exists()
        check(fresh, f"{self.folder}: exists already, expected a new folder")
        self.expert = make_expert(args)
        weights = (x.cpu().numpy().tobytes() for x in self.expert.state_dict().values())
        self.digest = sha256(b"".join(weights)).hexdigest()
        seed = EVALUATION_SEEDS + 1_000 * args.seed + 500  # as in the final evaluation, for pairing
        episodes = play(self.expert.act, args.env_id, args.expert_episodes, seed)
        print(f"expert  {describe(statistics(episodes))}, {len(episodes)} episodes", flush=True)
        cut = len(episodes) - len(episodes) // 5
        self.not_held_out, self.held_out = episodes[:cut], episodes[cut:]
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

    def record(self, scalars, policy, best):
        """End an iteration: log it, validate and save when due. Raises Failed on a NaN loss."""
        now, every = self.count[CLOCK], self.args.eval_every
        self.seconds = time.perf_counter() - self.clock
        for tag, value in {**scalars, "charts/SPS": now / self.seconds}.items():
            if tag.startswith("losses/") and not math.isfinite(value):
                last = f"last checkpoint: {self.folder / 'checkpoint.pt'}"
                raise Failed(f"{tag} is {value} at {now} {CLOCK}; {last}")
            self.log.add_scalar(tag, value, now)
        due = self.finished or now // every > self.count["evaluated"] // every
        if due:
            result = self.evaluate(policy, 0, self.args.validation_episodes)
            self.seconds = time.perf_counter() - self.clock
            if result[METRIC] >= max([point[METRIC] for point in self.curve], default=-math.inf):
                best.load_state_dict(policy.state_dict())
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
        self.clock = time.perf_counter() - self.seconds  # saving does not count

    def evaluate(self, policy, offset, episodes):
        seed = EVALUATION_SEEDS + 1_000 * self.args.seed + offset
        self.played = play(policy.act, self.args.env_id, episodes, seed)
        return statistics(self.played)

    def finish(self, policy):
        """Evaluate on fresh seeds; write policy.pt, summary.json and the plot; print the result."""
        args, folder, env_id = self.args, self.folder, self.args.env_id
        self.bar.close()
        self.log.close()
        saved = {"script": SCRIPT, "env_id": env_id, "network": policy.settings}
        saved["weights"] = policy.state_dict()
        write(folder / "policy.pt", lambda file: torch.save(saved, file))
        results = {"learner": self.evaluate(policy, 500, args.eval_episodes)}
        samples = {"learner": self.played, "expert": self.not_held_out}
        samples["random"] = play(None, env_id, args.eval_episodes, EVALUATION_SEEDS)
        results["random"] = statistics(samples["random"])
        experts = self.not_held_out + self.held_out
        results["expert"] = statistics(experts)
        distances = occupancy_distances(env_id, self.held_out, samples)
        for name, result in results.items():
            result["occupancy_distance"] = distances[name]
        both = ([e["rewards"].sum() for e in episodes] for episodes in (self.played, experts))
        gains = np.array([ours - theirs for ours, theirs in zip(*both)])  # on the same seeds
        solved, verdict = self.judge(results["learner"])
        error = gains.std(ddof=1) / len(gains) ** 0.5
        verdict += f"; {gains.mean():+.1f} +- {error:.1f} (s.e.) relative to its expert"
        summary = {"script": SCRIPT, "args": vars(args), "versions": versions(), **results}
        summary |= {name: self.count[name] for name in ("env_steps", "updates")}
        summary |= {"wall_seconds": self.seconds, "setup_seconds": self.setup_seconds}
        summary |= {"paired_differences": gains.tolist(), "curve": self.curve}
        summary["solved_at_env_steps"] = solved.get("env_steps")
        summary["solved_at_seconds"] = solved.get("wall_seconds")
        summary["verdict"] = verdict
        write_json(folder / "summary.json", summary)
        draw(summary, folder / "learning_curve.png")
        show(policy, args, folder)
        for name in ("random", "expert", "learner"):
            print(f"{name:8}{describe(results[name])}")
        print(f"verdict {summary['verdict']}\nrun     {folder}")
        return summary

    def judge(self, learner):
        """The validation that solved it (the first good one, or else the best), and a verdict.

        The first is empty if the kept policy is not good in the final evaluation."""
        good = TASKS[self.args.env_id]
        if learner[METRIC] < good:
            return {}, f"not solved: {METRIC} {learner[METRIC]:.4g} of {good:g}"
        kept = max(self.curve, key=lambda point: point[METRIC])
        first = next((point for point in self.curve if point[METRIC] >= good), kept)
        return first, f"solved at {first[CLOCK]:,} {BUDGET}, {first['wall_seconds']:.1f} s"


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
        if args.evaluate:
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
