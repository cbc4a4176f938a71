"""experts/convert.py and experts/from_minari.py: what they convert exactly, what they refuse."""

import base64
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import AGGREVATED, Case
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import SACPolicy
from torch import nn
from written import Payload, contents

CONVERT, MINARI = Case("convert"), Case("from_minari")
convert, from_minari, shared = CONVERT.module, MINARI.module, Case("shared").module
h5py = from_minari.h5py


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model(algorithm=SAC, env="ToyBox-v0", policy="MlpPolicy", options=None, **kwargs):
    """A tiny one, untrained, with large biases: the actions of a new one hardly differ."""
    kwargs = {"net_arch": [8], **kwargs}
    made = algorithm(policy, env, policy_kwargs=kwargs, seed=0, device="cpu", **(options or {}))
    for name, x in made.policy.named_parameters():
        if name.startswith("actor") and name.endswith("bias"):
            nn.init.normal_(x)
    return made


def write(path, data, weights):
    """A zip with these settings and weights."""
    if isinstance(weights, dict):
        torch.save(weights, file := io.BytesIO())
        weights = file.getvalue()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", data if isinstance(data, bytes) else json.dumps(data))
        archive.writestr("policy.pth", weights)


def check_same(path, model):
    """The script that queries such a file acts as the model does."""
    expert, _ = AGGREVATED.module.load_policy(path)
    seen = np.random.normal(size=(100, expert.settings["sizes"][0])).astype(np.float32)
    ours, (theirs, _) = expert.act(seen), model.predict(seen, None, None, True)
    assert np.abs(ours - theirs).max() < 1e-5 and theirs.std(0).min() > 1e-4


@pytest.mark.parametrize("env_id", ["ToyBox-v0", "Pendulum-v1"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("net_arch", [[], [16], [8, 16, 12], {"pi": [5, 6], "qf": [7]}], ids=str)
@pytest.mark.parametrize("algorithm", [SAC, TD3, DDPG])
def test_the_actions_are_the_models(algorithm, net_arch, activation, env_id, tmp_path):
    path, out = tmp_path / "model.zip", tmp_path / "expert.pt"
    theirs = model(algorithm, env_id, net_arch=net_arch, activation_fn=activation)
    theirs.save(path)
    convert.main([str(path), "--env-id", env_id, "--out", str(out), "--episodes", "1"])
    check_same(out, theirs)


MU = "actor.mu.weight"
TimesTen = type("TimesTen", (FlattenExtractor,), {"forward": lambda self, x: 10 * x})  # no weights
BAD_MODELS = [  # the model; the task it is converted for; a word of the line
    ({"features_extractor_class": TimesTen}, "ToyBox-v0", "TimesTen"),
    ({"policy": type("Mine", (SACPolicy,), {"__module__": "own"})}, "ToyBox-v0", "class own"),
    ({"options": {"use_sde": True}}, "ToyBox-v0", "use_sde True"),
    ({"activation_fn": nn.LeakyReLU}, "ToyBox-v0", "LeakyReLU"),
    ({"algorithm": PPO}, "ToyBox-v0", "ActorCriticPolicy"),
    ({"env": "BipedalWalker-v3"}, "ToyBox-v0", "observations of shape (24,)"),
    ({}, "Image-v0", "flat Box"),
    ({}, "Unbounded-v0", "bounded"),
    ({}, "None-v0", "task None-v0"),
]
BAD_FILES = [  # what is changed in a good file: a setting, "all" of them or the "weights"; a word
    ("policy_kwargs", {"new": 1}, "new 1"),
    ("_vec_normalize_env", {":type:": "VecNormalize"}, "VecNormalize"),
    ("action_space", {":type:": "Dict"}, "Dict"),
    ("action_space", {"low": "[-1. -1.]"}, "actions with low [-1. -1.]"),
    ("all", pickle.dumps(Payload(Path()), 0), "JSON"),
    ("all", {"env_id": "ToyBox-v0", "algorithm": "TQC"}, "policy class"),  # the first version's
    ("weights", lambda x: x | {MU: x[MU] * np.nan}, "NaN"),
    ("weights", lambda x: x | {MU: x[MU].double()}, "float64"),
    ("weights", lambda x: x | {MU: torch.zeros(1).expand(10**6, 10**6)}, "1000000"),
    ("weights", lambda x: x | {"actor.extra": x[MU]}, "actor.extra"),
    ("weights", lambda x: {MU: Payload(Path())}, "UnpicklingError"),
    ("weights", lambda x: pickle.dumps(Payload(Path())), "not a zip"),
]
TO_TOY = ["model.zip", "--env-id", "ToyBox-v0", "--out", "expert.pt"]


@pytest.mark.parametrize("made, env_id, word", BAD_MODELS)
def test_bad_models(made, env_id, word, refused):
    model(**made).save("model.zip")
    refused(CONVERT, ["model.zip", "--env-id", env_id, "--out", "expert.pt"], word)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model().save(path := tmp_path_factory.mktemp("good") / "model.zip")
    with zipfile.ZipFile(path) as archive:
        weights = torch.load(io.BytesIO(archive.read("policy.pth")))
        return json.loads(archive.read("data")), weights


@pytest.mark.parametrize("which, change, word", BAD_FILES)
def test_bad_files(which, change, word, good, refused):
    data, weights = good
    if which == "weights":
        weights = change(weights)
    else:
        data = change if which == "all" else data | {which: data.get(which, {}) | change}
    write("model.zip", data, weights)
    refused(CONVERT, TO_TOY, word)


def test_what_lies_around_a_model(good, refused, monkeypatch):
    refused(CONVERT, TO_TOY, "not found")
    pickled = {":serialized:": base64.b64encode(pickle.dumps(Payload(Path()))).decode()}
    write("model.zip", good[0] | {"seed": pickled, "policy_kwargs": pickled}, good[1])
    (normalizer := Path("model_vecnormalize_9_steps.pkl")).touch()
    refused(CONVERT, TO_TOY, "VecNormalize")
    normalizer.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(convert, "MAX_BYTES", 1000)
        refused(CONVERT, TO_TOY, "at most 1000")
    convert.main(TO_TOY + ["--env-id", "toys:ToyBox-v0"])
    assert torch.load("expert.pt", weights_only=True)["env_id"] == "ToyBox-v0"  # as a script asks
    assert not Path("canary").exists()  # what is pickled in the settings stays so
    refused(CONVERT, TO_TOY, "exists")


TOY = ["toy", "--out", "demos.npz"]


def dataset(change=None, about=None):
    """Two episodes of CartPole, as Minari 0.5 writes them: terminated, and cut off."""
    spec = {"id": "CartPole-v1", "entry_point": "os:mkdir", "kwargs": {"path": "canary"}}
    (folder := Path("toy/data")).mkdir(parents=True)
    text = json.dumps({"env_spec": json.dumps(spec), "data_format": "hdf5"} | (about or {}))
    (folder / "metadata.json").write_text(text)
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        for i, steps in enumerate((5, 3)):
            group = file.create_group(f"episode_{i}")
            group["observations"] = np.random.normal(size=(steps + 1, 4)).astype(np.float32)
            group["actions"], group["rewards"] = np.arange(steps) % 2, np.ones(steps)
            ends = np.arange(steps) == steps - 1
            group["terminations"], group["truncations"] = ends & (i == 0), ends & (i == 1)
        for name, value in (change or {}).items():
            group.pop(name, None)
            if callable(value):
                value(group)
            else:
                group[name] = value


def test_minari(monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", "toy/..")
    dataset()
    from_minari.main(TOY)
    assert "kwargs {'path': 'canary'}" in capsys.readouterr().out  # what the task had is said
    demos, last = np.load("demos.npz"), h5py.File("toy/data/main_data.hdf5")["episode_1"]
    assert np.array_equal(demos["observations"][5:], last["observations"][:-1])
    assert demos["actions"].dtype == np.int64 and list(demos["actions"]) == [0, 1, 0, 1, 0, 0, 1, 0]
    assert list(np.flatnonzero(demos["episode_starts"])) == [0, 5] and len(demos["rewards"]) == 8
    about = json.loads(str(demos["metadata"]))
    assert (about["env_id"], about["returns"]) == ("CartPole-v1", [5, 3])
    assert list(demos["terminated"]) == [True, False] and not Path("canary").exists()


BAD_DATASETS = [  # what is changed in the second episode, in the metadata; a word of the line
    ({"observations": np.ones((3, 4))}, {}, "expected (4, n)"),
    ({"observations": np.ones((4, 5))}, {}, "expected one kind"),
    ({"observations": np.full((4, 4), np.nan)}, {}, "NaN"),
    ({"observations": ["a"] * 4}, {}, "object"),
    ({"observations": h5py.ExternalLink("other.hdf5", "/x")}, {}, "link"),
    ({"actions": lambda x: x.create_dataset("actions", 3, "f4", external="other")}, {}, "another"),
    ({"actions": lambda x: x.create_dataset("actions", (3, 10**9), "f4")}, {}, "larger than"),
    ({"rewards": np.ones(0)}, {}, "empty"),
    ({"truncations": [True, False, False]}, {}, "goes on"),
    ({}, {"observation_space": '{"type": "Box", "shape": [9, 9, 3]}'}, "[9, 9, 3]"),
    ({}, {"data_format": "arrow"}, "arrow"),
    ({}, {"env_spec": None}, "expected --env-id"),
    ({}, {"env_spec": json.dumps({"id": "this:A-v0"})}, "this:A-v0"),
]


@pytest.mark.parametrize("change, about, word", BAD_DATASETS)
def test_bad_datasets(change, about, word, refused):
    dataset(change, about)
    refused(MINARI, TOY, word)


def test_the_result_cannot_be_written(tmp_path, monkeypatch):
    """The disk is full; or another program has written such a file meanwhile."""
    monkeypatch.setattr("os.replace", lambda *paths: Path("/dev/full").write_bytes(b"1"))
    with pytest.raises(shared.Unwritten, match="No space left"):
        shared.write(tmp_path / "new", lambda file: file.write(b"new"))
    (tmp_path / "old").write_text("old")
    with pytest.raises(shared.BadInput, match="exists by now"):
        shared.write(tmp_path / "old", lambda file: file.write(b"new"))
    assert list(contents(tmp_path).values()) == [b"old"]


def test_bad_folders(refused, monkeypatch):
    refused(MINARI, TOY, "no folder")
    dataset()
    refused(MINARI, [*TOY, "--episodes", "3"], "has 2 episodes")
    data, about = Path("toy/data/main_data.hdf5"), Path("toy/data/metadata.json")
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    refused(MINARI, TOY, "truncated")
    h5py.File(data, "w").close()
    refused(MINARI, TOY, "has 0 episodes")
    about.write_bytes(pickle.dumps(Payload(Path())))
    refused(MINARI, TOY, "not JSON")
    refused(MINARI, [*TOY, "--out", "no/demos.npz"], "its folder does not exist")
    Path("demos.npz").touch()
    refused(MINARI, TOY, "exists")
    monkeypatch.setattr(from_minari, "h5py", None)
    refused(MINARI, TOY, "pip install h5py")
