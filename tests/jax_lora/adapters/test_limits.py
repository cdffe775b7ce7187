"""Limits of uploads: by headers alone where they can, with both numbers in the error."""

import numpy as np
import pytest
from tiny import make_adapter, make_bank

from jax_lora import Adapter, UploadLimits, save_peft
from jax_lora.adapters import peft
from jax_lora.serving import AdapterLimits


@pytest.fixture
def folder(tmp_path):
    save_peft(make_adapter(0, 4), tmp_path / "sound")
    return tmp_path / "sound"


def test_headers_tell_bytes_and_modules(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(peft.Half, "read", lambda _: pytest.fail("it reads weights"))
        header = UploadLimits(max_bytes=10_000, max_modules=2).header(folder)
        assert header.rank == 4 and len(header.modules) == 2
        for limits, error in (
            (UploadLimits(max_bytes=99), rf"sound has {header.nbytes} bytes .*; max_bytes=99"),
            (UploadLimits(max_modules=1), "sound has 2 modules; max_modules=1"),
        ):
            for read in (limits.header, limits.read):
                with pytest.raises(ValueError, match=error):
                    read(folder)
            with pytest.raises(ValueError, match=error.replace("sound", "it")):
                limits.check(header)
    assert UploadLimits().read(folder).rank == 4


def test_reading_ends_after_the_time(folder, monkeypatch):
    assert UploadLimits(max_seconds=1000).read(folder).rank == 4
    seconds = iter(range(100))
    monkeypatch.setattr(peft.time, "monotonic", lambda: next(seconds))
    with pytest.raises(ValueError, match=r"weights were not read in 3\.0 s; max_seconds=2\.5"):
        UploadLimits(max_seconds=2.5).read(folder)


def test_nan_and_links(folder, tmp_path):
    adapter = make_adapter(0, 4)
    next(iter(adapter.modules.values())).a[0, 0] = np.nan
    save_peft(Adapter(adapter.config, adapter.modules), tmp_path / "nan")
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        UploadLimits().read(tmp_path / "nan")
    assert UploadLimits(allow_nonfinite=True).read(tmp_path / "nan").rank == 4
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    for read in (UploadLimits().header, UploadLimits().read):
        with pytest.raises(ValueError, match="link"):
            read(linked)
    assert UploadLimits(allow_links=True).read(linked).rank == 4


def test_a_bank_checks_folders_within_limits(folder):
    _, bank = make_bank()
    assert bank.check_folder("x", folder, limits=UploadLimits(max_modules=2)) == 8
    for call in (bank.check_folder, bank.read):
        with pytest.raises(ValueError, match="has 2 modules; max_modules=1"):
            call("x", folder, limits=UploadLimits(max_modules=1))
    assert bank.names == ()


@pytest.mark.parametrize(
    "given, error",
    [
        ({"max_bytes": -1}, "max_bytes must be a number at least 0, got -1"),
        ({"max_modules": 1.5}, "max_modules must be a number"),
        ({"max_seconds": 0}, "max_seconds must be above 0, got 0"),
        ({"max_seconds": float("nan")}, "max_seconds must be finite"),
    ],
)
def test_limits_are_checked(given, error):
    for kind in (UploadLimits, AdapterLimits):
        with pytest.raises(ValueError, match=error):
            kind(**given)
    with pytest.raises(ValueError, match="host_bytes must be a number"):
        AdapterLimits(host_bytes=None)
