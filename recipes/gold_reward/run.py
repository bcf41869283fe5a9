"""SFT, a reward model, PPO and DPO on one base, an evaluation of all of them, and a merged model: one command.

python recipes/gold_reward/run.py [--to runs/gold_reward]

Stages that are done are passed over and a training that was cut off goes on from its last checkpoint, so the command
can be said again after whatever ended it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GOLD = "[{function: recipes/sentiment/reward.py:sentiment, name: gold}]"


@dataclass(frozen=True)
class Stage:
    """One command and the file that it leaves when it is done."""

    name: str
    done: Path
    command: Callable[[], Sequence[str]]
    launched: bool = False


@dataclass(frozen=True)
class Pipeline:
    """Where everything lies, and how training is launched."""

    to: Path
    model: str
    launch: Path
    processes: int

    def stages(self) -> list[Stage]:
        """All stages in their order."""
        data = self.to / "data"
        sft, reward, adapter = (self.to / place for place in ("sft/policy", "reward/reward", "ppo/policy"))
        pairs = {"data.train": data / "pairs.jsonl", "data.evaluation": data / "pairs_heldout.jsonl"}
        started = {"model.policy_adapter": sft, "model.value_adapter": reward, "reward.adapter": reward}
        prompts = {"data.train": data / "train.jsonl", "data.evaluation": data / "heldout.jsonl"}
        return [
            self.python("prompts", data / "train.jsonl", HERE / "make_data.py", "prompts", data),
            self.samples("base samples", data / "base.jsonl", "base", data / "train.jsonl", 1),
            self.made("examples", data / "base.jsonl", data / "train.jsonl", data / "examples.jsonl"),
            self.training("sft", {"data.train": data / "examples.jsonl"}),
            self.samples("sft samples", data / "sft.jsonl", sft, data / "train.jsonl", 4),
            self.made("pairs", data / "sft.jsonl", data / "train.jsonl", data / "pairs.jsonl"),
            self.samples("held-out samples", data / "sft_heldout.jsonl", sft, data / "heldout.jsonl", 12),
            self.made("pairs", data / "sft_heldout.jsonl", data / "heldout.jsonl", data / "pairs_heldout.jsonl"),
            self.training("reward_model", pairs, folder="reward"),
            self.training("ppo", {**prompts, **started}),
            self.training("dpo", {**pairs, "model.policy_adapter": sft}),
            self.evaluation(data / "heldout.jsonl", started),
            self.merge(adapter),
            self.python("report", self.to / "report.md", HERE / "report.py", self.to),
        ]

    def python(self, name: str, done: Path, *words: object) -> Stage:
        """A stage that is a script."""
        return Stage(name, done, lambda: [sys.executable, *map(str, words)])

    def made(self, kind: str, responses: Path, prompts: Path, out: Path) -> Stage:
        """Examples or pairs out of responses."""
        return self.python(out.stem, out, HERE / "make_data.py", kind, responses, prompts, out)

    def training(self, recipe: str, settings: Mapping[str, object], folder: str | None = None) -> Stage:
        """A recipe under accelerate launch; it goes on where there is a checkpoint."""
        run = self.to / (folder or recipe)
        settings = {"model.name": self.model, "run.output_dir": run, **settings}
        launch = [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--config_file", str(self.launch), "--num_processes", str(self.processes)),
            *(str(ROOT / f"recipes/{recipe}.py"), "--config", str(HERE / f"{recipe}.yaml")),
        ]

        def command() -> list[str]:
            again = "--resume" if any(run.glob("checkpoint-*/manifest.json")) else "--overwrite"
            return [*launch, again, *(f"{name}={value}" for name, value in settings.items())]

        return Stage(folder or recipe, run / "summary.json", command, launched=True)

    def rlhf(self, name: str, done: Path, *words: object) -> Stage:
        """A stage that is a command of ``rlhf``."""
        return self.python(name, done, "-m", "rlhf_toolkit.cli", *words)

    def samples(self, name: str, out: Path, contestant: object, prompts: Path, count: int) -> Stage:
        """Responses scored by gold."""
        settings = {"data.train": prompts, "data.evaluation": prompts, "reward.functions": GOLD}
        alone = {"reward.adapter": "none", "model.policy_adapter": "none", "model.value_adapter": "none"}
        words = self.settings({**settings, **alone, "reward.missing_eos_penalty": 0})
        sampled = ("evaluate", HERE / "ppo.yaml", contestant, "--no-greedy", "--no-kl", "--samples", count)
        return self.rlhf(name, out, *sampled, "--responses", out, *words)

    def evaluation(self, prompts: Path, started: Mapping[str, object]) -> Stage:
        """The bare base, the SFT model, DPO's and PPO's, by proxy and gold."""
        contestants = ("base", *(self.to / name / "policy" for name in ("sft", "dpo", "ppo")))
        words = self.settings({"data.train": prompts, "data.evaluation": prompts, **started})
        out = self.to / "evaluation.json"
        return self.rlhf(
            "evaluation", out, "evaluate", HERE / "ppo.yaml", *contestants, "--samples", 4, "--out", out, *words
        )

    def merge(self, adapter: Path) -> Stage:
        """PPO's policy as a plain model, its logits compared with base and adapter."""
        out = self.to / "merged"
        words = ("merge", self.model, adapter, out, "--dtype", "float32", "--verify", 4)
        return self.rlhf("merge", out / "config.json", *words)

    def settings(self, values: Mapping[str, object]) -> list[str]:
        """``--set`` for each of them."""
        everything = {"model.name": self.model, **values}
        return [word for name, value in everything.items() for word in ("--set", f"{name}={value}")]


def run(pipeline: Pipeline) -> None:
    """Run what is not done yet; the seconds of every stage, over all attempts, go to ``seconds.json``."""
    pipeline.to.mkdir(parents=True, exist_ok=True)
    file = pipeline.to / "seconds.json"
    seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    for stage in pipeline.stages():
        if stage.done.exists():
            print(f"== {stage.name}: done", flush=True)
            continue
        print(f"== {stage.name}", flush=True)
        began = time.perf_counter()
        threads = {} if stage.launched else {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
        status = logged(stage.command(), pipeline.to / f"logs/{stage.name}.log", {**os.environ, **threads})
        seconds[stage.name] = seconds.get(stage.name, 0.0) + time.perf_counter() - began
        file.write_text(json.dumps(seconds, indent=2) + "\n")
        if status != 0:
            sys.exit(f"{stage.name} ended with status {status}; say the command again to go on from there")
        print(f"== {stage.name}: {seconds[stage.name]:.0f} s", flush=True)
    print((pipeline.to / "report.md").read_text(), flush=True)


def logged(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
    """Run a command whose output goes to the terminal and, behind that of earlier attempts, to a file; its status."""
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as file:
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert running.stdout is not None
        while written := os.read(running.stdout.fileno(), 1 << 16):  # not line by line: bars have no line ends
            sys.stdout.buffer.write(written)
            sys.stdout.flush()
            file.write(written)
        return running.wait()


def fetched_model() -> str:
    """The folder of SmolLM2-135M-Instruct."""
    command = [sys.executable, str(ROOT / "recipes/sentiment/fetch_model.py")]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("runs/gold_reward"), help="default: %(default)s")
    parser.add_argument("--model", help="hub name or folder; default: SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--launch", type=Path, default=ROOT / "accelerate_configs/cpu_zero3.yaml")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    model = options.model or fetched_model()
    run(Pipeline(options.to.resolve(), model, options.launch, options.processes))


if __name__ == "__main__":
    main()
