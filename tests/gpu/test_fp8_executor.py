"""FP8 weights and an FP8 KV cache through the whole executor, beside bfloat16.

E4M3 has three bits of fraction: every product gets 3 to 4 % of noise, which changes texts soon. So texts are
not compared but judged: each token of one must be the model's first choice, or nearly, when the same weights
read the finished text in one go.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from engine_runtime.factory import RuntimeConfig, create_executor
from engine_runtime.weights.checkpoint import open_checkpoint
from scheduler.executor import Executor
from scheduler.messages import Request, SamplingParams
from tests.engine_runtime.executors.generation import Generated, Limited, answer, generate
from tests.gpu.gpu_found import skip_without_gpu
from tests.reference.recordings import Recording, load_recordings, load_vectors

pytestmark = skip_without_gpu
_NUM_TOKENS = 64
_BLOCK = 64
_Form = Literal["weights", "cache", "both"]


def _config(path: Path, **changes: Any) -> RuntimeConfig:
    sizes = {"max_model_len": 2048, "kv_cache_bytes": 1 << 30, "max_num_batched_tokens": 2048}
    return RuntimeConfig(path, device="cuda", **(sizes | changes))


@pytest.fixture(scope="module")
def bfloat16(smollm2_path: Path) -> Iterator[Executor]:
    made, _ = create_executor(_config(smollm2_path))
    yield made
    made.shutdown()


@pytest.fixture(scope="module", params=["weights", "cache", "both"])
def executor(request: pytest.FixtureRequest, smollm2_path: Path) -> Iterator[Executor]:
    quantization = "none" if request.param == "cache" else "fp8"
    kv_cache_dtype = "auto" if request.param == "weights" else "fp8"
    made, plan = create_executor(
        _config(smollm2_path, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
    )
    print(f"\n{made.spec.device}\n{plan.table()}")
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    return load_recordings("smollm2")


def _judge(
    executor: Executor, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(logprob, how far below that of the first choice) of each token of the texts, read in one go."""
    params = SamplingParams(temperature=0.0, prompt_logprobs=1)
    whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    results, _ = generate(executor, whole, 1, params)
    logprobs, below = [], []
    for result, text in zip(results, texts, strict=True):
        assert result.prompt_logprobs is not None
        for entry in result.prompt_logprobs[-len(text) :]:
            logprobs.append(entry.logprob)
            below.append(entry.top[0][1] - entry.logprob)
    return np.array(logprobs), np.array(below)


def _check(executor: Executor, prompts: Sequence[Sequence[int]], results: Sequence[Generated]) -> None:
    _, below = _judge(executor, prompts, [result.token_ids for result in results])
    first = float((below == 0).mean())
    print(f"\n{first:.1%} of {len(below)} tokens are the first choice; below it: mean {below.mean():.4f}, "
          f"largest {below.max():.2f}")  # fmt: skip
    assert first > 0.9
    assert below.mean() < 0.02
    assert np.quantile(below, 0.999) < 1.5  # flat distributions make single tokens as much as 2.4 apart


def test_what_bfloat16_would_say_stays_likely(
    executor: Executor, bfloat16: Executor, recordings: list[Recording]
) -> None:
    prompts = [recording.prompt_token_ids for recording in recordings]
    texts = [recording.token_ids for recording in recordings]
    exact, exact_below = _judge(bfloat16, prompts, texts)
    found, below = _judge(executor, prompts, texts)
    print(
        f"\nfirst choices: {(exact_below == 0).mean():.1%} in bfloat16, {(below == 0).mean():.1%} in FP8; "
        f"nats a token: {(exact - found).mean():+.4f}, absolute {np.abs(exact - found).mean():.4f}"
    )
    assert (exact - found).mean() < 0.06
    assert (below == 0).mean() > 0.9
    assert np.abs(exact - found).mean() > 0  # it is another form


def test_all_at_once(executor: Executor, recordings: list[Recording]) -> None:
    prompts = [recording.prompt_token_ids for recording in recordings]
    results, _ = generate(executor, prompts, _NUM_TOKENS)
    _check(executor, prompts, results)


def test_alone(executor: Executor, recordings: list[Recording]) -> None:
    prompts = [recording.prompt_token_ids for recording in recordings[::4]]
    results = [generate(executor, [prompt], _NUM_TOKENS)[0][0] for prompt in prompts]
    _check(executor, prompts, results)


def test_chunked_and_with_prefix_hits(executor: Executor, recordings: list[Recording]) -> None:
    prompts = [r.prompt_token_ids for r in recordings if len(r.prompt_token_ids) > _BLOCK]
    limited = Limited(executor, max_num_seqs=8, max_num_batched_tokens=48)
    results, stats = generate(limited, prompts + prompts, _NUM_TOKENS)
    assert stats.prefix_cache_hits_total > 0
    _check(executor, prompts + prompts, results)


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_vectors_of_texts(
    executor: Executor, recordings: list[Recording], kind: Literal["mean", "last"]
) -> None:
    """Beside those of transformers in float32."""
    params = SamplingParams(temperature=0.0, max_tokens=1, pooling=kind)
    some = [Request(str(i), r.prompt_token_ids, params) for i, r in enumerate(recordings[::4])]
    cosines = []
    for result, expected in zip(answer(executor, some)[0], load_vectors("smollm2", kind), strict=True):
        vector = np.asarray(result.embedding)
        cosines.append(float(vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected)))
    print(f"\n{kind}: cosines {[round(cosine, 4) for cosine in cosines]}")
    assert min(cosines) > 0.97


@pytest.mark.usefixtures("frequent_preemptions")
def test_preemptions(executor: Executor, recordings: list[Recording]) -> None:
    prompts = [r.prompt_token_ids for r in recordings if len(r.prompt_token_ids) <= 2 * _BLOCK]
    limited = Limited(executor, max_num_seqs=16, num_blocks=26)
    results, stats = generate(limited, prompts, 4 * _NUM_TOKENS)
    print(f"\n{stats.preemptions_total} preemptions")
    assert stats.preemptions_total >= 5
    _check(executor, prompts, results)


_TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"},
}


def _write_fp8_checkpoint(folder: Path) -> None:
    """A random model whose projections are in E4M3 with a factor for the whole matrix, as ModelOpt's."""
    rng = np.random.default_rng(0)
    (folder / "config.json").write_text(json.dumps(_TINY))
    tensors: dict[str, npt.NDArray[Any]] = {
        "model.embed_tokens.weight": rng.standard_normal((512, 256)),
        "lm_head.weight": rng.standard_normal((512, 256)) / 16,
        "model.norm.weight": np.ones(256),
    }
    shapes = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256)}
    shapes_mlp = {"gate": (512, 256), "up": (512, 256), "down": (256, 512)}
    for layer in range(3):
        path = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{path}.{norm}.weight"] = np.ones(256)
        for part, sizes in (("self_attn", shapes), ("mlp", shapes_mlp)):
            for name, shape in sizes.items():
                tensors[f"{path}.{part}.{name}_proj.weight"] = rng.standard_normal(shape) * shape[1] ** -0.5
    stored: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in tensors.items():
        stored[name] = tensor.astype(ml_dtypes.bfloat16)
        if name.endswith("_proj.weight"):
            scale = np.float32(np.abs(tensor).max() / 448)
            stored[name] = (tensor / scale).astype(ml_dtypes.float8_e4m3fn)
            stored[f"{name}_scale"] = np.full((), scale, np.float32)
            stored[name.replace(".weight", ".input_scale")] = np.full((), 0.1, np.float32)
    _write_safetensors(folder / "model.safetensors", stored)


def _write_safetensors(path: Path, tensors: dict[str, npt.NDArray[Any]]) -> None:
    types = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float32": "F32"}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": types[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_an_fp8_checkpoint_is_served_as_it_is(tmp_path: Path) -> None:
    """Beside the same with its weights made bfloat16, which is finer by far."""
    _write_fp8_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path).holds_fp8
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 512, 40).tolist() for _ in range(6)]
    texts = [rng.integers(0, 512, 40).tolist() for _ in range(6)]
    found = {}
    for quantization in ("auto", "none"):
        executor, _ = create_executor(
            _config(tmp_path, max_model_len=256, max_num_seqs=8, quantization=quantization)
        )
        print(f"\n{executor.spec.device}")
        assert ("fp8" in executor.spec.device) == (quantization == "auto")
        found[quantization], _ = _judge(executor, prompts, texts)
        executor.shutdown()
    fp8, exact = found["auto"], found["none"]
    correlation = float(np.corrcoef(fp8, exact)[0, 1])
    difference = np.abs(fp8 - exact).mean()
    print(f"correlation {correlation:.4f}, mean difference {difference:.4f} of {exact.std():.4f}")
    assert correlation > 0.95
