"""The one exception family. A message names the thing, what was found, what was expected and what to do."""


class EaftError(Exception):
    """Base of every error this library raises on purpose."""


class ParameterError(EaftError):
    """A parameter is unknown, of the wrong type, or outside its range."""


class PackError(EaftError):
    """A pack cannot be found, read, or cut into the blocks that were asked for."""


class CheckpointError(EaftError):
    """A checkpoint is incomplete, damaged, or not of a supported architecture."""


class ScoringError(EaftError):
    """A token could not be scored; the message names its block and position."""


class ResultError(EaftError):
    """A result file is missing, damaged, or cannot be compared with another."""


class KaggleError(EaftError):
    """Kaggle refused a call, cannot be reached, or gave back something that is not the result of the run."""


class PublishError(EaftError):
    """A checkpoint may not be published as it is, or the Hugging Face hub did not take it."""
