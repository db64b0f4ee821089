"""The names of the supported architectures, which are also the names of their modules."""

from __future__ import annotations

from engine_runtime.model_config import ConfigError

ARCHITECTURES = ("gemma3", "llama", "mistral", "qwen2", "qwen3")


def require_architecture(name: str) -> str:
    """Returns ``name`` if it is supported.

    Raises:
        ConfigError: it is not; the message names those that are.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"architecture {name[:80]!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    return name
