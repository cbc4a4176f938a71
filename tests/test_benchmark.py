"""What stands behind the tables: the experiments, the variants and the statistics."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from filelock import FileLock
from scripts import PYBULLET, ROOT, SCRIPTS, same

sys.path.insert(0, str(ROOT / "benchmark"))
report, run, variants, bipedal_gradients, bipedal_start, bipedal_unseen = (
    importlib.import_module(name)
    for name in (
        "report",
        "run",
        "variants",
        "bipedal_gradients",
        "bipedal_start",
        "bipedal_unseen",
    )
)

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


def test_every_result_has_the_settings_of_its_command(tmp_path):
    """The command is the only way to repeat a result: it must ask for the same settings."""
    run.prepare(EXPERIMENTS["gail_pendulum"], tmp_path)
    wrong = {}
    for path in run.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        for each in result.get("runs", []) if isinstance(result, dict) else []:
            command = shlex.split(each["command"])[1:]
            if "--resume" in command or ("racecar" in each["script"] and not PYBULLET):
                continue
            root = tmp_path if "pendulum" in each["script"] else ROOT
            differ = run.differences(command, each["args"], root)
            if differ:
                wrong.setdefault((path.name, each["variant"], *differ), []).append(each["seed"])
    assert not wrong


@pytest.mark.parametrize(
    "flags, differ",
    [
        ([], []),
        (["--gamma", "0.5"], ["gamma"]),
        (["--control", "constant-reward", "--hidden", "9"], ["control", "hidden"]),
        (["--total-steps", "100000"], []),
        (["--out", "elsewhere", "--run-name", "x"], []),
    ],
)
def test_settings_that_a_command_does_not_ask_for(flags, differ):
    made_by = vars(SCRIPTS_BY_NAME["gail_cartpole"].module.parse_args(["--seed", "3"]))
    args = {name: value for name, value in made_by.items() if name not in run.NOT_KEPT}
    args["total_steps"] = 100_000  # filled in by the script where the command names none
    command = ["gail_cartpole.py", "--seed", "3", *flags]
    assert sorted(run.differences(command, args)) == differ
    assert run.differences(["benchmark/variants.py", "states-only", *command], args) == differ
    assert run.differences(command, {**args, "gone": 64})[-1] == "gone"


@pytest.mark.parametrize("variant", variants.VARIANTS.values(), ids=variants.VARIANTS)
def test_a_variant_replaces_names_that_the_script_has_and_runs(variant, tmp_path):
    cartpole = (variants.states_only, variants.next_states)
    cartpole += (variants.linear_policy, variants.last_policy, variants.memory)
    name = "gail_cartpole" if variant in cartpole else "gail_racecar_ppo"
    walker = (variants.no_advantage, variants.score_function)
    walker += (variants.natural_gradient, variants.min_max_weights)
    walker += (variants.executed_actions, variants.expert_rolls_in, variants.learner_rolls_in)
    name = "aggrevated_bipedal" if variant in walker else name
    offline = (variants.plain_discriminator, variants.plain_gradient, variants.larger_final_lr)
    name = "gail_offline_cartpole" if variant in offline else name
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


def test_a_memory_gives_half_of_what_the_discriminator_refuses():
    """In the third rollout: 100 pairs of its own, and 100 drawn from the 64 kept of each."""
    refused, remembered = [], []

    def minibatch(pairs, number):
        remembered.append(pairs)
        return pairs[:number]

    script = SimpleNamespace(minibatch=minibatch)
    script.update_discriminator = lambda d, optimizer, expert, policy, args: refused.append(policy)
    variants.memory(script)
    for rollout in range(3):
        pairs = torch.stack([torch.full((100,), float(rollout)), torch.arange(100.0)], -1)
        script.update_discriminator(None, None, None, pairs, None)
    assert torch.equal(refused[-1], torch.cat([pairs, remembered[-1][:100]]))
    assert remembered[-1][:, 0].tolist() == [0.0] * 64 + [1.0] * 64 + [2.0] * 64
    assert len(remembered[-1].unique(dim=0)) == 3 * 64


class KnownCritics(torch.nn.Module):
    """Q*(s, a) = -4 |a - 0.1 s_0..3|^2, twice."""

    def forward(self, observations, actions):
        value = -4 * (actions - 0.1 * observations[:, :4]).square().sum(-1)
        return torch.stack([value, value])


@pytest.fixture
def walker_states():
    """A policy and 4,000 states, where Q* is known: what the walker's benchmarks work on."""
    script, critics = bipedal_gradients.script, KnownCritics()
    torch.manual_seed(0)
    policy, states = script.Policy(8, 0.1), torch.randn(4_000, 24)
    samples = policy(states).base_dist.sample()
    batch = {"observations": states, "samples": samples, "actions": samples.tanh()}
    batch["expert_actions"] = 0.1 * states[:, :4] + 0.1 * torch.randn(4_000, 4)
    return policy, critics, batch


class TwoWalks:
    """Pays 1 a step; the first walker falls in step 24 (from 0), the other arrives in step 29."""

    num_envs = 2

    def reset(self, seed):
        self.steps, self.over = 0, np.zeros(2, bool)
        return np.zeros((2, 24), np.float32), {}

    def step(self, actions):
        rewards = np.where(self.over, 0.0, 1.0)
        rewards[0] = -100.0 if self.steps == 24 else rewards[0]
        ends = np.array([24, 29]) == self.steps
        self.over, self.steps = self.over | ends, self.steps + 1
        return np.zeros((2, 24), np.float32), rewards, ends, ends & False, {}


def test_the_cost_to_go_of_a_push(monkeypatch):
    """Pushed at step 20; V* = 7 is added where the expert arrived, and nothing after a fall."""
    script = bipedal_gradients.script
    args, policy = script.parse_args([]), script.Policy(8, 0.1)
    monkeypatch.setattr(bipedal_gradients, "HORIZONS", (2, 280))

    def critics(observations, actions):
        return torch.full((2, len(observations)), 7.0)

    batch = bipedal_gradients.pushed_steps(policy, policy, critics, TwoWalks(), args)
    discounts = args.gamma ** np.arange(11)
    exact = [discounts[:4].sum() - 100 * discounts[4], discounts[:10].sum() + 7 * discounts[10]]
    assert np.allclose(batch["gain 280"], np.array(exact) - 7)
    assert np.allclose(batch["gain 2"], discounts[:2].sum() + 7 * discounts[2] - 7)
    assert batch["rewards"].tolist() == [1, 1] and not batch["fell"].any()


def test_estimators_that_are_right_agree(walker_states):
    """With Q* exact every estimator of AggreVaTeD's gradient has the same mean."""
    policy, critics, batch = walker_states
    args = bipedal_gradients.script.parse_args([])
    values = critics(batch["observations"], batch["actions"])[0]
    following = critics(batch["observations"], batch["expert_actions"])[0]
    for horizon in bipedal_gradients.HORIZONS:  # the longer, the noisier
        noise = 0.004 * horizon * torch.randn(4_000)
        batch[f"gain {horizon}"] = values - following + noise
    batch["rewards"] = values - args.gamma * following
    batch["fell"] = torch.zeros(4_000, dtype=torch.bool)
    batch["next_observations"] = batch["observations"]
    batch["next_expert_actions"] = batch["expert_actions"]
    rows = bipedal_gradients.compare(policy, critics, batch, args, 20)
    *real, one_step, fresh, reparameterised, _ = (row["own"] for row in rows.values())
    assert reparameterised > 0.99 and fresh > one_step >= real[0] > real[1] > real[2] > 0.1
    *_, one_step, fresh, reparameterised, _ = rows.values()
    for row in (one_step, fresh, reparameterised):
        for truth in row.keys() - {"own"}:
            assert 0.8 < row[truth] / (row["own"] * rows[truth]["own"]) ** 0.5 < 1.2


@pytest.mark.parametrize("chance", [True, False])
def test_unseen_trajectories_tell_what_was_learnt_by_heart(chance, tmp_path, monkeypatch, capsys):
    """Random actions can only be memorised; a function of the state can be learnt."""
    torch.manual_seed(0)
    observations, last = torch.randn(4_000, 24), (torch.arange(4_000) + 1) % 40 == 0
    actions = 0.5 * (torch.randn(4_000, 4) if chance else observations[:, :4]).tanh()
    columns = {"observations": observations, "expert_actions": actions, "last": last}
    script = bipedal_unseen.script
    settings = vars(script.parse_args(["--hidden", "64", "--policy-lr", "1e-2"]))
    state = {"transitions": columns, "args": settings}
    script.write_checkpoint(tmp_path / "checkpoint.pt", state)
    command = ["bipedal_unseen.py", str(tmp_path), "--splits", "1", "--updates", "500"]
    monkeypatch.setattr(sys, "argv", command)
    bipedal_unseen.main()
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert [fit["trajectories"] for fit in fits] == [11, 22, 45, 90]
    assert [fit["steps"] for fit in fits] == [440, 880, 1800, 3600]
    variance = float(actions.var(0).sum())
    assert fits[0]["learnt"] < 0.1 * variance and fits[-1]["learnt"] < fits[-1]["unseen"]
    if chance:
        assert all(fit["unseen"] > variance for fit in fits)
    else:
        assert fits[-1]["unseen"] < 0.1 * variance and fits[-1]["unseen"] < fits[0]["unseen"]


def test_the_steps_of_a_trajectory():
    last = torch.tensor([False, True, True, False, False, True])
    assert bipedal_unseen.trajectory_of(last).tolist() == [0, 0, 1, 2, 2, 2]


def test_the_returns_from_the_first_steps_of_a_walk():
    """The discounted return from step k of the walks that are long enough, by its definition."""
    walks = []
    for length in (150, 250, 300):
        rewards = np.random.default_rng(length).normal(size=length)
        walks.append({"observations": np.full((length, 24), length), "rewards": rewards})
    states, returns = bipedal_start.values(walks, SimpleNamespace(gamma=0.9))
    assert [state[:, 0].tolist() for state in states] == [[250, 300]] * len(bipedal_start.STEPS)
    for k, found in zip(bipedal_start.STEPS, returns):
        each = [np.sum(0.9 ** np.arange(len(w["rewards"]) - k) * w["rewards"][k:]) for w in walks]
        assert found == pytest.approx(np.mean(each[1:]), abs=1e-4)


def test_the_score_function_of_fresh_actions_is_the_gradient(walker_states, monkeypatch):
    policy, critics, batch = walker_states
    script = bipedal_gradients.script
    states = (batch["observations"], batch["expert_actions"])

    def gradient():
        loss = script.aggrevated_loss(policy, critics, *states, 1.0, 0.0, 2.0)
        (found,) = torch.autograd.grad(loss, policy.network[-1].bias)
        return found

    exact = gradient()
    monkeypatch.setattr(script, "aggrevated_loss", script.aggrevated_loss)  # so that it is restored
    variants.score_function(script)
    assert torch.allclose(gradient(), exact, rtol=0.1, atol=0.1 * exact.abs().max())


def test_a_natural_step_is_that_of_the_fisher_matrix(walker_states):
    """Against the full F, on a policy with so few weights that F can be inverted."""
    policy, _, batch = walker_states
    policy.network = torch.nn.Sequential(torch.nn.Linear(24, 4)).double()
    states = batch["observations"].double()
    weights = [parameter.detach().clone() for parameter in policy.parameters()]
    loss = (policy.network(states) - batch["expert_actions"].double()).square().sum(-1).mean()
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    padded = torch.cat([states, torch.ones(len(states), 1, dtype=torch.double)], -1)
    moments = padded.T @ padded / len(padded) / 0.1**2 + 1e-3 * torch.eye(25)
    by_output = torch.cat([slope[:96].view(4, 24), slope[96:, None]], -1)
    natural = torch.linalg.solve(moments, by_output.T).T
    kl = 1e-4
    natural *= min(1.0, float((2 * kl / (natural * by_output).sum()).sqrt()))
    loss = (policy.network(states) - batch["expert_actions"].double()).square().sum(-1).mean()
    variants.natural_step(policy, states, loss, kl=kl, iterations=40)
    weight, bias = (b - a for a, b in zip(policy.parameters(), weights))
    assert torch.allclose(torch.cat([weight, bias[:, None]], -1), natural, rtol=1e-3, atol=1e-8)


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
    folder.mkdir(exist_ok=True)
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


def test_no_run_is_made_twice_at_a_time(tmp_path):
    (tmp_path / "cut" / "runs").mkdir(parents=True)
    with FileLock(tmp_path / "cut" / "runs" / "small.lock"):
        process = run_small(tmp_path / "cut")
        assert process.wait(timeout=60) == 1
    assert "small is being run" in process.stderr.read()
    assert not list((tmp_path / "cut").glob("*.json"))


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
