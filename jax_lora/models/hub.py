"""Where the files of a model or an adapter are: a local folder, or a name on Hugging Face's hub."""

import os
import re
import shlex
from pathlib import Path

from jax_lora.messages import printable, shown

_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}(@[\w./-]{1,200})?", re.ASCII)

# Nothing that runs code, and no second copy of the weights in another form.
_WANTED = ["*.json", "*.safetensors", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether it is no folder here, but may be `OWNER/NAME` or `OWNER/NAME@REVISION` on the hub."""
    return bool(_NAME.fullmatch(os.fspath(path))) and not os.path.lexists(path)


def local_folder(path: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """A folder as it is; a name on the hub as the folder to which its files were downloaded.

    `huggingface_hub` downloads: its cache, its token and its settings count, such as
    `HF_HUB_OFFLINE=1`.

    Args:
      path: a folder, `OWNER/NAME` or `OWNER/NAME@REVISION`. A folder of that name comes first.
      revision: a branch, a tag or a commit.

    Raises:
      FileNotFoundError: the hub has no such model, or can't be reached and the cache lacks it.
    """
    if not is_hub_name(path):
        return Path(path)
    # Here, as it takes a while and most models are folders.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError

    name, _, given = os.fspath(path).partition("@")
    revision = revision or given or None
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            # Offline it asks the hub all the same for the files of a commit.
            local_files_only=constants.HF_HUB_OFFLINE,
        )
    except GatedRepoError:
        raise FileNotFoundError(
            f"{name} is gated: accept its terms on its page on the hub, then run `hf auth login`"
        ) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"there is no folder {shown(os.fspath(path))} here, and the hub gives no model of this "
            f"name: {type(error).__name__}: {printable(reason)}"
        ) from None
    return Path(folder)


def check_format(folder: Path) -> None:
    """Says what to do about weights in a form that is not read, before anything else is.

    Raises:
      ValueError: there are weights, but no `model.safetensors` and no shards of it.
    """
    if folder.suffix == ".gguf" and folder.is_file():
        raise ValueError(_about_gguf(folder))
    if not folder.is_dir():
        return
    files = sorted(file.name for file in folder.iterdir())
    if any(re.fullmatch(r"model.*\.safetensors(\.index\.json)?", name) for name in files):
        return
    for name in files:
        if name.endswith(".gguf"):
            raise ValueError(_about_gguf(folder / name))
        if re.fullmatch(r"consolidated.*\.(safetensors|pth)", name):
            raise ValueError(
                f"{printable(folder / name)} has its author's own names of weights, which are not "
                "read; the same model is on the hub as model.safetensors: hf download OWNER/MODEL "
                f"--include 'model*' '*.json' --local-dir {_quoted(folder)}"
            )
        if re.fullmatch(r"pytorch_model-\d+-of-\d+\.bin", name):
            count = sum(
                re.fullmatch(r"pytorch_model-.*\.bin", other) is not None for other in files
            )
            raise ValueError(
                f"{printable(folder)} holds its weights in {count} pickles, such as {name}. A "
                "pickle can run code when it is opened, and is not read. If you trust its author, "
                f"convert them: {_convert(folder, folder)}"
            )


def _about_gguf(file: Path) -> str:
    folder, name = file.parent, printable(file.name)
    return (
        f"{printable(file)} is a GGUF, the form of llama.cpp, which is not read; give the model "
        "that it was made from, or convert it, with pip install transformers torch gguf: "
        + _convert(folder, folder / "converted", f", gguf_file={name!r}")
    )


def _convert(source: Path, out: Path, more: str = "") -> str:
    """A command by which Transformers writes a model as safetensors."""
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer; "
        f"[kind.from_pretrained({printable(source, 4096)!r}{more})"
        f".save_pretrained({printable(out, 4096)!r}) "
        "for kind in (AutoModelForCausalLM, AutoTokenizer)]"
    )
    return f"python -c {shlex.quote(code)}"


def _quoted(path: Path) -> str:
    return shlex.quote(printable(path, 4096))
