"""Which estimate of AggreVaTeD's policy gradient is any good, compared with the real cost-to-go.

    python benchmark/bipedal_gradients.py > benchmark/results/bipedal_gradients.json

A learner, cloned from the expert, walks some steps and samples one action from its Gaussian; then
the expert takes over. So the outcome of that action is known, for up to 280 steps. From such
actions in fixed states each estimator computes a gradient. `own` is the cosine between its
gradients from two halves of the states: 1 without noise. The other columns are its cosine with the
score function on the real rewards of the next 10, 50 and 280 steps, from the other half of the
states; after these steps V* stands in, from other critics fitted to other trajectories. Noise in
either lowers them. Every seed has a learner, critics and actions of its own.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from bipedal_advantages import fit, one_step
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aggrevated_bipedal as script

LEARNER_STEPS, CYCLE = 20, 300  # after the learner's steps the expert walks the rest of a cycle
HORIZONS = (10, 50, CYCLE - LEARNER_STEPS)  # steps whose real rewards count
FRESH = 16  # learner's actions per state, where Q* is asked instead of the environment


@torch.no_grad()
def pushed_steps(policy, expert, judge, walkers, args):
    """One action of the learner per cycle, and what followed: a dict of (pushes, ...).

    `judge`: the critics whose V* stands in for the steps that are not walked."""
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
            discount, value_before = torch.ones(len(seen)), judge(seen, expert.greedy(seen)).mean(0)
        if phase >= LEARNER_STEPS:
            total, ever_fell = total + discount * rewards, ever_fell | fell
            discount = torch.where(running, discount * args.gamma, discount)
        over = phase >= LEARNER_STEPS and walkers.over.all()
        for horizon in HORIZONS:
            walked = phase == LEARNER_STEPS + horizon - 1
            if walked or (over and f"gain {horizon}" not in push):
                value = judge(following, expert.greedy(following)).mean(0)
                known = total + discount * ~ever_fell * value  # V* only if it has not fallen
                push[f"gain {horizon}"] = known - value_before
        if phase == CYCLE - 1 or over:
            pushes.append({k: v[pushed] for k, v in push.items()})
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

    terms = (critics, states, policy(states).rsample(), expert_actions, 0.0)
    losses = {
        f"real rewards, {h} steps": score(batch["samples"], batch[f"gain {h}"]) for h in HORIZONS
    }
    losses |= {
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
    """A line for each estimator, of means over random splits of the states into two halves."""
    truths, cosines, n = [f"real rewards, {h} steps" for h in HORIZONS], {}, len(batch["rewards"])
    for _ in range(splits):
        halves = torch.randperm(n)[: n // 2 * 2].view(2, -1)
        first, second = (
            gradients(policy, critics, {k: v[half] for k, v in batch.items()}, args)
            for half in halves
        )
        for name in first:
            for other in {name, *truths}:
                pairs = ((first[name], second[other]), (second[name], first[other]))
                found = [float(cosine_similarity(one, two, 0)) for one, two in pairs]
                cosines.setdefault((name, other), []).extend(found)
    means = {pair: float(np.mean(found)) for pair, found in cosines.items()}
    return {
        name: {"own": means[name, name]} | {truth: means[name, truth] for truth in truths}
        for name in first
    }


def measure(seed, chosen):
    """The lines of one seed: its own learner, critics and pushes; and how many pushes."""
    args = script.parse_args(["--expert", chosen.expert])
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    expert, policy = script.make_expert(args), script.Policy(args.hidden, args.std)
    fitted = []
    for _ in range(2):
        transitions, envs = script.Transitions(), script.make_envs(args.env_id, 60)
        transitions.add(script.roll_in(envs, policy, expert, 1.0, args))
        ((_, critics, _),) = fit(transitions, args, [8_000])
        fitted.append(critics.requires_grad_(False))
    critics, judge = fitted
    args.algorithm = "dagger"
    optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr)
    script.improve(policy, critics, optimizer, transitions, 1.0, args)
    batches = []
    while len(batches) * 50 < chosen.trajectories:
        walkers = script.make_envs(args.env_id, min(50, chosen.trajectories))
        batches.append(pushed_steps(policy, expert, judge, walkers, args))
        walkers.close()
        print(f"seed {seed}: {len(batches) * 50} trajectories", file=sys.stderr, flush=True)
    batch = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    return compare(policy, critics, batch, args, chosen.splits), len(batch["rewards"])


def summary(values):
    """Mean over the seeds, with the least and the greatest."""
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expert", default="weak")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--trajectories", type=int, default=1_200, help="for each seed")
    parser.add_argument("--splits", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    chosen = parser.parse_args()
    with ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as pool:
        seeds = list(pool.map(partial(measure, chosen=chosen), range(chosen.seeds)))
    table = [
        {"estimator": name, **{k: summary([rows[name][k] for rows, _ in seeds]) for k in row}}
        for name, row in seeds[0][0].items()
    ]
    about = {"command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}
    about |= {"expert": chosen.expert, "pushes": [pushes for _, pushes in seeds]}
    print(json.dumps({**about, "table": table, "seeds": [rows for rows, _ in seeds]}, indent=1))


if __name__ == "__main__":
    main()
