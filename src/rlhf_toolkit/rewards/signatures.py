"""What the parameters of a reward or an environment say, and whether it can be called with what a run has for it.

Looked at before a model is loaded. Nothing here imports torch, since worker processes run this too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_toolkit.errors import ConfigError, nearest, shortened

RESPONSES_FIRST = ("completions", "completion", "responses", "response", "outputs")
"""What a first parameter is called that wants responses, as TRL calls its rewards."""
OURS = frozenset(("tokens", "turns"))
"""Parameters that get what is no column: token ids, and responses as messages."""
SHOWN = 10


@dataclass(frozen=True)
class Asked:
    """What the parameters of the function ``name`` say.

    Its first two get prompts and responses, everything else is given by name. ``tokens``: it gets the responses' token
    ids, under that name, ``turns``: the responses as messages. No column may be called as ``options``, its parameters
    with a default, or as ``texts``, its first two. ``needs`` are the others without a default; it takes these and the
    options alone, unless it is ``open``, which has ``**columns``. ``misfit`` says why it cannot be called with prompts
    and responses, if it cannot.
    """

    name: str = ""
    tokens: bool = False
    options: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    open: bool = True
    misfit: str = ""
    turns: bool = False

    def plain(self) -> dict[str, Any]:
        """As values of JSON, of which ``Asked.of`` makes it again."""
        return {name: sorted(v) if isinstance(v, frozenset) else v for name, v in asdict(self).items()}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Asked:
        """What ``plain`` was made of."""
        made: dict[str, Any] = {name: frozenset(v) if isinstance(v, list) else v for name, v in plain.items()}
        return cls(**made)

    def require(self, setting: str, columns: Collection[str], kwargs: Mapping[str, Any] | None = None) -> None:
        """Raise ConfigError where the function of ``setting`` cannot be called with the dataset's ``columns`` and with
        ``kwargs``, which are those of ``reward.kwargs``, None where there is no such setting."""
        if self.misfit:
            raise ConfigError(f"{setting}: {self.misfit}")
        known, given = self.needs | self.options, kwargs or {}
        place, called = f"{setting.rpartition('.')[0]}.kwargs", self.name
        for name in () if self.open else given:
            if name not in known:
                takes = ", ".join(sorted(known)) or "none of its own"
                raise ConfigError(
                    f"{place}.{name}: {called} has no such parameter{nearest(name, known)}; it takes {takes}"
                )
        absent = sorted(self.needs - {*columns, *given, *OURS})
        there = ", ".join(map(_short, sorted(columns)[:SHOWN])) or "none"
        if absent:
            way_out = "rename one of them, or give it a default"
            way_out += "" if kwargs is None else f", or set it in {place}"
            raise ConfigError(
                f"{setting}: {called} needs {', '.join(absent)}, which no column of the dataset is called (beside the "
                f"prompt's: {there}); {way_out}"
            )
        extra = [] if self.open else sorted(set(columns) - known)
        if extra:
            raise ConfigError(
                f"{setting}: {called} does not take the dataset's {', '.join(map(_short, extra[:SHOWN]))}; columns "
                "arrive by name, so let it end with **columns"
            )


def asked(function: Callable[..., Any], *, besides: Collection[str] = ()) -> Asked:
    """What ``function`` asks for. ``**columns`` alone does not ask for tokens. Of ``besides``, which every call gives
    it by name, it must take each."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have no signature
        return Asked()
    first = [each.name for each in parameters[:2] if each.kind is each.POSITIONAL_OR_KEYWORD]
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    others = [each for each in named if each.name not in first]
    without_default = {each.name for each in others if each.default is each.empty}
    name = getattr(function, "__name__", type(function).__name__)
    return Asked(
        name=name,
        tokens="tokens" in [each.name for each in parameters],
        options=frozenset({each.name for each in parameters if each.default is not each.empty} - OURS),
        texts=frozenset(first),
        needs=frozenset(without_default - set(besides)),
        open=any(each.kind is each.VAR_KEYWORD for each in parameters),
        misfit=_misfit(name, parameters, besides),
        turns="turns" in [each.name for each in parameters],
    )


def _misfit(name: str, parameters: list[inspect.Parameter], besides: Collection[str]) -> str:
    """Why the function cannot be called with prompts, responses and what is given ``besides``; empty where it can."""
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    names = {each.name for each in parameters}
    shown = f"{name}({', '.join(_written(each) for each in parameters[:SHOWN])})"
    right = ", ".join(["prompts", "responses", *besides, "**columns"])
    if positional and positional[0].name in RESPONSES_FIRST:
        as_trl = ", as TRL has it" if positional[0].name.startswith("completion") else ""
        return f"{shown} takes the responses first{as_trl}; here prompts come first: def {name}({right})"
    if len(positional) < 2 and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return f"{shown} cannot take prompts and responses; write def {name}({right})"
    lacks = [each for each in besides if each not in names]
    if lacks and not any(each.kind is each.VAR_KEYWORD for each in parameters):
        return f"{shown} does not take {', '.join(lacks)}, which it is given by name; write def {name}({right})"
    return ""


def _written(parameter: inspect.Parameter) -> str:
    stars = "*" * (parameter.kind is parameter.VAR_POSITIONAL) + "**" * (parameter.kind is parameter.VAR_KEYWORD)
    return stars + parameter.name


def _short(name: str) -> str:
    return shortened(name, 40)[1:-1]
