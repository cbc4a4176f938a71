"""Drive RaceCar-v0 with its waypoint controller, record or film that, or take the wheel yourself.

    python experts/racecar.py --demos demos.npz --action-noise 0.1     (30 laps, a few seconds)
    python experts/racecar.py --demos demos.npz --manner human         (as a person might drive)
    python experts/racecar.py --video lap.mp4
    python experts/racecar.py --render
    python experts/racecar.py --drive --demos mine.npz

A person steers with the arrow keys of the window; Ctrl-C, or closing the window, ends the driving
and keeps the laps that were finished. Only laps that reached the finish are recorded.
"""

# /// script
# requires-python = ">=3.11,<3.12"
# dependencies = ["gymnasium>=1.1,<2", "pybullet", "numpy", "moviepy"]
# ///
# racecar_env.py stands in the folder above; pybullet has wheels up to CPython 3.11 on Linux.

import argparse
import importlib.metadata
import os
import platform
import shlex
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium as gym
import numpy as np
from shared import BadInput, Parser, say, write_demonstrations

from racecar_env import WaypointController, pybullet


class Lap(NamedTuple):
    """One episode. The last observation is not kept: no action followed it."""

    observations: np.ndarray  # (steps, 9) float32
    actions: np.ndarray  # (steps, 2) float32, as executed
    rewards: np.ndarray  # (steps,) float32
    terminated: bool
    is_success: bool


class HumanManner:
    """A model of a person at the wheel, where no person is at hand: none has been fitted to it.

    Three steps late, it turns the wheel half as far again as the controller would (so it
    overshoots), not quite to where it means to, and holds it there until it is off by more than the
    dead band. In turns it takes the foot off the throttle. It remembers: no function of the
    observation alone drives like this.
    """

    DELAY, GAIN, DEAD_BAND, TREMOR = 3, 1.5, 0.2, 0.1  # steps; of the steering: factor, share, std

    def __init__(self, throttle: float, seed: int) -> None:
        self.throttle, self.controller = throttle, WaypointController(throttle, self.GAIN)
        self.random = np.random.default_rng((seed, 2))

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """The action, (2,) float32, for the next observation, (9,), of a lap."""
        if not observation[2:4].any():  # at rest: a lap begins
            self.seen: deque[np.ndarray] = deque(maxlen=self.DELAY + 1)
            self.wheel = 0.0
        self.seen.append(observation)
        wish = float(self.controller(self.seen[0])[0])
        if abs(wish - self.wheel) > self.DEAD_BAND:
            self.wheel = np.clip(wish + self.TREMOR * self.random.standard_normal(), -1, 1)
        return np.array([self.wheel, self.throttle * (1 - abs(self.wheel) / 2)], dtype=np.float32)


def record_laps(
    env: gym.Env,
    choose_action: Callable[[np.ndarray], np.ndarray],
    num_successes: int,
    action_noise: float = 0.0,
    seed: int = 0,
) -> Iterator[Lap]:
    """Drive laps, and yield each of them, until num_successes have reached the finish.

    action_noise: standard deviation of the Gaussian noise on both components of the action.

    The action is recorded as EXECUTED, noise and clipping included, not as intended. It is the one
    that led to the next observation, and (observation, executed action) is a sample from the
    occupancy measure of one policy, the noisy expert; (observation, intended action) is from none.
    The noise has mean 0, so cloning still recovers the intended action.
    """
    random = np.random.default_rng((seed, 1))  # separate from the environment's
    low, high = env.action_space.low, env.action_space.high
    reset_seed: int | None = seed  # the later laps follow from the first
    while num_successes > 0:
        observation, _ = env.reset(seed=reset_seed)
        reset_seed, over, steps = None, False, []
        while not over:
            noise = action_noise * random.standard_normal(2)
            action = np.clip(choose_action(observation) + noise, low, high).astype(np.float32)
            next_observation, reward, terminated, truncated, info = env.step(action)
            steps.append((observation, action, np.float32(reward)))
            observation, over = next_observation, terminated or truncated
        observations, actions, rewards = (np.stack(column) for column in zip(*steps))
        num_successes -= info["is_success"]
        yield Lap(observations, actions, rewards, terminated, info["is_success"])


def drive_laps(args: argparse.Namespace) -> list[Lap]:
    """Laps by the controller, or by a person, who stops with Ctrl-C or by closing the window."""
    env = gym.make("RaceCar-v0", render_mode="human" if args.render or args.drive else None)
    controller = WaypointController(args.throttle)
    if args.manner == "human":
        controller = HumanManner(args.throttle, args.seed)

    def choose_action(observation: np.ndarray) -> np.ndarray:
        if args.drive:
            return action_from_keys(env.unwrapped.physics.getKeyboardEvents(), args.throttle)
        return controller(observation)

    laps: list[Lap] = []
    try:
        for lap in record_laps(env, choose_action, args.episodes, args.action_noise, args.seed):
            laps.append(lap)
            if len(laps) >= 2 * args.episodes + 10 and not args.drive:
                break  # the throttle is too much for the controller
    except (KeyboardInterrupt, pybullet.error):
        if not args.drive:
            raise KeyboardInterrupt from None
    finally:
        env.close()
    return laps


def action_from_keys(keys: dict[int, int], throttle: float) -> np.ndarray:
    """The action, (2,) float32, for a person's arrow keys: up drives, left and right steer.

    keys: key code -> bits of its state, as pybullet's getKeyboardEvents returns them.
    """
    pressed = pybullet.KEY_IS_DOWN | pybullet.KEY_WAS_TRIGGERED
    up, left, right = (
        bool(keys.get(key, 0) & pressed)
        for key in (pybullet.B3G_UP_ARROW, pybullet.B3G_LEFT_ARROW, pybullet.B3G_RIGHT_ARROW)
    )
    return np.array([right - left, throttle * up], dtype=np.float32)


# -------------------------------------------------------------------------------------------- files
def save_demonstrations(path: Path, laps: list[Lap], metadata: dict) -> None:
    """Write the laps that reached the finish, as an expert's do: the whole file or nothing.

    The time a person waits before the first throttle of a lap is left out: it would teach the car
    to park.
    """
    episodes, arrays = [], ("observations", "actions", "rewards")
    for lap in laps:
        if lap.is_success:
            first = int(np.argmax(lap.actions[:, 1] > 0))
            episode = {name: getattr(lap, name)[first:] for name in arrays}
            episodes.append({**episode, "terminated": lap.terminated})
    if path.exists():  # since the laps began: neither is lost
        path = path.with_stem(f"{path.stem}_{os.getpid()}")
        say(f"written to {path}")
    write_demonstrations(path, episodes, {**metadata, "dropped": len(laps) - len(episodes)})


def film_lap(path: Path, controller: WaypointController, seed: int) -> Lap:
    """Write the video of a lap, the whole file or nothing."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        env = gym.make("RaceCar-v0", render_mode="rgb_array")
        env = gym.wrappers.RecordVideo(env, f"{folder}/video", disable_logger=True)
        lap = next(record_laps(env, controller, 1, seed=seed))
        env.close()
        os.replace(next(Path(folder).glob("video/*.mp4")), path)
    return lap


# ------------------------------------------------------------------------------------- command line
def parse_arguments(arguments: list[str]) -> tuple[Parser, argparse.Namespace]:
    parser = Parser("racecar.py", __doc__)
    add = parser.add_argument
    add("--demos", type=Path, metavar="FILE.npz", help="record the laps in this new file")
    add("--video", type=Path, metavar="FILE.mp4", help="film one lap of the controller")
    add("--render", action="store_true", help="show the laps in a window")
    add("--drive", action="store_true", help="drive them yourself, with the window's arrow keys")
    manners = "the controller (default), or a model of a person: late, dead band, overshooting"
    add("--manner", choices=("controller", "human"), default="controller", help=manners)
    add("--episodes", type=int, default=30, help="laps that reach the finish (default: 30)")
    add("--action-noise", type=float, default=0.0, help="standard deviation, 0 (default) to 1")
    add("--throttle", type=float, default=0.5, help="above 0, to 1: 2.5 m/s (default: 0.5)")
    add("--seed", type=int, default=0, help="of the starts and the noise (default: 0)")
    args = parser.parse_args(arguments)

    if not (args.demos or args.video or args.render or args.drive):
        parser.error("nothing to do: give --demos, --video, --render or --drive")
    for flag, value, valid, expected in (
        ("--episodes", args.episodes, args.episodes >= 1, "at least 1"),
        ("--action-noise", args.action_noise, 0 <= args.action_noise <= 1, "from 0 to 1"),
        ("--throttle", args.throttle, 0 < args.throttle <= 1, "above 0, up to 1"),
        ("--seed", args.seed, args.seed >= 0, "at least 0"),
    ):
        if not valid:
            parser.error(f"{flag} must be {expected}, found {value}")
    for path, suffix in ((args.demos, ".npz"), (args.video, ".mp4")):
        if path and path.suffix != suffix:
            parser.error(f"{path}: expected the name of a file that ends in {suffix}")
        if path and os.path.lexists(path):
            parser.error(f"{path}: exists already, expected a new file")
        if path and not os.access(path.parent, os.W_OK):
            parser.error(f"{path}: its folder does not exist or cannot be written to")
    return parser, args


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status. Bad input: one line on stderr, status 2, no demonstrations."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser, args = parse_arguments(arguments)
    driver = "a model of a person" if args.manner == "human" else "waypoint controller"
    driver = "a person" if args.drive else driver
    metadata = {
        "env_id": "RaceCar-v0",
        "expert": f"{driver}, throttle {args.throttle:g}, action noise {args.action_noise:g}",
        "seed": args.seed,
        "command": shlex.join(["python", "experts/racecar.py", *arguments]),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("gymnasium", "numpy", "pybullet")},
    }
    try:
        if args.video:
            lap = film_lap(args.video, WaypointController(args.throttle), args.seed)
            say(f"{args.video}: {len(lap.actions)} steps, finish reached: {lap.is_success}")
        if args.demos or args.render or args.drive:
            laps = drive_laps(args)
            steps = [len(lap.actions) for lap in laps if lap.is_success]
            summary = f"{len(laps)} laps driven, {len(laps) - len(steps)} dropped (no finish)"
            if not steps or (len(steps) < args.episodes and not args.drive):
                parser.error(f"{summary}: no demonstrations are written")
            if args.demos:
                save_demonstrations(args.demos, laps, metadata)
            say(f"{summary}, the others took {np.mean(steps):.1f} +- {np.std(steps):.1f} steps")
    except KeyboardInterrupt:
        return 130
    except (BadInput, RuntimeError, gym.error.DependencyNotInstalled) as error:
        parser.error(str(error))  # a file that came up; no display; no moviepy
    except OSError as error:  # a full disk
        parser.exit(1, f"{parser.prog}: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
