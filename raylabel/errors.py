"""The two ways a run can end badly. `BadInput` is the user's to mend (exit code 2), `RunFailed` is not (exit code 1)."""


class BadInput(ValueError):
    """Wrong config, path, model or run directory: one line that names the key or file and the mend."""


class RunFailed(RuntimeError):
    """The run could not go on: too many failures, a stage that cannot finish."""
