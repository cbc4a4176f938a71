"""These scripts and the `imitation` library, side by side on the same demonstrations and seeds.

    python -m venv .venv-peer && .venv-peer/bin/pip install -r benchmark/requirements-peer.txt
    python benchmark/peers.py --peer-python .venv-peer/bin/python --seeds 1-10 gail bc

For each seed the script runs first and the library directly after it, one process at a time with
one thread. Both learn from the pairs that the script draws for that seed; both are evaluated over
100 greedy episodes, every 5,000 steps here and after every round there, and no evaluation is
counted in the seconds. Solved: from an evaluation on, all are at 495 or above. GAIL by REINFORCE
has no counterpart there and is compared with the library's GAIL. The results go into
benchmark/results/peers_*.json, with the versions and the line count of all that GAIL imports.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from report import solved_point  # noqa: E402

import bc_cartpole  # noqa: E402

RESULTS, RUNS = ROOT / "benchmark" / "results", ROOT / "runs" / "peers"
SIZES = {size: ["--num-demos", size] for size in ("1", "4", "7", "10")}
FLAGS = {
    "bc": {"30 pairs": ["--num-pairs", "30"], **SIZES},
    "gail": {"1": SIZES["1"], "1, REINFORCE": [*SIZES["1"], "--policy-gradient", "reinforce"]},
}
EVERY = {"bc": 500, "gail": 5_000}
LOADED = """
import json, sys
import imitation.algorithms.adversarial.gail
files = {module.__file__ for name, module in sys.modules.items() if name.startswith("imitation")}
lines = [len(open(file).read().splitlines()) for file in files]
print(json.dumps({"files": len(lines), "lines": sum(lines)}))
"""


def execute(command):
    words, environment = [str(word) for word in command], {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)


def ours(command, folder):
    """The summary of a script's run. A run that was cut off begins again."""
    summary = folder / "summary.json"
    if not summary.exists():
        shutil.rmtree(folder, ignore_errors=True)
        execute([sys.executable, *command, "--out", folder])
    return json.loads(summary.read_text())


def theirs(command, flags, out):
    """The same of the library, on the pairs that the scripts learn from with these flags."""
    if not out.exists():
        args = bc_cartpole.parse_args([str(flag) for flag in flags])
        chosen, _, _ = bc_cartpole.load_demos(args, **bc_cartpole.sizes(args.env_id))
        observations, actions, *_ = (column.numpy() for column in bc_cartpole.tensors(chosen))
        demos = out.with_suffix(".npz")
        np.savez(demos, observations=observations, actions=actions)
        execute([*command, "--seed", args.seed, "--demos", demos, "--out", out])
    found = json.loads(out.read_text())
    last = found["curve"][-1]
    return {**found, "learner": last, "steps": last["steps"], "wall_seconds": last["wall_seconds"]}


def compare(seed, python, about, flags, here, there, solved=None):
    """The rows of a script's run and, where it has a counterpart, of the library's."""
    name, flags = "_".join([*about.values(), str(seed)]).replace(" ", "_"), [*flags, "--seed", seed]
    summaries = {"here": ours([*here, *flags], RUNS / name)}
    if there:
        command = [python, "benchmark/peer_imitation.py", *there]
        summaries["imitation"] = theirs(command, flags, RUNS / f"{name}.json")
    low, high = (summaries["here"][who]["return_mean"] for who in ("random", "expert"))
    for library, summary in summaries.items():
        at = solved_point(summary, solved or low + 0.95 * (high - low)) or {}
        reached = summary["learner"]["return_mean"]
        row = {**about, "seed": seed, "library": library, "versions": summary["versions"]}
        row |= {"return_mean": reached, "share": (reached - low) / (high - low)}
        row |= {"steps": summary["steps"], "solved_at_steps": at.get("steps")}
        row |= {"seconds": summary["wall_seconds"], "solved_at_seconds": at.get("wall_seconds")}
        yield row


def lines(python):
    """The files and lines that make up GAIL: here, and in the library without its dependencies."""
    found = subprocess.run([python, "-c", LOADED], check=True, capture_output=True, text=True)
    text = (ROOT / "gail_cartpole.py").read_text()
    algorithm = text[: text.index("# The harness: ")].count("\n") - 1
    here = {"files": 1, "lines": text.count("\n"), "lines of the algorithm": algorithm}
    return {"here": here, "imitation": json.loads(found.stdout)}


def parse_args(description, *algorithms):
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="of the library's virtual environment")
    parser.add_argument("--seeds", required=True, help="one, or first and last: 1-10")
    if algorithms:
        parser.add_argument("algorithms", nargs="+", choices=algorithms)
    return parser.parse_args()


def measure(name, command, args, comparisons, **more):
    """Make all runs, one after the other, and write their rows."""
    RUNS.mkdir(parents=True, exist_ok=True)
    first, _, last = args.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    work, rows = list(product(seeds, comparisons)), []
    for seed, comparison in tqdm(work, desc=name):
        rows += compare(seed, args.peer_python, **comparison)
    command = f"python benchmark/{command} --peer-python .venv-peer/bin/python --seeds {args.seeds}"
    machine = f"{platform.system()}, {os.cpu_count()} cores, one thread, one run after the other"
    result = {"command": command, "machine": machine, **more, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1))


def main():
    args = parse_args(__doc__, *FLAGS)
    for algorithm in args.algorithms:
        here = [f"{algorithm}_cartpole.py", "--eval-every", EVERY[algorithm]]
        here += ["--eval-episodes", "100"]
        here += ["--bc-weight", 0] * (algorithm == "gail")
        comparisons = [
            {
                "about": {"algorithm": algorithm, "variant": variant},
                "flags": flags,
                "here": here,
                "there": [] if "REINFORCE" in variant else [algorithm, "--updates", 8_000],
                "solved": 495,
            }
            for variant, flags in FLAGS[algorithm].items()
        ]
        command, found = f"peers.py {algorithm}", lines(args.peer_python)
        measure(f"peers_{algorithm}", command, args, comparisons, lines=found)


if __name__ == "__main__":
    main()
