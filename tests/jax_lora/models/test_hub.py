"""Names on the hub, and forms of weights that are not read: what is done, and what is said."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from jax_lora.demo.job import FOLDER, adapter_paths
from jax_lora.generation import complete
from jax_lora.llama import Llama
from jax_lora.models.hub import is_hub_name, local_folder

COMMIT = "a" * 40


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An offline cache of the hub, with the demo's base and one of its adapters."""
    sources = {"jax-lora/base": FOLDER / "base", "jax-lora/upper": adapter_paths()["upper"]}
    for name, source in sources.items():
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
        snapshot, blobs = folder / "snapshots" / COMMIT, folder / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for file in source.iterdir():
            shutil.copy(file, blobs / file.name)
            (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_of_the_hub_and_folders(cache: Path) -> None:
    (cache / "here" / "it").mkdir(parents=True)
    names = {"jax-lora/base", "jax-lora/base@main", "Qwen/Qwen2.5-0.5B@refs/pr/3"}
    others = {"here/it", "/no/such", "./no/such", "no", "no/such/one", "../no", "no/such\n", "a/.."}
    assert {name for name in names | others if is_hub_name(name)} == names
    assert local_folder("here/it") == Path("here/it")


@pytest.mark.parametrize("name", ["jax-lora/base", "jax-lora/base@main", f"jax-lora/base@{COMMIT}"])
def test_a_name_is_found_in_the_cache_of_the_hub(cache: Path, name: str) -> None:
    folder = local_folder(name)
    assert folder == cache / "models--jax-lora--base" / "snapshots" / COMMIT
    assert (folder / "config.json").is_file()


@pytest.mark.ci
def test_a_model_and_an_adapter_of_the_hub_generate(cache: Path) -> None:
    # The adapter's files are links out of its folder.
    adapters = {"upper": "jax-lora/upper"}
    (found,) = complete("jax-lora/base", adapters, [("upper", "window:")], max_new_tokens=8)
    assert found.text == "WINDOW"


def test_what_the_hub_does_not_have(cache: Path) -> None:
    message = "no folder 'jax-lora/none' here, and the hub gives no model of this name: LocalEntry"
    with pytest.raises(FileNotFoundError, match=message):
        Llama.from_pretrained("jax-lora/none")
    with pytest.raises(FileNotFoundError, match="the hub gives no model"):
        Llama.from_pretrained("jax-lora/base", revision="other")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "owner/model is gated: accept its terms .* `hf auth login`"),
        (RepositoryNotFoundError, "the hub gives no model of this name: Repos"),
    ],
)
def test_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str
) -> None:
    def refuse(*args: object, **options: object) -> None:
        error = kind.__new__(kind)
        error.args = ("401 Client Error.\n\nRepository Not Found",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=message):
        local_folder("owner/model")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.gguf"], r"a.gguf is a GGUF.*python -c .*gguf_file=.*a.gguf.*converted"),
        (["consolidated.safetensors", "params.json"], "its author's own names of weights.*hf down"),
        (["consolidated.00.pth"], "its author's own names"),
        (
            [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)],
            "holds its weights in 3 pickles, such as pytorch_model-00001.*python -c .*save_pretr",
        ),
        (["pytorch_model.bin"], "pytorch_model.bin is a pickle.*Convert it with"),
        (["model.safetensors"], "model.safetensors is a pointer of Git LFS.*git lfs pull"),
        (["model-00001-of-00001.safetensors"], "0001.safetensors is a pointer of Git LFS"),
        (["model.safetensors.index.json"], "index.json is a pointer of Git LFS"),
        (["model.safetensors", "consolidated.safetensors"], "model.safetensors is a pointer"),
    ],
)
def test_weights_that_are_not_read(tmp_path: Path, files: list[str], message: str) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(FOLDER / "base" / name, tmp_path)
    for name in files:
        (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        complete(tmp_path, {}, [(None, "a")])


def test_a_gguf_as_the_base(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("GGUF")
    with pytest.raises(ValueError, match=r"a\.gguf is a GGUF, the form of llama\.cpp"):
        complete(tmp_path / "a.gguf", {}, [(None, "a")])
