"""The backends of an op: how they are registered, found and asked."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .contracts import Call
from .selection import Trust

__all__ = ["Backend", "Unsupported", "WithBackends"]

Unsupported = Callable[[Call], "str | None"]
_MODULES_THAT_ARE_NO_BACKEND = {"samples"}
_loading = threading.RLock()


@dataclass(frozen=True)
class Backend:
    """An implementation of an op. ``unsupported`` says why it can't take a call (capability, never preference);
    ``trust`` decides whether a foreign library's code may run, and ``exact`` is False where it is not held to the
    reference's very bytes; a ``replayable`` one reports every kernel that it launches to ``replay.tracing()``."""

    name: str
    run: Callable[..., Any]
    unsupported: Unsupported
    trust: Trust | None = None
    exact: bool = True
    replayable: bool = False


class WithBackends:
    """What an op has of them. Those in the modules beside the op's spec are imported when one of them is asked for."""

    name: str
    schema: str
    _mutates: tuple[str, ...]

    def __init__(self, reference: Callable[..., Any]):
        self._backends = {"reference": Backend("reference", reference, lambda call: None)}
        self.unimportable: dict[str, str] = {}  # backend name -> why its module does not import
        self._loaded = False

    def forget(self) -> None:
        raise NotImplementedError

    def backend(
        self,
        name: str,
        *,
        unsupported: Unsupported,
        trust: Trust | None = None,
        exact: bool = True,
        replayable: bool = False,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function as this op's backend ``name``. Decorators may be stacked: the function
        sees which backend it runs as in its argument ``backend``.

        Args:
            name: what ``backend=`` and the environment call it.
            unsupported: why it can't take a call, by metadata alone; None if it can.
            trust: whether code that is not this package's may run; None for own code.
            exact: whether quantised bytes must equal the reference's.
            replayable: whether every kernel that it launches goes through ``ops._triton_launch.launch``.

        Raises:
            TypeError: its schema or defaults differ from the op's.
            ValueError: the name is taken.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            schema = torch.library.infer_schema(function, mutates_args=self._mutates)
            if schema != self.schema:
                raise TypeError(f"backend {name!r} of {self.name} has the schema {schema}; the op has {self.schema}")
            if name in self._backends or name == "auto":
                raise ValueError(f"{self.name} has a backend named {name!r} already")
            run = function if trust is None else _running_as(name, function)
            self._backends[name] = Backend(name, run, unsupported, trust, exact, replayable)
            self.forget()
            return function

        return register

    def _load_backends(self) -> None:
        """Import the modules beside the op's spec: each registers one backend. Lazy, as they import Triton and such."""
        if self._loaded:
            return
        with _loading:  # a thread that comes later waits until all are there
            if not self._loaded:
                self._import_backends()
                self._loaded = True

    def _import_backends(self) -> None:
        package = sys.modules[self.__module__]
        for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
            if module.name in _MODULES_THAT_ARE_NO_BACKEND or module.name.startswith("_"):
                continue
            try:
                importlib.import_module(f"{package.__name__}.{module.name}")
            except ImportError as error:
                self.unimportable[module.name] = f"not importable: {error}"

    def backend_names(self) -> list[str]:
        """Every backend that this op has, the ones that can't be imported here included."""
        self._load_backends()
        return [*self._backends, *self.unimportable]

    def find_backend(self, name: str, asked_by: str) -> Backend:
        """The backend with that name, "auto" excepted; ``flashinfer_<name>`` is FlashInfer's <name>.

        Raises ValueError if there is none.
        """
        backend = self._backends.get(name)
        if backend is not None:
            return backend
        self._load_backends()
        backend = self._backends.get(name)
        if backend is None:
            backend = self._backends.get(_without_library(name))
            if backend is not None and backend.trust is None:  # own code is no library's
                backend = None
        if backend is not None:
            return backend
        if name in self.unimportable:
            reason = self.unimportable[name]
            return Backend(name, _never_runs, lambda call: reason)
        names = ["auto", *self._backends]
        raise ValueError(
            f"torch.ops.fp4.{self.name}: backend is {name!r} ({asked_by}); "
            f"allowed: {', '.join(map(repr, [*names, *self.unimportable]))}"
        )


def _running_as(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function told which backend it runs as, however that was chosen."""

    def run(*args: Any, **kwargs: Any) -> Any:
        kwargs["backend"] = name
        return function(*args, **kwargs)

    return run


def _without_library(name: str) -> str:
    for prefix in ("flashinfer_", "flashinfer-"):
        if name.startswith(prefix):
            return name[len(prefix) :].replace("cute_dsl", "cute-dsl")
    return "cute-dsl" if name == "cute_dsl" else name


def _never_runs(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this backend can't be imported, so it is never chosen")
