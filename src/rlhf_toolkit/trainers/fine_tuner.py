"""FineTuner: SFT, reward models and DPO inside Trainer's own loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rlhf_toolkit.data.items import Batch, Cut, Item, ItemLoader, batch_of, counts_of
from rlhf_toolkit.data.layout import Layout
from rlhf_toolkit.distributed.attempt import together
from rlhf_toolkit.distributed.collectives import agreement, all_gather, largest, rank, world_size
from rlhf_toolkit.distributed.zero3 import gathered, whole
from rlhf_toolkit.errors import OutOfMemoryError
from rlhf_toolkit.models.heads import ScalarHead
from rlhf_toolkit.models.inference import inference
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.roles import REWARD
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.models.whole_model import WholeModel
from rlhf_toolkit.reporting.meters import Meter, combined, peak_memory_gib
from rlhf_toolkit.trainers.base import RoleTrainer
from rlhf_toolkit.trainers.left_out import GRADIENT_NORM
from rlhf_toolkit.trainers.objectives import Objective
from rlhf_toolkit.trainers.optimizers import rates_of

T = TypeVar("T")


class FineTuner(RoleTrainer):
    """Trains the roles of an ``objective`` on items (examples or pairs).

    A training step is one mini-batch of ``cut.batch_size`` items over all ranks and one optimizer step, cut into
    micro-batches by a token budget. Losses are divided by the counts of the whole mini-batch, so the cut, packing and
    the number of ranks change nothing.
    """

    objective: Objective

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        items: Sequence[Item],
        held_out: Sequence[Item] = (),
        cut: Cut,
        layout: Layout,
        steps: int,
        pad_id: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args, train_dataset=list(items), eval_dataset=list(held_out) or None, kind=objective.prefix, **kwargs
        )
        self._left_out = False
        self.objective, self.items, self.held_out = objective, items, held_out
        self.cut, self.layout, self.steps, self.pad_id = cut, layout, steps, pad_id

    def get_train_dataloader(self) -> ItemLoader:  # type: ignore[override]
        """The loader of mini-batches; it is not prepared by accelerate, on purpose."""
        self._loader = ItemLoader(
            self.items,
            self.cut,
            steps=self.steps,
            seed=self.args.seed,
            rank=rank(),
            pad_id=self.pad_id,
            steps_done=lambda: self.state.global_step,
        )
        return self._loader

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, list[Batch]]], None]:
        """The next mini-batch. It carries its own global counts, so Trainer need not count items."""
        parts = self.next_batch(epoch_iterator)
        return ([] if parts is None else [{"parts": parts}]), None

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, list[Batch]], num_items_in_batch: object = None
    ) -> Tensor:
        """Forward and backward of every micro-batch; returns the mini-batch's loss as this rank's share times the
        ranks."""
        model.train()
        total = self._update(model, inputs["parts"])
        self._left_out = total is None
        for name, rate in rates_of(self.create_optimizer()).items():
            self.meter.add(f"{self.objective.prefix}/lr/{name}", rate, 1)
        return torch.zeros((), device=self.args.device) if total is None else total * world_size()

    def _update(self, model: nn.Module, parts: list[Batch]) -> Tensor | None:
        """``make_update`` of the micro-batches. Where memory runs out on a rank, all try again with smaller ones, as
        long as one holds several items."""
        while True:
            try:
                return self.make_update(model, parts, lambda part, first: self.compute_loss(model, part), self._least)
            except OutOfMemoryError as error:
                if largest(max(len(part["margins"]) for part in parts)) <= 1:
                    raise
                said = str(error)
            before = len(parts)
            while len(parts) == before:
                self.cut = self._loader.cut = self.cut.halved()
                parts = self._loader.parts(self.state.global_step)
            self.note_retry(f"micro-batches of at most {self.cut.tokens} tokens a role", said)

    def _least(self, part: Batch) -> Batch:
        """As little as a micro-batch can hold: what a rank runs that has run out of memory, as the others' partner."""
        return batch_of([], {name: int(part[name]) for name in ("token_count", "items")}, pad_id=self.pad_id)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: object = None
    ) -> Tensor:
        """This micro-batch's share of the mini-batch's loss."""
        return self._terms(model, inputs, self.objective.prefix, self.meter)

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Sequence[Item] | None = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The objective's metrics on held-out items."""
        began = time.perf_counter()
        metrics = self.measured(list(eval_dataset or self.held_out), metric_key_prefix)
        self.log({**metrics, "timing_s/testing": time.perf_counter() - began})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measured(self, items: Sequence[Item], prefix: str) -> dict[str, float]:
        """The objective's metrics over ``items``, the same on every rank. A collective."""
        counts = counts_of(items)

        def measure(mine: list[list[int]]) -> Meter:
            meter = Meter()
            with self._reading() as model:
                for part in mine:
                    batch = batch_of([items[i] for i in part], counts, pad_id=self.pad_id)
                    run, idle = (
                        partial(self._terms, model, each, prefix, meter) for each in (batch, self._least(batch))
                    )
                    if isinstance(self.model, WholeModel):
                        together(self.model_wrapped, run, idle, "the evaluation")
                    else:
                        run()
            return meter

        return combined(all_gather(self._read(items, measure).take()))

    def _read(self, items: Sequence[Item], run: Callable[[list[list[int]]], T]) -> T:
        """``run`` of this rank's micro-batches of ``items``, without gradients. Where memory runs out on a rank, all
        try again with smaller ones, as long as one holds several items. A collective."""
        while True:
            everyone = self.cut.among_ranks(range(len(items)), items)
            try:
                return run(everyone[rank()])
            except OutOfMemoryError as error:
                if max(len(part) for share in everyone for part in share) <= 1:
                    raise
                said = str(error)
            while self.cut.among_ranks(range(len(items)), items) == everyone:
                self.cut = self.cut.halved()
            self.note_retry(f"micro-batches of at most {self.cut.tokens} tokens a role", said, what="an evaluation")

    def normalise_rewards(self) -> tuple[float, float]:
        """Scale and shift the reward head so that the scores of all training responses have mean 0 and variance 1;
        return the mean and the deviation they had. Scores that are all alike are only shifted. A collective."""
        counts = counts_of(self.items)

        def score(mine: list[list[int]]) -> list[float]:
            scores: list[float] = []
            with gathered(self.model_wrapped), inference(self.model_wrapped) as shared, agreement("the last pass"):
                for part in mine:
                    batch = batch_of([self.items[i] for i in part], counts, pad_id=self.pad_id)
                    found = self._forward(shared, batch, (REWARD,)).reward_scores
                    scores += found[: 2 * len(part)].tolist()
            return scores

        scores = all_gather(self._read(self.items, score))
        everything = torch.tensor([score for share in scores for score in share], dtype=torch.float64)
        mean, deviation = everything.mean().item(), everything.std().item()
        head = cast(ScalarHead, cast(SharedBase, self.model).scalar_heads[REWARD])
        with whole(head.parameters(), write=True), torch.no_grad():
            scale = deviation if deviation > 0 else 1.0
            head.weight.div_(scale)
            head.bias.sub_(mean).div_(scale)
        return mean, deviation

    @contextmanager
    def _reading(self) -> Iterator[nn.Module]:
        """The model for forward passes without autograd. A frozen base is gathered once for all of them. A model that
        is trained as a whole stays sharded, as in training: its float32 weights may not fit on one device, and ranks
        run equally many passes."""
        whole_model = isinstance(self.model, WholeModel)
        window = nullcontext() if whole_model else gathered(self.model_wrapped)
        agreeing = nullcontext() if whole_model else agreement("the evaluation")
        with window, inference(self.model_wrapped) as bare, agreeing:
            yield self.model_wrapped if whole_model else bare

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Give Trainer's own numbers their place among ours."""
        if "loss" in logs:
            logs = {
                GRADIENT_NORM: 0.0 if self._left_out else float(logs.get("grad_norm", 0.0)),
                **self.not_finite.take(),
                "perf/max_memory_allocated_gb": peak_memory_gib(self.args.device),
            }
        super().log(logs, start_time)

    def _terms(self, model: nn.Module, batch: Batch, prefix: str, meter: Meter) -> Tensor:
        outputs = self._forward(model, batch, self.objective.roles)
        terms = self.objective.terms(outputs, self._prepare_input(batch))
        for name, (total, count) in terms.metrics.items():
            meter.add(f"{prefix}/{name}", total, count)
        return terms.loss

    def _forward(self, model: nn.Module, batch: Batch, roles: Sequence[str]) -> RoleOutputs:
        """``batch`` lies on the CPU, where its layout is worked out: that reads tokens and lengths."""
        layout = self.layout(batch["sequences"], batch["prompt_lengths"], batch["response_lengths"])
        found: RoleOutputs = model(layout.to(self.args.device), roles=roles)
        return found
