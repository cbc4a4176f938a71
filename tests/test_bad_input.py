"""Whatever is wrong with a file or a value: exit status 2, one line, and nothing is written."""

import argparse
import json
import pickle
import shutil
from hashlib import sha256

import numpy as np
import pytest
import torch
from scripts import SCRIPTS, TASKS


class Payload:
    """Unpickling this writes a file, the canary."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary"))).close()
    assert (tmp_path / "canary").exists()


def listing(folder):
    """Every path below a folder, with a hash of what the files hold."""
    paths = sorted(folder.rglob("*"))
    return {p: sha256(p.read_bytes()).hexdigest() if p.is_file() else None for p in paths}


@pytest.fixture(autouse=True)
def no_expert(script, finish, monkeypatch):
    """What is refused must be refused before an expert is trained for minutes."""
    if script.task.demos:
        monkeypatch.delattr(script.module, "make_expert")


@pytest.fixture
def refused(script, tmp_path, capsys):
    """Run a command line that must be refused with one line that holds these words."""

    def run(argv, *words):
        before = listing(tmp_path)
        status = script.module.main([str(argument) for argument in argv])
        (line,) = capsys.readouterr().err.splitlines()
        assert status == 2, line
        for word in words:
            assert str(word) in line
        assert len(line) < 500
        assert listing(tmp_path) == before

    return run


# --- files that are not what they should be -------------------------------------------------------

DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("not what you expect\n" * 9),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pickled": lambda path: path.write_bytes(pickle.dumps(Payload(path.parent / "canary"), 2)),
}


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damage(request):
    return request.param


# --- demonstrations -------------------------------------------------------------------------------


learns_from_demonstrations = pytest.mark.applies(lambda script: script.task.demos)


def good(task):
    """Three episodes of five steps."""
    actions = np.tile([0, 1, 0], 5).astype(task.action_dtype)
    return {
        "observations": np.zeros((15, *task.observation), np.float32),
        "actions": np.ones((15, *task.action), task.action_dtype)
        * actions.reshape(15, *[1] * len(task.action)),
        "episode_starts": np.arange(15) % 5 == 0,
        "terminated": np.array([True, False, True]),
        "rewards": np.ones(15, np.float32),
        "metadata": np.array(json.dumps({"env_id": task.env_id})),
    }


def bad(task):
    """What differs from good(task), and a word that the error line must contain."""
    arrays = good(task)
    observations, actions, starts = (arrays[k] for k in list(arrays)[:3])

    def changed(name, index, value):
        array = arrays[name].copy()
        array[index] = value
        return {name: array}

    return {
        "observations of another shape": ({"observations": observations[:, :3]}, "(15, 3)"),
        "one observation too few": ({"observations": observations[:14]}, "expected"),
        "observations of another dtype": ({"observations": observations.astype(float)}, "float64"),
        "observations without dimensions": ({"observations": np.float32(0)}, ""),
        "actions of another shape": ({"actions": actions[..., None]}, "actions"),
        "actions of another dtype": ({"actions": actions.astype(np.int16)}, "actions"),
        "action too large": (changed("actions", 3, 2), "actions"),
        "action too small": (changed("actions", 3, -2), "actions"),
        "NaN": (changed("observations", (3, 1), np.nan), "observations"),
        "infinity": (changed("observations", (3, 1), -np.inf), "observations"),
        "NaN in the rewards": (changed("rewards", 3, np.nan), "rewards"),
        "too few rewards": ({"rewards": np.ones(14, np.float32)}, "rewards"),
        "starts that are numbers": ({"episode_starts": starts * 1}, "episode_starts"),
        "no start in the first row": (changed("episode_starts", [0, 1], [False, True]), "episode"),
        "no episode": ({n: arrays[n][:0] for n in arrays if n != "metadata"}, "episode"),
        "one episode too many": ({"terminated": np.ones(4, bool)}, "terminated"),
        "terminated in every row": ({"terminated": np.ones(15, bool)}, "terminated"),
        "another environment": ({"metadata": json.dumps({"env_id": "Acrobot-v1"})}, "Acrobot-v1"),
        "a name of many lines": ({"metadata": json.dumps({"env_id": "x\n" * 10_000})}, "x x"),
        "metadata without environment": ({"metadata": "{}"}, "env_id"),
        "metadata that is a list": ({"metadata": "[]"}, ""),
        "metadata that is no JSON": ({"metadata": task.env_id}, ""),
        **{f"no {name}": ({name: None}, name) for name in arrays if name != "rewards"},
    }


GOOD, BAD = good(TASKS["cartpole"]), bad(TASKS["cartpole"])  # the names are the same for all tasks


def save(path, task, **changes):
    arrays = {**good(task), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@learns_from_demonstrations
def test_good_demonstrations_are_accepted(script, tmp_path):
    """Otherwise the tests below would show nothing."""
    path = save(tmp_path / "good.npz", script.task)
    episodes = script.module.read_demos(path, script.task.env_id)
    assert [len(episode["actions"]) for episode in episodes] == [5, 5, 5]


@learns_from_demonstrations
def test_damaged_demonstrations(script, damage, tmp_path, refused):
    damage(save(tmp_path / "demos.npz", script.task))
    argv = script.argv(tmp_path / "runs" / "run", "--demos", tmp_path / "demos.npz")
    refused(argv, tmp_path / "demos.npz")


@learns_from_demonstrations
@pytest.mark.parametrize("name", BAD)
def test_bad_demonstrations(script, name, tmp_path, refused):
    changes, word = bad(script.task)[name]
    path = save(tmp_path / "demos.npz", script.task, **changes)
    refused(script.argv(tmp_path / "runs" / "run", "--demos", path), path, word)


@learns_from_demonstrations
def test_what_is_not_asked_for_is_not_read(script, tmp_path):
    objects = np.array([Payload(tmp_path / "canary")] * 15, object)
    path = save(tmp_path / "demos.npz", script.task, **{"something else": objects})
    episodes = script.module.read_demos(path, script.task.env_id)
    assert len(episodes) == 3 and not (tmp_path / "canary").exists()


@learns_from_demonstrations
@pytest.mark.parametrize("name", GOOD)
def test_demonstrations_that_hold_objects(script, name, tmp_path, refused):
    objects = np.array([Payload(tmp_path / "canary")] * 15, object)
    path = save(tmp_path / "demos.npz", script.task, **{name: objects})
    refused(script.argv(tmp_path / "runs" / "run", "--demos", path), path)


@learns_from_demonstrations
def test_more_than_there_is(script, tmp_path, refused):
    path = save(tmp_path / "demos.npz", script.task)
    argv = script.argv(tmp_path / "runs" / "run", "--demos", path)
    refused([*argv, "--num-demos", 4], "--num-demos 4", path, "3")
    refused([*argv, "--num-demos", 1, "--num-pairs", 6], "--num-pairs 6", "5")


@learns_from_demonstrations
def test_demonstrations_of_another_environment(script, tmp_path, refused):
    other = next(task for task in TASKS.values() if task is not script.task)
    argv = script.argv(tmp_path / "runs" / "run", "--demos", other.demos)
    refused(argv, other.demos, other.env_id, script.task.env_id)


# --- run folders ----------------------------------------------------------------------------------


@pytest.fixture
def folder(script, finish, tmp_path):
    return shutil.copytree(finish(script), tmp_path / "run")


def test_existing_run_folder(script, folder, refused):
    refused(script.argv(folder), folder)


def test_no_run_folder(script, tmp_path, refused):
    refused(["--resume", tmp_path / "nowhere"], tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused(["--resume", tmp_path / "empty"], tmp_path / "empty")
    (tmp_path / "demos.npz").touch()
    refused(["--resume", tmp_path / "demos.npz"], tmp_path / "demos.npz")


def test_damaged_run_folder(damage, folder, refused):
    damage(folder / "checkpoint.pt")
    refused(["--resume", folder], folder / "checkpoint.pt")


def may_change(script, flag):
    """Does the script have this flag, and another value for it?"""
    known = flag.strip("-").replace("-", "_") in vars(script.module.parse_args([]))
    return known and (flag != "--env-id" or len(script.module.TASKS) > 1)


@pytest.mark.applies.with_args(may_change)  # (a named function would be marked itself)
@pytest.mark.parametrize("flag", ["--hidden", "--num-envs", "--env-id"])
def test_resumed_with_other_settings(script, flag, folder, refused):
    value = list(script.module.TASKS)[1] if flag == "--env-id" else 5
    refused(["--resume", folder, script.budget, 2 * script.full, flag, value])


def rewrite(path, write, **changes):
    """Change what a .pt file holds, and let `write(path, content)` write it; None drops a part."""
    content = {**torch.load(path, weights_only=True), **changes}
    write(path, {name: part for name, part in content.items() if part is not None})


def write_policy(path, content):
    torch.save(content, path)


@pytest.fixture
def forge(script, folder):
    """Change the checkpoint, and its digest with it."""

    def change(**changes):
        rewrite(folder / "checkpoint.pt", script.module.write_checkpoint, **changes)

    return change


def test_a_changed_checkpoint(folder, refused):
    """The digest notices what the format would not: a byte less or more, a flipped bit."""
    path = folder / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for changed in (content[:-1], content + b"x", content[1:], content[:32]):
        path.write_bytes(changed)
        refused(["--resume", folder], path, "not as it was written")
    for at in (0, middle, len(content) - 1):
        content[at] ^= 1
        path.write_bytes(content)
        content[at] ^= 1
        refused(["--resume", folder], path, "not as it was written")
    path.write_bytes(content)
    rewrite(path, write_policy, seconds=0.0)
    refused(["--resume", folder], path, "not as it was written")


def test_checkpoint_of_another_script(script, folder, refused, monkeypatch, forge):
    with monkeypatch.context() as patch:
        patch.setattr(script.module, "SCRIPT", "another")
        forge(script="another")
    refused(["--resume", folder], folder / "checkpoint.pt", "another")


@pytest.mark.parametrize("part", ["policy", "optimizer", "count", "rng"])
def test_checkpoint_without_a_part(part, folder, refused, forge):
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    if part == "optimizer":  # whatever it is called
        part = next(name for name in content if "optimizer" in name)
    forge(**{part: None})
    refused(["--resume", folder], folder / "checkpoint.pt", part)


@pytest.mark.parametrize("part", ["policy", "count", "extra"])
def test_checkpoint_that_holds_objects(part, folder, tmp_path, refused, forge):
    """Even where its digest is right."""
    forge(**{part: Payload(tmp_path / "canary")})
    refused(["--resume", folder], folder / "checkpoint.pt")


# --- policies -------------------------------------------------------------------------------------


def test_damaged_policy(damage, folder, refused):
    damage(folder / "policy.pt")
    refused(["--evaluate", folder / "policy.pt"], folder / "policy.pt")


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"script": "another"}, "another"),
        ({"script": None}, "script"),
        ({"weights": None}, "weights"),
        ({"weights": {}}, "state_dict"),
        ({"network": {"hidden": 9}}, "state_dict"),
        ({"network": {"hidden": "many"}}, ""),
        ({"network": {"hidden": -1}}, ""),
        ({"network": {"hidden": 10**6}}, "state_dict"),
        ({"network": {"depth": 2}}, "depth"),
        ({"env_id": "Acrobot-v1"}, "Acrobot-v1"),
        ({"env_id": 5}, ""),
    ],
)
def test_bad_policy(changes, word, folder, refused):
    if "network" in changes:
        network = torch.load(folder / "policy.pt", weights_only=True)["network"]
        changes = {"network": {**network, **changes["network"]}}
    rewrite(folder / "policy.pt", write_policy, **changes)
    refused(["--evaluate", folder / "policy.pt"], folder / "policy.pt", word)


@pytest.mark.parametrize("part", ["weights", "network", "extra"])
def test_policy_that_holds_objects(part, folder, tmp_path, refused):
    rewrite(folder / "policy.pt", write_policy, **{part: Payload(tmp_path / "canary")})
    refused(["--evaluate", folder / "policy.pt"], folder / "policy.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_no_numbers(value, folder, refused):
    """Nor those that overflow in the network's single precision."""
    path = folder / "policy.pt"
    weights = torch.load(path, weights_only=True)["weights"]
    for name, weight in weights.items():
        broken = weight.double()
        broken.view(-1)[0] = value
        rewrite(path, write_policy, weights={**weights, name: broken})
        refused(["--evaluate", path], path, "NaN")


def test_policy_that_holds_no_dict(folder, refused):
    torch.save([1, 2], folder / "policy.pt")
    refused(["--evaluate", folder / "policy.pt"], folder / "policy.pt")


# --- flags ----------------------------------------------------------------------------------------


@learns_from_demonstrations
def test_recorded_demonstrations_are_not_overwritten(script, tmp_path, refused):
    save(tmp_path / "demos.npz", script.task)
    refused(["--record-demos", tmp_path / "demos.npz"], tmp_path / "demos.npz")


@learns_from_demonstrations
def test_no_expert_is_trained_for_a_file_that_cannot_be(script, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert script.module.main(["--record-demos", str(tmp_path / "file" / "demos.npz")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(script, tmp_path, refused):
    refused(script.argv(tmp_path / "run", "--device", "cuda"), "--device cuda")


def flags(script, monkeypatch):
    """The flags that argparse knows of."""
    parsers = []

    def parse_args(parser, argv):
        parsers.append(parser)
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        script.module.parse_args([])
    return parsers[0]._actions


def test_flags_out_of_range(script, tmp_path, monkeypatch, capsys):
    """A number may not be NaN, infinite or negative; a choice must be one of those named."""
    tried = 0
    for action in flags(script, monkeypatch):
        numeric = action.type is not None
        wrong = ("nan", "inf", "-1", "x", "9" * 400)
        for value in wrong if numeric else ["x"] if action.choices else []:
            argument = f"{action.option_strings[0]}={value}"
            with pytest.raises(SystemExit) as stop:
                script.module.main(script.argv(tmp_path / "run", argument))
            error = capsys.readouterr().err.splitlines()[-1]
            assert stop.value.code == 2 and action.option_strings[0] in error, argument
            tried += 1
    assert tried > 20 and not listing(tmp_path)


@pytest.mark.parametrize(
    "argument",
    [
        *("--seed=1.5", "--num-demos=0", "--num-pairs=1", "--num-threads=0", "--eval-episodes=1"),
        *("--eval-every=0", "--hidden=0", "--device=tpu", "--nonsense", "--seed"),
    ],
)
def test_flags(script, argument, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.module.main(script.argv(tmp_path / "run", argument))
    assert stop.value.code == 2 and argument.split("=")[0] in capsys.readouterr().err
    assert not listing(tmp_path)


@pytest.mark.applies(lambda script: script.module.METRIC == "success_rate")
def test_few_pairs_and_absorbing_ones(script, tmp_path, refused):
    """An end counts as 1 / (1 - gamma) pairs: with few pairs per lap, D would see little else."""
    argv = script.argv(tmp_path / "run", "--num-demos", 1, "--num-pairs", 5, "--absorbing")
    refused(argv, "--num-pairs", "--no-absorbing")


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_an_empty_name(flag, refused):
    """As from a shell variable that is not set."""
    refused([flag, ""], flag)


def test_no_budget(script, tmp_path):
    with pytest.raises(SystemExit) as stop:
        script.module.main(script.argv(tmp_path / "run", f"{script.budget}=0"))
    assert stop.value.code == 2 and not listing(tmp_path)


def test_files_of_the_other_scripts(script, finish, tmp_path, refused):
    for other in SCRIPTS:
        if finish(other) and other.script != script.script:
            folder = shutil.copytree(finish(other), tmp_path / other.script)
            refused(["--resume", folder], folder, other.script)
            refused(["--evaluate", folder / "policy.pt"], folder, other.script)
