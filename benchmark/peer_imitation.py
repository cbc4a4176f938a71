"""Train the `imitation` library's BC or GAIL on a task: the other half of peers.py.

    python peer_imitation.py bc      --demos PAIRS.npz --seed 1 --out result.json
    python peer_imitation.py gail    --demos PAIRS.npz --seed 1 --out result.json
    python peer_imitation.py bc+gail --demos PAIRS.npz --seed 1 --out result.json --env-id Hopper-v4

It runs the library as its documentation shows, and needs a virtual environment of its own: see
requirements-peer.txt. PAIRS.npz holds observations (N, ...) and actions (N, ...), drawn by
peers.py from the demonstrations; neighbouring rows need not be consecutive steps. With `bc+gail`
the policy is cloned first, and GAIL goes on with it.

Evaluation is not counted in the seconds. Its episodes start from seeds that training does not use,
and are the same at every evaluation of a run.
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
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.ppo import MlpPolicy

PACKAGES = ("imitation", "stable-baselines3", "gymnasium", "torch", "numpy")


def evaluate(policy, args):
    """The mean return of greedy episodes, one in each environment, stepped side by side."""
    envs = DummyVecEnv([lambda: gym.make(args.env_id)] * args.eval_episodes)
    envs.seed(1_000_000 + 1_000 * args.seed)  # no episode twice in runs of different seeds
    mean, _ = evaluate_policy(policy, envs, args.eval_episodes, warn=False)  # no Monitor needed
    return float(mean)


def load_pairs(path):
    """The pairs as the library's Transitions.

    The library insists on next observations and dones, although neither BC nor the tutorial's
    discriminator reads them. Rows are subsampled, so the true successors are unknown: each
    observation stands in for its own, and no row is marked as the end of an episode."""
    with np.load(path, allow_pickle=False) as data:
        observations, actions = data["observations"], data["actions"]
    dones, infos = np.zeros(len(actions), dtype=bool), np.array([{}] * len(actions))
    return Transitions(observations, actions, infos, observations, dones)


def train_bc(pairs, args, logger, policy=None):
    """Behavioural cloning with the library's defaults; returns the curve, of one point."""
    # `rng` only serves the library's logging. The order of batches and the initial weights come
    # from torch's global generator.
    set_random_seed(args.seed)
    env = gym.make(args.env_id)
    trainer = bc.BC(
        observation_space=env.observation_space,
        action_space=env.action_space,
        policy=policy,
        demonstrations=pairs,
        rng=np.random.default_rng(args.seed),
        batch_size=min(32, len(pairs)),  # 32 is the default; more than there is would be refused
        custom_logger=logger,
    )
    began = time.perf_counter()
    trainer.train(n_batches=args.updates, progress_bar=False)
    point = {"steps": 0, "wall_seconds": time.perf_counter() - began}
    return [{**point, "return_mean": evaluate(trainer.policy, args)}]


def make_gail(pairs, args, logger):
    """The trainer of the library's own GAIL tutorial, on this task.

    The tutorial uses seals/CartPole-v0, whose episodes all last 500 steps. Where a task ends an
    episode by itself, the library has to be told that this is intended."""
    envs = make_vec_env(args.env_id, rng=np.random.default_rng(args.seed), n_envs=8)
    learner = PPO(
        env=envs,
        policy=MlpPolicy,
        batch_size=64,
        ent_coef=0.0,
        learning_rate=0.0004,
        gamma=0.95,
        n_epochs=5,
        # This also seeds numpy's and torch's global generators, which the library draws on.
        seed=args.seed,
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
        # The tutorial's 1024 comes with 60 episodes; a larger batch than there is, is refused.
        demo_batch_size=min(1024, len(pairs)),
        gen_replay_buffer_capacity=512,
        n_disc_updates_per_round=8,
        venv=envs,
        gen_algo=learner,
        reward_net=reward_net,
        allow_variable_horizon=True,
        custom_logger=logger,
    )


def train_gail(pairs, args, logger):
    """GAIL with the tutorial's settings; returns the curve, whose seconds include the cloning's."""
    trainer, curve, evaluating = make_gail(pairs, args, logger), [], 0.0
    if args.algorithm == "bc+gail":
        curve = train_bc(pairs, args, logger, trainer.gen_algo.policy)
        evaluating -= curve[0]["wall_seconds"]

    def after_round(_):  # 8 environments x 2048 steps: the policy changes only then
        nonlocal evaluating
        now = time.perf_counter()
        point = {"steps": trainer.gen_algo.num_timesteps, "wall_seconds": now - began - evaluating}
        curve.append({**point, "return_mean": evaluate(trainer.gen_algo.policy, args)})
        evaluating += time.perf_counter() - now

    began = time.perf_counter()
    trainer.train(args.total_steps, callback=after_round)
    return curve


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("algorithm", choices=("bc", "gail", "bc+gail"))
    parser.add_argument("--env-id", default="CartPole-v1")
    parser.add_argument("--demos", type=Path, required=True, help="pairs (.npz)")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="result file (.json)")
    parser.add_argument("--updates", type=int, default=2_000, help="of cloning")
    parser.add_argument("--total-steps", type=int, default=300_000, help="of GAIL")
    parser.add_argument("--eval-episodes", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train = train_bc if args.algorithm == "bc" else train_gail
    with tempfile.TemporaryDirectory() as folder:
        logger = imitation_logger.configure(folder, format_strs=[])  # writes no table anywhere
        curve = train(load_pairs(args.demos), args, logger)
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    args.out.write_text(json.dumps({"curve": curve, "versions": versions}, indent=2))


if __name__ == "__main__":
    main()
