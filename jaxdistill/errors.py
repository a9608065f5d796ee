"""The one exception type that means "the user can fix this"; cli.py turns it into one message and exit code 2."""


class UserError(ValueError):
    """A mistake in the input: the message says what was found, what was expected and what to do."""
