"""``rlhf``: what needs no distributed launch. Each command's work is a module of its own; here are its words.

Modules are imported by the command that needs them, so that ``rlhf --help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from rlhf_toolkit.errors import reported

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. An error the user can mend ends the process with status 1 and one line."""
    parser = argparse.ArgumentParser(prog="rlhf", description="What to do with the result of a run (docs/export.md).")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_report, _add_card, _add_merge, _add_chat, _add_evaluate, _add_data):
        add(commands)
    parsed = parser.parse_args(arguments)
    with reported():
        _quiet()
        parsed.run(parsed)


# ---- report and card -------------------------------------------------------------------------------------------------


def _add_report(commands: Commands) -> None:
    parser = commands.add_parser("report", help="print what a finished run came to")
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's run.output_dir")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from rlhf_toolkit.export.folders import read_run
    from rlhf_toolkit.reporting.report import print_report

    print_report(options.run_folder, read_run(options.run_folder).summary)


def _add_card(commands: Commands) -> None:
    parser = commands.add_parser(
        "card", help="write a finished run's model card, and send it and the adapters to the hub"
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's run.output_dir")
    parser.add_argument("--push", metavar="REPO", help="send card and adapters to this name of the hub")
    parser.set_defaults(run=_card)


def _card(options: argparse.Namespace) -> None:
    from huggingface_hub import HfApi

    from rlhf_toolkit.export.card import push, write_card
    from rlhf_toolkit.export.folders import read_run

    run = read_run(options.run_folder)
    print(f"wrote {write_card(run, options.push)}")
    if options.push:
        print(f"sent to {options.push}: {', '.join(push(run, options.push, HfApi()))}")


# ---- merge -----------------------------------------------------------------------------------------------------------


def _add_merge(commands: Commands) -> None:
    parser = commands.add_parser(
        "merge", help="add a LoRA adapter to its base: one plain model, tensor by tensor on CPU"
    )
    parser.add_argument("base", help="hub name or folder of the base model")
    parser.add_argument("adapter", help="hub name or folder of the adapter, such as runs/x/policy")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of the result; without it, the base's own")
    parser.add_argument(
        "--verify", type=_at_least_1, metavar="N", help="then compare logits with base + adapter on N random sequences"
    )
    _add_trust(parser)
    parser.set_defaults(run=_merge)


def _merge(options: argparse.Namespace) -> None:
    import torch

    from rlhf_toolkit.export.merge import merge
    from rlhf_toolkit.export.verify import verify

    dtype = getattr(torch, options.dtype) if options.dtype else None
    trust = options.trust_remote_code
    merged = merge(options.base, options.adapter, options.out, dtype=dtype, trust_remote_code=trust)
    word = str(merged.dtype).removeprefix("torch.")
    print(f"{merged.folder}: {len(merged.layers)} layers merged, {merged.bytes / 2**30:.2f} GiB in {word}")
    print(f"rounding to {word} changed {merged.rounding:.2%} of what the adapter adds")
    if merged.left_out:
        print(f"not copied from the base: {', '.join(merged.left_out)}")
    if options.verify:
        found = verify(
            options.base,
            options.adapter,
            merged.folder,
            dtype=merged.dtype,
            sequences=options.verify,
            trust_remote_code=trust,
        )
        print(
            f"logits: largest difference from base + adapter {found.difference:.3g} (tolerance {found.tolerance:.3g}); "
            f"the adapter moves them by {found.moved:.3g}"
        )


# ---- chat ------------------------------------------------------------------------------------------------------------


def _add_chat(commands: Commands) -> None:
    parser = commands.add_parser("chat", help="talk to a base and to adapters on it, side by side")
    parser.add_argument("base", help="hub name or folder of the base model")
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER", help="hub names or folders of adapters")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base; without it, the one it is stored in")
    parser.add_argument("--max-new-tokens", type=_at_least_1, default=256, metavar="N", help="of an answer (256)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens drawn at a temperature above 0 (0)")
    _add_trust(parser)
    parser.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> None:
    import torch

    from rlhf_toolkit.export.chat import load_chat, typed

    chat = load_chat(
        options.base,
        options.adapters,
        sys.stdout,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        trust_remote_code=options.trust_remote_code,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )
    try:
        chat.run(typed())
    except KeyboardInterrupt:  # in the middle of an answer
        print()


# ---- evaluate --------------------------------------------------------------------------------------------------------


def _add_evaluate(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate", help="have adapters and their base answer an experiment's held-out prompts, and compare them"
    )
    parser.add_argument("experiment", metavar="EXPERIMENT", help="a YAML file of PPO: prompts, rewards, sampling")
    parser.add_argument(
        "contestants", nargs="+", metavar="CONTESTANT", help="adapter folders, their names on the hub, or base"
    )
    parser.add_argument("--samples", type=_at_least_1, metavar="N", help="sampled responses to each prompt as well")
    parser.add_argument("--no-greedy", action="store_true", help="sampled responses only")
    parser.add_argument("--no-kl", action="store_true", help="leave out the pass that the KL to the reference needs")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="replaces a setting")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write estimates and win rates there, as JSON")
    parser.add_argument("--responses", type=Path, metavar="FILE", help="write every response there, as JSON lines")
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from rlhf_toolkit.reporting.report import evaluation_lines
    from rlhf_toolkit.runs.evaluation import evaluate, read_experiment

    experiment = read_experiment(options.experiment, options.set, samples=options.samples)
    found = evaluate(experiment, options.contestants, greedy=not options.no_greedy, kl=not options.no_kl)
    plain = found.as_dict()
    print("\n".join(evaluation_lines(plain)))
    if options.out:
        options.out.write_text(json.dumps({**plain, "experiment": experiment.as_dict()}, indent=2) + "\n")
    if options.responses:
        found.write_responses(options.responses)


# ---- shared ----------------------------------------------------------------------------------------------------------


def _quiet() -> None:
    """No bars and no warnings of libraries between a command's lines."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the hub")


def _at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


# ---- data ------------------------------------------------------------------------------------------------------------


def _add_data(commands: Commands) -> None:
    parser = commands.add_parser("data", help="look at training data as a model will see it")
    show = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "show", help="print rows token by token, what is trained, and what is dropped"
    )
    show.add_argument("source", metavar="SOURCE", help="a hub dataset, or a json, jsonl, csv or parquet file")
    show.add_argument("--model", required=True, help="hub name or folder, for its tokenizer")
    show.add_argument(
        "--as", dest="kind", choices=("examples", "pairs"), default="examples", help="default: %(default)s"
    )
    show.add_argument("--split", default="train", help="default: %(default)s")
    show.add_argument("--streaming", action="store_true", help="read rows while they are tokenised, store none")
    show.add_argument("--max-rows", type=_at_least_1, metavar="N", help="read only the first N rows")
    show.add_argument("--count", type=int, default=3, help="rows to print; default: %(default)s")
    show.add_argument("--max-tokens", type=int, default=1024, help="longer rows are dropped; default: %(default)s")
    show.add_argument("--no-chat-template", action="store_true", help="take strings as they stand")
    show.add_argument("--system-prompt", help="system message before string prompts")
    show.set_defaults(run=_data_show)


def _data_show(options: argparse.Namespace) -> None:
    import logging

    import datasets

    from rlhf_toolkit.data.instructions import tokenise_examples
    from rlhf_toolkit.data.preferences import tokenise_pairs
    from rlhf_toolkit.data.preview import preview
    from rlhf_toolkit.data.prompts import load_rows
    from rlhf_toolkit.data.tokenizers import stop_token_ids
    from rlhf_toolkit.models.loading import generation_eos_of, load_model_config, load_tokenizer

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs of a broken file is in the error, too
    tokenizer, config = load_tokenizer(options.model), load_model_config(options.model)
    read = tokenise_examples if options.kind == "examples" else tokenise_pairs
    found = read(
        load_rows(options.source, options.split, streaming=options.streaming, max_rows=options.max_rows),
        tokenizer,
        max_tokens=options.max_tokens,
        system_prompt=options.system_prompt,
        chat_template=not options.no_chat_template,
        stop_ids=stop_token_ids(tokenizer, generation_eos_of(options.model, config), stop_strings=()),
    )
    print(preview(found, tokenizer, options.count))


if __name__ == "__main__":
    main()
