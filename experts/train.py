"""Train an expert with stable-baselines3, check it, and record its episodes.

    python experts/train.py CartPole-v1                     writes experts/CartPole-v1.npz
    python experts/train.py CartPole-v1 --algorithm dqn --demos experts/CartPole-v1_dqn.npz
    python experts/train.py Hopper-v5 --sampled             record actions drawn from the policy
    python experts/train.py Pendulum-v1 --expert pendulum.pt   the policy itself, to be queried
    python experts/train.py --resume runs/FOLDER            go on with a run, or record it anew
    python experts/train.py --pick 260 285 --out runs/FOLDER --expert weak.pt
    python experts/train.py --record weak.pt --demos weak.npz    demonstrations of a .pt

At every evaluation the greedy policy plays; the one with the best mean return is the expert. It is
checked on 100 fresh episodes, and the first of them are recorded as the policy saw them: raw
observations in float32. The run folder keeps curve.json, checkpoint.pt and, of SAC, TD3 and TQC,
each evaluated policy as STEPS.pt, which aggrevated_bipedal.py can query, or play by --evaluate.
`--pick` plays these in their order until a mean return lies between two numbers. TQC is sbx-rl's,
in JAX: on one core it takes a third of SAC's time.
"""

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "gymnasium[classic-control,box2d,mujoco]>=1.2.3,<2",
#     "numpy>=1.26",
#     "sbx-rl==0.28.0",
#     "stable-baselines3>=2.6",
#     "torch==2.13.0",
#     "tqdm>=4.66",
# ]
# ///

import contextlib
import importlib
import json
import os
import shlex
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
from shared import BadInput, Parser, check, say, write, write_demonstrations
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from tasks import make_env, play, statistics
from tqdm import tqdm

# Settings: first of an algorithm on any task, then what differs on a task, whose first algorithm is
# its default. They are the rl-zoo's where it has some that need no normaliser. total_steps,
# num_envs, noise (TD3's exploration), average (the share that an average of the policy keeps per
# rollout) and least_reward (smaller ones are raised to it, in training) are this program's, the
# others the library's. "linear x" falls from x to 0 over the budget.
# fmt: off
ALGORITHMS = {
    "ppo": dict(total_steps=1_000_000, num_envs=8, n_steps=256, net_arch=[64, 64]),
    "dqn": dict(total_steps=100_000, learning_rate=6.3e-4, batch_size=128, buffer_size=50_000,
                learning_starts=0, target_update_interval=250, train_freq=4, gradient_steps=-1,
                exploration_fraction=0.12, exploration_final_eps=0.1, net_arch=[256, 256]),
    "sac": dict(total_steps=1_000_000, learning_starts=10_000, net_arch=[256, 256]),
    "td3": dict(total_steps=1_000_000, learning_starts=10_000, net_arch=[256, 256], noise=0.1),
    "tqc": dict(total_steps=1_000_000, num_envs=8, learning_starts=10_000, net_arch=[128, 128],
                train_freq=4, gradient_steps=32, batch_size=128, n_quantiles=12,
                top_quantiles_to_drop_per_net=1),
}
CARTPOLE = {
    "ppo": dict(total_steps=100_000, n_steps=32, batch_size=256, n_epochs=20, gamma=0.98,
                gae_lambda=0.8, learning_rate="linear 0.001", clip_range="linear 0.2"),
    "dqn": dict(total_steps=50_000, learning_rate=2.3e-3, batch_size=64, buffer_size=100_000,
                learning_starts=1_000, target_update_interval=10, train_freq=256,
                gradient_steps=128, exploration_fraction=0.16, exploration_final_eps=0.04),
}
MOUNTAIN_CAR = dict(total_steps=120_000, learning_rate=4e-3, buffer_size=10_000, gamma=0.98,
                    learning_starts=1_000, target_update_interval=600, train_freq=16,
                    gradient_steps=8, exploration_fraction=0.2, exploration_final_eps=0.07)
LANDER = dict(num_envs=16, n_steps=1_024, n_epochs=4, gamma=0.999, gae_lambda=0.98, ent_coef=0.01)
CONTINUOUS_LANDER = dict(total_steps=500_000, learning_rate="linear 0.00073", tau=0.01)
WALKER = dict(total_steps=400_000, learning_rate=5e-4, gamma=0.98, tau=0.01)
HARDCORE = dict(total_steps=1_700_000, learning_rate=5e-4, batch_size=192, tau=0.01,
                net_arch=[192, 192], average=0.98, least_reward=-25)
MEMORY = dict(HARDCORE, total_steps=2_500_000, learning_rate="linear 0.0006", average=0.99,
              least_reward=-10)
TASKS = {
    "CartPole-v1": CARTPOLE,
    "CartPole-v0": CARTPOLE,
    "Acrobot-v1": {"dqn": {}},
    "MountainCar-v0": {"dqn": MOUNTAIN_CAR},
    "Pendulum-v1": {"sac": dict(total_steps=20_000, learning_rate=1e-3, learning_starts=100)},
    "LunarLander-v3": {"ppo": LANDER},
    "LunarLanderContinuous-v3": {"tqc": CONTINUOUS_LANDER, "ppo": LANDER},
    "InvertedPendulum-v5": {"sac": dict(total_steps=20_000, learning_starts=1_000)},
    "Reacher-v5": {"tqc": dict(total_steps=300_000)},
    "Hopper-v5": {"tqc": dict(top_quantiles_to_drop_per_net=2)},
    "Walker2d-v5": {"tqc": {}},
    "HalfCheetah-v5": {"tqc": {}},
    "BipedalWalker-v3": {"tqc": WALKER},
    "BipedalWalkerHardcore-v3": {"tqc": HARDCORE},
    "HardcoreMemory-v0": {"tqc": MEMORY},  # in hardcore_memory.py
}
# fmt: on
QUERIED = ("sac", "td3", "tqc")  # their greedy action is the tanh of a network of ReLUs
SELECTION_SEEDS, SCORE_SEEDS = 2 * 10**9, 3 * 10**9  # of evaluations; no script has these
CHECKED, SAVE_EVERY = 100, 600  # fresh episodes; seconds between checkpoints


class Failed(Exception):
    """An expert that is too weak, weights that are not finite: one line, exit status 1."""


@contextlib.contextmanager
def explained(path):
    """Whatever goes wrong inside becomes one line about the file."""
    try:
        yield
    except Exception as error:  # a damaged file fails in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path}: expected a file of this program, found {reason}") from None


def read(path, *keys):
    """What this program wrote with torch.save; nothing in it is unpickled."""
    with explained(path):
        check(Path(path).is_file(), "none")  # a pipe could block
        content = torch.load(path, weights_only=True)
        return [content[key] for key in keys]


# --- the policy -----------------------------------------------------------------------------------


def layers_of(model, algorithm):
    """The policy's [weight, bias, weight, ...]; if it can be sampled, then of log_std."""
    if algorithm == "tqc":  # JAX: kernels are (inputs, outputs)
        tree = model.policy.actor_state.params["params"]
        arrays = [tree[layer][part] for layer in sorted(tree) for part in ("kernel", "bias")]
        layers = [torch.tensor(np.array(array).T) for array in arrays]
    else:
        state = model.policy.state_dict()
        names = [name for name in state if name.startswith(POLICY_LAYERS[algorithm])]
        layers = [state[name].clone() for name in names]
        if "log_std" in state:  # PPO's, the same in every state
            layers += [torch.zeros_like(layers[-2]), state["log_std"].clone()]
    if not all(torch.isfinite(layer).all() for layer in layers):
        raise Failed(f"a weight is not finite after {model.num_timesteps:,} steps")
    return layers


POLICY_LAYERS = {
    "ppo": ("mlp_extractor.policy_net.", "action_net."),
    "dqn": ("q_net.q_net.",),
    "sac": ("actor.latent_pi.", "actor.mu.", "actor.log_std."),
    "td3": ("actor.mu.",),
}  # in stable-baselines3's state_dict


class Policy:
    """A trained policy in NumPy: its layers, and what becomes of their output."""

    def __init__(self, algorithm, layers, space):
        self.algorithm, self.layers, self.space = algorithm, layers, space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        arrays = [layer.float().numpy() for layer in layers]
        pairs = list(zip(arrays[::2], arrays[1::2]))
        if algorithm in ("sac", "tqc") or (algorithm == "ppo" and not self.discrete):
            self.log_std = pairs.pop()
        *self.hidden, self.last = pairs

    def act(self, x, generator=None):
        """Greedy, or drawn if there is a generator: (observation,) -> () or (action,)."""
        for w, b in self.hidden:
            x = np.tanh(w @ x + b) if self.algorithm == "ppo" else np.maximum(w @ x + b, 0)
        output = self.last[0] @ x + self.last[1]
        if self.discrete:
            if generator:  # the largest logit with Gumbel noise is a draw from the softmax
                output = output + generator.gumbel(size=output.shape)
            return int(output.argmax())
        if generator:
            std = np.exp(np.clip(self.log_std[0] @ x + self.log_std[1], -20, 2))
            output = output + std * generator.standard_normal(output.shape)
        low, high = self.space.low, self.space.high
        if self.algorithm != "ppo":  # PPO has a Gaussian in the action's own units
            output = low + (np.tanh(output) + 1) / 2 * (high - low)
        return np.clip(output, low, high).astype(np.float32)  # rounded, the sum may lie outside

    def save(self, path, env_id, source):
        """Write it as an expert to query; README.md beside this program has the format."""
        depth, inputs = len(self.hidden) + 1, self.layers[0].shape[1]
        weights = {"mean": torch.zeros(inputs), "deviation": torch.ones(inputs)}
        for i in range(depth):
            weights[f"network.{2 * i}.weight"] = self.layers[2 * i]
            weights[f"network.{2 * i}.bias"] = self.layers[2 * i + 1]
        settings = {"sizes": [inputs, *(len(bias) for bias in self.layers[1 : 2 * depth : 2])]}
        settings |= {"activation": "relu"}
        settings |= {"low": self.space.low.tolist(), "high": self.space.high.tolist()}
        content = {"script": "aggrevated_bipedal", "env_id": env_id, "settings": settings}
        content |= {"weights": weights, "source": source}
        write(path, lambda file: torch.save(content, file), replace=True)


def load_policy(path):
    """The policy, task and source in a file that `Policy.save` wrote."""
    env_id, settings, weights, source = read(path, "env_id", "settings", "weights", "source")
    with explained(path):
        mean, deviation, activation = weights["mean"], weights["deviation"], settings["activation"]
        plain = activation == "relu" and not mean.any() and (deviation == 1).all()
        check(plain, f"a normaliser or {activation}, expected ReLU without one")
        names = [f"network.{2 * i}" for i in range(len(settings["sizes"]) - 1)]
        layers = [weights[f"{name}.{part}"] for name in names for part in ("weight", "bias")]
        bounds = [np.array(settings[name], float) for name in ("low", "high")]
        narrow = all((np.float32(x) == x).all() for x in bounds)
        kind = np.float32 if narrow else np.float64
        space = gym.spaces.Box(*(x.astype(kind) for x in bounds), dtype=kind)
        env_id = env_id.split(":")[-1]  # no file may have a module imported
        return Policy("td3", layers, space), env_id, source


def describe(result):
    text = f"return {result['return_mean']:.1f} +- {result['return_std']:.1f}"
    text += f", least {result['return_min']:.1f}"
    return f"{text}, {result['terminated']} of {result['episodes']} episodes terminated"


# --- training -------------------------------------------------------------------------------------


def build(args, seed):
    """The library's model, with the settings of `args`."""
    try:
        library = importlib.import_module("sbx") if args.algorithm == "tqc" else stable_baselines3
    except ImportError as error:
        raise BadInput(f"--algorithm tqc: {error}; try pip install sbx-rl==0.28.0") from None
    settings = {name: schedule(value) for name, value in args.settings.items()}
    num_envs, least = settings.pop("num_envs", 1), settings.pop("least_reward", -np.inf)
    check(num_envs > 0, f"--set: found num_envs={num_envs}, expected 1 or more")
    env = make_vec_env(lambda: make_env(args.env_id, least), num_envs, seed=seed)
    if noise := settings.pop("noise", 0):
        shape = env.action_space.shape
        settings["action_noise"] = NormalActionNoise(np.zeros(shape), np.full(shape, noise))
    if args.algorithm != "ppo":
        settings["buffer_size"] = min(settings.get("buffer_size", 1_000_000), args.total_steps)
    settings.pop("average", 0)
    names = [name for name in ("net_arch", "n_critics", "n_quantiles") if name in settings]
    settings["policy_kwargs"] = {name: settings.pop(name) for name in names}
    try:
        algorithm = getattr(library, args.algorithm.upper())
        model = algorithm("MlpPolicy", env, seed=seed, device="cpu", **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise BadInput(f"{args.algorithm} on {args.env_id}: {str(error).strip()}") from None
    model.action_space.seed(seed + num_envs)  # else random actions repeat what a reset draws
    return model


def schedule(value):
    if isinstance(value, str) and value.startswith("linear "):
        return lambda left: float(value.split()[1]) * left
    return value


def jax_state(model):
    names = ("actor_state", "qf1_state", "qf2_state")
    return {name: getattr(model.policy, name) for name in names} | {"alpha": model.ent_coef_state}


def state_of(model, algorithm):
    """What training needs to go on: tensors and, of JAX, bytes."""
    if algorithm == "tqc":
        state = {"jax": importlib.import_module("flax.serialization").to_bytes(jax_state(model))}
    else:
        state = {"parameters": model.get_parameters()}
        if getattr(model, "log_ent_coef", None) is not None:  # SAC's, if it is learnt
            state["log_ent_coef"] = model.log_ent_coef.detach()
    if algorithm != "ppo":
        buffer = model.replay_buffer
        filled, oldest = buffer.size(), buffer.pos * buffer.full  # a ring: the oldest comes first
        rows = {key: np.roll(getattr(buffer, key)[:filled], -oldest, 0) for key in BUFFER}
        state["buffer"] = {key: torch.from_numpy(value) for key, value in rows.items()}
    return state


BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def load_state(model, algorithm, state):
    if algorithm == "tqc":
        flax = importlib.import_module("flax.serialization")
        loaded = flax.from_bytes(jax_state(model), state["jax"])
        model.ent_coef_state = loaded.pop("alpha")
        vars(model.policy).update(loaded)
    else:
        model.set_parameters(state["parameters"])
        if "log_ent_coef" in state:
            model.log_ent_coef.data.copy_(state["log_ent_coef"])
    if algorithm != "ppo":
        buffer, filled = model.replay_buffer, len(state["buffer"]["rewards"])
        for name, value in state["buffer"].items():
            getattr(buffer, name)[:filled] = value.numpy()
        buffer.pos, buffer.full = filled % buffer.buffer_size, filled == buffer.buffer_size


class Train(BaseCallback):
    """What a run knows, beside its model; evaluates and saves while stable-baselines3 trains."""

    def __init__(self, args):
        super().__init__()
        self.args, self.keep = args, args.settings.get("average", 0)
        self.steps, self.curve, self.best, self.average, self.state = 0, [], None, None, None
        if args.resume:
            names = ("steps", "curve", "best", "average", "state")
            vars(self).update(zip(names, read(args.out / "checkpoint.pt", *names)))
        with make_env(args.env_id) as env:
            self.space = env.action_space

    def finished(self):
        best = max((point["return_mean"] for point in self.curve), default=-np.inf)
        return self.steps >= self.args.total_steps or best >= self.args.until

    def _on_training_start(self):  # no bar unless stderr is a terminal
        total, hidden = self.args.total_steps, None if sys.stderr else True
        self.bar = tqdm(total=total, initial=self.steps, unit=" steps", disable=hidden)
        self.save()

    def _on_rollout_start(self):
        if self.keep:
            now = layers_of(self.model, self.args.algorithm)
            pairs = zip(self.average or now, now)
            self.average = [self.keep * old + (1 - self.keep) * new for old, new in pairs]

    def _on_step(self):
        before, self.steps = self.steps, self.num_timesteps
        self.bar.update(self.steps - before)
        if self.steps // self.args.eval_every > before // self.args.eval_every:
            self.evaluate()
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()
        return not self.finished()

    def _on_training_end(self):
        if not self.curve or self.curve[-1]["steps"] < self.steps:
            self.evaluate()
        self.save()
        self.bar.close()

    def evaluate(self):
        args, about = self.args, about_run(self.args)
        layers = self.average or layers_of(self.model, args.algorithm)
        policy = Policy(args.algorithm, layers, self.space)
        episodes = play(policy, args.env_id, args.eval_episodes, SELECTION_SEEDS)
        point = {"steps": self.steps, **statistics(episodes)}
        if all(point["return_mean"] >= earlier["return_mean"] for earlier in self.curve):
            self.best = {"steps": self.steps, "layers": layers}
        if args.algorithm in QUERIED:
            point["file"] = f"{self.steps}.pt"
            policy.save(args.out / point["file"], about["env_id"], {**about, "evaluation": point})
        self.curve.append(point)
        curve = json.dumps({**about, "curve": self.curve}, indent=1)
        write(args.out / "curve.json", lambda file: file.write(curve.encode()), replace=True)
        self.bar.clear()
        say(f"{self.steps:>9,} steps: {describe(point)}")

    def save(self):
        state = {name: getattr(self, name) for name in ("steps", "curve", "best", "average")}
        state["args"] = {k: v for k, v in vars(self.args).items() if k not in NOT_KEPT}
        state["state"] = state_of(self.model, self.args.algorithm)
        write(self.args.out / "checkpoint.pt", lambda file: torch.save(state, file), replace=True)
        self.saved = time.monotonic()


def train(args):
    """Train until the budget is spent or `--until` is reached: the best policy and its step."""
    run = Train(args)
    if not run.finished():
        model = build(args, args.seed + run.steps)
        if run.state:
            load_state(model, args.algorithm, run.state)
        args.out.mkdir(parents=True, exist_ok=True)
        model.num_timesteps, left = run.steps, args.total_steps - run.steps
        try:
            model.learn(left, run, log_interval=10**9, reset_num_timesteps=False)
        except ValueError as error:  # a network or a reward is NaN
            reason = " ".join(str(error).split())[:200]
            raise Failed(f"{args.algorithm} on {args.env_id}: {reason}") from None
    return Policy(args.algorithm, run.best["layers"], run.space), run.best["steps"]


# --- what comes out -------------------------------------------------------------------------------


def about_run(args):
    """Where a file comes from. Its command leaves out the names of files."""
    words = ["python", "experts/train.py", args.env_id]
    names = ("algorithm", "total_steps", "seed", "eval_every", "eval_episodes", "until", "episodes")
    for name in names:
        if getattr(args, name) != np.inf:
            words += [f"--{name.replace('_', '-')}", f"{getattr(args, name)}"]
    words += [f"--set={setting}" for setting in args.set] + ["--sampled"] * args.sampled
    names = ["gymnasium", "numpy", "stable-baselines3", "torch"]
    names += ["sbx-rl", "jax"] * (args.algorithm == "tqc")
    content = {"env_id": args.env_id.split(":")[-1], "algorithm": args.algorithm}
    content |= {"settings": args.settings, "command": shlex.join(words)}
    return content | {"versions": {name: version(name) for name in names}}


def make(args):
    """Train, check over fresh episodes, and write what was asked for."""
    policy, steps = train(args)
    for path in filter(None, (args.expert, args.demos)):
        again = f"expected a new file: --resume={args.out} with another name"
        check(not path.exists(), f"{path}: exists by now, {again}")
    played, number = {}, max(CHECKED, args.episodes)
    for path, sampled in ((args.expert, False), (args.demos, args.sampled)):
        if path and sampled not in played:
            played[sampled] = play(policy, args.env_id, number, SCORE_SEEDS, sampled)
            score = statistics(played[sampled])
            say(f"{'sampled' if sampled else 'greedy'}, fresh episodes: {describe(score)}")
            mean, least = score["return_mean"], args.at_least
            if not np.isfinite(mean) or mean < least:
                raise Failed(f"found an expert's return of {mean:.1f}, expected {least:g} or more")
    about = {**about_run(args), "steps": steps}
    if args.expert:
        about["score"] = statistics(played[False])
        policy.save(args.expert, about["env_id"], about)
        say(args.expert)
    if args.demos:
        library = "sbx-rl" if args.algorithm == "tqc" else "stable-baselines3"
        how = "actions drawn from the policy" if args.sampled else "greedy"
        expert = f"{args.algorithm.upper()} of {library} after {steps:,} steps, {how}"
        about |= {"score": statistics(played[args.sampled]), "expert": expert, "seed": args.seed}
        write_demonstrations(args.demos, played[args.sampled][: args.episodes], about)
        say(args.demos)


def pick(args):
    """The first policy of a run whose mean return of 100 episodes lies between two numbers."""
    files = [path for path in args.out.glob("*.pt") if path.stem.isdigit()]
    for path in sorted(files, key=lambda path: int(path.stem)):
        policy, trained_on, source = load_policy(path)
        env_id = args.env_id or trained_on  # a file names no module
        check(env_id.split(":")[-1] == trained_on, f"{path}: for {trained_on}, not {env_id}")
        result = statistics(play(policy, env_id, CHECKED, SELECTION_SEEDS))
        say(f"{path}: {describe(result)}")
        if args.pick[0] <= result["return_mean"] <= args.pick[1]:
            if args.expert:
                score = statistics(play(policy, env_id, CHECKED, SCORE_SEEDS))
                policy.save(args.expert, trained_on, {**source, "score": score})
            return
    raise Failed(f"--pick: none of {len(files)} policies in {args.out} lies between these")


def record(args):
    """Demonstrations of an expert that this program or convert.py wrote, as a .pt."""
    policy, trained_on, source = load_policy(args.record)
    env_id = args.env_id or trained_on  # a file names no module
    check(env_id.split(":")[-1] == trained_on, f"{args.record}: for {trained_on}, not {env_id}")
    played = play(policy, env_id, max(CHECKED, args.episodes), SCORE_SEEDS)
    about = {"env_id": trained_on, "expert": f"{args.record.name}, greedy", "source": source}
    about |= {"score": statistics(played), "seed": SCORE_SEEDS}  # of the first episode
    say(describe(about["score"]))
    write_demonstrations(args.demos, played[: args.episodes], about)


# --- the command line -----------------------------------------------------------------------------

NOT_KEPT = ("out", "resume", "demos", "expert", "pick", "record", "at_least")  # by a checkpoint


def parse_args(argv=None):
    parser = Parser("train.py", __doc__)
    flag = parser.add_argument
    flag("env_id", nargs="?", help="the task: a Gymnasium id, also module:Name-v0")
    flag("--algorithm", choices=ALGORITHMS, help="default: the task's own, else ppo or sac")
    flag("--total-steps", type=int, help="of the environment (default: the task's own)")
    flag("--set", action="append", default=[], metavar="NAME=JSON", help="a setting: gamma=0.9")
    flag("--seed", type=int, default=1, help="default: 1")
    flag("--until", type=float, default=np.inf, help="stop at an evaluation with this mean return")
    flag("--eval-every", type=int, help="steps (default: a twentieth of the budget)")
    flag("--eval-episodes", type=int, default=20, help="default: 20")
    flag("--episodes", type=int, default=30, help="to record (default: 30)")
    flag("--sampled", action="store_true", help="record actions drawn from the policy, not greedy")
    flag("--at-least", type=float, default=-np.inf, metavar="RETURN", help="refuse a weaker expert")
    flag("--demos", type=Path, help="the .npz to write (default: experts/ENV_ID.npz)")
    flag("--expert", type=Path, help="write a .pt to query; without --demos, no .npz")
    flag("--out", type=Path, help="run folder (default: runs/expert__ENV_ID__ALGORITHM__SEED)")
    flag("--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder")
    flag("--pick", type=float, nargs=2, metavar=("LOW", "HIGH"), help="by mean return, from --out")
    flag("--record", type=Path, metavar="FILE", help="write --demos of this .pt; train nothing")
    args = parser.parse_args(argv)
    if args.resume:
        (saved,) = read(args.resume / "checkpoint.pt", "args")
        with explained(args.resume / "checkpoint.pt"):
            parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        args.out = args.resume
        for name in ("env_id", "algorithm", "seed", "set"):
            same = getattr(args, name) == saved[name]
            check(same, f"--resume: found {name} {getattr(args, name)}, expected {saved[name]}")
    check(args.out or not args.pick, "--pick: expected --out FOLDER as well")
    check(args.demos or not args.record, "--record: expected --demos FILE as well")
    check(not (args.record and args.sampled), "--record: the file's greedy actions, not --sampled")
    check(args.episodes > 0, f"--episodes: found {args.episodes}, expected 1 or more")
    if not args.pick and not args.record:
        complete(args)
    for path in filter(None, (args.demos, args.expert)):
        check(not path.exists(), f"{path}: exists already, expected a new file")
    return args


def complete(args):
    """Fill in what depends on the task; refuse what cannot work before anything is trained."""
    check(args.env_id, "expected a task, for example CartPole-v1")
    with make_env(args.env_id) as env:
        box = isinstance(env.action_space, gym.spaces.Box)
    name = args.env_id.split(":")[-1]
    rows, file_name = TASKS.get(name, {}), name.replace("/", "_")
    args.algorithm = args.algorithm or next(iter(rows), "sac" if box else "ppo")
    queried = args.algorithm in QUERIED or not args.expert
    check(queried, f"--expert: found {args.algorithm}, expected one of {', '.join(QUERIED)}")
    drawn = args.algorithm not in ("dqn", "td3") or not args.sampled
    check(drawn, f"--sampled: {args.algorithm} has no distribution to draw from")
    args.settings = {**ALGORITHMS[args.algorithm], **rows.get(args.algorithm, {})}
    for setting in args.set:
        key, _, value = setting.partition("=")
        try:
            args.settings[key] = json.loads(value)
        except ValueError:
            raise BadInput(f"--set: found {setting}, expected NAME=JSON") from None
    for key in ("use_sde", "policy_kwargs"):  # no file of ours has such a policy
        check(not args.settings.get(key), f"--set: {key} is not supported")
    ours = {"total_steps": int, "num_envs": int}
    ours |= dict.fromkeys(("average", "noise", "least_reward"), int | float)
    for key, kind in ours.items():  # stable-baselines3 checks the others
        value = args.settings.get(key, 1)
        check(isinstance(value, kind), f"--set: found {key}={json.dumps(value)}, expected a number")
    check(not np.isnan(args.at_least), "--at-least: found nan, expected a number")
    total = args.settings.pop("total_steps")
    args.total_steps = total if args.total_steps is None else args.total_steps
    if args.eval_every is None:
        args.eval_every = max(1, args.total_steps // 20)
    for flag in ("total_steps", "eval_every", "eval_episodes"):
        given = getattr(args, flag)
        check(given > 0, f"--{flag.replace('_', '-')}: found {given}, expected 1 or more")
    check(args.seed >= 0, f"--seed: found {args.seed}, expected 0 or more")
    if not args.demos and not args.expert:
        args.demos = Path(__file__).resolve().parent / f"{file_name}.npz"
    args.out = args.out or Path("runs", f"expert__{file_name}__{args.algorithm}__{args.seed}")
    new = args.resume or not args.out.exists()
    check(new, f"{args.out}: exists already, expected a new folder (or --resume)")


def stop(number, frame):
    """SIGTERM is as Ctrl-C, but for the exit status."""
    raise KeyboardInterrupt(number)


def main(argv=None):
    """Run the command line; returns the exit status."""
    args = None
    with contextlib.suppress(ValueError):  # only a main thread may handle signals
        signal.signal(signal.SIGTERM, stop)
    try:
        args = parse_args(argv)
        torch.set_num_threads(1)
        (pick if args.pick else record if args.record else make)(args)
        return 0
    except (BadInput, Failed, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt as stopped:
        words = sys.argv[1:] if argv is None else argv
        if args and not args.pick and not args.record:
            words = [f"--resume={args.out}"]
            for name in ("demos", "expert", "at_least"):  # what a checkpoint does not keep
                given = getattr(args, name) not in (None, -np.inf)
                words += [f"--{name.replace('_', '-')}={getattr(args, name)}"] * given
        again = shlex.join([sys.executable, sys.argv[0], *map(str, words)])
        print(f"train.py: stopped; go on with: {again}", file=sys.stderr)
        return 128 + (stopped.args or (signal.SIGINT,))[0]


if __name__ == "__main__":
    sys.exit(main())
