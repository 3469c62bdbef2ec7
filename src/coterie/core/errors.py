"""What can go wrong, as a user sees it: the cause first, then what to do.

CoterieError
├── ConfigError        a config, an argument or a pair of parts that cannot work      exit code 2
├── DataError          a data set that is missing, corrupt or does not fit            exit code 2
├── RunError           the run itself failed; its last checkpoint stays               exit code 1
│   ├── QuorumLost     fewer replies than the quorum
│   ├── NonFinite      NaN or infinity in an update or a loss
│   ├── OutOfRange     a value too large for exact accumulation
│   └── Fenced         another server has taken the run over
└── Interrupted        the user stopped the run; it can be resumed                    exit code 130
"""


class CoterieError(Exception):
    """Any error that Coterie raises on purpose. `hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\nhint: {self.hint}" if self.hint else message


class ConfigError(CoterieError):
    """A config, an argument or a pair of parts that cannot work."""


class DataError(CoterieError):
    """A data set that is missing, corrupt or does not fit."""


class RunError(CoterieError):
    """The run itself failed; its last checkpoint stays."""


class QuorumLost(RunError):
    """Fewer clients replied than the quorum asks for."""


class NonFinite(RunError):
    """NaN or infinity in an update or a loss."""


class OutOfRange(RunError):
    """A weighted value too large for exact accumulation."""


class Fenced(RunError):
    """Another server has taken over; this one must write nothing more."""


class Interrupted(CoterieError):
    """The user stopped the run; the last checkpoint stays and the run can be resumed."""
