"""The scripts, each with flags for a run that is short but still goes through everything."""

import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import toys
from written import weights

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experts")]
PYBULLET = importlib.util.find_spec("pybullet") is not None  # no wheels from Python 3.12 on
TEMPORARY = tempfile.TemporaryDirectory()  # what the toys' experts did, and finished runs
FILES = Path(TEMPORARY.name)


@dataclass(frozen=True)
class Case:
    """A script, a task that is over in no time, and flags; or a program under experts/."""

    script: str
    env_id: str = ""
    flags: str = ""
    every: int = 1  # how far an iteration takes it

    def __str__(self):
        return f"{self.script}-{self.env_id}"

    @property
    def module(self):
        return importlib.import_module(self.script)

    @property
    def queries(self):
        """Does it query its expert, in place of demonstrations?"""
        return "aggrevated" in self.script

    def on(self, env_id):
        """The same on another task."""
        return replace(self, env_id=env_id)

    def argv(self, *flags, iterations=3):
        """A command line; a later flag wins."""
        task = [] if "Race" in self.env_id else ["--env-id", self.env_id]
        if self.queries:
            task += ["--expert", expert(self.env_id)]
        elif task:
            task += ["--demos", demos(self.env_id)]
        budget = ["--total-steps", iterations * self.every, "--eval-every", self.every]
        tiny = ["--eval-episodes", 2, "--no-progress", *self.flags.split()]
        return [str(word) for word in (*task, *budget, *tiny, *flags)]

    def main(self, *argv):
        """The exit status, in this process."""
        return self.module.main([str(word) for word in argv])

    def run(self, folder, *flags, iterations=3):
        """Run it in this process; returns the weights of its policy."""
        assert self.main(*self.argv("--out", folder, *flags, iterations=iterations)) == 0
        return weights(folder)

    def resume(self, folder, *flags, iterations=3):
        budget = ["--total-steps", iterations * self.every]
        assert self.main("--resume", folder, *budget, *flags) == 0
        return weights(folder)

    @functools.cached_property
    def finished(self):
        """The folder of its uninterrupted run."""
        folder = Path(tempfile.mkdtemp(dir=FILES)) / "run"
        self.run(folder)
        return folder

    def fork(self, *argv, until=ROOT):
        """Start it in a fork of this process, where everything is imported already, and wait until
        a path exists."""
        context = multiprocessing.get_context("fork")
        process = context.Process(target=lambda: sys.exit(self.main(*argv)))
        process.start()
        while not until.exists():
            assert process.is_alive()
            time.sleep(0.01)
        return process

    def start(self, *argv, **settings):
        """Start it as a process of its own, which takes some seconds."""
        command = [sys.executable, str(ROOT / f"{self.script}.py"), *map(str, argv)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **{**pipes, "env": environment(), **settings})


def environment(**changes):
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **changes}


def python(*words, **settings):
    """What a process of Python's own returned and wrote."""
    command = [sys.executable, *map(str, words)]
    settings = {"env": environment(), "timeout": 600, **settings}
    return subprocess.run(command, capture_output=True, text=True, **settings)


SMALL = "--hidden 8 --batch-size 16"
GAIL = "--hidden 8 --num-envs 3 --num-steps 16 --epochs 2 --discriminator-updates 3 --schedule 480"
OTHER = "--policy-gradient reinforce --reward airl --absorbing yes --bc-weight 1"
RACE = "--hidden 8 --num-envs 2 --num-steps 32 --epochs 2 --discriminator-updates 3"
RACE += " --schedule 300000"
ASKING = "--hidden 8 --critic-hidden 8 --num-envs 2 --switch 12"
ASKING += " --critic-updates 3 --policy-updates 3"
BC = Case("bc_cartpole", "Toy-v0", SMALL, 100)
PPO = Case("gail_cartpole", "Toy-v0", GAIL, 48)
REINFORCE = Case("gail_cartpole", "ToyBox-v0", f"{GAIL} {OTHER}", 48)
OFFLINE = Case("gail_offline_cartpole", "Toy-v0", f"{SMALL} --schedule 4000", 100)
RACECAR = [Case(f"gail_racecar_{x}", "RaceCar-v0", RACE, 64) for x in ("ppo", "reinforce")]
RACECAR *= PYBULLET
AGGREVATED = Case("aggrevated_bipedal", "ToyBox-v0", ASKING, 1)
DAGGER = Case("aggrevated_bipedal", "ToyBox-v0", f"{ASKING} --algorithm dagger", 1)
WATCHING = [BC, PPO, OFFLINE, *RACECAR]
SCRIPTS = [*WATCHING, AGGREVATED]  # a case of each
CASES = [*SCRIPTS, REINFORCE, DAGGER]
FEW = [case for case in CASES if case not in RACECAR[1:]]  # PyBullet is slow


def demos(env_id):
    """The path of its demonstrations; those of Toy's variants are Toy's."""
    path = FILES / f"{env_id}.npz"
    if not path.exists():
        done_on = re.sub("Growing|Gusts|Hidden|Remembering|Worker", "Toy", env_id)
        arrays = toys.demonstrations(re.sub("Endless", "Truncating", done_on))
        np.savez(path, **{**arrays, "metadata": json.dumps({"env_id": env_id})})
    return path


def expert(env_id, gain=3.0):
    """The path of a .pt of plain weights: an expert for ToyBox-v0 that pushes towards 0."""
    path = FILES / f"{env_id}_{gain}.pt"
    weight = {"mean": torch.zeros(3), "deviation": torch.ones(3)}
    layers = {0: torch.tensor([[-gain, 0, 0]] * 2), 2: 0.4 * torch.ones(2, 2)}
    weight |= {f"network.{i}.weight": layer for i, layer in layers.items()}
    weight |= {f"network.{i}.bias": torch.zeros(2) for i in layers}
    about = {"sizes": [3, 2, 2], "activation": "tanh", "low": [-1.0, 0.0], "high": [1.0, 2.0]}
    saved = {"script": "aggrevated_bipedal", "env_id": env_id, "settings": about}
    torch.save({**saved, "weights": weight, "source": {"expert": "a rule"}}, path)
    return path
