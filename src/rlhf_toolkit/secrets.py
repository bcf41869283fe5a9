"""Keys, tokens and passwords among settings: read by name from the environment, and masked wherever settings are
written.

``${NAME}`` in a reward's kwargs or address is replaced where that reward is made (``resolved``), never before: files
hold the name. A secret that stands in a setting itself is recognised by its key, by its form or by its place in an
address (``masked``): ``run.json``, W&B, the card and an evaluation's file get ``********``, and a message that would
quote it is printed without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_toolkit.errors import ConfigError
from rlhf_toolkit.texts import HIDDEN, keep_secret

BY_NAME = re.compile(r"(\$?)\$\{([^{}]*)\}")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
ALONE = {
    *("password", "passwd", "passphrase", "passcode", "pwd", "pass", "pin", "secret", "secrets", "credential"),
    *("credentials", "creds", "authorization", "authentication", "auth", "bearer", "cookie", "cookies", "apikey"),
    *("jwt", "pat", "otp", "signature", "sig", "sas", "accesskey", "secretkey", "privatekey", "authtoken"),
    *("accesstoken", "oauth", "keyfile", "webhook", "dsn", "login", "key", "token", "apitoken"),
}
"""Words that make a key of settings secret wherever they stand in it. ``key`` and ``token`` do unless one of
``OF_TEXT`` stands before them."""
OF_TEXT = {
    *("eos", "bos", "pad", "unk", "mask", "sep", "cls", "stop", "end", "start", "begin", "first", "last", "max", "min"),
    *(
        "think",
        "answer",
        "special",
        "image",
        "per",
        "new",
        "next",
        "prompt",
        "response",
        "sort",
        "column",
        "row",
        "label",
    ),
    *("question", "target", "text", "score", "foreign", "primary", "field", "dict", "json", "group", "separator", "of"),
}
FORMS = re.compile(
    r"(?<![A-Za-z0-9])((sk|pk|rk)[-_](live|test|proj|ant|or)?[-_]?[\w-]{12,}|hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}"
    r"|glpat-[\w-]{12,}"
    r"|xox[abeoprs]-[\w-]{8,}|(AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{20,}|ya29\.[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]+\.?[\w-]*"
    r"|(?i:bearer|basic|token)\s+[\w.~+/=-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*|npm_\w{16,}|wandb_v1_\w{12,}"
    r"|dop_v1_\w{16,}|SG\.[\w-]{10,}\.[\w-]{10,}|nvapi-[\w-]{12,}|gsk_\w{16,}|r8_\w{16,})"
)
"""What services give their keys the form of; it is a secret under any name."""
USER = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.-]*://)(?P<secret>[^/?#@\s]+)(?=@)|(?<=://)(?P<late>[^/?#\s]*)(?=@)")
FIELD = re.compile(r"(?P<before>[?&;#](?P<key>[^=&;#\s]{1,100})=)(?P<secret>[^&;#\s]+)")


def resolved(value: Any, setting: str) -> Any:
    """``value``, text or lists and dicts of it, with every ``${NAME}`` replaced by the environment's variable, which is
    kept out of all messages from then on. ``$${NAME}`` becomes ``${NAME}``.

    Raises ConfigError, which names ``setting``, for a variable that is not set or is empty, and for what is no name.
    """
    if isinstance(value, str):
        return BY_NAME.sub(lambda match: _variable(match, setting), value)
    if isinstance(value, list):
        return [resolved(item, f"{setting}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: resolved(item, f"{setting}.{key}") for key, item in value.items()}
    return value


def masked(value: Any) -> Any:
    """Settings as they may be written down: a secret is ``********``, the name of a variable stays, everything else is
    as it was."""
    return _walked(value, "", lambda secret: HIDDEN)


def keep_secrets_of(value: Any) -> None:
    """Keep every secret that stands in these settings out of all messages of this process."""

    def keep(secret: str) -> str:
        keep_secret(secret)
        return secret

    _walked(value, "", keep)


def is_secret_key(key: str) -> bool:
    """Whether what stands under this name is a secret: ``api_key``, ``hfToken``, ``Authorization``; not ``eos_token``,
    ``max_tokens`` or ``answer_key``."""
    words = [word.lower() for word in WORDS.findall(key)]
    for number, word in enumerate(words):
        if word in ("key", "token"):
            if not (number and words[number - 1] in OF_TEXT) and words[number + 1 :] not in (["id"], ["ids"]):
                return True
        elif word in ALONE:
            return True
    return "".join(words) in ALONE


def _variable(match: re.Match[str], setting: str) -> str:
    escaped, name = match.groups()
    if escaped:
        return match[0][1:]
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{setting} holds ${{{name[:50]}}}, which names no variable of the environment; write ${{NAME}}, or "
            f"$${{...}} for the text itself"
        )
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"{setting} names the environment's variable {name}, which is not set; export {name}=...")
    keep_secret(value)
    return value


def _walked(value: Any, key: str, found: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        # What is below a secret key is secret, whatever it is called: ``headers: {Authorization: {a: ...}}``.
        inherits = is_secret_key(key)
        return {name: _walked(item, key if inherits else str(name), found) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walked(item, key, found) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        return _text(value, key, found)
    return found(str(value)) if is_secret_key(key) and value else value


def _text(text: str, key: str, found: Callable[[str], str]) -> str:
    if not text or text == HIDDEN or BY_NAME.fullmatch(text):
        return text
    if is_secret_key(key) and not _is_only_names(text):
        return found(text)

    def replaced(match: re.Match[str]) -> str:
        secret = match["secret"] if match["secret"] is not None else match["late"] or ""
        if not secret or BY_NAME.fullmatch(secret) or _is_only_names(secret):
            return match[0]
        return (match["before"] or "") + found(secret)

    def in_field(match: re.Match[str]) -> str:
        return replaced(match) if is_secret_key(match["key"]) else match[0]

    text = FIELD.sub(in_field, USER.sub(replaced, text)) if "=" in text or "@" in text else text
    return FORMS.sub(lambda match: found(match[0]), text)


def _is_only_names(text: str) -> bool:
    """Whether ``text`` is variables by name with nothing but a word such as Bearer around them."""
    rest, count = BY_NAME.subn("", text)
    return count > 0 and not re.sub(r"(?i)bearer|basic|token|[\s:]", "", rest)
