"""What is left where a server does not get as far as to listen."""

import threading

import pytest

from jax_lora.demo.job import FOLDER
from jax_lora.serving.engine.engine import Stepper
from jax_lora.serving.server import run


def test_a_warm_up_that_fails_leaves_no_thread(monkeypatch):
    def fail(stepper):
        raise ValueError("no memory")

    monkeypatch.setattr(Stepper, "warm_up", fail)
    before = {*threading.enumerate()}
    with pytest.raises(ValueError, match="no memory"):
        run.load(run.Model(FOLDER / "base"), lambda _: None)
    assert not [t for t in {*threading.enumerate()} - before if t.name.startswith("jax-lora")]
