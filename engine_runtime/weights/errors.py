"""What goes wrong when weights are opened."""


class CheckpointError(ValueError):
    """The weights cannot be used. The message says which file is meant and what to change."""
