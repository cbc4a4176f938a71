"""How well a walker's clone does on trajectories that it has not seen, by how many it has seen.

    python benchmark/bipedal_unseen.py RUN_FOLDER > benchmark/results/bipedal_unseen.json

Of the trajectories that a finished run learnt from, a tenth is held out. New policies are fitted to
the expert's actions on an eighth, a quarter, a half and all of the others, each with the same
number of updates: chance apart, they differ only in what they have seen.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aggrevated_bipedal as script

SHARES = (1 / 8, 1 / 4, 1 / 2, 1)


def trajectory_of(last):
    """The number of the trajectory that each step belongs to: (steps,) bool -> (steps,) int."""
    return last.cumsum(0) - last.long()


@torch.no_grad()
def squared_distances(policy, observations, expert_actions):
    pairs = zip(observations.split(20_000), expert_actions.split(20_000))
    return torch.cat([(policy.greedy(x) - y).square().sum(-1) for x, y in pairs])


def clone(observations, expert_actions, args):
    """A policy with the run's settings, its step size falling to 0 once."""
    policy = script.Policy(args.hidden, args.std)
    if args.standardize:
        policy.network[0].measure(observations)
    optimizer = torch.optim.Adam(policy.parameters(), args.policy_lr, fused=True)
    for update in range(args.policy_updates):
        optimizer.param_groups[0]["lr"] = args.policy_lr * (1 - update / args.policy_updates)
        rows = torch.randint(len(observations), (args.batch_size,))
        loss = script.dagger_loss(policy, observations[rows], expert_actions[rows])
        script.descend(optimizer, loss)
    return policy


def tabulate(rows):
    """A row of the table in docs/aggrevated_bipedal.md, over splits of the same size."""

    def column(name, form):
        values = [row[name] for row in rows]
        return f"{np.mean(values):{form}} ± {np.std(values):{form}}"

    return {
        "trajectories learnt from": f"{rows[0]['trajectories']:,}",
        "squared distance on them": column("learnt", ".3f"),
        "on unseen ones": column("unseen", ".3f"),
        "unseen steps beyond 1": column("unseen_beyond_1", ".1%"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run's folder, with its checkpoint")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--updates", type=int, default=12_000, help="of each policy")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = script.read_checkpoint(Path(chosen.run, "checkpoint.pt"))
    args = argparse.Namespace(**checkpoint["args"])
    args.policy_updates = chosen.updates
    columns = checkpoint["transitions"]
    pairs = (columns["observations"], columns["expert_actions"])
    trajectory = trajectory_of(columns["last"])
    rows = []
    for split in range(chosen.splits):
        torch.manual_seed(split)
        order = torch.randperm(int(trajectory[-1]) + 1)
        unseen, rest = order.split([len(order) // 10, len(order) - len(order) // 10])
        for share in SHARES:
            learnt = rest[: int(share * len(rest))]
            seen = [x[torch.isin(trajectory, learnt)] for x in pairs]
            policy = clone(*seen, args)
            held_out = (x[torch.isin(trajectory, unseen)] for x in pairs)
            of_unseen = squared_distances(policy, *held_out)
            rows.append(
                {
                    "split": split,
                    "trajectories": len(learnt),
                    "steps": len(seen[0]),
                    "learnt": round(float(squared_distances(policy, *seen).mean()), 4),
                    "unseen": round(float(of_unseen.mean()), 4),
                    "unseen_beyond_1": round(float((of_unseen > 1).float().mean()), 5),
                }
            )
            print(rows[-1], file=sys.stderr)
    about = {"command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}
    about |= {"updates": chosen.updates, "splits": chosen.splits}
    about["variance"] = round(float(pairs[1].var(0).sum()), 3)
    table = [tabulate(rows[i :: len(SHARES)]) for i in range(len(SHARES))]
    print(json.dumps({**about, "table": table, "fits": rows}, indent=1))


if __name__ == "__main__":
    main()
