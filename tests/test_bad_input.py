"""Whatever is wrong with a file, a value or a task: status 2, one line, and nothing is written."""

import io
import json
import os
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from scripts import AGGREVATED, BC, OFFLINE, PPO, REINFORCE, ROOT, SCRIPTS, demos, expert
from toys import REFUSED
from written import Payload, same, weights

DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "pickled": lambda path: path.write_bytes(pickle.dumps(Payload(path.parent), 2)),
    "object": lambda path: torch.save(Payload(path.parent), path),
    "zip": lambda path: zipfile.ZipFile(path, "w").close(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("case", [BC, PPO, OFFLINE, AGGREVATED], ids=str)
def test_damaged_files(case, damage, tmp_path, refused):
    """What a run learns from, a checkpoint, a policy."""
    source = expert(case.env_id) if case.queries else demos(case.env_id)
    path = shutil.copy(source, tmp_path / source.name)
    damage(path)
    flag = "--expert" if case.queries else "--demos"
    refused(case, case.argv("--out", tmp_path / "new", flag, path), path)
    folder = shutil.copytree(case.finished, tmp_path / "run")
    refused(case, ["--evaluate", folder / "checkpoint.pt"], "checkpoint.pt", "another kind")
    for other in ("Acrobot-v1", case.module.parse_args([]).env_id):  # the script's own default, too
        refused(case, ["--evaluate", folder / "policy.pt", "--env-id", other], f"not {other}")
    damage(folder / "checkpoint.pt")
    refused(case, ["--resume", folder], folder / "checkpoint.pt")
    damage(folder / "policy.pt")
    refused(case, ["--evaluate", folder / "policy.pt"], folder / "policy.pt")


@pytest.mark.parametrize("claim, shape", [(3 << 30, (9, 3)), (None, (1 << 42, 3))])
def test_an_archive_that_unpacks_to_gigabytes(claim, shape, tmp_path, refused):
    """One member claims to be so large, or its array to have this shape."""
    header, path, arrays = io.BytesIO(), tmp_path / "demos.npz", dict(np.load(demos("Toy-v0")))
    del arrays["observations"]
    np.savez(path, **arrays)
    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("observations.npy", header.getvalue() + bytes(99))
        archive.filelist[-1].file_size = claim or archive.filelist[-1].file_size
    refused(BC, BC.argv("--out", tmp_path / "new", "--demos", path), path)


GOOD = dict(np.load(demos("Toy-v0")))
SIZE, NAN = len(GOOD["actions"]), GOOD["observations"].copy()
NAN[3, 1] = np.nan
BAD_DEMONSTRATIONS = {  # what differs from good ones, and a word that the line must hold
    "another shape": ({"observations": GOOD["observations"][:, :2]}, ""),
    "texts": ({"observations": GOOD["observations"].astype(str)}, ""),
    "NaN": ({"observations": NAN}, "NaN"),
    "overflow": ({"observations": np.full((SIZE, 3), 1e300)}, ""),
    "actions that are floats": ({"actions": GOOD["actions"] * 1.0}, ""),
    "action too large": ({"actions": GOOD["actions"] * 4}, "actions"),
    "action too small": ({"actions": GOOD["actions"] * 0}, "actions"),
    "too few rewards": ({"rewards": np.ones(SIZE - 1)}, ""),
    "no start in the first row": ({"episode_starts": np.roll(GOOD["episode_starts"], 1)}, "start"),
    "no steps": ({name: GOOD[name][:0] for name in GOOD if name != "metadata"}, ""),
    "one episode too many": ({"terminated": np.ones(25, bool)}, ""),
    "another task": ({"metadata": json.dumps({"env_id": "Toy-vel-v0"})}, "Toy-vel-v0"),
    "a task without a version": ({"metadata": json.dumps({"env_id": "Toy-vel"})}, "Toy-vel"),
    "a name of many lines": ({"metadata": json.dumps({"env_id": "x\n" * 999})}, "x x"),
    "no task": ({"metadata": "{}"}, "env_id"),
    "objects": ({"actions": np.array([Payload(ROOT)] * SIZE, object)}, "allow_pickle"),
    **{f"no {name}": ({name: None}, name) for name in GOOD if name != "rewards"},
}


@pytest.mark.parametrize("changes, word", BAD_DEMONSTRATIONS.values(), ids=BAD_DEMONSTRATIONS)
def test_bad_demonstrations(changes, word, tmp_path, refused):
    arrays, path = {**GOOD, **changes}, tmp_path / "demos.npz"
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    refused(BC, BC.argv("--out", tmp_path / "new", "--demos", path), path, word)
    assert not (ROOT / "canary").exists()


def test_actions_of_a_box_that_were_cut_to_integers(tmp_path, refused):
    arrays, path = dict(np.load(demos("ToyBox-v0"))), tmp_path / "demos.npz"
    np.savez(path, **{**arrays, "actions": arrays["actions"].astype(int)})
    refused(PPO, REINFORCE.argv("--out", tmp_path / "new", "--demos", path), path, "integers")


def test_demonstrations_of_other_dtypes_and_another_version_are_used(tmp_path, capsys):
    """And the other version is mentioned."""
    arrays = {**np.load(demos("Toy-v0")), "metadata": json.dumps({"env_id": "Toy-v3"})}
    arrays["observations"] = np.asfortranarray(arrays["observations"].astype(">f8"))
    np.savez(tmp_path / "demos.npz", **{**arrays, "actions": arrays["actions"].astype(np.uint8)})
    ours = BC.run(tmp_path / "run", "--demos", tmp_path / "demos.npz")
    lines = capsys.readouterr().out.splitlines()
    assert same(ours, weights(BC.finished))
    assert any("Toy-v3" in line and "Toy-v0" in line for line in lines)


@pytest.mark.parametrize("case", [BC, PPO, OFFLINE], ids=str)
def test_no_demonstrations_are_shipped(case, tmp_path, refused):
    argv = ["--env-id", "Toy-v0", "--out", tmp_path / "new"]
    refused(case, argv, "Toy-v0.npz", "--demos", "experts/train.py")


@pytest.mark.parametrize("case", [BC, PPO, AGGREVATED], ids=str)
@pytest.mark.parametrize(
    "name, value",
    [
        *[("script", "another"), ("settings", None), ("settings", {"hidden": 10**9})],
        *[("weights", {}), ("weights", "NaN"), ("weights", "objects")],
        *[("env_id", "this:Cart-v9"), ("env_id", 5), ("env_id", None)],
    ],
)
def test_bad_policies(case, name, value, tmp_path, refused):
    saved = torch.load(case.finished / "policy.pt", weights_only=True)
    weights = saved["weights"]
    first = next(iter(weights))
    saved[name] = Payload(tmp_path) if value == "objects" else value
    if value == "NaN":
        saved["weights"] = {**weights, first: weights[first] * float("nan")}
    if value is None:
        del saved[name]
    torch.save(saved, tmp_path / "policy.pt")
    words = [tmp_path / "policy.pt"] if name != "env_id" else []
    refused(case, ["--evaluate", tmp_path / "policy.pt"], *words)
    assert "this" not in sys.modules


def test_files_of_other_scripts(tmp_path, refused):
    for case, other in zip(SCRIPTS, SCRIPTS[1:] + SCRIPTS[:1]):
        folder = other.finished
        refused(case, ["--resume", folder], folder, other.script)
        refused(case, ["--evaluate", folder / "policy.pt"], folder, other.script)


def test_an_expert_of_another_task(tmp_path, refused):
    saved = torch.load(expert("ToyBox-v0"), weights_only=True)
    box = {"settings": {**saved["settings"], "low": [0.0, 0.0]}}
    narrow = {"settings": {**saved["settings"], "sizes": [3, 2, 1]}}  # for a box of two numbers
    layer = {"network.2.weight": torch.ones(1, 2), "network.2.bias": torch.zeros(1)}
    narrow["weights"] = {**saved["weights"], **layer}
    for changes in ({"env_id": "Pendulum-v1"}, box, narrow):
        torch.save({**saved, **changes}, tmp_path / "expert.pt")
        argv = AGGREVATED.argv("--out", tmp_path / "new", "--expert", tmp_path / "expert.pt")
        refused(AGGREVATED, argv, tmp_path / "expert.pt")


@pytest.mark.parametrize("case", [BC, PPO, OFFLINE, AGGREVATED], ids=lambda case: case.script)
def test_a_task_whose_actions_have_changed(case, tmp_path, refused):
    before = {"low": [-2.0, 0.0]} if case.queries else {"low": 0, "high": 2}
    saved = torch.load(case.finished / "policy.pt", weights_only=True)
    torch.save({**saved, "settings": saved["settings"] | before}, tmp_path / "policy.pt")
    refused(case, ["--evaluate", tmp_path / "policy.pt"], "policy.pt", "not the task")
    if not case.queries:
        run = shutil.copytree(case.finished, tmp_path / "run")
        saved = torch.load(run / "checkpoint.pt", weights_only=True)
        torch.save({**saved, "demos": saved["demos"] | before}, run / "checkpoint.pt")
        refused(case, ["--resume", run], run, "has changed")


@pytest.mark.parametrize("case", SCRIPTS, ids=lambda case: case.script)
@pytest.mark.parametrize(
    "flag",
    [
        *["--seed=1.5", "--seed=-1", "--eval-episodes=1", "--eval-every=0", "--hidden=0", "--seed"],
        *["--device=tpu", "--nonsense", "--total=9", "--env-id=", "--out=", "--resume=", "extra"],
        *["--evaluate=", "--total-steps=0", "--total-steps=nan", f"--hidden={'9' * 400}"],
        *["--resume=nowhere", "--evaluate=nowhere.pt", "--env-id=NoSuchTask-v0", "--env-id=x:y-v0"],
        *["--out=somewhere", "--num-demos=99", "--num-pairs=9999"],  # exists; more than there are
    ],
)
def test_flags(case, flag, tmp_path, refused, monkeypatch):
    """No abbreviations either, and no 25 lines of usage."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "somewhere").mkdir()
    argv = case.argv("--out", "new")
    name = "empty" if flag.endswith("=") else flag.split("=")["where" in flag]
    refused(case, [*argv, flag], name)


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x", "1e999"])
def test_numbers(value, tmp_path, refused):
    for flag in ("policy-lr", "gamma", "entropy", "clip", "minibatch-size", "num-steps"):
        refused(PPO, PPO.argv("--out", tmp_path / "new", f"--{flag}={value}"), f"--{flag}")


OTHERS = [(case, name) for case in (BC, PPO, OFFLINE, AGGREVATED) for name in REFUSED]
OTHERS += [(OFFLINE, "ToyBox-v0"), (AGGREVATED, "Toy-v0")]


@pytest.mark.parametrize("case, name", OTHERS, ids=str)
def test_tasks_of_other_kinds(case, name, tmp_path, refused):
    given = [] if case.queries else ["--demos", demos(name if "ToyBox" in name else "Toy-v0")]
    argv = case.argv("--out", tmp_path / "new", "--env-id", name, *given)
    # Not because the demonstrations or the expert are another task's.
    refused(case, argv, f"--env-id {name}" if name in REFUSED else name)
