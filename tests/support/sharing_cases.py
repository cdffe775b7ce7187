"""Experts that share A or B, for the Mosaic kernels' tests, on CPU and on a device."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gradient_cases import GradientArrays, by_name, in_float64, in_layers, tolerance
from mosaic_cases import add_parts, bits, local_ids, relative_error, signed, y_tolerance

import pallas_kernels as pk
from pallas_kernels import reference
from pallas_kernels.call import Call
from pallas_kernels.mosaic_gpu import backend

# The halves that all experts of a slot share in each part of a call.
SHARED = {"A": ("A",), "B": ("B",), "A, B": ("A", "B"), "A, none": ("A", "")}


@dataclasses.dataclass(frozen=True)
class SharingCase:
    """A call of the pairs of tokens and experts. Its parts, one of each letter of `SHARED`, have
    columns of their own, and one range of ids, which starts behind another's."""

    tokens: int
    features: int
    width: int
    rank: int
    shared: str
    slots: int = 3
    experts: int = 4
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        sizes = f"T{self.tokens}-H{self.features}-N{self.width}-r{self.rank}"
        return f"{sizes}-{self.slots}x{self.experts}-{self.shared}-{self.dtype}"

    @property
    def first_slot(self) -> int:
        return 5

    @property
    def num_adapters(self) -> int:
        """Ids, those of the range before among them."""
        return self.first_slot + self.slots * self.experts

    @property
    def columns(self) -> int:
        return self.width * len(SHARED[self.shared])

    def ids(self) -> np.ndarray:
        """Those of all slots, of none, of the range before and behind; none of slot 0's."""
        rng = np.random.default_rng(self.tokens)
        slots = rng.integers(1, self.slots, self.tokens).astype(np.int32)
        experts = rng.integers(-1, self.experts, (self.tokens, 1)).astype(np.int32)
        pairs = pk.expert_indices(jnp.asarray(slots), jnp.asarray(experts), self.experts)
        ids = np.where(pairs < 0, -1, pairs + self.first_slot)[:, 0].astype(np.int32)
        ids[2::7], ids[-1] = (2, self.num_adapters)[self.tokens % 2], self.num_adapters - 1
        return ids

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """x and y."""
        rng = np.random.default_rng(1)
        x = signed(rng, (self.tokens, self.features), self.dtype)
        return x, signed(rng, (self.tokens, self.columns), self.dtype)

    def parts(self) -> list[pk.LoRAPart]:
        """NaN in what no token uses."""
        rng, found, every = np.random.default_rng(2), [], self.slots * self.experts
        for n, shared in enumerate(SHARED[self.shared]):
            of_a, of_b = (self.slots if half == shared else every for half in "AB")
            a = signed(rng, (of_a, self.rank, self.features), self.dtype, self.features**-0.5)
            b = signed(rng, (of_b, self.width, self.rank), self.dtype, self.rank**-0.5)
            for stack in (a, b):
                stack[: len(stack) // self.slots] = np.nan
            scales = rng.uniform(0.5, 2, every).astype(np.float32)
            found.append(pk.LoRAPart(a, b, scales, self.first_slot, n * self.width))
        return found


def repeated(parts: Sequence[pk.LoRAPart]) -> list[pk.LoRAPart]:
    """The same with an A and a B for each adapter."""
    return [
        dataclasses.replace(
            part,
            lora_a=np.repeat(part.lora_a, part.sharing.lora_a, axis=0),
            lora_b=np.repeat(part.lora_b, part.sharing.lora_b, axis=0),
        )
        for part in parts
    ]


def wanted(case: SharingCase) -> np.ndarray:
    (x, y), ids = case.rows(), case.ids()
    out, ones = y.astype(np.float64), np.ones((len(ids), 1))
    for part in case.parts():
        a, b, scales = (np.asarray(t) for t in (part.lora_a, part.lora_b, part.scales))
        columns = slice(part.y_offset, part.y_offset + part.width)
        local = local_ids(ids, part)[:, None]
        out[:, columns] = reference.mix(out[:, columns], x, a, b, local, ones, scales)
    return out


def check_sharing(case: SharingCase, *, sorted_once: bool, delta: bool = False, **how: Any) -> None:
    """Against float64; and the bits of a call in which each adapter has its own A and B."""
    (x, y), parts, ids = case.rows(), case.parts(), case.ids()
    route = pk.make_segments(ids, case.num_adapters) if sorted_once else jnp.asarray(ids)

    def run(parts: Sequence[pk.LoRAPart]) -> np.ndarray:
        return np.asarray(add_parts(jnp.asarray(y), x, parts, route, delta=delta, **how))

    new = run(parts)
    assert relative_error(new, wanted(case)) < y_tolerance(case.dtype)
    unchanged = (ids < case.first_slot) | (ids >= case.num_adapters)
    np.testing.assert_array_equal(bits(new)[unchanged], bits(y)[unchanged])
    np.testing.assert_array_equal(bits(new), bits(run(repeated(parts))))


def check_sharing_gradients(case: SharingCase, *, of_layers: bool = False) -> None:
    """Against float64: those of a shared A or B are sums. All else has the bits that it has in a
    call in which each adapter has its own A and B."""
    (x, dy), ids = case.rows(), case.ids()
    parts = tuple(case.parts())
    z, apart = (GradientArrays(x, dy, of, ids) for of in (parts, tuple(repeated(parts))))
    call = Call("add_lora", "mosaic_gpu", ("sgmv",) * len(parts))

    def run(z: GradientArrays) -> dict[str, np.ndarray]:
        operands = jax.tree.map(jnp.asarray, (z.dy, z.x, z.parts))
        segments = pk.make_segments(z.ids, case.num_adapters)
        dx, dparts, _ = jax.jit(lambda *a: backend.add_lora_grad(call, *a))(*operands, segments)
        return by_name(dx, dparts)

    got, each = run(in_layers(z) if of_layers else z), run(apart)
    stacks = {f"dA{n}": np.asarray(part.lora_a) for n, part in enumerate(parts)}
    stacks |= {f"dB{n}": np.asarray(part.lora_b) for n, part in enumerate(parts)}
    for name, want in in_float64(apart).items():
        if name in stacks and len(stacks[name]) < len(want):
            want = want.reshape(len(stacks[name]), -1, *want.shape[1:]).sum(1)
        else:
            np.testing.assert_array_equal(bits(got[name]), bits(each[name]))
        assert got[name].shape == want.shape
        assert relative_error(got[name], want) < tolerance(name, case.dtype), name
        assert not got[name][want == 0].any(), name
