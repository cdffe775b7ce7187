"""Times ways to read the keys and values of a decode step: `python -m benchmarks.attention`.

Microseconds of one layer's attention of rows with one token each, over blocks in a mixed order, in
a jitted loop over layers. Each way is checked first: against the one that gathers, for bits that
other rows do not change, and for NaN behind a row's last token.
"""

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_lora.models.pages import Lanes, LayerPages, PagedTokens, Pages, blocks_of
from jax_lora.serving.options import step_options
from pallas_kernels.mosaic_gpu.paged import paged_attention


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of `context` tokens; blocks of `block` tokens, `spare` times as many as they take."""

    rows: int = 64
    context: int = 1024
    block: int = 32
    heads: int = 8
    group: int = 4
    head_dim: int = 128
    layers: int = 8
    spare: int = 1

    @property
    def width(self) -> int:
        """Blocks of a table."""
        return blocks_of(self.context, self.block)

    @property
    def cache_bytes(self) -> int:
        """What a layer's keys and values take."""
        return 4 * self.rows * self.context * self.heads * self.head_dim

    def arrays(self) -> tuple[Array, Pages, Lanes[Array]]:
        keys = jax.random.split(jax.random.key(0), 3)
        blocks = self.rows * self.width * self.spare
        shape = self.layers * blocks, self.heads, self.block, self.head_dim
        k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
        pages = Pages(k, v, blocks)
        q = (self.rows, 1, self.heads, self.group, self.head_dim)
        mixed = np.random.default_rng(0).permutation(blocks)[: self.rows * self.width]
        tables = jnp.asarray(mixed.reshape(self.rows, -1), jnp.int32)
        starts = jnp.full(self.rows, self.context - 1, jnp.int32)
        lanes = Lanes(tables, starts, jnp.ones(self.rows, jnp.int32))
        return jax.random.normal(keys[2], q, jnp.bfloat16), pages, lanes


Way = Callable[[Array, Pages, Array, Lanes[Array]], Array]


def gathered(q: Array, pages: Pages, layer: Array, lanes: Lanes[Array]) -> Array:
    """XLA gathers each row's blocks, and multiplies."""
    tokens = PagedTokens.of(((lanes, 1),), pages)
    keys, values = LayerPages(pages, layer, tokens).of_lanes(lanes)
    scores = jnp.einsum("bsngd,bntd->bngst", q, keys, preferred_element_type=jnp.float32)
    known = jnp.arange(keys.shape[2], dtype=jnp.int32)
    is_seen = known <= lanes.starts[:, None]
    scores = jnp.where(is_seen[:, None, None, None], scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bngst,bntd->bsngd", weights, values)


def cudnn(q: Array, pages: Pages, layer: Array, lanes: Lanes[Array]) -> Array:
    """cuDNN's paged attention, over the blocks of all layers."""
    from jax._src.cudnn import fused_attention_stablehlo as fused_attention

    rows, _, heads, group, size = q.shape
    tables = (lanes.tables + layer * pages.blocks)[:, None, :, None]
    none = jnp.zeros(0, q.dtype)
    out = fused_attention._dot_product_attention(
        q.reshape(rows, heads * group, 1, size),
        pages.keys,
        pages.values,
        none,
        jnp.ones(rows, jnp.int32),
        lanes.starts + lanes.counts,
        none,
        none,
        tables,
        tables,
        size**-0.5,
        42,
        0.0,
        (False, False),
        fused_attention.MaskType.PADDING,
        fused_attention.AttentionLayout.BNTH.value,
        None,
        fused_attention.check_cudnn_version(),
        False,
    )
    return out.reshape(q.shape)


def triton(q: Array, pages: Pages, layer: Array, lanes: Lanes[Array], splits: int = 4) -> Array:
    """JAX's Pallas kernel for Triton, which is deprecated. It wants heads before blocks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    rows, _, heads, group, size = q.shape
    count, _, block, _ = pages.keys.shape
    # A reshape in place of the transposition that users would store them in: same bytes, other
    # numbers; so it is timed, and not checked.
    keys, values = (t.reshape(heads, count, block, size) for t in (pages.keys, pages.values))
    out = paged_attention(
        q.reshape(rows, heads * group, size) * jnp.asarray(size**-0.5, q.dtype),
        keys,
        values,
        lanes.tables + layer * pages.blocks,
        lanes.starts + lanes.counts,
        k_splits=splits,
        pages_per_compute_block=max(1, 64 // block),
        num_warps=4,
        num_stages=3,
    )
    return out.reshape(q.shape)


def kernel(q: Array, pages: Pages, layer: Array, lanes: Lanes[Array], steps: int = 3) -> Array:
    """The kernel that reads blocks where they stand, `steps` tiles ahead."""
    tables, scale = lanes.tables + layer * pages.blocks, q.shape[-1] ** -0.5
    out = paged_attention(
        q[:, 0],
        pages.keys,
        pages.values,
        tables,
        jnp.zeros_like(lanes.starts),
        lanes.starts + lanes.counts,
        scale=scale,
    )
    return out[:, None]


WAYS: dict[str, Way] = {way.__name__: way for way in (gathered, kernel, cudnn, triton)}


def check(way: Way, case: Case) -> str:
    """How far the way is from the one that gathers, and what of others and of NaN it lets in."""
    q, pages, lanes = case.arrays()
    rng = np.random.default_rng(1)
    starts = jnp.asarray(rng.integers(0, case.context, case.rows), jnp.int32)
    lanes = lanes._replace(starts=starts)
    layer = jnp.int32(case.layers - 1)
    run = jax.jit(way, compiler_options=step_options())
    one = np.asarray(run(q, pages, layer, lanes), np.float32)
    other = np.asarray(jax.jit(gathered)(q, pages, layer, lanes), np.float32)
    # The first half of the rows once more, with other neighbours in other places.
    half = case.rows // 2
    mixed = lanes.starts.at[half:].set(5), q.at[half:].multiply(-3)
    again = np.asarray(run(mixed[1], pages, layer, lanes._replace(starts=mixed[0])), np.float32)
    moved = np.asarray(
        run(q[::-1], pages, layer, Lanes(lanes.tables[::-1], starts[::-1], lanes.counts)),
        np.float32,
    )[::-1]
    # NaN in what no row has written.
    written = np.zeros((pages.blocks, case.block), bool)
    for table, start in zip(np.asarray(lanes.tables), np.asarray(starts)):
        for n in range(int(start) + 1):
            written[table[n // case.block], n % case.block] = True
    spoilt = jnp.where(np.tile(written, (case.layers, 1))[:, None, :, None], 1, jnp.nan)
    spoilt = spoilt.astype(q.dtype)
    bad = Pages(pages.keys * spoilt, pages.values * spoilt, pages.blocks)
    with_nan = np.asarray(run(q, bad, layer, lanes), np.float32)
    return (
        f"differs by {np.abs(one - other).max():.1e} of {np.abs(other).max():.1e}; bits beside "
        f"others {'same' if (again[:half] == one[:half]).all() else 'OTHER'}, moved "
        f"{'same' if (moved == one).all() else 'OTHER'}, NaN "
        f"{'kept out' if (with_nan == one).all() else 'LET IN'}"
    )


def us(way: Way, case: Case, known: int | None = None) -> float:
    """Microseconds of a layer, whose rows have `known` tokens."""
    q, pages, lanes = case.arrays()
    lanes = lanes._replace(starts=jnp.full(case.rows, (known or case.context) - 1, jnp.int32))

    def turn(layer: Array, q: Array, pages: Pages, lanes: Lanes[Array]) -> Array:
        return jax.lax.optimization_barrier(way(q, pages, layer, lanes) * 2 + q)

    def all_layers(q: Array, pages: Pages, lanes: Lanes[Array]) -> Array:
        def body(n: Array, q: Array) -> Array:
            return turn(jnp.asarray(n % case.layers, jnp.int32), q, pages, lanes)

        return jax.lax.fori_loop(0, 4 * case.layers, body, q)

    run = jax.jit(all_layers, compiler_options=step_options()).lower(q, pages, lanes).compile()

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            out = run(q, pages, lanes)
        out.block_until_ready()
        return time.perf_counter() - start

    seconds(2)
    times = [(seconds(8) - seconds(4)) / 4 for _ in range(5)]
    return float(np.median(times)) / (4 * case.layers) * 1e6


def main() -> None:
    """Names of ways as arguments; all without."""
    names = sys.argv[1:] or list(WAYS)
    on_gpu = jax.default_backend() == "gpu"
    sizes = Case() if on_gpu else Case(4, 64, 32, 2, 2, 32, 2)
    print(jax.devices()[0].device_kind, time.strftime("%Y-%m-%d"))
    floor = sizes.cache_bytes / 2.4e12 * 1e6
    print(f"{sizes}: floor {floor:.1f} us")
    for name in names:
        try:
            way = WAYS[name]
            full, quarter = us(way, sizes), us(way, sizes, sizes.context // 4)
            print(f"{name:10} {full:8.1f} us, a quarter known {quarter:8.1f} us", flush=True)
            if name != "triton":
                print(f"    {check(way, dataclasses.replace(sizes, layers=2))}", flush=True)
        except Exception as error:  # a way that this device lacks
            print(f"{name:10} {type(error).__name__}: {str(error)[:600]}", flush=True)


if __name__ == "__main__":
    main()
