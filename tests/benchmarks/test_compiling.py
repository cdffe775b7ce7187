"""The steps' compile times, and what their loops make."""

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from benchmarks import compiling, step
from benchmarks.__main__ import app
from benchmarks.compiling import made_in_loops

W, X = jnp.ones((5, 48, 48)), jnp.ones((2, 48))


def hlo_of(fn, *args) -> str:
    return jax.jit(fn).lower(*args).compile().as_text()


def scanned(x, w):
    return jax.lax.scan(lambda x, own: (jnp.tanh(x @ own), None), x, w)[0]


def copying(x, w):
    def turn(x, own):
        return jnp.tanh(x @ jax.lax.optimization_barrier(own)), None

    return jax.lax.scan(turn, x, w)[0]


def test_copies_in_a_loop_are_found() -> None:
    shapes = {(5, 48, 48)}
    [found] = made_in_loops(hlo_of(copying, X, W), shapes)
    assert found.startswith("[48,48] by ") or found.startswith("[1,48,48] by ")
    assert made_in_loops(hlo_of(lambda x, w: x @ w[0], X, W), shapes) == []
    other = {(5, 48, 47)}
    assert made_in_loops(hlo_of(copying, X, W), other) == []


def test_arrays_of_all_layers_made_in_each_turn_are_found() -> None:
    """The gradient of what a loop scans is written in its place."""
    shapes = {(5, 48, 48)}
    gradient = hlo_of(jax.grad(lambda w: scanned(X, w).sum()), W)
    assert made_in_loops(gradient, shapes, whole=True) == []
    sums = hlo_of(lambda w: jax.lax.fori_loop(0, 9, lambda n, w: jnp.sin(w) + n, w), W)
    assert made_in_loops(sums, shapes, whole=True) == ["[5,48,48] by fusion"]


@pytest.mark.ci
def test_no_step_copies_stacks() -> None:
    rows = compiling.run(3, lambda _: None, scan=True, config=step.SMALL)
    assert [row.name for row in rows] == ["prefill", "decode", "gradient"]
    assert all(row.stacks == [] for row in rows)
    assert all(row.cpu_s > 0 for row in rows)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    row = compiling.Row("decode", 2.0, 3.0, [], ["[64,64] by copy"])
    monkeypatch.setattr(compiling, "run", lambda *args, **how: [row])
    result = CliRunner().invoke(app, ["compile"])
    assert result.exit_code == 0, result.output
    assert "decode      2.0 s, of the CPU    3.0 s" in result.stdout
    assert "copies of stacks in the loop: none" in result.stdout
    assert "copies of weights, cache in the loop: [64,64] by copy" in result.stdout
    refused = CliRunner().invoke(app, ["compile", "--for-h200"])  # no plugin is installed here
    assert refused.exit_code == 2 and "install JAX's CUDA plugin" in refused.stderr
    assert '"weights": [' in CliRunner().invoke(app, ["compile", "--json"]).stdout
