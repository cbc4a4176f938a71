"""What the programs of this folder have in common: errors of one line, and files that are whole."""

import argparse
import contextlib
import io
import json
import os
import sys

import numpy as np


class BadInput(Exception):
    """Something that the user can fix: one line on stderr, exit status 2."""


class Unwritten(OSError):
    """The result cannot be written: one line on stderr, exit status 1."""


def check(condition, message):
    if not condition:
        raise BadInput(message)


def say(text):
    """Print a line. A stream that is closed or full must not change the exit status."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        sys.stdout = None  # or Python would try again at its end


class Parser(argparse.ArgumentParser):
    """Errors without the usage before them; help into a closed stream without noise."""

    def __init__(self, program, description):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(program, None, description, formatter_class=form, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())[:400]}\n")

    def print_help(self, file=None):
        say(self.format_help())

    @contextlib.contextmanager
    def converting(self, path):
        """Whatever goes wrong with the file inside becomes one line and the exit status."""
        try:
            yield
        except KeyboardInterrupt:
            self.exit(130, f"{self.prog}: stopped, nothing is written\n")
        except Unwritten as error:
            self.exit(1, f"{self.prog}: {error}\n")
        except Exception as error:  # damaged files fail in as many ways as there are readers
            known = isinstance(error, BadInput)
            name = "" if known else f"cannot be read: {type(error).__name__}: "
            self.error(f"{path}: {name}{error}")


def write(path, save, replace=False):
    """Call save(file). The whole file or nothing, and over another one only if that is wanted."""
    whole = io.BytesIO()  # on a full disk torch.save hides the error, and NumPy 1 prints another
    save(whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(whole.getbuffer())
        check(replace or not path.exists(), f"{path} exists by now, expected a new file")
        os.replace(temporary, path)
    except OSError as error:
        raise Unwritten(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_demonstrations(path, episodes, metadata):
    """Write episodes, dicts of observations, actions, rewards and terminated, for the scripts:
    float32, integer actions int64, and the metadata as JSON in a 0-d string. Gives the returns."""
    columns = {key: [episode[key] for episode in episodes] for key in episodes[0]}
    actions = np.concatenate(columns["actions"])
    returns = [float(rewards.sum(dtype=float)) for rewards in columns["rewards"]]
    arrays = {
        "observations": np.concatenate(columns["observations"]),
        "actions": actions.astype(np.int64 if actions.ndim == 1 else np.float32),
        "rewards": np.concatenate(columns["rewards"]).astype(np.float32),
        "terminated": np.array(columns["terminated"]),
        "episode_starts": np.concatenate([np.arange(len(r)) == 0 for r in columns["rewards"]]),
        "metadata": np.array(json.dumps({**metadata, "returns": returns})),
    }
    write(path, lambda file: np.savez_compressed(file, **arrays))
    return returns
