"""The files that every case uses: a model of one layer, adapters on it, and functions of a user."""

from __future__ import annotations

from pathlib import Path

from tests.support.chat_tokenizers import TURNS
from tests.support.exports import write_adapter
from tests.support.tiny import tiny_llama, write_task

PLUGINS = '''
def low_words(prompts, responses, factor=1.0, **columns):
    """The share of words below w14, the length of the response beside it."""
    return [factor * (sum(word < "w14" for word in text.split()) + 0.1 * len(text)) for text in responses]

def by_token(prompts, responses, tokens, **columns):
    return [[0.1 * (token % 3) for token in row] for row in tokens]

def now_and_then(prompts, responses, **columns):
    if len(responses[0]) % 2:
        raise ValueError("not this one\\nand a second line")
    return [float(len(text)) for text in responses]

def raising(prompts, responses, **columns):
    raise KeyError("reward of the user")

def too_few(prompts, responses, **columns):
    return [1.0]

def not_a_number(prompts, responses, **columns):
    return [float("nan")] * len(responses)

def texts(prompts, responses, **columns):
    return ["good"] * len(responses)

def first_word(responses):
    return [text.split()[0] if text.split() else None for text in responses]

def answering(prompts, responses, turn, **columns):
    return ["w1 w2" if turn < 2 else None for _ in responses]

def first_ones(*, count, prompts, **offered):
    return list(range(count))

def own_advantage(rewards, mask, **offered):
    return rewards * mask, rewards * mask

NOT_A_FUNCTION = 3
'''


def write_fixtures(folder: Path) -> Path:
    """Write everything below ``folder`` and return it."""
    model = tiny_llama(
        num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    write_task(folder, model=model, prompts=8, chat_template=TURNS)
    (folder / "plugins.py").write_text(PLUGINS)
    (folder / "template.jinja").write_text(TURNS.replace("<assistant> ", "<assistant> w1 "))
    write_adapter(folder / "adapter", folder / "model")
    write_adapter(folder / "reward_adapter", folder / "model", seed=2)
    return folder
