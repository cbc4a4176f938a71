"""Run an experiment of experiments.toml for all of its seeds, one process a core.

    python benchmark/run.py gail_cartpole                 all seeds, all variants
    python benchmark/run.py bc_cartpole --jobs 1          one at a time, for timings

Each run is the script's own command line, in a process of its own with one thread; its summary goes
into benchmark/results/NAME.json, with the command that made it. Finished runs are not repeated:
a run that was cut off goes on from its checkpoint when the same command is given again.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"


def expand(name, experiment):
    """The runs of an experiment: dicts of variant, seed, run folder, program and command."""
    first, last = (int(seed) for seed in experiment["seeds"].split("-"))
    for variant, flags in experiment["variants"].items():
        for seed in range(first, last + 1):
            run_name = f"{name}__{variant}__{seed}".replace(" ", "_").replace(",", "")
            program, words = [experiment["script"]], shlex.split(flags)
            if words[:1] and not words[0].startswith("-"):  # a part replaced by variants.py
                program = ["benchmark/variants.py", words.pop(0), *program]
            words = [*shlex.split(experiment.get("flags", "")), *words, "--seed", str(seed)]
            about = {"variant": variant, "seed": seed, "run_name": run_name}
            yield {**about, "program": program, "command": [*program, *words]}


def execute(run, out):
    """Run one, or go on with it, or read what it left; returns its summary."""
    folder = out / run["run_name"]
    command = [*run["command"], "--out", str(out), "--run-name", run["run_name"]]
    if (folder / "checkpoint.pt").exists():
        command = [*run["program"], "--resume", str(folder)]
    if not (folder / "summary.json").exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr}")
    summary = json.loads((folder / "summary.json").read_text())
    del summary["args"]["out"], summary["args"]["run_name"], summary["args"]["resume"]
    kept = ("env_steps", "updates", "wall_seconds", "return_mean", "success_rate")
    kept += ("length_mean", "accuracy/held_out")
    summary["curve"] = [{k: p[k] for k in kept if k in p} for p in summary["curve"]]
    command = shlex.join(["python", *run["command"]])
    return {"variant": run["variant"], "seed": run["seed"], "command": command, **summary}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    table = tomllib.loads((ROOT / "benchmark" / "experiments.toml").read_text())
    parser.add_argument("names", nargs="+", choices=table, metavar="NAME", help=", ".join(table))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in args.names:
        runs = list(expand(name, table[name]))
        with ThreadPoolExecutor(args.jobs) as pool:
            done = pool.map(lambda run: execute(run, args.out.resolve()), runs)
            summaries = list(tqdm(done, total=len(runs), desc=name))
        result = {"command": f"python benchmark/run.py {name}", "runs": summaries}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
