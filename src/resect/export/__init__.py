"""Models in the formats of others, each read back by its real reader before it takes its place."""

import sys
from types import ModuleType
from typing import Any

from resect.export.exporting import FORMATS, Exported, export
from resect.export.hub import push
from resect.export.padded import padded
from resect.export.verification import Verification
from resect.export.vllm import obstacles

__all__ = ["FORMATS", "Exported", "Verification", "export", "obstacles", "padded", "push"]


class _Room(ModuleType):
    """`resect.export` is this room once it was imported, and the call that it is named after all the same."""

    def __call__(self, *args: Any, **options: Any) -> Exported:
        """What `export` does."""
        return export(*args, **options)


sys.modules[__name__].__class__ = _Room
