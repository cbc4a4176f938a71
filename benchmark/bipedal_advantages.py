"""How good A* = Q* - V* is, measured on real transitions that its critics have not seen.

    python benchmark/bipedal_advantages.py > benchmark/results/bipedal_advantages.json

Critics are fitted to one half of a set of perturbed expert roll-ins. On the perturbed steps of the
other half, r + gamma V*(s') - V*(s) is an unbiased estimate of A* if V* is right (here from critics
fitted to that other half). A critic's own A* should correlate with it, and the slope of the
estimate against a critic's A* should be 1: at 0.2 that critic promises five times what is there.
`value_correlation` is that of Q* with the discounted cost-to-go, on the expert's steps.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aggrevated_bipedal as script


def fit(transitions, args, updates, pace=0.05):
    """Critics after each of these numbers of updates: yields (updates, critics, seconds).

    `pace` is the share of the way that the target moves per update; the script's is 0.05."""
    sizes = (28, args.critic_hidden, args.critic_hidden, 1)
    critics = script.Critics(script.relu_mlp(*sizes) for _ in range(args.critics))
    target = AveragedModel(critics, multi_avg_fn=get_ema_multi_avg_fn(1 - pace))
    optimizer = torch.optim.Adam(critics.parameters(), args.critic_lr, fused=True)
    began, done = time.perf_counter(), 0
    for until in updates:
        args.critic_updates, done = until - done, until
        script.refit(critics, target, optimizer, transitions, args)
        yield until, target.module, time.perf_counter() - began


@torch.no_grad()
def one_step(critics, batch, gamma):
    """r + gamma V*(s') - V*(s) of each transition: (steps,)."""
    value = critics(batch["observations"], batch["expert_actions"]).mean(0)
    following = critics(batch["next_observations"], batch["next_expert_actions"]).mean(0)
    return batch["rewards"] + gamma * ~batch["fell"] * following - value


def level(critics, batch, args):
    """Mean of Q* divided by the mean cost-to-go, on the expert's steps where that is above 0."""
    known, returns = script.cost_to_go(batch, args.gamma)
    known &= returns > 0
    values = critics(batch["observations"], batch["actions"]).mean(0)
    return float(values[known].mean() / returns[known].mean())


@torch.no_grad()
def compare(critics, batch, held_out, estimate, args):
    pushed = ~held_out["tail"]
    columns = (held_out[name][pushed] for name in ("observations", "actions", "expert_actions"))
    promised = script.cautious_advantages(critics, *columns, 0.0)
    promised = promised - promised.mean()
    return {
        "promised_deviation": round(float(promised.std()), 4),
        "correlation": round(script.correlation(promised, estimate), 4),
        "slope": round(float((promised * estimate).mean() / promised.square().mean()), 3),
        "level": round(level(critics, held_out, args), 2),
        "value_correlation": round(script.agreement(critics, held_out, args), 3),
        "value_correlation_seen": round(script.agreement(critics, batch, args), 3),
    }


def tabulate(row):
    """A row of the table in docs/aggrevated_bipedal.md."""
    return {
        "critics": row["critics"],
        "their target follows by": f"{row['pace']:.0%}" if "pace" in row else "",
        "updates": f"{row['updates']:,}" if "updates" in row else "",
        "correlation with the estimate": f"{row['correlation']:.2f}",
        "slope": f"{row['slope']:.2f}",
        "correlation of Q* with the cost-to-go": f"{row['value_correlation']:.2f}",
        "level of Q* by that of the cost-to-go": f"{row['level']:.2f}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expert", default="weak")
    parser.add_argument("--trajectories", type=int, default=60, help="of each half")
    parser.add_argument("--updates", type=int, nargs="+", default=[1_000, 2_000, 4_000, 8_000])
    chosen = parser.parse_args()
    args = script.parse_args(["--expert", chosen.expert])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    expert, policy = script.make_expert(args), script.Policy(args.hidden, args.std)
    halves = []
    for _ in range(2):
        envs = script.make_envs(args.env_id, chosen.trajectories)
        halves.append(script.roll_in(envs, policy, expert, 1.0, args))
    batch, held_out = halves
    stores = [script.Transitions() for _ in halves]
    for store, half in zip(stores, halves):
        store.add(half)
    ((_, judge, _),) = fit(stores[1], args, [8_000])
    estimate = one_step(judge, held_out, args.gamma)[~held_out["tail"]]
    estimate = estimate.clamp(-5, 5) - estimate.clamp(-5, 5).mean()
    rows = [{"critics": "the file's", **compare(expert.critics, batch, held_out, estimate, args)}]
    for pace in (0.01, 0.05):
        for updates, critics, seconds in fit(stores[0], args, chosen.updates, pace):
            row = {"critics": "refitted", "pace": pace, "updates": updates}
            row["seconds"] = round(seconds, 1)
            rows.append({**row, **compare(critics, batch, held_out, estimate, args)})
    about = {"command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}
    about |= {"expert": chosen.expert, "transitions": len(batch["rewards"])}
    about |= {
        "held_out_pushed": len(estimate),
        "estimate_deviation": round(float(estimate.std()), 4),
    }
    table = [tabulate(row) for row in rows]
    print(json.dumps({**about, "table": table, "estimators": rows}, indent=1))


if __name__ == "__main__":
    main()
