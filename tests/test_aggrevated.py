"""AggreVaTeD's mathematics against its definitions, its expert files, and its walkers."""

import base64
import copy
import io
import json
import pickle
import shutil
import signal
import zipfile
from functools import partial

import Box2D
import gymnasium as gym
import numpy as np
import pytest
import torch
from scripts import AGGREVATED, ROOT, Case, falling_expert, same, weights
from stable_baselines3 import DDPG, PPO, SAC, TD3
from test_bad_input import Payload, listing
from torch import nn
from torch.optim.swa_utils import AveragedModel

import aggrevated_bipedal as script

CASE = Case("aggrevated_bipedal", AGGREVATED, 4, 2, "", 0)
SHIPPED = sorted((ROOT / "experts").glob("*.zip"))


# --- mathematics ----------------------------------------------------------------------------------


def test_log_probability():
    """Of a squashed Gaussian: the Gaussian's at the inverse, less the log of tanh's slope."""
    policy = script.Policy(8, 0.3)
    observations = torch.randn(5, 24)
    actions = torch.rand(5, 4) * 1.8 - 0.9
    mean = policy.network(observations).double()
    exact = torch.distributions.Normal(mean, 0.3).log_prob(actions.double().atanh())
    exact = exact - (1 - actions.double().square()).log()
    assert torch.allclose(policy(observations).log_prob(actions).double(), exact, atol=1e-4)


def test_standardize():
    """Mean 0 and deviation 1 where the sample varies; a constant component is only shifted."""
    sample = torch.randn(1_000, 3) * torch.tensor([4.0, 1e-3, 0.0]) + torch.tensor([7.0, 0.0, 1.0])
    layer = script.Standardize(3)
    assert torch.equal(layer(sample), sample)
    layer.measure(sample)
    standard = layer(sample).double()
    assert torch.allclose(standard.mean(0), torch.zeros(3).double(), atol=1e-4)
    least = 1e-3 / script.LEAST_DEVIATION
    assert torch.allclose(standard.std(0), torch.tensor([1.0, least, 0.0]).double(), rtol=0.1)


class KnownCritics(nn.Module):
    """Q*(s, a) = s_0 * sum of a_i - 2 * sum of a_i^2, twice."""

    def forward(self, observations, actions):
        value = observations[:, 0] * actions.sum(-1) - 2 * actions.square().sum(-1)
        return torch.stack([value, value])


def test_gradient_of_the_expected_cost_to_go():
    """Against finite differences of the expectation, from Gauss-Hermite quadrature."""
    torch.manual_seed(0)
    policy, state = script.Policy(4, 0.5), torch.randn(1, 24)
    points, mass = np.polynomial.hermite_e.hermegauss(40)
    points, mass = torch.tensor(points), torch.tensor(mass) / np.sqrt(2 * np.pi)

    def expectation():
        actions = (policy.network(state).double() + 0.5 * points[:, None]).tanh()  # (points, 4)
        values = state[0, 0] * actions - 2 * actions.square()
        return float((mass[:, None] * values).sum().detach())

    states = state.expand(100_000, -1)
    expert_actions = torch.zeros(100_000, 4)
    loss = script.aggrevated_loss(policy, KnownCritics(), states, expert_actions, 1.0, 0.0, 0.0)
    (gradient,) = torch.autograd.grad(loss, policy.network[-1].bias)
    for i, estimated in enumerate(gradient.tolist()):
        bias = policy.network[-1].bias.data
        bias[i] += 1e-3
        above = expectation()
        bias[i] -= 2e-3
        below = expectation()
        bias[i] += 1e-3
        assert -estimated == pytest.approx((above - below) / 2e-3, abs=0.03)


def test_the_anchor_is_daggers_loss():
    policy, states, actions = script.Policy(4, 0.1), torch.randn(6, 24), torch.rand(6, 4)
    held = script.aggrevated_loss(policy, KnownCritics(), states, actions, 0.0, 1.0, 3.0)
    dagger = script.dagger_loss(policy, states, actions)
    assert held.item() == pytest.approx(3 * dagger.item(), rel=1e-6)
    squared = [
        sum((a - b) ** 2 for a, b in zip(*rows)) for rows in zip(actions, policy.act(states))
    ]
    assert dagger.item() == pytest.approx(float(sum(squared)) / 6, rel=1e-5)


def test_caution_takes_off_the_spread():
    class Doubtful(nn.Module):
        def forward(self, observations, actions):
            return torch.stack([actions.sum(-1), 3 * actions.sum(-1)])

    states, ones, zeros = torch.zeros(2, 24), torch.full((2, 4), 0.25), torch.zeros(2, 4)
    advantages = script.cautious_advantages(Doubtful(), states, ones, zeros, 0.5)
    assert advantages.tolist() == pytest.approx([2 - 0.5 * 2**0.5] * 2, rel=1e-5)
    ones.requires_grad_()
    script.cautious_advantages(Doubtful(), states, ones, ones.detach(), 1.0).sum().backward()
    assert ones.grad.isfinite().all()


def test_refitted_critics_are_the_experts():
    """On three states and two actions, whoever acted: against the solution of its equations."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    following = torch.randint(3, (3, 2), generator=generator)
    rewards = torch.rand(3, 2, generator=generator)
    fell = torch.tensor([[False, False], [False, True], [False, False]])
    expert, gamma = torch.tensor([0, 0, 1]), 0.8
    matrix, constant = torch.eye(6), rewards.flatten()
    for s in range(3):
        for a in range(2):
            if not fell[s, a]:
                matrix[2 * s + a, 2 * following[s, a] + expert[following[s, a]]] -= gamma
    exact = torch.linalg.solve(matrix, constant)

    states = torch.arange(3).repeat_interleave(2)
    actions = torch.arange(2).repeat(3)
    after = following.flatten()
    batch = {
        "observations": torch.eye(3)[states],
        "actions": torch.eye(2)[actions],
        "rewards": constant,
        "fell": fell.flatten(),
        "next_observations": torch.eye(3)[after],
        "next_expert_actions": torch.eye(2)[expert[after]],
    }
    critics = script.Critics(script.relu_mlp(5, 32, 1) for _ in range(2))
    target = AveragedModel(critics, multi_avg_fn=script.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.Adam(critics.parameters(), 5e-3)
    for _ in range(1500):
        script.descend(optimizer, script.fitted_q_loss(critics, target.module, batch, gamma))
        target.update_parameters(critics)
    found = critics(batch["observations"], batch["actions"])
    assert torch.allclose(found, exact.expand(2, -1), atol=0.03)


def test_cost_to_go():
    rewards = torch.tensor([1.0, 2.0, -100.0, 4.0, 5.0, 6.0, 7.0])
    batch = {
        "rewards": rewards,
        "tail": torch.tensor([False, True, True, True, True, True, True]),
        "fell": torch.tensor([False, False, True, False, False, False, False]),
        "last": torch.tensor([False, False, True, False, False, False, True]),
    }
    known, returns = script.cost_to_go(batch, 0.0)  # 5 steps before an end without a fall: unknown
    assert known.tolist() == [False, True, True, False, False, False, False]
    assert returns.tolist() == rewards.tolist()
    _, returns = script.cost_to_go(batch, 0.5)
    exact = [1 + 0.5 * (2 - 50), 2 - 50, -100, 4 + 2.5 + 1.5 + 7 / 8, 5 + 3 + 7 / 4, 6 + 3.5, 7]
    assert returns.tolist() == pytest.approx(exact)


def test_correlation():
    x, y = torch.randn(50), torch.randn(50)
    exact = np.corrcoef(x, y)[0, 1]
    assert script.correlation(x, y) == pytest.approx(exact, abs=1e-5)
    assert script.correlation(x, torch.ones(50)) == 0


# --- walkers --------------------------------------------------------------------------------------


def settings(**changes):
    args = script.parse_args([])
    vars(args).update(changes)
    return args


@pytest.mark.parametrize(
    "flag, falling", [("--anneal", [1, 0.75, 0.5, 0.25]), ("--no-anneal", [1] * 4)]
)
def test_the_step_size_of_an_iteration(flag, falling, monkeypatch):
    """It starts anew in each iteration, so that a longer run begins as a shorter one does."""
    seen, descend = [], script.descend

    def recorded(optimizer, loss):
        seen.append(optimizer.param_groups[0]["lr"])
        descend(optimizer, loss)

    monkeypatch.setattr(script, "descend", recorded)
    args = script.parse_args([flag, "--policy-updates", "4", "--policy-lr", "0.5"])
    policy, critics = script.Policy(8, 0.1), script.Critics([script.relu_mlp(28, 8, 1)] * 2)
    optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr)
    transitions = script.Transitions()
    batch = {"observations": torch.ones(3, 24), "expert_actions": torch.ones(3, 4)}
    transitions.add({**batch, "rewards": torch.ones(3)})
    for _ in range(2):
        script.improve(policy, critics, optimizer, transitions, 1.0, args)
    assert seen == [0.5 * share for share in falling] * 2


def test_another_expert_on_the_way(tmp_path, capsys):
    """In a file of the same name, with the same sizes: resuming would not give the same run."""
    path = falling_expert(tmp_path / "expert.zip")
    CASE.run(tmp_path / "run", "--expert", path, budget=1)
    shutil.copy(ROOT / "experts" / "BipedalWalker-v3_weak.zip", path)
    capsys.readouterr()
    assert script.main(["--resume", str(tmp_path / "run"), "--iterations", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "what it learnt from" in line and str(tmp_path / "run") in line


@pytest.mark.parametrize("env_id", script.TASKS)
def test_a_task_has_settings_of_its_own(env_id):
    """A flag that is given takes precedence, even if it is 0 or a --no- form."""
    recipe = {k: of[list(script.TASKS).index(env_id)] for k, of in script.DEFAULTS.items()}
    args = vars(script.parse_args(["--env-id", env_id]))
    assert {name: args[name] for name in recipe} == recipe
    flags = ["--noise", "0", "--no-standardize", "--hidden", "3"]
    args = vars(script.parse_args(["--env-id", env_id, *flags]))
    given = {"noise": 0.0, "standardize": False, "hidden": 3}
    assert {name: args[name] for name in recipe} == recipe | given


@pytest.mark.parametrize("flag", ["--standardize", "--no-standardize"])
def test_what_is_standardized(flag, tmp_path):
    """By the first iteration's states, which a checkpoint holds; the critics by actions too."""
    expert = str(falling_expert(tmp_path / "expert.zip"))
    argv = ["--expert", expert, "--iterations", "1", "--num-envs", "2", flag, "--no-progress"]
    argv += ["--policy-updates", "3", "--critic-updates", "3", "--validation-episodes", "2"]
    argv += ["--eval-episodes", "2", "--expert-episodes", "5", "--noise", "0.5"]
    assert script.main([*argv, "--out", str(tmp_path), "--run-name", "run"]) == 0
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    observations, actions = (saved["transitions"][name] for name in ("observations", "actions"))
    pairs = torch.cat([observations, actions], -1)
    if flag == "--no-standardize":
        observations, pairs = torch.zeros(2, 24), torch.zeros(2, 28)
    assert torch.equal(saved["policy"]["network.0.mean"], observations.mean(0))
    assert torch.equal(saved["critics"]["standardize.mean"], pairs.mean(0))
    assert torch.equal(saved["target"]["module.standardize.mean"], pairs.mean(0))
    assert saved["policy"]["network.0.deviation"].min() >= script.LEAST_DEVIATION


def test_a_walker_that_has_ended_rests():
    envs = script.make_envs("BipedalWalker-v3", 2)
    observations, _ = envs.reset(seed=3)
    envs.over[1] = True
    after, rewards, terminated, truncated, _ = envs.step(np.ones((2, 4), np.float32))
    assert (after[0] != observations[0]).any() and rewards[0] != 0
    assert (after[1] == observations[1]).all() and rewards[1] == 0
    assert not terminated.any() and not truncated.any()
    envs.close()


@pytest.mark.parametrize("shape", [(2, 3), (3, 4), (8,), (2,)])
def test_actions_of_another_shape(shape):
    envs = script.make_envs("BipedalWalker-v3", 2)
    envs.reset(seed=3)
    with pytest.raises(script.Failed, match="of 2 open walkers"):
        envs.step(np.zeros(shape, np.float32))
    envs.close()


def test_walkers_that_are_closed():
    envs = script.make_envs("BipedalWalker-v3", 2)
    envs.reset(seed=3)
    envs.close()
    with pytest.raises(script.Failed, match="of 0 open walkers"):
        envs.step(np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_actions_never_reach_box2d(value):
    envs = script.make_envs("BipedalWalker-v3", 2)
    envs.reset(seed=3)
    actions = np.zeros((2, 4), np.float32)
    actions[1, 2] = value
    with pytest.raises(script.Failed, match="action"):
        envs.step(actions)
    envs.close()


def roll(alpha, **changes):
    torch.manual_seed(4)
    args = settings(**{"expert": "good", "switch": 20, **changes})
    policy, expert = script.Policy(8, 0.1), script.make_expert(args)
    envs = script.make_envs(args.env_id, 3)
    return policy, expert, script.roll_in(envs, policy, expert, alpha, args)


@pytest.mark.parametrize("alpha, by", [(1.0, "expert"), (0.0, "learner")])
def test_roll_in(alpha, by):
    policy, expert, batch = roll(alpha, noise=0.0)
    tail, seen = batch["tail"], batch["observations"]
    assert tail.any() and not tail.all()
    assert torch.allclose(batch["expert_actions"], expert.greedy(seen), atol=1e-4)
    assert torch.equal(batch["actions"][tail], batch["expert_actions"][tail])
    chosen = expert.greedy(seen) if by == "expert" else policy.greedy(seen)
    assert torch.allclose(batch["actions"][~tail], chosen[~tail], atol=1e-4)
    going_on = ~batch["last"][:-1]
    assert int(batch["last"].sum()) == 3 and batch["last"][-1]
    assert torch.equal(batch["next_observations"][:-1][going_on], seen[1:][going_on])
    assert torch.equal(batch["fell"], batch["rewards"] <= -100)
    assert not batch["fell"][~batch["last"]].any()
    following = expert.greedy(batch["next_observations"])
    assert torch.allclose(batch["next_expert_actions"], following, atol=1e-4)


def test_falls_end_trajectories(tmp_path, long_walks, monkeypatch):
    fallen, close = [], script.Walkers.close

    def watched_close(walkers):
        fallen.extend(bool(env.unwrapped.game_over) for env in walkers.envs)
        close(walkers)

    monkeypatch.setattr(script.Walkers, "close", watched_close)
    expert = str(falling_expert(tmp_path / "expert.zip"))
    _, _, batch = roll(1.0, expert=expert)
    assert any(fallen) and batch["fell"][batch["last"]].tolist() == fallen
    assert batch["last"][batch["fell"]].all()


def test_roll_ins_are_perturbed_and_daggers_are_not():
    _, _, batch = roll(1.0, noise=0.3)
    perturbed = (batch["actions"] != batch["expert_actions"]).any(-1)
    assert torch.equal(perturbed, ~batch["tail"])
    _, _, batch = roll(1.0, noise=0.3, algorithm="dagger")
    assert not batch["tail"].any()
    assert torch.equal(batch["actions"], batch["expert_actions"])


def test_the_same_seed_rolls_the_same_trajectories():
    (_, _, one), (_, _, two) = roll(0.5), roll(0.5)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ctrl_c_within_box2d(monkeypatch):
    """Box2D asks Python for a vector's length, and takes what is raised there for a TypeError."""
    walkers = script.make_envs("BipedalWalker-v3", 1)
    walkers.reset(seed=0)
    handler = signal.getsignal(signal.SIGINT)

    def length(vector):
        signal.raise_signal(signal.SIGINT)
        return 2

    monkeypatch.setattr(Box2D.b2Vec2, "__len__", length)
    with pytest.raises(KeyboardInterrupt):
        walkers.step(np.zeros((1, 4), np.float32))
    assert signal.getsignal(signal.SIGINT) is handler


# --- experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experts(path):
    assert path.stat().st_size < 500_000
    env_id, name = path.stem.split("_")
    expert = script.make_expert(settings(env_id=env_id, expert=name))
    assert expert.act(np.zeros((7, 24), np.float32)).shape == (7, 4)
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) == {"policy.pth", "data"}
        about = json.loads(archive.read("data"))
    assert about["env_id"] == env_id and about["command"] and about["versions"]


@pytest.mark.parametrize("algorithm", [SAC, TD3])
def test_stable_baselines3s_policies(algorithm, tmp_path):
    kwargs = {"net_arch": [16, 12], "activation_fn": nn.ReLU}
    model = algorithm("MlpPolicy", gym.make("BipedalWalker-v3"), policy_kwargs=kwargs)
    model.save(tmp_path / "expert.zip")
    expert = script.make_expert(settings(expert=str(tmp_path / "expert.zip")))
    observations = np.random.default_rng(0).normal(size=(9, 24)).astype(np.float32)
    actions, _ = model.predict(observations, deterministic=True)
    assert np.allclose(expert.act(observations), actions, atol=1e-5)
    ours = expert.critics(*(torch.as_tensor(x) for x in (observations, actions)))
    theirs = model.critic(*(torch.as_tensor(x) for x in (observations, actions)))
    assert torch.allclose(ours, torch.cat(theirs, 1).T, atol=1e-5)


def other(algorithm, env_id, path, **kwargs):
    algorithm("MlpPolicy", gym.make(env_id), **kwargs).save(path)


def replaced(path, **files):
    with zipfile.ZipFile(SHIPPED[0]) as archive:
        content = {name: archive.read(name) for name in archive.namelist()} | files
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def changed_weights(change):
    with zipfile.ZipFile(SHIPPED[0]) as archive:
        weights = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
    change(weights)
    memory = io.BytesIO()
    torch.save(weights, memory)
    return memory.getvalue()


def put_nan(weights):
    weights["actor.mu.bias"][0] = torch.nan


def put_quantiles(weights):
    for critic in ("critic.qf0.4", "critic.qf1.4"):
        for name in (f"{critic}.weight", f"{critic}.bias"):
            weights[name] = weights[name].repeat_interleave(12, 0)


BAD = {
    "PPO": (lambda p: other(PPO, "BipedalWalker-v3", p), ""),
    "gSDE": (lambda p: other(SAC, "BipedalWalker-v3", p, use_sde=True), "gSDE"),
    "another environment": (lambda p: other(SAC, "Pendulum-v1", p), "shape"),
    "tanh": (
        lambda p: other(SAC, "BipedalWalker-v3", p, policy_kwargs={"activation_fn": nn.Tanh}),
        "Tanh",
    ),
    "leaky ReLU": (
        lambda p: other(SAC, "BipedalWalker-v3", p, policy_kwargs={"activation_fn": nn.LeakyReLU}),
        "LeakyReLU",
    ),
    "three layers in the critics, two in the actor": (
        lambda p: other(
            SAC,
            "BipedalWalker-v3",
            p,
            policy_kwargs={"net_arch": {"pi": [8, 8], "qf": [8, 8, 8]}},
        ),
        "critics",
    ),
    "three critics": (
        lambda p: other(SAC, "BipedalWalker-v3", p, policy_kwargs={"n_critics": 3}),
        "expected ['qf0', 'qf1']",
    ),
    "one critic": (lambda p: other(DDPG, "BipedalWalker-v3", p), "expected ['qf0', 'qf1']"),
    "another task": (lambda p: replaced(p, data=b'{"env_id": "Hopper-v5"}'), "Hopper-v5"),
    "NaN": (lambda p: replaced(p, **{"policy.pth": changed_weights(put_nan)}), "NaN"),
    "critics with quantiles": (
        lambda p: replaced(p, **{"policy.pth": changed_weights(put_quantiles)}),
        "critics with outputs",
    ),
    "no weights": (lambda p: replaced(p, **{"policy.pth": b""}), ""),
    "data that is a list": (lambda p: replaced(p, data=b"[]"), ""),
    "objects": (
        lambda p: replaced(p, **{"policy.pth": pickle.dumps(Payload(p.parent / "canary"), 2)}),
        "",
    ),
    "no zip": (lambda p: p.write_text("none"), ""),
    "missing": (lambda p: None, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_experts(name, tmp_path, capsys):
    make, word = BAD[name]
    path = tmp_path / "expert.zip"
    make(path)
    before = listing(tmp_path)
    argv = ["--expert", str(path), "--out", str(tmp_path / "runs"), "--run-name", "run"]
    assert script.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and word in line.replace(str(tmp_path), "") and len(line) < 500
    assert listing(tmp_path) == before


def test_objects_beside_the_weights_are_left_alone(tmp_path):
    """stable-baselines3's `load` unpickles what its settings hold in base64."""
    payload = base64.b64encode(pickle.dumps(Payload(tmp_path / "canary"))).decode()
    about = {"lr_schedule": {":type:": "<class 'function'>", ":serialized:": payload}}
    path = tmp_path / "expert.zip"
    replaced(path, data=json.dumps(about).encode())
    script.make_expert(settings(expert=str(path)))
    assert not (tmp_path / "canary").exists()


def test_an_expert_for_the_other_course(tmp_path, capsys):
    argv = ["--env-id", "BipedalWalkerHardcore-v3", "--out", str(tmp_path / "runs")]
    assert script.main([*argv, "--expert", str(SHIPPED[0])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "an expert for BipedalWalker-v3, expected BipedalWalkerHardcore-v3" in line
    assert not listing(tmp_path)


def test_an_iteration(tmp_path, monkeypatch, quick):
    """Alpha falls from 1 to 0 over --mixing; A* has weight 1 - alpha; all transitions are used."""
    seen = {name: [] for name in ("roll_in", "fitted_q_loss", "aggrevated_loss")}

    def spy(name, original, *args):
        result = original(*args)
        seen[name].append((args, result))
        return result

    for name in seen:
        monkeypatch.setattr(script, name, partial(spy, name, getattr(script, name)))
    CASE.run(tmp_path / "run", "--noise", 0.5, "--policy-updates", 20)
    assert [args[3] for args, _ in seen["roll_in"]] == [1, 0.5, 0, 0]
    losses = seen["aggrevated_loss"]
    assert [args[4] for args, _ in losses] == [x for x in (0, 0.5, 1, 1) for _ in range(20)]
    expert = seen["roll_in"][0][0][2]
    for (_, _, observations, expert_actions, *_), _ in losses:
        assert torch.allclose(expert_actions, expert.greedy(observations), atol=1e-4)
    assert len(seen["fitted_q_loss"]) == 4 * 3  # --critic-updates
    for (critics, target, *_), _ in seen["fitted_q_loss"]:
        assert not {id(x) for x in critics.parameters()} & {id(x) for x in target.parameters()}
    columns = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["transitions"]
    for name, column in columns.items():
        assert torch.equal(column, torch.cat([batch[name] for _, batch in seen["roll_in"]]))
    curve = json.loads((tmp_path / "run" / "summary.json").read_text())["curve"]
    assert [point["charts/alpha"] for point in curve] == [1, 0.5, 0, 0]


@pytest.mark.parametrize("refit", [True, False])
def test_whose_critics_judge(refit, tmp_path, monkeypatch, quick):
    """Without refitting, those in the expert's file, unchanged."""
    seen, loss = [], script.aggrevated_loss
    monkeypatch.setattr(
        script, "aggrevated_loss", lambda *args: seen.append(args[1]) or loss(*args)
    )
    CASE.run(tmp_path / "run", f"--{'' if refit else 'no-'}refit-critic", budget=2)
    theirs = script.make_expert(settings()).critics.state_dict()
    assert same(seen[-1].state_dict(), theirs) == (not refit)


@pytest.mark.parametrize(
    "validated, final, solved",
    [
        ((250, 310, 305, 280), 300, 1),
        ((250, 290, 280, 270), 300, 1),
        ((250, 310, 305, 280), 299, None),
    ],
)  # fmt: skip
def test_the_best_by_validation_is_kept(validated, final, solved, tmp_path, monkeypatch, quick):
    """Fresh episodes decide whether it is solved; the first good or best validation tells when."""
    evaluate, policies, left = script.Run.evaluate, [], iter([*validated, final])

    def scored(run, policy, *args):
        policies.append(copy.deepcopy(policy.state_dict()))
        return {**evaluate(run, policy, *args), "return_mean": float(next(left))}

    monkeypatch.setattr(script.Run, "evaluate", scored)
    kept = CASE.run(tmp_path / "run")
    assert same(kept, policies[1]) and same(policies[4], policies[1])
    assert not same(policies[3], policies[1])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    seconds = None if solved is None else summary["curve"][solved]["wall_seconds"]
    assert summary["solved_at_seconds"] == seconds


def test_paired_differences(tmp_path, quick):
    """Learner minus expert, seed by seed, and the standard error of the mean difference."""
    CASE.run(tmp_path / "run", budget=1)
    policy, seed = script.Policy(8, 0.1), script.EVALUATION_SEEDS + 1_000 + 500
    policy.load_state_dict(weights(tmp_path / "run"))
    expert = script.make_expert(settings())
    ours, theirs = (script.play(x.act, "BipedalWalker-v3", 4, seed) for x in (policy, expert))
    exact = [float(a["rewards"].sum() - b["rewards"].sum()) for a, b in zip(ours, theirs)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["paired_differences"] == pytest.approx(exact)
    error = f"{np.mean(exact):+.1f} +- {np.std(exact, ddof=1) / 2:.1f} (s.e.)"
    assert error in summary["verdict"]


def test_the_highest_seed_of_a_roll_in_is_below_evaluations(monkeypatch):
    seeds, randint, reset = [], torch.randint, script.Walkers.reset
    monkeypatch.setattr(
        torch, "randint", lambda high, *args: torch.full_like(randint(high, *args), high - 1)
    )
    monkeypatch.setattr(
        script.Walkers, "reset", lambda walkers, seed: seeds.append(seed) or reset(walkers, seed)
    )
    roll(1.0)
    assert seeds[0] + 3 <= script.EVALUATION_SEEDS


def test_each_trajectory_has_a_beginner_of_its_own():
    torch.manual_seed(0)
    args = settings(noise=0.0, switch=20)
    policy, expert = script.Policy(8, 0.1), script.make_expert(args)
    batch = script.roll_in(script.make_envs(args.env_id, 8), policy, expert, 0.5, args)
    firsts = torch.cat([torch.zeros(1, dtype=torch.long), batch["last"].nonzero()[:-1, 0] + 1])
    firsts = firsts[~batch["tail"][firsts]]
    by_expert = (batch["actions"][firsts] == batch["expert_actions"][firsts]).all(-1)
    assert by_expert.any() and not by_expert.all()
