"""RaceCar-v0: every promise of racecar_env.py and docs/racecar_env.md, on real runs."""

import hashlib
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

pytest.importorskip("pybullet")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import racecar_env  # noqa: E402
from racecar_env import (  # noqa: E402
    COINS,
    FINISH,
    WALL_SEGMENTS,
    RaceCarEnv,
    WaypointController,
    action_from_keys,
    demonstrations_of,
    main,
    pybullet,
    record_laps,
)

STRAIGHT = np.array([0, 1], dtype=np.float32)
PARKED = np.array([0, 0], dtype=np.float32)


@pytest.fixture
def make():
    """Environments that are closed at the end of the test."""
    envs = []

    def make_env(**settings):
        envs.append(RaceCarEnv(**settings))
        return envs[-1]

    yield make_env
    for env in envs:
        env.close()


def random_actions(seed, *shape):
    return np.random.default_rng(seed).uniform([-1, 0], [1, 1], (*shape, 2)).astype(np.float32)


def rollout(env, seed, num_steps=150):
    """All that an episode of random actions shows, as bytes: it ends at a wall."""
    observation, info = env.reset(seed=seed)
    trace = [observation.tobytes(), info["position"].tobytes()]
    for action in random_actions(seed, num_steps):
        observation, reward, terminated, truncated, info = env.step(action)
        trace += [observation.tobytes(), info["position"].tobytes(), bytes([terminated, truncated])]
        trace.append(np.float64(reward).tobytes())
        if terminated or truncated:
            break
    return b"".join(trace)


def teleport(env, x, y, yaw):
    orientation = env.physics.getQuaternionFromEuler((0, 0, yaw))
    env.physics.resetBasePositionAndOrientation(env.car, (x, y, 0.0), orientation)


def wall_distance(env):
    points = env.physics.getClosestPoints(env.car, env.walls, 5.0)
    return min(point[8] for point in points)


# ------------------------------------------------------------------------------- the interface


def test_registered_on_import_and_by_module_name():
    code = (
        "import gymnasium; env = gymnasium.make('racecar_env:RaceCar-v0', max_steps=7);"
        "print(env.spec.id, env.unwrapped.max_steps, env.unwrapped.metadata)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    expected = "RaceCar-v0 7 {'render_modes': ['human', 'rgb_array'], 'render_fps': 20}"
    assert result.stdout.strip() == expected
    assert result.stderr == ""  # pybullet's greeting included
    assert "RaceCar-v0" in gymnasium.registry


def test_gymnasium_checker_has_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("RaceCar-v0", render_mode="rgb_array")
        check_env(env.unwrapped, skip_render_check=not os.environ.get("DISPLAY"))
        env.close()


def test_stable_baselines3_checker_minds_the_throttle_range_only():
    from stable_baselines3.common.env_checker import check_env as check

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(RaceCarEnv(render_mode="rgb_array"))
    # ResourceWarnings are other tests' garbage, collected here by chance.
    caught = [warning for warning in caught if warning.category is not ResourceWarning]
    # The specification says [0, 1]; stable-baselines3 recommends [-1, 1] for every component.
    assert len(caught) == 1 and "symmetric and normalized Box action space" in str(caught[0])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.wrappers.RescaleAction(
            RaceCarEnv(), np.float32([-1, -1]), np.float32([1, 1])
        )
        check(env)


def test_spaces(make):
    env = make()
    assert env.observation_space.shape == (9,) and env.observation_space.dtype == np.float32
    assert env.action_space.low.tolist() == [-1, 0] and env.action_space.high.tolist() == [1, 1]
    for seed in range(20):  # what hard driving reaches stays inside the observation's limits
        observation, _ = env.reset(seed=seed)
        over = False
        while not over:
            action = np.random.default_rng((seed, env.steps // 5)).integers([-1, 0], [2, 2])
            observation, _, terminated, truncated, _ = env.step(action)
            assert env.observation_space.contains(observation)
            over = terminated or truncated


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"render_mode": "ansi"}, "render_mode must be None, human or rgb_array, got 'ansi'"),
        ({"start_noise": -0.1}, "start_noise must be a number from 0 to 0.14, got -0.1"),
        ({"start_noise": 0.2}, "start_noise"),
        ({"start_noise": math.nan}, "start_noise"),
        ({"start_noise": "0.1"}, "start_noise"),
        ({"coin_reward": -1.0}, "coin_reward"),
        ({"coin_reward": math.inf}, "coin_reward"),
        ({"coin_reward": None}, "coin_reward"),
        ({"max_steps": 0}, "max_steps must be a whole number from 1 to 1000000000, got 0"),
        ({"max_steps": 10.0}, "max_steps"),
        ({"max_steps": True}, "max_steps"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        RaceCarEnv(**settings)


def test_human_mode_without_a_display_says_so(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(RuntimeError, match="needs a display"):
        RaceCarEnv(render_mode="human")


def test_use_at_the_wrong_time_is_refused(make):
    env = make(max_steps=3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(PARKED)
    env.reset(seed=0)
    with pytest.raises(gymnasium.error.Error, match="render_mode"):
        env.render()
    for _ in range(3):
        env.step(PARKED)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(PARKED)
    env.close()
    env.close()
    for use in (env.reset, env.render, lambda: env.step(PARKED)):
        with pytest.raises(gymnasium.error.ClosedEnvironmentError, match="closed"):
            use()


# ------------------------------------------------------------------------ the world and its laws


def test_engine_runs_at_the_control_rate_with_static_walls(make):
    env = make()
    parameters = env.physics.getPhysicsEngineParameters()
    assert parameters["fixedTimeStep"] == 1 / 20 and parameters["numSubSteps"] == 0
    assert parameters["gravityAccelerationZ"] == -10
    dynamics = env.physics.getDynamicsInfo(env.walls, -1)
    assert (dynamics[0], dynamics[1], dynamics[5]) == (0.0, 1.0, 0.7)  # mass, friction, restitution


def test_walls_stand_where_the_specification_says(make):
    env = make()
    boxes = env.physics.getCollisionShapeData(env.walls, -1)
    assert len(boxes) == len(WALL_SEGMENTS) == 10

    def height(x, y):  # of what a ray from above meets first; 0 where that is the ground
        body, _, _, (_, _, z), _ = env.physics.rayTest((x, y, 1), (x, y, -1))[0]
        assert (body == env.walls) == (z > 0.01)
        return z

    for x0, y0, x1, y1 in WALL_SEGMENTS:
        (nx, ny), (x, y) = ((1, 0) if x0 == x1 else (0, 1)), ((x0 + x1) / 2, (y0 + y1) / 2)
        for side in (-1, 1):
            assert height(x + 0.148 * side * nx, y + 0.148 * side * ny) == pytest.approx(0.5)
            assert height(x + 0.152 * side * nx, y + 0.152 * side * ny) == pytest.approx(0)
            far, near = np.array([x, y]) + side * np.array([nx, ny]), np.array([x, y])
            for z in (0.01, 0.49):  # it stands on the ground
                hit = env.physics.rayTest((*far, z), (*near, z))[0]
                assert hit[0] == env.walls
                assert math.dist(hit[3], (*near, z)) == pytest.approx(0.15, abs=1e-4)
        for fraction in (0.01, 0.99):  # and is as long as its segment
            assert height(x0 + fraction * (x1 - x0), y0 + fraction * (y1 - y0)) > 0.49
    for x, y in [(1, 1), (1, 3), (5, 3), (9, 3), (9, 7), *COINS, FINISH]:  # the way is free
        assert height(x, y) == pytest.approx(0)


def test_start_without_noise(make):
    observation, info = make(start_noise=0).reset(seed=5)
    np.testing.assert_allclose(observation, [0.5, 0.5, 0, 0, np.pi / 2, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(info["position"], [0.5, 0.5, 0.1], atol=1e-9)
    assert info["steps"] == 0 and info["is_success"] is False


def test_observation_is_what_pybullet_says(make):
    env = make()
    env.reset(seed=3)
    for action in random_actions(3, 15):
        observation, _, _, _, info = env.step(action)
    position, orientation = pybullet.getBasePositionAndOrientation(env.car, env.physics.id)
    velocity, _ = pybullet.getBaseVelocity(env.car, env.physics.id)
    yaw = pybullet.getEulerFromQuaternion(orientation)[2]
    left = pybullet.getJointState(env.car, 4, env.physics.id)
    right = pybullet.getJointState(env.car, 6, env.physics.id)
    expected = [*position[:2], *velocity[:2], yaw, left[0], right[0], left[1], right[1]]
    np.testing.assert_array_equal(observation, np.float32(expected))
    assert np.abs(observation).min() > 0  # so that no two numbers could be swapped unnoticed
    assert info["position"].tolist() == list(position) and info["steps"] == 15


def test_steering_and_throttle(make):
    env = make(start_noise=0)
    env.reset(seed=0)
    for _ in range(12):
        observation, *_ = env.step(np.array([0.6, 0.5], dtype=np.float32))
    assert observation[4] < np.pi / 2 - 0.1  # positive turns right
    expected = -0.6 * (1 - 0.9**12)  # a tenth of the way in each step
    np.testing.assert_allclose(observation[5:7], expected, atol=0.02)

    env.reset(seed=0)
    for _ in range(20):
        observation, *_ = env.step(np.array([0, 0.5], dtype=np.float32))
    assert math.hypot(*observation[2:4]) == pytest.approx(1.27, abs=0.05)
    wheels = [env.physics.getJointState(env.car, joint)[1] for joint in (2, 3, 5, 7)]
    np.testing.assert_allclose(wheels, 25.0, rtol=0.02)


def test_a_wall_ends_the_episode_at_the_first_touch(make):
    env = make(start_noise=0)
    env.reset(seed=0)
    terminated = False
    while not terminated:
        assert wall_distance(env) > 0
        _, reward, terminated, truncated, info = env.step(STRAIGHT)
        if not terminated:
            assert reward == 0  # the wheels on the ground are no contact with a wall
    assert wall_distance(env) <= 0
    assert (reward, truncated, info["is_success"]) == (-1, False, False)
    assert 25 <= info["steps"] <= 35
    assert abs(info["position"][1] + 0.39 - 3.85) < 0.14  # its nose is at the wall's face


@pytest.mark.parametrize(("x", "y", "yaw"), [(13.2, 7.5, 0.0), (14.3, 6.3, np.pi / 2)])
def test_the_finish_pays_three_within_one_metre(make, x, y, yaw):
    env = make()
    env.reset(seed=0)
    teleport(env, x, y, yaw)
    terminated = False
    while not terminated:
        _observation, reward, terminated, truncated, info = env.step(np.float32([0, 0.4]))
        distance = math.dist(info["position"][:2], (14.5, 7.5))
        assert (distance <= 1.0) == terminated
        assert reward == (3 if terminated else 0)
    assert info["is_success"] is True and not truncated and 3 < info["steps"] < 40


def test_truncation(make):
    env = make(max_steps=4)
    env.reset(seed=0)
    ends = [env.step(PARKED)[1:4] for _ in range(4)]
    assert ends == [(0, False, False)] * 3 + [(0, False, True)]
    assert make().max_steps == 2000


def test_actions_outside_the_box_are_clipped(make):
    traces = []
    for wild, tame in (((7, 9), (1, 1)), ((-3, -2), (-1, 0)), ((0.5, 1.5), (0.5, 1))):
        for action in (wild, tame):
            env = make(start_noise=0)
            env.reset(seed=0)
            traces.append(np.stack([env.step(action)[0] for _ in range(12)]))
        np.testing.assert_array_equal(traces[-2], traces[-1])
    assert not np.array_equal(traces[0], traces[2])


@pytest.mark.parametrize(
    "action",
    [
        [np.nan, 0.5], [0, np.inf], [-np.inf, 0], [0], [0, 0, 0], [[0, 0]], 0.5, None, "left",
        ["a", "b"], {}, [None, 1], [1 + 1j, 0], [[1, 2], [3]],
    ],
    ids=repr,
)  # fmt: skip
def test_bad_actions_are_refused_before_physics_sees_them(make, action):
    env, untouched = make(), make()
    env.reset(seed=0), untouched.reset(seed=0)
    with pytest.raises(ValueError, match="action must be 2 finite numbers"):
        env.step(action)
    assert env.steps == 0
    np.testing.assert_array_equal(env.step(STRAIGHT)[0], untouched.step(STRAIGHT)[0])


def test_start_noise_is_uniform_in_its_range(make):
    env = make(start_noise=0.1)
    starts = np.stack([env.reset(seed=seed)[0] for seed in range(500)])
    noise = starts[:, [0, 1, 4]] - [0.5, 0.5, np.pi / 2]
    assert np.abs(noise).max() <= 0.1 + 1e-6
    assert np.abs(noise).max(axis=0).min() > 0.098
    grid = np.linspace(-0.1, 0.1, 21)
    for column in noise.T:  # Kolmogorov-Smirnov: more than 1.95 / sqrt(500) has probability 0.1 %
        distribution = np.searchsorted(np.sort(column), grid) / 500
        assert np.abs(distribution - np.linspace(0, 1, 21)).max() < 1.95 / math.sqrt(500)
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.2
    np.testing.assert_array_equal(starts[:, [2, 3, 5, 6, 7, 8]], 0)  # at rest, wheels straight


def test_the_largest_start_noise_is_clear_of_the_walls(make):
    env = make(start_noise=racecar_env.MAX_START_NOISE)
    for signs in np.ndindex(2, 2, 2):
        env.reset(seed=0)
        x, y, yaw = (np.array(signs) * 2 - 1) * racecar_env.MAX_START_NOISE
        teleport(env, 0.5 + x, 0.5 + y, np.pi / 2 + yaw)
        assert wall_distance(env) > 0.005


def test_coins_pay_once_in_each_episode_and_change_nothing_else(make):
    plain, paid = make(), make(coin_reward=0.5)
    assert plain.physics.getNumBodies() + 3 == paid.physics.getNumBodies()
    controller = WaypointController()
    for seed in (0, 1):  # the second time: they are back
        observation, _ = plain.reset(seed=seed)
        paid.reset(seed=seed)
        rewards, over = [], False
        while not over:
            action = controller(observation)
            observation, plain_reward, terminated, truncated, _ = plain.step(action)
            paid_observation, reward, *_ = paid.step(action)
            np.testing.assert_array_equal(observation, paid_observation)
            rewards.append(reward - plain_reward)
            over = terminated or truncated
        assert sorted(set(rewards)) == [0, 0.5] and sum(rewards) == 1.5


def test_coins_are_seen_until_they_are_taken(make):
    def coin_pixels(env):
        red, green, blue = np.moveaxis(env.render().astype(int), 2, 0)
        return int(((red > 150) & (green > 110) & (blue < 60)).sum())

    env = make(coin_reward=1, render_mode="rgb_array")

    def near_the_first_coin(y):
        teleport(env, 3.0, y, 0.0)
        _, reward, *_ = env.step(PARKED)
        return reward, coin_pixels(env)

    env.reset(seed=0)
    reward, three_coins = near_the_first_coin(2.4)  # 0.6 m away
    assert reward == 0
    reward, two_coins = near_the_first_coin(2.9)
    assert reward == 1 and 0 < two_coins < three_coins - 20
    assert near_the_first_coin(2.9) == (0, two_coins)
    env.reset(seed=0)
    assert near_the_first_coin(2.4) == (0, three_coins)

    plain = make(render_mode="rgb_array")
    plain.reset(seed=0)
    assert coin_pixels(plain) == 0


def test_camera(make):
    env = make(render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert first.shape == (240, 320, 3) and first.dtype == np.uint8
    for _ in range(15):
        env.step(STRAIGHT)
    assert (env.render() != first).mean() > 0.1  # it moves with the car

    arguments = []
    real = env.physics.getCameraImage
    env.physics.getCameraImage = lambda *args, **named: (
        arguments.extend(args) or real(*args, **named)
    )
    env.render()
    view = np.reshape(arguments[2], (4, 4)).T
    x, y, z = env._position
    np.testing.assert_allclose(np.linalg.inv(view)[:3, 3], [x - 5, y - 5, 5], atol=1e-4)
    distance = math.dist((x, y, z), (x - 5, y - 5, 5))
    np.testing.assert_allclose(view @ [x, y, z, 1], [0, 0, -distance, 1], atol=1e-4)
    vertical = 2 * math.degrees(math.atan(1 / arguments[3][5]))
    assert vertical == pytest.approx(60) and arguments[:2] == [320, 240]


# ---------------------------------------------------------------------------------- determinism


def test_any_history_gives_the_same_episode(make):
    env = make()
    alone = {}
    for seed in range(6):
        fresh = RaceCarEnv()
        alone[seed] = rollout(fresh, seed)
        fresh.close()
    assert len(set(alone.values())) == 6
    order = np.random.default_rng(0)
    for _ in range(40):  # after episodes that ended at a wall, and after some cut short
        seed = int(order.integers(6))
        assert rollout(env, seed) == alone[seed]
        rollout(env, int(order.integers(100)), num_steps=int(order.integers(1, 60)))


def test_two_processes_give_the_same_hash(make):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_racecar_env as t, hashlib;"
        "env = t.RaceCarEnv();"
        "print(hashlib.sha256(b''.join(t.rollout(env, s) for s in range(8))).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    }
    env = make()
    here = hashlib.sha256(b"".join(rollout(env, seed) for seed in range(8))).hexdigest()
    assert hashes == {here}


def test_seed_and_actions_are_a_snapshot_also_of_unseeded_episodes(make):
    env = make()
    env.reset(seed=7)
    for _ in range(3):
        env.reset()  # as a vector environment does it
    actions = random_actions(1, 20)
    for action in actions[:12]:
        observation, *_ = env.step(action)
    seed = env.np_random_seed

    copy = make()
    copy.reset(seed=seed)
    for action in actions[:12]:
        copied, *_ = copy.step(action)
    np.testing.assert_array_equal(copied, observation)
    for action in actions[12:]:
        np.testing.assert_array_equal(env.step(action)[0], copy.step(action)[0])
    for _ in range(3):  # and the episodes after it are the same as well
        np.testing.assert_array_equal(env.reset()[0], copy.reset()[0])


def test_two_in_one_process_do_not_touch_each_other(make):
    alone = [rollout(make(), seed) for seed in (1, 2)]
    first, second = make(), make()
    traces, alive = {first: [], second: []}, [first, second]
    for env, seed in ((first, 1), (second, 2)):
        observation, info = env.reset(seed=seed)
        traces[env] += [observation.tobytes(), info["position"].tobytes()]
    for step in range(150):
        for env, seed in ((first, 1), (second, 2)):
            if env not in alive:
                continue
            observation, reward, terminated, truncated, info = env.step(
                random_actions(seed, 150)[step]
            )
            traces[env] += [observation.tobytes(), info["position"].tobytes()]
            traces[env] += [bytes([terminated, truncated]), np.float64(reward).tobytes()]
            if terminated:
                alive.remove(env)
                env.close()  # the other one goes on
    assert [b"".join(traces[env]) for env in (first, second)] == alone


@pytest.mark.parametrize("vector_class", [SyncVectorEnv, AsyncVectorEnv])
def test_in_a_vector_as_alone(make, vector_class):
    num_envs, num_steps = 2, 150
    envs = vector_class([RaceCarEnv] * num_envs)
    actions = random_actions(0, num_steps, num_envs)
    observations, _ = envs.reset(seed=[10, 11])
    vector = [observations.copy()] + [envs.step(action)[0].copy() for action in actions]
    envs.close()

    ends = 0
    for i in range(num_envs):
        env = make()
        alone, over = [env.reset(seed=10 + i)[0]], False
        for action in actions[:, i]:
            if over:  # Gymnasium's vectors reset on the next step
                observation, over = env.reset()[0], False
            else:
                observation, _, terminated, truncated, _ = env.step(action)
                over = terminated or truncated
                ends += over
            alone.append(observation)
        np.testing.assert_array_equal(np.stack(vector)[:, i], np.stack(alone))
    assert ends >= 4


def test_rendering_does_not_change_the_episode(make):
    env = make(render_mode="rgb_array")
    _observation, _ = env.reset(seed=4)
    plain = make()
    plain.reset(seed=4)
    for action in random_actions(4, 12):
        env.render()
        np.testing.assert_array_equal(env.step(action)[0], plain.step(action)[0])


def test_what_is_forgotten_gives_its_client_back_and_nobody_elses():
    forgotten, closed = RaceCarEnv(), RaceCarEnv()
    numbers = forgotten.physics.id, closed.physics.id
    closed.close()
    other = RaceCarEnv()
    assert other.physics.id == numbers[1]
    del forgotten, closed
    assert not pybullet.getConnectionInfo(numbers[0])["isConnected"]
    assert pybullet.getConnectionInfo(numbers[1])["isConnected"]
    other.close()


def test_a_hundred_opened_and_closed_leave_nothing():
    def resident_kilobytes():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1024

    descriptors, clients, memory = len(os.listdir("/proc/self/fd")), [], []
    before = [pybullet.getConnectionInfo(i)["isConnected"] for i in range(120)]
    for seed in range(100):
        env = RaceCarEnv()
        env.reset(seed=seed)
        env.step(STRAIGHT)
        clients.append(env.physics.id)
        env.close()
        memory.append(resident_kilobytes())
    assert len(set(clients)) == 1
    assert [pybullet.getConnectionInfo(i)["isConnected"] for i in range(120)] == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert np.polyfit(np.arange(60), memory[40:], 1)[0] < 20  # kilobytes each; one holds 20,000


# ----------------------------------------------------------------------------- other libraries


def test_wrappers_of_gymnasium(tmp_path):
    env = gymnasium.make("RaceCar-v0", render_mode="rgb_array", max_steps=6)
    env = gymnasium.wrappers.RecordVideo(env, str(tmp_path / "videos"), disable_logger=True)
    env = gymnasium.wrappers.RecordEpisodeStatistics(env)
    env.reset(seed=0)
    truncated = False
    while not truncated:
        _, _, _, truncated, info = env.step(PARKED)
    env.close()
    assert info["episode"]["l"] == 6 and info["episode"]["r"] == 0
    assert len(list(tmp_path.glob("videos/*.mp4"))) == 1


def test_stable_baselines3_trains_on_it():
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import SubprocVecEnv

    envs = make_vec_env(
        "racecar_env:RaceCar-v0",
        2,
        seed=0,
        vec_env_cls=SubprocVecEnv,
        vec_env_kwargs={"start_method": "fork"},
    )
    model = PPO("MlpPolicy", envs, n_steps=128, batch_size=64, n_epochs=2, seed=0, device="cpu")
    before = model.policy.action_net.weight.detach().clone()
    model.learn(256)
    assert not before.equal(model.policy.action_net.weight)
    assert len(model.ep_info_buffer) > 0
    envs.close()


# ----------------------------------------------------------------- the expert and its recordings


@pytest.mark.parametrize("action_noise", [0.0, 0.1])
def test_the_controller_always_reaches_the_finish(make, action_noise):
    laps = list(record_laps(make(), WaypointController(), 12, action_noise, seed=500))
    assert all(lap.is_success for lap in laps) and len(laps) == 12
    lengths = [len(lap.actions) for lap in laps]
    assert min(lengths) >= 260 and max(lengths) <= 310
    assert all(lap.rewards.sum() == 3 and lap.terminated for lap in laps)


def test_the_controller_steers_by_minus_gain_times_heading_error():
    observation = np.zeros(9, dtype=np.float32)
    observation[[0, 1, 4]] = 5, 3, 0.25  # in the middle of the corridor, 0.25 rad too far left
    np.testing.assert_allclose(WaypointController()(observation), [0.25, 0.5], atol=1e-6)
    np.testing.assert_allclose(WaypointController(0.3, 2)(observation), [0.5, 0.3], atol=1e-6)
    observation[4] = -3.0  # the short way round, and clipped
    np.testing.assert_allclose(WaypointController()(observation), [-1, 0.5])


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / "racecar_env.py"), *arguments],
        capture_output=True,
        text=True,
        **options,
    )


def test_recorded_file_keeps_the_contract_and_replays(make, tmp_path):
    path = tmp_path / "demos.npz"
    flags = ["--episodes", "3", "--action-noise", "0.1", "--seed", "4"]
    result = run("--record-demos", str(path), *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("3 laps driven, 0 dropped")
    assert [file.name for file in tmp_path.iterdir()] == ["demos.npz"]

    with np.load(path, allow_pickle=False) as file:
        demos = dict(file)
    count = len(demos["observations"])
    assert {key: (value.dtype.name, value.shape) for key, value in demos.items()} == {
        "observations": ("float32", (count, 9)),
        "actions": ("float32", (count, 2)),
        "rewards": ("float32", (count,)),
        "episode_starts": ("bool", (count,)),
        "terminated": ("bool", (3,)),
        "metadata": (demos["metadata"].dtype.name, ()),
    }
    assert demos["metadata"].dtype.kind == "U"
    metadata = json.loads(str(demos["metadata"]))
    assert metadata == {
        "env_id": "RaceCar-v0",
        "expert": "waypoint controller, throttle 0.5, action noise 0.1",
        "seed": 4,
        "returns": [3.0, 3.0, 3.0],
        "dropped": 0,
    }
    assert demos["terminated"].all() and demos["rewards"].sum() == 9
    starts = np.flatnonzero(demos["episode_starts"])
    assert len(starts) == 3 and starts[0] == 0
    deviation = demos["actions"][:, 1] - 0.5
    assert deviation.std() == pytest.approx(0.1, rel=0.15) and abs(deviation.mean()) < 0.02
    assert demos["actions"].min() >= -1 and demos["actions"].max() <= 1

    env = make()  # the actions are those executed: they lead to the states beside them
    for episode, start in enumerate(starts):
        observation, _ = env.reset(seed=4 if episode == 0 else None)
        end = [*starts, count][episode + 1]
        for k in range(start, end):
            np.testing.assert_array_equal(observation, demos["observations"][k])
            observation, reward, terminated, *_ = env.step(demos["actions"][k])
            assert reward == demos["rewards"][k] and terminated == (k == end - 1)

    again = tmp_path / "again.npz"
    assert main(["--record-demos", str(again), *flags]) == 0
    assert again.read_bytes() == path.read_bytes()


def test_recorded_actions_are_clipped_to_the_box(make):
    lap = next(record_laps(make(), lambda observation: STRAIGHT, 1, action_noise=0.5))
    assert lap.actions.min() >= -1 and lap.actions.max() <= 1
    assert (lap.actions[:, 1] == 1).sum() > 5 and not lap.is_success


def test_failed_laps_and_a_persons_waiting_are_left_out():
    def lap(is_success, throttles):
        steps = len(throttles)
        actions = np.stack([np.zeros(steps), throttles], axis=1).astype(np.float32)
        observations = np.arange(9 * steps, dtype=np.float32).reshape(steps, 9)
        rewards = np.float32([0] * (steps - 1) + [3 if is_success else -1])
        return racecar_env.Lap(observations, actions, rewards, True, is_success)

    laps = [lap(False, [1, 1]), lap(True, [0, 0, 1, 0, 1]), lap(True, [0.5, 0.5])]
    demos = demonstrations_of(laps, "a person", 0)
    np.testing.assert_array_equal(demos["actions"][:, 1], [1, 0, 1, 0.5, 0.5])
    np.testing.assert_array_equal(demos["observations"][:, 0], [18, 27, 36, 0, 9])
    np.testing.assert_array_equal(demos["episode_starts"], [1, 0, 0, 1, 0])
    assert json.loads(str(demos["metadata"]))["dropped"] == 1


def test_a_write_that_fails_leaves_nothing(monkeypatch, tmp_path, capsys):
    path = tmp_path / "demos.npz"

    def savez(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(SystemExit, match="2"):
        main(["--record-demos", str(path), "--episodes", "1"])
    assert capsys.readouterr().err == "racecar_env.py: [Errno 28] No space left on device\n"
    assert not os.listdir(tmp_path)


BAD_INPUT = [
    ([], "nothing to do"),
    (["--drive"], "--drive records the laps"),
    (["--record-demos", "x.npz", "--episodes", "0"], "--episodes must be at least 1, found 0"),
    (["--record-demos", "x.npz", "--episodes", "two"], "--episodes: invalid int value: 'two'"),
    (["--record-demos", "x.npz", "--action-noise", "-1"], "--action-noise must be from 0 to 1"),
    (["--record-demos", "x.npz", "--action-noise", "nan"], "--action-noise must be from 0 to 1"),
    (["--record-demos", "x.npz", "--throttle", "0"], "--throttle must be above 0, up to 1"),
    (["--record-demos", "x.npz", "--throttle", "inf"], "--throttle must be above 0, up to 1"),
    (["--record-demos", "x.npz", "--seed", "-1"], "--seed must be at least 0, found -1"),
    (["--record-demos", "x.npz", "--laps", "3"], "unrecognized arguments: --laps 3"),
    (["--record-demos", "x.npz", "--throttle", "1", "--episodes", "1"], "no demonstrations"),
    (["--record-demos", "x.pkl"], "x.pkl: expected the name of a file that ends in .npz"),
    (["--record-demos", "folder.npz"], "folder.npz: exists already"),
    (["--record-demos", "old.npz"], "old.npz: exists already, expected a new file"),
    (["--video", "old.mp4"], "old.mp4: exists already, expected a new file"),
    (["--record-demos", "missing/x.npz"], "missing/x.npz: its folder does not exist"),
    (["--video", "lap.gif"], "lap.gif: expected the name of a file that ends in .mp4"),
    (["--render"], "needs a display"),
    (["--drive", "--record-demos", "x.npz"], "needs a display"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    (tmp_path / "folder.npz").mkdir()
    for name in ("old.npz", "old.mp4"):
        (tmp_path / name).write_text("old")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("racecar_env.py: ")
    assert {path.name for path in tmp_path.iterdir()} == {"folder.npz", "old.npz", "old.mp4"}
    assert all((tmp_path / name).read_text() == "old" for name in ("old.npz", "old.mp4"))


def test_bad_input_in_a_process_of_its_own(tmp_path):
    result = run("--record-demos", "missing/x.npz", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_help_names_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("record-demos", "video", "render", "drive", "episodes", "action-noise", "seed"):
        assert f"--{flag}" in text
    for default in ("50", "0.5", "0.0", "0"):
        assert f"(default: {default})" in text


def test_video_of_a_lap(tmp_path):
    from moviepy import VideoFileClip

    path = tmp_path / "lap.mp4"
    result = run("--video", str(path), "--throttle", "1")  # too fast for a whole lap: a short film
    assert (result.returncode, result.stderr) == (0, "")
    steps = int(result.stdout.split(": ")[1].split(" ")[0])
    with VideoFileClip(str(path)) as clip:
        assert (clip.size, clip.fps) == ([320, 240], 20)
        assert clip.duration * 20 == pytest.approx(steps + 1, abs=2)
    assert os.listdir(tmp_path) == ["lap.mp4"]


# ------------------------------------------------------------------------------ a person drives

UP, LEFT, RIGHT = pybullet.B3G_UP_ARROW, pybullet.B3G_LEFT_ARROW, pybullet.B3G_RIGHT_ARROW
DOWN, TRIGGERED, RELEASED = (
    pybullet.KEY_IS_DOWN,
    pybullet.KEY_WAS_TRIGGERED,
    pybullet.KEY_WAS_RELEASED,
)


@pytest.mark.parametrize(
    ("keys", "action"),
    [
        ({}, [0, 0]),
        ({UP: DOWN}, [0, 0.7]),
        ({UP: DOWN | TRIGGERED, LEFT: DOWN}, [-1, 0.7]),
        ({RIGHT: TRIGGERED}, [1, 0]),
        ({LEFT: DOWN, RIGHT: DOWN}, [0, 0]),
        ({UP: RELEASED, LEFT: RELEASED}, [0, 0]),
        ({ord("a"): DOWN, pybullet.B3G_DOWN_ARROW: DOWN}, [0, 0]),
    ],
)
def test_arrow_keys(keys, action):
    chosen = action_from_keys(keys, throttle=0.7)
    assert chosen.dtype == np.float32
    np.testing.assert_allclose(chosen, action)


def test_driven_laps_are_recorded_until_ctrl_c(monkeypatch, tmp_path):
    """A driver with the controller's eyes and three keys, in a world without a window."""

    class WindowlessClient(racecar_env.PhysicsClient):
        def __init__(self, mode):
            assert mode == pybullet.GUI
            super().__init__(pybullet.DIRECT)
            self.laps, self.calls = 0, 0

        def restoreState(self, state):
            self.laps, self.calls = self.laps + 1, 0
            pybullet.restoreState(state, physicsClientId=self.id)

        def getKeyboardEvents(self):
            self.calls += 1
            if self.laps == 3:
                raise KeyboardInterrupt
            if self.calls <= 5:
                return {}  # waits before the start
            if self.laps == 1:
                return {UP: DOWN}  # straight into the wall
            car = pybullet.getNumBodies(physicsClientId=self.id) - 1
            (x, y, _), orientation = pybullet.getBasePositionAndOrientation(car, self.id)
            observation = np.zeros(9, dtype=np.float32)
            observation[[0, 1, 4]] = x, y, pybullet.getEulerFromQuaternion(orientation)[2]
            steering = WaypointController()(observation)[0]
            joint = -pybullet.getJointState(car, 4, self.id)[0]
            if abs(steering - joint) < 0.05:
                return {UP: DOWN}
            return {UP: DOWN, RIGHT if steering > joint else LEFT: DOWN}

    monkeypatch.setattr(racecar_env, "PhysicsClient", WindowlessClient)
    monkeypatch.setattr(racecar_env.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("DISPLAY", ":0")
    path = tmp_path / "mine.npz"
    assert main(["--drive", "--record-demos", str(path), "--throttle", "0.4"]) == 0
    with np.load(path, allow_pickle=False) as demos:
        metadata = json.loads(str(demos["metadata"]))
        actions = demos["actions"]
        assert demos["episode_starts"].sum() == 1 and demos["terminated"].tolist() == [True]
    assert metadata["expert"] == "a person, throttle 0.4, action noise 0"
    assert (metadata["returns"], metadata["dropped"]) == ([3.0], 1)
    assert actions[0, 1] == np.float32(0.4)  # not the wait
    assert set(np.unique(actions[:, 0])) <= {-1.0, 0.0, 1.0}
