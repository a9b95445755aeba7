"""What a user can mend: the base of every error that the program says in one line instead of showing a traceback."""

from __future__ import annotations

from signal_reid.runtime.text import escaped


class UserError(Exception):
    """Something that the user can mend; the message is one line that names the thing, what was given, what is allowed.

    Each derived class has a second base, such as ValueError, so that callers may catch it without this package's names.
    """

    def __str__(self) -> str:
        return escaped(super().__str__())  # names of files may hold newlines and bytes that are no text


class InputError(UserError, ValueError):
    """A setting, an argument or a file that cannot be used."""
