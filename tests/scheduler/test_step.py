"""How a step is shared by a prompt that does not fit into it and shorter ones."""

from __future__ import annotations

from tests.scheduler.test_scheduler import advance, request, scheduler, shares


def test_who_fits_beside_a_prompt_that_is_cut_goes_before_who_does_not() -> None:
    one = scheduler(budget=16)
    one.add(request("a", 60))
    one.add(request("b", 60))
    one.add(request("c", 14))
    one.add(request("d", 6))
    one.add(request("e", 5))
    one.add(request("f", 5))
    # A quarter is the least that the cut one gets, and who comes whole has the rest, in order.
    assert shares(advance(one)) == [("a", 0, 4, False), ("d", 0, 6, True), ("e", 0, 5, True)]
    assert shares(advance(one)) == [
        ("a", 4, 4, False),
        ("d", 6, 1, True),
        ("e", 5, 1, True),
        ("f", 0, 5, True),
    ]
    # When nobody fits any more, all that is left is the first one's, but for a token for each behind it.
    for start in (8, 21, 34):
        assert shares(advance(one))[0] == ("a", start, 13, False)
    assert [name for name, *_ in shares(advance(one))] == ["a", "d", "e", "f"]
    step = shares(advance(one))
    assert step[0] == ("a", 60, 1, True)
    assert step[-1] == ("b", 0, 12, False)


def test_a_prompt_that_is_cut_is_not_smaller_for_who_cannot_be_admitted() -> None:
    one = scheduler(budget=16, max_num_seqs=1)
    one.add(request("a", 60))
    one.add(request("b", 4))
    assert shares(advance(one)) == [("a", 0, 16, False)]


def test_steps_get_smaller_deep_in_a_prompt() -> None:
    one = scheduler(budget=32, attention_parity=16)
    one.add(request("a", 80))
    # Behind 32 tokens one costs three, behind 48 four.
    assert shares(advance(one)) == [("a", 0, 32, False)]
    assert shares(advance(one)) == [("a", 32, 10, False)]
    assert shares(advance(one)) == [("a", 42, 8, False)]
    one.add(request("b", 90))
    one.add(request("c", 20))
    # The quarter is one of work: 8 pay for 1 token behind 50.
    assert shares(advance(one)) == [("a", 50, 1, False), ("c", 0, 20, True)]
    assert one.stats.scheduled_tokens_total == 32 + 10 + 8 + 21


def test_for_few_a_step_is_no_larger_than_saturates_the_device() -> None:
    one = scheduler(budget=200, max_num_seqs=20, saturating_num_tokens=60)
    one.add(request("a", 80))
    assert shares(advance(one)) == [("a", 0, 80, True)]  # it is alone
    one.add(request("b", 40))
    one.add(request("c", 40))
    assert shares(advance(one)) == [("a", 80, 1, True), ("b", 0, 40, True), ("c", 0, 19, False)]
    assert shares(advance(one)) == [("a", 81, 1, True), ("b", 40, 1, True), ("c", 19, 21, True)]
    for name in "defghi":
        one.add(request(name, 40))
    assert advance(one).num_tokens == 9 * 16
