"""The errors that steerrec raises for what a caller can mend; each message is one clear line."""


class SteerrecError(Exception):
    """Base of all steerrec errors; the command line prints it in one line and exits with 1."""


class DataError(SteerrecError):
    """The interactions, the catalogue or the histories cannot be used as they are."""


class ColumnError(DataError):
    """The data has no column of the name that was asked for."""


class ModelError(SteerrecError):
    """A recommender cannot be loaded, or does not behave as its adapter promises."""


class ModelWarning(UserWarning):
    """A recommender can be used, but not all about it is as it should be."""


class CheckpointError(ModelError):
    """A checkpoint of another library is damaged, hostile, or of a kind that is not read."""


class SiteError(SteerrecError):
    """A site does not exist, never fires, or emits something an SAE cannot be attached to."""


class TrainingError(SteerrecError):
    """A training run cannot start, go on or be resumed."""


class MethodError(SteerrecError):
    """A re-ranking method does not exist, or cannot be used with these parameters."""


class ArtifactError(SteerrecError):
    """An artifact on disk is missing, damaged, or belongs to another model."""


class StorageError(SteerrecError):
    """A file cannot be written: no space, no permission, or something else is in its place."""


class EngineError(SteerrecError):
    """What runs blocks of work is not there, or gave up."""


class HubError(SteerrecError):
    """The Hub refuses, does not answer, or sends what is not what it says it is."""


class ArtifactWarning(UserWarning):
    """Something in an artifact is not understood and passed over, or may not fit its model."""
