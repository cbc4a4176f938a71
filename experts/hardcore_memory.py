r"""HardcoreMemory-v0: BipedalWalkerHardcore-v3 for a walker that has a memory.

    python experts/train.py hardcore_memory:HardcoreMemory-v0
    PYTHONPATH=experts python aggrevated_bipedal.py --env-id hardcore_memory:HardcoreMemory-v0 \
        --expert good --switch 500

An action lasts two steps of the course, whose rewards are added up. An observation holds those
after the last three actions, (72,) float32, the newest last: a single one does not show the ground
that the hind leg has yet to step over. Course, rewards and time limit (2,000 steps, here 1,000
actions) are those of BipedalWalkerHardcore-v3, and so returns are the same."""

import gymnasium as gym
from gymnasium.wrappers import FlattenObservation, FrameStackObservation

REPEATED, REMEMBERED = 2, 3


class Repeat(gym.Wrapper):
    """Each action is taken REPEATED times, or until the episode ends."""

    def __init__(self, env):
        super().__init__(env)
        self.metadata = {**env.metadata, "render_fps": env.metadata["render_fps"] / REPEATED}

    def step(self, action):
        total = 0.0
        for _ in range(REPEATED):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


def make(**settings):
    env = Repeat(gym.make("BipedalWalkerHardcore-v3", **settings))
    return FlattenObservation(FrameStackObservation(env, REMEMBERED))


gym.register("HardcoreMemory-v0", entry_point=make, max_episode_steps=1_000)
