"""Where a run's time goes, and how far it is from the least it could be.

    python benchmark/time_shares.py                          every script
    python benchmark/time_shares.py gail_cartpole.py

Each script is run through its own command line, with functions of its module timed from outside:
the environment's steps in rollouts, the rest of the rollouts (the policy), the updates (the
learner), and what is left (bookkeeping). Evaluation is not counted, nor is AggreVaTeD's validation.
The limit is the time of as many environment steps alone, with random actions, and of the last call
of each update alone, repeated as often as in the run. If no environment is stepped, steps are
updates, the learner is the networks, losses and gradient steps, and the limit is what these took
within the run.
"""

import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmark" / "results" / "time_shares.json"
GRADIENTS = {
    "bc_cartpole.py": ["descend"],
    "gail_offline_cartpole.py": [
        "discriminator_logits",
        "expected_discriminator_loss",
        "natural_policy_loss",
        "descend",
    ],
}
UPDATES = ("update_discriminator", "update_policy", "refit", "improve")
FLAGS = {
    "bc_cartpole.py": "",
    "gail_offline_cartpole.py": "",
    "gail_cartpole.py": "--total-steps 50000 --eval-every 50000",
    "gail_racecar_ppo.py": "--total-steps 50000 --eval-every 50000 --eval-episodes 10",
    "gail_racecar_reinforce.py": "--total-steps 50000 --eval-every 50000 --eval-episodes 10",
    "aggrevated_bipedal.py": "--iterations 2 --eval-every 2 --validation-episodes 10 "
    "--eval-episodes 10 --expert-episodes 10",
}


class Clock:
    """Seconds and calls of timed functions by name, and the arguments of the last call."""

    def __init__(self):
        self.seconds, self.calls, self.last = {}, {}, {}

    def timed(self, name, function):
        def call(*args):
            began = time.perf_counter()
            result = function(*args)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self.calls[name], self.last[name] = self.calls.get(name, 0) + 1, args
            return result

        return call


def run(script, path, folder):
    """Run its command line; returns what summary.json holds, and the arguments."""
    flags = [*FLAGS[path].split(), "--out", str(folder), "--run-name", path, "--no-progress"]
    assert script.main(flags) == 0
    return json.loads((folder / path / "summary.json").read_text()), script.parse_args(flags)


def measure_gradients(path, folder):
    """The row of a script that steps no environment."""
    script, clock = importlib.import_module(Path(path).stem), Clock()
    for name in GRADIENTS[path]:
        setattr(script, name, clock.timed(name, getattr(script, name)))
    forward = clock.timed("forward", script.Policy.forward)
    script.Policy.forward = lambda policy, observations: forward(policy, observations)
    summary, _ = run(script, path, folder)
    wall, of = summary["wall_seconds"], clock.seconds
    learner = sum(of.values())
    shares = {"learner": f"{learner / wall:.0%}", "bookkeeping": f"{1 - learner / wall:.0%}"}
    speed = f"{summary['updates'] / wall:,.0f}"
    nothing = {"environment": "none", "policy": "none"}
    limit = {"time by the limit": f"{wall / learner:.2f}"}
    return {"script": path, "steps/s": speed, **nothing, **shares, **limit}


def instrument(script, clock):
    """Time the script's updates, rollouts and, within these, the environments' steps."""
    functions = {name: getattr(script, name) for name in UPDATES if hasattr(script, name)}
    for name, function in functions.items():
        setattr(script, name, clock.timed(name, function))
    rollout = "rollout" if hasattr(script, "rollout") else "roll_in"
    setattr(script, rollout, clock.timed("rollout", getattr(script, rollout)))
    make_envs, play = script.make_envs, script.play

    def make(*args):
        envs = make_envs(*args)
        envs.step = clock.timed("environment", envs.step)
        return envs

    def untimed(*args):
        script.make_envs = make_envs
        episodes = play(*args)
        script.make_envs = make
        return episodes

    script.make_envs, script.play = make, clock.timed("evaluation", untimed)
    record = script.Run.record

    def recording(run, *args):
        before = clock.seconds.get("evaluation", 0.0)
        record(run, *args)
        clock.seconds["validation"] = clock.seconds.get("evaluation", 0.0) - before

    script.Run.record = recording
    return functions, make_envs


def environment_alone(make_envs, args, steps):
    """Seconds that `steps` steps with random actions take, measured on some thousands of them."""
    envs = make_envs(args.env_id, args.num_envs)
    if hasattr(envs, "envs"):  # a list of environments, of which one will do
        env, size = envs.envs[0], 1
    else:
        env, size = envs, args.num_envs
    actions = [env.action_space.sample() for _ in range(8_000 // size)]
    env.reset(seed=0)
    began = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if size == 1 and (terminated or truncated):
            env.reset()
    return (time.perf_counter() - began) / (len(actions) * size) * steps


def measure(path, folder):
    if path in GRADIENTS:
        return measure_gradients(path, folder)
    script, clock = importlib.import_module(Path(path).stem), Clock()
    updates, make_envs = instrument(script, clock)
    summary, args = run(script, path, folder)
    args.num_envs = summary["args"]["num_envs"]
    alone = {}
    for name in clock.last.keys() & updates.keys():
        began = time.perf_counter()
        for _ in range(3):
            updates[name](*clock.last[name])
        alone[name] = (time.perf_counter() - began) / 3 * clock.calls[name]
    limit = environment_alone(make_envs, args, summary["env_steps"]) + sum(alone.values())
    wall, of = summary["wall_seconds"], clock.seconds
    if path == "aggrevated_bipedal.py":
        wall -= of["validation"]  # there is only one, at the end
    parts = {
        "environment": of["environment"],
        "policy": of["rollout"] - of["environment"],
        "learner": sum(of[name] for name in alone),
    }
    parts["bookkeeping"] = wall - sum(parts.values())
    shares = {name: f"{seconds / wall:.0%}" for name, seconds in parts.items()}
    speed = f"{summary['env_steps'] / wall:,.0f}"
    return {"script": path, "steps/s": speed, **shares, "time by the limit": f"{wall / limit:.2f}"}


def main():
    sys.path.insert(0, str(ROOT))
    paths = sys.argv[1:] or list(FLAGS)
    rows = json.loads(RESULT.read_text())["table"] if RESULT.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            line = measure(path, Path(folder))
            rows = [row for row in rows if row["script"] != path] + [line]
            command = "python benchmark/time_shares.py"
            RESULT.write_text(json.dumps({"command": command, "table": rows}, indent=1))
            print(line)


if __name__ == "__main__":
    main()
