"""Clients that go away, limits and errors, over an engine whose steps take 50 ms and compute
nothing: what is tested is the host's side."""

import json
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from tiny_decoder import letters, make_model

from jax_lora.serving import Engine, StepShape
from jax_lora.serving.engine.step import Outputs
from jax_lora.serving.server.app import Server
from jax_lora.serving.server.asking import Served
from jax_lora.serving.server.errors import without_places
from jax_lora.serving.server.limits import Limits

pytestmark = pytest.mark.ci

ROWS = 4


def slow_step(inputs):
    time.sleep(0.05)
    tokens = np.full(ROWS, 5, np.int32)
    return Outputs(tokens, np.zeros(ROWS, np.float32), np.ones(ROWS, bool), None)


@pytest.fixture(scope="module")
def engine():
    model, bank = make_model()
    shape = StepShape(rows=ROWS, max_length=64, block=16)
    with Engine(model, bank, letters(), shape=shape) as engine:
        engine._stepper.run = slow_step
        yield engine


@pytest.fixture(scope="module")
def address(engine, tmp_path_factory):
    """A running server without a key, whose model has no chat template."""
    served = Served(engine, tmp_path_factory.mktemp("base"), "demo")
    server = Server(served, [], Limits(rows_per_key=6))
    running = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield running.servers[0].sockets[0].getsockname()
    running.should_exit = True
    thread.join()


@pytest.fixture
def client(address):
    with httpx.Client(base_url="http://{}:{}".format(*address), timeout=60) as client:
        yield client


def ask(address, **asked):
    """A connection on which a completion was asked for."""
    body = json.dumps({"model": "demo", "prompt": "AB", "max_tokens": 60, **asked}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    peer = socket.create_connection(address)
    peer.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return peer


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", [socket.socket.close, lambda peer: peer.shutdown(socket.SHUT_WR)])
def test_a_client_that_goes_away_frees_its_rows_within_two_steps(engine, address, stream, leave):
    """One step that was launched before the server knew, and one during which it came to know."""
    with ask(address, n=ROWS, stream=stream) as peer:
        before = engine.steps
        wait_until(lambda: engine.steps >= before + 3)
        assert engine.num_open == ROWS
        leave(peer)
        left = engine.steps
        wait_until(lambda: engine.num_open == 0)
    assert engine.steps - left <= 2


def test_a_request_that_waits_is_dropped_with_its_client(engine, address):
    with ask(address, n=ROWS) as running:
        wait_until(lambda: engine.num_open == ROWS)
        with ask(address, stream=True, n=2):
            wait_until(lambda: engine.num_open == ROWS + 2)
        left = engine.steps
        wait_until(lambda: engine.num_open == ROWS)
        assert engine.steps - left <= 2
        running.close()
    wait_until(lambda: engine.num_open == 0)


def test_a_key_has_so_many_rows(client):
    asked = {"model": "demo", "prompt": "AB", "max_tokens": 1}
    assert client.post("/v1/completions", json={**asked, "n": 6}).status_code == 200
    response = client.post("/v1/completions", json={**asked, "n": 7})
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert "may have 6" in response.json()["error"]["message"]


def test_without_keys_nobody_loads(client):
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert client.post(path, json={}).status_code == 403
    assert client.get("/v1/models").status_code == 200


def test_an_error_tells_nobody_where_the_server_keeps_its_files(client, tmp_path):
    messages = [{"role": "user", "content": "A"}]
    response = client.post("/v1/chat/completions", json={"model": "demo", "messages": messages})
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and "has no chat template" in message
    assert "/" not in message, message
    error = ValueError(f"{tmp_path}/new/adapter_config.json: no rank; see {tmp_path}")
    told = without_places(error, tmp_path, None, Path("/nowhere"))
    assert told == f"new/adapter_config.json: no rank; see {tmp_path.name}"
