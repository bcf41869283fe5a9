"""Compare the public functions with stored vectors: ``python -m tests.reference_vectors FOLDER [--only NAME ...]``.

Every ``*.json`` file of FOLDER is a list of cases, ``{"id", "inputs", "params", "expected"}``. A file's stem names its
family, ``EVALUATORS`` the function that computes a family's outputs. A case passes when each expected key agrees to
1e-5 relative (1e-6 absolute); ``metric_*`` keys are not compared, and a key ``x_where_mask`` is the output ``x`` with
zeros outside the mask. The exit status is 0 only if something was compared, all of it passed and every file was known.

``--only`` looks only at the files that a word names: one of the ``__``-separated parts of the stem, or those it starts
with. An unknown file is then mentioned and not counted, but a word that names no known file is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_toolkit.algorithms.advantages import ADVANTAGE_ESTIMATORS, WHITENED
from rlhf_toolkit.algorithms.aggregation import AGGREGATION_MODES, aggregate
from rlhf_toolkit.algorithms.importance import truncated_sequence_weights, truncated_token_weights
from rlhf_toolkit.algorithms.kl import KL_ESTIMATORS, kl_penalty
from rlhf_toolkit.algorithms.kl_control import AdaptiveKL
from rlhf_toolkit.algorithms.masking import centre_and_scale
from rlhf_toolkit.algorithms.policy_losses import AGGREGATION_OF, POLICY_LOSSES, SELECTORS
from rlhf_toolkit.algorithms.value_losses import clipped_value_loss
from rlhf_toolkit.errors import RLHFError
from rlhf_toolkit.plugins import takes

RELATIVE, ABSOLUTE = 1e-5, 1e-6

FAILURES = (RLHFError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What a function raises on a case that it cannot take: that case fails, and the others still count."""

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One stored case, its inputs as fp32 tensors and its mask as bool."""

    name: str
    inputs: dict[str, Tensor]
    params: dict[str, Any]
    expected: dict[str, Tensor]

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Case:
        """Build a case from its JSON."""
        inputs = {name: torch.tensor(value, dtype=torch.float32) for name, value in raw["inputs"].items()}
        if "mask" in inputs:
            inputs["mask"] = inputs["mask"].bool()
        expected = {key: torch.tensor(value) for key, value in raw["expected"].items() if not key.startswith("metric_")}
        return cls(raw["id"], inputs, raw["params"], expected)


# One function per family: what it is called with, and under which key each output is expected.


def _advantages(case: Case, name: str) -> Outputs:
    estimator, offered = (
        ADVANTAGE_ESTIMATORS[name],
        case.inputs | _named(case.params, {"lam": "gae_lambda", "eps": "epsilon"}),
    )
    if "group" in offered:
        offered["groups"] = offered.pop("group").long()
    advantages, returns = estimator(**{key: value for key, value in offered.items() if takes(estimator, key)})
    if case.params.get("whiten", name in WHITENED):
        advantages = centre_and_scale(advantages, case.inputs["mask"])
    return {"advantages": advantages, "returns": returns}


def _named(params: dict[str, Any], ours: dict[str, str]) -> dict[str, Any]:
    """Parameters under our names; those that ``ours`` does not translate keep theirs."""
    return {ours.get(name, name): value for name, value in params.items()}


def _whole(loss: Tensor, mask: Tensor, mode: str, *, empty_rows: bool = False) -> Tensor:
    """Reduce a loss whose every token is at hand, so that the counts are its own: with or without the empty rows."""
    tokens, sequences = int(mask.sum()), len(mask) if empty_rows else int(mask.any(dim=1).sum())
    return aggregate(loss, mask, mode=mode, tokens=tokens, sequences=sequences, width=mask.size(1))


def _aggregate(case: Case, mode: str) -> Outputs:
    return {"value": _whole(case.inputs["loss"], case.inputs["mask"], mode)}


def _kl(case: Case, estimator: str) -> Outputs:
    return {"value": kl_penalty(case.inputs["logprobs"], case.inputs["ref_logprobs"], estimator=estimator)}


POLICY_KNOBS = {
    "clip_low": "clip_range_low",
    "clip_high": "clip_range_high",
    "tau_pos": "tau_positive",
    "tau_neg": "tau_negative",
    "dro_beta": "beta",
}
"""What the vectors call our knobs, where the names differ."""


def _policy_loss(case: Case, name: str) -> Outputs:
    loss, logprobs, mask = POLICY_LOSSES[name], case.inputs["logprobs"].requires_grad_(), case.inputs["mask"]
    knobs = _named(case.params, POLICY_KNOBS)
    if name in SELECTORS:
        # verl chooses by the log-probs of the update itself, in every micro-batch; here that is the whole.
        share = case.params["kl_cov_ratio"]
        knobs["selected"] = SELECTORS[name](logprobs.detach(), case.inputs["advantages"], mask, share=share)
    terms = loss(**case.inputs, **{key: value for key, value in knobs.items() if takes(loss, key)})
    # verl's geo_mean is a mean over all rows, those without a token included; everything else leaves these out.
    mode = AGGREGATION_OF.get(name, case.params["aggregation"])
    total = _whole(terms.per_token, mask, mode, empty_rows=name == "geo_mean")
    return {"loss": total, "grad_logprobs": torch.autograd.grad(total, logprobs)[0]}


def _value_loss(case: Case) -> Outputs:
    values, mask = case.inputs["values"].requires_grad_(), case.inputs["mask"]
    terms = clipped_value_loss(**case.inputs, value_clip_range=case.params["clip"])
    loss = _whole(terms.per_token, mask, case.params["aggregation"])
    clip_fraction = _whole(terms.clipped.float(), mask, "token-mean")
    return {"loss": loss, "clip_fraction": clip_fraction, "grad_values": torch.autograd.grad(loss, values)[0]}


def _importance(case: Case, weigh: Callable[..., Tensor]) -> Outputs:
    old, rollout = case.inputs["logprobs"], case.inputs["rollout_logprobs"]
    return {"weights": weigh(old, rollout, case.inputs["mask"], threshold=case.params["threshold"])}


def _kl_controller(case: Case) -> Outputs:
    control = AdaptiveKL(case.params["initial"], target=case.params["target"], horizon=case.params["horizon"])
    coefficients = []
    for kl in case.inputs["kl"].tolist():
        control.update(kl, case.params["batch"])
        coefficients.append(control.coefficient)
    return {"coefficients": torch.tensor(coefficients)}


NOT_IN_THE_VECTORS = {"vapo", "clip_cov"}
"""verl has no vapo, and its clip_cov draws tokens from torch's global generator."""

EVALUATORS: dict[str, Callable[[Case], Outputs]] = {
    **{
        f"advantages__{name}": partial(_advantages, name=name)
        for name in ADVANTAGE_ESTIMATORS
        if name not in NOT_IN_THE_VECTORS
    },
    **{f"aggregate__{mode}": partial(_aggregate, mode=mode) for mode in AGGREGATION_MODES},
    **{f"kl__{estimator}": partial(_kl, estimator=estimator) for estimator in KL_ESTIMATORS if estimator[-1] != "+"},
    **{
        f"policy_loss__{name}": partial(_policy_loss, name=name)
        for name in POLICY_LOSSES
        if name not in NOT_IN_THE_VECTORS
    },
    "value_loss": _value_loss,
    "importance__truncated_token": partial(_importance, weigh=truncated_token_weights),
    "importance__truncated_sequence": partial(_importance, weigh=truncated_sequence_weights),
    "kl_controller__adaptive": _kl_controller,
}


def output_for(key: str, outputs: Outputs, case: Case) -> Tensor | None:
    """Find the output that an expected key speaks of, blanked outside the mask where the key says so."""
    output = outputs.get(key.removesuffix("_where_mask"))
    if output is None or not key.endswith("_where_mask"):
        return output
    return torch.where(case.inputs["mask"], output, 0.0)


def difference(output: Tensor | None, expected: Tensor) -> str | None:
    """Say how an output differs from what is expected; None when it agrees."""
    if output is None:
        return "is not computed"
    if output.shape != expected.shape:
        return f"has shape {tuple(output.shape)}, expected {tuple(expected.shape)}"
    output, expected = output.detach().double(), expected.double()
    if torch.allclose(output, expected, rtol=RELATIVE, atol=ABSOLUTE):
        return None
    return f"differs by up to {(output - expected).abs().max().item():.3g}"


def differences(case: Case, evaluate: Callable[[Case], Outputs]) -> list[str]:
    """List what is wrong with one case; empty when it passes."""
    try:
        outputs = evaluate(case)
    except FAILURES as error:
        return [f"raised {type(error).__name__}: {error}"]
    if not case.expected:
        return ["expects nothing that could be compared"]
    found = {key: difference(output_for(key, outputs, case), expected) for key, expected in case.expected.items()}
    return [f"{key} {text}" for key, text in found.items() if text]


def check_file(path: Path, evaluate: Callable[[Case], Outputs]) -> Iterator[bool]:
    """Yield whether each case of a file passes; print those that do not."""
    for raw in json.loads(path.read_text()):
        found = differences(Case.parse(raw), evaluate)
        if found:
            print(f"{path.name} {raw['id']} {raw['params']}: {'; '.join(found)}")
        yield not found


def names(word: str, stem: str) -> bool:
    """Whether a word of ``--only`` selects a file: ``kl`` selects kl__k1 and neither policy_loss__kl_cov nor klx."""
    return word in stem.split("__") or stem == word or stem.startswith(f"{word}__")


def select(folder: Path, only: Sequence[str]) -> list[Path]:
    """List the files to check: all of them, or those that ``only`` names.

    Exits with a message when there is none, or when a word names no file that has an evaluator.
    """
    paths = sorted(folder.glob("*.json"))
    for word in only:
        if not any(names(word, path.stem) and path.stem in EVALUATORS for path in paths):
            sys.exit(f"--only {word}: no known file of {folder} has that name")
    chosen = [path for path in paths if not only or any(names(word, path.stem) for word in only)]
    return chosen or sys.exit(f"{folder} has no *.json file")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a folder, print the differences and the count, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference_vectors", description="Check reference vectors.")
    parser.add_argument("folder", type=Path, help="folder of *.json files")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="check only the files so named")
    options = parser.parse_args(arguments)
    results: list[bool] = []
    for path in select(options.folder, options.only):
        if path.stem in EVALUATORS:
            results += check_file(path, EVALUATORS[path.stem])
            continue
        print(f"unknown file: {path.name}")
        if not options.only:
            results += [False] * max(1, len(json.loads(path.read_text())))
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
