"""How a server's process ends. Tests are run in the order of their files, and none stands behind
this one that wants the server."""

import concurrent.futures
import json
import threading

import httpx
import pytest

pytestmark = pytest.mark.ci

ASKED = {"model": "upper", "prompt": "window:", "temperature": 0, "stream": True}
LONG = {**ASKED, "ignore_eos": True, "max_tokens": 50}
STREAMS = 40  # of 8 rows: most of them wait


def texts(body):
    """That of an answer which came to its end."""
    *events, done, _ = body.split(b"\n\n")
    choices = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
    assert done == b"data: [DONE]" and choices[-1]["finish_reason"] == "length"
    return "".join(choice["text"] for choice in choices)


def test_sigterm_ends_when_what_is_under_way_has_its_answer(server, client):
    whole = texts(client.post("/v1/completions", json=LONG).content)
    assert whole.startswith("WINDOW")
    begun = threading.Barrier(STREAMS + 1)

    def stream(_):
        body = b""
        with client.stream("POST", "/v1/completions", json=LONG) as response:
            assert response.status_code == 200
            begun.wait(60)
            for part in response.iter_bytes():
                body += part
        return body

    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        answers = pool.map(stream, range(STREAMS))
        begun.wait(60)
        server.stop()
        for body in answers:
            assert texts(body) == whole
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    assert server.wait(30) == 0
