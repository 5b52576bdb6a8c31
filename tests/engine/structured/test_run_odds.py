"""Odds that forced tokens follow are those of the answers seen."""

from engine.structured.run_odds import ANY, RunForecast, RunOdds

LETTERS, DIGITS = 1, 2


def follow(forecast, tokens):
    """The odds before each token; ``tokens``: what was allowed, and whether forced ones followed."""
    found = []
    for allowed, runs in tokens:
        forecast.sampling(allowed)
        found.append(forecast.odds)
        forecast.sampled(5, [7] * runs)
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


def test_fields_of_one_type_are_told_apart_by_what_was_forced_before_them():
    """Each is followed by a key of its own."""
    odds = RunOdds()
    for _ in range(10):
        forecast, found = RunForecast(odds), []
        for key in (20, 30):
            for run in ([key, 7], []):
                forecast.sampling(LETTERS)
                found.append(forecast.expected)
                forecast.sampled(5, run)
    assert found[2] == {ANY: (30, 7)} and found[1] == found[3] == {}


def test_what_is_kept_is_bounded():
    odds = RunOdds()
    for index in range(10_000):
        follow(RunForecast(odds), [(index, True)])
    assert len(odds._counts) <= 4096
    long = RunForecast(odds)
    follow(long, [(-1, False)] * 500)
    assert len([state for state in odds._counts if state[0] == -1]) < 100


def test_runs_are_expected_where_most_answers_had_them():
    """Whatever comes before, or behind one of few tokens; not where answers go on in different ways."""
    odds = RunOdds()
    for index in range(100):
        for allowed, token, run in (
            (LETTERS, index, [7, 8]),
            (DIGITS, index % 3, [index % 3, 7]),
            (3, index, [index]),
            (4, index % 10, [7] * (index % 10 == 0)),
        ):
            forecast = RunForecast(odds)
            forecast.sampling(allowed)
            forecast.sampled(token, run)
    found = {}
    for allowed in (LETTERS, DIGITS, 3, 4, 5):
        forecast = RunForecast(odds)
        assert forecast.expected == {}
        forecast.sampling(allowed)
        found[allowed] = forecast.expected
    by_token = {token: (token, 7) for token in range(3)}
    assert found == {LETTERS: {ANY: (7, 8)}, DIGITS: by_token, 3: {}, 4: {}, 5: {}}
