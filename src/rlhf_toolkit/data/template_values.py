"""What a chat template is given beside the messages: tools, and values such as ``enable_thinking``.

A row may bring both, as lists and mappings or, since a column has one type, as their JSON.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.json_files import DEEPEST, is_deeper
from rlhf_toolkit.errors import DataError, shortened

TOOLS, VALUES = "tools", "chat_template_kwargs"
LONGEST_JSON = 2**20
"""Characters of a column's JSON; a tool takes some hundred."""
MOST_NAMED = 5
OWN = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
"""Names that are arguments of the call itself, not values of a template."""
OF_EVERY_MESSAGE = frozenset(("role", "content"))


def template_values(row: Mapping[str, Any], values: Mapping[str, Any], *, index: int) -> dict[str, Any]:
    """``values`` of the experiment, then those of the row's column ``chat_template_kwargs``, and the tools of its
    column ``tools``. DataError where a column holds something else."""
    own = _from_json(row.get(VALUES), VALUES, index)
    if own is not None and not isinstance(own, Mapping):
        raise DataError(f"row {index}: {VALUES} {shortened(own)} is not a mapping of names to values; repair that row")
    refuse_own_names(own or {}, f"row {index}: {VALUES}")
    found = {**values, **without_none(own or {})}
    tools = _from_json(row.get(TOOLS), TOOLS, index)
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise DataError(
                f"row {index}: {TOOLS} {shortened(tools)} is not a list of tools, each a JSON schema; repair that row, "
                "or rename the column where it is no chat's"
            )
        found[TOOLS] = without_none(tools)
    return found


def values_text(values: Mapping[str, Any]) -> str:
    """What a row's template is given beside the messages, for people: ``tools get_weather, enable_thinking=False``."""
    tools = [tool.get("function", tool) for tool in values.get(TOOLS, ())]
    names = [shortened(tool.get("name") if isinstance(tool, Mapping) else tool, 40) for tool in tools]
    told = [f"tools {', '.join(names[:MOST_NAMED])}" + ", ..." * (len(names) > MOST_NAMED)] if names else []
    told += [f"{name}={shortened(value, 40)}" for name, value in sorted(values.items()) if name != TOOLS]
    return ", ".join(told)


def refuse_own_names(values: Mapping[str, Any], where: str) -> None:
    """Raise DataError where ``values`` has a name of ``OWN``; ``where`` is the column or setting."""
    taken = sorted(OWN & set(values))
    if taken:
        raise DataError(f"{where} has {taken[0]}, which is no value of a template; take it out")


def _from_json(value: Any, column: str, index: int) -> Any:
    """What the JSON in ``value`` says; ``value`` itself where it is no text; None for an empty one."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        if len(value) > LONGEST_JSON:
            raise ValueError(f"it has more than {LONGEST_JSON} characters")
        found = json.loads(value)
        if isinstance(found, (dict, list)) and is_deeper(found, DEEPEST):
            raise ValueError(f"brackets nested deeper than {DEEPEST}")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"row {index}: {column} {shortened(value, 80)} is no JSON ({error}); repair that row"
        ) from error
    return found


def without_none(value: Any) -> Any:
    """``value`` without the keys that are None: ``datasets`` gives every mapping of a column the keys of all others."""
    if isinstance(value, Mapping):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class Unread:
    """Counts what rows bring and the chat template does not read, by the name that it would have there.

    Raises DataError where ``values``, the experiment's, has a name of ``OWN``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
        refuse_own_names(values, "data.chat_template_kwargs")
        self._words = frozenset(re.findall(r"\w+", str(tokenizer.chat_template or "")))
        self.rows: Counter[str] = Counter()

    def look(
        self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], *, also_read: Sequence[str] = ()
    ) -> None:
        """Count one row. ``also_read`` are keys of messages that somebody else reads."""
        names = {name for message in messages for name, value in message.items() if value is not None}
        names = names - OF_EVERY_MESSAGE - {*also_read} | {*values}
        self.rows.update(name for name in names if name not in self._words)

    def text(self) -> str:
        """For a summary: empty, or ``; the chat template does not read tools (3 rows)``."""
        counts = ", ".join(f"{name} ({count} rows)" for name, count in sorted(self.rows.items()))
        return f"; the chat template does not read {counts}" if counts else ""
