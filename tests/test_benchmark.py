"""What stands behind the tables: the experiments, the variants and the statistics."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from scripts import PYBULLET, ROOT, SCRIPTS, same

sys.path.insert(0, str(ROOT / "benchmark"))
report, run, variants = (importlib.import_module(name) for name in ("report", "run", "variants"))

SCRIPTS_BY_NAME = {case.script: case for case in SCRIPTS}
EXPERIMENTS = tomllib.loads((ROOT / "benchmark" / "experiments.toml").read_text())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_script_accepts_every_command_of_an_experiment(name, tmp_path, monkeypatch):
    if "racecar" in name and not PYBULLET:
        pytest.skip("no pybullet")
    run.prepare(EXPERIMENTS[name], tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "runs")
    runs = list(run.expand(name, EXPERIMENTS[name]))
    assert len({each["run_name"] for each in runs}) == len(runs) > 0
    for each in runs:
        assert "/" not in each["run_name"] and " " not in each["run_name"]
        program, flags = each["program"], each["command"][len(each["program"]) :]
        assert each["command"][: len(program)] == program
        if len(program) > 1:
            assert program[0] == "benchmark/variants.py" and program[1] in variants.VARIANTS
        script = importlib.import_module(Path(program[-1]).stem)
        assert script.parse_args(flags).seed == each["seed"]


@pytest.mark.parametrize("variant", variants.VARIANTS.values(), ids=variants.VARIANTS)
def test_a_variant_replaces_names_that_the_script_has_and_runs(variant, tmp_path):
    cartpole = (variants.states_only, variants.next_states, variants.linear_policy)
    name = "gail_cartpole" if variant in cartpole else "gail_racecar_ppo"
    name = "aggrevated_bipedal" if variant is variants.no_advantage else name
    if "racecar" in name and not PYBULLET:
        pytest.skip("no pybullet")
    spec = importlib.util.spec_from_file_location("variant", ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before = dict(vars(script))
    variant(script)
    assert vars(script).keys() == before.keys()
    changed = [name for name, value in vars(script).items() if value is not before[name]]
    assert bool(changed) == (variant is not variants.as_it_is)
    argv = SCRIPTS_BY_NAME[name].argv(tmp_path / "run", "--eval-episodes", 2)
    assert script.main(argv) == 0


def test_the_next_state_of_cartpole_is_gymnasiums():
    envs = gym.make_vec("CartPole-v1", 8, vectorization_mode="vector_entry_point")
    observations, _ = envs.reset(seed=0)
    envs.action_space.seed(0)
    for _ in range(8):
        actions = envs.action_space.sample()
        following, _, terminated, _, _ = envs.step(actions)
        tensors = torch.tensor(observations, dtype=torch.float64), torch.tensor(actions)
        ours = variants.cartpole_step(*tensors).numpy()
        assert not terminated.any() and np.allclose(ours, following, atol=1e-5)
        observations = following


def test_the_walk_through_to_another_task(tmp_path, monkeypatch):
    """The patch that docs/index.md shows still applies, and what it makes trains and resumes."""
    run.prepare(EXPERIMENTS["gail_pendulum"], tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "runs")
    case = replace(SCRIPTS_BY_NAME["gail_cartpole"], script="gail_pendulum", full=600, half=300)
    case.run(tmp_path / "run", budget=case.half)
    assert same(case.resume(tmp_path / "run"), case.run(tmp_path / "whole"))


def test_interquartile_mean_and_its_interval():
    values = np.array([9.0, 1.0, 3.0, 5.0, 100.0, 4.0, 6.0, 2.0])
    assert report.interquartile_mean(values) == np.mean([3, 4, 5, 6])
    assert report.interquartile_mean(values[:3]) == np.mean([9, 1, 3])
    low, high = report.bootstrap_interval(values)
    assert low < report.interquartile_mean(values) < high
    assert tuple(report.bootstrap_interval(np.full(5, 7.0))) == (7, 7)


def test_medians_count_seeds_that_never_got_there():
    assert report.median([1, None, 3]) == "3"
    assert report.median([None, None, 3]) == "never"
    assert report.median([1_000, 2_000]) == "1,500"


SMALL = """
[small]
script = "gail_cartpole.py"
seeds = "1-2"
variants."ppo" = "--total-steps 5000 --eval-every 1000 --eval-episodes 2"
"""


def run_small(folder, *flags, **environment):
    """Start the experiment SMALL with its runs and its result in `folder`."""
    folder.mkdir()
    (folder / "small.toml").write_text(SMALL)
    command = [sys.executable, "benchmark/run.py", "small", "--experiments", folder / "small.toml"]
    command += ["--out", folder / "runs", "--results", folder, *flags]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def result_of(process, folder):
    """The table of SMALL, without the seconds."""
    assert process.wait(timeout=300) == 0, process.stderr.read()
    result = json.loads((folder / "small.json").read_text())
    for each in result["runs"]:
        for timed in [each, *each["curve"]]:
            for key in [key for key in timed if "seconds" in key or key == "verdict"]:
                del timed[key]
    return result


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "whole"
    return result_of(run_small(folder), folder)


@pytest.mark.parametrize("failures", [0, run.TRIES - 1, run.TRIES])
def test_a_run_is_tried_so_many_times(failures, tmp_path):
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(
        f"from pathlib import Path\nlog = Path({str(log)!r})\nlog.open('a').write('.')\n"
        f"assert len(log.read_text()) > {failures}, 'died'\n"
        f"Path({str(tmp_path / 'run')!r}).mkdir()\n"
        f"Path({str(tmp_path / 'run' / 'summary.json')!r}).write_text('[5]')\n"
    )
    about = {"run_name": "run", "program": [str(script)], "command": [str(script)]}
    if failures < run.TRIES:
        assert run.execute(about, tmp_path, ROOT) == [5]
    else:
        with pytest.raises(RuntimeError, match="died"):
            run.execute(about, tmp_path, ROOT)
    assert len(log.read_text()) == min(failures + 1, run.TRIES)


def test_a_run_that_is_killed_goes_on_from_its_checkpoint(tmp_path, expected):
    process = run_small(tmp_path / "cut", "--jobs", "1")
    checkpoint = tmp_path / "cut" / "runs" / "small__ppo__1" / "checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.05)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    (child,) = (int(pid) for task in tasks for pid in task.read_text().split())
    os.kill(child, signal.SIGKILL)
    assert result_of(process, tmp_path / "cut") == expected


def test_a_ray_cluster_that_loses_a_node_makes_the_same_table(tmp_path, expected):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        process = run_small(tmp_path / "ray", "--ray", RAY_ADDRESS=cluster.address)
        while len(list(tmp_path.glob("ray/runs/*/checkpoint.pt"))) < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        assert result_of(process, tmp_path / "ray") == expected
    finally:
        cluster.shutdown()
