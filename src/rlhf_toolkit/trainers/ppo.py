"""PPOTrainer: PPO inside Trainer's own loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_toolkit.algorithms.aggregation import aggregate
from rlhf_toolkit.algorithms.kl import approximate_kl
from rlhf_toolkit.algorithms.masking import masked_sum
from rlhf_toolkit.data.layout import stack_rows, unpack
from rlhf_toolkit.distributed.collectives import all_gather, world_size
from rlhf_toolkit.distributed.engine import backward
from rlhf_toolkit.errors import located
from rlhf_toolkit.models.shared_base import POLICY, REFERENCE, VALUE, SharedBase
from rlhf_toolkit.reporting.meters import peak_memory_gib
from rlhf_toolkit.reporting.metrics import reference_kl, spread
from rlhf_toolkit.rollout.collect import Collector
from rlhf_toolkit.rollout.evaluated import Passing
from rlhf_toolkit.rollout.loader import MiniBatch, OverMiniBatch, RolloutLoader
from rlhf_toolkit.rollout.passes import score
from rlhf_toolkit.rollout.path_checks import PathChecks
from rlhf_toolkit.rollout.sampled import Sample, Sampled, as_samples
from rlhf_toolkit.rollout.schedule import in_turn, rollout_rows
from rlhf_toolkit.trainers.base import GRADIENT_NORM, LOSS, RoleTrainer
from rlhf_toolkit.trainers.ppo_loss import PPOLoss, Said
from rlhf_toolkit.types import Experience, Prompt, PromptBatch, present


class PPOTrainer(RoleTrainer):
    """Trains policy and value of a SharedBase by PPO on prompts and a reward.

    A training step is one mini-batch and one optimizer step, cut into micro-batches by a token budget. Data comes from
    a ``RolloutLoader``; the loop, callbacks, scheduler, checkpoints and resume are Trainer's.

    Args:
        collector: makes experience; it is told here which model to use.
        loss: knobs of the loss.
        schedule: (num_rollouts, num_ppo_epochs, mini_batches).
        held_out: prompts for ``evaluate``.
    """

    model: SharedBase

    def __init__(
        self,
        *args: Any,
        collector: Collector,
        loss: PPOLoss,
        schedule: tuple[int, int, int],
        over_mini_batch: OverMiniBatch = OverMiniBatch(),  # noqa: B008  frozen
        held_out: Sequence[Prompt] = (),
        evaluation_samples: int = 0,
        passing: Passing | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, train_dataset=list(collector.prompts), eval_dataset=list(held_out) or None, **kwargs)
        self.collector, self.loss, self.schedule, self.held_out = collector, loss, schedule, held_out
        self.evaluation_samples: list[Sample] = []
        self._unscored: list[dict[str, Tensor]] = []
        self._kl_sums, self._stopped, self._left_out = torch.zeros(2), False, False
        self.over_mini_batch, self.evaluation_samples_per_prompt = over_mini_batch, evaluation_samples
        self.passing = passing
        collector.model = lambda: self.model_wrapped

    def get_train_dataloader(self) -> RolloutLoader:  # type: ignore[override]
        """The loader that collects rollouts; it is not prepared by accelerate, on purpose."""
        num_rollouts, num_ppo_epochs, mini_batches = self.schedule
        return RolloutLoader(
            self.collector,
            num_rollouts=num_rollouts,
            num_ppo_epochs=num_ppo_epochs,
            mini_batches=mini_batches,
            steps_done=lambda: self.state.global_step,
            over_mini_batch=self.over_mini_batch,
        )

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[MiniBatch], None]:
        """The next mini-batch. It carries its own global counts, so Trainer need not count items."""
        mini_batch = next(epoch_iterator, None)
        return ([] if mini_batch is None else [mini_batch]), None

    def training_step(self, model: nn.Module, inputs: MiniBatch, num_items_in_batch: object = None) -> Tensor:
        """Forward and backward of every micro-batch; returns the mini-batch's loss as this rank's share times the
        ranks.

        Where ``kl_stop`` has ended the rollout's updates, nothing runs: without a gradient Trainer's own step of the
        optimizer moves nothing, and under DeepSpeed there is none. The schedule is Trainer's in both cases and goes on.
        """
        model.train()
        self._left_out = self._stopped and not bool(inputs["fresh"])
        if self.loss.kl_stop is not None:
            self.meter.add("actor/skipped_updates", float(self._left_out), 1)
        if self._left_out:
            return torch.zeros((), device=self.args.device)
        micro = cut(inputs)  # on the CPU: choosing rows by a mask would wait for a GPU, column after column
        total = torch.zeros((), device=self.args.device)
        with self.collector.clock.phase("update_actor"):
            for number, part in enumerate(micro):
                loss = self.compute_loss(model, part, first=number == 0)
                backward(model, loss, last=number == len(micro) - 1)
                total += loss.detach()
        if self._unscored:
            self._record_unscored()
        self._decide_whether_to_go_on()
        self._meter_rates()
        self._meter_shares({LOSS: total}, first=True)
        return total * world_size()

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: MiniBatch,
        return_outputs: bool = False,
        num_items_in_batch: object = None,
        first: bool = False,
    ) -> Tensor:
        """This micro-batch's share of the mini-batch's loss:

        policy loss + value_coef value loss - entropy_coef entropy + kl_coef KL (when it is in the loss)

        each aggregated with the counts of the whole mini-batch over all ranks. During value warm-up the policy's part
        is multiplied by 0: it keeps its place in the graph, so that ZeRO-3 sees a gradient, and moves nothing.

        Where the role pass left the policy out, this is the rollout's only update, and its own log-probs, detached,
        are the old ones. Where it left the value out too, rewards and advantages are made here, before the backward.
        """
        batch = Experience.of(self._prepare_input(inputs))
        said = self._passes(model, Experience.of(inputs), batch.response_lengths)
        incomplete = batch.advantages is None
        if incomplete:
            batch = self._completed(inputs["row"], said)
        check = first and bool(inputs["fresh"]) and not incomplete
        old_logprobs = self._old_logprobs(batch, said, check=check)
        terms = self.loss.terms(
            batch,
            said,
            old_logprobs,
            selected=self._prepare_input(inputs.get("selected")),
            reduce=self._reduction(inputs, batch),
            kl_coef=self.collector.kl_control.coefficient,
            policy_weight=0.0 if self._warming_up() else 1.0,
        )
        self._meter_shares(terms.shares, first)
        self._meter_tokens(batch.response_mask, terms.of_tokens)
        self._watch_kl(said.logprobs, old_logprobs, batch.response_mask)
        return terms.loss

    def _reduction(self, inputs: MiniBatch, batch: Experience) -> Callable[[Tensor], Tensor]:
        """From a loss per token (n, R) to this micro-batch's share of the whole mini-batch's."""
        return partial(
            aggregate,
            mask=batch.response_mask,
            mode=self.loss.loss_aggregation,
            width=self.loss.width,
            tokens=int(inputs["token_count"]),
            sequences=int(inputs["sequence_count"]),
        )

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Sequence[Prompt] | None = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy responses to the held-out prompts: score, KL to the reference, length and the share that was cut off;
        and the score of sampled ones where the experiment asks for them. Scores are of the responses that have one."""
        prompts = list(eval_dataset or self.held_out)
        rows = PromptBatch(tuple(prompts), samples=(0,) * len(prompts))
        greedy = replace(self.collector.sampling, greedy=True)
        clock, sampler = self.collector.clock, self.collector.sampler
        with located("evaluation"), clock.phase("testing"), sampler.opened(self.model_wrapped) as shared:
            sampled = self.collector.sample(shared, rows, in_turn(len(rows)), greedy, stream=())
            plan, layout = self.collector.evaluation_plan(sampled), self.collector.cutting.layout
            passes = score(shared, sampled, plan, layout, greedy.temperature, roles=(POLICY, REFERENCE))
            at_random = self._sampled(shared, prompts)
        scores = self.collector.evaluation_scores(sampled)
        self.evaluation_samples = as_samples(sampled, scores)
        kl = reference_kl(present(passes.old_logprobs), present(passes.ref_logprobs), sampled.token_mask)
        metrics = {
            **spread(f"{metric_key_prefix}/score", scores[sampled.kept]),
            f"{metric_key_prefix}/ref_kl": kl["actor/ref_kl"],
            f"{metric_key_prefix}/response_length": sampled.response_lengths.float().mean().item(),
            f"{metric_key_prefix}/clip_ratio": (~sampled.finished).float().mean().item(),
            **({} if at_random is None else self._sampled_metrics(at_random, metric_key_prefix)),
        }
        self.log(dict(metrics))
        # Callbacks hear of it, and Trainer learns that this step's evaluation has been done.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sampled(self, shared: SharedBase, prompts: list[Prompt]) -> Sampled | None:
        """Responses sampled as in training, from the same random numbers in every evaluation."""
        if not self.evaluation_samples_per_prompt:
            return None
        collector, rows = self.collector, rollout_rows(prompts, self.evaluation_samples_per_prompt)
        stream = (collector.seed, "evaluation")
        return collector.sample(shared, rows, in_turn(len(rows)), collector.sampling, stream=stream)

    def _sampled_metrics(self, sampled: Sampled, prefix: str) -> dict[str, float]:
        """The spread of their scores, and pass@k and maj@k where the experiment says what passes."""
        scores = self.collector.evaluation_scores(sampled)
        passing = {} if self.passing is None else self.passing.values(sampled, scores)
        means = {f"{prefix}/{name}": sum(values) / len(values) for name, values in passing.items()}
        return {**spread(f"{prefix}/sampled_score", scores[sampled.kept]), **means}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Give Trainer's gradient norm its place among ours and add what the rollout and its phases measured.

        The loss is metered, over the updates that were made: Trainer's mean counts those left out as 0. Of these
        DeepSpeed's engine would repeat the last norm.
        """
        if "loss" in logs:
            logs = {
                GRADIENT_NORM: 0.0 if self._left_out else float(logs.get("grad_norm", 0.0)),
                **self._rollout_record(),
            }
        super().log(logs, start_time)

    def _rollout_record(self) -> dict[str, float]:
        metrics, seconds = self.collector.metrics, self.collector.clock.take()
        tokens = metrics["perf/total_num_tokens"]
        return {
            **metrics,
            **{f"timing_s/{phase}": time for phase, time in seconds.items()},
            "perf/throughput": tokens / seconds["step"] / world_size(),
            "perf/max_memory_allocated_gb": peak_memory_gib(self.args.device),
        }

    def _completed(self, rows: Tensor, said: Said) -> Experience:
        """This rank's ``rows`` of the rollout, once all ranks' passes have become rewards and advantages."""
        rows = rows.cpu()
        whole = self.collector.complete(rows.tolist(), **said.as_passes())
        return Experience.of({name: column.to(self.args.device) for name, column in whole.rows(rows).items()})

    def _old_logprobs(self, batch: Experience, said: Said, *, check: bool) -> Tensor:
        """Those that the role pass gave, with ``check`` compared to the ones now; else the ones now, detached."""
        if batch.old_logprobs is None:
            self._keep_unscored(said.logprobs.detach(), said.entropies.detach(), batch)
            return said.logprobs.detach()
        if check and self.collector.checks is not None:
            self._check_first_ratio(self.collector.checks, said.logprobs, batch.old_logprobs, batch.response_mask)
        return batch.old_logprobs

    def _check_first_ratio(self, checks: PathChecks, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> None:
        """No update has happened since the rollout, so the ratio must be 1. All ranks come here with their first
        micro-batch, judge the same numbers, and raise together."""
        pairs = all_gather(torch.stack([logprobs.detach()[mask], old_logprobs[mask]]).cpu())
        rollout = self.state.global_step // (self.schedule[1] * self.schedule[2])
        now, before = torch.cat(pairs, 1)
        found = checks.check_first_ratio(now, before, rollout)
        self.meter.add("actor/first_ratio_deviation", found.largest, 1)
        self.meter.add("actor/first_ratio_mean_deviation", found.mean, 1)

    def _keep_unscored(self, logprobs: Tensor, entropies: Tensor, batch: Experience) -> None:
        """Keep what this micro-batch's pass says about a rollout that the role pass did not ask the policy about."""
        kept = {
            "old_logprobs": logprobs,
            "entropies": entropies,
            "ref_logprobs": batch.ref_logprobs,
            "rollout_logprobs": batch.rollout_logprobs,
            "token_mask": batch.token_mask,
            "trained": batch.response_mask,
        }
        self._unscored.append({name: column.cpu() for name, column in kept.items() if column is not None})

    def _record_unscored(self) -> None:
        """Put the micro-batches of all ranks together, which is the whole rollout, and have its metrics recorded."""
        parts = [part for share in all_gather(self._unscored) for part in share]
        self._unscored = []
        whole = {name: stack_rows([part[name] for part in parts], fill=0) for name in parts[0]}
        self.collector.record_policy(**whole)

    def _passes(self, model: nn.Module, batch: Experience, lengths: Tensor) -> Said:
        """What policy and, where it is trained, value say about the response tokens, in one forward.

        ``batch`` lies on the CPU, where its layout is worked out: that reads tokens and lengths. ``lengths`` are those
        of the responses, on the device.
        """
        layout = self.collector.cutting.layout(batch.sequences, batch.prompt_lengths, batch.response_lengths)
        out = model(
            layout.to(self.args.device),
            roles=(POLICY, VALUE) if self.collector.needs.value else (POLICY,),
            temperature=self.loss.temperature,
            entropy_gradient=self.loss.entropy_coef != 0,
        )
        width = batch.response_mask.shape[1]
        names = ("policy_logprobs", "policy_entropies", "values")
        columns = [unpack(out[name], lengths, width) for name in names if name in out]
        return Said(*columns, **{name: out[name] for name in ("final_values",) if name in out})

    def _watch_kl(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> None:
        """Add up a micro-batch's KL of the policy at the rollout to the policy now, and its tokens."""
        if self.loss.kl_stop is not None:
            kl = approximate_kl(logprobs, old_logprobs, mask, count=1).k3
            self._kl_sums = self._kl_sums.to(kl.device) + torch.stack([kl.detach(), mask.sum()])

    def _decide_whether_to_go_on(self) -> None:
        """Once the KL of a mini-batch, over all ranks, is above ``kl_stop``, the rollout's other updates are left out.

        All ranks decide from the same sum, before any of them begins the next forward pass.
        """
        if self.loss.kl_stop is not None:
            total, tokens = torch.stack(all_gather(self._kl_sums.cpu())).sum(0).tolist()
            self._kl_sums = torch.zeros_like(self._kl_sums)
            self._stopped = total / max(tokens, 1) > self.loss.kl_stop

    def _warming_up(self) -> bool:
        _, epochs, mini_batches = self.schedule
        return self.state.global_step < self.loss.value_warmup_rollouts * epochs * mini_batches

    def _meter_shares(self, shares: dict[str, Tensor], first: bool) -> None:
        """Shares add up to one value for each mini-batch, which each rank counts once for all."""
        for name, share in shares.items():
            self.meter.add(name, share, 1 / world_size() if first else 0.0)

    def _meter_tokens(self, mask: Tensor, quantities: dict[str, Tensor]) -> None:
        tokens = mask.sum()
        for name, quantity in quantities.items():
            self.meter.add(name, masked_sum(quantity.float(), mask), tokens)

    def _meter_rates(self) -> None:
        names = {"policy": "actor/lr", "value": "critic/lr", "value_head": "critic/head_lr"}
        for name, group in zip(self.model.parameter_groups(), self.create_optimizer().param_groups, strict=True):
            self.meter.add(names[name], group["lr"], 1)


COLUMNS = (*(field.name for field in fields(Experience)), "row", "selected")
COUNTS = ("token_count", "sequence_count", "fresh")


def cut(mini_batch: MiniBatch) -> list[MiniBatch]:
    """A mini-batch's micro-batches; the counts of the whole go with every one."""
    number = mini_batch["micro_batch"]
    parts = []
    columns = [name for name in COLUMNS if name in mini_batch]
    for i in range(int(number.max()) + 1):
        part = {name: mini_batch[name][number == i] for name in columns}
        parts.append({**part, **{name: mini_batch[name] for name in COUNTS}})
    return parts
