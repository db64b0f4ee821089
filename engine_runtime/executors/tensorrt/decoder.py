"""A whole decoder on the device: buffers, segments, attentions and sampling, enqueued step by step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from engine_runtime.cuda import CudaError, DeviceBuffer, Stream
from engine_runtime.executors.tensorrt.batch import StepInputs, StepShape
from engine_runtime.executors.tensorrt.cuda_graphs import CudaGraph
from engine_runtime.executors.tensorrt.kernel_forms import Quantization
from engine_runtime.executors.tensorrt.segment import BoundSegment, DeviceSegment
from engine_runtime.executors.tensorrt.tactics import SegmentFactory
from engine_runtime.executors.tensorrt.weights import DeviceWeights
from engine_runtime.kernels.gpu_attention import DecodeBatch, PagedAttention
from engine_runtime.kernels.gpu_embedding import GpuEmbedding
from engine_runtime.kernels.gpu_pooling import GpuPooling, most_pieces
from engine_runtime.kernels.gpu_sampling import GpuSampler
from engine_runtime.kernels.kernel_library import KernelLibrary
from engine_runtime.kernels.sampling_rows import SamplingPath
from engine_runtime.kernels.widened_cache import Widening
from engine_runtime.model_config import ModelConfig
from engine_runtime.models.segment import DType, SegmentKind
from engine_runtime.rope import RopeConfig, rope_tables

_logger = logging.getLogger(__name__)
_ALIGNMENT = 256
ITEM_BYTES = 2  # of activations
_KERNEL_TYPES: Mapping[DType, Literal["bf16", "fp16", "fp32"]] = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


def buffer_sizes(config: ModelConfig, max_tokens: int, max_rows: int) -> dict[str, int]:
    """Bytes of each buffer between the kernels of a step."""
    return {
        "residual.0": max_tokens * config.hidden_size * ITEM_BYTES,
        "residual.1": max_tokens * config.hidden_size * ITEM_BYTES,
        "qkv": max_tokens * config.qkv_size * ITEM_BYTES,
        "attention": max_tokens * config.q_size * ITEM_BYTES,
        "row_attention": max_rows * config.q_size * ITEM_BYTES,
        "row_residual": max_rows * config.hidden_size * ITEM_BYTES,
        "logits": max_rows * config.vocab_size * 4,
        "sums": most_pieces(max_tokens, max_rows) * config.hidden_size * 4,
    }


class KvCache:
    """The blocks of all layers, in one allocation, zero at first."""

    def __init__(self, num_layers: int, num_blocks: int, block_bytes: int) -> None:
        """
        Args:
            block_bytes: of one block in one layer.

        Raises:
            CudaError: not enough memory.
        """
        self.num_blocks = num_blocks
        self._layer_bytes = num_blocks * block_bytes
        self._buffer = DeviceBuffer(num_layers * self._layer_bytes)
        self._buffer.fill(0)

    def layer(self, index: int) -> int:
        """Address."""
        return self._buffer.address + index * self._layer_bytes

    def free(self) -> None:
        self._buffer.free()


class DeviceDecoder:
    """Enqueues runs. All addresses are fixed from the start, so that runs can be replayed as CUDA graphs.

    Attributes:
        sums_address: float32 [pieces, H] on the device: of each piece of a run the sum of the final hidden
            states.
    """

    def __init__(
        self,
        config: ModelConfig,
        stream: Stream,
        *,
        library: KernelLibrary,
        segments: Mapping[Quantization, SegmentFactory],
        weights: DeviceWeights,
        attention: PagedAttention,
        sampler: GpuSampler,
        cache: KvCache,
        inputs: StepInputs,
        max_tokens: int,
        max_rows: int,
        max_len: int,
        workspace_bytes: int,
        dtype: Literal["bf16", "fp16"],
    ) -> None:
        """
        Args:
            segments: for each form that weights have.
            max_tokens: of one run, the largest bucket.
            max_rows: of logits in one run, the largest bucket.
            max_len: positions that the rotary tables cover.
            workspace_bytes: for the segments, all at once: what is taken later is in no memory plan.

        Raises:
            CudaError: not enough memory.
        """
        self._config = config
        self._stream = stream
        self._segments = segments
        self._weights = weights
        self._attention = attention
        self._sampler = sampler
        self._inputs = inputs
        sizes = buffer_sizes(config, max_tokens, max_rows)
        padded = {name: -(-size // _ALIGNMENT) * _ALIGNMENT for name, size in sizes.items()}
        self._buffer = DeviceBuffer(sum(padded.values()))
        self._at: dict[str, int] = {}
        end = self._buffer.address
        for name, size in padded.items():
            self._at[name] = end
            end += size
        self._attention_workspace = DeviceBuffer(attention.workspace_bytes)
        attention.use_workspace(self._attention_workspace.address, stream)
        self._cache = cache
        self._kv_layers = [
            attention.kv_layer(cache.layer(i), cache.num_blocks) for i in range(config.num_hidden_layers)
        ]
        self._rope: dict[RopeConfig, tuple[DeviceBuffer, DeviceBuffer]] = {}
        for layer in config.layers:
            if layer.rope not in self._rope:
                cos, sin = rope_tables(layer.rope, config.head_dim, max_len)
                self._rope[layer.rope] = DeviceBuffer.of(cos), DeviceBuffer.of(sin)
        at = self._at
        self._embedding = GpuEmbedding(
            library, dtype, weights.embedding, config.vocab_size, config.hidden_size, config.embedding_scale
        )
        self._gather_attention = GpuEmbedding(library, dtype, at["attention"], max_tokens, config.q_size)
        last_residual = at[f"residual.{(config.num_hidden_layers - 1) % 2}"]
        self._gather_residual = GpuEmbedding(library, dtype, last_residual, max_tokens, config.hidden_size)
        self.sums_address = at["sums"]
        self._lender = _lender(config, weights)
        self._pooling = _pooling(config, weights, library, dtype) if self._lender is not None else None
        self._workspaces = [DeviceBuffer(workspace_bytes)]
        self._bodies: dict[int, list[BoundSegment]] = {}
        self._heads: dict[tuple[int, bool], BoundSegment] = {}
        self._endings: dict[int, BoundSegment] = {}
        self._graphs: dict[tuple[int, SamplingPath], CudaGraph | None] = {}
        self._unrecordable: set[tuple[int, SamplingPath]] = set()

    @property
    def can_pool(self) -> bool:
        """Whether runs may have pieces to add up."""
        return self._pooling is not None

    def segment_addresses(self, layer: int) -> dict[str, int]:
        """Of weights, inputs and outputs of the segment after the attention of ``layer``; -1: the first."""
        return {**self._weights.addresses(layer), **self._io(layer)}

    @property
    def workspace(self) -> tuple[int, int]:
        """Address and bytes of the memory that all segments share while they run."""
        return self._workspaces[-1].address, self._workspaces[-1].num_bytes

    def run(self, shape: StepShape, path: SamplingPath) -> None:
        """Enqueues a run whose inputs are on their way to the device.

        A decode run is recorded when its shape comes the second time, and replayed from then on.

        Raises:
            CudaError: a launch failed.
            TensorRTError: TensorRT refused.
        """
        key = shape.num_tokens, path
        if not shape.is_decode or key in self._unrecordable:
            self._enqueue(shape, path)
            return
        if key not in self._graphs:  # what loads or compiles something does so now
            self._enqueue(shape, path)
            self._graphs[key] = None
            return
        graph = self._graphs[key]
        if graph is None:
            try:
                graph = CudaGraph(self._stream, lambda: self._enqueue(shape, path))
            except CudaError as error:
                if error.is_fatal:
                    raise
                _logger.warning("steps of %d sequences cannot be recorded: %s", shape.num_tokens, error)
                self._unrecordable.add(key)
                self._enqueue(shape, path)
                return
            self._graphs[key] = graph
        graph.launch(self._stream)

    def close(self) -> None:
        """Frees everything that belongs to the decoder, the cache and the weights too."""
        for graph in self._graphs.values():
            if graph is not None:
                graph.close()
        # TensorRT's contexts must go before that of the device.
        for made in (self._graphs, self._bodies, self._heads, self._endings):
            made.clear()
        for segments in self._segments.values():
            segments.close()
        tables = [table for pair in self._rope.values() for table in pair]
        for buffer in (self._buffer, self._attention_workspace, *self._workspaces, *tables):
            buffer.free()
        self._cache.free()
        self._weights.free()

    def _enqueue(self, shape: StepShape, path: SamplingPath) -> None:
        stream, at, inputs = self._stream, self._at, self._inputs
        sampled = self._sampler.sampled_tokens_address
        body = self._body(shape.num_tokens)
        # The first segment reads the embeddings from where no output of it lies.
        self._embedding.enqueue(
            stream, shape.num_tokens, inputs.address("token_ids"), sampled, at["residual.1"]
        )
        decodes = DecodeBatch(
            shape.num_decodes,
            inputs.address("query_start"),
            inputs.address("context_len"),
            inputs.block_tables_address,
            inputs.table_stride,
        )
        if shape.num_decodes:
            self._attention.plan_decode(stream, decodes)
        widening = self._widening(shape)
        for layer, segment in enumerate(body):
            segment.enqueue(stream)
            self._attend(layer, shape, decodes, widening)
        if shape.num_pieces:
            self._pool(shape)
        if shape.num_rows == 0:
            return
        if not shape.is_decode:
            rows = inputs.address("rows")
            self._gather_attention.enqueue(stream, shape.num_rows, rows, sampled, at["row_attention"])
            self._gather_residual.enqueue(stream, shape.num_rows, rows, sampled, at["row_residual"])
        self._head(shape.num_rows, is_decode=shape.is_decode).enqueue(stream)
        self._sampler.enqueue(stream, path, shape.num_rows, at["logits"], inputs.address("sampling"))

    def _pool(self, shape: StepShape) -> None:
        """Adds up what the last norm makes of the residual stream; overwrites nothing that the head reads."""
        if self._pooling is None:
            raise ValueError("the hidden states of this model cannot be pooled")
        self._ending(shape.num_tokens).enqueue(self._stream)
        residual = self._io(self._config.num_hidden_layers - 1)["residual_out"]
        pieces = self._inputs.address("pieces")
        self._pooling.enqueue(self._stream, residual, pieces, shape.num_pieces, self.sums_address)

    def _attend(self, index: int, shape: StepShape, decodes: DecodeBatch, widening: Widening | None) -> None:
        stream, at, inputs, attention = self._stream, self._at, self._inputs, self._attention
        layer, cache = self._config.layers[index], self._kv_layers[index]
        cos, sin = self._rope[layer.rope]
        attention.write_rope(
            stream, at["qkv"], shape.num_tokens, cache, inputs.address("positions"), inputs.address("slots"),
            cos.address, sin.address,
        )  # fmt: skip
        if shape.num_decodes:
            attention.decode(stream, at["qkv"], at["attention"], cache, decodes, window=layer.sliding_window)
        if shape.num_tiles:
            attention.prefill(
                stream, at["qkv"], at["attention"], cache, inputs.address("tiles"), shape.num_tiles,
                inputs.block_tables_address, inputs.table_stride, window=layer.sliding_window,
                widening=widening,
            )  # fmt: skip

    def _widening(self, shape: StepShape) -> Widening | None:
        if not shape.num_widened:
            return None
        starts, query_start, context_len = (
            self._inputs.address(name) for name in ("widened_starts", "query_start", "context_len")
        )
        return Widening(
            shape.num_decodes, shape.num_widened, shape.most_widened_blocks, starts, query_start, context_len
        )

    def _body(self, num_tokens: int) -> list[BoundSegment]:
        """The segments before each attention."""
        body = self._bodies.get(num_tokens)
        if body is None:
            body = [self._make("first", -1, num_tokens).bind(self.segment_addresses(-1))]
            middle: dict[Quantization, DeviceSegment] = {}
            for layer in range(self._config.num_hidden_layers - 1):
                quantization = self._weights.quantization_of(layer)
                if quantization not in middle:
                    middle[quantization] = self._make("middle", layer, num_tokens)
                body.append(middle[quantization].bind(self.segment_addresses(layer)))
            self._bodies[num_tokens] = body
        return body

    def _head(self, num_rows: int, *, is_decode: bool) -> BoundSegment:
        """The segment after the last attention, of all tokens or of gathered rows."""
        head = self._heads.get((num_rows, is_decode))
        if head is None:
            layer = self._config.num_hidden_layers - 1
            segment = self._make("last", layer, num_rows)
            addresses = self.segment_addresses(layer)
            if not is_decode:
                addresses |= {
                    "attention": self._at["row_attention"],
                    "residual": self._at["row_residual"],
                }
            head = segment.bind(addresses)
            self._heads[num_rows, is_decode] = head
        return head

    def _ending(self, num_tokens: int) -> BoundSegment:
        """The segment after the last attention as a middle one: of all tokens the residual stream, no logits.

        It multiplies with the lender's weights for queries, keys and values, which nobody reads.
        """
        ending = self._endings.get(num_tokens)
        if ending is None:
            if self._lender is None:
                raise ValueError("no layer has weights in the form of the last one's")
            last = self._config.num_hidden_layers - 1
            addresses = {**self._weights.addresses(self._lender), **self.segment_addresses(last)}
            ending = self._make("middle", self._lender, num_tokens).bind(addresses)
            self._endings[num_tokens] = ending
        return ending

    def _io(self, layer: int) -> dict[str, int]:
        """The inputs and outputs of the segment after the attention of ``layer``; -1: of the first one."""
        at = self._at
        return {
            "hidden": at["residual.1"],
            "residual": at[f"residual.{layer % 2}"],
            "residual_out": at[f"residual.{(layer + 1) % 2}"],
            "attention": at["attention"],
            "qkv": at["qkv"],
            "logits": at["logits"],
        }

    def _make(self, kind: SegmentKind, layer: int, num_tokens: int) -> DeviceSegment:
        """For all layers whose weights have the form of those of ``layer``."""
        segment = self._segments[self._weights.quantization_of(layer)].make(kind, num_tokens)
        segment.use_workspace(self._workspace(segment.workspace_bytes))
        return segment

    def _workspace(self, num_bytes: int) -> int:
        """Segments run one after another, so all share the largest; earlier ones keep what they have."""
        if self._workspaces[-1].num_bytes < num_bytes:
            self._workspaces.append(DeviceBuffer(num_bytes))
        return self._workspaces[-1].address


def _lender(config: ModelConfig, weights: DeviceWeights) -> int | None:
    """A layer before a middle segment whose weights have the form of the last segment's."""
    last = config.num_hidden_layers - 1
    form = weights.quantization_of(last)
    return next((layer for layer in range(last) if weights.quantization_of(layer) == form), None)


def _pooling(
    config: ModelConfig, weights: DeviceWeights, library: KernelLibrary, dtype: Literal["bf16", "fp16"]
) -> GpuPooling | None:
    """None if no kernel was compiled for these types."""
    last = config.num_hidden_layers - 1
    weight_dtype = _KERNEL_TYPES[weights.dtype_of(last, "norm.weight")]
    if not GpuPooling.is_compiled(library, dtype, weight_dtype):
        return None
    address = weights.addresses(last)["norm.weight"]
    return GpuPooling(library, dtype, weight_dtype, address, config.hidden_size, config.rms_norm_eps)
