"""What is to be served: policies, limits of names and numbers, and files that say so."""

import json

import pytest

import obmlite
from obmlite.serving import All, BatchingConfig, Latest, ModelConfig, Specific, read_config


def test_policies_choose_the_highest_first():
    there = [3, 1, 20]
    assert Latest().choose(there) == [20]
    assert Latest(2).choose(there) == [20, 3]
    assert All().choose(there) == [20, 3, 1]
    assert Specific((1, 3, 7)).choose(there) == [3, 1]
    assert Latest().choose([]) == []


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Latest(0), "n"),
        (lambda: Latest(True), "n"),
        (lambda: Specific(()), "versions"),
        (lambda: Specific((-1,)), "versions"),
        (lambda: ModelConfig("a/b", "."), "name"),
        (lambda: ModelConfig("", "."), "name"),
        (lambda: ModelConfig("a", ".", labels={"x:y": 1}), "labels"),
        (lambda: ModelConfig("a", ".", labels={"x": "1"}), "labels"),
        (lambda: ModelConfig(5, "."), "name"),
        (lambda: ModelConfig("a", ".", "latest"), "policy"),
        (lambda: ModelConfig("a", ".", verify="some"), "verify"),
        (lambda: BatchingConfig(max_batch_size=0), "max_batch_size"),
        (lambda: BatchingConfig(batch_timeout_micros=-1), "batch_timeout_micros"),
        (lambda: BatchingConfig(allowed_batch_sizes=(8, 4)), "allowed_batch_sizes"),
        (lambda: BatchingConfig(allowed_batch_sizes=(8, 16)), "allowed_batch_sizes"),
    ],
)
def test_what_cannot_be_is_refused(make, field):
    with pytest.raises(obmlite.ArgumentError) as caught:
        make()
    assert caught.value.field == field
    assert caught.value.expected
    assert caught.value.found


TOML = """
[[model]]
name = "half"
base_path = "models/half"
policy = {latest = 2}
labels = {stable = 1}
verify = "all"
warmup = false
public_key = "keys/ann.pub"
untrusted = true
[model.batching]
max_batch_size = 8
allowed_batch_sizes = [4, 8]

[[model]]
name = "other"
base_path = "/models/other"
policy = "all"
public_key = ["/keys/ann.pub", "bob.pub"]
"""

HALF = ModelConfig(
    "half",
    "models/half",
    Latest(2),
    {"stable": 1},
    BatchingConfig(max_batch_size=8, allowed_batch_sizes=(4, 8)),
    "all",
    False,
    untrusted=True,
)


def test_a_file_names_models(tmp_path):
    path = tmp_path / "models.toml"
    path.write_text(TOML)
    half, other = read_config(path)
    found = {"base_path": str(tmp_path / "models/half"), "public_key": [str(tmp_path / "keys/ann.pub")]}
    assert half == ModelConfig(**{**vars(HALF), **found})
    assert other == ModelConfig(
        "other", "/models/other", All(), public_key=["/keys/ann.pub", str(tmp_path / "bob.pub")]
    )
    path = tmp_path / "models.json"
    path.write_text(json.dumps({"model": [{"name": "a", "base_path": "b", "policy": {"specific": [2, 1]}}]}))
    assert read_config(path) == [ModelConfig("a", str(tmp_path / "b"), Specific((2, 1)))]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[model]", "A configuration is malformed."),
        ("\xff", "A configuration is malformed."),
        ("", "A configuration names no models."),
        ("model = []", "A configuration names no models."),
        ("models = 1", "A configuration names no models."),
        ("model = [1]", "A configuration lacks a key, or has one that is not known."),
        ("[[model]]\nname = 'a'", "A configuration lacks a key, or has one that is not known."),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\nbatch = 1", "A configuration lacks a key, or has one"),
        ("[[model]]\nname = 1\nbase_path = 'b'", "A model's configuration has a value of another type."),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\nlabels = 1", "A model's configuration has a value of another type."),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\nuntrusted = 'yes'", "A model's configuration has a value of another"),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\npublic_key = 1", "A model's configuration has a value of another"),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\npublic_key = []", "A model's configuration has a value of another"),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\npublic_key = ['']", "A model's configuration has a value of another"),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\npolicy = 'some'", "There is no such policy."),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\npolicy = {latest = 'x'}", "A number is no number"),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\nbatching = {size = 1}", "A configuration lacks a key"),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\nbatching = {allowed_batch_sizes = 1}", "are no list"),
        ("[[model]]\nname = 'a'\nbase_path = 'b'\n" * 2, "A configuration names a model twice."),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, text, problem):
    path = tmp_path / "models.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(obmlite.ArgumentError, match=problem) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_a_deep_file_is_refused(tmp_path):
    path = tmp_path / "models.json"
    path.write_text("[" * 100_000)
    with pytest.raises(obmlite.ArgumentError, match="malformed"):
        read_config(path)
