"""Run an experiment of experiments.toml for all of its seeds, one process per core.

    python benchmark/run.py gail_cartpole                 all seeds, all variants
    python benchmark/run.py bc_cartpole --jobs 1          one at a time, for timings
    RAY_ADDRESS=... python benchmark/run.py gail_cartpole --ray

Each run is the script's own command line, in a process of its own with one thread; its summary goes
into benchmark/results/NAME.json, with the command that made it. Finished runs are not repeated:
a run that was cut off goes on from its checkpoint when the same command is given again.

On a Ray cluster (pip install -r benchmark/requirements-ray.txt) every run is a task of one core.
Ray copies the project's files to the machines, which need Python and requirements.txt, and repeats
what was running on a machine that is lost. If --out is a folder that all of them share, a repeated
run goes on from its checkpoint; otherwise it begins again, and the run folders stay on the machines
that made them.
"""

import argparse
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from filelock import FileLock, Timeout  # torch's own requirement
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
TRIES = 3  # if a run dies, each from its last checkpoint
NOT_KEPT = ("out", "resume")  # of a run's settings
NOT_SENT = [".git", ".venv*", "runs", "docs", "benchmark/results", "**/__pycache__"]  # to Ray
KEPT = ("steps", "env_steps", "wall_seconds", "return_mean", "success_rate", "length_mean")
KEPT += ("losses/held_out",)  # of a point of the curve


def variants(experiment):
    """Names and flags: as they are written, or one for each of `tasks`."""
    if "variants" in experiment:
        return experiment["variants"]
    part, demos = experiment.get("part", ""), experiment["num_demos"]
    name, flags = f"{{}}, {demos}", f"{part} --env-id {{}} --num-demos {demos}"
    if "num_pairs" in experiment:
        name += f", {experiment['num_pairs']} pairs of each"
        flags += f" --num-pairs {experiment['num_pairs']}"
    return {name.format(task): flags.format(task) for task in experiment["tasks"].split()}


def expand(name, experiment):
    """The runs of an experiment: dicts of variant, seed, run folder, program and command."""
    first, last = (int(seed) for seed in experiment["seeds"].split("-"))
    for variant, flags in variants(experiment).items():
        for seed in range(first, last + 1):
            run_name = f"{name}__{variant}__{seed}".replace(" ", "_").replace(",", "")
            program, words = [experiment["script"]], shlex.split(flags)
            if words[:1] and not words[0].startswith("-"):  # a part replaced by variants.py
                program = ["benchmark/variants.py", words.pop(0), *program]
            common = experiment.get("flags", "").replace("{seed}", str(seed))
            words = [*shlex.split(common), *words, "--seed", str(seed)]
            about = {"variant": variant, "seed": seed, "run_name": run_name}
            yield {**about, "program": program, "command": [*program, *words]}


def execute(run, out, root):
    """Start or resume a run, unless it is finished already; returns its summary."""
    folder = out / run["run_name"]
    summary, died = folder / "summary.json", ""
    for _ in range(TRIES):
        if summary.exists():
            break
        command = [*run["command"], "--out", str(folder)]
        if (folder / "checkpoint.pt").exists():
            command = [*run["program"], "--resume", str(folder)]
        else:  # a run that died before its first checkpoint leaves nothing to go on from
            shutil.rmtree(folder, ignore_errors=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True
        )
        died = f"{shlex.join(command)} failed {TRIES} times:\n{done.stderr}"
        if done.returncode in (130, 143):  # it was stopped
            break
    if not summary.exists():
        raise RuntimeError(died)
    return json.loads(summary.read_text())


def local(runs, out, jobs):
    """The summaries of `runs`, as they are done: (index, summary)."""
    with ThreadPoolExecutor(jobs) as pool:
        done = {pool.submit(execute, run, out, ROOT): i for i, run in enumerate(runs)}
        try:
            for future in as_completed(done):
                yield done[future], future.result()
        finally:  # Ctrl-C, or a run that failed: begin no others
            pool.shutdown(wait=False, cancel_futures=True)


def on_ray(runs, out):
    """The same from the Ray cluster at RAY_ADDRESS, or from one started on this machine."""
    import ray

    sent = {"working_dir": str(ROOT), "excludes": NOT_SENT}
    ray.init(runtime_env=sent, log_to_driver=False, ignore_reinit_error=True)
    task = ray.remote(lambda run: execute(run, out, Path.cwd())).options(num_cpus=1, max_retries=-1)
    waiting = {}
    for i, run in enumerate(runs):
        if (out / run["run_name"] / "summary.json").exists():
            yield i, execute(run, out, ROOT)
        else:
            waiting[task.remote(run)] = i
    while waiting:
        (done,), _ = ray.wait(list(waiting))
        i, summary = waiting.pop(done), ray.get(done)
        folder = out / runs[i]["run_name"]  # on this machine too, where it is not shared
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        yield i, summary


def tabulate(run, summary):
    """What a result keeps of a run's summary."""
    for name in NOT_KEPT:
        del summary["args"][name]
    changed = differences(run["command"], summary["args"])
    if changed:
        was = f"{run['run_name']} was run with other settings: {', '.join(changed)}"
        raise SystemExit(f"{was}; remove its folder to run it again")
    summary["curve"] = [{k: p[k] for k in KEPT if k in p} for p in summary["curve"]]
    command = shlex.join(["python", *run["command"]])
    return {"variant": run["variant"], "seed": run["seed"], "command": command, **summary}


def differences(command, args):
    """The settings in which a run's `args` differ from what this command line asks for."""
    first = next(i for i, word in enumerate(command) if word.startswith("-"))
    path = ROOT / command[first - 1]
    sys.path[:0] = {str(ROOT), str(path.parent)} - set(sys.path)
    asked = vars(importlib.import_module(path.stem).parse_args(command[first:]))
    changed = [k for k, value in asked.items() if k in args and args[k] != value]
    changed += sorted(asked.keys() - args.keys())  # a new setting; one that is gone had its default
    return [name for name in changed if name not in NOT_KEPT]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="experiments of --experiments")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--ray", action="store_true", help="on the Ray cluster of RAY_ADDRESS")
    parser.add_argument("--experiments", type=Path, default=ROOT / "benchmark" / "experiments.toml")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark", help="run folders")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where NAME.json goes")
    args = parser.parse_args()
    if args.jobs < 1 or not args.experiments.is_file():
        parser.error("expected --jobs of 1 or more, and a file of --experiments")
    table = tomllib.loads(args.experiments.read_text())
    for name in args.names:
        if name not in table:
            parser.error(f"no experiment {name}; there are {', '.join(table)}")
    args.results.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        runs = list(expand(name, table[name]))
        done = on_ray(runs, out) if args.ray else local(runs, out, args.jobs)
        try:
            with FileLock(out / f"{name}.lock", blocking=False):
                summaries = dict(tqdm(done, total=len(runs), desc=name, smoothing=0))
        except Timeout:
            raise SystemExit(f"{name} is being run in {out} by another process") from None
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        rows = [tabulate(run, summaries[i]) for i, run in enumerate(runs)]
        result = {"command": f"python benchmark/run.py {name}"}
        result |= {key: table[name].get(key) for key in ("solved", "row")}
        result["runs"] = rows
        (args.results / f"{name}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
