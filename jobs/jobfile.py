"""Job files from Python: `load` gives the job model of a file or a mapping, under the name that users import it by."""

from jobs.schema.reading import JobFileError, load

__all__ = ["JobFileError", "load"]
