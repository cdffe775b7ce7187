"""LoRA of mlx-lm, qwix, diffusers and kohya: converted exactly, or refused by its name."""

import json
import shutil
import struct

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import save_file
from tiny import expected, forward, make_bank, tokens
from torch_net import Net
from typer.testing import CliRunner

from jax_lora import load_peft, save_peft
from jax_lora.adapters import from_qwix, read_foreign
from jax_lora.cli import app

RANK = 3
FEATURES = {"up": (4, 6), "down": (6, 4)}
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def peft_outputs(folder, x):
    """By PEFT itself, in float32."""
    model = peft.PeftModel.from_pretrained(Net(), folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def net_outputs(x, deltas):
    """The outputs of the same layers, where `deltas[name](x)` is what each LoRA adds."""
    net = Net()
    with torch.no_grad():
        h = net.up(torch.from_numpy(x)).numpy() + deltas["up"](x)
        h = np.tanh(h).astype(np.float32)
        return net.down(torch.from_numpy(h)).numpy() + deltas["down"](h)


def convert(*args):
    return CliRunner().invoke(app, ["convert", *map(str, args)])


# ------------------------------------------------------------------------------------------- mlx-lm


def mlx(folder, tensors=None, **config):
    """As `mlx_lm.lora` writes it: mlx_lm/lora.py and tuner/trainer.py."""
    folder.mkdir(exist_ok=True)
    if tensors is None:
        tensors = {
            f"model.layers.0.{name}.lora_{half}": normal(*shape)
            for name, (h, n) in FEATURES.items()
            for half, shape in (("a", (h, RANK)), ("b", (RANK, n)))
        }
    values = {
        "adapter_path": "adapters",
        "fine_tune_type": "lora",
        "iters": 600,
        "lora_parameters": {"rank": RANK, "dropout": 0.0, "scale": 20.0},
        "model": "mlx-community/Llama-3.2-1B-Instruct-4bit",
        "num_layers": 16,
    } | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_as_mlx(tensors, folder / "adapters.safetensors")
    return tensors


def save_as_mlx(tensors, path):
    """As `mx.save_safetensors` writes it, whose metadata is null if none is given."""
    header, data = {"__metadata__": None}, b""
    for key, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[key] = {"data_offsets": offsets, "dtype": "F32", "shape": list(tensor.shape)}
        data += tensor.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_an_adapter_of_mlx_lm_computes_what_it_did(tmp_path):
    tensors = mlx(tmp_path / "mlx")
    save_file(tensors, tmp_path / "mlx" / "0000100_adapters.safetensors")  # its checkpoint
    result = convert(tmp_path / "mlx", tmp_path / "peft", "--rename", "model.layers.0=")
    assert result.exit_code == 0, result.output
    assert "rank 3, 2 modules" in result.stdout

    def delta(name):
        a, b = (tensors[f"model.layers.0.{name}.lora_{half}"] for half in "ab")
        return lambda x: 20.0 * ((x @ a) @ b)  # LoRALinear.__call__

    x = tokens(5)
    right = net_outputs(x, {name: delta(name) for name in FEATURES})
    np.testing.assert_allclose(peft_outputs(tmp_path / "peft", x), right, atol=1e-4)
    assert load_peft(tmp_path / "peft").config.alpha == 60
    model, bank = make_bank()
    bank.load("fr", tmp_path / "peft")
    got = forward(model, x, bank.batch(["fr", None, "fr", "fr", None]))
    adapter = load_peft(tmp_path / "peft")
    right = expected(model, x, [adapter, None, adapter, adapter, None])
    np.testing.assert_allclose(got, right, atol=1e-4)


def test_loading_an_adapter_of_mlx_lm_names_the_command(tmp_path):
    mlx(tmp_path)
    with pytest.raises(ValueError, match=r"is an adapter of mlx-lm; `jax-lora convert .* NEW_FOLD"):
        load_peft(tmp_path)


@pytest.mark.parametrize(
    ("alpha", "scale"), [(None, None), (60.0, 20.0), (320.0, 320 / RANK)], ids=str
)
def test_early_and_later_mlx_lm_scale_differently(tmp_path, alpha, scale):
    """Early: scale * alpha / rank; a config with alpha may be of either."""
    mlx(tmp_path, lora_parameters={"rank": RANK, "alpha": 16, "dropout": 0.0, "scale": 20.0})
    if alpha is None:
        message = r"scale of 106.667: give alpha 320. Later .* for 20: give alpha 60"
        with pytest.raises(ValueError, match=message):
            read_foreign(tmp_path)
        return
    weights = read_foreign(tmp_path, alpha=alpha)[""].modules["model.layers.0.up"]
    assert weights.scale == pytest.approx(scale)
    mlx(tmp_path, lora_parameters={"rank": RANK, "alpha": RANK, "dropout": 0.0, "scale": 20.0})
    assert read_foreign(tmp_path)[""].modules["model.layers.0.up"].scale == 20  # the same in both


AB = {"q.lora_a": normal(4, RANK), "q.lora_b": normal(RANK, 6)}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (AB, {"fine_tune_type": "dora"}, "fine_tune_type='dora' is not LoRA; fuse it"),
        (AB, {"fine_tune_type": "full"}, "fine_tune_type='full' is not LoRA"),
        (AB | {"q.m": normal(6)}, {}, "'q.m' is DoRA, which is not supported"),
        (AB, {"lora_parameters": {"rank": 3}}, "scale of lora_parameters must be a number, got No"),
        (AB, {"lora_parameters": {"rank": 8, "scale": 1}}, r"says rank 8, and the weights \[3\]"),
        (AB, {"lora_parameters": {"rank": [8], "scale": 1}}, r"says rank \[8\], and the weights"),
        (AB, {"lora_parameters": [1]}, r"lora_parameters must be an object, got \[1\]"),
        (AB, {"lora_parameters": None}, r"alpha is needed \(--alpha\).*there are no lora_para"),
        (AB | {"k.lora_a": AB["q.lora_a"]}, {}, "'k.lora_a' has no other half"),
        (AB | {"model.norm.weight": normal(4)}, {}, "'model.norm.weight' is unknown; LoRA of mlx"),
        (
            {"model.embed_tokens.lora_a": normal(9, 3), "model.embed_tokens.lora_b": normal(3, 4)},
            {},
            "'model.embed_tokens' is LoRA of an embedding",
        ),
        (
            {"mlp.up.lora_a": normal(2, 3, 4), "mlp.up.lora_b": normal(2, 6, 3)},
            {},
            r"'mlp.up' is LoRA of stacked layers, such as experts, \[2, 3, 4\]",
        ),
        ({"q.lora_a": normal(4, 3), "q.lora_b": normal(2, 6)}, {}, r"q: lora_A must be \[r, H\]"),
        (
            AB | {"up.lora_A.weight": normal(3, 4), "up.lora_B.weight": normal(4, 3)},
            {},
            "LoRA of one project, got diffusers, mlx",
        ),
        ({"x\x1b[2J" * 900 + ".lora_a": normal(4, 3)}, {}, "is unknown"),
    ],
)
def test_what_peft_cannot_say_of_mlx_lm_is_refused(tmp_path, tensors, config, message):
    mlx(tmp_path, tensors, **config)
    with pytest.raises(ValueError, match=message) as caught:
        read_foreign(tmp_path)
    text = str(caught.value)
    assert text.startswith(str(tmp_path)) and len(text) < 1000 and text.isprintable()


def test_the_early_format_of_mlx_lm_is_refused(tmp_path):
    (tmp_path / "adapters.npz").write_bytes(b"PK")
    for read in (load_peft, read_foreign):
        with pytest.raises(ValueError, match=r"an adapter of an early mlx-lm; train it again"):
            read(tmp_path)


# --------------------------------------------------------------------------------------------- qwix


class Einsum(nnx.Module):
    def __init__(self, a, b):
        # `w` is the base weight; qwix sets the names of its parameters after it.
        self.w_lora_a, self.w_lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)


def qwix_model():
    """Heads as Tunix has them: BTD,DNH->BTNH, then BTNH,NHD->BTD; and a plain kernel."""
    model = nnx.Module()
    model.layers = nnx.List([nnx.Module()])
    model.layers[0].q = Einsum(normal(4, RANK), normal(RANK, 2, 3))  # (D, r), (r, N, H)
    model.layers[0].o = Einsum(normal(2, 3, RANK), normal(RANK, 4))  # (N, H, r), (r, D)
    model.layers[0].up = nnx.Module()
    model.layers[0].up.kernel_lora_a = nnx.LoRAParam(normal(4, RANK))
    model.layers[0].up.kernel_lora_b = nnx.LoRAParam(normal(RANK, 6))
    return model


def qwix_state(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))


def test_a_state_of_qwix_computes_what_it_did(tmp_path):
    model, alpha = qwix_model(), 16.0
    adapter = from_qwix(qwix_state(model), alpha=alpha)
    save_peft(adapter, tmp_path)
    modules = load_peft(tmp_path).modules
    assert modules.keys() == {"layers.0.q", "layers.0.o", "layers.0.up"}
    x, heads = normal(2, 5, 4), normal(2, 5, 2, 3)
    layer = model.layers[0]
    a, b = (np.asarray(w[...]) for w in (layer.q.w_lora_a, layer.q.w_lora_b))
    right = {"q": np.einsum("btd,dr,rnh->btnh", x, a, b).reshape(2, 5, 6)}
    a, b = (np.asarray(w[...]) for w in (layer.o.w_lora_a, layer.o.w_lora_b))
    right["o"] = np.einsum("btnh,nhr,rd->btd", heads, a, b)
    right["up"] = x @ layer.up.kernel_lora_a[...] @ layer.up.kernel_lora_b[...]
    for name, values in right.items():
        w = modules[f"layers.0.{name}"]
        source = heads.reshape(2, 5, 6) if name == "o" else x
        got = w.scale * source @ w.a.T @ w.b.T
        np.testing.assert_allclose(got, alpha / RANK * values, atol=1e-4)


def test_a_file_of_a_state_of_qwix_is_converted(tmp_path):
    state = nnx.to_flat_state(nnx.state(qwix_model(), nnx.LoRAParam))
    tensors = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}
    tensors = {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    refused = convert(tmp_path / "lora.safetensors", tmp_path / "peft")
    assert refused.exit_code == 2 and "--alpha" in refused.stderr
    assert not (tmp_path / "peft").exists()
    args = ("--alpha", 6, "--rename", "layers=model.layers")
    assert convert(tmp_path / "lora.safetensors", tmp_path / "peft", *args).exit_code == 0
    adapter = load_peft(tmp_path / "peft")
    assert adapter.dtype == ml_dtypes.bfloat16
    assert {name: w.scale for name, w in adapter.modules.items()} == {
        f"model.layers.0.{name}": 2.0 for name in ("o", "q", "up")
    }
    with pytest.raises(ValueError, match=r"is a file, and PEFT's .* `jax-lora convert .*writes it"):
        load_peft(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"q": {"w_lora_a": normal(4, 3)}}, ValueError, "'q.w_lora_a' has no other half"),
        ({"q": {"w": normal(4, 3)}}, ValueError, "'q.w' is unknown"),
        (
            {"q": {"w_lora_a": normal(4, 3), "w_lora_b": normal(2, 6)}},
            ValueError,
            r"'q': A must be \[..., r\] and B \[r, ...\], got \[4, 3\] and \[2, 6\]",
        ),
        (
            {"moe": {"w_lora_a": normal(2, 4, 3), "w_lora_b": normal(3, 6)}},
            ValueError,
            "'moe' is LoRA of experts",
        ),
        (
            {"q": {f"{n}_lora_{half}": normal(3, 3) for n in "wv" for half in "ab"}},
            ValueError,
            "'q' has LoRA of several weights",
        ),
        ({"q": {"lora_a": normal(4, 3), "lora_b": normal(3, 6)}}, ValueError, "not named as qwix"),
        ({"embedder": {"w_lora_a": normal(9, 3), "w_lora_b": normal(3, 4)}}, ValueError, "embeddi"),
        ({}, ValueError, "one project, got none"),
        ({"q": {"w_lora_a": "text", "w_lora_b": normal(3, 4)}}, ValueError, "'q': A must be"),
    ],
)
def test_states_that_are_not_lora_of_qwix(state, error, message):
    with pytest.raises(error, match=message):
        from_qwix(state, alpha=1.0)


@pytest.mark.parametrize("mark", ["_CHECKPOINT_METADATA", "model_params"])
def test_a_checkpoint_of_tunix_is_refused_with_the_way_out(tmp_path, mark):
    (tmp_path / mark).mkdir()
    for read in (load_peft, read_foreign):
        with pytest.raises(
            ValueError, match=r"as Tunix saves; restore .* save_peft\(from_qwix\(st"
        ):
            read(tmp_path)


# ------------------------------------------------------------------------------ diffusers and kohya


def peft_halves(prefix="", down="lora_A", up="lora_B"):
    return {
        f"{prefix}{name}.{half}.weight": normal(*shape)
        for name, (h, n) in FEATURES.items()
        for half, shape in ((down, (RANK, h)), (up, (n, RANK)))
    }


@pytest.mark.parametrize("suffix", ["_A _B", "_down _up", ".down .up", "_linear_layer.down .up"])
def test_a_file_of_diffusers_computes_what_it_did(tmp_path, suffix):
    """Without an alpha of its own the scale is 1."""
    down, up = (f"lora{end}" for end in suffix.split())
    up = up.replace("lora.up", "lora_linear_layer.up") if "linear" in down else up
    tensors = peft_halves("transformer.", down, up)
    alphas = {"up": 1.5, "down": float(RANK)}
    tensors["transformer.up.alpha"] = np.array(1.5, np.float32)
    source = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, source)
    assert convert(tmp_path, tmp_path / "peft").exit_code == 0

    def delta(name):
        a, b = (tensors[f"transformer.{name}.{half}.weight"] for half in (down, up))
        return lambda x: alphas[name] / RANK * (x @ a.T) @ b.T

    x = tokens(5)
    right = net_outputs(x, {name: delta(name) for name in FEATURES})
    np.testing.assert_allclose(peft_outputs(tmp_path / "peft", x), right, atol=1e-4)


def test_the_config_in_a_file_of_diffusers_counts(tmp_path):
    config = peft.LoraConfig(r=RANK, lora_alpha=12, target_modules=["up", "down"], use_rslora=True)
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    for prefix in ("", "transformer."):  # save_lora_adapter, and save_lora_weights of a pipeline
        text = json.dumps({f"{prefix}{key}": value for key, value in values.items()})
        file = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(peft_halves(prefix), file, {"format": "pt", "lora_adapter_metadata": text})
        (adapter,) = read_foreign(tmp_path).values()
        assert {w.scale for w in adapter.modules.values()} == {12 / RANK**0.5}
        with pytest.raises(ValueError, match="alpha=3 is given, but the file says its own scale"):
            read_foreign(tmp_path, alpha=3)
    text = json.dumps(values | {"use_dora": True})
    save_file(peft_halves(), file, {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match="use_dora=True: DoRA is not supported"):
        read_foreign(tmp_path)
    save_file(peft_halves(), file, {"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="is truncated or not JSON"):
        read_foreign(tmp_path)


def test_each_model_of_a_pipeline_gets_a_folder(tmp_path):
    tensors = peft_halves("unet.") | peft_halves("text_encoder.")
    save_file(tensors, tmp_path / "style.safetensors")
    assert convert(tmp_path / "style.safetensors", tmp_path / "peft").exit_code == 0
    for model in ("unet", "text_encoder"):
        weights = load_peft(tmp_path / "peft" / model).modules["up"]
        np.testing.assert_array_equal(weights.a, tensors[f"{model}.up.lora_A.weight"])
        assert weights.scale == 1
    shutil.rmtree(tmp_path / "peft" / "unet")
    again = convert(tmp_path / "style.safetensors", tmp_path / "peft")
    assert again.exit_code == 2 and "text_encoder' holds an adapter" in again.stderr
    assert not (tmp_path / "peft" / "unet").exists()


KOHYA = "lora_unet_down_blocks_0_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{KOHYA}.lora_down.weight": normal(3, 4), f"{KOHYA}.lora_up.weight": normal(4, 3)},
            f"'{KOHYA}.lora_down.weight' is a weight as kohya's scripts name it.*save_lora_adapter",
        ),
        ({f"lora_te_text_{KOHYA}.alpha": np.array(1, np.float32)}, "got none"),
        ({"lora_te_x.hada_w1_a": normal(2, 2)}, "as kohya's scripts name it"),
        ({"unet.q.hada_w1_a": normal(2, 2)}, "is LoHa, which is not supported"),
        ({"unet.q.lokr_w1": normal(2, 2)}, "is LoKr"),
        ({"unet.q.dora_scale": normal(2, 2)}, "is DoRA"),
        ({"unet.q.diff_b": normal(2)}, "is a change of a whole weight"),
        (peft_halves() | {"x.alpha": normal(1)}, "'x.alpha' is the alpha of no LoRA"),
        (
            peft_halves("unet.") | {"unet.up.alpha": normal(2)},
            r"up.alpha' must be a number, got \[2\]",
        ),
        (peft_halves(), "alpha is needed .*no tensor or metadata says that of 'down'"),
        (
            peft_halves("unet.") | {"unet.up.lora_A.weight": np.array(1, np.float32)},
            r"'unet\.up': lora_A must be \[r, H\], got a number",
        ),
        (peft_halves("base_model.model."), "is PEFT's; give the folder that holds adapter_config"),
        (
            {
                "unet.c.lora_A.weight": normal(3, 4, 3, 3),
                "unet.c.lora_B.weight": normal(4, 3, 1, 1),
            },
            "c: LoRA of a convolution",
        ),
    ],
)
def test_what_peft_cannot_say_of_diffusers_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        read_foreign(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 1000


# -------------------------------------------------------------------------------------- the command


def test_peft_folders_get_other_names(tmp_path):
    mlx(tmp_path / "mlx")
    assert convert(tmp_path / "mlx", tmp_path / "a").exit_code == 0
    assert convert(tmp_path / "a", tmp_path / "b", "--rename", "model.layers=h").exit_code == 0
    first, second = load_peft(tmp_path / "a"), load_peft(tmp_path / "b")
    assert sorted(second.modules) == ["h.0.down", "h.0.up"]
    np.testing.assert_array_equal(second.modules["h.0.up"].b, first.modules["model.layers.0.up"].b)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none", "new"], "no folder"),
        (["empty", "new"], "has none of adapters.safetensors, pytorch_lora_weights.safetensors"),
        (["mlx", "mlx"], "holds an adapter; give a new folder"),
        (["mlx", "new", "--rename", "x"], "--rename OLD=NEW is the form, got 'x'"),
        (["mlx", "new", "--alpha", "3"], "alpha=3 is given, but the file says its own scale"),
        (["peft", "new", "--alpha", "3"], "alpha=3 is given, but PEFT's config says it"),
        (["link", "new"], "--allow-links"),
        (["pickle", "new"], "is a pickle, which can run code"),
    ],
)
def test_what_the_command_refuses(tmp_path, args, message):
    mlx(tmp_path / "mlx")
    (tmp_path / "empty").mkdir()
    save_peft(read_foreign(tmp_path / "mlx")[""], tmp_path / "peft")
    shutil.copytree(tmp_path / "peft", tmp_path / "pickle")
    (tmp_path / "pickle/adapter_model.safetensors").rename(tmp_path / "pickle/adapter_model.bin")
    shutil.copytree(tmp_path / "mlx", tmp_path / "link")
    (tmp_path / "link" / "adapters.safetensors").unlink()
    (tmp_path / "link" / "adapters.safetensors").symlink_to(tmp_path / "mlx/adapters.safetensors")
    before = sorted(tmp_path.rglob("*"))
    result = convert(tmp_path / args[0], tmp_path / args[1], *args[2:])
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert sorted(tmp_path.rglob("*")) == before
