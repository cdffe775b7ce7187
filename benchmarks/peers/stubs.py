"""Lets the LoRA kernels of vLLM and SGLang import outside their engines.

The wheels' kernel files need a few names from packages that are not installed here (pydantic, msgspec,
vllm.platforms, ...). This module supplies the few that matter and an inert stand-in for the rest.
"""

import importlib.abc
import importlib.machinery
import logging
import os
import sys
import types
from collections.abc import Sequence
from typing import Any, Never

import torch
import triton
import triton.language as tl

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)


class _Inert:
    def __init__(self, *a: object, **k: object) -> None:
        pass

    def __call__(self, *a: object, **k: object) -> "_Inert":
        return _Inert()

    def __bool__(self) -> bool:
        return False

    def get(self, *a: object, **k: object) -> None:
        return None

    def __getattr__(self, name: str) -> "_Inert":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert()


class _InertModule(types.ModuleType):
    def __getattr__(self, name: str) -> _Inert:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Inert()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last resort: any missing vllm/sglang submodule becomes an inert module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in ("vllm", "sglang", "msgspec"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _InertModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_Finder())


def put(name: str, path: Sequence[str] = (), **names: object) -> types.ModuleType:
    module = _InertModule(name)
    module.__path__ = list(path)
    module.__dict__.update(names)
    sys.modules[name] = module
    return module


def _refuse(*a: object, **k: object) -> Never:
    raise AttributeError(
        "no custom-op registration here"
    )  # the peers then call the function itself


class _Logger(logging.Logger):
    def warning_once(self, *a: object, **k: object) -> None:
        pass

    def info_once(self, *a: object, **k: object) -> None:
        pass


class _Platform:
    device_type = "cuda"

    def is_cuda(self) -> bool:
        return True

    def is_rocm(self) -> bool:
        return False

    def is_xpu(self) -> bool:
        return False

    def _cc(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability()

    def is_device_capability(self, c: int | tuple[int, int]) -> bool:
        return self._cc() == (c if isinstance(c, tuple) else divmod(c, 10))

    def has_device_capability(self, c: int | tuple[int, int]) -> bool:
        return self._cc() >= (c if isinstance(c, tuple) else divmod(c, 10))


import vllm  # noqa: E402

vllm.envs = put(
    "vllm.envs",
    VLLM_TUNED_CONFIG_FOLDER=None,
    VLLM_BATCH_INVARIANT=False,
    VLLM_LORA_ENABLE_DUAL_STREAM=False,
    VLLM_LORA_DISABLE_PDL=True,
)
put("vllm.triton_utils", tl=tl, triton=triton, HAS_TRITON=True)
put("vllm.logger", init_logger=lambda name: _Logger(name))
put("vllm.platforms", current_platform=_Platform())
put("vllm.utils")
put("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2, cdiv=triton.cdiv)
put(
    "vllm.utils.torch_utils",
    direct_register_custom_op=_refuse,
    async_tensor_h2d=lambda data, dtype=None, device=None: torch.tensor(data, dtype=dtype).to(
        device
    ),
)
put("vllm.lora.ops.triton_ops", path=[f"{path}/lora/ops/triton_ops" for path in vllm.__path__])


class _Envs:
    def __getattr__(self, name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(get=lambda: None)


put("sglang.srt.environ", envs=_Envs())
put(
    "sglang.srt.utils",
    cached_triton_kernel=lambda *a, **k: lambda f: f,
    get_device_name=lambda *a: torch.cuda.get_device_name(),
)
put("sglang.kernels.jit.utils", is_arch_support_pdl=lambda: False)


class _Struct:
    def __init_subclass__(cls, **k: object) -> None:
        pass

    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)


put("msgspec", Struct=_Struct)


class _BaseModel:
    def __init__(self, **fields: object) -> None:
        for cls in reversed(type(self).__mro__):
            for name in getattr(cls, "__annotations__", {}):
                default = getattr(type(self), name, None)
                value = (
                    default() if callable(default) and not isinstance(default, type) else default
                )
                setattr(self, name, fields.get(name, value))

    def model_dump(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "model_config"}

    @classmethod
    def model_validate(cls, raw: dict[str, Any]) -> "_BaseModel":
        from sglang.srt.lora.dense import plan
        from sglang.srt.lora.utils import Phase

        rows = []
        for row in raw["rows"]:
            spec = dict(row.get("spec", {}))
            for key, enum in (
                ("a_family", plan.AFamily),
                ("b_family", plan.BFamily),
                ("overlap", plan.Overlap),
            ):
                if key in spec:
                    spec[key] = enum(spec[key])
            row = dict(row, spec=plan._PlanSpecModel(**spec))
            if row.get("phase"):
                row["phase"] = Phase(row["phase"])
            if row.get("kinds"):
                row["kinds"] = [plan.DenseLoraKind(k) for k in row["kinds"]]
            rows.append(plan._PlanRowModel(**row))
        return cls(rows=rows)


put(
    "pydantic",
    BaseModel=_BaseModel,
    ConfigDict=lambda **k: k,
    Field=lambda default_factory=None, **k: default_factory,
    model_validator=lambda **k: lambda f: f,
)
