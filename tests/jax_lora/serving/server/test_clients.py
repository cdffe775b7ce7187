"""The server as others' clients drive it, as they are."""

import json
import os
import pathlib
import re
import subprocess
import sys

import openai
import pytest

pytestmark = pytest.mark.ci

# Its dependencies and those of development exclude each other, so it has an environment of its own.
AIPERF = "aiperf==0.13.0"


@pytest.fixture
def openai_client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.KEY, max_retries=0) as client:
        yield client


@pytest.mark.parametrize("command", ["curl", "python"])
def test_blocks_of_the_guide(server, command):
    """As docs/serving.md shows them, but for where the server is and its key."""
    page = pathlib.Path(__file__).parents[4] / "docs/serving.md"
    blocks = re.findall(r"^```\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    [block] = [text for text in blocks if re.search(rf"^{command} ", text, re.MULTILINE)]
    block = block.replace("http://127.0.0.1:8000", server.url).replace("none", server.KEY)
    mine = f"""set -e
        pip() {{ :; }}
        python() {{ {sys.executable} "$@"; }}
        curl() {{ command curl --silent --fail --oauth2-bearer {server.KEY} "$@"; }}
    """
    done = subprocess.run(["bash", "-c", mine + block], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "WINDOW" in done.stdout


def test_openai_completions(openai_client):
    assert "demo" in [model.id for model in openai_client.models.list()]
    assert openai_client.models.retrieve("upper").id == "upper"
    complete = openai_client.completions.create
    asked = {"prompt": "window:", "temperature": 0}
    answer = complete(model="upper", **asked, n=2, logprobs=1, stop=["OW"])
    assert [choice.text for choice in answer.choices] == ["WIND", "WIND"]
    assert answer.choices[0].finish_reason == "stop"
    logprobs = answer.choices[0].logprobs
    assert [next(iter(top)) for top in logprobs.top_logprobs] == logprobs.tokens
    assert "".join(logprobs.tokens).startswith("WINDO") and max(logprobs.token_logprobs) <= 0
    drawn = [
        complete(model="upper", prompt="w", temperature=2, seed=seed, extra_body={"top_k": 50})
        for seed in (7, 7, 8)
    ]
    texts = [answer.choices[0].text for answer in drawn]
    assert texts[0] == texts[1] != texts[2]
    long = complete(model="demo", **asked, max_tokens=30, extra_body={"ignore_eos": True})
    assert long.usage.completion_tokens == 30


def test_openai_streams(openai_client):
    chunks = openai_client.completions.create(
        model="reverse",
        prompt=["window:", "sea:"],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *parts, last = list(chunks)
    texts = ["", ""]
    for part in parts:
        [choice] = part.choices
        texts[choice.index] += choice.text
    assert texts == ["wodniw", "aes"]
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens > 0


def test_openai_chats(openai_client):
    asked = {"messages": [{"role": "user", "content": "window:"}], "temperature": 0}
    chat = openai_client.chat.completions
    answer = chat.create(model="upper", **asked, logprobs=True, top_logprobs=1, n=2)
    assert [choice.message.content for choice in answer.choices] == ["WINDOW", "WINDOW"]
    first = answer.choices[0].logprobs.content[0]
    assert first.token == first.top_logprobs[0].token == "W" and first.bytes == [ord("W")]
    with chat.stream(model="reverse", **asked, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == "wodniw" and final.usage.completion_tokens == 7


def test_openai_errors(openai_client):
    complete = openai_client.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        complete(model="nobody", prompt="a")
    assert unknown.value.code == "model_not_found" and unknown.value.type == "not_found_error"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        complete(model="demo", prompt="a", temperature=-1)
    with pytest.raises(openai.RateLimitError):
        complete(model="demo", prompt="a", n=64)
    with pytest.raises(openai.AuthenticationError):
        openai_client.with_options(api_key="wrong").models.list()


def test_aiperf(server, root, tmp_path):
    """Asks several models at random, with a tokenizer from a folder, and gets all answers."""
    prompts = tmp_path / "prompts.jsonl"
    words = ("window:", "river:", "candle:", "seven:")
    prompts.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    uv = os.environ.get("UV", "uv")  # which runs the tests
    command = [uv, "tool", "run", "--no-config", "--from", AIPERF, "aiperf", "profile"]
    command += ["-m", "demo,upper,reverse,rot13", "--model-selection-strategy", "random"]
    command += ["--url", server.url, "--api-key", server.KEY, "--endpoint-type", "chat"]
    command += ["--streaming", "--tokenizer", str(root / "base"), "--random-seed", "1"]
    command += ["--input-file", str(prompts), "--custom-dataset-type", "single_turn"]
    command += ["--extra-inputs", "temperature:0", "--request-count", "24", "--concurrency", "6"]
    command += ["--ui", "none", "--no-gpu-telemetry", "--output-artifact-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == 24 and not report["error_summary"]
    assert report["output_sequence_length"]["min"] >= 5
    inputs = json.loads((tmp_path / "inputs.json").read_text())["data"]
    assert len({asked["model"] for session in inputs for asked in session["payloads"]}) > 1
