"""What a checkpoint that cannot be used raises."""

from signal_reid.runtime.errors import InputError


class CheckpointError(InputError):
    """A checkpoint that cannot be read or does not fit the model; the message is one line naming the file."""
