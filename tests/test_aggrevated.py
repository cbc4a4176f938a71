"""AggreVaTeD's mathematics against its definitions, its roll-ins, its selection, its experts."""

import numpy as np
import pytest
import torch
from scripts import AGGREVATED, ROOT, expert
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from written import checkpoint, read_json, weights

script = AGGREVATED.module
SHIPPED = sorted((ROOT / "experts").glob("*_*.pt"))
pytestmark = pytest.mark.usefixtures("seeded")


def new_policy(activation="relu"):
    return script.Policy([3, 8, 8, 2], activation, [-1.0, 0.0], [1.0, 2.0])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_greedy_and_sampled_actions(activation):
    """The tanh of the network's output, and of a Gaussian around it."""
    policy, seen = new_policy(activation), torch.randn(5, 3)
    policy.measure(torch.randn(20, 3) * 3 + 1)
    mean = policy.network((seen - policy.mean) / policy.deviation)
    greedy = mean.tanh().detach() + torch.tensor([0.0, 1.0])  # in the box
    assert np.allclose(policy.act(seen.numpy()), greedy, atol=1e-5)
    draws = policy.sample(seen.expand(4_000, 5, 3)).atanh() - mean
    assert torch.allclose(draws.mean(0), torch.zeros(5, 2), atol=0.01)
    assert torch.allclose(draws.std(0), torch.full((5, 2), script.STD), rtol=0.1)
    assert isinstance(policy.network[1], {"relu": nn.ReLU, "tanh": nn.Tanh}[activation])


def known_critics(observations, actions):
    """Q*(s, a) = s_0 * sum of a_i - 2 * sum of a_i^2, twice."""
    value = observations[:, 0] * actions.sum(-1) - 2 * actions.square().sum(-1)
    return torch.stack([value, value])


def terms(caution, anchor):
    return script.parse_args(["--caution", str(caution), "--anchor", str(anchor)])


def test_gradient_of_the_expected_cost_to_go():
    """Against that of the expectation, by Gauss-Hermite quadrature."""
    policy, state = new_policy(), torch.randn(1, 3)
    points, mass = (torch.tensor(x)[:, None] for x in np.polynomial.hermite_e.hermegauss(40))
    bias = policy.network[-1].bias
    actions = (policy.network(state) + script.STD * points).tanh()  # (40, 2)
    values = state[0, 0] * actions - 2 * actions.square()
    (exact,) = torch.autograd.grad((mass / np.sqrt(2 * np.pi) * values).sum(), bias)
    states, zeros = state.expand(50_000, -1), torch.zeros(50_000, 2)
    loss = script.aggrevated_loss(policy, known_critics, states, zeros, 1.0, terms(0.0, 0.0))
    (found,) = torch.autograd.grad(-loss, bias)
    assert torch.allclose(found, exact, rtol=0, atol=0.02)


def test_without_a_weight_it_is_daggers_loss():
    policy, states, actions = new_policy(), torch.randn(6, 3), torch.rand(6, 2)
    dagger = script.aggrevated_loss(policy, None, states, actions, 0.0, terms(1.0, 3.0))
    greedy = torch.as_tensor(policy.act(states.numpy())) - torch.tensor([0.0, 1.0])
    squared = sum((a - b) ** 2 for a, b in zip(actions.flatten(), greedy.flatten()))
    assert dagger.item() == pytest.approx(3 * float(squared) / 6, rel=1e-4)


def test_caution_takes_off_the_spread():
    """Also at the expert's own action, where the spread is 0 and its root has no slope."""

    def doubtful(observations, actions):
        return torch.stack([actions.sum(-1), 3 * actions.sum(-1)])

    policy, states, none = new_policy(), torch.zeros(2, 3), torch.zeros(2, 2)
    policy.sample = lambda states: torch.full((2, 2), 0.5)
    found = script.aggrevated_loss(policy, doubtful, states, none, 1.0, terms(0.5, 0.0))
    assert found.item() == pytest.approx(0.5 * 2**0.5 - 2, rel=1e-5)
    own = none.clone().requires_grad_()
    policy.sample = lambda states: own
    script.aggrevated_loss(policy, doubtful, states, none, 1.0, terms(1.0, 0.0)).backward()
    assert own.grad.isfinite().all()


def test_refitted_critics_are_the_experts():
    """On three states and two actions, whoever acted: against the solution of its equations."""
    following, gains = torch.randint(3, (6,)), torch.rand(6)  # of state * 2 + action
    fell, chosen, gamma = torch.arange(6) == 3, torch.tensor([0, 0, 1]), 0.8
    matrix = torch.eye(6)
    for pair in torch.arange(6)[~fell]:
        matrix[pair, 2 * following[pair] + chosen[following[pair]]] -= gamma
    exact = torch.linalg.solve(matrix, gains)
    states, actions = torch.eye(3).repeat_interleave(2, 0), torch.eye(2).repeat(3, 1)
    batch = {"observations": states, "actions": actions, "rewards": gains, "fell": fell}
    batch |= {"next_observations": torch.eye(3)[following]}
    batch |= {"next_expert_actions": torch.eye(2)[chosen[following]]}
    batch["next_observations"][fell] = torch.nan  # what follows a fall counts for nothing
    critics = script.Critics([5, 32, 1])
    target = AveragedModel(critics, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.Adam(critics.parameters(), 1e-2)
    for _ in range(500):
        script.descend(optimizer, script.fitted_q_loss(critics, target, batch, gamma))
        target.update_parameters(critics)
    assert torch.allclose(critics(states, actions), exact.expand(2, -1), atol=0.03)


def roll(alpha, *flags):
    args = script.parse_args(AGGREVATED.argv("--num-envs", 6, "--switch", 8, *flags))
    teacher, _ = script.load_policy(expert("ToyBox-v0"))
    return teacher, script.roll_in(new_policy(), teacher, alpha, args)


def test_roll_ins_hold_transitions_one_trajectory_after_the_other(monkeypatch):
    """A fall is a bool, whatever is_fall returns."""
    is_fall = script.is_fall
    monkeypatch.setattr(script, "is_fall", lambda *step: int(is_fall(*step)))
    teacher, batch = roll(0.5, "--noise", 0.5)
    seen, then = batch["observations"], batch["next_observations"]
    ends = (seen[1:] != then[:-1]).any(-1)
    assert int(ends.sum()) == 5 and seen.dtype == batch["rewards"].dtype == torch.float32
    for name, states in (("expert_actions", seen), ("next_expert_actions", then)):
        assert torch.allclose(batch[name], teacher.greedy(states), atol=1e-5)
    assert batch["fell"].dtype == torch.bool and torch.equal(batch["fell"], then[:, 0].abs() > 1)
    assert batch["actions"].abs().max() <= 1


def test_who_begins_and_who_ends_a_trajectory():
    """The expert ends all of AggreVaTeD's; DAgger's learner is left alone, and nothing is noisy."""
    _, batch = roll(0.0, "--noise", 0)
    by_expert = (batch["actions"] == batch["expert_actions"]).all(-1)
    assert by_expert.any() and not by_expert.all()
    assert not (by_expert[:-1] & ~by_expert[1:]).sum() > 5  # once the expert has it, it keeps it
    _, batch = roll(1.0, "--noise", 0)
    assert torch.equal(batch["actions"], batch["expert_actions"])
    _, batch = roll(1.0, "--noise", 0.5)
    assert not torch.equal(batch["actions"], batch["expert_actions"])
    _, batch = roll(1.0, "--noise", 0.5, "--algorithm", "dagger")
    assert torch.equal(batch["actions"], batch["expert_actions"])
    _, batch = roll(0.0, "--algorithm", "dagger")
    assert not (batch["actions"] == batch["expert_actions"]).all(-1).any()


def test_actions_that_are_not_finite_never_reach_box2d():
    """There they would end the process."""
    with pytest.raises(script.Failed, match="NaN"):
        new_policy().to_env(torch.tensor([0, np.nan]))


def test_a_run_counts_alpha_down_and_keeps_every_transition():
    """The first of them, the expert's, standardise what the policy and the critics see."""
    summary = read_json(AGGREVATED.finished / "summary.json")
    parts, kept = checkpoint(AGGREVATED.finished)["parts"], weights(AGGREVATED.finished)
    assert [point["charts/alpha"] for point in summary["curve"]] == [1, 0.8, 0.6]
    assert len(parts["transitions"]["rewards"]) == summary["env_steps"]
    assert kept["deviation"].min() >= script.LEAST_DEVIATION and (kept["mean"] != 0).any()
    assert torch.allclose(parts["critics"]["networks.0.mean"][:3], kept["mean"], atol=1e-5)


def test_validation_and_final_evaluation_never_share_a_seed():
    """The final seeds begin 5,000 after the first of validation, which has ten times as many."""
    with pytest.raises(script.BadInput):
        script.parse_args(["--eval-episodes", "501"])


def test_the_difference_to_the_expert_is_paired_by_seeds():
    summary = read_json(AGGREVATED.finished / "summary.json")
    gains = np.array(summary["paired_differences"])
    exact = summary["learner"]["return_mean"] - summary["expert"]["return_mean"]
    assert len(gains) == 10 and gains.mean() == pytest.approx(exact)
    assert f"{gains.mean():+.1f} +- {gains.std(ddof=1) / 10**0.5:.1f} (s.e.)" in summary["verdict"]


def test_the_learner_of_one_run_is_the_expert_of_the_next(tmp_path):
    """It is evaluated on the same episodes as it was there. The task is one of a module."""
    task = ["--env-id", "toys:ToyBox-v0"]
    AGGREVATED.run(tmp_path / "one", *task)
    AGGREVATED.run(tmp_path / "next", *task, "--expert", tmp_path / "one" / "policy.pt")
    learner, expert = (read_json(tmp_path / x / "summary.json") for x in ("one", "next"))
    assert learner["learner"]["return_mean"] == expert["expert"]["return_mean"]


def test_what_a_sound_expert_and_task_may_be(tmp_path):
    """Bounds may be whole numbers; a first roll-in may have one transition; returns may be NaN: so
    DAgger, which reads no rewards, keeps its newest policy."""
    saved = torch.load(expert("PayingNaN-v0"), weights_only=True)
    saved["settings"] |= {"low": [-1, 0], "high": [1, 2]}
    torch.save(saved, tmp_path / "whole.pt")
    task = "--env-id", "PayingNaN-v0", "--expert", tmp_path / "whole.pt", "--algorithm", "dagger"
    AGGREVATED.run(tmp_path / "run", *task)
    newest, kept = checkpoint(tmp_path / "run")["parts"]["policy"], weights(tmp_path / "run")
    assert read_json(tmp_path / "run" / "summary.json")["verdict"].startswith("no verdict")
    assert all(torch.equal(newest[name], kept[name]) for name in kept)
    policy = new_policy()
    policy.measure(torch.zeros(1, 3))
    assert (policy.deviation == script.LEAST_DEVIATION).all()
    policy.measure(torch.full((99, 3), 1.7e9))  # a time in seconds, whose mean is rounded
    assert policy(torch.full((3,), 1.7e9)).isfinite().all() and (policy.deviation > 1e3).all()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experts(path):
    policy, env_id = script.load_policy(path)
    assert env_id == path.stem.split("_")[0] and path.stat().st_size < 500_000
    sizes = policy.settings["sizes"]
    assert policy.act(np.zeros((7, sizes[0]))).shape == (7, sizes[-1])
    assert torch.load(path, weights_only=True)["source"]
