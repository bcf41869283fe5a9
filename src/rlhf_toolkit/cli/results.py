"""Commands on what a run has left: report, card, merge, chat, evaluate, inspect.

This module reads their arguments and prints their lines; the work of each is done elsewhere, in modules that are
imported by the command that needs them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryFile

from rlhf_toolkit.cli.words import Argument, Command, Options, at_least_1, penalty, share
from rlhf_toolkit.texts import say


def report(options: Options) -> None:
    """Print what a finished run came to."""
    from rlhf_toolkit.export.finished import read_run, readable
    from rlhf_toolkit.reporting.report import print_report

    with readable(options.run_folder):
        print_report(options.run_folder, read_run(options.run_folder).summary)


def card(options: Options) -> None:
    """Write a finished run's model card; with ``--push`` send it and the adapters to the hub."""
    from huggingface_hub import HfApi

    from rlhf_toolkit.export.card import push, write_card
    from rlhf_toolkit.export.finished import read_run

    run = read_run(options.run_folder)
    say(f"wrote {write_card(run, options.push)}")
    if options.push:
        say(f"sent to {options.push}: {', '.join(push(run, options.push, HfApi()))}")


def merge(options: Options) -> None:
    """Add an adapter to its base; with ``--verify`` compare the logits of both afterwards."""
    import torch

    from rlhf_toolkit.export.merge import merge
    from rlhf_toolkit.export.verify import verify

    dtype = getattr(torch, options.dtype) if options.dtype else None
    trust = options.trust_remote_code
    merged = merge(options.base, options.adapter, options.out, dtype=dtype, trust_remote_code=trust)
    word = str(merged.dtype).removeprefix("torch.")
    if merged.base != options.base:
        say(f"the base is {merged.base}: the adapter names that revision")
    if merged.own_tokenizer:
        say("tokenizer, chat template and stop tokens are those beside the adapter")
    say(f"{merged.folder}: {len(merged.layers)} layers merged, {merged.bytes / 2**30:.2f} GiB in {word}")
    say(f"rounding to {word} changed {merged.rounding:.2%} of what the adapter adds")
    if merged.note:
        say(merged.note)
    if merged.left_out:
        say(f"not copied from the base: {', '.join(merged.left_out)}")
    if options.verify:
        found = verify(
            merged.base,
            options.adapter,
            merged.folder,
            dtype=merged.dtype,
            sequences=options.verify,
            trust_remote_code=trust,
        )
        say(
            f"logits: largest difference from base + adapter {found.difference:.3g} (tolerance {found.tolerance:.3g}); "
            f"the adapter moves them by {found.moved:.3g}"
        )


def chat(options: Options) -> None:
    """Let a base and adapters on it answer what is typed."""
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
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        keep_special_tokens=options.keep_special_tokens,
    )
    try:
        chat.run(typed())
    except KeyboardInterrupt:  # in the middle of an answer
        print()


def evaluate(options: Options) -> None:
    """Have adapters and their base answer an experiment's held-out prompts, and compare them."""
    from rlhf_toolkit.files import write_text
    from rlhf_toolkit.reporting.report import evaluation_lines
    from rlhf_toolkit.runs.evaluation import compare_contestants, read_experiment, written_to

    for place in (options.out, options.responses):
        if place is not None:
            with written_to(place), TemporaryFile(dir=place.absolute().parent):
                pass  # what cannot be written is better known before the work than after
    experiment = read_experiment(options.experiment, options.set, samples=options.samples)
    found = compare_contestants(experiment, options.contestants, greedy=not options.no_greedy, kl=not options.no_kl)
    plain = found.as_dict()
    say("\n".join(evaluation_lines(plain)))
    if options.out:
        with written_to(options.out):
            write_text(options.out, json.dumps({**plain, "experiment": experiment.as_dict()}, indent=2) + "\n")
    if options.responses:
        with written_to(options.responses):
            found.write_responses(options.responses)


def inspect(options: Options) -> None:
    """Replay the mini-batch of an update that was left out, and print where it first stops being finite."""
    from rlhf_toolkit.runs.inspection import inspect_batch

    found = inspect_batch(options.batch, weights=options.weights, trust_code=options.trust_remote_code)
    say("\n".join(found.lines()))


DTYPES = ("bfloat16", "float16", "float32")
RUN = Argument("run_folder", type=Path, metavar="RUN", help="a run's run.output_dir")
BASE = Argument("base", help="hub name, NAME@REVISION or folder of the base model")
TRUST = Argument("--trust-remote-code", action="store_true", help="run model code from the hub")
FILTERS = (
    Argument("--top-k", type=at_least_1, default=0, metavar="K", help="draw from the K likeliest tokens"),
    Argument("--top-p", type=share, default=1.0, metavar="P", help="from the smallest set with this probability"),
    Argument("--min-p", type=share, default=0.0, metavar="P", help="from tokens P times as likely as the likeliest"),
    Argument("--repetition-penalty", type=penalty, metavar="X", help="without it, the model's generation config's"),
    Argument("--keep-special-tokens", action="store_true", help="in answers, but those that end them"),
)
COMMANDS = (
    Command("report", "print what a finished run came to", report, (RUN,), light=True),
    Command(
        "card",
        "write a finished run's model card, and send it and the adapters to the hub",
        card,
        (RUN, Argument("--push", metavar="REPO", help="send card and adapters to this name of the hub")),
    ),
    Command(
        "merge",
        "add a LoRA adapter to its base: one plain model, tensor by tensor on CPU",
        merge,
        (
            BASE,
            Argument("adapter", help="hub name or folder of the adapter, such as runs/x/policy"),
            Argument("out", type=Path, help="folder to make"),
            Argument("--dtype", choices=DTYPES, help="of the result; without it, the base's own"),
            Argument(
                "--verify",
                type=at_least_1,
                metavar="N",
                help="then compare logits with base + adapter on N random sequences",
            ),
            TRUST,
        ),
    ),
    Command(
        "chat",
        "talk to a base and to adapters on it, side by side",
        chat,
        (
            BASE,
            Argument("adapters", nargs="*", metavar="ADAPTER", help="hub names or folders of adapters"),
            Argument("--dtype", choices=DTYPES, help="of the base; without it, the one it is stored in"),
            Argument("--max-new-tokens", type=at_least_1, default=256, metavar="N", help="of an answer (256)"),
            Argument("--seed", type=int, default=0, help="of the tokens drawn at a temperature above 0 (0)"),
            *FILTERS,
            TRUST,
        ),
    ),
    Command(
        "evaluate",
        "have adapters and their base answer an experiment's held-out prompts, and compare them",
        evaluate,
        (
            Argument("experiment", metavar="EXPERIMENT", help="a YAML file of PPO: prompts, rewards, sampling"),
            Argument(
                "contestants", nargs="+", metavar="CONTESTANT", help="adapter folders, their names on the hub, or base"
            ),
            Argument("--samples", type=at_least_1, metavar="N", help="sampled responses to each prompt as well"),
            Argument("--no-greedy", action="store_true", help="sampled responses only"),
            Argument("--no-kl", action="store_true", help="leave out the pass that the KL to the reference needs"),
            Argument("--set", action="append", default=[], metavar="section.key=value", help="replaces a setting"),
            Argument("--out", type=Path, metavar="FILE", help="write estimates and win rates there, as JSON"),
            Argument("--responses", type=Path, metavar="FILE", help="write every response there, as JSON lines"),
        ),
    ),
    Command(
        "inspect",
        "replay the batch of an update that was left out, and say where the first NaN or infinity is",
        inspect,
        (
            Argument("batch", type=Path, metavar="FILE", help="a kept batch, such as runs/x/skipped/step-7"),
            Argument("--weights", type=Path, metavar="FOLDER", help="trained roles; without it, those kept beside it"),
            TRUST,
        ),
    ),
)
