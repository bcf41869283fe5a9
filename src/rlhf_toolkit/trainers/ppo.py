"""PPOTrainer: PPO inside Trainer's own loop. The algorithm in the order in which it runs, and where each step stands:

    for each rollout                                   RolloutLoader.__iter__, Trainer's train dataloader
     1. choose prompts, sample, score                  ExperienceMaker.collect            rollout/experience.py
     2. role pass: old log-probs, values, reference    run_role_pass                      rollout/role_pass.py
     3. rewards with the KL, advantages, returns       Shaping                            rollout/shaping.py
     for each epoch, for each mini-batch               PPOTrainer.get_batch_samples
      4. one optimizer step                            PPOTrainer.training_step
        for each micro-batch
         5. forward of policy and value                PPOTrainer.role_outputs
         6. the experience it belongs to               PPOTrainer.experience_of (deferred: rollout/deferred.py)
         7. is the first ratio 1?                      PPOTrainer.old_logprobs            rollout/path_checks.py
         8. ratio, clip, value loss, entropy, KL       PPOLoss.terms                      trainers/ppo_loss.py
         9. backward; DeepSpeed's last clips and steps backward                           distributed/engine.py
      10. KL above kl_stop? leave the rest out         PPOTrainer.decide_whether_to_go_on
      11. without DeepSpeed: clip, step; schedule      Trainer
      12. metrics                                      PPOTrainer.log

What each step computes: docs/ppo_details.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_toolkit.algorithms.kl import approximate_kl
from rlhf_toolkit.algorithms.masking import masked_sum
from rlhf_toolkit.distributed.attempt import together
from rlhf_toolkit.distributed.collectives import all_gather, largest, rank, world_size
from rlhf_toolkit.errors import OutOfMemoryError, located
from rlhf_toolkit.models.role_outputs import RoleOutputs
from rlhf_toolkit.models.shared_base import SharedBase
from rlhf_toolkit.reporting.meters import peak_memory_gib
from rlhf_toolkit.rollout.dealing import LastMeans
from rlhf_toolkit.rollout.deferred import UpdatePolicyRecord
from rlhf_toolkit.rollout.evaluated import HeldOut, greedy_metrics, held_out_responses, sampled_metrics
from rlhf_toolkit.rollout.experience import Collected, ExperienceMaker
from rlhf_toolkit.rollout.loader import MiniBatch, OverMiniBatch, RolloutLoader, Schedule
from rlhf_toolkit.rollout.sampled import Sample, as_samples
from rlhf_toolkit.trainers.base import RoleTrainer
from rlhf_toolkit.trainers.kept_batches import Part
from rlhf_toolkit.trainers.left_out import GRADIENT_NORM
from rlhf_toolkit.trainers.micro_batches import cut, least
from rlhf_toolkit.trainers.optimizers import rates_of
from rlhf_toolkit.trainers.ppo_loss import LossTerms, PPOLoss
from rlhf_toolkit.types import Experience, Prompt

ROLLOUT_RETRIES = "perf/rollout_retries"


class PPOTrainer(RoleTrainer):
    """Trains policy and value of a SharedBase by PPO on prompts and a reward.

    A training step is one mini-batch and one optimizer step, cut into micro-batches by a token budget. Data comes from
    a ``RolloutLoader``; the loop, callbacks, scheduler, checkpoints and resume are Trainer's.

    Args:
        maker: makes experience.
        loss: the loss and its knobs.
        schedule: rollouts, epochs and mini-batches.
        over_mini_batch: what is done over all rows of a mini-batch.
        held_out: for ``evaluate``.
    """

    model: SharedBase

    def __init__(
        self,
        *args: Any,
        maker: ExperienceMaker,
        loss: PPOLoss,
        schedule: Schedule,
        over_mini_batch: OverMiniBatch = OverMiniBatch(),  # noqa: B008  frozen
        held_out: HeldOut = HeldOut(),  # noqa: B008  frozen
        **kwargs: Any,
    ) -> None:
        prompts = list(maker.source.prompts)
        super().__init__(
            *args, train_dataset=prompts, eval_dataset=list(held_out.prompts) or None, kind="ppo", **kwargs
        )
        self.maker, self.loss, self.schedule, self.held_out = maker, loss, schedule, held_out
        self.rollouts = RolloutLoader(
            maker,
            schedule,
            model=lambda: self.model_wrapped,
            steps_done=lambda: self.state.global_step,
            over_mini_batch=over_mini_batch,
        )
        self.evaluated_samples: list[Sample] = []
        self._policy_record = UpdatePolicyRecord()
        self._kl_sums, self._stopped, self._left_out = torch.zeros(2), False, False
        self._completed: Experience | None = None

    def get_train_dataloader(self) -> RolloutLoader:  # type: ignore[override]
        """The loader that collects rollouts; it is not prepared by accelerate, on purpose."""
        return self.rollouts

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[MiniBatch], None]:
        """The next mini-batch. It carries its own global counts, so Trainer need not count items."""
        mini_batch = self.next_batch(epoch_iterator)
        return ([] if mini_batch is None else [mini_batch]), None

    def progress(self) -> dict[str, Any]:
        """The KL's coefficient, what is expected of prompts, and the rollout that the next update is made on."""
        maker, current = self.maker, self.rollouts.under_way(self.state.global_step)
        return {
            "kl_coefficient": maker.kl_control.coefficient,
            "expected_lengths": dict(maker.scored_sampler.expected.state),
            "mean_scores": dict(maker.source.mean_scores.state),
            "stopped": self._stopped,
            "rollout": None if current is None else {"metrics": dict(current.metrics), "samples": current.samples},
        }

    def experience(self) -> dict[str, Tensor]:
        """The columns of the rollout that the next update is made on; none before it is there."""
        current = self.rollouts.under_way(self.state.global_step)
        return {} if current is None else current.experience.columns()

    def restore_progress(self, progress: dict[str, Any], experience: dict[str, Tensor]) -> None:
        """Also the rollout, where the checkpoint has one: it is not sampled again."""
        maker = self.maker
        maker.kl_control.coefficient = float(progress["kl_coefficient"])
        maker.scored_sampler.expected = LastMeans(progress["expected_lengths"])
        maker.source.mean_scores = LastMeans(progress["mean_scores"])
        self._stopped = bool(progress["stopped"])
        if progress["rollout"] is not None:
            collected = Collected(Experience.of(experience), **progress["rollout"])
            self.rollouts.go_on_with(collected, self.schedule.rollout_of(self.state.global_step))

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
        nothing = torch.zeros((), device=self.args.device)
        if self._left_out:
            return nothing
        with self.maker.scored_sampler.clock.phase("update_actor"):
            total = self._update(model, inputs)
        self._completed, self._left_out = None, total is None
        if self._policy_record:
            self.rollouts.newest.metrics |= self.maker.policy_metrics(**self._policy_record.take())
        if self._left_out:
            self._kl_sums, self._stopped = torch.zeros(2), False  # it says nothing about the KL
        else:
            self.decide_whether_to_go_on()
        names = {"policy": "actor/lr", "value": "critic/lr", "value_head": "critic/head_lr"}
        for name, rate in rates_of(self.create_optimizer()).items():
            self.meter.add(names[name], rate, 1)
        return nothing if total is None else total * world_size()

    def _update(self, model: nn.Module, inputs: MiniBatch) -> Tensor | None:
        """``make_update`` of the mini-batch. Where memory runs out on a rank, all try again with smaller micro-batches,
        as long as one holds several rows."""
        kl_sums, scored_sampler = self._kl_sums, self.maker.scored_sampler
        if self.update_retries:
            inputs = self._cut_again(inputs)  # it may have been cut before the budget was halved
        while True:
            try:
                return self._attempt(model, inputs)
            except OutOfMemoryError as error:
                if largest(int(inputs["micro_batch"].bincount().max())) == 1:
                    raise
                said = str(error)
            self._kl_sums, self._policy_record = kl_sums, UpdatePolicyRecord()
            before = int(inputs["micro_batch"].max())
            while int(inputs["micro_batch"].max()) == before:  # the largest budget that cuts it into more parts
                scored_sampler.cutting = scored_sampler.cutting.halved()
                inputs = self._cut_again(inputs)
            self.note_retry(f"micro-batches of at most {scored_sampler.cutting.role_tokens} tokens a role", said)

    def _attempt(self, model: nn.Module, inputs: MiniBatch) -> Tensor | None:
        deferred = self.rollouts.newest.deferred
        micro = cut(inputs)  # on the CPU: choosing rows by a mask would wait for a GPU, column after column
        if deferred is not None and (len(micro) > 1 or deferred.whole is not None):
            inputs = self._experience_before_update(model, inputs, micro)
            micro = cut(inputs)
        return self.make_update(
            model, micro, lambda part, first: self.micro_batch_loss(model, part, first=first), least
        )

    def _cut_again(self, inputs: MiniBatch) -> MiniBatch:
        """The mini-batch in the micro-batches of the present budget. A collective. Every rank keeps its rows: how they
        are dealt does not depend on the budget."""
        everyone = [row for rows in all_gather(inputs["row"].tolist()) for row in rows]
        cutting = self.maker.scored_sampler.cutting
        mine = cutting.among_ranks(everyone, self.rollouts.newest.tokens)[rank()]
        number = {row: i for i, rows in enumerate(mine) for row in rows}
        return {**inputs, "micro_batch": torch.tensor([number[row] for row in inputs["row"].tolist()])}

    def _experience_before_update(self, model: nn.Module, inputs: MiniBatch, micro: Sequence[MiniBatch]) -> MiniBatch:
        """The mini-batch with the experience that its one forward pass was to complete, and cannot. A collective."""
        collected = self.rollouts.newest
        deferred, said = collected.deferred, list[RoleOutputs]()
        assert deferred is not None
        if deferred.whole is None:
            for part in micro:

                def passed(part: MiniBatch = part) -> RoleOutputs:
                    with torch.no_grad():
                        return self.role_outputs(model, part)

                said.append(together(model, passed, lambda part=part: passed(least(part)), "the role pass"))  # type: ignore[misc]
            rows = [row for part in micro for row in part["row"].tolist()]
            deferred.complete(rows, RoleOutputs({name: torch.cat([each[name] for each in said]) for name in said[0]}))
        assert deferred.whole is not None
        collected.tokens, collected.deferred = deferred.whole, None
        return {**inputs, **deferred.whole.rows(inputs["row"])}

    def micro_batch_loss(self, model: nn.Module, part: MiniBatch, *, first: bool = False) -> Tensor:
        """A micro-batch's share of the mini-batch's loss; what it says about itself is metered. ``first``: the first of
        its mini-batch. Ranks run equally many, and may exchange numbers between the forward pass and the loss."""
        outputs = self.role_outputs(model, part)
        batch = self.experience_of(part, outputs)
        old_logprobs = self.old_logprobs(batch, outputs, check=first and bool(part["fresh"]))
        terms = self.loss_terms(part, batch, outputs, old_logprobs)
        for name, share in terms.shares.items():  # they add up to one value for each mini-batch, counted once for all
            self.meter.add(name, share, 1 / world_size() if first else 0.0)
        tokens = batch.response_mask.sum()
        for name, quantity in terms.of_tokens.items():
            self.meter.add(name, masked_sum(quantity.float(), batch.response_mask), tokens)
        self._watch_kl(outputs.policy_logprobs, old_logprobs, batch.response_mask)
        return terms.loss

    def role_outputs(self, model: nn.Module, part: MiniBatch) -> RoleOutputs:
        """What policy and, where it is trained, value say about a micro-batch, in one forward, laid out in rows (n, R).
        ``part`` lies on the CPU."""
        layout = self.maker.scored_sampler.cutting.layout
        return self.loss.outputs(model, part, layout, value=self.maker.needs.value, device=self.args.device)

    def experience_of(self, part: MiniBatch, outputs: RoleOutputs) -> Experience:
        """A micro-batch's rows of the rollout's experience, on the device. Where that is deferred, this forward pass
        completes it, which is a collective."""
        deferred = self.rollouts.newest.deferred
        if deferred is None:
            return Experience.of(self._prepare_input(Experience.of(part).columns()))
        self._completed = deferred.whole or deferred.complete(part["row"].tolist(), outputs)
        return Experience.of(self._prepare_input(self._completed.rows(part["row"])))

    def kept_parts(self, parts: Sequence[Mapping[str, Tensor]]) -> list[Part]:
        """The micro-batches; where the experience was deferred, with the columns that completed it."""
        whole = self._completed
        return [{**part, **({} if whole is None else whole.rows(part["row"]))} for part in parts]

    def kept_details(self) -> dict[str, float]:
        """The rollout, and the coefficients of this update."""
        return {
            "rollout": self.schedule.rollout_of(self.state.global_step),
            "kl_coef": self.maker.kl_control.coefficient,
            "policy_weight": self.policy_weight,
        }

    def failed_rewards(self) -> list[str]:
        """The rewards whose failures the rollout's metrics count."""
        names = [name for name in self.rollouts.newest.metrics if name.startswith("reward/")]
        return [name[len("reward/") : -len("_failures")] for name in names if name.endswith("_failures")]

    def old_logprobs(self, batch: Experience, outputs: RoleOutputs, *, check: bool) -> Tensor:
        """The policy's log-probs (n, R) at the rollout: those of the role pass or, where the policy did not run in it,
        those of this forward pass, detached, of the rollout's only update.

        With ``check`` no update has happened since the rollout, so the ratio of those of the role pass must be 1. All
        ranks come here with their first micro-batch, judge the same numbers, and raise together.
        """
        now, checks, collected = outputs.policy_logprobs.detach(), self.maker.checks, self.rollouts.newest
        if collected.deferred is not None:
            return now
        if batch.old_logprobs is None:
            self._policy_record.keep(outputs, batch)
            return now
        if check and checks is not None:
            mask = batch.response_mask
            pairs = all_gather(torch.stack([now[mask], batch.old_logprobs[mask]]).cpu())
            everyones, before = torch.cat(pairs, 1)
            if not everyones.isfinite().all():
                return batch.old_logprobs  # the update will be left out
            found = checks.check_first_ratio(everyones, before, self.schedule.rollout_of(self.state.global_step))
            self.meter.add("actor/first_ratio_deviation", found.largest, 1)
            self.meter.add("actor/first_ratio_mean_deviation", found.mean, 1)
        return batch.old_logprobs

    def loss_terms(self, part: MiniBatch, batch: Experience, outputs: RoleOutputs, old_logprobs: Tensor) -> LossTerms:
        """A micro-batch's share of the mini-batch's loss:

        policy loss + value_coef value loss - entropy_coef entropy + kl_coef KL (when it is in the loss)

        each aggregated with the counts of the whole mini-batch over all ranks. During value warm-up the policy's part
        is multiplied by 0: it keeps its place in the graph, so that ZeRO-3 sees a gradient, and moves nothing.
        """
        return self.loss.terms(
            batch,
            outputs,
            old_logprobs,
            selected=self._prepare_input(part.get("selected")),
            reduce=self._reduction(part, batch),
            kl_coef=self.maker.kl_control.coefficient,
            policy_weight=self.policy_weight,
        )

    @property
    def policy_weight(self) -> float:
        """What the policy's part of this update's loss is multiplied by."""
        return 0.0 if self.warming_up else 1.0

    @property
    def warming_up(self) -> bool:
        """Whether this update is one of those that train the value alone."""
        return self.schedule.rollout_of(self.state.global_step) < self.loss.value_warmup_rollouts

    def _reduction(self, part: MiniBatch, batch: Experience) -> Callable[[Tensor], Tensor]:
        """From a loss per token (n, R) to this micro-batch's share of the whole mini-batch's."""
        return self.loss.reduction(part, batch.response_mask)

    def decide_whether_to_go_on(self) -> None:
        """Once the KL of a mini-batch, over all ranks, is above ``kl_stop``, the rollout's other updates are left out.

        All ranks decide from the same sum, before any of them begins the next forward pass.
        """
        if self.loss.kl_stop is not None:
            total, tokens = torch.stack(all_gather(self._kl_sums.cpu())).sum(0).tolist()
            self._kl_sums = torch.zeros_like(self._kl_sums)
            self._stopped = total / max(tokens, 1) > self.loss.kl_stop

    def _watch_kl(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> None:
        """Add up a micro-batch's KL of the policy at the rollout to the policy now, and its tokens."""
        if self.loss.kl_stop is not None:
            kl = approximate_kl(logprobs, old_logprobs, mask, count=1).k3
            self._kl_sums = self._kl_sums.to(kl.device) + torch.stack([kl.detach(), mask.sum()])

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Sequence[Prompt] | None = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy responses to the held-out prompts: score, KL to the reference, length and the share that was cut off;
        and the score of sampled ones where the experiment asks for them. Scores are of the responses that have one."""
        prompts, samples = list(eval_dataset or self.held_out.prompts), self.held_out.samples
        scored_sampler = self.maker.scored_sampler
        with (
            located("evaluation"),
            scored_sampler.clock.apart("testing") as seconds,
            scored_sampler.opened(self.model_wrapped) as shared,
        ):
            greedy = held_out_responses(scored_sampler, shared, prompts, greedy=True, kl=True)
            at_random = (
                held_out_responses(scored_sampler, shared, prompts, samples=samples, kl=False) if samples else None
            )
        self.evaluated_samples = as_samples(greedy.sampled, greedy.scores)
        metrics = greedy_metrics(greedy, metric_key_prefix)
        if at_random is not None:
            metrics |= sampled_metrics(at_random, self.held_out.passing, metric_key_prefix)
        self.log({**metrics, **{f"timing_s/{phase}": time for phase, time in seconds.items()}})
        # Callbacks hear of it, and Trainer learns that this step's evaluation has been done.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Give Trainer's gradient norm its place among ours and add what the rollout and its phases measured.

        The loss is metered, over the updates that were made: Trainer's mean counts those left out as 0. Of these
        DeepSpeed's engine would repeat the last norm.
        """
        if "loss" in logs:
            sampler = self.maker.scored_sampler.sampler
            retries, sampler.retries = sampler.retries, 0
            collected, seconds = self.rollouts.newest, self.maker.scored_sampler.clock.take()
            logs = {
                GRADIENT_NORM: 0.0 if self._left_out else float(logs.get("grad_norm", 0.0)),
                **self.not_finite.take(),
                **({ROLLOUT_RETRIES: float(retries)} if retries else {}),
                **collected.metrics,
                **{f"timing_s/{phase}": time for phase, time in seconds.items()},
                "perf/throughput": collected.metrics["perf/total_num_tokens"] / seconds["step"] / world_size(),
                "perf/max_memory_allocated_gb": peak_memory_gib(self.args.device),
            }
        super().log(logs, start_time)
