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
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from report import solved_point  # noqa: E402

import bc_cartpole  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
SOLVED = 495
SIZES = {
    "30 pairs": ["--num-pairs", "30"],
    **{size: ["--num-demos", size] for size in ("1", "4", "7", "10")},
}
REINFORCE = ["--num-demos", "1", "--policy-gradient", "reinforce"]
LOADED = """
import json, sys
import imitation.algorithms.adversarial.gail
files = {module.__file__ for name, module in sys.modules.items() if name.startswith("imitation")}
lines = [len(open(file).read().splitlines()) for file in files]
print(json.dumps({"files": len(lines), "lines": sum(lines)}))
"""


def execute(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)


def write_selection(path, flags, seed):
    """The pairs that the scripts learn from with these flags and this seed, as a file."""
    args = bc_cartpole.parse_args([*flags, "--seed", str(seed)])
    chosen, _, _ = bc_cartpole.load_demos(args, **bc_cartpole.sizes(args.env_id))
    observations, actions, *_ = (column.numpy() for column in bc_cartpole.tensors(chosen))
    np.savez(path, observations=observations, actions=actions)


def ours(script, flags, seed, out):
    folder = out / f"{script}_{'_'.join(flags)}_{seed}".replace("--", "")
    every = "500" if script == "bc_cartpole" else "5000"
    command = [sys.executable, f"{script}.py", *flags, "--seed", str(seed)]
    command += ["--eval-every", every, "--eval-episodes", "100", "--out", str(folder)]
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        execute(command)
    summary = json.loads((folder / "summary.json").read_text())
    at = solved_point(summary, SOLVED) or {}
    return {
        "library": "here",
        "return_mean": summary["learner"]["return_mean"],
        "steps": summary["steps"] if script == "gail_cartpole" else 0,
        "seconds": summary["wall_seconds"],
        "solved_at_steps": at.get("steps"),
        "solved_at_seconds": at.get("wall_seconds"),
    }


def theirs(python, algorithm, flags, seed, out):
    name = f"imitation_{algorithm}_{'_'.join(flags)}_{seed}".replace("--", "")
    demos, result = out / f"{name}.npz", out / f"{name}.json"
    if not result.exists():
        write_selection(demos, flags, seed)
        script = ["benchmark/peer_imitation.py", algorithm, "--demos", str(demos)]
        execute([python, *script, "--seed", str(seed), "--out", str(result)])
    found = json.loads(result.read_text())
    last = found["curve"][-1]
    at = solved_point({"curve": found["curve"], "learner": last}, SOLVED) or {}
    return {
        "library": "imitation",
        "return_mean": last["return_mean"],
        "steps": last["steps"] if algorithm == "gail" else 0,
        "seconds": last["wall_seconds"],
        "solved_at_steps": at.get("steps"),
        "solved_at_seconds": at.get("wall_seconds"),
        "versions": found["versions"],
    }


def lines(python):
    """The files and lines that make up GAIL: here, and in the library without its dependencies."""
    found = subprocess.run([python, "-c", LOADED], check=True, capture_output=True, text=True)
    text = (ROOT / "gail_cartpole.py").read_text()
    algorithm = text[: text.index("# The harness: ")].count("\n") - 1
    here = {"files": 1, "lines": text.count("\n"), "lines of the algorithm": algorithm}
    return {"here": here, "imitation": json.loads(found.stdout)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("algorithms", nargs="+", choices=("bc", "gail"))
    parser.add_argument("--peer-python", required=True, help="of the library's virtual environment")
    parser.add_argument("--seeds", default="1-10", help="first and last")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "peers")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    first, last = (int(seed) for seed in args.seeds.split("-"))
    sizes = {"bc": SIZES, "gail": {"1": ["--num-demos", "1"]}}
    work = [(a, v, s) for a in args.algorithms for v in sizes[a] for s in range(first, last + 1)]
    rows, out = {algorithm: [] for algorithm in args.algorithms}, args.out.resolve()
    for algorithm, variant, seed in tqdm(work):
        flags = sizes[algorithm][variant]
        about = {"algorithm": algorithm, "variant": variant, "seed": seed}
        rows[algorithm] += [
            {**about, **ours(f"{algorithm}_cartpole", flags, seed, out)},
            {**about, **theirs(args.peer_python, algorithm, flags, seed, out)},
        ]
        if algorithm == "gail":
            about["variant"] = "1, REINFORCE"
            rows[algorithm].append({**about, **ours("gail_cartpole", REINFORCE, seed, out)})
    command = f"python benchmark/peers.py --peer-python .venv-peer/bin/python --seeds {args.seeds}"
    machine = (
        f"{platform.system()}, {os.cpu_count()} cores, one thread, its runs one after the other"
    )
    for algorithm in args.algorithms:
        result = {"command": f"{command} {algorithm}", "machine": machine}
        result |= {"lines": lines(args.peer_python), "rows": rows[algorithm]}
        (RESULTS / f"peers_{algorithm}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
