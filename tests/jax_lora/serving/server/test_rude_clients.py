"""The chaos of benchmarks, small; it kills the server, and starts it again."""

import pytest

from benchmarks import chaos

pytestmark = pytest.mark.ci


def test_each_client_has_its_own_answer_or_an_error(server):
    load = chaos.Load(seconds=5, clients=3, connections=500, streams=20)
    summary = chaos.disturb(server, load, lambda text: None)
    assert summary.wrong == []
    counts = summary.counts
    assert counts["connections of floods"] == 1000
    assert counts["answered"] > 60 and counts["told to try again later"]
    assert counts["told by a broken connection"] > 0
    assert all(
        counts[kind]
        for kind in (
            "slow readers",
            "half-closed",
            "gone before their body had come",
            "gone in the middle of an answer",
            "sent garbage",
            "loads with status 200",
            "unloads with status 200",
        )
    )
    assert summary.ok, summary.host_bytes
