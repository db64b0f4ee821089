"""A segment as launches of our own kernels, where these are faster than TensorRT's choice.

For many tokens, and whenever norms follow the blocks:

    attention -> attention_output -> add_norm -> gate_up (activates) -> mlp_output -> add_norm -> qkv | logits

For one token, matrix products normalize what they read and add the residual to what they write, so there are
four launches. ``finish_heads`` follows qkv where there are partial sums, biases or norms of heads.

With fp8, products read E4M3: ``add_norm`` writes it, ``quantize_rows`` makes it of attention and activations.
For one token, only the weights are E4M3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine_runtime.cuda import Stream
from engine_runtime.executors.tensorrt.gemm_form import GemmForm, parse_forms
from engine_runtime.executors.tensorrt.kernel_forms import (
    Projection,
    Quantization,
    candidates,
    is_computable,
    is_fused,
    is_quantized,
    projections,
)
from engine_runtime.kernels.kernel_library import Kernel, KernelLibrary
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.segment import SegmentKind

_ALIGNMENT = 256
_LEAST_ROW, _MOST_ROW = 1024, 32768  # what a program quantizes at once
# Up to here launches are so short that starting them early pays. More rows of a norm would all go to the few
# multiprocessors that are free first.
_MOST_EARLY_TOKENS = 256
_MOST_EARLY_ROWS = 64
Launch = tuple[Callable[..., None], tuple[int, int, int], tuple[Any, ...]]


class UnsupportedSegmentError(Exception):
    """The kernels cannot compute this segment; TensorRT can."""


class KernelSegment:
    """A bfloat16 segment for one token count; implements ``DeviceSegment``.

    With fp8, ``bind`` also wants the address of each quantized weight's factors, as NAME_scale.

    Attributes:
        num_tokens: rows of all inputs and outputs.
        workspace_bytes: for intermediate results.
        forms: the matrix product chosen for each projection.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: SegmentKind,
        num_tokens: int,
        library: KernelLibrary,
        num_multiprocessors: int,
        choice: Mapping[Projection, str] | None = None,
        quantization: Quantization = "none",
    ) -> None:
        """
        Args:
            choice: names of kernels, as ``tactics`` found them; what is missing, or not there any more, is
                predicted.

        Raises:
            UnsupportedSegmentError: the architecture, a dimension or the GPU is not supported.
        """
        if not is_computable(config, kind):
            raise UnsupportedSegmentError(
                f"no kernels for {kind} segments of this {config.architecture} model"
            )
        self.num_tokens = num_tokens
        self.config = config
        self.kind: SegmentKind = kind
        self.quantization: Quantization = quantization
        self._library = library
        self._num_multiprocessors = num_multiprocessors
        self._is_fused = is_fused(config, kind, num_tokens)
        known = parse_forms(library.names)
        self.forms: dict[Projection, GemmForm] = {}
        for projection in projections(config, kind):
            found = candidates(known, config, kind, projection, num_tokens, num_multiprocessors, quantization)
            if not found:
                raise UnsupportedSegmentError(f"no kernel computes {projection} for {num_tokens} tokens")
            wanted = (choice or {}).get(projection)
            self.forms[projection] = next((form for form in found if form.name == wanted), found[0])
        self._workspace = 0
        self._offsets: dict[str, int] = {}
        self.workspace_bytes = self._lay_out()

    def use_workspace(self, address: int) -> None:
        self._workspace = address

    def bind(self, addresses: Mapping[str, int]) -> BoundKernelSegment:
        return BoundKernelSegment([launch for part in self.parts(addresses).values() for launch in part])

    def parts(self, addresses: Mapping[str, int]) -> dict[str, list[Launch]]:
        """The launches at device addresses, by the projection that they belong to, in order."""
        if self.workspace_bytes and not self._workspace:
            raise ValueError("the segment has no workspace yet")
        binding = _Binding(self, addresses)
        return binding.fused() if self._is_fused else binding.separate()

    def _lay_out(self) -> int:
        """Places the intermediate results, all alive at once; returns their size."""
        config, tokens = self.config, self.num_tokens
        sizes: dict[str, int] = {}
        if self.kind != "first":
            sizes["gated"] = 2 * config.intermediate_size
            sizes["middle_residual"] = 2 * config.hidden_size
        if not self._is_fused:
            sizes["normed"] = 2 * config.hidden_size
            sizes["sums"] = max(
                form.num_parts * (4 if form.writes_float32 else 2) * projections(config, self.kind)[name].n
                for name, form in self.forms.items()
                if name in ("attention_output", "mlp_output", "qkv") or self.kind == "last"
            )
            sizes["last_residual"] = 2 * config.hidden_size if self.kind == "last" else 0
            if self.quantization == "fp8":
                sizes["quantized"] = max(config.q_size, config.intermediate_size, config.hidden_size)
                sizes["token_scales"] = 4
        elif self.kind == "last":
            sizes["last_residual"] = 2 * config.hidden_size
        end = 0
        for name, size in sizes.items():
            self._offsets[name] = end
            end += -(-size * tokens // _ALIGNMENT) * _ALIGNMENT
        return end

    def buffer(self, name: str) -> int:
        """Address of an intermediate result."""
        return self._workspace + self._offsets[name]

    def gemm(
        self,
        projection: Projection,
        x: int,
        weight: tuple[int, int],
        out: int,
        *,
        norm_weight: int = 0,
        addend: int = 0,
    ) -> Launch:
        """The matrix product of a projection at device addresses.

        Args:
            weight: and its factors.
        """
        w, w_scale = weight
        x_scale = self.buffer("token_scales") if "token_scales" in self._offsets else x
        form = self.forms[projection]
        kernel = self._library.get(form.name)
        shape = projections(self.config, self.kind)[projection]
        n, k, tokens = shape.n, shape.k, self.num_tokens
        columns = -(-n // form.columns)
        if form.function == "gemv":
            epsilon = self.config.rms_norm_eps
            # Addresses that a form does not read must be valid nonetheless; x is.
            args: tuple[Any, ...] = (x, w, w_scale, norm_weight or x, addend or x, out, n, k, epsilon)
            return kernel.launch, (columns, 1, 1), args
        if form.function == "skinny":
            grid = columns, form.num_parts, 1
            return kernel.launch, grid, (x, x_scale, w, w_scale, out, tokens, n, k)
        rows = 2 * n if projection == "gate_up" else n
        programs = -(-tokens // form.bm) * columns * form.num_parts
        if form.is_persistent:
            programs = min(programs, self._num_multiprocessors)
        x_map = kernel.tensor_map("x", x, (tokens, k), (k, 1))
        w_map = kernel.tensor_map("w", w, (rows, k), (k, 1))
        args = *x_map, x_scale, *w_map, w_scale, out, tokens, n, k
        launch = kernel.launch_early if tokens <= _MOST_EARLY_TOKENS else kernel.launch
        return launch, (programs, 1, 1), args

    def quantize(self, x: int, size: int) -> Launch:
        """Rows of ``size`` columns at ``x`` to ``quantized``."""
        args = x, self.buffer("quantized"), self.buffer("token_scales"), size
        name = f"quantize_row_{max(_LEAST_ROW, 1 << (size - 1).bit_length())}"
        kernel = self._library.get(name if size <= _MOST_ROW else "quantize_rows")
        return self.row_launch(kernel), (self.num_tokens, 1, 1), args

    def row_launch(self, kernel: Kernel) -> Callable[..., None]:
        """How a kernel for each row is launched."""
        return kernel.launch_early if self.num_tokens <= _MOST_EARLY_ROWS else kernel.launch

    def row_kernel(self, name: str, form: GemmForm | None, is_weight_float32: bool, size: int) -> Kernel:
        """``add_norm`` or ``finish_heads`` for the types and the width at hand."""
        y = "fp32" if form is not None and form.writes_float32 else "bf16"
        weight = "fp32" if is_weight_float32 else "bf16"
        least = 1024 if name.startswith("add_norm") else 32
        return self._library.get(f"{name}_{y}_{weight}_{max(least, 1 << (size - 1).bit_length())}")


class BoundKernelSegment:
    """Launches with all their arguments."""

    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches

    def enqueue(self, stream: Stream) -> None:
        for launch, grid, args in self.launches:
            launch(grid, stream, *args)


class _Binding:
    """The launches of a segment at certain addresses."""

    def __init__(self, segment: KernelSegment, addresses: Mapping[str, int]) -> None:
        self._segment = segment
        self._config = segment.config
        self._at = addresses
        self._has_post_norms = segment.config.architecture == "gemma3"
        self._is_last = segment.kind == "last"
        self._is_fp8 = segment.quantization == "fp8"

    def fused(self) -> dict[str, list[Launch]]:
        """For one token: four products and nothing in between."""
        at, gemm = self._at, self._segment.gemm
        middle, gated = self._segment.buffer("middle_residual"), self._segment.buffer("gated")
        end = self._segment.buffer("last_residual") if self._is_last else at["residual_out"]
        norm = at["layer.post_attention_layernorm.weight"]
        parts: dict[str, list[Launch]] = {
            "attention_output": [
                gemm(
                    "attention_output",
                    at["attention"],
                    self._weight("layer.self_attn.o_proj"),
                    middle,
                    addend=at["residual"],
                )
            ],
            "gate_up": [
                gemm("gate_up", middle, self._weight("layer.mlp.gate_up_proj"), gated, norm_weight=norm)
            ],
            "mlp_output": [
                gemm("mlp_output", gated, self._weight("layer.mlp.down_proj"), end, addend=middle)
            ],
        }
        if self._is_last:
            norm = at["norm.weight"]
            parts["logits"] = [gemm("logits", end, self._weight("lm_head"), at["logits"], norm_weight=norm)]
            return parts
        norm = at["next_layer.input_layernorm.weight"]
        bias = at.get("next_layer.self_attn.qkv_proj.bias", 0)
        weight = self._weight("next_layer.self_attn.qkv_proj")
        parts["qkv"] = [gemm("qkv", end, weight, at["qkv"], norm_weight=norm, addend=bias)]
        if self._has_head_norms:
            parts["qkv"].append(self._finish_heads(at["qkv"], has_bias=False))
        return parts

    def separate(self) -> dict[str, list[Launch]]:
        """For any number of tokens."""
        at, segment = self._at, self._segment
        parts: dict[str, list[Launch]] = {}
        norm = at["norm.weight" if self._is_last else "next_layer.input_layernorm.weight"]
        following: Projection = "logits" if self._is_last else "qkv"
        if segment.kind == "first":
            parts["norm"] = [self._add_norm(None, following, at["hidden"], norm, 0, at["residual_out"])]
        else:
            middle, gated, sums = (segment.buffer(name) for name in ("middle_residual", "gated", "sums"))
            end = segment.buffer("last_residual") if self._is_last else at["residual_out"]
            after = "layer.post_attention_layernorm.weight"
            before = "layer.pre_feedforward_layernorm.weight" if self._has_post_norms else after
            post_attention = at[after] if self._has_post_norms else 0
            post_mlp = at["layer.post_feedforward_layernorm.weight"] if self._has_post_norms else 0
            weight = self._weight("layer.self_attn.o_proj")
            parts["attention_output"] = [
                *self._product("attention_output", at["attention"], self._config.q_size, weight, sums),
                self._add_norm(
                    "attention_output", "gate_up", at["residual"], at[before], post_attention, middle
                ),
            ]
            weight = self._weight("layer.mlp.gate_up_proj")
            parts["gate_up"] = [segment.gemm("gate_up", self._normed("gate_up"), weight, gated)]
            weight = self._weight("layer.mlp.down_proj")
            parts["mlp_output"] = [
                *self._product("mlp_output", gated, self._config.intermediate_size, weight, sums),
                self._add_norm("mlp_output", following, middle, norm, post_mlp, end),
            ]
        if self._is_last:
            weight = self._weight("lm_head")
            parts["logits"] = [segment.gemm("logits", self._normed("logits"), weight, at["logits"])]
        else:
            parts["qkv"] = self._qkv()
        return parts

    def _weight(self, path: str) -> tuple[int, int]:
        """Addresses of a weight and of its factors, which not all have."""
        address = self._at[f"{path}.weight"]
        return address, self._at.get(f"{path}.weight_scale", address)

    def _normed(self, reader: Projection) -> int:
        """What ``add_norm`` writes for a projection."""
        is_fp8 = is_quantized(reader, self._segment.quantization)
        return self._segment.buffer("quantized" if is_fp8 else "normed")

    def _product(
        self, projection: Projection, x: int, size: int, weight: tuple[int, int], out: int
    ) -> list[Launch]:
        """A product of 16-bit rows, quantized first if need be."""
        segment = self._segment
        if not self._is_fp8:
            return [segment.gemm(projection, x, weight, out)]
        product = segment.gemm(projection, segment.buffer("quantized"), weight, out)
        return [segment.quantize(x, size), product]

    def _qkv(self) -> list[Launch]:
        weight, normed = self._weight("next_layer.self_attn.qkv_proj"), self._normed("qkv")
        form = self._segment.forms["qkv"]
        if not (form.num_parts > 1 or self._has_head_norms or self._config.has_qkv_bias):
            return [self._segment.gemm("qkv", normed, weight, self._at["qkv"])]
        sums = self._segment.buffer("sums")
        finish = self._finish_heads(sums, has_bias=self._config.has_qkv_bias)
        return [self._segment.gemm("qkv", normed, weight, sums), finish]

    @property
    def _has_head_norms(self) -> bool:
        return "next_layer.self_attn.q_norm.weight" in self._at

    def _add_norm(
        self,
        source: Projection | None,
        reader: Projection,
        residual: int,
        weight: int,
        post_weight: int,
        residual_out: int,
    ) -> Launch:
        """After ``source``, whose result lies in ``sums`` (None: normalizes only), before ``reader``."""
        segment = self._segment
        hidden, tokens = self._config.hidden_size, segment.num_tokens
        form = None if source is None else segment.forms[source]
        is_fp8 = is_quantized(reader, segment.quantization)
        name = "add_norm8" if is_fp8 else "add_norm"
        kernel = segment.row_kernel(name, form, self._has_post_norms, hidden)
        sums = residual if form is None else segment.buffer("sums")
        scales = segment.buffer("token_scales") if is_fp8 else residual_out
        return segment.row_launch(kernel), (tokens, 1, 1), (
            sums, residual, post_weight or weight, weight, residual_out, self._normed(reader), scales,
            0 if form is None else form.num_parts, int(post_weight != 0), tokens, hidden,
            self._config.rms_norm_eps,
        )  # fmt: skip

    def _finish_heads(self, y: int, *, has_bias: bool) -> Launch:
        config, at = self._config, self._at
        form = self._segment.forms["qkv"]
        kernel = self._segment.row_kernel("finish_heads", form, self._has_post_norms, config.head_dim)
        num_heads = config.num_attention_heads + 2 * config.num_key_value_heads
        return self._segment.row_launch(kernel), (self._segment.num_tokens, num_heads, 1), (
            y,
            at["next_layer.self_attn.qkv_proj.bias"] if has_bias else y,
            at.get("next_layer.self_attn.q_norm.weight", y),
            at.get("next_layer.self_attn.k_norm.weight", y),
            at["qkv"],
            form.num_parts, int(has_bias), int(self._has_head_norms),
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps,
        )  # fmt: skip
