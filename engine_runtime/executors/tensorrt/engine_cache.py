"""What was built for a GPU, kept on disk: engines, TensorRT's compiled kernels, measured choices."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine_runtime.executors.tensorrt.library import tensorrt_version
from engine_runtime.executors.tensorrt.trt_builder import TrtBuilder
from engine_runtime.models.segment import DType, Segment, SegmentKind

_logger = logging.getLogger(__name__)
_MAGIC = b"inflightd 1\n"
_MAX_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class CacheKey:
    """All that an entry depends on; models of the same shape share entries.

    Attributes:
        content: what the entry holds, such as ``engine``.
        graph: SHA-256 of the segment's graph, which holds its dimensions.
        formulation: which of several graphs or kernels compute the segment.
        quantization: ``none`` or the form of the weights.
        library: name and version of what made it.
        target: such as ``sm_90``, with the name of the GPU where it matters.
    """

    content: str
    kind: SegmentKind
    dtype: DType
    num_tokens: int
    graph: str
    formulation: str
    quantization: str
    tensor_parallel_size: int
    library: str
    target: str

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(_canonical_json(asdict(self))).hexdigest()[:32]
        return f"{self.kind}-{self.num_tokens}-{digest}.{self.content}"


def segment_key(
    segment: Segment,
    target: str,
    *,
    formulation: str = "merged",
    quantization: str = "none",
    tensor_parallel_size: int = 1,
    library: str | None = None,
) -> CacheKey:
    """The key of a segment's engine.

    Args:
        library: what made the entry; None: the installed TensorRT.
    """
    if segment.num_tokens is None:
        raise ValueError("entries are for one token count, and this segment leaves it open")
    return CacheKey(
        content="engine",
        kind=segment.kind,
        dtype=segment.dtype,
        num_tokens=segment.num_tokens,
        graph=graph_digest(segment),
        formulation=formulation,
        quantization=quantization,
        tensor_parallel_size=tensor_parallel_size,
        library=library or tensorrt_version(),
        target=target,
    )


def graph_digest(segment: Segment) -> str:
    """SHA-256 of the graph, hexadecimal."""
    return hashlib.sha256(segment.model.SerializeToString(deterministic=True)).hexdigest()


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/inflightd`` or ``~/.cache/inflightd``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "inflightd"


class EngineCache:
    """Files in one private folder, each written whole or not at all and checked when read.

    Several processes may use the folder at once: at worst both build the same. A folder that cannot be
    written costs a warning, once, and the time to build again at the next start.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """
        Args:
            folder: made when first written to, readable by its owner only.
        """
        self._folder = folder or default_cache_folder()
        self._has_warned = False

    def load(self, key: CacheKey) -> bytes | None:
        """The entry, or None if there is none or it is damaged or of somebody else."""
        path = self._folder / key.file_name
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _logger.warning("cannot read %s (%s); building again", path, error)
            return None
        entry = _unpack(stored, key)
        if entry is None:
            _logger.warning("%s is damaged or of another version; building again", path)
        return entry

    def store(self, key: CacheKey, entry: bytes) -> None:
        """Writes the entry; a disk that is full or read-only leaves it out, with a warning the first time."""
        path = self._folder / key.file_name
        temporary: str | None = None
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=self._folder)
            with os.fdopen(descriptor, "wb") as file:
                file.write(_pack(entry, key))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            if not self._has_warned:
                self._has_warned = True
                _logger.warning("cannot keep what was built in %s: %s", self._folder, error)

    def engine(self, key: CacheKey, segment: Callable[[], Segment], builder: TrtBuilder) -> bytes:
        """The serialized engine of a segment: from the folder or, failing that, built and kept.

        Args:
            segment: makes the graph; called only if the engine must be built.

        Raises:
            TensorRTError: it cannot be built.
        """
        trt_engine = self.load(key)
        if trt_engine is None:
            trt_engine = builder.build(segment())
            self.store(key, trt_engine)
        return trt_engine


def compiled_kernels_key(key: CacheKey, device_name: str) -> CacheKey:
    """The entry beside an engine that holds what TensorRT compiled for one kind of GPU when it was loaded."""
    return replace(key, content="kernels", target=f"{key.target} {device_name}")


def _canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _pack(entry: bytes, key: CacheKey) -> bytes:
    header = _canonical_json({"key": asdict(key), "sha256": hashlib.sha256(entry).hexdigest()})
    return _MAGIC + len(header).to_bytes(4, "little") + header + entry


def _unpack(stored: bytes, key: CacheKey) -> bytes | None:
    """The entry, if ``stored`` is whole and has this key."""
    start = len(_MAGIC) + 4
    length = int.from_bytes(stored[len(_MAGIC) : start], "little")
    if not stored.startswith(_MAGIC) or length > _MAX_HEADER_BYTES:
        return None
    header, entry = stored[start : start + length], stored[start + length :]
    expected = _canonical_json({"key": asdict(key), "sha256": hashlib.sha256(entry).hexdigest()})
    return entry if header == expected else None
