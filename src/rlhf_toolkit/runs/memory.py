"""The sizes of an experiment that bound a rank's memory, for the planner."""

from __future__ import annotations

from rlhf_toolkit.rollout.sizes import RolloutSize
from rlhf_toolkit.runs.algorithm import Algorithm
from rlhf_toolkit.settings.experiment import Experiment


def rollout_size(
    experiment: Experiment,
    algorithm: Algorithm,
    longest: int,
    *,
    ranks: int,
    held_out: int,
    packing: bool,
    trains: bool = True,
) -> RolloutSize:
    """The sizes that bound memory on one of ``ranks``, with prompts of at most ``longest`` tokens and ``held_out`` of
    them for evaluation. Where nothing ``trains``, memory need not hold an update."""
    rollout, budget, roles = experiment.rollout, algorithm.role_tokens, algorithm.update_roles
    columns, rows = longest + rollout.max_new_tokens, rollout.sequences // ranks
    evaluated = -(-held_out * max(1, experiment.run.evaluation_samples) // ranks)
    update = roles * tokens_of_a_pass(experiment.mini_batch_rows // ranks, columns, budget) if trains else 0
    # Evaluation and a reward adapter score with one role, and are not cut into mini-batches.
    whole = tokens_of_a_pass(max(evaluated, 0 if experiment.reward.adapter is None else rows), columns, budget)
    # The update's roles share the largest role pass, too: the reference has one of its own.
    role_pass_tokens, role_pass_roles = max((update, roles), (whole, 1))
    return RolloutSize(
        rows=max(rows, evaluated),
        columns=columns,
        role_pass_tokens=role_pass_tokens,
        longest_prompt=longest,
        later_turns=rollout.environment is not None and rollout.max_turns > 1,
        role_pass_roles=role_pass_roles,
        update_tokens=update,
        update_roles=roles,
        checkpointing=experiment.model.gradient_checkpointing,
        packing=packing,
        responses=rollout.responses_per_prompt,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        changes_logits=bool(rollout.logit_bias or rollout.bad_words) or rollout.repetition_penalty != 1.0,
    )


def tokens_of_a_pass(rows: int, columns: int, budget: int) -> int:
    """The most tokens of a role in one of the forward passes into which ``rows`` of at most ``columns`` tokens are cut:
    never more than all of them, nor less than one row, be the ``budget`` as it may."""
    return max(columns, min(budget, rows * columns))
