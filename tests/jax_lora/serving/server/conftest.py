"""One server for all tests of it: a real process, since its start takes longest."""

import httpx
import pytest

from benchmarks.server_process import demo_server


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder with the server's model and adapters; see `demo_server`."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def server(root):
    with demo_server(root) as process:
        yield process


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, headers=server.HEADERS, timeout=60) as client:
        yield client
