"""Which estimate of AggreVaTeD's policy gradient is any good: held against real cost-to-go.

    python benchmark/bipedal_gradients.py > benchmark/results/bipedal_gradients.json

A learner, cloned from the expert, walks some steps, acts once as its Gaussian says, and the expert
goes on: the cost-to-go of that action is then known, but for its last twentieth, where V* stands
in. From such actions on fixed states each estimator has its gradient. `own` is the cosine of an
estimator's gradients from two halves of the states: 1 without noise. `Monte Carlo` is the cosine
with the gradient of the real cost-to-go on the other half; `corrected` divides it by the root of
both `own`, which is what noise alone leaves of it: below 1 for an estimator that is biased, and
unknown where the real cost-to-go's own halves do not agree.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from bipedal_advantages import fit, one_step
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aggrevated_bipedal as script

LEARNER_STEPS, CYCLE = 20, 300  # after the learner's steps the expert walks the rest of a cycle
FRESH = 16  # actions of the learner a state, where Q* is asked and not the world


@torch.no_grad()
def pushed_steps(policy, expert, critics, walkers, args):
    """One action of the learner a cycle, and what followed: a dict of (pushes, ...)."""
    observations, _ = walkers.reset(seed=int(torch.randint(500_000, ())))
    pushes, step = [], 0
    while not walkers.over.all():
        phase, seen = step % CYCLE, torch.as_tensor(observations)
        actions = expert.greedy(seen) if phase > LEARNER_STEPS else policy.greedy(seen)
        if phase == LEARNER_STEPS:
            samples = policy(seen).base_dist.sample()
            actions = samples.tanh()
        running = torch.as_tensor(~walkers.over)
        observations, rewards, *_ = walkers.step(actions.numpy())
        following, rewards = torch.as_tensor(observations), torch.as_tensor(rewards).float()
        fell = rewards <= script.FALL
        step += 1
        if phase == LEARNER_STEPS:
            push = {"observations": seen, "samples": samples, "actions": actions}
            push |= {"expert_actions": expert.greedy(seen), "rewards": rewards, "fell": fell}
            push |= {"next_observations": following}
            push |= {"next_expert_actions": expert.greedy(following)}
            pushed, total, ever_fell = running, torch.zeros(len(seen)), torch.zeros_like(fell)
            discount = torch.ones(len(seen))
        if phase >= LEARNER_STEPS:
            total, ever_fell = total + discount * rewards, ever_fell | fell
            discount = torch.where(running, discount * args.gamma, discount)
        if phase == CYCLE - 1 or (phase >= LEARNER_STEPS and walkers.over.all()):
            value = critics(following, expert.greedy(following)).mean(0)
            total = total + discount * ~ever_fell * value  # of who has not fallen
            pushes.append({k: v[pushed] for k, v in {**push, "cost_to_go": total}.items()})
    return {name: torch.cat([push[name] for push in pushes]) for name in pushes[0]}


def gradients(policy, critics, batch, args):
    """The estimators: name -> minus the policy gradient, (parameters,)."""
    states, expert_actions = batch["observations"], batch["expert_actions"]

    def score(samples, advantages):
        """Samples before tanh, whose Jacobian does not depend on the policy: (..., batch, 4)."""
        centred = advantages - advantages.mean()
        return -(policy(states).base_dist.log_prob(samples).sum(-1) * centred).mean()

    def fresh_actions():
        samples = policy(states).base_dist.sample((FRESH,))
        columns = (states, samples.tanh(), expert_actions)
        flat = (column.expand(FRESH, -1, -1).flatten(0, 1) for column in columns)
        advantages = script.cautious_advantages(critics, *flat, 0.0).view(FRESH, -1)
        return score(samples, advantages - advantages.mean(0))

    value = critics(states, expert_actions).mean(0)
    terms = (critics, states, policy(states).rsample(), expert_actions, 0.0)
    losses = {
        "score function, cost-to-go - V*(s)": score(batch["samples"], batch["cost_to_go"] - value),
        "score function, r + gamma V*(s') - V*(s)": score(
            batch["samples"], one_step(critics, batch, args.gamma)
        ),
        f"score function, Q* of {FRESH} fresh actions": fresh_actions(),
        "reparameterised through Q*": -script.cautious_advantages(*terms).mean(),
        "DAgger: distance to the expert's action": script.dagger_loss(
            policy, states, expert_actions
        ),
    }
    parameters = list(policy.parameters())
    return {
        name: torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        for name, loss in losses.items()
    }


def compare(policy, critics, batch, args, splits):
    """A line for each estimator, means over random splits of the states into two halves."""
    rows, n = {}, len(batch["rewards"])
    for _ in range(splits):
        halves = torch.randperm(n)[: n // 2 * 2].view(2, -1)
        first, second = (
            gradients(policy, critics, {k: v[half] for k, v in batch.items()}, args)
            for half in halves
        )
        truth = next(iter(first))
        for name in first:
            row = rows.setdefault(name, {"own": [], "Monte Carlo": []})
            row["own"].append(float(cosine_similarity(first[name], second[name], 0)))
            for one, other in ((first, second), (second, first)):
                row["Monte Carlo"].append(float(cosine_similarity(one[name], other[truth], 0)))
    means = {name: {k: float(np.mean(v)) for k, v in row.items()} for name, row in rows.items()}
    noise = means[truth]["own"]
    for row in means.values():
        known = min(row["own"], noise) > 0
        row["corrected"] = row["Monte Carlo"] / (row["own"] * noise) ** 0.5 if known else None
    return means


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expert", default="weak")
    parser.add_argument("--trajectories", type=int, default=1_000)
    parser.add_argument("--splits", type=int, default=50)
    chosen = parser.parse_args()
    args = script.parse_args(["--expert", chosen.expert])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    expert, policy = script.make_expert(args), script.Policy(args.hidden, args.std)
    transitions = script.Transitions()
    envs = script.make_envs(args.env_id, 60)
    transitions.add(script.roll_in(envs, policy, expert, 1.0, args))
    ((_, critics, _),) = fit(transitions, args, [8_000])
    critics.requires_grad_(False)
    args.algorithm = "dagger"
    optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr)
    script.improve(policy, critics, optimizer, transitions, 1.0, args)
    batches = []
    while len(batches) * 50 < chosen.trajectories:
        walkers = script.make_envs(args.env_id, min(50, chosen.trajectories))
        batches.append(pushed_steps(policy, expert, critics, walkers, args))
        walkers.close()
        print(f"{len(batches) * 50} trajectories", file=sys.stderr, flush=True)
    batch = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    rows = compare(policy, critics, batch, args, chosen.splits)
    about = {"command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}
    about |= {"expert": chosen.expert, "pushes": len(batch["rewards"])}
    table = [
        {"estimator": k, **{n: "unknown" if x is None else f"{x:.2f}" for n, x in v.items()}}
        for k, v in rows.items()
    ]
    print(json.dumps({**about, "table": table, "estimators": rows}, indent=1))


if __name__ == "__main__":
    main()
