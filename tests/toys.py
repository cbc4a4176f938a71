"""Small tasks to try the scripts on, as `--env-id toys:Toy-v0`, and an expert's episodes of them.

A point on a line, to be held near 0. An episode terminates where the point leaves [-1, 1], and is
truncated after 12 steps. What a script might stumble over is here by default: float64 observations,
always in the same array, a reversed one, whose last entry is constant; rewards that are NumPy's;
actions that are uint16 and counted from 1, or a box with other bounds than [-1, 1], in an array
that the task then spoils; entries of info that others use as well, and such that differ in kind or
size from one episode to the next.
"""

import multiprocessing
import random
import time
from inspect import signature

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

KIND = {"dtype": np.uint16} if "dtype" in signature(Discrete).parameters else {}  # not in 1.1
SHARED = np.array([7.0, 0.0, 0.0])[::-1]  # what those see that remember: one array for all


class Toy(gym.Env):
    observation_space, pays = Box(-np.inf, np.inf, (3,), np.float64), 1.0
    success = last = careless = hidden = seeds = None
    ended = bool

    def __init__(self, box=False, remembers=False, start=1, **others):
        self.start, self.action_space = start, Discrete(3, start=start, **KIND)
        if box:
            self.action_space = Box(np.float32([-1, 0]), np.float32([1, 2]))
        self.box, self.remembers, self.resets = box, remembers, 0
        self.seen = SHARED if remembers else SHARED[::-1].copy()[::-1]
        vars(self).update(others)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.resets, self.over, self.steps = self.resets + 1, False, 0
        self.x = self.np_random.uniform(-0.7, 0.7) + 1e-3 * (self.resets - 1) * self.remembers
        if self.seeds:
            torch.manual_seed(seed)
        if self.hidden:  # how long its episode is, nobody sees
            self.hidden = 4 + np.random.randint(4) + (self.observation_space.sample()[0] > 0)
        return self.observe(), {"x": self.x}

    def observe(self, push=0.0):
        self.seen[:2] = self.x, push
        return self.seen

    def step(self, action):
        assert action in self.action_space and not self.over, action
        push = float(action[0] + action[1] - 1 if self.box else int(action) - self.start - 1)
        noise = self.np_random.normal(0, 0.05)
        if self.careless and self.steps >= self.careless - 1:
            drawn = np.random.normal(), random.gauss(), torch.randn(()).item()
            noise = 0.03 * sum(drawn) + 0.01 * np.sum(self.action_space.sample())
        self.x += 0.3 * push + noise
        if self.box:
            action *= 0
        info = {"x": self.x, "episode": None, "is_success": self.success}
        info |= {"touches": np.zeros(self.resets % 3), "kind": None if self.resets % 2 else 1}
        self.steps += 1
        self.over = self.ended(abs(self.x) > 1 or self.steps == self.hidden)
        if self.last is not None and (self.over or self.steps == 12):
            info["is_success"] = self.last
        return self.observe(push), self.pays - abs(self.x), self.over, False, info


class Blank(gym.Env):
    """There is nothing to be seen, but an action to be guessed. Episodes terminate after `ends`."""

    observation_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, ends=10**9):
        self.ends, self.action_space = ends, Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.wanted = 0, self.np_random.integers(2)
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        pay = float(action == self.wanted)
        return np.ones(1, np.float32), pay, self.steps == self.ends, False, {}


class Worker(Toy):
    """It has a process of its own, which says that it is there, is told to end and waited for."""

    def __init__(self):
        super().__init__()
        context = multiprocessing.get_context("fork")
        there = context.Event()
        self.process = context.Process(target=lambda: (there.set(), time.sleep(99)))
        self.process.start()
        there.wait()

    def close(self):
        self.process.terminate()
        self.process.join()


REFUSED = {
    "Image-v0": {"observation_space": Box(0, 255, (8, 8, 3), np.uint8)},
    "Dict-v0": {"observation_space": Dict({"a": Box(-1, 1, (3,))})},
    "Many-v0": {"action_space": MultiDiscrete([2, 3])},
    "Unbounded-v0": {"action_space": Box(-np.inf, 1, (2,))},
    "Matrix-v0": {"action_space": Box(-1, 1, (2, 2))},
    "Integers-v0": {"action_space": Box(-1, 1, (2,), np.int64)},
    "Narrow-v0": {"action_space": Box(np.float32([-1, 0]), np.float32([1, 0]))},
    "Huge-v0": {"action_space": Box(-1.5e38, 1.5e38, (2,))},
    "Thin-v0": {"action_space": Box(1e9, 1e9 + 10, (2,), np.float64)},  # one value, as float32
    "Short-v0": {"observation_space": Box(-1, 1, (4,))},  # it gives three
    "NaN-v0": {"remembers": np.nan, "box": True},
    "Pay-v0": {"pays": np.ones(1), "box": True},
    "Success-v0": {"success": "yes", "box": True},
    "Array-v0": {"ended": lambda over: np.array([over]), "box": True},
}
TOYS = {"Toy-v0": {}, "ToyBox-v0": {"box": True}, "Remembering-v0": {"remembers": True}}
TOYS["RememberingBox-v0"] = {"box": True, "remembers": True}
TOYS["Rounding-v0"] = {"box": True, "action_space": Box(-0.1, 0.1, (2,), np.float64)}
TOYS["HalfBox-v0"] = {"box": True, "action_space": Box(-1, 1, (2,), np.float16)}
TOYS["Last-v0"] = {"start": 2**16 - 3}  # the last numbers that a uint16 has
TOYS["Late-v0"] = {"success": None, "last": np.array([True])}  # is_success, at the end alone
TOYS["CarelessBox-v0"] = {"box": True, "careless": True}
TOYS["Careless-v0"] = {"careless": True}  # it draws from generators that are not its own
TOYS["Gusts-v0"] = {"careless": 9}  # late in an episode
TOYS["Hidden-v0"], TOYS["SeedingBox-v0"] = {"hidden": True}, {"box": True, "seeds": True}
TOYS["Growing-v0"] = {"remembers": 1e41}  # from the fifth reset on too large for float32
TOYS |= {"PayingNaN-v0": {"box": True, "pays": np.nan}, **REFUSED}
for name, settings in TOYS.items():
    gym.register(name, f"{__name__}:Toy", kwargs=settings, max_episode_steps=12)
gym.register("Worker-v0", f"{__name__}:Worker", max_episode_steps=12)
gym.register("Truncating-v0", f"{__name__}:Blank", max_episode_steps=3)
gym.register("Endless-v0", f"{__name__}:Blank")
gym.register("Terminating-v0", f"{__name__}:Blank", kwargs={"ends": 3})


def demonstrations(name, episodes=24):
    """The arrays of an .npz. The expert pushes towards 0; on a Blank task it always does 1."""
    env, steps, terminated = gym.make(name), [], []
    for seed in range(episodes):
        (observation, _), over, start = env.reset(seed=seed), False, True
        while not over:
            push, space = np.clip(-3 * observation[0], -1, 1), env.action_space
            if isinstance(space, Box):
                action = np.array([push, 1], space.dtype) * space.high.min()
            else:
                action = space.dtype.type(space.start + (1 if space.n < 3 else 1 + np.round(push)))
            following, reward, end, cut, _ = env.step(action.copy())
            steps.append((observation.astype(np.float32), action, start, np.float32(reward)))
            observation, over, start = following, end or cut, False
        terminated.append(end)
    names = ("observations", "actions", "episode_starts", "rewards")
    arrays = {key: np.array(column) for key, column in zip(names, zip(*steps))}
    return {**arrays, "terminated": np.array(terminated)}
