"""The errors that a person may see: each message names the value found, the value expected and the mend."""


class NeuronLensError(Exception):
    """A failure that we foresaw. The command line prints its message, without a traceback, and exits with
    `exit_code`."""

    exit_code = 1


class UsageError(NeuronLensError):
    """What the person asked for cannot be done as asked: a recipe, an argument or an input is wrong. Exit code 2."""

    exit_code = 2


class RunFailed(NeuronLensError):
    """The request was right but the work did not end well: a quarantined shard, a damaged store. Exit code 1."""
