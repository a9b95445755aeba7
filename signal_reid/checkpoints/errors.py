"""What a checkpoint that cannot be used raises."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit the model; the message is one line naming the file."""
