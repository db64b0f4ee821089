"""Records what transformers and torch answer: ``make reference``. The only place that needs torch.

Every checkpoint is read by transformers itself (configuration, weights, the GGUF file's dequantization), so
that nothing of ours is compared with itself. Run with names of recordings to record only those;
``gemma3-270m`` is recorded only if named.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from server.model_source import fetch_default_model
from server.tokenizer import load_tokenizer
from tests.reference.gemma3_270m import fetch_gemma3_270m
from tests.reference.prompts import gemma3_prompts, make_prompts
from tests.reference.recordings import FOLDER
from tests.reference.rope_cases import ROPE_CASES
from tests.reference.tiny_checkpoints import CONFIGS, tiny_prompts, write_tiny_checkpoint

NUM_TOKENS = 64
_BATCH = 8
_FULL_STEPS = (0, 1, 7, 31, 63)


def record(name: str, model: PreTrainedModel, prompts: list[list[int]], full_steps: tuple[int, ...]) -> None:
    """Writes ``recorded/NAME.npz`` and prints how far float32 and float64 lie apart."""
    runs: list[torch.Tensor] = []
    for batch in tqdm([prompts[i : i + _BATCH] for i in range(0, len(prompts), _BATCH)], desc=name):
        runs += _generate(model, batch)
    tokens, seconds, top_logits = [], [], []
    for logits in runs:
        best = logits.topk(2, dim=-1)
        tokens.append(best.indices[:, 0])
        seconds.append(best.indices[:, 1])
        top_logits.append(best.values)
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(
        path,
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        prompts=np.concatenate([np.array(prompt, np.int32) for prompt in prompts]),
        tokens=torch.stack(tokens).numpy().astype(np.int32),
        seconds=torch.stack(seconds).numpy().astype(np.int32),
        top_logits=torch.stack(top_logits).numpy(),
        full_steps=np.array(full_steps, np.int32),
        full_logits=torch.stack([logits[list(full_steps)] for logits in runs]).numpy(),
    )
    gaps = torch.stack(top_logits)[..., 0] - torch.stack(top_logits)[..., 1]
    noise = _rounding_noise(model, prompts, runs)
    print(
        f"{name}: {len(prompts)} prompts, {path.stat().st_size} bytes, smallest gap {gaps.min():.6f}, "
        f"steps with a gap below 0.002: {(gaps < 2e-3).sum()}, float32 - float64: {noise:.6f}"
    )


@torch.inference_mode()
def record_vectors(name: str, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    """Writes ``recorded/NAME.npz``: of every fourth prompt the final hidden states' mean, and the last."""
    hidden = [model.base_model(torch.tensor([prompt])).last_hidden_state[0] for prompt in prompts[::4]]
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        mean=torch.stack([states.mean(0) for states in hidden]).numpy(),
        last=torch.stack([states[-1] for states in hidden]).numpy(),
    )


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Greedy generation after each prompt, a few together: logits [NUM_TOKENS, vocab_size]."""
    length = max(len(prompt) for prompt in prompts)
    # Padded on the left; the mask hides it, and positions start behind it.
    tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    steps: list[torch.Tensor] = []
    cache = None
    while len(steps) < NUM_TOKENS:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = model(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        steps.append(output.logits[:, -1])
        tokens = steps[-1].argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return list(torch.stack(steps, dim=1))


@torch.inference_mode()
def _rounding_noise(model: PreTrainedModel, prompts: list[list[int]], runs: list[torch.Tensor]) -> float:
    """The largest difference of a logit to float64, over a few prompts."""
    exact = model.to(torch.float64)
    worst = 0.0
    for prompt, logits in list(zip(prompts, runs, strict=True))[::8]:
        tokens = prompt + logits.argmax(-1).tolist()[:-1]
        expected = exact(torch.tensor([tokens]), logits_to_keep=NUM_TOKENS).logits[0]
        worst = max(worst, (expected - logits).abs().max().item())
    return worst


def record_rope() -> None:
    """Writes ``recorded/rope.npz``: the frequencies and the amplitude of each case."""
    arrays = {}
    for name, values in ROPE_CASES.items():
        config = AutoConfig.for_model(**values)
        rotary = LlamaRotaryEmbedding(config)
        arrays[f"{name}.inverse_frequencies"] = rotary.inv_freq.numpy()
        arrays[f"{name}.attention_factor"] = np.float32(rotary.attention_scaling)
    np.savez_compressed(FOLDER / "rope.npz", **arrays)


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    if not names or "rope" in names:
        record_rope()
    if not names or {"smollm2", "smollm2-vectors"} & set(names):
        path = fetch_default_model()
        tokenizer = load_tokenizer(path)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        )
        prompts = make_prompts(lambda text: tokenizer.encode(text, add_special_tokens=False))
        record_vectors("smollm2-vectors", model.eval(), prompts)
        if not names or "smollm2" in names:
            record("smollm2", model, prompts, ())
    if "gemma3-270m" in names:
        path = fetch_gemma3_270m()
        tokenizer = load_tokenizer(path)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        )
        record("gemma3-270m", model.eval(), gemma3_prompts(tokenizer.encode), ())
    for architecture in CONFIGS:
        if names and architecture not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_tiny_checkpoint(architecture, Path(folder))
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            )
        record(architecture, model.eval(), tiny_prompts(), _FULL_STEPS)


if __name__ == "__main__":
    main(sys.argv[1:])
