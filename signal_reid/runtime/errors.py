"""What a user can mend: the base of every error that the program says in one line instead of showing a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend; the message is one line that names the thing, what was given, what is allowed.

    Each derived class has a second base, such as ValueError, so that callers may catch it without this package's names.
    """


class InputError(UserError, ValueError):
    """A setting, an argument or a file that cannot be used."""
