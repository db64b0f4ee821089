"""What the name of a compiled matrix product says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

_NAME = re.compile(
    r"(?P<function>gemv|skinny|tiled|hopper|thin)(?P<fp8>8?)_(?P<role>\w+?)_(?P<blocks>\d+x\d+x\d+x\d+x\d+)"
)
_PARTS = {"parts2": 2, "parts4": 4}


@dataclass(frozen=True, slots=True)
class GemmForm:
    """One compiled form of a matrix product; see ``kernels/triton/segment_*.py``.

    Attributes:
        name: of the kernel.
        bm, bn, bk: tokens, rows of W and columns of both in a tile. With an activation,
            "hopper" and "thin" count rows of gate and up in ``bn``, the others those of gate.
        num_stages: tiles of both operands that shared memory holds.
        num_warps: of a group that multiplies.
        is_fp8: the weights are E4M3 with a factor for each row.
        num_parts: arrays of partial sums that it writes.
    """

    name: str
    function: str
    role: str
    bm: int
    bn: int
    bk: int
    num_stages: int
    num_warps: int
    is_fp8: bool

    @property
    def num_parts(self) -> int:
        return _PARTS.get(self.role, 1)

    @property
    def result_bytes(self) -> int:
        """For each number of the result, in all parts."""
        return self.num_parts * (4 if self.writes_float32 else 2)

    @property
    def columns(self) -> int:
        """Of the result, in a tile."""
        return self.bn // 2 if self._activates and self.function in ("hopper", "thin") else self.bn

    @property
    def rows(self) -> int:
        """Of W in a tile: of gate and up, if it activates."""
        return 2 * self.columns if self._activates else self.columns

    @property
    def is_persistent(self) -> bool:
        """Its programs live as long as the launch, one on each multiprocessor."""
        return self.function in ("hopper", "thin")

    @property
    def writes_float32(self) -> bool:
        return self.num_parts > 1 or self.role.endswith("logits")

    @property
    def _activates(self) -> bool:
        return self.role.endswith(("silu", "gelu"))


def parse_forms(names: Iterable[str]) -> tuple[GemmForm, ...]:
    """The matrix products among the names of compiled kernels."""
    return _parse(tuple(names))


@cache
def _parse(names: tuple[str, ...]) -> tuple[GemmForm, ...]:
    found = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is not None:
            function, role, is_fp8 = match["function"], match["role"], match["fp8"] != ""
            bm, bn, bk, num_stages, num_warps = map(int, match["blocks"].split("x"))
            found.append(GemmForm(name, function, role, bm, bn, bk, num_stages, num_warps, is_fp8))
    return tuple(found)
