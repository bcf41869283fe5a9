"""A reward model of its own: another base, another tokenizer, text in, one score out. Frozen, sharded under ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_toolkit.data.chat import plain_ids, render, rendered_ids
from rlhf_toolkit.distributed.collectives import agreement, largest
from rlhf_toolkit.distributed.topology import Topology
from rlhf_toolkit.distributed.zero3 import whole
from rlhf_toolkit.errors import DataError, ModelError, OutOfMemoryError, RewardError
from rlhf_toolkit.models.loading import (
    MAIN,
    explained,
    load_tokenizer,
    loading_weights,
    refuse_larger,
    require_all_weights,
    straight_to_device,
)
from rlhf_toolkit.types import Prompt

BATCH_TOKENS = 8192  # of one forward pass, padding included


class RewardModel:
    """Scores responses with a sequence classifier of one label, which reads the text that its own tokenizer makes.

    A prompt of chat messages goes through the reward model's own chat template, with the response as the assistant's
    message, or as the rest of the one that it ends with; one of plain text is followed by the response. Higher is
    better; nothing is scaled.

    Raises ModelError for a model with several labels, or without a token to pad with.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if model.config.num_labels != 1:
            raise ModelError(
                f"reward.model={name} gives {model.config.num_labels} labels; a reward model gives one score "
                "(num_labels=1)"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ModelError(f"reward.model={name}: its tokenizer has neither a pad nor an end token; add one of them")
        self.name, self.model, self.tokenizer = name, model.eval().requires_grad_(False), tokenizer
        for config in (model.config, model.config.get_text_config()):  # kinds of classifiers ask one or the other
            config.pad_token_id = tokenizer.pad_token_id  # the classifier reads the last token that is not this
        self.model.config.get_text_config().use_cache = False  # nobody goes on from here: no layer's keys are kept
        self.batch_tokens = BATCH_TOKENS
        self.most = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ModelError where the model's chat template cannot render one of the kinds of conversations among
        ``prompts``, one of each order of roles: before anything is sampled, not at the first score."""
        kinds = {tuple(each["role"] for each in prompt.messages or ()): prompt for prompt in reversed(prompts)}
        for prompt in kinds.values():
            try:
                self._ids(prompt, "")
            except DataError as error:
                raise ModelError(
                    f"reward.model={self.name} cannot read the prompts: {error}; use another reward model, or "
                    "data.chat_template: false with prompts as strings"
                ) from error

    def scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        *,
        note_retry: Callable[[str, str], None] = lambda what, said: None,
    ) -> list[float]:
        """One score for each response. A collective: under ZeRO-3 the whole model is gathered meanwhile; ranks may have
        different numbers of responses, and what one of them fails with, all raise. A score may be NaN or infinite.
        Where memory runs out on a rank, all try again with smaller batches, and keep to them; ``note_retry`` is told.

        Raises RewardError for a text longer than the model can read.
        """
        with agreement("the reward model"):
            rows = [self._ids(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        found = [0.0] * len(rows)
        while True:
            batches = in_batches(rows, self.batch_tokens)
            try:
                with whole(list(self.model.parameters())), agreement("the reward model"), torch.inference_mode():
                    for batch in batches:
                        for i, score in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                            found[i] = score
                return found
            except OutOfMemoryError as error:
                if largest(max(map(len, batches), default=0)) <= 1:
                    raise
                said = str(error)
            self.batch_tokens //= 2
            note_retry(f"the reward model runs again with at most {self.batch_tokens} tokens", said)

    def _ids(self, prompt: Prompt, response: str) -> list[int]:
        if prompt.messages is None:
            ids = list(plain_ids(prompt.text + response, self.tokenizer))
        else:
            messages: list[Any] = list(prompt.messages)
            beginning = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
            messages.append({"role": "assistant", "content": beginning + response})
            text = render(messages, self.tokenizer, index=prompt.index, add_generation_prompt=False)
            ids = list(rendered_ids(text, self.tokenizer))
        if self.most is not None and len(ids) > self.most:
            raise RewardError(
                f"prompt {prompt.index} with its response has {len(ids)} tokens for reward.model={self.name}, which "
                f"reads at most {self.most}; lower rollout.max_new_tokens or data.max_prompt_tokens"
            )
        return list(ids)

    def _forward(self, rows: list[list[int]]) -> list[float]:
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = next(self.model.parameters()).device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return [float(score) for score in logits[:, 0].float().tolist()]


def load_reward_model(
    name: str, topology: Topology, *, dtype: torch.dtype, trust_remote_code: bool, revision: str | None = None
) -> RewardModel:
    """The classifier and its tokenizer, from the hub or a folder; under ZeRO-3 every rank holds its shard."""
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or MAIN}
    with agreement("loading"):
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code, revision=revision)
        with explained(name, revision):
            config = AutoConfig.from_pretrained(name, **where)
        refuse_larger(name, config)
    with loading_weights(name, topology, dtype, revision=revision):
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            **where,
            **straight_to_device(topology),
        )
    require_all_weights(name, found)  # or a language model would score by a head of random numbers
    return RewardModel(name, model, tokenizer)


def in_batches(rows: Sequence[Sequence[int]], most: int = BATCH_TOKENS) -> list[list[int]]:
    """Row numbers, longest first, in batches of at most ``most`` tokens with padding."""
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if not batches or (len(batches[-1]) + 1) * len(rows[batches[-1][0]]) > most:
            batches.append([])
        batches[-1].append(i)
    return batches
