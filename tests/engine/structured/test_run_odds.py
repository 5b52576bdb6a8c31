"""Odds that forced tokens follow are those of the answers seen."""

from engine.structured.run_odds import RunForecast, RunOdds

LETTERS, DIGITS = 1, 2


def follow(forecast, tokens):
    """The odds before each token; ``tokens``: what was allowed, and whether forced ones followed."""
    found = []
    for allowed, runs in tokens:
        forecast.sampling(allowed)
        found.append(forecast.odds)
        forecast.sampled(runs)
        assert forecast.odds == 0.0, "no step samples a token"
    return found


def test_the_end_of_a_text_of_bounded_length_is_foreseen():
    odds, answer = RunOdds(), [(LETTERS, False)] * 3 + [(LETTERS, True), (DIGITS, False), (DIGITS, True)]
    first = follow(RunForecast(odds), answer)
    assert all(0.0 < share < 0.5 for share in first)
    for _ in range(50):
        last = follow(RunForecast(odds), answer)
    assert [round(share) for share in last] == [int(runs) for _, runs in answer]
    assert max(abs(share - runs) for share, (_, runs) in zip(last, answer, strict=True)) < 0.05


def test_odds_are_shares():
    odds = RunOdds()
    for index in range(400):
        follow(RunForecast(odds), [(LETTERS, index % 4 == 0)])
    (share,) = follow(RunForecast(odds), [(LETTERS, False)])
    assert 0.24 < share < 0.26


def test_what_is_kept_is_bounded():
    odds = RunOdds()
    for index in range(10_000):
        follow(RunForecast(odds), [(index, True)])
    assert len(odds._counts) <= 4096
    long = RunForecast(odds)
    follow(long, [(-1, False)] * 500)
    assert len([state for state in odds._counts if state[0] == -1]) < 100
