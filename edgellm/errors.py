"""Every error edgellm raises on purpose, each with the exit code of the command line.

    EdgeError                    1
    ├── ArgumentError            2   an option or argument out of its range
    ├── EdgeFileError            3   a .edge file that is damaged or not one
    ├── CheckpointError          4   a GGUF, safetensors or other source that is damaged or contradicts itself
    ├── UnsupportedError         5   a sound file that needs something this version does not have
    ├── ModelNotFoundError       6   a name or path that leads to no model
    ├── DownloadError            7   a source that could not be fetched, or arrived with the wrong bytes
    ├── ContextOverflowError     8   more tokens than the context holds
    ├── ChatTemplateError        9   a chat template that is missing or fails
    ├── BackendError            10   a backend that cannot run here
    └── OutOfMemoryError        11   less memory free than a model's context takes

A message is one sentence: what was found, what was expected, what to do next.
"""


class EdgeError(Exception):
    exit_code = 1


class ArgumentError(EdgeError, ValueError):
    exit_code = 2


class EdgeFileError(EdgeError):
    exit_code = 3


class CheckpointError(EdgeError):
    exit_code = 4


class UnsupportedError(EdgeError):
    exit_code = 5


class ModelNotFoundError(EdgeError):
    exit_code = 6


class DownloadError(EdgeError):
    exit_code = 7


class ContextOverflowError(EdgeError):
    exit_code = 8


class ChatTemplateError(EdgeError):
    exit_code = 9


class BackendError(EdgeError):
    exit_code = 10


class OutOfMemoryError(EdgeError):
    exit_code = 11
