"""RaceCar-v0: a car in an S-shaped corridor, to be driven to the finish without touching a wall.

PyBullet's racecar at 20 Hz: one physics step of 1/20 s for each environment step. Importing this
module registers the environment; `gymnasium.make("racecar_env:RaceCar-v0")` does both at once.

    observation (9,) float32   x, y (m), vx, vy (m/s), yaw (rad), then the angles (rad) and the
                               velocities (rad/s) of the left and the right steering joint
    action (2,) float32        steering in [-1, 1] rad (positive: right), throttle in [0, 1]
    reward                     -1 at a wall, +3 at the finish (both terminate), else 0, plus coins
    truncated                  after max_steps = 2,000 steps
    info                       steps (int), position (x, y, z) in metres, is_success (bool)

reset(seed=s) determines the whole episode: (s, the actions since) is a snapshot that replays to
the last bit, with the same settings, in any process, after any history. A reset without a seed
draws one and keeps it in `np_random_seed`; later resets without a seed follow from it as well.

copy.deepcopy and pickle build a new world and replay the episode's actions there.

`gymnasium.make_vec("RaceCar-v0", 8)` gives several cars in one process, a RaceCarVectorEnv. An
expert comes with them, a waypoint controller that needs no training (about 285 steps to the end);
experts/racecar.py records and films it, or lets a person drive."""

# /// script
# requires-python = ">=3.11,<3.12"  # pybullet has wheels for CPython up to 3.11 on Linux
# dependencies = ["gymnasium>=1.1,<2", "pybullet", "numpy"]
# ///

import contextlib
import copy
import ctypes
import functools
import math
import numbers
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence file descriptor 2: pybullet prints a greeting there, where only errors belong."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed, as in a daemon: silent enough
        yield
        return
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


with _silent_stderr():
    import pybullet
    import pybullet_data

# ----------------------------------------------------------------------------- the world, in metres
WALL_SEGMENTS = (  # x0, y0, x1, y1: along x or y, x0 <= x1, y0 <= y1
    (0, 0, 2, 0), (0, 0, 0, 4), (2, 0, 2, 2), (0, 4, 8, 4), (2, 2, 10, 2),
    (10, 2, 10, 6), (10, 6, 15, 6), (8, 4, 8, 8), (8, 8, 15, 8), (15, 6, 15, 8),
)  # fmt: skip
WALL_THICKNESS, WALL_HEIGHT = 0.3, 0.5
START_POSITION, START_YAW = (0.5, 0.5, 0.1), math.pi / 2
MAX_START_NOISE = 0.14  # the wall is 0.35 m away; with more, a car can start inside it
FINISH, FINISH_RADIUS = (14.5, 7.5), 1.0
COINS, COIN_RADIUS = ((3.0, 3.0), (9.0, 5.0), (11.0, 7.0)), 0.5
WALL_REWARD, FINISH_REWARD = -1.0, 3.0

CONTROL_RATE = 20  # Hz
STEERING_JOINTS, WHEEL_JOINTS = (4, 6), (2, 3, 5, 7)  # left before right, rear before front
WHEEL_SPEED, WHEEL_FORCE = 50.0, 100.0  # rad/s at throttle 1; largest torque

VIEWS = {"close": (-1.5, -1.5, 2.4), "far": (-5.0, -5.0, 5.0)}  # camera minus car, z: height; x = y
FIELD_OF_VIEW, WALL_COLOR = 60.0, (0.85, 0.35, 0.15, 1)
CHECKS = [(14.2 + (k % 5 - 2) * 0.26, 7.2 + (k // 5 - 2) * 0.26, 0.005) for k in range(1, 25, 2)]
MARKS = (  # centre, half extents, colour: the start's line; the finish, black with white checks
    ((1.0, 1.0, 0.0), (0.85, 0.1, 0.01), (0.1, 0.6, 0.3, 1)),
    ((14.2, 7.2, 0.0), (0.65, 0.65, 0.01), (0.1, 0.1, 0.1, 1)),
    *((center, (0.13, 0.13, 0.01), (1, 1, 1, 1)) for center in CHECKS),
)

# x, y, vx, vy, yaw, angles, velocities: wider than any state before a wall ends the episode.
OBSERVATION_LIMIT = np.array([16, 9, 10, 10, math.pi, 2, 2, 50, 50], dtype=np.float32)


class PhysicsClient:
    """pybullet with its own client's id in every call, as in client.stepSimulation().

    A client without a window is released once, by disconnect() or when nothing refers to this
    object any more. One with a window only by disconnect(): its user may have closed it, and later
    its id may belong to another client."""

    def __init__(self, mode: int) -> None:
        self.id = pybullet.connect(mode)
        if mode == pybullet.DIRECT:
            self.disconnect = weakref.finalize(self, pybullet.disconnect, physicsClientId=self.id)

    def __getattr__(self, name: str) -> Callable:
        function = functools.partial(getattr(pybullet, name), physicsClientId=self.id)
        setattr(self, name, function)  # from now on found without this method
        return function


class RaceCarEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """The race car. Each environment has a physics client of its own and shares nothing.

    start_noise: half width of the uniform noise on the start's x, y (metres) and yaw (radians).
    coin_reward: paid once for each coin that the car comes within 0.5 m of; 0: there are no coins.
    max_steps: the episode is truncated after this many steps.
    width, height: of the pictures, in pixels. view: where the camera is, "close" or "far".
    Raises ValueError for a setting out of range, RuntimeError for a window without a display."""

    metadata = {"render_modes": ["human", "rgb_array"], "render_fps": CONTROL_RATE}  # noqa: RUF012

    def __init__(
        self,
        render_mode: str | None = None,
        start_noise: float = 0.1,
        coin_reward: float = 0.0,
        max_steps: int = 2000,
        width: int = 640,
        height: int = 480,
        view: str = "close",
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None, human or rgb_array, got {render_mode!r}")
        if view not in VIEWS:
            raise ValueError(f"view must be close or far, got {view!r}")
        _check_number("start_noise", start_noise, numbers.Real, 0, MAX_START_NOISE)
        _check_number("coin_reward", coin_reward, numbers.Real, 0, 1_000_000)
        _check_number("max_steps", max_steps, numbers.Integral, 1, 1_000_000_000)
        _check_number("width", width, numbers.Integral, 1, 10_000)
        _check_number("height", height, numbers.Integral, 1, 10_000)
        self.render_mode, self.view = render_mode, view
        self.max_steps, self.width, self.height = int(max_steps), int(width), int(height)
        self.start_noise, self.coin_reward = float(start_noise), float(coin_reward)
        self.observation_space = gymnasium.spaces.Box(-OBSERVATION_LIMIT, OBSERVATION_LIMIT)
        self.action_space = gymnasium.spaces.Box(np.float32([-1, 0]), np.float32([1, 1]))
        self.steps, self._position = 0, START_POSITION
        self.running = False  # between a reset and the end of its episode
        self._seed: int | None = None  # of the episode; with its actions, a snapshot
        self._actions: list[tuple[float, float]] = []
        self.physics: PhysicsClient | None = self._connect()  # None once closed
        self._build_world(self.physics)

    def _connect(self) -> PhysicsClient:
        if self.render_mode != "human":
            return PhysicsClient(pybullet.DIRECT)
        if sys.platform == "linux":
            _check_display()
        physics = PhysicsClient(pybullet.GUI)
        physics.configureDebugVisualizer(pybullet.COV_ENABLE_GUI, 0)
        physics.configureDebugVisualizer(pybullet.COV_ENABLE_KEYBOARD_SHORTCUTS, 0)
        return physics

    def _build_world(self, physics: PhysicsClient) -> None:
        """Load everything once and save the state that every reset restores."""
        physics.setTimeStep(1 / CONTROL_RATE)
        physics.setGravity(0, 0, -10)
        # Without this the solver's order depends on earlier episodes, and a reset is not exact.
        physics.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        physics.setAdditionalSearchPath(pybullet_data.getDataPath())
        # Meshes that nobody will look at would take 7 MB; the motion is the same without them.
        flags = 0 if self.render_mode else pybullet.URDF_IGNORE_VISUAL_SHAPES
        # Maximal coordinates suit a body without joints: the same motion in 3 % less time.
        physics.loadURDF("plane.urdf", useMaximalCoordinates=True, flags=flags)

        # All walls are one static body, so that one query answers "does the car touch a wall?".
        boxes, colors = [pybullet.GEOM_BOX] * len(WALL_SEGMENTS), [WALL_COLOR] * len(WALL_SEGMENTS)
        half_extents, centers = [], []
        for x0, y0, x1, y1 in WALL_SEGMENTS:
            size_x, size_y = x1 - x0 or WALL_THICKNESS, y1 - y0 or WALL_THICKNESS
            half_extents.append((size_x / 2, size_y / 2, WALL_HEIGHT / 2))
            centers.append(((x0 + x1) / 2, (y0 + y1) / 2, WALL_HEIGHT / 2))
        solid = physics.createCollisionShapeArray(
            boxes, halfExtents=half_extents, collisionFramePositions=centers
        )
        picture = physics.createVisualShapeArray(
            boxes, halfExtents=half_extents, visualFramePositions=centers, rgbaColors=colors
        )
        self.walls = physics.createMultiBody(0, solid, picture)  # mass 0: static
        physics.changeDynamics(self.walls, -1, lateralFriction=1.0, restitution=0.7)
        for center, half, color in MARKS if self.render_mode else ():  # without collision shape
            shape = physics.createVisualShape(pybullet.GEOM_BOX, halfExtents=half, rgbaColor=color)
            physics.createMultiBody(0, -1, shape, center)

        self._coins: dict[int, tuple[float, float]] = {}  # by body; without collision shape
        look = {"radius": 0.2, "length": 0.05, "rgbaColor": (1, 0.8, 0, 1)}
        for coin in COINS if self.coin_reward else ():
            shape = physics.createVisualShape(pybullet.GEOM_CYLINDER, **look)
            self._coins[physics.createMultiBody(0, -1, shape, (*coin, 0.2))] = coin

        self.car = physics.loadURDF("racecar/racecar.urdf", START_POSITION, flags=flags)
        self._saved_state = physics.saveState()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Put the car at the start, at rest. options are not used.

        Every episode has a seed of its own; if none is given, the last one's generator draws it."""
        physics = self._open_client()
        super().reset(seed=self.np_random.bit_generator.random_raw() if seed is None else seed)
        x, y, yaw = self.np_random.uniform(-self.start_noise, self.start_noise, size=3)
        x0, y0, z0 = START_POSITION
        physics.restoreState(self._saved_state)
        physics.resetBasePositionAndOrientation(
            self.car, (x0 + x, y0 + y, z0), physics.getQuaternionFromEuler((0, 0, START_YAW + yaw))
        )
        self.steps, self.running = 0, True
        self._seed, self._actions = self.np_random_seed, []
        self._coins_left = dict(self._coins)
        observation = self._observe(physics)
        if self.render_mode == "human":
            self.render()
        return observation, self._info(is_success=False)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Drive for 1/20 s. action: (steering, throttle), clipped to the action space.

        Raises ValueError for an action that is not two finite numbers, ResetNeeded before the first
        reset and after the end of an episode, ClosedEnvironmentError after close()."""
        physics = self._open_client()
        if not self.running:
            raise gymnasium.error.ResetNeeded("the episode is over or never began: call reset()")
        steering, throttle = _steering_and_throttle(action)
        self._actions.append((steering, throttle))
        physics.setJointMotorControlArray(
            self.car, STEERING_JOINTS, pybullet.POSITION_CONTROL, targetPositions=[-steering] * 2
        )
        spin = {"targetVelocities": [WHEEL_SPEED * throttle] * 4, "forces": [WHEEL_FORCE] * 4}
        physics.setJointMotorControlArray(self.car, WHEEL_JOINTS, pybullet.VELOCITY_CONTROL, **spin)
        physics.stepSimulation()
        self.steps += 1
        observation = self._observe(physics)  # and self._position

        # getClosestPoints sees the pose just reached; getContactPoints the one before this step.
        at_wall = bool(physics.getClosestPoints(self.car, self.walls, 0.0))
        at_finish = not at_wall and math.dist(self._position[:2], FINISH) <= FINISH_RADIUS
        reward = WALL_REWARD * at_wall + FINISH_REWARD * at_finish + self._collect_coins(physics)
        terminated = at_wall or at_finish
        truncated = not terminated and self.steps >= self.max_steps
        self.running = not (terminated or truncated)
        if self.render_mode == "human":
            self.render()
        return observation, reward, terminated, truncated, self._info(is_success=at_finish)

    def render(self) -> np.ndarray | None:
        """rgb_array: (height, width, 3) uint8. human: follow the car at 20 frames/s at most."""
        physics = self._open_client()
        x, y, z = VIEWS[self.view]
        if self.render_mode == "human":
            target, pitch = (*self._position[:2], 0), -math.degrees(math.atan2(z, math.hypot(x, y)))
            physics.resetDebugVisualizerCamera(math.hypot(x, y, z), -45.0, pitch, target)  # x = y
            time.sleep(1 / CONTROL_RATE)
            return None
        if self.render_mode is None:
            raise gymnasium.error.Error("render() needs render_mode human or rgb_array")
        eye = (self._position[0] + x, self._position[1] + y, z)
        view = physics.computeViewMatrix(eye, self._position, (0, 0, 1))
        lens = physics.computeProjectionMatrixFOV(FIELD_OF_VIEW, self.width / self.height, 0.1, 100)
        image = physics.getCameraImage(self.width, self.height, view, lens)
        return np.reshape(image[2], (self.height, self.width, 4))[:, :, :3].astype(np.uint8)

    def close(self) -> None:
        """Release the physics client. A second call does nothing."""
        if self.physics is not None:
            with contextlib.suppress(pybullet.error):  # its window may have been closed already
                self.physics.disconnect()
            self.physics = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the physics: a copy replays the episode, and fails if that ends elsewhere."""
        if self.physics is None or self.render_mode == "human":
            raise TypeError("closed, or with a window: cannot be copied or pickled, make another")
        self.np_random  # noqa: B018  (the property makes it: else each copy would make its own)
        return {name: value for name, value in vars(self).items() if name != "physics"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.physics = self._connect()
        self._build_world(self.physics)
        if self._seed is not None:
            RaceCarEnv.reset(self, seed=self._seed)  # not a subclass's; state keeps its _actions
        with contextlib.suppress(gymnasium.error.ResetNeeded):  # it ends earlier: found below
            for action in state["_actions"]:
                RaceCarEnv.step(self, action)
        if (self.steps, self._position) != (state["steps"], state["_position"]):
            raise TypeError("cannot be copied: a setting, or the car, was changed in its episode")
        vars(self).update(state)  # np_random may have been drawn from; and a subclass's changes

    __copy__ = copy.deepcopy  # copy.copy is deep, too: a shallow one would drive the same car

    def _open_client(self) -> PhysicsClient:
        if self.physics is None:
            raise gymnasium.error.ClosedEnvironmentError("this environment is closed: make another")
        return self.physics

    def _observe(self, physics: PhysicsClient) -> np.ndarray:
        self._position, orientation = physics.getBasePositionAndOrientation(self.car)
        (vx, vy, _), _ = physics.getBaseVelocity(self.car)
        yaw = physics.getEulerFromQuaternion(orientation)[2]
        left, right = physics.getJointStates(self.car, STEERING_JOINTS)
        x, y, _ = self._position
        return np.array([x, y, vx, vy, yaw, left[0], right[0], left[1], right[1]], np.float32)

    def _collect_coins(self, physics: PhysicsClient) -> float:
        """The reward for coins reached in this step; they sink out of sight until a reset."""
        reward = 0.0
        for body, coin in list(self._coins_left.items()):
            if math.dist(self._position[:2], coin) <= COIN_RADIUS:
                del self._coins_left[body]
                physics.resetBasePositionAndOrientation(body, (*coin, -1.0), (0, 0, 0, 1))
                reward += self.coin_reward
        return reward

    def _info(self, is_success: bool) -> dict[str, Any]:
        return {"steps": self.steps, "position": np.array(self._position), "is_success": is_success}


def _check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        whole = "whole " if kind is numbers.Integral else ""
        raise ValueError(f"{name} must be a {whole}number from {low} to {high}, got {value!r}")


def _steering_and_throttle(action: Any) -> tuple[float, float]:
    try:
        steering, throttle = np.asarray(action).tolist()
        valid = np.shape(action) == (2,) and math.isfinite(steering) and math.isfinite(throttle)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: of a tensor with grad
        valid = False
    if not valid:
        raise ValueError(f"action must be 2 finite numbers, steering and throttle, got {action!r}")
    return min(max(float(steering), -1.0), 1.0), min(max(float(throttle), 0.0), 1.0)


def _check_display() -> None:
    """Raise RuntimeError if opening a window with pybullet would hang, or end the process."""
    usable, unused = False, ctypes.byref(ctypes.c_int())
    with contextlib.suppress(OSError), _silent_stderr():  # OSError: there is no libX11
        x11 = ctypes.CDLL("libX11.so.6")
        x11.XOpenDisplay.restype = ctypes.c_void_p
        display = ctypes.c_void_p(x11.XOpenDisplay(None))  # None: the one that DISPLAY names
        if display:
            usable = x11.XQueryExtension(display, b"GLX", unused, unused, unused)
            x11.XCloseDisplay(display)
    if not usable:
        found = f"found none at DISPLAY={os.environ.get('DISPLAY', '')}"
        raise RuntimeError(f"render_mode human needs a display with OpenGL, {found}")


# -------------------------------------------------------------------------------- several at once
class RaceCarVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """num_envs race cars, stepped one after the other; one whose episode is over rests until reset.

    Nothing is reset automatically: reset(options={"reset_mask": (num_envs,) bool}) puts those cars
    back at the start and leaves the others where they are. So every step is a transition of the
    running cars, and a resting car costs nothing: its action is ignored, its reward is 0, and it is
    not terminated or truncated again. settings: those of RaceCarEnv. An episode's seed is
    self.envs[i].np_random_seed."""

    metadata = RaceCarEnv.metadata | {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
    envs: Sequence[RaceCarEnv] = ()  # Gymnasium 1.1 closes even what an error left without any

    def __init__(self, num_envs: int = 1, **settings: Any) -> None:
        _check_number("num_envs", num_envs, numbers.Integral, 1, 1_000_000)
        self.num_envs = num_envs
        self.envs = [RaceCarEnv(**settings) for _ in range(num_envs)]
        self.render_mode = self.envs[0].render_mode
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._observations = np.zeros((num_envs, 9), np.float32)

    def reset(
        self, *, seed: int | list | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """seed: of the first car's episode; the next car's is seed + 1, and so on; or a list.

        options: {"reset_mask": (num_envs,) bool}; without it, all cars are reset."""
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(f"reset_mask must be ({self.num_envs},) bool, got {mask!r}")
        if seed is None or isinstance(seed, numbers.Integral):
            seed = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        cars = list(zip(self.envs, seed, strict=True))  # or ValueError: a list of another length
        for i in np.flatnonzero(mask):
            self._observations[i], _ = cars[i][0].reset(seed=cars[i][1])
        return self._observations.copy(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """actions: (num_envs, 2). Raises as RaceCarEnv.step, for running cars. info: is_success."""
        running = [i for i, env in enumerate(self.envs) if env.running]
        if not running:
            raise gymnasium.error.ResetNeeded("no car is running: call reset()")
        if np.shape(actions) != (self.num_envs, 2):
            raise ValueError(f"actions must be ({self.num_envs}, 2), got {actions!r}")
        rewards = np.zeros(self.num_envs)
        terminated, truncated, is_success = np.zeros((3, self.num_envs), bool)
        valid = [_steering_and_throttle(actions[i]) for i in running]  # all, before a car moves
        for i, action in zip(running, valid):
            result = self.envs[i].step(action)
            self._observations[i], rewards[i], terminated[i], truncated[i], info = result
            is_success[i] = info["is_success"]
        return self._observations.copy(), rewards, terminated, truncated, {"is_success": is_success}

    def render(self) -> tuple[np.ndarray | None, ...]:
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        for env in self.envs:
            env.close()

    __copy__ = copy.deepcopy


gymnasium.registry.pop("RaceCar-v0", None)  # this module may be imported again, by another name
gymnasium.register(
    "RaceCar-v0",
    entry_point=f"{__name__}:RaceCarEnv",
    vector_entry_point=f"{__name__}:RaceCarVectorEnv",
    reward_threshold=2.92,  # (98 * 3 - 2) / 100: of 100 laps two end at a wall
)


# ------------------------------------------------------------------------------------- the expert
class WaypointController:
    """The expert: steers by minus gain times the heading error to a waypoint ahead.

    It is a plain function of the observation, without memory, so it can be queried in any state.
    Waypoints lie about 1 m apart, from the wall behind the start along the corridor's middle to the
    finish. The car aims at the second one after the nearest, which cuts the corners a little: the
    first would be too near for the steering, which pybullet's default gain makes slow."""

    WAYPOINTS = np.array(
        [(1, y) for y in range(3)] + [(x, 3) for x in range(1, 9)] + [(9, y) for y in range(3, 7)]
        + [(x, 7) for x in range(9, 14)] + [FINISH]
    )  # (waypoints, 2)  # fmt: skip

    def __init__(self, throttle: float = 0.5, gain: float = 1.0) -> None:
        self.throttle, self.gain = throttle, gain

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """The action, (2,) float32, for one observation, (9,)."""
        x, y, yaw = float(observation[0]), float(observation[1]), float(observation[4])
        nearest = int(np.argmin(np.hypot(*(self.WAYPOINTS - (x, y)).T)))
        target_x, target_y = self.WAYPOINTS[min(nearest + 2, len(self.WAYPOINTS) - 1)]
        heading_error = math.remainder(math.atan2(target_y - y, target_x - x) - yaw, 2 * math.pi)
        steering = min(max(-self.gain * heading_error, -1.0), 1.0)
        return np.array([steering, self.throttle], dtype=np.float32)


def progress(observation: np.ndarray) -> float:
    """For evaluation: the share of the track behind a car, by nearest waypoint; 1 at the finish."""
    if math.dist(observation[:2], FINISH) <= FINISH_RADIUS:
        return 1.0
    distances = np.hypot(*(WaypointController.WAYPOINTS - observation[:2]).T)
    return float(np.argmin(distances)) / len(distances)
