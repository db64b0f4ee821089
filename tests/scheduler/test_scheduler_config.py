"""Which requests can run at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.messages import Request, SamplingParams
from scheduler.scheduler_config import SchedulerConfig

CONFIG = SchedulerConfig(
    num_blocks=4, block_size=4, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=100, vocab_size=10
)


@pytest.mark.parametrize(
    "name",
    ["num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "vocab_size"],
)
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        replace(CONFIG, **{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("r", ()), "empty"),
        (Request("r", (1,), SamplingParams(max_tokens=0)), "max_tokens"),
        (Request("r", (1, 10)), "vocabulary"),
        (Request("r", (-1, 1)), "vocabulary"),
        (Request("r", (2**70,)), "vocabulary"),
        (Request("r", (1,), SamplingParams(logit_bias=((10, 1.0),))), "logit_bias"),
        (Request("r", (1,) * 17), "17 tokens and does not fit in the 4 KV blocks of 4 tokens"),
        (Request("r", (1,) * 100), "100 tokens.* 100 of the model's context"),
    ],
)
def test_requests_that_can_never_run(request_: Request, message: str) -> None:
    reason = CONFIG.reason_to_refuse(request_)
    assert reason is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(reason)


def test_the_longest_request_that_can_run_fills_the_pool() -> None:
    assert CONFIG.reason_to_refuse(Request("r", (1,) * 16)) is None
    assert CONFIG.max_num_tokens == 17
    short = replace(CONFIG, max_model_len=9)
    assert short.reason_to_refuse(Request("r", (1,) * 8)) is None
    assert short.reason_to_refuse(Request("r", (1,) * 9)) is not None
    assert short.max_num_tokens == 9
