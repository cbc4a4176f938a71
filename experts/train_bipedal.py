"""Train an expert for BipedalWalker with TQC from sbx-rl, which is stable-baselines3 in JAX.

    uv run experts/train_bipedal.py --until 318 --episodes 50 --average 0.98 --out runs/good
    uv run experts/train_bipedal.py --until 318 --every 2500 --episodes 10 --out runs/weak
    uv run experts/train_bipedal.py --pick 260 285 --out runs/weak
    uv run experts/train_bipedal.py --score experts/BipedalWalker-v3_good.zip

The first takes about ten minutes on one core, and its last file is the good expert. The second is
the same run with more policies kept and none averaged; from these the third picks the weak expert,
before any learner has seen it. The fourth prints the score that is quoted. Every `--every` steps
the greedy policy is evaluated, and its weights go into STEPS.zip: policy.pth, with the names that
stable-baselines3 gives to those of a SAC (a linear layer's mean output is a linear layer too, so a
critic's quantiles become its value), and a JSON file `data` that says where they come from. The
command for the hardcore course, an hour on one core, is in that expert's file. curve.json has the
curve.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "gymnasium[box2d]>=1.2.3,<2",
#     "numpy>=1.26",
#     "sbx-rl==0.28.0",
#     "torch==2.13.0",
# ]
# ///

import argparse
import importlib.metadata
import io
import json
import os
import shlex
import sys
import zipfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import gymnasium as gym
import numpy as np
import torch

SELECTION_SEEDS, SCORE_SEEDS = (
    2_000_000,
    3_000_000,
)  # seeds of the evaluations; training's are small
ACTOR = ("actor.latent_pi.0", "actor.latent_pi.2", "actor.mu", "actor.log_std")
CRITICS = [tuple(f"critic.qf{i}.{j}" for j in (0, 2, 4)) for i in (0, 1)]


def layers(tree, names):
    """sbx's layers under stable-baselines3's names; weights (outputs, inputs), half precision."""
    weights = {}
    for layer, name in zip(sorted(tree), names, strict=True):
        kernel, bias = np.asarray(tree[layer]["kernel"]).T, np.asarray(tree[layer]["bias"])
        if name.endswith("qf0.4") or name.endswith("qf1.4"):  # the mean of the quantiles
            kernel, bias = kernel.mean(0, keepdims=True), bias.mean(0, keepdims=True)
        weights[f"{name}.weight"] = torch.tensor(kernel).half()
        weights[f"{name}.bias"] = torch.tensor(bias).half()
    return weights


def export(model, actor_params, path, about):
    """Write an actor and the critics of `model` to a zip that holds weights and JSON alone."""
    weights = layers(actor_params["params"], ACTOR)
    for critic, names in zip((model.policy.qf1_state, model.policy.qf2_state), CRITICS):
        weights |= layers(critic.params["params"], names)
    memory = io.BytesIO()
    torch.save(weights, memory)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("policy.pth", memory.getvalue())
        file.writestr("data", json.dumps(about, indent=1))


def actor_of(path):
    """The greedy policy of an exported zip: observation (24,) -> action (4,)."""
    with zipfile.ZipFile(path) as file:
        weights = torch.load(io.BytesIO(file.read("policy.pth")), weights_only=True)
        about = json.loads(file.read("data"))
    names = ("actor.latent_pi.0", "actor.latent_pi.2", "actor.mu")
    (w0, b0), (w1, b1), (w2, b2) = (
        [weights[f"{name}.{kind}"].float().numpy() for kind in ("weight", "bias")] for name in names
    )

    def act(observation):
        hidden = np.maximum(w1 @ np.maximum(w0 @ observation + b0, 0) + b1, 0)
        return np.tanh(w2 @ hidden + b2)

    return act, about


def score(act, env_id, episodes, seed):
    """Returns of greedy episodes, and how many of them ended in a fall: (episodes,), int."""
    env, returns, falls = gym.make(env_id), [], 0
    for i in range(episodes):
        (observation, _), total, over = env.reset(seed=seed + i), 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            total, over = total + reward, terminated or truncated
        returns.append(total)
        falls += reward <= -100
    return np.array(returns), falls


def describe(returns, falls):
    mean, std, least = float(returns.mean()), float(returns.std()), float(returns.min())
    return {"mean": mean, "std": std, "min": least, "falls": int(falls), "episodes": len(returns)}


def train(args):
    import jax
    from sbx import TQC
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Evaluate(BaseCallback):
        """Every `--every` steps: export, evaluate the export, and stop where it is good enough."""

        def _on_training_start(self):
            self.average = self.model.policy.actor_state.params

        def _on_rollout_start(self):
            self.average = jax.tree.map(
                lambda old, new: args.average * old + (1 - args.average) * new,
                self.average,
                self.model.policy.actor_state.params,
            )

        def _on_step(self):
            steps = self.num_timesteps
            if steps // args.every == (steps - args.num_envs) // args.every:
                return True
            path = args.out / f"{steps // args.every * args.every}.zip"
            export(self.model, self.average, path, about)
            result = describe(
                *score(actor_of(path)[0], args.env_id, args.episodes, SELECTION_SEEDS)
            )
            curve.append({"steps": steps, "file": path.name, **result})
            (args.out / "curve.json").write_text(json.dumps({**about, "curve": curve}, indent=1))
            print(f"{steps:,} steps: {result}", flush=True)
            return result["mean"] < args.until

    def clipped(env):
        return gym.wrappers.TransformReward(env, lambda r: max(float(r), -args.fall_penalty))

    args.out.mkdir(parents=True)
    packages = ("sbx-rl", "jax", "gymnasium", "box2d", "numpy", "torch")
    versions = {name: importlib.metadata.version(name) for name in packages}
    about = {"env_id": args.env_id, "algorithm": "TQC", "versions": versions}
    about["command"] = shlex.join(["python", "experts/train_bipedal.py", *sys.argv[1:]])
    curve = []
    model = TQC(
        "MlpPolicy",
        make_vec_env(args.env_id, args.num_envs, seed=args.seed, wrapper_class=clipped),
        learning_rate=lambda left: args.lr * max(left, 0.1) if args.decay else args.lr,
        buffer_size=args.total_steps,
        batch_size=args.batch_size,
        gamma=args.gamma,
        tau=0.01,
        learning_starts=10_000,
        train_freq=args.train_freq,
        gradient_steps=args.gradient_steps,
        top_quantiles_to_drop_per_net=1,
        policy_kwargs={"net_arch": [args.hidden] * 2, "n_critics": 2, "n_quantiles": 12},
        seed=args.seed,
    )
    model.learn(args.total_steps, callback=Evaluate(), progress_bar=sys.stderr.isatty())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument
    flag("--env-id", default="BipedalWalker-v3", help="or BipedalWalkerHardcore-v3")
    flag("--total-steps", type=int, default=400_000, help="environment steps")
    flag("--until", type=float, default=1e9, help="stop at this mean return")
    flag("--every", type=int, default=10_000, help="environment steps between evaluations")
    flag("--episodes", type=int, default=20, help="per evaluation")
    flag("--num-envs", type=int, default=8)
    flag("--train-freq", type=int, default=4, help="steps of each environment before an update")
    flag("--gradient-steps", type=int, default=32, help="per update")
    flag("--hidden", type=int, default=128, help="width of the two hidden layers")
    flag("--batch-size", type=int, default=128)
    flag("--gamma", type=float, default=0.98)
    flag("--lr", type=float, default=5e-4)
    flag("--decay", action="store_true", help="let the step size fall linearly to a tenth")
    flag("--average", type=float, default=0.0, help="share the actor's average keeps per update")
    flag("--fall-penalty", type=float, default=100.0, help="if less than 100, a fall costs this")
    flag("--seed", type=int, default=0)
    flag("--out", type=Path, default=Path("experts/runs/v3"), help="a folder that does not exist")
    flag("--score", type=Path, help="evaluate this file on fresh seeds and stop")
    pick = "print the first file in --out whose mean return of 100 episodes lies between these"
    flag("--pick", type=float, nargs=2, metavar=("LOW", "HIGH"), help=pick)
    args = parser.parse_args()
    if args.score:
        act, about = actor_of(args.score)
        print(json.dumps(describe(*score(act, about["env_id"], 100, SCORE_SEEDS))))
    elif args.pick:
        for path in sorted(args.out.glob("*.zip"), key=lambda path: int(path.stem)):
            act, about = actor_of(path)
            result = describe(*score(act, about["env_id"], 100, SELECTION_SEEDS))
            print(path, json.dumps(result), flush=True)
            if args.pick[0] <= result["mean"] <= args.pick[1]:
                break
    else:
        train(args)


if __name__ == "__main__":
    main()
