"""``rlhf inspect``: the mini-batch of an update that was left out, replayed on the run's base and adapters.

Where did the first number that is not finite come from? Looked at in the order in which an update computes: the kept
columns, each row's forward pass layer by layer and role by role, the loss, the gradient. Rows are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_toolkit.distributed.topology import start
from rlhf_toolkit.errors import ConfigError, DataError, TopologyError, shortened
from rlhf_toolkit.export.finished import read_json
from rlhf_toolkit.given import SECTION
from rlhf_toolkit.models.finite import find_not_finite
from rlhf_toolkit.models.folders import check_model_folder
from rlhf_toolkit.models.loading import load_model_config, load_tokenizer
from rlhf_toolkit.models.role_outputs import COLUMNS, RoleOutputs
from rlhf_toolkit.run_claims import RUN_FILE
from rlhf_toolkit.runs.replay import SEQUENCES, Replay, replay_of
from rlhf_toolkit.settings.experiment import (
    DPOExperiment,
    Experiment,
    FineTuning,
    RewardExperiment,
    SFTExperiment,
)
from rlhf_toolkit.settings.loading import experiment_from_dict
from rlhf_toolkit.trainers.kept_batches import KeptBatch, Part, kept_folder, read_kept_batch
from rlhf_toolkit.types import Experience

KINDS: dict[str, type[Experiment] | type[FineTuning]] = {
    "ppo": Experiment,
    "sft": SFTExperiment,
    "reward_model": RewardExperiment,
    "dpo": DPOExperiment,
}


@dataclass(frozen=True)
class Finding:
    """A number that is not finite: of which row of which micro-batch, of which role, at which token, in words.

    ``row`` is None where only the micro-batch as a whole shows it; ``token`` counts from 0 within the sequence.
    """

    micro_batch: int
    row: int | None
    role: str | None
    token: int | None
    words: str


@dataclass(frozen=True)
class Inspection:
    """What a replay has shown: the batch, each micro-batch's loss now, the findings in the order of computation, and
    where the weights are from."""

    batch: KeptBatch
    losses: list[float]
    findings: list[Finding]
    weights: Path
    tokenizer: PreTrainedTokenizerBase

    def lines(self) -> Iterator[str]:
        """For people. Text of the batch is escaped and shortened."""
        batch = self.batch
        yield f"step {batch.step} of a run of {batch.kind}, left out: {shortened(batch.why)[1:-1]}"
        yield f"trained weights: {self.weights}" + ("" if batch.weights else ", not those of that update")
        if batch.left_out:
            yield f"{batch.left_out} more micro-batches found no room in the file"
        for i, (rank, number) in enumerate(batch.places):
            count = len(batch.parts[i]["sequences"])
            losses = f"loss {batch.losses[i]} then, {self.losses[i]} now"
            yield f"micro-batch {i} (rank {rank}, number {number}): {count} rows, {losses}"
        if not self.findings:
            yield "every number is finite in this replay: likeliest it needs the device, dtype or weights of the run"
        for number, finding in enumerate(self.findings):
            yield f"{'first: ' if number == 0 else '       '}{self._place(finding)}: {finding.words}"
        for i, row in sorted({(f.micro_batch, f.row) for f in self.findings if f.row is not None}):
            part = batch.parts[i]
            start, length = int(part["prompt_lengths"][row]), int(part["response_lengths"][row])
            ids = part["sequences"][row]
            place = f", row {int(part['row'][row])} of the rollout" if "row" in part else ""
            yield f"micro-batch {i}, row {row}{place}: {start} + {length} tokens"
            yield f"  prompt   {shortened(self._text(ids[:start]), 400)}"
            yield f"  response {shortened(self._text(ids[start : start + length]), 400)}"

    def _place(self, finding: Finding) -> str:
        row = "" if finding.row is None else f", row {finding.row}"
        role = "" if finding.role is None else f", {finding.role}"
        place = f"micro-batch {finding.micro_batch}{row}{role}"
        if finding.token is None or finding.row is None:
            return place
        part = self.batch.parts[finding.micro_batch]
        start, ids = int(part["prompt_lengths"][finding.row]), part["sequences"][finding.row]
        inside = finding.token - start
        where = f"token {inside + 1} of the response" if inside >= 0 else f"token {finding.token + 1} of the prompt"
        return f"{place}, {where} ({shortened(self._text(ids[finding.token : finding.token + 1]), 40)})"

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def inspect_batch(path: Path, *, weights: Path | None = None, trust_code: bool = False) -> Inspection:
    """Replay the kept batch at ``path``, which lies in its run folder, on one process.

    ``weights``: a folder with ``policy`` and the other trained roles in it; by default those kept with the batch, or
    else those that the run has ended with. Code of a model or of a policy loss of one's own runs only with
    ``trust_code``. Raises a subclass of RLHFError for everything the user can mend.
    """
    folder, batch = kept_folder(path), read_kept_batch(path)
    experiment = read_settings(folder.resolve().parent.parent, batch, trust_code=trust_code)
    trained = weights_folder(folder, batch, weights)
    topology = start(max_grad_norm=experiment.update.max_grad_norm, timeout_minutes=experiment.run.timeout_minutes)
    if topology.world_size > 1:
        raise TopologyError(f"rlhf inspect runs in one process, not in {topology.world_size}; start it without launch")
    name, revision = experiment.model.name, experiment.model.revision
    config = load_model_config(name, trust_remote_code=trust_code, revision=revision)
    check_parts(batch, config.get_text_config().vocab_size)
    replay = replay_of(experiment, batch, config, topology)
    replay.model.load_trained(trained)
    torch.nn.Module.to(replay.model, topology.device).train()
    tokenizer = load_tokenizer(name, trust_remote_code=trust_code, revision=revision)
    losses, findings = look_through(replay, batch)
    return Inspection(batch, losses, findings, trained, tokenizer)


# ---- what is read ----------------------------------------------------------------------------------------------------


def read_settings(run_folder: Path, batch: KeptBatch, *, trust_code: bool) -> Experiment | FineTuning:
    """The settings of the run that kept the batch. Raises ConfigError where they name code that is not trusted."""
    if not (run_folder / RUN_FILE).is_file():
        raise DataError(f"{run_folder} has no {RUN_FILE}: a kept batch is inspected where it lies, in its run folder")
    settings = {name: section for name, section in read_json(run_folder / RUN_FILE).items() if name != SECTION}
    experiment = experiment_from_dict(settings, KINDS[batch.kind])
    own_code = isinstance(experiment, Experiment) and ":" in experiment.ppo.policy_loss
    if not trust_code and (own_code or experiment.model.trust_remote_code):
        name = "ppo.policy_loss" if own_code else "model.trust_remote_code"
        raise ConfigError(f"{run_folder / RUN_FILE} names code to run ({name}); read it, then add --trust-remote-code")
    return experiment


def weights_folder(folder: Path, batch: KeptBatch, given: Path | None) -> Path:
    """Where the trained roles are. Raises DataError where there are none."""
    places = [given] if given is not None else [folder] if batch.weights else [folder.resolve().parent.parent]
    for place in places:
        roles = [role for role in place.iterdir() if role.is_dir()] if place.is_dir() else []
        if any((role / name).is_file() for role in roles for name in ("adapter_config.json", "config.json")):
            for role in roles:
                check_model_folder(str(role))
            return place
    raise DataError(
        f"{places[0]} holds no trained weights, which are kept beside small batches only, or at a run's end; name a "
        "checkpoint's folder with --weights"
    )


def check_parts(batch: KeptBatch, vocabulary: int) -> None:
    """Raise DataError where a micro-batch cannot be one: a column is missing, or tokens are none of the vocabulary."""
    own = ("advantages", "returns", "row", "token_count", "sequence_count") if batch.kind == "ppo" else ()
    for i, part in enumerate(batch.parts):
        needed = (*SEQUENCES, *(own or ("trained", "margins", "token_count", "items")))
        missing = [name for name in needed if name not in part]
        if missing:
            raise DataError(f"micro-batch {i} of the kept batch has no {missing[0]}; its file was changed")
        sequences, starts, lengths = (part[name] for name in SEQUENCES)
        sound = sequences.dim() == 2 and all(part[name].dtype == torch.int64 for name in SEQUENCES)
        sound = sound and bool(sequences.numel()) and starts.shape == lengths.shape == (len(sequences),)
        sound = sound and bool(((sequences >= 0) & (sequences < vocabulary)).all())
        if not (sound and ((starts > 0) & (lengths > 0) & (starts + lengths <= sequences.shape[1])).all()):
            raise DataError(
                f"micro-batch {i} of the kept batch has tokens or lengths that are none of this model; its file was "
                "changed, or model.name leads to another model"
            )
        if batch.kind == "ppo":
            Experience.of(part)  # checks every shape


# ---- where the first one is ------------------------------------------------------------------------------------------


def look_through(replay: Replay, batch: KeptBatch) -> tuple[list[float], list[Finding]]:
    """Each micro-batch's loss, and what is not finite, micro-batches with a bad loss first. Of each row only the first
    stage at which it shows is told."""
    losses = [replay_loss(replay, part)[0] for part in batch.parts]
    order = sorted(range(len(losses)), key=lambda i: bool(torch.tensor([batch.losses[i], losses[i]]).isfinite().all()))
    findings = list[Finding]()
    for i in order:
        part = batch.parts[i]
        rows = [of_row(replay, part, i, row) for row in range(len(part["sequences"]))]
        company = [] if any(rows) else [of_company(replay, part, i)]
        findings += [finding for finding in (*rows, *company) if finding is not None]
    return losses, findings


def of_row(replay: Replay, part: Part, i: int, row: int) -> Finding | None:
    """The first that is not finite about a row alone: a kept column, a layer's output for a role, a role's numbers, or
    what the row adds to loss and gradient."""
    found = in_columns(part, row)
    alone = {name: part[name][row : row + 1] for name in SEQUENCES}
    for role in () if found else replay.roles:
        found = found or in_pass(replay, alone, role)
    if found is None:
        loss, gradient = replay_loss(replay, replay.some_rows(part, row))
        found = None if gradient is None else (None, None, f"{gradient} (its part of the loss: {loss})")
    return None if found is None else Finding(i, row, *found)


AS_MADE = ("values", "returns", "advantages")
"""Columns that are made of those before them, and of all others."""
Where = tuple[str | None, int | None, str]
"""Role, token and words of a finding."""


def in_columns(part: Part, row: int) -> Where | None:
    """The first kept column that is not finite where the loss reads it."""
    count, start = len(part["sequences"]), int(part["prompt_lengths"][row])
    mask = part.get("response_mask", part.get("trained"))
    for name in sorted(part, key=lambda name: AS_MADE.index(name) if name in AS_MADE else -1):
        column = part[name]
        if not column.dim() or len(column) != count or not column.is_floating_point():
            continue
        broken = ~column[row].isfinite()
        if mask is not None and broken.shape == mask[row].shape:
            broken &= mask[row]  # past the response's end, and where it is not trained, the loss reads nothing
        if bool(broken.any()):
            token = start + int(broken.nonzero()[0, 0]) if column.dim() == 2 else None
            return None, token, f"the kept column {name} is not finite: it was so before the loss"
    return None


def in_pass(replay: Replay, alone: Part, role: str) -> Where | None:
    """The first layer's output, or number of ``role``, that is not finite in a forward pass of one row."""
    outputs = RoleOutputs()
    layer = find_not_finite(replay.model, lambda: outputs.update(replay.say(alone, (role,))))
    if layer is not None:
        index = layer.index  # of the layer's output, whose second number counts tokens where there are three
        of_token = len(index) >= 3 and index[0] == 0 and index[1] < alone["sequences"].shape[1]
        return role, index[1] if of_token else None, str(layer)
    for name, column in outputs.items():
        if name != "policy_entropies" and not bool(column.isfinite().all()):
            token = int(alone["prompt_lengths"][0]) + int((~column.isfinite()).nonzero()[0, 0])
            place = token if COLUMNS[name].of_tokens else None
            return role, place, f"{name} are not finite though every layer's output is"
    return None


def of_company(replay: Replay, part: Part, i: int) -> Finding | None:
    """What is not finite about a micro-batch of whose rows alone everything is."""
    loss, gradient = replay_loss(replay, part)
    if gradient is None:
        return None
    layer = find_not_finite(replay.model, lambda: replay.loss(part))
    return Finding(i, None, None, None, f"{layer or gradient} (loss {loss}), though no row alone shows it")


def replay_loss(replay: Replay, part: Part) -> tuple[float, str | None]:
    """The loss of a micro-batch, and in words what of loss and gradient is not finite."""
    replay.model.zero_grad()
    loss = replay.loss(part)
    loss.backward()
    value = loss.item()
    gradients = [(name, p.grad) for name, p in replay.model.named_parameters() if p.grad is not None]
    spoiled = [name for name, gradient in gradients if not bool(gradient.isfinite().all())]
    replay.model.zero_grad()
    if spoiled:  # backward goes from the last layer to the first
        return value, f"the gradient of {spoiled[-1]} is the first that is not finite, one of {len(spoiled)}"
    if not bool(torch.nn.utils.get_total_norm([gradient for _, gradient in gradients]).isfinite()):
        largest, name = max((gradient.abs().max().item(), name) for name, gradient in gradients)
        return value, f"the gradient's norm is beyond float32: its largest element, {largest:.3g}, is of {name}"
    return value, None if bool(loss.detach().isfinite()) else "the loss is not finite though its gradient is"
