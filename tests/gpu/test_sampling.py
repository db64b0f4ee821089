"""The GPU sampler at full size against the numpy reference, which the CPU tests hold to the CPU's sampler."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.gpu.gpu_found import skip_without_gpu

pytestmark = skip_without_gpu

from engine_runtime.cuda import CudaDevice, DeviceBuffer, Stream, checked, driver  # noqa: E402
from engine_runtime.kernels.gpu_embedding import GpuEmbedding  # noqa: E402
from engine_runtime.kernels.kernel_library import KernelLibrary  # noqa: E402
from engine_runtime.kernels.sampling_reference import kept_weights, sample_row, token_logprobs  # noqa: E402
from scheduler.messages import SampledToken, SamplingParams  # noqa: E402
from tests.engine_runtime.kernels.sampling_cases import (  # noqa: E402
    assert_same_logprobs,
    random_logits,
    random_params,
)
from tests.gpu.device_sampler import DeviceSampler  # noqa: E402


@pytest.fixture(scope="module")
def library() -> Iterator[KernelLibrary]:
    library = KernelLibrary(CudaDevice())
    yield library
    library.close()


@pytest.mark.parametrize(
    ("vocab_size", "num_rows"),
    [(300, 512), (5001, 1024), (49152, 1024), (50257, 128), (128256, 384), (262144, 96)],
)
def test_draws_what_the_reference_draws(library: KernelLibrary, vocab_size: int, num_rows: int) -> None:
    rng = np.random.default_rng(vocab_size)
    batch = min(num_rows, 128)
    sampler = DeviceSampler(library, vocab_size, batch, batch)
    agreed = 0
    for _ in range(num_rows // batch):
        params = [random_params(rng, vocab_size) for _ in range(batch)]
        logits = np.stack([random_logits(rng, vocab_size) for _ in params])
        positions = rng.integers(1, 100, batch).tolist()
        for slot, (param, position) in enumerate(zip(params, positions, strict=True)):
            sampler.admit(sampler.stream, slot, param, [0] * position, 1)
        sampled, _ = sampler.step(logits, range(batch), positions)
        with ThreadPoolExecutor(16) as pool:
            expected = list(
                pool.map(lambda row, p, n: sample_row(row, p, [0] * n, 1).token_id, logits, params, positions)
            )
        for ours, theirs, param in zip(sampled, expected, params, strict=True):
            assert ours.is_valid
            if ours.token_id != theirs:
                print(f"{ours.token_id} instead of {theirs}: {param}")
        agreed += sum(ours.token_id == theirs for ours, theirs in zip(sampled, expected, strict=True))
        assert sampler.sampled_tokens().tolist() == [s.token_id for s in sampled]
    print(f"vocabulary {vocab_size}: {agreed} of {num_rows // batch * batch} tokens agree")
    assert agreed >= num_rows // batch * batch - max(1, num_rows // 300)
    sampler.close()


@pytest.mark.parametrize("vocab_size", [700, 128256])
def test_everything_at_once_over_steps_and_preemptions(library: KernelLibrary, vocab_size: int) -> None:
    num_rows = 24
    rng = np.random.default_rng(vocab_size)
    sampler = DeviceSampler(library, vocab_size, num_rows, num_rows)
    params = [random_params(rng, vocab_size, changes=True) for _ in range(num_rows)]
    tokens = [rng.integers(0, 40, 10).tolist() for _ in params]
    for slot, param in enumerate(params):
        sampler.admit(sampler.stream, slot, param, tokens[slot], 10)
    slots = list(range(num_rows))
    mask_words = -(-vocab_size // 32)
    masks_on_device = DeviceBuffer(4 * mask_words * num_rows)
    agreed = total = 0
    for step in range(9):
        if step in (3, 6):  # some sequences come back from a preemption, in each other's slots
            slots[1], slots[4], slots[7] = slots[4], slots[7], slots[1]
            for row in (1, 4, 7):
                sampler.admit(sampler.stream, slots[row], params[row], tokens[row], 10)
        logits = np.stack([random_logits(rng, vocab_size) for _ in params])
        logits[:, 40:] -= 10.0  # so that tokens repeat
        allowed = rng.random((num_rows, vocab_size)) < 0.6
        masks = np.zeros((num_rows, 4 * mask_words), np.uint8)
        packed_bits = np.packbits(allowed, axis=1, bitorder="little")
        masks[:, : packed_bits.shape[1]] = packed_bits
        masks_on_device.write(masks)
        grammars = [
            masks_on_device.address + row * 4 * mask_words if row % 2 else 0 for row in range(num_rows)
        ]
        sampled, _ = sampler.step(logits, slots, [len(ids) for ids in tokens], grammars=grammars)
        for row, ours in enumerate(sampled):
            expected = sample_row(
                logits[row], params[row], tokens[row], 10, allowed[row] if row % 2 else None, f"r{slots[row]}"
            )
            assert ours.is_valid == expected.is_valid
            assert (ours.logprobs is None) == (expected.logprobs is None)
            total += 1
            if ours.token_id == expected.token_id:
                agreed += 1
                if ours.logprobs is not None:
                    assert_same_logprobs(ours, expected)
            tokens[row].append(ours.token_id)
    print(f"vocabulary {vocab_size}: {agreed} of {total} tokens agree")
    assert agreed >= total - 1
    masks_on_device.free()
    sampler.close()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.3),
        SamplingParams(temperature=0.9, top_p=0.8),
        SamplingParams(temperature=2.0, top_k=30),
        SamplingParams(temperature=1.0, min_p=0.05, top_p=0.95),
    ],
    ids=["temperature", "top_p", "top_k", "min_p"],
)
def test_draws_from_the_right_distribution(library: KernelLibrary, params: SamplingParams) -> None:
    vocab_size, num_rows, num_steps = 400, 256, 100
    rng = np.random.default_rng(1)
    row = (rng.standard_normal(vocab_size) * 2).astype(np.float32)
    sampler = DeviceSampler(library, vocab_size, num_rows, num_rows)
    for slot in range(num_rows):
        seeded = SamplingParams(params.temperature, params.top_k, params.top_p, params.min_p, seed=slot)
        sampler.admit(sampler.stream, slot, seeded, [0], 1)
    counts = np.zeros(vocab_size)
    logits = np.tile(row, (num_rows, 1))
    for position in range(1, num_steps + 1):
        sampled, _ = sampler.step(logits, range(num_rows), [position] * num_rows)
        counts += np.bincount([s.token_id for s in sampled], minlength=vocab_size)
    weights = kept_weights(row, params)
    expected = weights / weights.sum() * num_rows * num_steps
    assert counts[weights == 0].sum() == 0
    likely = expected >= 5
    statistic = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    print(f"chi-square {statistic:.1f} at {freedom} degrees of freedom")
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)
    sampler.close()


@pytest.mark.parametrize("vocab_size", [5001, 128256])
def test_a_row_does_not_depend_on_the_batch(library: KernelLibrary, vocab_size: int) -> None:
    rng = np.random.default_rng(3)
    num_rows = 48
    sampler = DeviceSampler(library, vocab_size, num_rows, num_rows)
    params = [random_params(rng, vocab_size, changes=row % 3 == 0) for row in range(num_rows)]
    logits = np.stack([random_logits(rng, vocab_size) for _ in params])

    def run(rows: list[int]) -> list[SampledToken]:
        for row in rows:
            sampler.admit(sampler.stream, row, params[row], [1, 2, 3], 2)
        return sampler.step(logits[rows], rows, [3] * len(rows))[0]

    together = run(list(range(num_rows)))
    for row in range(num_rows):
        assert run([row]) == [together[row]]
    backwards = run(list(range(num_rows))[::-1])
    assert backwards[::-1] == together
    sampler.close()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(top_k=5, top_p=0.9),
        SamplingParams(temperature=5.0, top_p=0.99),
        SamplingParams(top_k=5, logprobs=2, repetition_penalty=1.5, logit_bias=((3, 1.0),)),
    ],
    ids=["greedy", "temperature", "top_k", "wide", "full"],
)
def test_poisoned_rows_are_invalid_alone(
    library: KernelLibrary, params: SamplingParams, poison: float
) -> None:
    vocab_size = 20000
    rng = np.random.default_rng(0)
    sampler = DeviceSampler(library, vocab_size, 6, 6)

    def run(logits: np.ndarray) -> list[SampledToken]:  # type: ignore[type-arg]
        for slot in range(6):
            sampler.admit(sampler.stream, slot, params, [1, 2], 2)
        return sampler.step(logits, range(6), [2] * 6)[0]

    logits = rng.standard_normal((6, vocab_size)).astype(np.float32)
    clean = run(logits)
    bad = logits.copy()
    for row, place in ((1, 0), (3, 12345), (4, vocab_size - 1)):
        bad[row, place] = poison
    if poison == -np.inf:
        bad[[1, 3, 4]] = poison
    sampled = run(bad)
    assert [s.is_valid for s in sampled] == [True, False, True, False, False, True]
    assert [sampled[row] for row in (0, 2, 5)] == [clean[row] for row in (0, 2, 5)]
    sampler.close()


def test_steps_replay_as_a_cuda_graph(library: KernelLibrary) -> None:
    vocab_size, num_rows = 32000, 16
    rng = np.random.default_rng(8)
    sampler = DeviceSampler(library, vocab_size, num_rows, num_rows)
    params = [random_params(rng, vocab_size, changes=True) for _ in range(num_rows)]
    logits = np.stack([random_logits(rng, vocab_size) for _ in params])

    def admit() -> None:
        for slot, param in enumerate(params):
            sampler.admit(sampler.stream, slot, param, [1, 2, 3], 3)

    admit()
    steps = [sampler.step(logits, range(num_rows), [position] * num_rows)[0] for position in (3, 4, 5)]
    admit()
    sampler.logits.write(logits)
    packed = sampler.upload(range(num_rows), [3] * num_rows)
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    checked(driver.cuStreamBeginCapture(sampler.stream.handle, mode))
    sampler.enqueue(sampler.stream, packed.path, num_rows, sampler.logits.address, sampler.inputs.address)
    graph = checked(driver.cuStreamEndCapture(sampler.stream.handle))
    executable = checked(driver.cuGraphInstantiate(graph, 0))
    for step, position in enumerate((3, 4, 5)):
        packed = sampler.upload(range(num_rows), [position] * num_rows)
        checked(driver.cuGraphLaunch(executable, sampler.stream.handle))
        replayed, _ = sampler.results(packed, [f"r{slot}" for slot in range(num_rows)])
        assert replayed == steps[step]
    sampler.close()


def test_given_tokens(library: KernelLibrary) -> None:
    vocab_size = 128256
    rng = np.random.default_rng(4)
    sampler = DeviceSampler(library, vocab_size, 16, 16)
    logits = (rng.standard_normal((9, vocab_size)) * 3).astype(np.float32)
    targets = [
        (int(token), int(n))
        for token, n in zip(rng.integers(0, vocab_size, 9), (0, 1, 5, 20, 2, 3, 4, 5, 6), strict=True)
    ]
    _, given = sampler.step(logits, [], [], targets=targets)
    for row, ((token, top_n), ours) in enumerate(zip(targets, given, strict=True)):
        theirs = token_logprobs(logits[row], token, top_n)
        assert_same_logprobs(SampledToken("", token, ours), SampledToken("", token, theirs))
    sampler.close()


@pytest.mark.parametrize(("hidden_size", "num_tokens"), [(576, 1), (4096, 64), (5120, 777)])
def test_embedding(library: KernelLibrary, hidden_size: int, num_tokens: int) -> None:
    stream = Stream()
    rng = np.random.default_rng(hidden_size)
    table = rng.standard_normal((1000, hidden_size)).astype(np.float16)
    sampled = rng.integers(0, 1000, 64).astype(np.int32)
    token_ids = rng.integers(-64, 1000, num_tokens).astype(np.int32)
    hidden = np.full((num_tokens, hidden_size), np.nan, np.float16)
    buffers = [DeviceBuffer.of(array) for array in (token_ids, sampled, table, hidden)]
    ids_address, sampled_address, table_address, hidden_address = (buffer.address for buffer in buffers)
    embedding = GpuEmbedding(library, "fp16", table_address, 1000, hidden_size, 1.25)
    embedding.enqueue(stream, num_tokens, ids_address, sampled_address, hidden_address)
    stream.synchronize()
    buffers[3].read(hidden)
    resolved = np.where(token_ids < 0, sampled[np.maximum(-token_ids - 1, 0)], token_ids)
    expected = (table[resolved].astype(np.float32) * 1.25).astype(np.float16)
    assert hidden.tobytes() == expected.tobytes()
    for buffer in buffers:
        buffer.free()
    stream.close()
