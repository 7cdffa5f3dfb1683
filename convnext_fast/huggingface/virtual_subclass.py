"""`VirtualSubclass`: instances that are also, to ``isinstance``, those of a class of transformers."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any, ClassVar


class VirtualSubclass:
    """Mix-in: ``isinstance(x, base)`` is true for a class of transformers, without importing transformers.

    transformers' Trainer, pipelines and composite models check that before they save, load or configure an object.
    Inheriting from its classes would require transformers, and seconds to import it. Instead, once transformers is
    loaded, ``x.__class__`` is a class that inherits from both, as in `unittest.mock`. ``type(x)`` does not change.
    """

    transformers_base: ClassVar[tuple[str, str]]
    """Module and name of the class."""

    __class__ = property(  # type: ignore[assignment]
        lambda self: seen_class(type(self)), lambda self, kind: object.__dict__["__class__"].__set__(self, kind)
    )

    @classmethod
    def for_transformers(cls) -> type:
        """This class for transformers' registries, which require a real subclass of their base class.

        It makes objects of this class. If transformers is not loaded, it is this class.
        """
        return seen_class(cls)

    def __getattr__(self, name: str) -> Any:
        """What an object lacks comes from the class of transformers, if that is loaded, for transformers' own code."""
        try:
            return super().__getattr__(name)  # type: ignore[misc] # that of torch.nn.Module
        except AttributeError:
            pass
        kind = seen_class(type(self))
        if name.startswith("__") or not hasattr(kind, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = inspect.getattr_static(kind, name)
        return found.__get__(self, kind) if hasattr(found, "__get__") else found

    def __init_subclass__(cls, **options: Any) -> None:
        """Skip what transformers does to its own subclasses."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By default, objects whose type is not their __class__ cannot be pickled.
        return object.__new__, (type(self),), vars(self)


def seen_class(kind: type[VirtualSubclass]) -> type:
    """What ``x.__class__`` is for an x of type ``kind``."""
    module, name = kind.transformers_base
    base = getattr(sys.modules.get(module), name, None)
    return kind if base is None or issubclass(kind, base) else _joined(kind, base)


@functools.cache
def _joined(kind: type, base: type) -> type:
    def new(cls: type, *args: Any, **options: Any) -> Any:
        return kind(*args, **options)

    return type(kind.__name__, (kind, base), {"__module__": kind.__module__, "__doc__": kind.__doc__, "__new__": new})
