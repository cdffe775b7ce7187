"""Chat templates, against Transformers, and what is said about those that fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models

from jax_lora.demo.job import FOLDER
from jax_lora.generation import chat_prompt, complete, encode, load_tokenizer

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ bos_token + 'system\nBe kind.' + eos_token }}\n{% endif %}"
    "  {{ message['role'] + '\n' + message['content'] | trim + eos_token }}\n"
    "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}"
    "{% if tools is defined and tools %}no{% endif %}{{ {'ä': '<&>'} | tojson }}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": " What's <b>? "},
    {"role": "assistant", "content": "Bold & loud."},
    {"role": "user", "content": "Thanks"},
]


def write(folder: Path, **config: Any) -> None:
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | config))


def test_the_text_is_that_of_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a"))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHATML
    )
    expected = wrapped.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    write(tmp_path, chat_template=CHATML)
    assert chat_prompt(tmp_path, MESSAGES) == expected
    assert expected.startswith("<s>system\nBe kind.</s>") and "<b>?</s>" in expected
    wrapped.save_pretrained(tmp_path)  # as a file of its own
    assert (tmp_path / "chat_template.jinja").is_file()
    assert chat_prompt(tmp_path, MESSAGES) == expected


def test_the_default_of_several(tmp_path: Path) -> None:
    named = {"tool_use": "no", "default": "{{ messages[0].content }}"}
    several = [{"name": name, "template": text} for name, text in named.items()]
    write(tmp_path, chat_template=several)
    assert chat_prompt(tmp_path, MESSAGES) == " What's <b>? "


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (None, FileNotFoundError, "has no chat template, in neither chat_template.jinja nor tok"),
        (3, ValueError, "chat_template must be text, got 3"),
        ("{% for %}", ValueError, "the chat template of .* fails: TemplateSyntaxError"),
        ("{{ raise_exception('Users\x1b first') }}", ValueError, r"TemplateError: Users\\x1b fir"),
        ("{{ 1 + 'a' }}", ValueError, "fails: TypeError"),
        ("{{ messages.__class__.__mro__ }}", ValueError, "fails: SecurityError"),
        ("{{ messages.append(1) }}", ValueError, "fails: SecurityError"),
    ],
)
def test_templates_that_fail(
    tmp_path: Path, template: object, error: type[Exception], message: str
) -> None:
    write(tmp_path, chat_template=template)
    with pytest.raises(error, match=message):
        chat_prompt(tmp_path, MESSAGES)


def test_special_tokens_are_added_only_where_asked() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 2}, "a"))
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    assert encode(tokenizer, ["a"])[0].tolist() == [[0, 2]]
    assert encode(tokenizer, ["a"], special_tokens=False)[0].tolist() == [[2]]


@pytest.mark.ci
def test_messages_go_through_the_template(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    asked = [(None, "window")]
    with pytest.raises(FileNotFoundError, match="has no chat template"):
        complete(tmp_path / "base", {}, asked, chat=True)
    tokenizer = load_tokenizer(tmp_path / "base")
    begin = tokenizer.id_to_token(int(encode(tokenizer, ["a"])[0][0, 0]))
    template = "{{ bos_token }}{{ messages[0].content }}{% if add_generation_prompt %}:{% endif %}"
    config = {"bos_token": begin, "chat_template": template}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    found = complete(tmp_path / "base", {}, asked, chat=True)
    assert [(c.adapter, c.prompt, c.text) for c in found] == [(None, "window", "window")]
