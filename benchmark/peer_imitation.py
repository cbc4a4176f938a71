"""Train the `imitation` library's BC or GAIL on a CartPole-v1 demonstration file.

This is the peer half of a comparison: it runs the library as its documentation shows, on demos
that the caller has already selected, and writes one JSON result. It needs its own virtual
environment (imitation 1.0.1 wants Gymnasium 0.29 and stable-baselines3 2.2).

    python peer_imitation.py bc   --demos DEMOS.npz --seed 1 --out result.json
    python peer_imitation.py gail --demos DEMOS.npz --seed 1 --out result.json

DEMOS.npz holds observations (N, 4), actions (N,), episode_starts (N,), terminated (episodes,) and
rewards (N,). All N pairs are used for training; a file may hold pairs subsampled from an episode,
so neighbouring rows need not be consecutive time steps. Rewards are never read.

Training time never includes evaluation. Evaluation episodes start from seeds that training does
not use, and are the same episodes at every evaluation of one run.
"""

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from imitation.algorithms import bc
from imitation.algorithms.adversarial.gail import GAIL
from imitation.data.types import Transitions
from imitation.rewards.reward_nets import BasicRewardNet
from imitation.util import logger as imitation_logger
from imitation.util.networks import RunningNorm
from imitation.util.util import make_vec_env
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.ppo import MlpPolicy
from tqdm import tqdm

ENV_ID = "CartPole-v1"
SOLVED_RETURN = 495.0
PACKAGES = ("imitation", "stable-baselines3", "gymnasium", "torch", "numpy")


class StableEnoughError(Exception):
    """Raised from the training callback to end a GAIL run early."""


class Stopwatch:
    """Wall-clock seconds of training: runs from construction, except while paused."""

    def __init__(self):
        self._elapsed = 0.0
        self._resumed_at = time.perf_counter()

    def pause(self):
        """Stop the clock and return the seconds counted so far."""
        self._elapsed += time.perf_counter() - self._resumed_at
        return self._elapsed

    def resume(self):
        """Start the clock again."""
        self._resumed_at = time.perf_counter()


class Evaluator:
    """Plays a fixed set of episodes, one per environment, all stepped side by side."""

    def __init__(self, episodes, seed):
        # 1000 apart, so that runs with different seeds share no evaluation episode; the training
        # environments use the small seeds [seed, seed + 8).
        self.first_seed = 1_000_000 + 1_000 * seed
        self._envs = DummyVecEnv([lambda: gym.make(ENV_ID)] * episodes)

    def __call__(self, policy, deterministic=True):
        """Return the mean and standard deviation of the episode returns."""
        self._envs.seed(self.first_seed)  # environment i gets first_seed + i at the next reset
        observations = self._envs.reset()
        returns = np.zeros(self._envs.num_envs)
        running = np.ones(self._envs.num_envs, dtype=bool)
        while running.any():
            actions, _ = policy.predict(observations, deterministic=deterministic)
            observations, rewards, dones, _ = self._envs.step(actions)
            returns[running] += rewards[running]
            running &= ~dones
        return float(returns.mean()), float(returns.std())


def load_pairs(path):
    """Return the pairs of a demonstration file as the library's Transitions.

    The library insists on next observations and dones, although neither BC nor the tutorial's
    discriminator reads them. As rows may be subsampled, the true successors are unknown: each
    observation stands in for its own successor, and no row is marked as the end of an episode.
    """
    with np.load(path, allow_pickle=False) as data:
        observations = data["observations"].astype(np.float32)
        actions = data["actions"].astype(np.int64)
    if observations.ndim != 2 or observations.shape[1] != 4 or len(observations) == 0:
        raise SystemExit(f"{path}: observations have shape {observations.shape}, not (N, 4)")
    if actions.shape != (len(observations),) or not np.isin(actions, (0, 1)).all():
        raise SystemExit(f"{path}: actions must be {len(observations)} values, each 0 or 1")
    return Transitions(
        obs=observations,
        acts=actions,
        infos=np.array([{}] * len(actions)),
        next_obs=observations,
        dones=np.zeros(len(actions), dtype=bool),
    )


def versions():
    """Return what the numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def quiet_logger(folder):
    """Return a library logger that writes no table anywhere."""
    return imitation_logger.configure(folder, format_strs=[])


def train_bc(args, log_folder):
    """Behavioural cloning with the library's defaults; returns the result as a dict."""
    pairs = load_pairs(args.demos)
    # The `rng` argument only serves the library's logging rollouts. The batch order and the
    # initial weights come from torch's global generator, which is what must be seeded.
    set_random_seed(args.seed)
    env = gym.make(ENV_ID)
    # 32 is the default; the library refuses a batch larger than the demonstration. Each pass
    # over the pairs drops the last incomplete batch.
    batch_size = min(32, len(pairs))
    trainer = bc.BC(
        observation_space=env.observation_space,
        action_space=env.action_space,
        demonstrations=pairs,
        rng=np.random.default_rng(args.seed),
        batch_size=batch_size,
        custom_logger=quiet_logger(log_folder),
    )
    clock = Stopwatch()
    trainer.train(n_batches=args.batches, progress_bar=False)
    train_seconds = clock.pause()

    evaluate = Evaluator(args.eval_episodes, args.seed)
    greedy_mean, greedy_std = evaluate(trainer.policy)
    sampled_mean, sampled_std = evaluate(trainer.policy, deterministic=False)
    return {
        "algorithm": "bc",
        "seed": args.seed,
        "pairs": len(pairs),
        "batches": args.batches,
        "batch_size": batch_size,
        "return_mean": greedy_mean,
        "return_std": greedy_std,
        "sampled_return_mean": sampled_mean,
        "sampled_return_std": sampled_std,
        "eval_episodes": args.eval_episodes,
        "eval_first_seed": evaluate.first_seed,
        "train_seconds": train_seconds,
        "versions": versions(),
    }


def make_gail(pairs, seed, log_folder):
    """Build the trainer of the library's own GAIL tutorial, on CartPole-v1.

    The tutorial uses seals/CartPole-v0, whose episodes all last 500 steps. CartPole-v1 ends an
    episode when the pole falls, so the library has to be told that this is intended.
    """
    envs = make_vec_env(ENV_ID, rng=np.random.default_rng(seed), n_envs=8)
    learner = PPO(
        env=envs,
        policy=MlpPolicy,
        batch_size=64,
        ent_coef=0.0,
        learning_rate=0.0004,
        gamma=0.95,
        n_epochs=5,
        seed=seed,  # also seeds numpy's and torch's global generators, which the library draws on
    )
    reward_net = BasicRewardNet(
        observation_space=envs.observation_space,
        action_space=envs.action_space,
        normalize_input_layer=RunningNorm,
    )
    # Both are off by default; turned on, they would read the stand-ins made by load_pairs.
    assert not (reward_net.use_next_state or reward_net.use_done)
    return GAIL(
        demonstrations=pairs,
        # The tutorial's 1024 comes with 60 episodes. The library refuses a batch larger than the
        # demonstration, and takes one of equal size: with a single 500-step episode the batch is
        # therefore all 500 pairs. (An equal number of generator samples is drawn with
        # replacement from the replay buffer, so its capacity sets no limit here.)
        demo_batch_size=min(1024, len(pairs)),
        gen_replay_buffer_capacity=512,
        n_disc_updates_per_round=8,
        venv=envs,
        gen_algo=learner,
        reward_net=reward_net,
        allow_variable_horizon=True,
        custom_logger=quiet_logger(log_folder),
    )


def first_of_solved_tail(curve):
    """Return the earliest point from which every evaluation is solved, or None."""
    first = None
    for point in reversed(curve):
        if point["return_mean"] < SOLVED_RETURN:
            break
        first = point
    return first


def train_gail(args, log_folder):
    """GAIL with the library's CartPole tutorial settings; returns the result as a dict."""
    pairs = load_pairs(args.demos)
    trainer = make_gail(pairs, args.seed, log_folder)
    learner = trainer.gen_algo
    evaluate = Evaluator(args.eval_episodes, args.seed)
    curve = []
    multiples_reached = 0
    solved_in_a_row = 0

    def after_round(_):
        # The library calls back once per round (8 environments x 2048 steps = 16384 steps), and
        # the policy changes only then, so that is also the finest useful evaluation interval.
        nonlocal multiples_reached, solved_in_a_row
        reached = learner.num_timesteps // args.eval_every
        if reached == multiples_reached:
            return
        multiples_reached = reached
        wall_seconds = clock.pause()
        mean, std = evaluate(learner.policy)
        curve.append(
            {
                "env_steps": learner.num_timesteps,
                "wall_seconds": wall_seconds,
                "return_mean": mean,
                "return_std": std,
            }
        )
        # Not print(): the library draws a progress bar on the same terminal.
        tqdm.write(f"{learner.num_timesteps} steps, {wall_seconds:.1f} s: {mean:.1f} +- {std:.1f}")
        solved_in_a_row = solved_in_a_row + 1 if mean >= SOLVED_RETURN else 0
        if solved_in_a_row == args.stop_when_stable > 0:
            raise StableEnoughError
        clock.resume()

    clock = Stopwatch()
    stopped_early = False
    try:
        trainer.train(args.total_steps, callback=after_round)
        wall_seconds = clock.pause()
    except StableEnoughError:
        stopped_early = True
        wall_seconds = curve[-1]["wall_seconds"]

    solved = first_of_solved_tail(curve)
    return {
        "algorithm": "gail",
        "seed": args.seed,
        "pairs": len(pairs),
        "demo_batch_size": trainer.demo_batch_size,
        "steps_per_round": trainer.gen_train_timesteps,
        "curve": curve,
        "solved_at_env_steps": solved["env_steps"] if solved else None,
        "solved_at_seconds": solved["wall_seconds"] if solved else None,
        "stopped_early": stopped_early,
        "wall_seconds": wall_seconds,
        "env_steps": learner.num_timesteps,
        "eval_episodes": args.eval_episodes,
        "eval_first_seed": evaluate.first_seed,
        "versions": versions(),
    }


def positive(text):
    """Argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def parse_args():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--demos", type=Path, required=True, help="demonstration file (.npz)")
    common.add_argument("--seed", type=int, required=True)
    common.add_argument("--out", type=Path, required=True, help="result file (.json)")
    common.add_argument("--eval-episodes", type=positive, default=100)

    cloning = commands.add_parser("bc", parents=[common], help="behavioural cloning")
    cloning.add_argument("--batches", type=positive, default=2000, help="gradient steps")
    cloning.set_defaults(train=train_bc)

    gail = commands.add_parser("gail", parents=[common], help="adversarial imitation")
    gail.add_argument(
        "--total-steps",
        type=positive,
        default=300_000,
        help="environment steps at most: the library only runs whole rounds of 16384",
    )
    gail.add_argument(
        "--eval-every",
        type=positive,
        default=8192,
        help="evaluate at the end of each round that reaches a new multiple of this many steps",
    )
    gail.add_argument(
        "--stop-when-stable",
        type=int,
        default=0,
        metavar="K",
        help=f"stop after K evaluations in a row of at least {SOLVED_RETURN:.0f} (0: never)",
    )
    gail.set_defaults(train=train_gail)

    args = parser.parse_args()
    if args.command == "gail" and args.stop_when_stable < 0:
        parser.error("--stop-when-stable must not be negative")
    return args


def main():
    """Train, evaluate, and write the result file."""
    args = parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as log_folder:
        result = args.train(args, log_folder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
