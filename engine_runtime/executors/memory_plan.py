"""Where the memory goes, decided before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass


class MemoryPlanError(ValueError):
    """The model and its KV cache do not fit. The message holds the plan and says what to change."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose.

    Attributes:
        weight_bytes: while serving.
        load_bytes: more than that while the weights are loaded.
        activation_bytes: buffers of the largest step.
        available_bytes: what the machine or the control group had to give.
    """

    weight_bytes: int
    load_bytes: int
    activation_bytes: int
    num_blocks: int
    block_size: int
    block_bytes: int
    max_model_len: int
    available_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_full_sequences(self) -> float:
        """Sequences of the greatest length that fit in the KV pool at once."""
        return self.num_blocks * self.block_size / self.max_model_len

    def table(self) -> str:
        """The plan for humans, a line for each purpose."""
        tokens = self.num_blocks * self.block_size
        lines = [
            ("weights", self.weight_bytes, ""),
            ("activations", self.activation_bytes, ""),
            (
                "KV cache",
                self.kv_bytes,
                f"{self.num_blocks:,} blocks x {self.block_size} tokens = {tokens:,} tokens, "
                f"{self.num_full_sequences:.1f} sequences of {self.max_model_len:,}",
            ),
            ("available", self.available_bytes, ""),
        ]
        return "\n".join(f"{name:<12}{_mebibytes(size):>14}  {note}".rstrip() for name, size, note in lines)


def make_plan(
    *,
    weight_bytes: int,
    load_bytes: int,
    activation_bytes: int,
    block_size: int,
    block_bytes: int,
    kv_limit_bytes: int,
    claimed_len: int,
    max_model_len: int | None,
    max_num_seqs: int,
    kv_cache_bytes: int | None,
    available_bytes: int,
) -> MemoryPlan:
    """Divides the memory.

    Args:
        block_bytes: of a block in all layers.
        kv_limit_bytes: what the KV cache may take if ``kv_cache_bytes`` is None.
        claimed_len: the context length that the model claims.
        max_model_len: None takes what the model claims; less if ``kv_cache_bytes`` is None too and the
            memory holds less.
        kv_cache_bytes: None takes ``kv_limit_bytes``, no more than ``max_num_seqs`` sequences of the greatest
            length need.

    Raises:
        MemoryPlanError: it does not fit, or ``max_model_len`` is above ``claimed_len``.
    """
    if max_model_len is not None and max_model_len > claimed_len:
        raise MemoryPlanError(
            f"--max-model-len {max_model_len} is more than the {claimed_len} tokens that "
            "the model is made for"
        )
    wanted_len = max_model_len or claimed_len
    blocks_a_sequence = -(-wanted_len // block_size)
    if kv_cache_bytes is None:
        num_blocks = min(kv_limit_bytes // block_bytes, max_num_seqs * blocks_a_sequence)
    else:
        num_blocks = kv_cache_bytes // block_bytes
    if max_model_len is None and kv_cache_bytes is None:
        wanted_len = max(1, min(wanted_len, num_blocks * block_size))
    plan = MemoryPlan(
        weight_bytes,
        load_bytes,
        activation_bytes,
        num_blocks,
        block_size,
        block_bytes,
        wanted_len,
        available_bytes,
    )
    needed = weight_bytes + activation_bytes + max(load_bytes, plan.kv_bytes)
    if num_blocks < 1 or plan.num_full_sequences < 1:
        least = -(-wanted_len // block_size) * block_bytes
        raise MemoryPlanError(
            f"The KV cache cannot hold one sequence of {wanted_len:,} tokens, which takes "
            f"{_mebibytes(least)}. Lower --max-model-len or raise --kv-cache-bytes.\n{plan.table()}"
        )
    if needed > available_bytes:
        raise MemoryPlanError(
            f"{_mebibytes(needed)} are needed, while {_mebibytes(available_bytes)} are available. "
            f"Lower --kv-cache-bytes, or take a smaller model or dtype.\n{plan.table()}"
        )
    return plan


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
