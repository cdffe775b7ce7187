"""What HTTP costs, small: that both ways answer all that is asked."""

import pytest

from benchmarks import endpoint


@pytest.mark.slow
def test_both_ways_take_turns():
    report = endpoint.run(1, requests=12, turns=1, progress=lambda text: None)
    direct, http = report.turns
    assert (direct.way, http.way) == ("engine", "HTTP")
    assert direct.http_ms == 0 < http.http_ms
    assert all(turn.tokens_per_s > 0 < turn.first_ms for turn in report.turns)
    assert report.lost == pytest.approx(1 - http.tokens_per_s / direct.tokens_per_s)
