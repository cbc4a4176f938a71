"""How fast RaceCar-v0 is, whether it leaks, and how well its expert drives. Prints one JSON object.

    OMP_NUM_THREADS=1 python benchmark/racecar_speed.py                     (about a minute)
    OMP_NUM_THREADS=1 python benchmark/racecar_speed.py --leak 1000         (a minute)
    OMP_NUM_THREADS=1 python benchmark/racecar_speed.py --expert 200        (two minutes)
    OMP_NUM_THREADS=1 python benchmark/racecar_speed.py --memory 10         (seconds)
    pip install highway-env                                                 (for the next)
    OMP_NUM_THREADS=1 python benchmark/racecar_speed.py --others 20         (a minute)

Random actions with resets, on one core except `async_steps_per_second`. It reports the best of
several repetitions and the median: other work on the machine can only slow them down.
"""

import argparse
import gc
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experts")]
from racecar import record_laps  # noqa: E402

from racecar_env import RaceCarEnv, WaypointController, pybullet  # noqa: E402

REPETITIONS = 50


def best_and_median(seconds: list[float], count: int) -> dict[str, float]:
    """Counts per second."""
    return {
        "best": round(count / min(seconds), 1),
        "median": round(count / float(np.median(seconds)), 1),
    }


def seconds_of(call: Callable[[], object]) -> list[float]:
    """Of each of 50 calls."""
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def resident() -> float:
    """The memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def random_actions(count: int, num_envs: int) -> np.ndarray:
    """(count, num_envs, 2) float32"""
    random = np.random.default_rng(0)
    return random.uniform([-1, 0], [1, 1], (count, num_envs, 2)).astype(np.float32)


def single_environment(count: int = 200) -> dict:
    """Steps per second with resets, the share of stepSimulation in them, the time of a reset."""
    env = RaceCarEnv()
    step_physics, physics_seconds = env.physics.stepSimulation, [0.0]

    def timed_step_simulation() -> None:
        start = time.perf_counter()
        step_physics()
        physics_seconds[0] += time.perf_counter() - start

    plain, timed, shares, resets = [], [], [], []
    for repetition in range(2 * REPETITIONS):  # in turn: as it is, and with stepSimulation timed
        with_timer = repetition % 2 == 1
        env.physics.stepSimulation = timed_step_simulation if with_timer else step_physics
        physics_seconds[0] = 0.0
        env.reset(seed=0)
        start = time.perf_counter()
        for action in random_actions(count, 1)[:, 0]:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                reset_start = time.perf_counter()
                env.reset()
                resets.append(time.perf_counter() - reset_start)
        seconds = time.perf_counter() - start
        (timed if with_timer else plain).append(seconds)
        if with_timer:
            shares.append(physics_seconds[0] / seconds)
    env.close()
    return {
        "steps_per_second": best_and_median(plain, count),
        "step_simulation_share": round(float(np.median(shares)), 3),
        "reset_milliseconds": round(1e3 * float(np.median(resets)), 4),
    }


def vector_steps_per_second(vector_class: type[VectorEnv], num_envs: int, count: int = 60) -> dict:
    # Reset on the same step: otherwise reset steps, which need no physics, would count as well.
    envs = vector_class([RaceCarEnv] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset(seed=0)
    seconds = seconds_of(lambda: [envs.step(x) for x in random_actions(count, num_envs)])
    envs.close()
    return best_and_median(seconds, count * num_envs)


def frame_milliseconds() -> float:
    env = RaceCarEnv(render_mode="rgb_array")
    env.reset(seed=0)
    seconds = seconds_of(env.render)
    env.close()
    return round(1e3 * min(seconds), 2)


def leak(count: int) -> dict:
    """Open, drive and close N environments, one after the other."""
    megabytes, client_ids = [], set()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(count):
        env = RaceCarEnv()
        env.reset(seed=0)
        for action in random_actions(5, 1)[:, 0]:
            env.step(action)
        client_ids.add(env.physics.id)
        env.close()
        gc.collect()
        megabytes.append(resident())
    half = count // 2
    return {
        "environments": count,
        "clients_still_connected": sum(
            pybullet.getConnectionInfo(client)["isConnected"] for client in range(count)
        ),
        "client_ids_used": len(client_ids),
        "file_descriptors_before_and_after": [descriptors, len(os.listdir("/proc/self/fd"))],
        "resident_megabytes_first_and_last": [round(megabytes[i], 1) for i in (0, -1)],
        "kilobytes_per_environment_second_half": round(
            1024 * float(np.polyfit(np.arange(half), megabytes[-half:], 1)[0]), 2
        ),
    }


def expert(count: int) -> list[dict]:
    """Drive N laps from perturbed starts for each throttle and action noise."""
    rows = []
    for throttle, noise in ((0.3, 0.1), (0.5, 0.0), (0.5, 0.1), (0.5, 0.2), (0.7, 0.0), (0.7, 0.1)):
        env = RaceCarEnv()
        endless = record_laps(env, WaypointController(throttle), math.inf, noise, seed=1_000)
        laps = list(itertools.islice(endless, count))
        env.close()
        steps = [len(lap.actions) for lap in laps if lap.is_success]
        row = {"throttle": throttle, "action_noise": noise, "laps": count, "finished": len(steps)}
        steps_of = {"mean": round(float(np.mean(steps)), 1), "min": min(steps), "max": max(steps)}
        rows.append({**row, "steps": steps_of})
    return rows


def memory(count: int) -> dict:
    """Measure the MB that one more of N physics clients takes, empty and as an environment."""

    def client() -> int:
        return pybullet.connect(pybullet.DIRECT)

    def environment() -> RaceCarEnv:
        env = RaceCarEnv()
        env.reset(seed=0)
        return env

    result, kept = {}, []
    for make in (client, environment):
        kept.append(make())  # what only the first one needs
        before = resident()
        kept += [make() for _ in range(count)]
        result[make.__name__] = round((resident() - before) / count, 1)
    return result


def others(rounds: int) -> dict:
    """Compare the steps per CPU second of driving environments, in N turns, without pictures."""
    import highway_env

    gym.register_envs(highway_env)
    counts = {"RaceCar-v0": 1_000, "racetrack-v0": 20, "CarRacing-v3": 100}
    envs = {name: gym.make(name, disable_env_checker=True) for name in counts}
    rows = {name: [] for name in counts}
    for _ in range(rounds):
        for name, env in envs.items():
            env.reset(seed=0)
            env.action_space.seed(0)
            start = time.process_time()
            for _ in range(counts[name]):
                _, _, terminated, truncated, _ = env.step(env.action_space.sample())
                if terminated or truncated:
                    env.reset()
            rows[name].append(time.process_time() - start)
    return {name: best_and_median(seconds, counts[name]) for name, seconds in rows.items()}


def speed() -> dict:
    """What is measured without a flag."""
    result = {"cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}
    result |= {**single_environment(), "frame_milliseconds": frame_milliseconds()}
    for name, vector_class in (("sync", SyncVectorEnv), ("async", AsyncVectorEnv)):
        sizes = {n: vector_steps_per_second(vector_class, n) for n in (1, 2, 4, 8)}
        result[f"{name}_steps_per_second"] = sizes
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measures = {"leak": leak, "expert": expert, "memory": memory, "others": others}
    for name, measure in measures.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=measure.__doc__)
    counts = vars(parser.parse_args())
    results = [measures[name](count) for name, count in counts.items() if count]
    print(json.dumps(results[0] if results else speed(), indent=2))


if __name__ == "__main__":
    main()
