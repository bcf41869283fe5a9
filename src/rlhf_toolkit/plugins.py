"""Functions that users bring: found by a known name or by an import path, called with the arguments they ask for.

One way for rewards, advantage estimators, policy losses and curricula: a function in a file of one's own, named in the
YAML as ``path/to/file.py:name``. What it takes it says itself, by the names of its parameters.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_toolkit.errors import ConfigError, described, nearest, shortened
from rlhf_toolkit.given import FUNCTION, given_object

with_state: dict[str, Any] = {}
"""By what their settings say, the objects that this process has loaded and that bring their own state."""


def find(name: str, known: Mapping[str, Callable[..., Any]], setting: str) -> Callable[..., Any]:
    """The function ``known`` by that name, or the one that ``path/to/file.py:name`` or ``package.module:name`` names.

    ConfigError where there is neither.
    """
    if name in known:
        return known[name]
    if ":" not in name:
        raise ConfigError(
            f"{setting}={shortened(name)}{nearest(name[:100], known)}; known are {', '.join(known)}, or give "
            "path/to/file.py:name"
        )
    return load_function(name, setting)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function`` has a parameter of that name."""
    return name in inspect.signature(function).parameters


def arguments_for(
    function: Callable[..., Any], offered: Mapping[str, Any], kwargs: Mapping[str, Any], *, setting: str
) -> dict[str, Any]:
    """What to call ``function`` with: of ``offered`` what its parameters name, and all of ``kwargs``.

    ``setting`` names the function in messages, and ``{setting}_kwargs`` its ``kwargs``. ConfigError where ``kwargs``
    has a name that the function lacks or that is offered anyway, and where the function needs a name that nobody gives.
    """
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    name = getattr(function, "__name__", repr(function))
    for key in kwargs:
        if key in offered:
            raise ConfigError(f"{setting}_kwargs.{key} is given to {name} anyway; leave it out")
        if key not in parameters and not open_ended:
            known = [each for each in parameters if each not in offered]
            raise ConfigError(
                f"{setting}_kwargs.{key}: {name} has no such parameter{nearest(key, known)}; "
                f"it takes {', '.join(known) or 'none of its own'}"
            )
    given = {key: value for key, value in offered.items() if key in parameters} | dict(kwargs)
    needed = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and key not in given
    ]
    if needed:
        raise ConfigError(
            f"{setting}: {name} needs {', '.join(needed)}; set it in {setting}_kwargs, give it a default, "
            f"or use one of {', '.join(offered)}"
        )
    return given


def load_function(spec: str, setting: str) -> Callable[..., Any]:
    """The callable that ``path/to/file.py:name`` or ``package.module:name`` stands for, or that a program has given.

    A process runs a file once, as a module of its own, however many settings name functions of it; they share its
    global variables. A file that has changed since is run anew, as another module. While a file runs, its folder is
    first on ``sys.path``, so that imports of its neighbours work at the top of the file, as they do in a script;
    imports inside its functions do not find them, and neighbours stay in ``sys.modules`` under their plain names: two
    files whose neighbours are both called ``helpers`` share the first. Raises ConfigError, which names ``setting``,
    where nothing callable can be loaded.

    An object with ``state_dict()`` and ``load_state_dict(state)`` has its state in checkpoints: see ``with_state``.
    """
    found = given_object(FUNCTION, spec)
    if found is None:
        found = _imported(spec, setting)
    if callable(getattr(found, "state_dict", None)) and callable(getattr(found, "load_state_dict", None)):
        with_state[spec] = found
    return found  # type: ignore[no-any-return]


def _imported(spec: str, setting: str) -> Callable[..., Any]:
    place, colon, name = spec.rpartition(":")
    if not (colon and place and name):
        raise ConfigError(
            f"{setting}={shortened(spec)} names no function; write path/to/file.py:name or package.module:name"
        )
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise ConfigError(
            f"{setting}={shortened(spec)}: there is no file {shortened(place)[1:-1]} (looked in {Path.cwd()}); "
            "check the path"
        )
    try:
        module = _module_of(path) if path.suffix == ".py" else importlib.import_module(place)
        return _callable(module, name, spec, setting)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # importing runs code, which may end scripts, and so may looking up a name
        ours = (__file__, importlib.__file__)
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours and f.filename[0] != "<"
        ]
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        raise ConfigError(
            f"{setting}={shortened(spec)}: importing {shortened(place)[1:-1]} raised "
            f"{described(error)}{where}; repair it, or give path/to/file.py:name"
        ) from error


def _callable(module: ModuleType, name: str, spec: str, setting: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        if module.__name__ == "__main__" or not name.isidentifier():  # names of what is found in one program alone
            raise ConfigError(
                f"{setting}={shortened(spec)} was given as an object by a Python program; start that program, or write "
                "path/to/file.py:name"
            )
        known = [key for key in dir(module) if callable(getattr(module, key)) and not key.startswith("_")]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known) or 'no functions'}"
        raise ConfigError(f"{setting}={shortened(spec)}: {name} is not defined there; {hint}")
    function: Callable[..., Any] = getattr(module, name)
    if not callable(function):
        raise ConfigError(
            f"{setting}={shortened(spec)}: {name} is {shortened(function)} ({type(function).__name__}), "
            "which cannot be called; name a function"
        )
    try:
        inspect.signature(function)
    except (TypeError, ValueError) as error:  # some of Python's own, written in C, do not say what they take
        raise ConfigError(
            f"{setting}={shortened(spec)}: {name} does not say what parameters it takes; name a function in Python "
            "that calls it"
        ) from error
    return function


def _module_of(path: Path) -> ModuleType:
    """The file as a module, which is run where this process has not run that file with that text before.

    Its name follows from both, so ``sys.modules`` knows what has been run. Python's cache of bytecode, which takes two
    texts of one length and one second for the same, is left aside.
    """
    path = path.resolve()
    text = path.read_bytes()
    digest = hashlib.sha256(bytes(path) + b"\0" + text).hexdigest()[:16]
    name = f"rlhf_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up
    try:
        with _first_on_path(str(path.parent)):
            exec(loader.source_to_code(text, str(path)), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
