"""What the periodic evaluations cost, and what this version costs beside another checkout.

    python benchmark/shares.py                     evaluations: their share of a run's CPU time
    git worktree add ../first f2b5be2
    python benchmark/shares.py --other ../first    each script beside the first version's

CPU time is that of the whole process (user and system), from starting Python to its end. A run is
made with ten evaluations of 20 episodes before its end, and again without them: the difference is
theirs. Beside another checkout, both have the same steps, environments, demonstrations and number
of the learner's evaluation episodes, and are run in turns; the medians are compared. The result is
benchmark/results/shares.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmark" / "results" / "shares.json"
TASKS = ("Acrobot-v1", "Hopper-v5")
STEPS = 100_000
EVERY, NEVER = STEPS // 11, STEPS * 10  # the evaluation that every run ends with stays
# Of each script the steps, with three evaluations in them, and the first version's flag for steps.
# A run here plays 3 x 20 of the learner's episodes and, at the end, 100 more; the first version's
# final evaluation has as many as the others, so 4 x 40. AggreVaTeD validates on 200 in both.
PAIRS = {
    "bc_cartpole.py": (1_800, "--updates", 40),
    "gail_offline_cartpole.py": (3_600, "--updates", 40),
    "gail_cartpole.py": (99_000, "--total-steps", 40),
    "gail_racecar_ppo.py": (60_000, "--total-steps", 40),
    "gail_racecar_reinforce.py": (60_000, "--total-steps", 40),
    "aggrevated_bipedal.py": (3, "--iterations", 100),
}


def cpu_seconds(command, root):
    """The CPU time of a run of this command line, as a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def evaluation_row(task, repeats, folder):
    """The share of the ten evaluations before a run's end in its CPU time."""
    words = [sys.executable, "gail_cartpole.py", "--env-id", task, "--total-steps", str(STEPS)]
    words += ["--eval-episodes", "20"]
    times = {EVERY: [], NEVER: []}
    for repeat in range(repeats):
        for every, found in times.items():
            out = f"{folder}/{task}-{every}-{repeat}"
            found.append(cpu_seconds([*words, "--eval-every", str(every), "--out", out], ROOT))
    evaluated, never = (median(found) for found in times.values())
    return {
        "what": f"gail_cartpole.py on {task}, {STEPS:,} steps",
        "median of": str(repeats),
        "CPU, s": f"{evaluated:.1f}",
        "without evaluations, s": f"{never:.1f}",
        "share of the evaluations": f"{1 - never / evaluated:.1%}",
    }


def pair_row(script, other, repeats, folder):
    """This version's CPU time by the other checkout's."""
    steps, flag, episodes = PAIRS[script]
    command = [sys.executable, script, "--seed", "1", "--no-progress"]
    command += ["--eval-every", str(steps // 3)]
    times = {"here": [], "there": []}
    for repeat in range(repeats):
        name = f"{script}-{repeat}"
        here = ["--total-steps", str(steps), "--eval-episodes", "20", "--out", f"{folder}/{name}"]
        if script in ("gail_cartpole.py", "gail_racecar_ppo.py"):
            here += ["--bc-weight", "0"]  # the first version clones nothing
        there = [flag, str(steps), "--eval-episodes", str(episodes), "--out", folder]
        there += ["--run-name", f"there-{name}"]
        times["here"].append(cpu_seconds([*command, *here], ROOT))
        times["there"].append(cpu_seconds([*command, *there], other))
    here, there = median(times["here"]), median(times["there"])
    return {
        "what": f"{script}, {steps:,} steps",
        "median of": str(repeats),
        "CPU, s": f"{here:.1f}",
        "first version, s": f"{there:.1f}",
        "now / first version": f"{here / there:.2f}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, help="a checkout of the first version")
    parser.add_argument("--scripts", nargs="*", default=list(PAIRS), help="beside the other's")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many runs")
    args = parser.parse_args()
    rows = json.loads(RESULT.read_text())["table"] if RESULT.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(evaluation_row, task) for task in TASKS]
        if args.other:
            jobs = [(pair_row, script, args.other) for script in args.scripts]
        for measure, *what in jobs:
            row = measure(*what, args.repeats, folder)
            rows = [old for old in rows if old["what"] != row["what"]] + [row]
            print(row, flush=True)
            command = "python benchmark/shares.py"
            RESULT.write_text(json.dumps({"command": command, "table": rows}, indent=1))


if __name__ == "__main__":
    main()
