"""RaceCar-v0 and experts/racecar.py: what they promise, on real runs."""

import copy
import json
import math
import multiprocessing
import os
import pickle
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import racecar
from gymnasium.utils.env_checker import check_env
from moviepy import VideoFileClip
from scripts import ROOT, Case, environment, python

import racecar_env as env_module
from racecar_env import RaceCarEnv, RaceCarVectorEnv, WaypointController, pybullet

PROGRAM = ROOT / "experts/racecar.py"
PARKED = np.float32([0, 0])
NOT_ACTIONS = [[np.nan, 0], [0, np.inf], [0], [0] * 3, [[0, 0]], 0.5, {0: 1, 1: 2}, None]
NOT_ACTIONS += ["ab", [1j, 0]]
WAYS = [copy.deepcopy, copy.copy, lambda env: pickle.loads(pickle.dumps(env))]  # to a copy


def random_actions(seed, *shape):
    return np.random.default_rng(seed).uniform([-1, 0], [1, 1], (*shape, 2)).astype(np.float32)


def drive(env, actions):
    """All that these steps show, as bytes; an episode that is over is followed by the next."""
    shown = []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(observation)
        facts = repr((reward, terminated, truncated, info["steps"])).encode()
        shown += [observation.tobytes(), info["position"].tobytes(), facts]
        if terminated or truncated:
            shown.append(env.reset()[0].tobytes())
    return b"".join(shown)


def rollout(env, seed, num_steps=100):
    return env.reset(seed=seed)[0].tobytes() + drive(env, random_actions(seed, num_steps))


def teleport(env, x, y, yaw):
    orientation = env.physics.getQuaternionFromEuler((0, 0, yaw))
    env.physics.resetBasePositionAndOrientation(env.car, (x, y, 0.0), orientation)


def wall_distance(env):
    return min(point[8] for point in env.physics.getClosestPoints(env.car, env.walls, 5.0))


@pytest.mark.parametrize("before", ["", "import os; os.close(2);"], ids=["shell", "daemon"])
def test_importing_registers_it_and_says_nothing(before):
    code = (
        "import gymnasium, importlib, sys; env = gymnasium.make('racecar_env:RaceCar-v0');"
        "importlib.reload(sys.modules['racecar_env']); print(env.spec.reward_threshold)"
    )
    result = python("-W", "error", "-c", before + code, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "2.92\n", "")


@pytest.mark.filterwarnings("error")
def test_gymnasium_checker_has_no_warning():
    env = gymnasium.make("RaceCar-v0", render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)  # it would open a window
    assert env.observation_space.shape == (9,) and env.observation_space.dtype == np.float32
    assert env.action_space == gymnasium.spaces.Box(np.float32([-1, 0]), np.float32([1, 1]))


def test_settings_out_of_range_are_refused():
    for name, message, values in (
        ("render_mode", "None, human or rgb_array, got ", ["ansi"]),
        ("start_noise", "a number from 0 to 0.14, got ", [-0.1, 0.2, math.nan, "0.1"]),
        ("coin_reward", "a number from 0 to 1000000, got ", [-1.0, math.inf, None]),
        ("max_steps", "a whole number from 1 to 1000000000, got ", [0, 10.0, True]),
        ("height", "a whole number from 1 to 10000, got ", [0, 6.4, "480"]),
        ("view", "close or far, got ", ["near", None]),
        ("num_envs", "a whole number from 1 to ", [0, 2.5]),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"{name} must be {message}"):
                RaceCarVectorEnv(**{name: value})


def test_use_at_the_wrong_time_is_refused():
    env = RaceCarEnv(max_steps=3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(PARKED)
    env.reset(seed=0)
    with pytest.raises(gymnasium.error.Error, match="render_mode"):
        env.render()
    ends = [env.step(PARKED)[1:4] for _ in range(3)]
    assert ends == [(0, False, False)] * 2 + [(0, False, True)]  # truncated by max_steps
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(PARKED)
    env.close(), env.close()
    for use in (env.reset, env.render, lambda: env.step(PARKED)):
        with pytest.raises(gymnasium.error.ClosedEnvironmentError, match="closed"):
            use()


def test_actions_are_clipped_to_the_box_or_refused_before_physics_sees_them():
    env, traces = RaceCarEnv(), []
    for action in ((7, 9), (1, 1), (-3, -2), (-1, 0), (0.5, 1.5), (0.5, 1)):
        env.reset(seed=0)
        if len(traces) % 2:
            for bad in NOT_ACTIONS:
                with pytest.raises(ValueError, match="action must be 2 finite numbers"):
                    env.step(bad)
        traces.append(drive(env, [action] * 12))
    assert traces[::2] == traces[1::2] and len(set(traces)) == 3


def test_the_world_is_the_specified_one():
    env = RaceCarEnv()

    def height(x, y):  # of what a ray from above meets first; 0 where that is the ground
        body, _, _, (_, _, z), _ = env.physics.rayTest((x, y, 1), (x, y, -1))[0]
        assert (body == env.walls) == (z > 0.01)
        return pytest.approx(z, abs=1e-6)

    assert np.sum(env_module.WALL_SEGMENTS, axis=0).tolist() == [55, 32, 85, 48]
    for x0, y0, x1, y1 in env_module.WALL_SEGMENTS:
        across, middle = np.array([x0 == x1, y0 == y1]), np.array([x0 + x1, y0 + y1]) / 2
        for side in (-1, 1):  # 0.3 thick
            assert height(*(middle + 0.148 * side * across)) == 0.5
            assert height(*(middle + 0.152 * side * across)) == 0
        for part in (0.01, 0.99):
            assert height(x0 + part * (x1 - x0), y0 + part * (y1 - y0)) == 0.5


def test_the_first_touch_of_a_wall_or_one_metre_from_the_finish_ends_an_episode():
    start, env = (0.5, 0.5, np.pi / 2), RaceCarEnv(start_noise=0)
    to_a_wall = [(start, throttle) for throttle in (0.1, 0.4, 1)]
    for pose, throttle in [*to_a_wall, ((13.2, 7.5, 0), 0.4), ((14.3, 6.3, np.pi / 2), 0.4)]:
        env.reset(seed=0)
        teleport(env, *pose)
        terminated = False
        while not terminated:
            observation, reward, terminated, truncated, info = env.step([0, throttle])
            touches = wall_distance(env) <= 0
            near = math.dist(info["position"][:2], (14.5, 7.5)) <= 1
            assert terminated == (touches or near) and not truncated
            assert reward == 3 * near - touches and info["is_success"] is near
        assert near == (pose is not start) == (env_module.progress(observation) == 1)


def test_start_noise_fills_its_range_and_is_clear_of_the_walls():
    env = RaceCarEnv(start_noise=0.14)
    starts = np.stack([env.reset(seed=seed)[0] for seed in range(500)])
    noise = (starts[:, [0, 1, 4]] - [0.5, 0.5, np.pi / 2]) / 0.14
    assert np.abs(noise).max() <= 1 + 1e-5
    uniform = np.linspace(-1, 1, 500)[:, None]
    assert np.abs(np.sort(noise, axis=0) - uniform).max() < 2 * 1.95 / math.sqrt(500)
    np.testing.assert_array_equal(starts[:, [2, 3, 5, 6, 7, 8]], 0)  # at rest, wheels straight
    for signs in np.ndindex(2, 2, 2):
        x, y, yaw = (np.array(signs) * 2 - 1) * 0.14
        teleport(env, 0.5 + x, 0.5 + y, np.pi / 2 + yaw)
        assert wall_distance(env) > 0.005


def test_pictures_show_coins_until_they_are_taken_and_follow_the_car():
    def coin_pixels():
        red, green, blue = np.moveaxis(env.render().astype(int), 2, 0)
        return int(((red > 150) & (green > 110) & (blue < 60)).sum())

    env = RaceCarEnv(coin_reward=1, render_mode="rgb_array", view="far")  # all three coins in sight
    for _again in range(2):
        env.reset(seed=0)
        first, seen = env.render(), []
        for y, reward in ((2.4, 0), (2.9, 1), (2.9, 0)):  # 0.6 m away, then at the first coin
            teleport(env, 3.0, y, 0.0)
            assert env.step(PARKED)[1] == reward
            seen.append(coin_pixels())
        assert 0 < seen[1] == seen[2] < seen[0] - 20
    assert first.shape == (480, 640, 3) and first.dtype == np.uint8
    assert (env.render() != first).mean() > 0.1


def test_what_is_drawn_changes_no_physics():
    settings = {"render_mode": "rgb_array", "width": 64, "height": 48}
    plain, close, far = RaceCarEnv(), RaceCarEnv(**settings), RaceCarEnv(view="far", **settings)
    pictures = []
    for seed in range(3):
        moved = rollout(plain, seed)
        for env in (close, far):
            assert rollout(env, seed) == moved
            pictures.append(env.render())
            other, actions = copy.copy(plain), random_actions(9, 50)
            assert drive(env, actions) == drive(other, actions)
    assert {picture.shape for picture in pictures} == {(48, 64, 3)}
    assert (pictures[0] != pictures[1]).mean() > 0.1


def test_seed_and_actions_are_a_snapshot_after_any_history():
    alone = [rollout(RaceCarEnv(), seed) for seed in range(4)]
    env, random = RaceCarEnv(), np.random.default_rng(0)
    for k in range(25):  # after episodes that ended at a wall, and after some cut short
        rollout(env, int(random.integers(100)), num_steps=int(random.integers(1, 60)))
        assert rollout(env, k % 4) == alone[k % 4]
    env.reset()  # an episode that no seed was given for has one all the same
    replayed = RaceCarEnv()
    replayed.reset(seed=env.np_random_seed)
    actions = random_actions(1, 300)
    assert drive(env, actions) == drive(replayed, actions)  # the episodes that follow as well


@pytest.mark.parametrize("copy_of", WAYS)
def test_a_copy_goes_on_alike_and_by_itself(copy_of):
    env = RaceCarEnv(coin_reward=1, render_mode="rgb_array")
    unseeded = copy_of(env)
    np.testing.assert_array_equal(env.reset()[0], unseeded.reset()[0])
    drive(env, random_actions(0, 20))
    env.np_random.random()  # a later seed depends on that
    reached, new, unmoved = env.render(), copy_of(env), copy_of(env)
    actions = random_actions(1, 200)
    shown = drive(new, actions)  # over several episodes
    np.testing.assert_array_equal(env.render(), reached)
    new.close()
    assert drive(env, actions) == shown
    env.close()
    assert drive(unmoved, actions) == shown
    with pytest.raises(TypeError, match=r"closed, .* cannot be copied"):
        copy_of(env)
    for name in ("start_noise", "max_steps"):  # for the episodes after this one
        changed = RaceCarEnv()
        rollout(changed, 1, num_steps=8)
        setattr(changed, name, 0)
        with pytest.raises(TypeError, match="a setting, or the car, was changed"):
            copy_of(changed)


def test_a_pickled_environment_goes_on_in_another_process():
    env = gymnasium.wrappers.OrderEnforcing(RaceCarEnv())
    rollout(env, 3, num_steps=20)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        shown = pool.apply(drive, (env, random_actions(1, 200)))
    assert shown == drive(env, random_actions(1, 200))


def test_what_is_closed_or_forgotten_leaves_nothing():
    clients, memory = set(), []
    for k in range(60):
        env = RaceCarEnv()
        rollout(env, k, num_steps=2)
        clients.add(env.physics.id)
        if k % 2:
            env.close()
        del env
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]))
    (client,) = clients
    assert not pybullet.getConnectionInfo(client)["isConnected"]
    assert np.polyfit(np.arange(40), memory[20:], 1)[0] < 50  # pages each; one holds 7,000


def test_the_vector_form_is_single_environments_that_rest_when_over():
    settings = {"max_steps": 40, "start_noise": 0.05, "render_mode": "rgb_array"}
    envs = gymnasium.make_vec("RaceCar-v0", 3, vectorization_mode="vector_entry_point", **settings)
    singles = [RaceCarEnv(**settings) for _ in range(3)]
    observations, _ = envs.reset(seed=4)
    expected = np.stack([env.reset(seed=4 + i)[0] for i, env in enumerate(singles)])
    for step, actions in enumerate(random_actions(0, 160, 3)):
        np.testing.assert_array_equal(observations, expected)
        running = np.array([env.running for env in singles])
        if step % 20 == 19:  # some cars rest, others drive
            observations, _ = envs.reset(options={"reset_mask": ~running})
            for i in np.flatnonzero(~running):
                expected[i], _ = singles[i].reset()
            envs, old = copy.copy(envs), envs
            old.close()
        elif running.any():
            actions[~running] = np.nan  # ignored
            observations, *shown, info = envs.step(actions)
            assert not any(column[~running].any() for column in (*shown, info["is_success"]))
            for i in np.flatnonzero(running):
                expected[i], *end, _ = singles[i].step(actions[i])
                assert end == [column[i] for column in shown]
    np.testing.assert_array_equal(envs.render(), [env.render() for env in singles])
    envs.reset(seed=np.int64(4))
    with pytest.raises(ValueError, match="2 finite numbers"):  # before a car moves
        envs.step(np.float32([[0, 1], [0, 1], [0, np.nan]]))
    for wrong in (np.zeros((4, 2)), np.zeros(2), None):
        with pytest.raises(ValueError, match=r"actions must be \(3, 2\)"):
            envs.step(wrong)
    assert not any(env.steps for env in envs.envs)
    assert envs.render_mode == "rgb_array"  # wrappers ask for it
    with pytest.raises(ValueError, match=r"reset_mask must be \(3,\) bool"):
        envs.reset(options={"reset_mask": [0, 2]})
    for seeds in ([1, 2], [1, 2, 3, 4]):
        with pytest.raises(ValueError):
            envs.reset(seed=seeds)
    envs.close()


@pytest.mark.parametrize("coin_reward", [0, 0.5])
def test_the_controller_reaches_the_finish_as_in_earlier_versions(coin_reward):
    """Through three coins, which pay once each, and past all that is drawn: nothing collides."""
    env = RaceCarEnv(coin_reward=coin_reward, render_mode="rgb_array")
    driven = racecar.record_laps(env, WaypointController(), 3, action_noise=0.1, seed=500)
    laps = [next(driven) for _ in range(3)]
    assert [len(lap.actions) for lap in laps] == [285, 292, 288]
    last = [13.4688, 7.2757, 1.3142, 0.3378, 0.2305, -0.0403, -0.0475, -0.1029, -0.0833]
    np.testing.assert_allclose(laps[2].observations[-1], last, atol=1e-3)
    assert [lap.rewards.sum() for lap in laps] == [3 + 3 * coin_reward] * 3
    way = [env_module.progress(observation) for observation in laps[0].observations]
    assert way[0] < 0.1 and min(np.diff(way)) >= 0


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return {**file, "metadata": json.loads(str(file["metadata"]))}


def test_a_recorded_file_keeps_the_contract_and_replays(tmp_path):
    flags = ["--demos", "demos.npz", "--episodes", "3", "--action-noise", "0.3", "--seed", "4"]
    result = python(PROGRAM, *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr, os.listdir(tmp_path)) == (0, "", ["demos.npz"])
    demos = load(tmp_path / "demos.npz")
    about = demos["metadata"]
    assert demos["observations"].dtype == demos["actions"].dtype == np.float32
    assert about["command"] == f"python experts/racecar.py {' '.join(flags)}"
    assert (about["env_id"], about["seed"], about["dropped"]) == ("RaceCar-v0", 4, 0)
    assert about["returns"] == [3.0, 3.0, 3.0] and about["expert"] and about["versions"]
    # The actions are those executed, noise and clipping included: they lead to the states beside.
    throttles = demos["actions"][:, 1]
    assert 0.25 < throttles.std() < 0.3 and throttles.min() == 0 and throttles.max() == 1
    env, ends = RaceCarEnv(), np.append(demos["episode_starts"][1:], True)
    observation, _ = env.reset(seed=4)
    for k, action in enumerate(demos["actions"]):
        np.testing.assert_array_equal(observation, demos["observations"][k])
        observation, reward, terminated, *_ = env.step(action)
        assert reward == demos["rewards"][k] and terminated == ends[k]
        if terminated:
            observation, _ = env.reset()
    assert ends.sum() == 3 and demos["terminated"].all() and demos["episode_starts"][0]


def test_the_model_of_a_person_holds_the_wheel_still_and_is_the_same_again(tmp_path):
    for name in ("first.npz", "again.npz"):
        flags = ["--demos", name, "--episodes", "2", "--manner", "human"]
        assert python(PROGRAM, *flags, cwd=tmp_path).returncode == 0
    first, again = (load(tmp_path / name) for name in ("first.npz", "again.npz"))
    assert (first["actions"] == again["actions"]).all() and first["terminated"].all()
    assert "model of a person" in first["metadata"]["expert"]
    assert (np.diff(first["actions"][:, 0]) == 0).mean() > 0.6


def test_a_person_drives_with_arrow_keys_until_ctrl_c(monkeypatch, tmp_path):
    """One with the controller's eyes and three keys, who waits, fails, finishes and stops."""
    env, laps, path = RaceCarEnv(), [], tmp_path / "mine.npz"
    up, left, right = pybullet.B3G_UP_ARROW, pybullet.B3G_LEFT_ARROW, pybullet.B3G_RIGHT_ARROW

    def keys():
        laps.extend([1] * (env.steps == 0))
        if len(laps) == 3:
            raise KeyboardInterrupt
        (x, y, _), orientation = env.physics.getBasePositionAndOrientation(env.car)
        yaw = env.physics.getEulerFromQuaternion(orientation)[2]
        turn = WaypointController()(np.array([x, y, 0, 0, yaw]))[0]
        turn += env.physics.getJointState(env.car, 4)[0]  # more than the wheels have turned yet
        if len(laps) == 1 or abs(turn) < 0.05:  # on the first lap straight into the wall
            turn = 0
        pressed = {right: turn > 0, left: turn < 0, up: env.steps >= 5}
        return {key: pybullet.KEY_IS_DOWN for key, down in pressed.items() if down}

    env.physics.getKeyboardEvents = keys
    monkeypatch.setattr(racecar.gym, "make", lambda env_id, render_mode: env)
    assert racecar.main(["--drive", "--demos", str(path), "--throttle", "0.4"]) == 0
    demos = load(path)
    assert demos["episode_starts"].sum() == 1 and demos["terminated"].tolist() == [True]
    assert demos["metadata"]["expert"].startswith("a person") and demos["metadata"]["dropped"] == 1
    assert set(np.unique(demos["actions"][:, 0])) == {-1, 0, 1}
    assert demos["actions"][0, 1] > 0  # the wait is left out: it would teach the car to park


def test_video_of_a_lap(tmp_path):
    flags = ["--video", "lap.mp4", "--throttle", "1", "--seed", "1"]  # soon at a wall: a short film
    result = python(PROGRAM, *flags, cwd=tmp_path)
    assert (result.returncode, result.stderr, os.listdir(tmp_path)) == (0, "", ["lap.mp4"])
    with VideoFileClip(str(tmp_path / "lap.mp4")) as clip:
        steps = int(result.stdout.split()[1])
        assert clip.fps == 20 and clip.duration * 20 == pytest.approx(steps + 1, abs=2)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "import racecar; sys.exit(racecar.main(['--demos', sys.argv[1], '--episodes', '1']))"
    )
    result = python("-B", "-c", code, tmp_path / "demos.npz", cwd=ROOT / "experts")
    assert result.returncode == 1 and result.stdout == "" and os.listdir(tmp_path) == []
    assert result.stderr == f"racecar.py: {tmp_path}/demos.npz: [Errno 27] File too large\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--demos x.npz --episodes 0", "--episodes must be at least 1, found 0"),
        ("--demos x.npz --throttle 1 --episodes 1", "12 dropped (no finish): no demonstrations"),
        ("--demos old.npz", "old.npz: exists already, expected a new file"),
        ("--demos missing/x.npz", "missing/x.npz: its folder does not exist"),
    ],
)
def test_bad_input_is_one_line(flags, message, monkeypatch, tmp_path, refused):
    monkeypatch.chdir(tmp_path)
    Path("old.npz").write_text("old")
    refused(Case("racecar"), flags.split(), message)


@pytest.mark.skipif(sys.platform != "linux", reason="X11")
@pytest.mark.parametrize("display", ["", ":4077", "localhost:4077"])
def test_a_window_without_a_display_is_one_line(display, tmp_path):
    arguments = (PROGRAM, "--drive", "--demos", tmp_path / "mine.npz")
    result = python(*arguments, env=environment(DISPLAY=display))
    found = f"needs a display with OpenGL, found none at DISPLAY={display}\n"
    assert result.returncode == 2 and result.stderr == f"racecar.py: render_mode human {found}"
    assert os.listdir(tmp_path) == []
