"""What the command line turns into one line and exit code 2."""


class UsageError(ValueError):
    """The user asked for something that does not exist or does not fit; the message says what to do."""
