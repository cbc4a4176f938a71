"""How far the cost-to-go of BipedalWalker's expert moves when one of its actions is pushed.

    python benchmark/bipedal_chaos.py > benchmark/results/bipedal_chaos.json        (a few minutes)

Repeat the same start and the same actions in new environments; then take one action of the expert,
pushed by Gaussian noise of some size; then follow the expert for 350 steps. The difference after a
push of a millionth is not an effect of the push: it is the least noise that any estimate of A* from
single trajectories has.
"""

import argparse
import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aggrevated_bipedal as script

PUSHES, GAMMA, HORIZON = (1e-6, 1e-4, 1e-2, 0.25), 0.99, 350


def walk(env_id, expert, seed, actions, last):
    """Replay `actions`, then `last`, then let the expert walk; the discounted return after them."""
    env = gym.make(env_id)
    observation, _ = env.reset(seed=seed)
    for action in actions:
        observation, *_ = env.step(action)
    total, action = 0.0, last
    for step in range(HORIZON):
        observation, reward, terminated, truncated, _ = env.step(action)
        total += GAMMA**step * float(reward)
        if terminated or truncated:
            break
        action = expert.act(observation[None])[0]
    env.close()
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expert", default="weak")
    parser.add_argument("--states", type=int, default=40)
    parser.add_argument("--pushed", type=int, default=3, help="actions of each size in a state")
    args = parser.parse_args()
    settings = script.parse_args(["--expert", args.expert])
    expert, rng = script.make_expert(settings), np.random.default_rng(0)
    differences = {push: [] for push in PUSHES}
    for i in range(args.states):
        seed, length = 4_000_000 + i, int(rng.integers(20, 200))
        env = gym.make(settings.env_id)
        (observation, _), actions = env.reset(seed=seed), []
        for _ in range(length):
            actions.append(expert.act(observation[None])[0])
            observation, *_ = env.step(actions[-1])
        env.close()
        right = expert.act(observation[None])[0]
        unpushed = walk(settings.env_id, expert, seed, actions, right)
        for push, found in differences.items():
            for _ in range(args.pushed):
                pushed = np.clip(right + push * rng.standard_normal(4), -1, 1).astype(np.float32)
                found.append(walk(settings.env_id, expert, seed, actions, pushed) - unpushed)
    result = {"command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}
    result |= {"expert": args.expert, "states": args.states, "horizon": HORIZON, "gamma": GAMMA}
    result["pushes"] = [
        {
            "size": push,
            "median_absolute_difference": round(float(np.median(np.abs(found))), 3),
            "standard_deviation": round(float(np.std(found)), 3),
            "count": len(found),
        }
        for push, found in differences.items()
    ]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
