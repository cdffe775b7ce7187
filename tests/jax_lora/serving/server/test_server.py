"""The server's routes, as clients see them, over the bundled model."""

import json

import pytest

pytestmark = pytest.mark.ci

WINDOW = {"prompt": "window:", "temperature": 0}


def events(response):
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_each_adapter_is_a_model(client):
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["demo", "reverse", "rot13", "upper"]
    for name, text in {"demo": "window", "reverse": "wodniw", "upper": "WINDOW"}.items():
        answer = client.post("/v1/completions", json={**WINDOW, "model": name}).json()
        assert answer["object"] == "text_completion" and answer["model"] == name
        assert answer["choices"][0]["text"] == text
        assert answer["choices"][0]["finish_reason"] == "stop"
        use = answer["usage"]
        assert use["total_tokens"] == use["prompt_tokens"] + use["completion_tokens"] > 0


def test_a_stream_adds_up_to_the_answer(client):
    asked = {**WINDOW, "model": "upper", "n": 2, "stream": True, "logprobs": 1}
    asked["stream_options"] = {"include_usage": True}
    response = client.post("/v1/completions", json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == "WINDOW"
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]
        told = [v for c in own if c["logprobs"] for v in c["logprobs"]["token_logprobs"]]
        assert told and all(value <= 0 for value in told)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 2 * len(told)


def test_a_chat(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "window:"}]}]
    asked = {"model": "reverse", "messages": messages, "temperature": 0, "logprobs": True}
    answer = client.post("/v1/chat/completions", json=asked).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "wodniw"
    chunks = events(client.post("/v1/chat/completions", json={**asked, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == "wodniw"


def test_parameters_reach_the_engine(client):
    def ask(**more):
        asked = {**WINDOW, "model": "upper", **more}
        return client.post("/v1/completions", json=asked).json()["choices"]

    assert ask(stop="D")[0]["text"] == "WIN"
    assert ask(max_tokens=2)[0]["finish_reason"] == "length"
    long = ask(ignore_eos=True, max_tokens=30, logprobs=0)[0]
    assert len(long["logprobs"]["tokens"]) == 30 and long["finish_reason"] == "length"
    drawn = [ask(temperature=5.0, seed=seed, n=2) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0]["text"] != drawn[0][1]["text"]


@pytest.mark.parametrize(
    ("status", "change"),
    [
        (404, {"model": "nobody"}),
        (400, {"temperature": -1}),
        (400, {"temperature": "\x1b[2J"}),
        (400, {"prompt": []}),
        (400, {"prompt": [1, 10**9]}),
        (400, {"prompt": "\ud800"}),
        (400, {"max_tokens": 1000}),
        (400, {"stop": [""]}),
        (400, {"logit_bias": {"5": 1}}),
        (400, {"logprobs": 5}),
        (400, {"n": 65}),
        (429, {"n": 64}),
        (400, {"stream": 1}),
        (413, {"prompt": "a" * 5000}),
    ],
)
def test_a_malformed_body_gets_an_error_in_openais_form(client, status, change):
    body = json.dumps({**WINDOW, "model": "upper", **change})
    headers = {"Content-Type": "application/json"}
    response = client.post("/v1/completions", content=body, headers=headers)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert {*error} == {"message", "type", "param", "code"} and error["message"].isprintable()


def test_what_is_no_request_gets_an_error_too(client):
    assert client.post("/v1/completions", content=b"{}").status_code == 415
    headers = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"\xff", b"[1]", b"[" * 3000):
        assert client.post("/v1/completions", content=body, headers=headers).status_code == 400
    assert client.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/completions").status_code == 405
    for path in ("/v1/models", "/v1/models/upper"):
        assert client.get(path, headers={"Authorization": "Bearer x"}).status_code == 401
    assert client.post("/v1/completions", headers={"Authorization": ""}).status_code == 401


def test_adapters_load_from_below_the_folder_alone(client, root):
    def load(path, name="new", **more):
        body = {"lora_name": name, "lora_path": path, **more}
        return client.post("/v1/load_lora_adapter", json=body).status_code

    for outside in ("../sort", str(root / "sort"), "link", "", ".", "/etc", "a\0b"):
        assert load(outside) == 400, outside
    assert load("nothing") == 404
    assert load("upper", "demo") == load("upper", "upper") == 409
    assert load(".later/sort") == 200 and load(".later/sort") == 409
    asked = {**WINDOW, "model": "new"}
    answer = client.post("/v1/completions", json=asked).json()
    assert answer["choices"][0]["text"] == "dinoww"
    unload = {"lora_name": "new"}
    statuses = [client.post("/v1/unload_lora_adapter", json=unload).status_code for _ in "ab"]
    assert statuses == [200, 404]
    assert client.post("/v1/completions", json=asked).status_code == 404


def test_a_tenant_keeps_its_slot_while_others_take_turns(client, server):
    """rot13 has the one that is kept for it; two others share the other one of rank 16."""

    def ask(name):
        answer = client.post("/v1/completions", json={**WINDOW, "model": name})
        return answer.json()["choices"][0]["text"]

    def count(what):
        return server.metric(f'jax_lora_bucket_{what}{{rank="16"}}')

    assert ask("rot13") == "jvaqbj" and count("slots") == 2 and count("reserved") == 0
    for name in ("one", "two"):
        body = {"lora_name": name, "lora_path": ".later/sort"}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    loads = count("loads_total")
    for name in ("one", "two", "one", "rot13"):
        assert ask(name) == ("jvaqbj" if name == "rot13" else "dinoww")
    assert count("loads_total") == loads + 3
    for name in ("one", "two"):
        client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_health_metrics_and_page(client):
    assert client.get("/health").json() == {"status": "ok"}
    text = client.get("/metrics").text
    assert "jax_lora_generation_tokens_total" in text and 'jax_lora_bucket_slots{rank="' in text
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text  # it needs nothing from elsewhere
