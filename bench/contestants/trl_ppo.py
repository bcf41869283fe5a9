"""Contestant of ``bench/versus_trl.py``: TRL 1.12's PPOTrainer, the last there is, one PPO step at each request.

    python bench/contestants/trl_ppo.py JOB.json        # in an environment of its own; imports nothing of this toolkit

The job holds ``model`` (a folder), ``prompts`` (user messages, as many as a step has), ``tokens`` (new ones of each
response, exactly), ``rank``, ``learning_rate``, ``kl_coef``, ``folder`` and ``package`` (where ``protocol`` lies).

The policy is the base with LoRA, the value model a second copy of the base with LoRA, as PPOTrainer wants it; the
reference is the policy with its adapter off; the reward is VADER's sentiment of the response. Its options
``gradient_checkpointing``, ``bf16`` and ``max_grad_norm`` do nothing in PPO; the base is loaded in bfloat16.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRL_EXPERIMENTAL_SILENCE"):
    os.environ.setdefault(name, "1")

JOB = json.loads(Path(sys.argv[1]).read_text())
sys.path.insert(0, JOB["package"])
from contestants.protocol import Server

SERVER = Server()

import torch
import trl.experimental.ppo.ppo_trainer as trl_ppo
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    TrainerCallback,
)
from transformers.modeling_outputs import BaseModelOutput
from trl.experimental.ppo import PPOConfig, PPOTrainer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

MANY = 1000  # steps: more than anyone asks for
PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl")


# ---- a reward function as the "sequence classification model" that PPOTrainer insists on ----------------------------


class Backbone(torch.nn.Module):
    """Stands where a reward model's transformer stands: hidden "states" of width 1 that hold the reward."""

    def __init__(self, reward: Callable[[list[str]], list[float]], tokenizer: Any) -> None:
        super().__init__()
        self.reward, self.tokenizer = reward, tokenizer

    def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> BaseModelOutput:
        texts = [self.tokenizer.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask, strict=True)]
        rewards = torch.tensor(self.reward(texts), dtype=torch.float32, device=input_ids.device)
        return BaseModelOutput(hidden_states=(rewards[:, None, None].expand(-1, input_ids.shape[1], 1),))


class FunctionRewardModel(torch.nn.Module):
    """What ``get_reward`` looks at: ``base_model_prefix``, the attribute of that name, and ``score``."""

    base_model_prefix = "model"

    def __init__(self, reward: Callable[[list[str]], list[float]], tokenizer: Any) -> None:
        super().__init__()
        settings: dict[str, Any] = {"hidden_size": 1}
        self.config = PretrainedConfig(**settings)
        self.model = Backbone(reward, tokenizer)
        self.score = torch.nn.Identity()


def sentiment(texts: list[str]) -> list[float]:
    """VADER's compound score of what follows the last assistant tag."""
    analyzer = SentimentIntensityAnalyzer()
    responses = [re.sub(r"<\|[^>]*\|>|\[PAD\]", " ", text.split("<|im_start|>assistant")[-1]) for text in texts]
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


# ---- phases ----------------------------------------------------------------------------------------------------------


class Phases:
    """Seconds of the functions that PPOTrainer's loop calls, and where its update begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.update_began: float | None = None
        trl_ppo.batch_generation = self.timed("generate", trl_ppo.batch_generation)
        trl_ppo.get_reward = self.reward_or_value(trl_ppo.get_reward)
        trl_ppo.forward = self.reference_or_update(trl_ppo.forward)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        return call

    def reward_or_value(self, get_reward: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            name = "reward" if isinstance(model, FunctionRewardModel) else "value"
            return self.timed(name, get_reward)(model, *args, **kwargs)

        return call

    def reference_or_update(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return self.timed("reference", forward)(*args, **kwargs)
            self.update_began = self.update_began or time.perf_counter()
            return forward(*args, **kwargs)

        return call

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        assert self.update_began is not None
        taken = {**self.seconds, "update": time.perf_counter() - self.update_began}
        self.seconds, self.update_began = {}, None
        return taken


# ---- the run ---------------------------------------------------------------------------------------------------------


class Steps(TrainerCallback):
    """After each step the next one waits to be asked for."""

    def __init__(self, phases: Phases) -> None:
        self.phases, self.began = phases, 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        SERVER.answer(ready=True, versions=versions)
        self.await_request()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds, logs = time.perf_counter() - self.began, state.log_history[-1] if state.log_history else {}
        SERVER.answer(
            seconds=seconds,
            phases=self.phases.take(),
            peak_gib=peak_memory_gib(),
            response_length=JOB["tokens"],
            score=logs.get("objective/scores"),
        )
        self.await_request()

    def await_request(self) -> None:
        SERVER.wait()
        self.began = time.perf_counter()


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    prompts, rank = JOB["prompts"], JOB["rank"]
    tokenizer = AutoTokenizer.from_pretrained(JOB["model"], padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # PPOTrainer takes pad as the end; SmolLM2's pad is its eos
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    dataset = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})
    policy = AutoModelForCausalLM.from_pretrained(JOB["model"], dtype=torch.bfloat16)
    value = AutoModelForSequenceClassification.from_pretrained(JOB["model"], num_labels=1, dtype=torch.bfloat16)
    value.config.pad_token_id = tokenizer.pad_token_id
    lora = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": "all-linear"}
    value = get_peft_model(value, LoraConfig(task_type="SEQ_CLS", **lora))  # peft_config wraps the policy only
    arguments = PPOConfig(
        output_dir=JOB["folder"],
        per_device_train_batch_size=len(prompts),
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=len(prompts) * MANY,
        response_length=JOB["tokens"],
        local_rollout_forward_batch_size=len(prompts),
        temperature=1.0,
        learning_rate=JOB["learning_rate"],
        lr_scheduler_type="constant",
        kl_coef=JOB["kl_coef"],
        stop_token=None,
        missing_eos_penalty=None,
        num_sample_generations=0,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=FunctionRewardModel(sentiment, tokenizer),
        value_model=value,
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
        callbacks=[Steps(Phases())],
    )
    trainer.train()


if __name__ == "__main__":
    main()
