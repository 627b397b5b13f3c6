"""Proves that no index, however damaged or hostile, is taken, and that the error is always a UserError.

python -m pytest tests/unit/test_data_index.py
"""

import hashlib
import json
import os
import random

import numpy as np
import pytest

from sivae.data import Index, index
from sivae.data.pack import pack
from sivae.errors import UserError
from sivae.storage import Folder


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rewrite(folder, change):
    """Apply `change` to the parsed index.json and make its digest fit again, as an attacker would."""
    path = os.path.join(folder, "index.json")
    with open(path) as file:
        content = json.load(file)
    content.pop("digest")
    content = change(content) or content
    if isinstance(content, dict):
        hashed = {name: value for name, value in content.items() if name != "base"}  # see Index.digest
        content["digest"] = hashlib.sha256(index._canonical(hashed)).hexdigest()
    with open(path, "w") as file:
        json.dump(content, file)


def test_every_mutated_field_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=noise(6, 4, 4), labels=np.arange(6))
    pack(tmp_path / "a.npz", tmp_path / "set", resolution=4, samples_per_shard=3, progress=False)
    path, folder = tmp_path / "set" / "index.json", str(tmp_path / "set")
    whole = path.read_text()
    rewrite(folder, lambda c: None)
    Index.load(Folder(folder))  # the helper itself is right

    nasty = [None, True, -1, 1.5, "", "x", [], {}, [None], 2**63, 10**30, float("nan"), "../../x"]
    fields = json.loads(whole)
    places = [(k,) for k in fields if k != "digest"]
    places += [("shards", 0, k) for k in fields["shards"][0]] + [("samples", k) for k in fields["samples"]]
    places += [("samples", k, 2) for k in fields["samples"]] + [("shards", 1)]
    refused = 0
    for place in places:
        for value in nasty:
            if place[-1] in ("source", "licence", "crop", "filter") and isinstance(value, str):
                continue  # any text is right there
            if place == ("base",) and (value is None or isinstance(value, str) and value):
                continue  # whose index one reads may name any folder; what is read there is checked
            if (place[0], value) in (("quality", None), ("skipped", [])) or (place[-1] == "crc32" and value is None):
                continue  # nothing known is right there
            if place == ("samples", "key", 2) and isinstance(value, str) and value:
                continue  # a key is only a name: never a path that is opened
            if place == ("shards", 0, "name") and value == "x":
                continue
            path.write_text(whole)

            def change(content, place=place, value=value):
                *parents, last = place
                for parent in parents:
                    content = content[parent]
                content[last] = value

            rewrite(folder, change)
            with pytest.raises(UserError, match=r"index\.json"):
                Index.load(Folder(folder))
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["shards"][0].update(name="../train-000000.tar"),
        lambda c: c["shards"][0].update(name="/etc/passwd"),
        lambda c: c["shards"][0].update(name=".."),
        lambda c: c["shards"][0].update(name="a\x00b"),
        lambda c: c["shards"][0].update(name="s3://elsewhere"),
        lambda c: c["shards"][0].update(name=c["shards"][1]["name"]),
        lambda c: c["shards"][0].update(size_bytes=100),
        lambda c: c["shards"][0].update(count=4),
        lambda c: c["samples"]["key"].__setitem__(0, c["samples"]["key"][1]),
        lambda c: c["samples"]["key"].__setitem__(0, "\ud800"),
        lambda c: c["samples"]["key"].__setitem__(0, "a\nb"),
        lambda c: c["samples"]["offset"].__setitem__(1, c["samples"]["offset"][0]),
        lambda c: c["samples"]["size"].__setitem__(2, 2**22),
        lambda c: c["samples"]["size"].__setitem__(2, 2**20),  # past the end of its shard
        lambda c: c.update(splits=[["a", 2], ["b", 4]]),  # a split that ends inside a shard
        lambda c: c["samples"]["label"].__setitem__(0, 6),  # the classes are 0 to 5
        lambda c: c.update(num_channels=2),
        lambda c: c.update(num_classes=None),
        lambda c: c.update(extra=1),
        lambda c: c.pop("licence") and None,
        lambda c: c.update(version=1),
        lambda c: c.update(resolution=10**6),
        lambda c: c.update(shards=[], samples={k: [] for k in c["samples"]}, count=0),
        lambda c: [c],
    ],
)
def test_hostile_indexes_are_refused(tmp_path, change):
    np.savez(tmp_path / "a.npz", images=noise(6, 4, 4), labels=np.arange(6))
    pack(tmp_path / "a.npz", tmp_path / "set", resolution=4, samples_per_shard=3, progress=False)
    rewrite(str(tmp_path / "set"), change)
    with pytest.raises(UserError, match=r"index\.json"):
        Index.load(Folder(tmp_path / "set"))


def test_mutated_bytes_of_an_index_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", noise(6, 4, 4))
    made = pack(tmp_path / "a.npy", tmp_path / "set", resolution=4, samples_per_shard=4, progress=False)
    path, folder = tmp_path / "set" / "index.json", tmp_path / "set"
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.randint(0, len(data))] if draw.random() < 0.2 else data)
        try:
            assert Index.load(Folder(folder)).digest == made.digest  # a byte that was replaced by itself
        except UserError as error:
            assert "index.json" in str(error)
    path.write_text("[" * 100000)
    with pytest.raises(UserError, match="index.json"):
        Index.load(Folder(folder))
