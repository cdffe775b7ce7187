"""One server for all tests of it: a real process, since its start takes longest."""

import shutil

import httpx
import pytest

from benchmarks.server_process import ServerProcess
from jax_lora.demo import job

# Copied, so that no test may change the package.
_HERE, _LATER = ("upper", "reverse", "rot13"), "sort"


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folders of the demo's model, of three adapters and one in a folder that is none, and of a
    fourth that is linked from outside."""
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(job.FOLDER / "base", root / "base")
    for name in _HERE:
        shutil.copytree(job.FOLDER / "adapters" / name, root / "adapters" / name)
    shutil.copytree(job.FOLDER / "adapters" / _LATER, root / _LATER)
    shutil.copytree(job.FOLDER / "adapters" / _LATER, root / "adapters" / ".later" / _LATER)
    (root / "adapters" / "link").symlink_to(root / _LATER)
    return root


@pytest.fixture(scope="session")
def server(model, tmp_path_factory):
    options = ["--base", str(model / "base"), "--adapters", str(model / "adapters")]
    options += ["--name", "demo", "--slots", "2", "--rows", "8", "--max-waiting", "40"]
    programs = tmp_path_factory.mktemp("programs")
    with ServerProcess([*options, "--max-body", "4000"], programs) as process:
        yield process


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, headers=server.HEADERS, timeout=60) as client:
        yield client
