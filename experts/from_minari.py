"""Turn a Minari dataset into demonstrations that the scripts learn from.

    python experts/from_minari.py D4RL/pen/expert-v2 --out pen.npz --episodes 30
    python experts/from_minari.py path/to/dataset --env-id Hopper-v5 --out hopper.npz

The first is an id in Minari's own folder, ~/.minari/datasets or $MINARI_DATASETS_PATH, where
`minari download` puts it. A dataset says how its task is built, down to the code to call; of all
that, only the task's id is read. Neither Minari nor Gymnasium is used: json and h5py are.

Flat observations and Discrete or flat, continuous actions only; anything else is refused.
"""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
from shared import BadInput, Parser, check, say, write_demonstrations

try:
    import h5py
except ImportError:  # optional: nothing else in this repository needs it
    h5py = None

MAX_BYTES = 2 * 10**9
# The arrays of an episode of T steps (observations: T + 1), and the kinds of number they may have.
ARRAYS = {"observations": "fiu", "actions": "fiu", "rewards": "fiu"}
ARRAYS |= {"terminations": "b", "truncations": "b"}


def find(name):
    """The folder with a dataset's data."""
    root = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    folders = [Path(name), Path(root, name)]
    for folder in folders:
        if (folder / "data").is_dir():
            return folder / "data"
    raise BadInput(f"found no folder {' or '.join(f'{x}/data' for x in folders)}, expected one")


def read_metadata(path, env_id):
    """What is said about the dataset, and the task's id."""
    check(path.is_file(), f"{path}: not found, expected a file")  # a pipe could block
    check(path.stat().st_size <= 2**24, f"{path} is larger than 16 MB")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    check(isinstance(about, dict), f"{path} has no dictionary")
    kind = about.get("data_format", "hdf5")
    check(kind == "hdf5", f"data in the format {kind}, expected hdf5")
    for name, kinds in (("observation_space", ["Box"]), ("action_space", ["Box", "Discrete"])):
        space = json.loads(about.get(name, '{"type": "Box"}'))  # old datasets do not say
        shape, expected = space.get("shape"), " or ".join(kinds)
        flat = space["type"] in kinds and len(shape or [0]) == 1
        check(flat, f"{name} {space['type']}, shape {shape}, expected a flat {expected}")
    spec = json.loads(about.get("env_spec") or "{}")
    found = spec.get("id", "")
    check(env_id or found, f"{path} names no task, expected --env-id")
    # An id with a colon would make Gymnasium import a module: only the user may ask for that.
    plain = env_id or re.fullmatch(r"([\w.-]+/)?[\w.-]+", found)
    check(plain, f"the task's id is {found!r}, expected a plain one, or --env-id")
    changes = [f"{x} {spec[x]}" for x in ("kwargs", "additional_wrappers") if spec.get(x)]
    if changes:
        say(f"{env_id or found} is taken as it is; the dataset's had {', '.join(changes)}"[:300])
    return about, env_id or found


def member(group, name, kind):
    """What a group itself holds by that name: no link, which could lead into another file."""
    links = group.id.links
    check(links.exists(name.encode()), f"{group.name} has no {name}, expected one")
    link = links.get_info(name.encode()).type
    check(link == h5py.h5l.TYPE_HARD, f"{group.name} has a link {name}, expected the data itself")
    found, expected = type(group[name]).__name__, kind.__name__
    check(found == expected, f"{group.name} {name} is a {found}, expected a {expected}")
    return group[name]


def read_episode(group, room):
    """The arrays of an episode, which may take `room` bytes."""
    found = {name: member(group, name, h5py.Dataset) for name in ARRAYS}
    steps = sum(found["rewards"].shape[:1])
    check(steps, f"{group.name} is empty, expected at least one step")
    for name, kinds in ARRAYS.items():
        array, what = found[name], f"{group.name} {name}"
        elsewhere = array.is_virtual or array.external
        check(not elsewhere, f"{what} lie in another file, expected them in this one")
        check(array.dtype.kind in kinds, f"{what} of type {array.dtype}, expected plain numbers")
        length = steps + (name == "observations")
        two = name == "observations" or (name == "actions" and array.dtype.kind == "f")
        shape = f"({length}, n)" if two else f"({length},)"
        same = len(array.shape) == 1 + two and len(array) == length and array.size
        check(same, f"{what} of shape {array.shape}, expected {shape}")
    size = sum(array.nbytes for array in found.values())
    chunks = sum(float(np.prod(x.chunks or 0)) * x.dtype.itemsize for x in found.values())
    check(
        max(size, chunks) <= room,
        f"{group.name} makes it larger than {MAX_BYTES} bytes, see --episodes",
    )
    episode = {name: array[()] for name, array in found.items()}
    for name in ("observations", "actions", "rewards"):
        if name != "actions" or episode[name].dtype.kind == "f":
            with np.errstate(over="ignore"):  # what is too large for float32 is infinite, then
                episode[name] = episode[name].astype(np.float32)
        finite = np.isfinite(episode[name]).all()
        check(finite, f"{group.name} {name} NaN or infinite (as float32), expected finite numbers")
    over = np.flatnonzero(episode["terminations"] | episode["truncations"])
    went_on = len(over) and over[0] < steps - 1
    check(not went_on, f"{group.name} goes on after its end, expected {steps} steps to the end")
    return episode, size


def read_episodes(path, count):
    """The first `count` episodes, or all."""
    check(path.is_file(), f"{path}: not found, expected a file")
    with h5py.File(path, "r") as file:
        names = [f"episode_{i}" for i in range(len(file))]
        strange = sorted(set(file) - set(names))[:3]
        check(not strange, f"has {strange}, expected episode_0 to episode_{len(file) - 1}")
        enough = names and (count is None or 0 < count <= len(names))
        check(enough, f"has {len(names)} episodes, expected {count or 'some'}")
        episodes, total = [], 0
        for name in names[:count]:
            episode, size = read_episode(member(file, name, h5py.Group), MAX_BYTES - total)
            episodes, total = [*episodes, episode], total + size
    for name in ("observations", "actions"):
        kinds = {f"{e[name].dtype}{e[name].shape[1:]}" for e in episodes}
        check(len(kinds) == 1, f"{name} are {' and '.join(sorted(kinds))}, expected one kind")
    return episodes


def convert(args, argv):
    out = Path(args.out)
    check(not out.exists(), f"--out {out} exists already, expected a new file")
    check(out.parent.is_dir(), f"--out {out}: its folder does not exist")
    folder = find(args.dataset)
    about, env_id = read_metadata(folder / "metadata.json", args.env_id)
    episodes = read_episodes(folder / "main_data.hdf5", args.episodes)
    steps = [len(episode["actions"]) for episode in episodes]
    for episode in episodes:  # nothing was done at what was seen after the last action
        episode["observations"] = episode["observations"][:-1]
        episode["terminated"] = episode["terminations"][-1]
    said = {x: str(about.get(x))[:200] for x in ("dataset_id", "algorithm_name", "minari_version")}
    metadata = {
        "env_id": env_id,
        "expert": f"Minari dataset {said['dataset_id']}, algorithm {said['algorithm_name']}",
        "seed": None,
        "command": shlex.join(["python", "experts/from_minari.py", *argv]),
        "versions": {"minari": said["minari_version"], "numpy": np.__version__},
    }
    returns = write_demonstrations(out, episodes, metadata)
    say(f"{out}: {env_id}, {len(steps)} episodes, {sum(steps)} steps")
    say(f"returns {np.mean(returns):.1f} +- {np.std(returns):.1f}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("from_minari.py", __doc__)
    parser.add_argument("dataset", metavar="DATASET", help="a folder, or an id in Minari's own")
    parser.add_argument("--env-id", help="the task (default: what the dataset says)")
    parser.add_argument("--out", required=True, metavar="DEMOS.npz", help="a new file")
    parser.add_argument("--episodes", type=int, metavar="N", help="the first N (default: all)")
    args = parser.parse_args(argv)
    if h5py is None:
        parser.error("h5py is not installed, expected it: pip install h5py")
    with parser.converting(args.dataset):
        convert(args, argv)


if __name__ == "__main__":
    main()
