"""Random torch tensors for the drop-in ops, their float64 oracle, and what must stay as it was."""

import dataclasses

import numpy as np
import torch

HALVES = (torch.bfloat16, torch.float16)
# Relative error (Frobenius norm) against float64 of a result in this dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    num_tokens: int = 13
    features: int = 96
    width: int = 80
    rank: int = 16
    num_adapters: int = 5
    x_dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    y_dtype: torch.dtype = torch.bfloat16
    id_dtype: torch.dtype = torch.int32
    four_dim: bool = False
    device: str = "cpu"
    seed: int = 0

    def tensors(self) -> "Tensors":
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(self.device)

        t, h, n, r, slots = (
            self.num_tokens, self.features, self.width, self.rank, self.num_adapters,
        )  # fmt: skip
        a = normal(slots, r, h, dtype=self.weight_dtype, scale=h**-0.5)
        b = normal(slots, n, r, dtype=self.weight_dtype, scale=r**-0.5)
        if self.four_dim:
            a, b = a.unsqueeze(1), b.unsqueeze(1)
        ids = torch.randint(-1, slots, (t,), generator=generator)
        ids[0] = slots - 1
        if t > 1:
            ids[t // 2] = -1
        return Tensors(
            x=normal(t, h, dtype=self.x_dtype),
            a=a,
            b=b,
            v=normal(t, r, dtype=torch.float32),
            y=normal(t, n, dtype=self.y_dtype),
            ids=ids.to(self.id_dtype).to(self.device),
        )


@dataclasses.dataclass(frozen=True)
class Tensors:
    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    v: torch.Tensor
    y: torch.Tensor
    ids: torch.Tensor


def double(t: torch.Tensor) -> np.ndarray:
    return t.detach().cpu().double().numpy()


def products(rows: torch.Tensor, stack: torch.Tensor, ids: torch.Tensor) -> np.ndarray:
    """rows[t] @ stack[ids[t]].T in float64; zeros where ids is no slot."""
    stack = stack.squeeze(1) if stack.ndim == 4 else stack
    left, right, out = double(rows), double(stack), np.zeros((rows.shape[0], stack.shape[1]))
    for t, i in enumerate(ids.tolist()):
        if 0 <= i < len(right):
            out[t] = right[i] @ left[t]
    return out


def relative_error(got: torch.Tensor, want: np.ndarray) -> float:
    return float(np.linalg.norm(double(got) - want) / np.linalg.norm(want))


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    left, right = (t.detach().cpu().contiguous().view(torch.uint8) for t in (left, right))
    return torch.equal(left, right)


def runs(lengths: list[int], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and lengths of segments that follow each other."""
    starts = np.cumsum([0, *lengths[:-1]])
    return tuple(torch.tensor(v, dtype=torch.int64, device=device) for v in (starts, lengths))
