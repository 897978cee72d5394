"""Errors of hbserve_core.

HBServeCoreError
├── ModelFilesMissing (FileNotFoundError)   the model folder, or a file that must be in it, is not there
├── UnsupportedModel (ValueError)           the folder is sound, but this engine cannot run what it describes
├── BrokenTokenizer (ValueError)            a tokenizer's files are there, but cannot be read
├── WeightsMismatch (ValueError)            tensors are missing, unexpected, or of the wrong shape
├── InvalidInstanceConfig (ValueError)      a setting is not possible
├── NotEnoughMemory (MemoryError)           the weights, or the KV pool, do not fit
├── RankFailed (RuntimeError)               a rank of a tensor-parallel instance has died, frozen or failed
├── EngineStopped (RuntimeError)            the engine's thread has ended, and cannot do what was asked of it
└── InstanceFailed (RuntimeError)           an instance cannot serve: its model did not load, or its engine failed
"""


class HBServeCoreError(Exception):
    """Base of every error of this package."""


class ModelFilesMissing(HBServeCoreError, FileNotFoundError):
    pass


class UnsupportedModel(HBServeCoreError, ValueError):
    pass


class BrokenTokenizer(HBServeCoreError, ValueError):
    pass


class WeightsMismatch(HBServeCoreError, ValueError):
    pass


class InvalidInstanceConfig(HBServeCoreError, ValueError):
    pass


class NotEnoughMemory(HBServeCoreError, MemoryError):
    pass


class RankFailed(HBServeCoreError, RuntimeError):
    pass


class EngineStopped(HBServeCoreError, RuntimeError):
    pass


class InstanceFailed(HBServeCoreError, RuntimeError):
    pass
