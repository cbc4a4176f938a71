"""Stop runs at random moments and damage files at random, for the table of docs/reliability.md.

    python benchmark/reliability.py             everything: about an hour on one core; needs h5py
    python benchmark/reliability.py SIGTERM     only the rows whose name holds this word
    rm benchmark/results/reliability.json       to begin anew: else it goes on where it stopped

Runs are forks of this process, on the toy tasks of tests/toys.py and on the race car. Each is
stopped at a random moment and resumed, until it ends: with the weights of a run that was never
stopped. Damage is drawn from a seed; half of it is to the bytes, half to the meaning: a value or
an array is replaced or removed. A damaged file is refused in one line, with status 2, or it loads
and counts as unnoticed. Anything else, a crash, a hang, a traceback, ends this program.
"""

import contextlib
import copy
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import test_converters as makers
import torch
from scripts import AGGREVATED, ROOT, WATCHING, demos, expert
from test_bad_input import Payload
from test_random_input import OTHER, places
from written import same, weights

RESULT = ROOT / "benchmark" / "results" / "reliability.json"
SIGNALS = {"kill -9": signal.SIGKILL, "Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}
FILES, SECONDS = 1_000, 120  # to damage; after that, something hangs


def child(function, said, limit):
    """What runs in the fork; after limit[0] seconds no file may become longer than limit[1]."""
    with open(said, "wb") as errors, open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    if limit:
        sizes = resource.RLIMIT_FSIZE, (limit[1], resource.RLIM_INFINITY)
        threading.Timer(limit[0], resource.setrlimit, sizes).start()
    status = 99
    try:
        status = function()
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status or 0)


def attempt(function, how=None, moment=None, size=None):
    """Call it in a fork, perhaps stop it after a moment: its status and the lines on stderr."""
    said = Path(tempfile.gettempdir(), f"reliability_{os.getpid()}")
    arguments = function, said, (moment, size) if how == "limit" else None
    process = multiprocessing.get_context("fork").Process(target=child, args=arguments)
    process.start()
    if how and how != "limit":
        process.join(moment)
        if process.is_alive():
            os.kill(process.pid, how)
    process.join(SECONDS)
    process.kill()
    process.join()
    lines = said.read_text().splitlines()
    said.unlink()
    return process.exitcode, lines


def shorten(module):
    """No picture, and no more episodes at the end than before it."""
    module.draw = lambda *_: None
    play = module.play
    module.play = lambda act, args, **_: play(act, args)


def stop_runs(case, how, count, folder):
    shorten(case.module)
    rng, iterations = random.Random(f"{case} {how}"), min(12, 500 // case.every)
    argv = case.argv("--out", folder, iterations=iterations)
    with contextlib.redirect_stdout(io.StringIO()):  # also, what it imports is there in the forks
        never_stopped = case.run(folder, iterations=iterations)
    shutil.rmtree(folder)
    began = time.perf_counter()
    assert attempt(lambda: case.main(*argv)) == (0, [])
    length = time.perf_counter() - began
    largest = max(file.stat().st_size for file in folder.iterdir())
    stopped = ended = early = unheard = 0
    fitting = {"limit": 1, signal.SIGINT: 130, signal.SIGTERM: 143}.get(how, -signal.SIGKILL)
    while stopped < count:
        shutil.rmtree(folder, ignore_errors=True)
        flags, status = argv, None
        while status != 0:
            stop = None if stopped >= count else how
            plan = stop, rng.uniform(0.01, length), rng.randint(3_000, largest)
            status, lines = attempt(lambda x=flags: case.main(*x), *plan)
            missed = status == 0 and "Exception ignored" in str(lines)  # by Python, in a callback
            unheard += missed
            expected = len(lines) == (status > 0) or missed
            assert status in (0, fitting) and expected, (flags, status, lines)
            assert status < 128 or "stopped; go on with: " in lines[0], lines
            stopped += status != 0
            flags = ["--resume", folder]
            if status and not (folder / "checkpoint.pt").exists():
                early, flags = early + 1, argv
                shutil.rmtree(folder, ignore_errors=True)
        assert same(weights(folder), never_stopped), f"{case}, {how}: other weights in {folder}"
        ended += 1
    ends = f"{ended} runs that ended with the uninterrupted run's bits"
    heard = f", {unheard} signals that Python dropped" * bool(unheard)
    return f"{stopped} stops, {ends}, {early} stopped before a checkpoint{heard}"


def change_bytes(data, rng):
    at, size = rng.randrange(len(data)), rng.choice([1, 8, 64, 1_000])
    number = rng.choice([0, 2**63, 2**64 - 1, rng.getrandbits(64)]).to_bytes(8, "little")
    flipped = bytes([data[at] ^ 1 << rng.randrange(8)])
    cut, removed, zeroed = (len(data), b""), (size, b""), (size, bytes(size))
    changes = [cut, removed, zeroed, (0, rng.randbytes(size)), (8, number), (1, flipped)]
    length, new = rng.choice(changes)
    return data[:at] + new + data[at + length :]


def change_value(content, rng, values):
    """Replace or remove a value somewhere in a nest of dictionaries and lists. A checkpoint's
    settings and counters are taken at their word: of one, only what trains is changed."""
    content = parent = copy.deepcopy(content)
    found = [x for x in places(content) if x[0] == "parts" or "parts" not in content]
    *way, last = rng.choice(found)
    for key in way:
        parent = parent[key]
    parent[last] = rng.choice(values)
    if rng.random() < 0.3:
        del parent[last]
    return content


def change_meaning(path, rng):
    """Change what a file says as its own format allows."""
    plain, values = [None, True, -1, 2**40, 0.5, "x", [], {}], [*OTHER, Payload(path.parent)]
    if path.suffix == ".pt":
        torch.save(change_value(torch.load(path), rng, values), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(change_value(json.loads(path.read_text()), rng, plain)))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            data, state = archive.read("data"), torch.load(io.BytesIO(archive.read("policy.pth")))
        if rng.random() < 0.5:
            makers.write(path, change_value(json.loads(data), rng, plain), dict(state))
        else:
            makers.write(path, data, change_value(dict(state), rng, values))
    else:
        hdf5 = makers.h5py.File(path, "a") if path.suffix == ".hdf5" else None
        arrays = hdf5[rng.choice(list(hdf5))] if hdf5 else dict(np.load(path))
        name = rng.choice(list(arrays))
        array, one = np.asarray(arrays[name]), np.ones(np.shape(arrays[name]))
        del arrays[name]
        new = [array[..., None], one * np.nan, -one, one * 1e300, one.astype("S3"), one > 0]
        new += [array[:-1], array.T, array.astype("f2")] if array.ndim else [np.array("{}")]
        new += [] if hdf5 else [np.array([Payload(path.parent)] * len(np.atleast_1d(array)))]
        if rng.random() < 0.9:
            arrays[name] = rng.choice(new)
        hdf5.close() if hdf5 else np.savez(path, **arrays)


def damage(path, load):
    warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of networks without a neuron
    good, unnoticed, longest = path.read_bytes(), 0, 0.0
    for number in range(FILES):
        rng = random.Random(number)
        path.write_bytes(change_bytes(good, rng) if number % 2 else good)
        if number % 2 == 0:
            change_meaning(path, rng)
        began = time.perf_counter()
        status, lines = attempt(load)
        longest = max(longest, time.perf_counter() - began)
        assert (status, len(lines)) in ((0, 0), (2, 1)), (path, number, status, lines)
        assert not (path.parent / "canary").exists(), (path, number, "was unpickled")
        unnoticed += status == 0
        path.write_bytes(good)
    return f"{FILES - unnoticed} refused, {unnoticed} unnoticed, {longest:.1f} s the longest"


def loading(case, kind, folder):
    """A good file of this kind, and what loads it. To save time, it does little more than that."""
    module, argv, path = case.module, case.argv("--out", folder / "new"), folder / f"{kind}.pt"
    shorten(module)
    if kind in ("checkpoint", "policy"):
        with contextlib.redirect_stdout(io.StringIO()):
            case.run(folder, iterations=1)
        argv = ["--resume", folder] if kind == "checkpoint" else ["--evaluate", path]
    else:
        folder.mkdir()
        good = expert(case.env_id) if kind == "expert" else demos(case.env_id)
        good = ROOT / "experts" / "RaceCar-v0.npz" if "Race" in case.env_id else good
        path = Path(shutil.copy(good, folder))
        argv += ["--expert" if kind == "expert" else "--demos", path]

    def load():
        where = {"checkpoint": "finish", "policy": "none"}.get(kind, "start")
        setattr(module.Run, where, lambda *_, **__: os._exit(0))  # it has loaded
        return case.main(*argv)

    return path, load


def converting(kind, folder):
    folder.mkdir()
    os.chdir(folder)
    module, argv, path = makers.from_minari, ["toy"], folder / "toy" / "data" / kind
    if kind == "model.zip":
        module, argv, path = makers.convert, [kind, "--env-id", "Pendulum-v1"], folder / kind
        argv += ["--episodes", "1"]
        makers.model(env="Pendulum-v1").save(path)
    else:
        makers.dataset()
    return path, lambda: module.main([*argv, "--out", f"{time.time_ns()}"])


def jobs():
    """What stands in each row, the program, and what gives the figures, in a new folder."""
    cases = {case.script: case for case in (*WATCHING, AGGREVATED)}.values()
    for what, how in {**SIGNALS, "a file-size limit": "limit"}.items():
        for case in cases:
            count = 50 if how == signal.SIGKILL else 20
            plan = partial(stop_runs, case, how, count)
            yield f"{what} at random moments", f"{case.script}.py", plan
    for case in (WATCHING[0], AGGREVATED):  # the others load by the same text as the first
        for kind in ("checkpoint", "policy", "expert" if case.queries else "demonstrations"):
            plan = lambda folder, c=case, k=kind: damage(*loading(c, k, folder))  # noqa: E731
            yield f"damage to {kind}", f"{case.script}.py", plan
    for kind in ("model.zip", "metadata.json", "main_data.hdf5"):
        program = "experts/convert.py" if kind == "model.zip" else "experts/from_minari.py"
        yield f"damage to {kind}", program, lambda folder, k=kind: damage(*converting(k, folder))


def main():
    result = {"command": "python benchmark/reliability.py", "table": []}
    result = json.loads(RESULT.read_text()) if RESULT.exists() else result
    done = {(row["what"], row["script"]) for row in result["table"]}
    torch.set_num_threads(1)
    for what, script, measure in jobs():
        if (what, script) not in done and all(word in what for word in sys.argv[1:]):
            with tempfile.TemporaryDirectory() as scratch:
                row = {"what": what, "script": script, "figures": measure(Path(scratch, "run"))}
            print(*row.values(), flush=True)
            result["table"].append(row)
            RESULT.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
