"""Errors a person can act on.

Every `CourseError` carries one sentence that says what is wrong and what to do; the command line
prints that sentence without a traceback. Wrong arguments are plain `ValueError` and `TypeError`,
as in vLLM, raised where the argument enters.
"""


class CourseError(Exception):
    """Base of the errors that the command line shows as one sentence."""


class SetupError(CourseError):
    """The environment could not be prepared (Python too old, no venv module, no pip, …)."""


class DownloadError(CourseError):
    """A file could not be fetched: no network, a refused request, a wrong checksum."""


class DiskSpaceError(CourseError):
    """Not enough free disk space for what is about to be written."""


class ModelNotFoundError(CourseError):
    """The model name is no local folder and no hub that could be reached has it."""


class CorruptModelError(CourseError):
    """A model file is truncated, altered or inconsistent."""


class UnsupportedModelError(CourseError):
    """The checkpoint is of an architecture or file format that this engine does not run."""


class EngineDeadError(CourseError):
    """The engine stopped after an internal failure; the first cause is chained."""


class WorkerDiedError(EngineDeadError):
    """A rank of an engine of several processes failed, was killed or hangs; the others have been ended, too. The
    message names the rank, how it ended and, below its first line, its last traceback."""


class RankDivergenceError(CourseError):
    """Ranks that each schedule for themselves, under torchrun, have decided or sampled differently."""
