"""What the ops' gradients do outside of one reverse pass: they compile once, and else say so."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

RNG = np.random.default_rng(0)
Y, X, A, B, V = (
    jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for shape in ((6, 12), (6, 16), (3, 8, 16), (3, 12, 8), (6, 8))
)
IDS = jnp.array([0, 1, -1, 2, 0, 0], jnp.int32)
SEGMENTS = pk.make_segments(IDS, 3)
OPS = {
    "bgmv_shrink": lambda x: pk.bgmv_shrink(x, A, IDS),
    "sgmv_shrink": lambda x: pk.sgmv_shrink(x, A, SEGMENTS),
    "bgmv_expand": lambda x: pk.bgmv_expand(V * x[:, :8], B, IDS, Y),
    "sgmv_expand": lambda x: pk.sgmv_expand(V * x[:, :8], B, SEGMENTS, Y),
    "add_lora": lambda x: pk.add_lora(Y, x, A, B, IDS),
}


@pytest.fixture
def compilations():
    """How many programs have been compiled."""
    found = []

    def listen(name, *_args, **_kwargs):
        if "backend_compile" in name:
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("op", OPS)
def test_eager_gradients_compile_once(op, compilations):
    gradient = jax.grad(lambda x: OPS[op](x).sum())
    first = gradient(X)
    gradient(X)
    compilations.clear()
    again = [gradient(X) for _ in range(5)]
    assert not compilations
    np.testing.assert_array_equal(np.stack(again), np.stack([first] * 5))


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "jvp under jit": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(X),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (X,), (X,)),
    "jacfwd": lambda f: jax.jacfwd(f)(X),
    "linearize": lambda f: jax.linearize(f, X)[1](X),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode_is_refused_by_the_name_of_the_op(op, mode):
    with pytest.raises(NotImplementedError, match=f"{op} has no forward-mode derivative"):
        FORWARD[mode](OPS[op])


SECOND = {
    "grad of grad": lambda f: jax.grad(lambda x: jax.grad(f)(x).sum())(X),
    "under jit": lambda f: jax.jit(jax.grad(lambda x: jax.grad(f)(x).sum()))(X),
    "of a jitted gradient": lambda f: jax.grad(lambda x: jax.jit(jax.grad(f))(x).sum())(X),
    "hessian": lambda f: jax.hessian(f)(X),
    "jvp of grad": lambda f: jax.jvp(jax.grad(f), (X,), (X,)),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", SECOND)
def test_second_derivatives_are_refused_by_the_name_of_the_op(op, mode):
    with pytest.raises(NotImplementedError, match=op):
        SECOND[mode](lambda x: (OPS[op](x) ** 2).sum())


@pytest.mark.parametrize("op", OPS)
def test_a_derivative_in_a_cotangent_is_refused_by_the_name_of_the_op(op):
    y, pull_back = jax.vjp(OPS[op], X)
    with pytest.raises(NotImplementedError, match=f"{op} has first derivatives alone"):
        jax.grad(lambda dy: (pull_back(dy)[0] ** 2).sum())(y)


def test_reverse_mode_works_under_vmap_scan_and_remat():
    def loss(x):
        return (OPS["add_lora"](x) ** 2).sum()

    want = jax.grad(loss)(X)
    batched = jax.vmap(jax.grad(loss))(jnp.stack([X, X]))
    np.testing.assert_allclose(batched, np.stack([want, want]), rtol=1e-5, atol=1e-5)

    def step(total, _):
        return total + loss(X * total), None

    def scanned(scale):
        return jax.lax.scan(jax.checkpoint(step), scale, length=2)[0]

    def unrolled(scale):
        for _ in range(2):
            scale = scale + loss(X * scale)
        return scale

    one = jnp.float32(1e-2)
    np.testing.assert_allclose(jax.grad(scanned)(one), jax.grad(unrolled)(one), rtol=1e-4)
    jacobian = jax.jacrev(OPS["add_lora"])(X)
    assert jacobian.shape == (6, 12, 6, 16)
