"""Prompt and response as token ids: where the assistant's own tokens are, and that each response ends in a stop token.

The whole conversation is tokenised once. What the model will have been given is rendered as at generation,
``add_generation_prompt`` and all, and has to be a prefix of the whole, token for token: only then does training see
what generation sees.

    messages[:i] + generation prompt   | given                |
    messages[: i + 1]                  | given                | text of message i, stop token | tail
    trained                                                    ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.data.chat import Message, plain_ids, render, rendered_ids, template_name
from rlhf_toolkit.data.endings import special_token, stop_names, way_out
from rlhf_toolkit.data.templates import NOTHING
from rlhf_toolkit.errors import DataError, shortened

Ids = tuple[int, ...]
Span = tuple[int, int]


def checked_stop_ids(tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int] | None) -> frozenset[int]:
    """The ids that may end a response: the tokenizer's EOS and those given, such as ``stop_token_ids`` makes.

    DataError where the tokenizer has no EOS: nothing could be appended to a plain response.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path or 'an unnamed model'} has no eos_token, so that no response "
            "could end; set model.eos_token"
        )
    return frozenset({int(tokenizer.eos_token_id), *(stop_ids or ())})


def conversation(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Any] = NOTHING,
    *,
    trained: Collection[int],
    stop_ids: Collection[int],
    index: int,
) -> tuple[Ids, list[Span]]:
    """The token ids of ``messages``, up to the last stop token that is trained on, and where the assistant speaks in
    the messages with the numbers ``trained``, each span with its stop token. ``values`` go to the template.

    The last message is the assistant's. DataError where the template's text of a prefix is not a prefix of the whole,
    where it changes or hides the assistant's text, or where no stop token follows.
    """
    text = render(messages, tokenizer, values, index=index, add_generation_prompt=False)
    whole = rendered_ids(text, tokenizer)
    spans = []
    for number in sorted(trained):
        given = render(messages[:number], tokenizer, values, index=index, add_generation_prompt=True)
        start = len(_prefix(given, text, whole, tokenizer, index))
        upto, end = text, len(whole)
        if number + 1 < len(messages):
            upto = render(messages[: number + 1], tokenizer, values, index=index, add_generation_prompt=False)
            end = len(_prefix(upto, text, whole, tokenizer, index))
        _check_content(messages, number, given, upto, tokenizer, values, index)
        spans.append((start, _behind_stop(whole, start, end, tokenizer, stop_ids, index)))
    return whole[: spans[-1][1]], spans


def chat_response(
    prompt: Sequence[Message],
    answer: Message,
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Any] = NOTHING,
    *,
    stop_ids: Collection[int],
    index: int,
) -> tuple[Ids, Ids]:
    """The ids of the messages of ``prompt`` and of the assistant's ``answer`` to them, up to its stop token.

    DataError as ``conversation`` raises it.
    """
    messages = [*prompt, answer]
    ids, spans = conversation(messages, tokenizer, values, trained=[len(prompt)], stop_ids=stop_ids, index=index)
    return ids[: spans[0][0]], ids[spans[0][0] :]


def plain_response(
    prompt: str, response: str, tokenizer: PreTrainedTokenizerBase, *, stop_ids: Collection[int], index: int
) -> tuple[Ids, Ids]:
    """The ids of ``prompt`` and of ``response``, both as they stand, EOS appended unless a stop token is there.

    DataError where one of them tokenises to nothing, or a token spans the boundary.
    """
    given, whole = plain_ids(prompt, tokenizer), plain_ids(prompt + response, tokenizer)
    if not given:
        raise DataError(f"row {index}: the prompt {shortened(prompt)} tokenises to nothing; fill or remove that row")
    if whole[: len(given)] != given:
        raise _merged(prompt, response, index, "move whitespace from the end of the prompt to the response")
    own = whole[len(given) :]
    if not own or (len(own) == 1 and own[0] in stop_ids):
        raise _nothing(response, index)
    if own[-1] not in stop_ids:
        own = (*own, int(tokenizer.eos_token_id))
    _check_one_stop(own, tokenizer, stop_ids, index)
    return given, own


def plain_text(
    text: object, tokenizer: PreTrainedTokenizerBase, *, stop_ids: Collection[int], index: int
) -> Ids | None:
    """The ids of a ``text`` that is trained on as a whole, EOS appended unless a stop token is there; None where it has
    nothing but whitespace.

    DataError where it is no string, or tokenises to nothing.
    """
    if not isinstance(text, str):
        raise DataError(f"row {index}: text {shortened(text)} is not a string; repair that row")
    if not text.strip():
        return None
    ids = plain_ids(text, tokenizer)
    if not ids:
        raise DataError(f"row {index}: text {shortened(text)} tokenises to nothing; fill or remove that row")
    return ids if ids[-1] in stop_ids and len(ids) > 1 else (*ids, int(tokenizer.eos_token_id))


def _prefix(part: str, text: str, whole: Ids, tokenizer: PreTrainedTokenizerBase, index: int) -> Ids:
    """The ids of ``part``, which are those at the beginning of ``whole``."""
    ids = rendered_ids(part, tokenizer)
    if whole[: len(ids)] == ids:
        return ids
    if text.startswith(part):
        raise _merged(part, text[len(part) :], index, "take the whitespace from the beginning of the assistant's text")
    at = next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), min(len(part), len(text)))
    raise DataError(
        f"row {index}: {template_name(tokenizer)} writes the beginning of the conversation as "
        f"{shortened(part[at : at + 60])} and the whole as {shortened(text[at : at + 60])} from character {at} on, so "
        "that training would not see what generation sees; use a template that never changes earlier messages, or make "
        "each turn a row of its own as prompt and completion"
    )


def _check_content(
    messages: Sequence[Message],
    number: int,
    given: str,
    upto: str,
    tokenizer: PreTrainedTokenizerBase,
    values: Mapping[str, Any],
    index: int,
) -> None:
    """Raise DataError unless the assistant's text, whitespace aside, stands behind what was given."""
    content, own = _squeezed(messages[number]["content"]), _squeezed(upto[len(given) :])
    if content not in own:
        raise DataError(
            f"row {index}: {template_name(tokenizer)} changes or hides the assistant's text "
            f"{shortened(messages[number]['content'], 80)}: it writes {shortened(upto[len(given) :], 80)}; "
            "use a template that keeps it, or take out of the text what the template does"
        )
    if own.startswith(content):
        return
    if given == render(messages[:number], tokenizer, values, index=index, add_generation_prompt=False):
        raise DataError(
            f"row {index}: {template_name(tokenizer)} ignores add_generation_prompt but writes "
            f"{shortened(own[: own.index(content)], 80)} before the assistant's text, so that this would be trained "
            "too; use a template with a generation prompt"
        )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _behind_stop(
    whole: Ids, start: int, end: int, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], index: int
) -> int:
    """The position behind the stop token of the assistant's turn ``whole[start:end]``. Only whitespace may follow."""
    stops = [at for at in range(start, end) if whole[at] in stop_ids]
    tail = tokenizer.decode(list(whole[stops[-1] + 1 : end])) if stops else ""
    if not stops or str(tail).strip():
        token = special_token(whole[(stops[-1] + 1 if stops else start) : end], tokenizer)
        known = stop_names(stop_ids, tokenizer)
        raise DataError(
            f"row {index}: {template_name(tokenizer)} ends the assistant's turn in "
            f"{shortened(tokenizer.decode(list(whole[max(start, end - 8) : end])), 80)}, without a stop token "
            f"({known}): a model trained on it would never stop; "
            f"{'use a template that writes one' if token is None else way_out(token)}"
        )
    if stops[-1] == start:
        raise _nothing(str(tokenizer.decode(list(whole[start:end]))), index)
    _check_one_stop(whole[start : stops[-1] + 1], tokenizer, stop_ids, index)
    return stops[-1] + 1


def _check_one_stop(own: Ids, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int], index: int) -> None:
    """Raise DataError where a stop token stands inside a response: generation ends there, and never says the rest."""
    inside = [token for token in own[:-1] if token in stop_ids]
    if inside:
        raise DataError(
            f"row {index}: the response {shortened(tokenizer.decode(list(own)))} holds the stop token "
            f"{tokenizer.convert_ids_to_tokens(inside[0])!r} before its end; take it out of the text"
        )


def _merged(given: str, own: str, index: int, way_out: str) -> DataError:
    return DataError(
        f"row {index}: a token spans the boundary between {shortened(given[-40:])} and {shortened(own[:40])}, so that "
        f"no response could begin there; {way_out}"
    )


def _nothing(response: str, index: int) -> DataError:
    return DataError(f"row {index}: the response {shortened(response)} tokenises to no text; fill or remove that row")
