"""The scripts, and for each a run that is short but still goes through everything."""

import importlib.util
import io
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sync
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RACECAR = (
    "--hidden 8 --num-envs 2 --num-steps 32 --epochs 2 --minibatch-size 32"
    " --discriminator-updates 3 --discriminator-batch 32"
)
GAIL = (
    "--hidden 8 --num-envs 4 --num-steps 32 --epochs 2 --minibatch-size 32"
    " --discriminator-updates 3 --discriminator-batch 32"
)


AGGREVATED = (
    "--hidden 8 --critic-hidden 8 --num-envs 2 --mixing 2 --batch-size 16 --critic-updates 3"
    " --policy-updates 3 --expert-episodes 5"
    " --validation-episodes 4 --eval-every 1"
)


@dataclass(frozen=True)
class Task:
    """What the scripts for one task have in common."""

    env_id: str
    demos: Path | None  # None if the expert is queried
    expert_return: float | None
    observation: tuple
    action: tuple
    action_dtype: type


TASKS = {
    "cartpole": Task(
        "CartPole-v1", ROOT / "experts" / "CartPole-v1_ppo.npz", 500.0, (4,), (), np.int64
    ),
    "racecar": Task("RaceCar-v0", ROOT / "experts" / "RaceCar-v0.npz", 3.0, (9,), (2,), np.float32),
    "bipedal": Task("BipedalWalker-v3", None, None, (24,), (4,), np.float32),
}


@dataclass(frozen=True)
class Case:
    """One script with one set of flags."""

    script: str
    flags: str
    full: int  # the budget of about three iterations
    half: int  # a smaller one
    loss: str  # one of its loss functions, for a test to break
    calls: int  # how often that is called in the first iteration, or a little more

    def __str__(self):
        return "-".join([self.script, *re.split("--policy-gradient |--algorithm ", self.flags)[1:]])

    @property
    def path(self):
        return ROOT / f"{self.script}.py"

    @property
    def module(self):
        return importlib.import_module(self.script)

    @property
    def task(self):
        return TASKS[sync.task_of(self.script)]

    @property
    def budget(self):
        return "--" + self.module.BUDGET.replace("_", "-")

    def argv(self, folder, *flags, budget=None):
        """The command line of a run into `folder`; a later flag wins."""
        argv = ["--out", folder.parent, "--run-name", folder.name, "--no-progress"]
        argv += ["--eval-every", 100, "--eval-episodes", 4, *self.flags.split()]
        argv += [self.budget, budget or self.full, *flags]
        return [str(argument) for argument in argv]

    def run(self, folder, *flags, budget=None):
        """Run it in this process; returns the weights of its policy."""
        assert self.module.main(self.argv(folder, *flags, budget=budget)) == 0
        return weights(folder)

    def resume(self, folder, budget=None):
        argv = ["--resume", str(folder), self.budget, str(budget or self.full)]
        assert self.module.main(argv) == 0
        return weights(folder)

    def start(self, argv, cwd=ROOT):
        """Start it as a process of its own."""
        command = [sys.executable, f"{self.script}.py", *argv]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)


CASES = [
    Case(
        "bc_cartpole",
        "--hidden 8 --batch-size 16 --learning-rate 1e-4",
        *(300, 150, "behavioural_cloning_loss", 101),
    ),
    Case("gail_cartpole", f"{GAIL} --policy-gradient ppo", 360, 200, "discriminator_loss", 4),
    Case(
        "gail_cartpole",
        f"{GAIL} --absorbing --reward airl --bc-updates 2 --policy-gradient reinforce",
        *(360, 200, "discriminator_loss", 4),
    ),
    Case(
        "gail_offline_cartpole",
        "--hidden 8 --batch-size 16 --policy-lr 1e-4",
        *(300, 200, "expected_discriminator_loss", 101),
    ),
]
PYBULLET = importlib.util.find_spec("pybullet") is not None  # no wheels from Python 3.12 on
RACECAR_CASES = [
    Case("gail_racecar_ppo", RACECAR, 180, 100, "discriminator_loss", 7),
    Case(
        "gail_racecar_reinforce",
        f"{RACECAR} --absorbing --reward airl --bc-updates 2",
        *(180, 100, "discriminator_loss", 7),
    ),
]
CASES += RACECAR_CASES * PYBULLET
CASES += [
    Case("aggrevated_bipedal", AGGREVATED, 3, 2, "aggrevated_loss", 4),
    Case("aggrevated_bipedal", f"{AGGREVATED} --algorithm dagger", 3, 2, "dagger_loss", 4),
]
SCRIPTS = list({case.script: case for case in reversed(CASES)}.values())[::-1]  # one case of each
WATCHERS = [case for case in SCRIPTS if case.task.demos]  # those that learn from demonstrations


def weights(folder):
    return torch.load(folder / "policy.pt", weights_only=True)["weights"]


def same(ours, theirs):
    """Are these weights the same to the last bit?"""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def finite(content):
    """Is every tensor and float in this nest of dicts and lists finite?"""
    if isinstance(content, dict | list | tuple):
        return all(map(finite, content.values() if isinstance(content, dict) else content))
    if isinstance(content, float):
        content = torch.tensor(content)
    return not isinstance(content, torch.Tensor) or bool(torch.isfinite(content).all())


def falling_expert(path):
    """Write an expert for the walker that throws itself to the ground; returns its path."""
    with zipfile.ZipFile(ROOT / "experts" / "BipedalWalker-v3_weak.zip") as archive:
        about, weights = archive.read("data"), io.BytesIO(archive.read("policy.pth"))
    weights, memory = torch.load(weights, weights_only=True), io.BytesIO()
    weights["actor.mu.weight"][:] = 0
    weights["actor.mu.bias"][:] = 3
    torch.save(weights, memory)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("policy.pth", memory.getvalue())
        archive.writestr("data", about)
    return path


def linear_rule(observations):
    """Balances the pole for 500 steps."""
    return (observations @ [0.1, 0.5, 3.0, 1.0] > 0).astype(int)
