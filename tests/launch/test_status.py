from bitlm_dist.launch.status import _rate


def entry(seconds, tokens, predicted):
    return {"seconds": seconds, "tokens": tokens, "predicted_tokens": predicted}


def test_rates_of_the_last_steps():
    recent = [entry(1.0, 100, 10), entry(2.0, 150, 12), entry(3.0, 300, 20)]
    assert (_rate(recent, "tokens"), _rate(recent, "predicted_tokens")) == (100.0, 5.0)


def test_no_rate_where_there_is_nothing_to_divide():
    assert _rate([], "tokens") is _rate([entry(1.0, 100, 10)], "tokens") is None
    assert _rate([entry(1.0, 100, 10), entry(1.0, 100, 10)], "tokens") is None, "no time has passed"
    assert _rate([entry(1.0, 100, None), entry(2.0, 200, None)], "predicted_tokens") is None
    assert (
        _rate([{"seconds": 1.0, "tokens": 1}, {"seconds": 2.0, "tokens": 2}], "predicted_tokens")
        is None
    ), "an older version"
