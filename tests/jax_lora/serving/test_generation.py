"""Text in and out: what a tokenizer's file, a config and a prompt may ask for."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from jax_lora.cli import app
from jax_lora.demo.job import FOLDER, adapter_paths
from jax_lora.generation import complete, decode, encode, load_tokenizer

SENTENCEPIECE = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


def padding_tokenizer(side):
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "c": 3}, "[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_padding(direction=side, pad_id=0, pad_token="[PAD]", length=6)
    tokenizer.enable_truncation(4)
    return tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
def test_encode_neither_pads_nor_cuts(tmp_path, side):
    tokenizer = padding_tokenizer(side)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.padding is None and loaded.truncation is None
    for given in (tokenizer, loaded):
        tokens, lengths = encode(given, ["a b", "a b c a b c a b c"])
        assert lengths.tolist() == [2, 9]
        assert tokens.tolist() == [[1, 2, 0, 0, 0, 0, 0, 0, 0], [1, 2, 3] * 3]
    assert tokenizer.padding["length"] == 6 and tokenizer.truncation["max_length"] == 4


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "at least one prompt"),
        ("a b", TypeError, "prompts must be a list of str, got 'a b'"),
        ([3], TypeError, r"prompts must be a list of str, got \[3\]"),
        (["a", ""], ValueError, "the prompt '' has no token"),
        (["a \udce9"], ValueError, r"the prompt 'a \\udce9' is no Unicode text: surrogates"),
    ],
)
def test_encode_refuses(prompts, error, message):
    with pytest.raises(error, match=message):
        encode(padding_tokenizer("left"), prompts)


def sentencepiece():
    pieces = ["<unk>", "<s>", "</s>", "▁Good", "▁morning", "▁everyone", "!", "▁"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, "<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.decoder = SENTENCEPIECE
    return tokenizer


def byte_tokens(text):
    return [8 + byte for byte in text.encode()]


@pytest.mark.parametrize(
    ("prompt", "new", "text"),
    [
        ([1, 3, 4], [5, 6], " everyone!"),
        ([3, 4], [5, 2, 6], " everyone"),  # ends at </s>
        ([1, 3, 4], [1, 5], " everyone"),  # a special token has no text
        ([3, 7], [3], " Good"),
        ([1], [5, 6], "everyone!"),  # after an empty prompt the text begins
        ([3], byte_tokens("é"), "é"),
        ([3, *byte_tokens("世")[:2]], [*byte_tokens("世")[2:], 6], "世!"),
        ([3], [], ""),
        (None, [5, 6], " everyone!"),
        (None, byte_tokens("世"), "世"),
    ],
)
def test_decode_continues_the_prompt(prompt, new, text):
    got = decode(sentencepiece(), np.array(new, np.int32), np.array([2]), prompt_ids=prompt)
    assert got == text


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), decoders.WordPiece(), SENTENCEPIECE])
def test_prompt_and_completion_together_are_the_whole_text(decoder):
    words = ["▁Hello", "▁world", "Hello", "##s", "world", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "."))
    tokenizer.decoder = decoder
    ids = [2, 3, 4] if isinstance(decoder, decoders.WordPiece) else [0, 1, 5]
    for cut in range(len(ids) + 1):
        new = decode(tokenizer, np.array(ids[cut:]), np.array([]), prompt_ids=ids[:cut])
        assert tokenizer.decode(ids[:cut]) + new == tokenizer.decode(ids)


def test_a_byte_level_character_that_the_prompt_began_is_whole():
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = tokenizer.encode("a 世界").ids
    assert len(ids) == 8
    assert decode(tokenizer, np.array(ids[4:]), np.array([]), prompt_ids=ids[:4]) == "世界"
    assert decode(tokenizer, np.array(ids[1:]), np.array([])) == " 世界"


def alphabet():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({}, FileNotFoundError, "has no tokenizer.json; download that of the model"),
        ({"tokenizer.model": "x"}, FileNotFoundError, r"convert tokenizer.model.*save_pretrained"),
        ({"vocab.json": "{}"}, FileNotFoundError, r"convert vocab.json.*save_pretrained"),
        (
            {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9"},
            ValueError,
            "tokenizer.json is a pointer of Git LFS.*git lfs pull",
        ),
        ({"tokenizer.json": "{"}, ValueError, "tokenizer.json' is no tokenizer: EOF"),
    ],
)
def test_what_is_wrong_with_tokenizer_json_and_what_helps(tmp_path, files, error, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        load_tokenizer(tmp_path)


def test_a_base_that_is_no_folder():
    with pytest.raises(FileNotFoundError, match="nowhere'; give one, or OWNER/MODEL"):
        load_tokenizer(FOLDER / "nowhere")


@pytest.fixture
def without_weights(tmp_path):
    """A base of which only the small files are there: what is refused is refused before them."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(FOLDER / "base" / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(("letters", "new"), [(63, 1), (46, 18), (70, 1), (70, None), (63, None)])
def test_a_prompt_beyond_the_positions_is_refused_before_weights_are_read(
    without_weights, letters, new
):
    # The beginning of text is a token too.
    message = (
        rf"prompt of {letters + 1} tokens and max_new_tokens={new or 1} exceed .* 64 positions"
    )
    with pytest.raises(ValueError, match=message):
        complete(without_weights, {}, [(None, "a"), (None, "a" * letters)], max_new_tokens=new)


def test_the_command_refuses_a_prompt_beyond_the_positions(without_weights):
    command = ["generate", "--base", str(without_weights), "--prompt", ":" + "a" * 90]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "a prompt of 91 tokens" in result.stderr and "64 positions" in result.stderr


def test_a_completion_has_by_default_the_room_that_the_prompt_leaves():
    (found,) = complete(FOLDER / "base", {}, [(None, "window:")])
    assert found.text == "window"


def test_an_adapter_that_is_not_given_is_refused_first(tmp_path):
    with pytest.raises(KeyError, match="no adapter 'x'; given: upper"):
        complete(tmp_path, {"upper": adapter_paths()["upper"]}, [("x", "a")], max_new_tokens=1)


def test_generation_config_ends_a_completion(tmp_path):
    shutil.copytree(FOLDER / "base", tmp_path / "base")
    letter = load_tokenizer(FOLDER / "base").token_to_id("d")
    (tmp_path / "base" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [letter, 2]})
    )
    (found,) = complete(tmp_path / "base", {}, [(None, "window:")], max_new_tokens=12)
    assert found.text == "win"
