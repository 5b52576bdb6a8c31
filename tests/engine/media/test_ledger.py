"""The ledger of media: limits of a request, of a key and of all, and everything given back."""

import random
import threading

import pytest

from engine.errors import MediaTooLarge, Overloaded
from engine.media.ledger import AMOUNTS, Amounts, Ledger, MediaLimits

WHERE = "messages[0].content[1].image_url.url"


def ledger(**limits) -> Ledger:
    return Ledger(MediaLimits.model_validate(limits))


def test_a_request_alone_is_too_large():
    counted = ledger(per_request={"pixels": 100}, per_key={"tokens": 50}, in_all={"bytes": 10})
    with counted.open("key") as account:
        account.charge("pixels", 60, WHERE)
        account.charge("pixels", 40, WHERE)
        # What can never fit is no matter of coming back later.
        for amount, count, limit in (("pixels", 1, 100), ("tokens", 51, 50), ("bytes", 11, 10)):
            with pytest.raises(MediaTooLarge, match=f"the {limit} ") as error:
                account.charge(amount, count, WHERE)
            assert error.value.status == 413 and error.value.param == WHERE
        # What was refused is not counted.
        assert counted.held() == {"items": 0, "bytes": 0, "pixels": 100, "frames": 0, "tokens": 0}
    assert counted.is_empty


def test_open_requests_of_a_key_share_its_limit():
    counted = ledger(per_key={"items": 3})
    with counted.open("one") as first, counted.open("one") as second, counted.open("two") as other:
        first.charge("items", 2, WHERE)
        with pytest.raises(
            Overloaded, match="this API key's open requests hold 2 images and videos"
        ) as error:
            second.charge("items", 2, WHERE)
        assert error.value.status == 429 and error.value.param == WHERE
        other.charge("items", 3, WHERE)
        assert counted.held("one")["items"] == 2 and counted.held()["items"] == 5
        first.close()
        second.charge("items", 3, WHERE)
    assert counted.is_empty


def test_all_open_requests_share_a_limit():
    counted = ledger(in_all={"tokens": 10})
    with counted.open("one") as first, counted.open("two") as second:
        first.charge("tokens", 8, WHERE)
        with pytest.raises(Overloaded, match="all open requests hold 8 visual tokens"):
            second.charge("tokens", 3, WHERE)
        second.charge("tokens", 2, WHERE)
        first.give_back("tokens", 5)
        second.charge("tokens", 5, WHERE)
    assert counted.is_empty


def test_a_closed_account_counts_nothing():
    counted = ledger(per_request={"bytes": 1})
    account = counted.account("key")
    account.charge("bytes", 1, WHERE)
    account.close()
    account.close()
    account.charge("bytes", 100, WHERE)
    account.give_back("bytes", 1)
    assert counted.is_empty


def test_threads_lose_nothing_and_stay_within_the_limits():
    counted = ledger(per_key={"pixels": 500}, in_all={"pixels": 900})
    most: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            with counted.open(rng.choice("abc")) as account:
                for _ in range(rng.randrange(6)):
                    count = rng.randrange(120)
                    try:
                        account.charge("pixels", count, WHERE)
                    except (Overloaded, MediaTooLarge):
                        break
                    most.append(counted.held()["pixels"])
                    if rng.random() < 0.2:
                        account.give_back("pixels", count)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.is_empty and 0 < max(most) <= 900


def test_limits_know_every_amount():
    assert set(Amounts.model_fields) == set(AMOUNTS)
    with pytest.raises(ValueError, match="pictures"):
        MediaLimits.model_validate({"per_key": {"pictures": 1}})
