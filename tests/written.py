"""Read what a run wrote, and what an attacker would have written."""

import json

import pytest
import torch


def weights(folder):
    return torch.load(folder / "policy.pt", weights_only=True)["weights"]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(ours, theirs):
    """Are these weights the same to the last bit?"""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def read_json(path):
    """Strict JSON: NaN and Infinity are refused."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def contents(folder):
    return {x: x.read_bytes() if x.is_file() else None for x in sorted(folder.rglob("*"))}


class Payload:
    """Unpickling this writes a file, the canary."""

    def __init__(self, folder):
        self.canary = str(folder / "canary")

    def __reduce__(self):
        return open, (self.canary, "w")
