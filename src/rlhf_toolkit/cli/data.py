"""``rlhf data``: training data as a model will see it."""

from __future__ import annotations

from rlhf_toolkit.cli.words import Argument, Command, Options, at_least_1
from rlhf_toolkit.texts import say


def show_data(options: Options) -> None:
    """Print rows of training data token by token."""
    from rlhf_toolkit.runs.shown_rows import asked, shown_rows

    say(shown_rows(asked(vars(options))))


DATA_COMMANDS = (
    Command(
        "show",
        "print rows token by token, what is trained, and what is dropped",
        show_data,
        (
            Argument("source", metavar="SOURCE", help="a hub dataset, or a json, jsonl, csv or parquet file"),
            Argument("--model", required=True, help="hub name, NAME@REVISION or folder, for its tokenizer"),
            Argument(
                "--as", dest="kind", choices=("examples", "pairs", "prompts"), help="without it, as their columns say"
            ),
            Argument("--split", default="train", help="default: %(default)s"),
            Argument("--streaming", action="store_true", help="read rows while they are tokenised, store none"),
            Argument("--max-rows", type=at_least_1, metavar="N", help="read only the first N rows"),
            Argument("--count", type=int, default=3, help="rows to print; default: %(default)s"),
            Argument("--max-tokens", type=int, default=1024, help="longer rows are dropped; default: %(default)s"),
            Argument("--no-chat-template", action="store_true", help="take strings as they stand"),
            Argument("--chat-template", metavar="FILE", help="render with this file of Jinja"),
            Argument(
                "--template-value",
                action="append",
                default=[],
                metavar="NAME=VALUE",
                help="what the template reads, such as enable_thinking=false",
            ),
            Argument("--eos-token", action="append", default=[], metavar="TOKEN", help="as model.eos_token"),
            Argument("--column", default="prompt", help="of prompts; default: %(default)s"),
            Argument(
                "--stop-string", action="append", default=[], metavar="TEXT", help="of prompts: as rollout.stop_strings"
            ),
            Argument("--turns", choices=("all", "last"), default="all", help="as sft.turns; default: %(default)s"),
            Argument("--system-prompt", help="system message of conversations that bring none"),
        ),
    ),
)
