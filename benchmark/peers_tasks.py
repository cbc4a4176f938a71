"""These scripts and the `imitation` library on tasks that neither was tuned for.

    python benchmark/peers_tasks.py --peer-python .venv-peer/bin/python --seeds 1-5

From the same four demonstrations: cloning (8,000 updates), and 200,000 steps of GAIL from scratch
and with cloning first; here that is the default, there GAIL goes on with the cloned policy. The
scripts have their defaults, the library its tutorials' settings. It needs an older Gymnasium,
whose Hopper-v4 has the observations, actions and rewards of Hopper-v5.

Solved: 95 % of the way from random to the expert at an evaluation of 20 greedy episodes and at
every later one. Evaluations are every 16,384 steps (a round there) and not counted in the seconds.
For each seed one run follows the other, one thread each. It goes on where it stopped; the result
is benchmark/results/peers_tasks.json.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

from peers import RESULTS, ROOT, execute, write_selection
from report import solved_point
from tqdm import tqdm

TASKS = {"Acrobot-v1": "Acrobot-v1", "Pendulum-v1": "Pendulum-v1", "Hopper-v5": "Hopper-v4"}
UPDATES, STEPS, ROUND = 8_000, 200_000, 16_384
OURS = {
    "cloning": ["bc_cartpole.py", "--total-steps", UPDATES, "--eval-every", 1_000],
    "GAIL": ["gail_cartpole.py", "--total-steps", STEPS, "--eval-every", ROUND, "--bc-weight", 0],
    "cloning and GAIL": ["gail_cartpole.py", "--total-steps", STEPS, "--eval-every", ROUND],
}
THEIRS = {"cloning": "bc", "GAIL": "gail", "cloning and GAIL": "bc+gail"}


def run(command, out):
    if not out.exists():
        execute([str(word) for word in command])
    return json.loads(out.read_text())


def pair(task, learner, seed, python, folder):
    """The row of the script, and that of the library."""
    name = f"{task}_{learner}_{seed}".replace(" ", "_")
    flags = ["--env-id", task, "--num-demos", "4"]
    command = [sys.executable, *OURS[learner], *flags, "--seed", seed, "--out", folder / name]
    here = run(command, folder / name / "summary.json")
    demos, out = folder / f"{name}.npz", folder / f"{name}_imitation.json"
    write_selection(demos, flags, seed)
    command = [python, "benchmark/peer_imitation.py", THEIRS[learner], "--env-id", TASKS[task]]
    command += ["--demos", demos, "--updates", UPDATES, "--total-steps", STEPS, "--seed", seed]
    there = run([*command, "--eval-episodes", 20, "--out", out], out)
    there["learner"], there["wall_seconds"] = there["curve"][-1], there["curve"][-1]["wall_seconds"]
    low, high = (here[name]["return_mean"] for name in ("random", "expert"))
    rows = []
    for library, summary in (("here", here), ("imitation", there)):
        at = solved_point(summary, low + 0.95 * (high - low)) or {}
        reached = summary["learner"]["return_mean"]
        row = {"variant": task, "algorithm": learner, "library": library, "seed": seed}
        row |= {"return_mean": reached, "share": (reached - low) / (high - low)}
        row |= {"seconds": summary["wall_seconds"], "solved_at_seconds": at.get("wall_seconds")}
        row |= {"steps": summary["curve"][-1]["steps"], "solved_at_steps": at.get("steps")}
        rows.append({**row, "versions": summary["versions"]})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="of the library's virtual environment")
    parser.add_argument("--seeds", default="1-5", help="first and last")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "peers_tasks")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    first, last = (int(seed) for seed in args.seeds.split("-"))
    work = [(t, k, s) for s in range(first, last + 1) for t in TASKS for k in OURS]
    rows = [pair(*x, args.peer_python, args.out.resolve()) for x in tqdm(work)]
    command = (
        f"python benchmark/peers_tasks.py --peer-python .venv-peer/bin/python --seeds {args.seeds}"
    )
    machine = f"{platform.system()}, {os.cpu_count()} cores, one thread each"
    result = {"command": command, "machine": machine, "rows": [row for two in rows for row in two]}
    (RESULTS / "peers_tasks.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
