"""Plant faults in a copy of the project, one at a time, and see whether the tests find each.

    python benchmark/plant_faults.py                    all: some forty minutes on two cores
    python benchmark/plant_faults.py --only mask seed   those whose name holds one of these words

A fault goes into every script that has its text, so that the scripts still agree with one another.
It is found if the suite fails. Exit status 1 if one is not.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT = shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv*", ".*_cache")
FAULTS = {  # name: the text, and what takes its place
    "sign: the expert's label": (
        "F.softplus(-expert_logits).mean() + F.softplus(policy_logits)",
        "F.softplus(expert_logits).mean() + F.softplus(policy_logits)",
    ),
    "sign: REINFORCE descends": (
        "return -(log_probs * advantages).mean()",
        "return (log_probs * advantages).mean()",
    ),
    "detach: the reward's gradient reaches the policy": (
        "log_probs * centred.detach()",
        "log_probs * centred",
    ),
    "mask: the penalty on absorbing pairs": (
        "    return ((gradient.norm(dim=-1) - 1).square() * mask).mean()",
        "    return (gradient.norm(dim=-1) - 1).square().mean()",
    ),
    "seed: evaluation on training's seeds": (
        "first = EVALUATION_SEEDS + 10_000 * args.seed +",
        "first = 10_000 * args.seed +",
    ),
    "seed: the run's is not set": ("        torch.manual_seed(args.seed)\n", ""),
    "a truncation taken for an end": (
        "torch.where(terminated, end_values",
        "torch.where(terminated | truncated, end_values",
    ),
    "advantages run on over an end": (
        "gae_lambda * ~done[step] * advantage",
        "gae_lambda * advantage",
    ),
    "a checkpoint that lacks a part": (
        '{"policy": policy, "average": average, "critic": critic, "envs": envs}',
        '{"policy": policy, "critic": critic, "envs": envs}',
    ),
    "a checkpoint without the generator's state": ('torch.set_rng_state(state["rng"])', "pass"),
    "a stopped run is not saved": ("if due or Run.stopped_by or ", "if due or "),
    "a file written in place": (
        "whole = Path(folder, path.name)",
        "whole = path",
    ),
    "an end among few pairs counts in full": (
        "terminated *= args.num_pairs * len(chosen) / sum(map(len, chosen))",
        "pass",
    ),
    "cloning keeps the last weights": (
        "move_average(average, policy, 1 / min(run.steps, AVERAGED))",
        "move_average(average, policy, 1.0)",
    ),
    "pickles in demonstrations": ("allow_pickle=False", "allow_pickle=True"),
    "pickles in checkpoints": ("weights_only=True", "weights_only=False"),
    "a reward is read": (
        "        self.actions[i].append(action)\n",
        "        self.observations[i] += 0 * reward\n        self.actions[i].append(action)\n",
    ),
    "held-out episodes are learnt from": ("rng.permutation(cut)", "rng.permutation(len(episodes))"),
    "other demonstrations on resuming": ('state["demos"] == self.demos', "True"),
    "no limit to a policy's change": ("and kl <= target_kl", ""),
    "all episodes begin at once": ("== self.cuts[i]", "== -1"),
    "one pair for each end": ("max(1, round(float(terminated.max()) / (1 - gamma)))", "1"),
    "the average's weights": ("(power + 1) / (", "power / ("),
    "the last policy is evaluated": (
        "run.record(scalars, average)",
        "run.record(scalars, policy)",
    ),
    "cloning keeps the last policy": (
        "run.record(scalars, best[0])",
        "run.record(scalars, policy)",
    ),
    "cloning's loss is left out": (
        "total + bc_weight * behavioural_cloning_loss",
        "total + bc_weight * 0 * behavioural_cloning_loss",
    ),
    "Discrete actions begin at 0": ("return (actions + self.low)", "return actions"),
    "constant observations": (
        "deviation.where(deviation > 1e-6 * self.mean.abs(), 1.0)",
        "deviation",
    ),
    "one absorbing state for the race car": (
        "torch.where(finished, 1.0, -1.0)",
        "finished.float()",
    ),
    "Q* of the learner": (
        'target(batch["next_observations"], batch["next_expert_actions"])',
        'target(batch["next_observations"], batch["actions"])',
    ),
    "NaN in the summary": (", parse_constant=lambda name: None", ""),
    "exit status of bad input": (
        "return 2 if isinstance(error, BadInput)",
        "return 1 if isinstance(error, BadInput)",
    ),
}


def plant(folder, old, new):
    """Put the fault into every script below `folder` that has the text; returns how many."""
    paths = [path for path in folder.glob("*.py") if old in path.read_text()]
    for path in paths:
        path.write_text(path.read_text().replace(old, new))
    return len(paths)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="words of the faults' names")
    parser.add_argument("tests", nargs="*", help="what to run (default: the whole suite)")
    args = parser.parse_args()
    missed = []
    for name, (old, new) in FAULTS.items():
        if not any(word in name for word in args.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "project")
            shutil.copytree(ROOT, copy, ignore=LEFT)
            scripts = plant(copy, old, new)
            if not scripts:
                raise SystemExit(f"{name}: its text is in no script any more")
            command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *args.tests]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        if not found:
            missed.append(name)
        print(f"{name} ({scripts} scripts): {(found or ['NOT FOUND'])[0]}", flush=True)
    print(f"{len(missed)} not found: {'; '.join(missed)}" if missed else "all are found")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
