"""Chat templates: rendered for data, and in a chat."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_toolkit.data import templates
from rlhf_toolkit.data.chat import render
from rlhf_toolkit.export.chat import load_chat
from rlhf_toolkit.models.loading import load_tokenizer
from tests.strangers import folders, frame
from tests.strangers.ground import VICTIM, here

HEAVY = ("transformers.models.llama.modeling_llama",)
COUNT, LIMIT = 120, 30.0
GOOD = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
ENDLESS = {
    "two loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "three loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "two loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "power in a condition": "{% if 9 ** 9 ** 9 > 1 %}x{% endif %}",
    "power filter": "{{ (10 ** 8) | int ** (10 ** 9) }}",
    "text times": "{{ 'a' * 10 ** 11 }}",
    "text times a little": "{{ 'a' * 10 ** 8 }}",
    "list times": "{{ [1] * 10 ** 10 }}",
    "doubling": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "squaring": "{% set ns = namespace(x=10) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "recursion by two": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "format of a width": "{{ '%99999999999d' % 1 }}",
    "format filter": "{{ '%99999999999d' | format(1) }}",
    "format method": "{{ '{:>99999999999}'.format(1) }}",
    "centre": "{{ 'a' | center(99999999999) }}",
    "ljust": "{{ 'a'.ljust(99999999999) }}",
    "zfill": "{{ '1'.zfill(99999999999) }}",
    "expandtabs": "{{ '\t'.expandtabs(99999999999) }}",
    "replace": "{% set a = 'a' * 10 ** 6 %}{{ a.replace('a', a) }}",
    "join": "{{ (['a' * 10 ** 6] * 10 ** 6) | join }}",
    "indent": "{{ ('a\n' * 10 ** 5) | indent(10 ** 7) }}",
    "lipsum": "{% for i in range(99999) %}{{ lipsum(n=99999) }}{% endfor %}",
    "lists of lists": "{{ range(99999) | batch(1) | list | batch(1) | list * 99999 }}",
    "sorting": "{% for i in range(99999) %}{% set x = range(99999) | list | sort(reverse=true) %}{% endfor %}",
    "tojson": "{{ ([['a' * 1000] * 1000] * 10000) | tojson }}",
    "wordwrap": "{{ ('a ' * 10 ** 7) | wordwrap(1) }}",
    "urlize": "{{ ('http://a.b/' * 10 ** 6) | urlize }}",
    "striptags": "{{ ('<' * 10 ** 6) | striptags }}",
    "shift": "{{ (1).__lshift__(10 ** 11) }}",
    "a long product": "{{ " + " * ".join(["(10 ** 9999999)"] * 20) + " }}",
    "deep brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "many blocks": "{% if messages %}a{% endif %}" * 100000,
    "while by content": "{% for m in messages %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "only without a prompt": "{% if not add_generation_prompt %}{{ 10 ** 10 ** 10 }}{% endif %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% endfor %}{% endfor %}",
}
ESCAPES = {
    "globals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "init globals": "{{ cycler.__init__.__globals__.os.system('{COMMAND}') }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].popen('{COMMAND}').read() }}",
    "namespace": "{{ namespace.__init__.__globals__.os.system('{COMMAND}') }}",
    "lipsum globals": "{{ lipsum.__globals__.os.system('{COMMAND}') }}",
    "raise exception's globals": "{{ raise_exception.__globals__['os'].system('{COMMAND}') }}",
    "strftime's globals": "{{ strftime_now.__globals__['os'].system('{COMMAND}') }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format string": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "map attribute": "{{ [''] | map(attribute='__class__') | list }}",
    "include": "{% include '{OUTSIDE}/victim' %}",
    "import": "{% import '{OUTSIDE}/victim' as x %}{{ x }}",
    "extends": "{% extends '{OUTSIDE}/victim' %}",
    "self": "{{ self.__init__.__globals__ }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "messages append": "{{ messages.append(1) }}",
    "messages clear": "{{ messages.clear() }}",
    "a key's own": "{{ messages[0].__class__.__init__ }}",
    "cycler": "{{ cycler('a').__init__.__globals__ }}",
}
RAISING = {
    "raises": "{{ raise_exception('no \x1b[2J\nfor you') }}",
    "undefined": "{{ nothing.there }}",
    "divides": "{{ 1 / 0 }}",
    "syntax": "{% for %}",
    "unclosed": "{% if x",
    "raises long": "{{ raise_exception('x' * 1000000) }}",
    "a number": "{{ messages + 1 }}",
    "no filter": "{{ 1 | nofilter }}",
    "break": "{% break %}",
}
TOLD = {
    "ESC": GOOD + "\x1b[2J\x1b]0;x\x07",
    "bidi": GOOD + "\u202e",
    "nothing": "",
    "long": GOOD + "a" * 10**6,
    "megabytes": "{% for m in messages %}{{ m['content'] * 100000 }}{% endfor %}",
    "NUL": GOOD + "\0",
    "surrogate": GOOD + "\ud800",
    "good": GOOD,
}


@dataclass(frozen=True)
class Case:
    """A template; it may be taken, as long as it ends in time and says nothing that it must not know."""

    name: str
    way: str
    template: str


def cases(seed: int, count: int) -> Iterator[Case]:
    folders.sound()
    chance = random.Random(f"templates {seed}")
    found = [Case(f"data: {name}", "data", each) for name, each in ENDLESS.items()]
    found += [Case(f"data: {name}", "data", each) for name, each in (ESCAPES | RAISING | TOLD).items()]
    chat = list((ENDLESS | ESCAPES | RAISING | TOLD).items())
    found += [Case(f"chat: {name}", "chat", each) for name, each in chance.sample(chat, 25)]
    if count < len(found):
        found = chance.sample(found, count)
    yield from found
    pieces = list((ENDLESS | ESCAPES | TOLD).values())
    for number in range(count - len(found)):
        whole = "".join(chance.sample(pieces, 2)) if chance.random() < 0.5 else cut(chance, chance.choice(pieces))
        yield Case(f"{number}: {whole[:60]!a}", "data", whole)


def cut(chance: random.Random, whole: str) -> str:
    place = chance.randrange(len(whole) + 1)
    return whole[:place] + chance.choice(["", "}}", "%}", "{{", "{%", "{#", "\0", "{% endfor %}"]) + whole[place:][:500]


def run(case: Case) -> str:
    templates.SECONDS = 3.0
    folders.copied("base", "adapter")
    template = here().filled(case.template)
    config = Path("base/tokenizer_config.json")
    Path("base/chat_template.jinja").unlink(missing_ok=True)
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    if case.way == "chat":
        out = io.StringIO()
        load_chat("base", [], out, dtype=None, trust_remote_code=False, max_new_tokens=3).run(["w1 w2"])
        shown = out.getvalue()
        good = VICTIM not in shown and all(each.isprintable() or each in "\n\t" for each in shown)
    else:
        tokenizer = load_tokenizer("base")
        messages = [{"role": "user", "content": "w1 w2"}]
        text = render(messages, tokenizer, index=0, add_generation_prompt=True)
        good = VICTIM not in text and "posix" not in text and "built-in" not in text
        tokenizer.chat_template = GOOD  # and the next one is not hurt
        good = good and render(messages, tokenizer, index=0, add_generation_prompt=True) == "w1 w2 "
    return frame.RIGHTLY if good else frame.WRONGLY
