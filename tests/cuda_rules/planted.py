"""All of a GPU's rules, then mistakes that only a GPU would show, each caught by one of them.

    python -m tests.cuda_rules.planted

Every rule is tried on the source as it is; where one is broken, the output is pytest's and the status 1.
"""

from __future__ import annotations

from pathlib import Path

from tests.mutation_runner import ROOT, Mutation, verdicts

HERE = Path(__file__).parent
SOURCE, RULES = "src/rlhf_toolkit", "tests/cuda_rules/rules_of_"
STEP = f"{RULES}decoding.py::test_a_step_launches_and_waits_no_more_than_it_did[exact]"
PASSES = f"{RULES}passes.py::test_both_layouts_say_what_they_say_on_the_cpu"
PASS = f"{RULES}passes.py::test_a_pass_launches_and_waits_no_more_than_it_did"
UPDATE = f"{RULES}updates.py::test_a_training_step_waits_no_more_than_it_did"
PLANTED = [
    Mutation(
        "a tensor of the CPU in a loss",
        f"{SOURCE}/algorithms/policy_losses.py:vanilla",
        "torch.where(gain > 0, gain * dual_clip, torch.inf)",
        "torch.where(gain > 0, gain * dual_clip, torch.full(gain.shape, torch.inf))",
        f"{RULES}losses.py::test_every_policy_loss",
    ),
    Mutation(
        "a number read back in every step",
        f"{SOURCE}/rollout/decoding.py:InFlight.step",
        "self.positions += 1",
        "self.positions += 1; self.positions.max().item()",
        STEP,
    ),
    Mutation(
        "a list as index in every step",
        f"{SOURCE}/rollout/decoding.py:InFlight.step",
        "logits[self.chosen]",
        "logits[slots]",
        STEP,
    ),
    Mutation(
        "launches in every layer of a step",
        f"{SOURCE}/models/fused.py:normed",
        "return weight * xhat",
        "return weight * (xhat + 0)",
        STEP,
    ),
    Mutation(
        "a mask of the CPU in the role pass",
        f"{SOURCE}/models/segment_attention.py:SegmentAttention.visible",
        ".to(self.device)",
        "",
        f"{PASSES}[scored-torch.float32]",
    ),
    Mutation(
        "places of the CPU in the role pass",
        f"{SOURCE}/data/layout.py:TokenLayout.to",
        '"targets", "last"',
        '"targets"',
        f"{PASSES}[scored-torch.float32]",
    ),
    Mutation(
        "beginnings of pieces in int64",
        f"{SOURCE}/models/segment_attention.py:SegmentAttention.ragged",
        "_begins(sizes.repeat(roles)).to(self.device, torch.int32)",
        "_begins(sizes.repeat(roles)).to(self.device)",
        f"{PASS}[packed]",
    ),
    Mutation(
        "a mask of booleans as index in an update",
        f"{SOURCE}/models/heads.py:RunningScores.gradients",
        "weight[self.targets]",
        "weight[self.targets][self.targets >= 0]",
        f"{PASS}[packed]",
    ),
    Mutation(
        "a number read back in every micro-batch",
        f"{SOURCE}/trainers/ppo.py:PPOTrainer.micro_batch_loss",
        "tokens = batch.response_mask.sum()",
        "bool(terms.loss.isfinite()); tokens = batch.response_mask.sum()",
        f"{UPDATE}[packed]",
    ),
    Mutation(
        "numbers read back in every step where strings stop",
        f"{SOURCE}/rollout/decoding.py:Responses.add",
        "self.tokens[rows].tolist()",
        "[row.tolist() for row in self.tokens[rows]]",
        f"{RULES}decoding.py::test_no_way_of_sampling_waits_more",
    ),
]


def main() -> None:
    """Print a verdict a line; exit with 1 where a rule is broken or a mistake is not caught."""
    found = list(verdicts(PLANTED, files=sorted(str(path.relative_to(ROOT)) for path in HERE.glob("rules_of_*.py"))))
    for verdict in found:
        print(verdict.outcome, verdict.mutation.name, verdict.reason)
    raise SystemExit(any(verdict.outcome != "caught" for verdict in found))


if __name__ == "__main__":
    main()
