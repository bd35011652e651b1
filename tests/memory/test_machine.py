"""Machine profiles: measured, kept, overridden, and what is said of files that cannot be used."""

import json
import time
from dataclasses import asdict, fields, replace

import pytest
import torch

from rewriter.memory import machine
from rewriter.memory import measured as measuring
from rewriter.memory.machine import H200, KNOWN, Machine, MachineError, machine_for
from rewriter.memory.measured import measure


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("REWRITER_MACHINE", raising=False)


device = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_device_is_measured_in_seconds_and_all_rates_are_positive():
    state = torch.random.get_rng_state()
    start = time.monotonic()
    machine = measure(device)
    assert time.monotonic() - start < 10
    assert all(getattr(machine, field.name) > 0 for field in fields(machine) if field.type is not str)
    assert torch.equal(state, torch.random.get_rng_state()), "the user's random numbers"


def test_a_measurement_is_kept_for_the_next_time(tmp_path, monkeypatch):
    measured = replace(H200, name="made up")
    monkeypatch.setattr(measuring, "measure", lambda device: measured)
    assert machine_for(device) == measured
    monkeypatch.setattr(measuring, "measure", lambda device: pytest.fail("measured again"))
    assert machine_for(device) == measured
    (file,) = (tmp_path / "rewriter").iterdir()
    assert torch.__version__.split("+")[0] in file.name


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "rewriter").write_text("a file where the directory should be")
    monkeypatch.setattr(measuring, "measure", lambda device: H200)
    with pytest.warns(UserWarning, match="cannot be written"):
        assert machine_for(device) == H200


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce GTX 970", "L4"),
    ],
)
def test_a_device_without_room_to_be_measured_is_taken_for_a_known_one(tmp_path, monkeypatch, name, taken):
    def full(device):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(measuring, "measure", full)
    monkeypatch.setattr(machine, "device_name", lambda device: name)
    assert machine_for(device) == replace(KNOWN[taken], name=f"{taken}, assumed")
    assert not (tmp_path / "rewriter").exists(), "measured when there is room"


def test_a_file_takes_the_place_of_the_device(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    mine = replace(H200, name="mine", bandwidth=1e12)
    mine.save(path)
    monkeypatch.setenv("REWRITER_MACHINE", str(path))
    assert machine_for(device) == machine_for("L4") == mine
    monkeypatch.setenv("REWRITER_MACHINE", "RTX 4090")
    assert machine_for(device) == KNOWN["RTX 4090"]


def test_known_cards_need_no_device():
    assert machine_for("H200") is H200
    assert {"RTX 4090", "A100 80GB", "H100 80GB", "L4"} <= KNOWN.keys()
    assert all(machine.matrix_flops < H200.matrix_flops * 1.001 for machine in KNOWN.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bandwidth": None}, "'bandwidth' is None, not a number above 0"),
        ({"to_host": -1}, "'to_host' is -1"),
        ({"launch_seconds": True}, "'launch_seconds' is True"),
        ({"name": 7}, "'name' is 7, not a text"),
        ({"bandwith": 1.0}, "has 'bandwith', which is none of name, device_bytes"),
    ],
)
def test_malformed_fields_are_named(tmp_path, change, said):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**asdict(H200), **change}))
    with pytest.raises(MachineError, match=said):
        Machine.load(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "not an object"),
        ('{"name": "x"}', "lacks 'device_bytes', 'matrix_flops'"),
    ],
)
def test_malformed_files_are_named(tmp_path, content, said):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(MachineError, match=f"bad.json .*{said}"):
        Machine.load(path)


def test_a_missing_file_is_named(monkeypatch):
    monkeypatch.setenv("REWRITER_MACHINE", "/nowhere/machine.json")
    with pytest.raises(MachineError, match="/nowhere/machine.json: No such file"):
        machine_for(device)
