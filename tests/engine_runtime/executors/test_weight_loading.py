"""Weights from files in several threads: every byte arrives, and whatever fails is told."""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("cuda.bindings", reason="CUDA's bindings are not installed: pip install -e '.[gpu]'")

from engine_runtime.executors.tensorrt.weight_loading import load_weights
from engine_runtime.executors.tensorrt.weight_pieces import ConvertedArray, Piece, largest_piece, pieces_of
from engine_runtime.executors.tensorrt.weight_plan import Quantization, WeightPlan
from engine_runtime.models.architectures import ARCHITECTURES
from engine_runtime.weights.checkpoint import open_checkpoint
from engine_runtime.weights.errors import CheckpointError
from engine_runtime.weights.file_tensor import FileTensor
from tests.engine_runtime.executors.sharded_checkpoint import write_sharded_checkpoint
from tests.engine_runtime.executors.test_trt_weights import ArrayTarget
from tests.engine_runtime.tiny_configs import tiny_config
from tests.engine_runtime.weights.test_fp8_checkpoint import Format, write_fp8_checkpoint

Array = npt.NDArray[Any]


class LaneError(Exception):
    """Stands for an error of CUDA."""


class CountingTarget(ArrayTarget):
    """Counts its lanes, and may fail at a piece or when a lane is opened."""

    def __init__(self, num_bytes: int, fails_at: int = -1, fails_to_open: int = -1) -> None:
        super().__init__(num_bytes)
        self.num_opened = self.num_open = self.num_taken = 0
        self.threads: set[str] = set()
        self.fails_at = fails_at
        self._fails_to_open = fails_to_open
        self._lock = threading.Lock()

    @contextmanager
    def open_lane(self, piece_bytes: int) -> Iterator[ArrayTarget]:
        with self._lock:
            self.num_opened += 1
            if self.num_opened == self._fails_to_open:
                raise LaneError("no memory to lock")
            self.num_open += 1
        try:
            yield self
        finally:
            with self._lock:
                self.num_open -= 1

    def take(self, piece: Piece) -> None:
        with self._lock:
            self.num_taken += 1
            number = self.num_taken
            self.threads.add(threading.current_thread().name)
        if number == self.fails_at:
            raise LaneError(f"piece {number}")
        super().take(piece)


def running() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("load-weights", "read-weights"))]


def check(target: ArrayTarget, expected: dict[int, Array]) -> None:
    """Every byte was written once, and nothing else."""
    written = np.zeros_like(target.written)
    for offset, data in expected.items():
        np.testing.assert_array_equal(target.memory[offset : offset + len(data)], data)
        written[offset : offset + len(data)] = 1
    np.testing.assert_array_equal(target.written, written)


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("types", [("bfloat16",), ("bfloat16", "float16", "float32")])
def test_every_byte_arrives_whatever_the_pieces(
    types: tuple[str, ...], architecture: str, quantization: Quantization, tmp_path: Path
) -> None:
    for seed in range(2):
        rng = random.Random(seed)
        stored = write_sharded_checkpoint(tmp_path / str(seed), architecture, seed, types)
        checkpoint = stored.open()
        plan = WeightPlan(checkpoint.config, quantization=quantization)
        row_bytes = max(2 * tensor.shape[-1] for tensor in plan.tensors)
        piece_bytes = 4 * rng.randint(row_bytes // 4 + 1, 3 * row_bytes)
        target = CountingTarget(plan.num_bytes)
        load_weights(
            plan,
            checkpoint,
            target.open_lane,
            num_threads=rng.randint(1, 6),
            piece_bytes=piece_bytes if seed else None,
        )
        check(target, stored.expected(plan))
        assert target.num_taken > len(plan.tensors) or not seed
        assert target.num_open == 0
        checkpoint.close()


@pytest.mark.parametrize("form", ["compressed-tensors", "modelopt"])
def test_fp8_is_read_from_the_file_as_it_is(form: Format, tmp_path: Path) -> None:
    write_fp8_checkpoint(tmp_path / "model", form)
    checkpoint = open_checkpoint(tmp_path / "model")
    plan = WeightPlan(checkpoint.config, quantization="fp8")
    target = ArrayTarget(plan.num_bytes)
    load_weights(plan, checkpoint, target.open_lane, piece_bytes=1000)
    num_found = 0
    for tensor in plan.tensors:
        if tensor.scale_offset is None:
            continue
        values = pieces_of(tensor, checkpoint, 1000)[0]
        assert isinstance(values.source, FileTensor)
        fp8 = checkpoint.read_fp8(tensor.name)
        found = target.memory[tensor.offset :][: tensor.num_bytes].reshape(tensor.shape)
        np.testing.assert_array_equal(found, fp8.values.view(np.uint8))
        scales = target.memory[tensor.scale_offset :][: tensor.scale_bytes].view(np.float32)
        np.testing.assert_array_equal(scales, fp8.scales)
        num_found += 1
    assert num_found == 7 * checkpoint.config.num_hidden_layers
    checkpoint.close()


def test_only_what_the_file_holds_otherwise_goes_through_a_mapping(tmp_path: Path) -> None:
    for architecture, stored in (("gemma3", "bfloat16"), ("llama", "bfloat16"), ("qwen2", "float16")):
        folder = tmp_path / architecture
        checkpoint = write_sharded_checkpoint(folder, architecture, types=(stored,)).open()
        plan = WeightPlan(checkpoint.config)
        sources = {tensor.name: pieces_of(tensor, checkpoint, 4096)[0].source for tensor in plan.tensors}
        converted = {name for name, source in sources.items() if isinstance(source, ConvertedArray)}
        norms = {name for name in sources if name.endswith("norm.weight")}
        expected: Any = {"gemma3": norms, "llama": set(), "qwen2": sources.keys()}
        assert converted == expected[architecture]
        checkpoint.close()


def test_a_file_that_gives_a_few_bytes_at_a_time_is_read_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:4097]], offset)

    monkeypatch.setattr(os, "preadv", short)
    stored = write_sharded_checkpoint(tmp_path / "model", "llama")
    checkpoint = stored.open()
    plan = WeightPlan(checkpoint.config)
    target = ArrayTarget(plan.num_bytes)
    load_weights(plan, checkpoint, target.open_lane)
    check(target, stored.expected(plan))
    checkpoint.close()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _failing_read(descriptor: int, buffers: object, offset: int) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("num_threads", [1, 5])
def test_a_file_that_is_cut_off_meanwhile_is_named(num_threads: int, tmp_path: Path) -> None:
    """Through a mapping, the system would end the process."""
    stored = write_sharded_checkpoint(tmp_path / "model", "llama")
    checkpoint = stored.open()
    plan = WeightPlan(checkpoint.config)
    _cut(stored.shards[1])
    target = CountingTarget(plan.num_bytes)
    with pytest.raises(CheckpointError, match=r"part-2\.safetensors has become shorter .* then start again"):
        load_weights(plan, checkpoint, target.open_lane, num_threads=num_threads, piece_bytes=512)
    assert (running(), target.num_open) == ([], 0)
    checkpoint.close()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_sharded_checkpoint(tmp_path / "model", "llama").open()
    plan = WeightPlan(checkpoint.config)
    monkeypatch.setattr(os, "preadv", _failing_read)
    with pytest.raises(CheckpointError, match=r"cannot read .*part-\d\.safetensors: Input/output error"):
        load_weights(plan, checkpoint, ArrayTarget(plan.num_bytes).open_lane)
    monkeypatch.undo()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="Bad file descriptor"):
        load_weights(plan, checkpoint, ArrayTarget(plan.num_bytes).open_lane)
    assert running() == []


def test_files_are_closed_with_the_checkpoint_or_when_nobody_has_it(tmp_path: Path) -> None:
    stored = write_sharded_checkpoint(tmp_path / "model", "llama")

    def num_open() -> int:
        gc.collect()
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(str(link.readlink()).startswith(str(tmp_path)) for link in links if link.is_symlink())

    checkpoint = stored.open()
    tensor = checkpoint.in_file("model.norm.weight")
    assert tensor is not None
    assert num_open() >= len(stored.shards)
    checkpoint.close()
    assert num_open() == 0
    with (stored.folder / "config.json").open("rb"), pytest.raises(CheckpointError, match="Bad file"):
        tensor.read_into(0, np.empty(2, np.uint8))  # not from whichever file has the number now
    checkpoint = stored.open()
    tensor = checkpoint.in_file("model.norm.weight")
    assert tensor is not None
    del checkpoint
    data = np.empty(tensor.shape, tensor.dtype)
    tensor.read_into(0, data.view(np.uint8))
    np.testing.assert_array_equal(data, stored.tensors["model.norm.weight"])
    del tensor
    assert num_open() == 0


@pytest.mark.parametrize("failure", [{"fails_at": 20}, {"fails_to_open": 1}, {"fails_to_open": 3}])
def test_one_thread_that_fails_ends_all(failure: dict[str, int], tmp_path: Path) -> None:
    checkpoint = write_sharded_checkpoint(tmp_path / "model", "llama").open()
    plan = WeightPlan(checkpoint.config)
    target = CountingTarget(plan.num_bytes, **failure)
    with pytest.raises(LaneError):
        load_weights(plan, checkpoint, target.open_lane, num_threads=4, piece_bytes=128)
    assert (running(), target.num_open) == ([], 0)
    if target.fails_at > 0:
        assert target.num_taken < sum(len(pieces_of(tensor, checkpoint, 128)) for tensor in plan.tensors)
    checkpoint.close()


def test_the_first_error_is_raised(tmp_path: Path) -> None:
    """The first one fails at once, the others when they see that."""
    checkpoint = write_sharded_checkpoint(tmp_path / "model", "llama").open()
    plan = WeightPlan(checkpoint.config)
    all_wait, has_failed = threading.Barrier(3), threading.Event()

    class Lane:
        def take(self, piece: Piece) -> None:
            is_first = all_wait.wait() == 0
            if is_first:
                raise LaneError("the first")
            has_failed.wait()
            raise LaneError("a later one")

    @contextmanager
    def open_lane(piece_bytes: int) -> Iterator[Lane]:
        try:
            yield Lane()
        except LaneError as error:
            if str(error) == "the first":
                threading.Timer(0.05, has_failed.set).start()
            raise

    with pytest.raises(LaneError, match="the first"):
        load_weights(plan, checkpoint, open_lane, num_threads=3, piece_bytes=512)
    assert running() == []
    checkpoint.close()


def test_progress_is_told_by_the_calling_thread_up_to_the_end(tmp_path: Path) -> None:
    checkpoint = write_sharded_checkpoint(tmp_path / "model", "qwen2").open()
    plan = WeightPlan(checkpoint.config, quantization="fp8")
    seen: list[tuple[int, int]] = []
    told_by: set[str] = set()
    may_go_on = threading.Event()

    class Target(CountingTarget):
        def take(self, piece: Piece) -> None:
            if self.num_taken >= 10:
                may_go_on.wait()
            super().take(piece)

    def tell(done: int, total: int) -> None:
        seen.append((done, total))
        told_by.add(threading.current_thread().name)
        if done:
            may_go_on.set()

    target = Target(plan.num_bytes)
    load_weights(plan, checkpoint, target.open_lane, tell, num_threads=3, piece_bytes=1024)
    assert told_by == {threading.current_thread().name}
    assert seen == sorted(seen)
    total = sum(tensor.num_bytes + tensor.scale_bytes for tensor in plan.tensors)
    assert seen[-1] == (total, total)
    assert any(0 < done < total for done, _ in seen)
    assert all(name.startswith("load-weights") for name in target.threads)
    checkpoint.close()


def test_an_error_in_the_calling_thread_ends_all(tmp_path: Path) -> None:
    """Such as an interrupt from the keyboard."""
    checkpoint = write_sharded_checkpoint(tmp_path / "model", "llama").open()
    plan = WeightPlan(checkpoint.config)
    may_go_on = threading.Event()

    class Target(CountingTarget):
        def take(self, piece: Piece) -> None:
            may_go_on.wait()
            super().take(piece)

    def interrupt(done: int, total: int) -> None:
        threading.Timer(0.05, may_go_on.set).start()
        raise KeyboardInterrupt

    target = Target(plan.num_bytes)
    with pytest.raises(KeyboardInterrupt):
        load_weights(plan, checkpoint, target.open_lane, interrupt, num_threads=3, piece_bytes=512)
    assert (running(), target.num_open) == ([], 0)
    assert target.num_taken <= 3
    checkpoint.close()


def test_a_row_fits_in_the_largest_piece() -> None:
    narrow, wide = (tiny_config("llama", intermediate_size=size) for size in (112, 3_000_001))
    assert largest_piece(WeightPlan(narrow, quantization="fp8")) == largest_piece(WeightPlan(wide))
    size = largest_piece(WeightPlan(wide, quantization="fp8"))
    assert size >= 2 * 3_000_001
    assert size % 256 == 0
