"""Any Python function as a reward.

A reward is Python that others wrote: whatever it raises or returns becomes one finite number for each response, or a
RewardError that says which function, which response and why.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import torch

from rlhf_toolkit.errors import ConfigError, RewardError, described, shortened
from rlhf_toolkit.types import Prompt

LARGEST = torch.finfo(torch.float32).max
"""Scores become float32; beyond this they would be infinite."""


class RewardFunction(Protocol):
    """What a user writes. ``columns`` are the dataset's other columns, each a list as long as ``responses``."""

    def __call__(self, prompts: list[str], responses: list[str], /, **columns: Any) -> Sequence[float]:
        """One finite score for each response, in the order given."""


@runtime_checkable
class _Array(Protocol):
    """What torch tensors, numpy arrays and the scalars of both have in common."""

    def tolist(self) -> Any: ...


@dataclass(frozen=True)
class FunctionReward:
    """Calls ``function`` with texts, columns and ``kwargs``, and gives back checked scores.

    ``name`` stands in every message. ConfigError where one of ``kwargs`` has the name of another argument.
    """

    function: RewardFunction
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = "reward"

    def __post_init__(self) -> None:
        self._check_kwargs(("prompts", "responses"), "an argument every reward gets")

    def __call__(self, prompts: Sequence[Prompt], responses: list[str]) -> list[float]:
        """The scores of ``responses``, each of which answers the prompt at its position.

        RewardError where the function raises, or returns anything but one finite number for each.
        """
        names = prompts[0].columns if prompts else ()
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in names}
        self._check_kwargs(columns, "a column of the dataset")
        try:
            scores = self.function([prompt.text for prompt in prompts], list(responses), **columns, **self.kwargs)
        except Exception as error:  # a reward may raise whatever it likes
            raise RewardError(
                f"reward {self.name} raised {described(error)}; {_way_out(error)}; {_first_of(prompts)}"
            ) from error
        return [self._checked(score, i, prompts[i]) for i, score in enumerate(self._listed(scores, prompts))]

    def _check_kwargs(self, taken: Sequence[str] | Mapping[str, Any], what: str) -> None:
        for name in self.kwargs:
            if name in taken:
                raise ConfigError(f"reward.kwargs.{name} of {self.name} is also {what}; rename one of the two")

    def _listed(self, scores: Any, prompts: Sequence[Prompt]) -> Sequence[Any]:
        """``scores`` as a sequence of as many items as there are prompts, each of which has one response."""
        plain = scores.tolist() if isinstance(scores, _Array) else scores
        wanted = f"return one number for each of the {len(prompts)} responses; {_first_of(prompts)}"
        if not isinstance(plain, Sequence) or isinstance(plain, (str, bytes)):
            raise RewardError(f"reward {self.name} returned {shortened(scores)} ({type(scores).__name__}); {wanted}")
        if len(plain) != len(prompts):
            raise RewardError(f"reward {self.name} returned {len(plain)} scores; {wanted}")
        return plain

    def _checked(self, score: Any, position: int, prompt: Prompt) -> float:
        """``score`` as a float; bool is 0 or 1."""
        plain = score.tolist() if isinstance(score, _Array) else score
        if isinstance(plain, (int, float)) and abs(plain) <= LARGEST:
            return float(plain)
        raise RewardError(
            f"reward {self.name} gave score {shortened(score)} ({type(score).__name__}) at position {position}; "
            f"return a finite number for each response; its prompt was {shortened(prompt.text)}"
        )


def load_function(spec: str) -> RewardFunction:
    """The callable that ``path/to/file.py:name`` or ``package.module:name`` stands for.

    A file is run anew on each load, as a module of its own. While it runs, its folder is first on ``sys.path``, so that
    imports of its neighbours work at the top of the file, as they do in a script; imports inside its functions do not
    find them, and neighbours stay in ``sys.modules`` under their plain names: two files whose neighbours are both
    called ``helpers`` share the first. ConfigError where nothing callable can be loaded.
    """
    place, colon, name = spec.rpartition(":")
    if not (colon and place and name):
        raise ConfigError(
            f"reward.function={spec!r} names no function; write path/to/file.py:name or package.module:name"
        )
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise ConfigError(f"reward.function={spec!r}: there is no file {path} (looked in {Path.cwd()}); check the path")
    try:
        module = _run_file(path) if path.suffix == ".py" else importlib.import_module(place)
    except Exception as error:  # importing runs code
        raise ConfigError(
            f"reward.function={spec!r}: importing {place} raised {described(error)}{_where(error)}; "
            "repair it, or give path/to/file.py:name"
        ) from error
    return _callable(module, name, spec)


def _callable(module: ModuleType, name: str, spec: str) -> RewardFunction:
    if not hasattr(module, name):
        known = [key for key in dir(module) if callable(getattr(module, key)) and not key.startswith("_")]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known) or 'no functions'}"
        raise ConfigError(f"reward.function={spec!r}: {name} is not defined there; {hint}")
    function: RewardFunction = getattr(module, name)
    if not callable(function):
        raise ConfigError(
            f"reward.function={spec!r}: {name} is {shortened(function)} ({type(function).__name__}), "
            "which cannot be called; name a function"
        )
    return function


def _run_file(path: Path) -> ModuleType:
    """A file as a module, registered under a name that no other file has."""
    path = path.resolve()
    name = f"rlhf_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py suffix always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up
    try:
        with _first_on_path(str(path.parent)):
            spec.loader.exec_module(module)
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


def _where(error: BaseException) -> str:
    """The line that raised, as `` at file.py:12``; nothing where Python's own import machinery did."""
    ours = (__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours and f.filename[0] != "<"]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _way_out(error: Exception) -> str:
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return "columns and reward.kwargs arrive by name, so let it take **columns"
    return "repair the function (see its traceback)"


def _first_of(prompts: Sequence[Prompt]) -> str:
    return f"the first of its {len(prompts)} prompts was {shortened(prompts[0].text) if prompts else 'missing'}"
