"""The tasks that the programs of this folder take, and episodes of them."""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from shared import BadInput, check


def make_env(env_id, least_reward=-np.inf):
    """The task, with observations as they are recorded: float32, whatever it gives."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # a task's module lies there
    try:
        env = gym.make(env_id, disable_env_checker=True)
    except Exception as error:  # a task may raise anything
        raise BadInput(f"task {env_id}: {' '.join(str(error).split())[:400]}") from None
    seen, done = env.observation_space, env.action_space
    flat = isinstance(seen, gym.spaces.Box) and len(seen.shape) == 1 and seen.dtype.kind == "f"
    check(flat, f"task {env_id}: found observations {seen}, expected a flat Box of floats")
    discrete = isinstance(done, gym.spaces.Discrete) and done.start == 0
    box = isinstance(done, gym.spaces.Box) and len(done.shape) == 1 and done.is_bounded()
    box = box and done.dtype.kind == "f"
    kinds = "Discrete from 0 or a flat, bounded Box of floats"
    check(discrete or box, f"task {env_id}: found actions {done}, expected {kinds}")
    space = gym.spaces.Box(seen.low.astype(np.float32), seen.high.astype(np.float32))
    env = gym.wrappers.TransformObservation(env, lambda x: np.array(x, np.float32), space)
    return gym.wrappers.TransformReward(env, lambda reward: max(float(reward), least_reward))


def play(policy, env_id, episodes, seed, sampled=False):
    """Whole episodes, each reset with a seed of its own: a list of dicts of arrays."""
    env, played = make_env(env_id), []
    generator = np.random.default_rng((seed, 1)) if sampled else None  # not the task's own
    for i in range(episodes):
        (observation, _), over, steps = env.reset(seed=seed + i), False, []
        while not over and len(steps) < 10_000:  # a task may have no limit of its own
            action = policy.act(observation, generator)
            taken = np.array(action, env.action_space.dtype)[()]  # a copy: a task may write to it
            if taken.ndim:  # float32 may have rounded the bounds
                taken = taken.clip(env.action_space.low, env.action_space.high)
            following, reward, terminated, truncated, _ = env.step(taken)
            steps.append((observation, action, reward))
            observation, over = following, terminated or truncated
        observations, actions, rewards = map(np.stack, zip(*steps))
        episode = {"observations": observations, "actions": actions, "rewards": rewards}
        played.append({**episode, "terminated": bool(terminated)})
    env.close()
    return played


def statistics(episodes):
    returns = np.array([episode["rewards"].sum() for episode in episodes], float)
    result = {"return_mean": returns.mean(), "return_std": returns.std()}
    result |= {"return_min": returns.min()}
    result |= {"length_mean": np.mean([len(episode["rewards"]) for episode in episodes])}
    result = {name: float(value) for name, value in result.items()}
    ended = sum(episode["terminated"] for episode in episodes)
    return result | {"terminated": ended, "episodes": len(episodes)}
