"""What the ahead-of-time compiler is asked for, and what it answers: needs neither Triton nor CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

CUBINS = Path(__file__).parent / "cubins"
MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, that kernels are compiled for."""
FP8_ARCHITECTURES = tuple(architecture for architecture in ARCHITECTURES if architecture >= 89)


@dataclass(frozen=True)
class KernelSpec:
    """One compiled form of a Triton function. Modules list theirs as ``SPECS``.

    Attributes:
        function: decorated with ``triton.jit``, or ``gluon.jit``.
        name: of the compiled kernel; unique among the specs of an architecture.
        signature: type of each argument that is not in ``constexprs``: ``*bf16`` is a pointer, ``i32``,
            ``i64``, ``fp32`` are passed by value; ``:16`` after it promises a multiple of 16 (of an address:
            in bytes), which is what wide loads need. ``tensordesc<bf16[64, 128]>`` is a tensor map for tiles
            of that shape (from compute capability 9.0 on), followed by sizes and strides: see
            ``Kernel.tensor_map``. For Gluon the layout of the tile in shared memory follows after a comma.
        constexprs: values of the arguments that are fixed.
        num_warps: of 32 threads a program.
        num_stages: depth of software pipelining.
        max_registers: of a thread; Gluon's specialized warps need it. None: what the compiler likes.
        architectures: those to compile for.
        starts_early: it may start while the launch before it still runs, and waits for the end of that one
            itself (``gdc_wait``) before it writes, or reads what was just written. What it reads sooner, such
            as weights or the inputs of a step, must have been there: see ``Kernel.launch_early``. Programs
            that do nothing of this need not wait, but one must.
    """

    function: Any
    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None
    architectures: tuple[int, ...] = ARCHITECTURES
    starts_early: bool = False


def early_where_possible(spec: KernelSpec) -> Iterator[KernelSpec]:
    """The spec for architectures on which a launch may start early, from 9.0 on, and for the others.

    Its function has a constexpr EARLY, which says for which of them it is compiled.
    """
    for early in (False, True):
        architectures = tuple(each for each in spec.architectures if (each >= 90) == early)
        constexprs = {**spec.constexprs, "EARLY": early}
        yield replace(spec, constexprs=constexprs, architectures=architectures, starts_early=early)
