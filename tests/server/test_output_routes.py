from __future__ import annotations

from scheduler.messages import EngineOutput, EngineOutputs, EngineStats, FinishReason
from server.output_routes import OutputRoutes

STATS = EngineStats(num_running=3)


def outputs(*request_ids: str, finished: str = "") -> EngineOutputs:
    return EngineOutputs(
        tuple(
            EngineOutput(name, (1,), finish_reason=FinishReason.STOP if name == finished else None)
            for name in request_ids
        ),
        STATS,
    )


def shares(routes: OutputRoutes, message: EngineOutputs) -> dict[bytes, list[str]]:
    split = dict(routes.split(message))
    assert all(share.stats == STATS for share in split.values())
    return {member: [output.request_id for output in share.outputs] for member, share in split.items()}


def test_each_process_gets_its_own_and_all_hear_of_each_step() -> None:
    routes = OutputRoutes()
    for member in (b"one", b"two", b"three", b"one"):
        routes.join(member)
    for request_id, owner in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        routes.add(request_id, owner)
    expected = {b"one": ["c", "a"], b"two": ["b"], b"three": []}
    assert shares(routes, outputs("c", "b", "a")) == expected
    assert shares(routes, outputs("a", finished="a"))[b"one"] == ["a"]
    assert shares(routes, outputs("a")) == {b"one": [], b"two": [], b"three": []}


def test_what_a_process_leaves_behind_is_told_and_goes_to_nobody() -> None:
    routes = OutputRoutes()
    routes.join(b"one")
    routes.add("done", b"one")
    routes.add("a", b"one")
    assert shares(routes, outputs("a", "done", finished="done")) == {b"one": ["a", "done"]}
    routes.join(b"two")
    routes.add("b", b"two")
    assert routes.leave(b"one") == ["a"]
    routes.join(b"three")
    assert shares(routes, outputs("a", "b")) == {b"two": ["b"], b"three": []}
    assert routes.leave(b"nobody") == []
