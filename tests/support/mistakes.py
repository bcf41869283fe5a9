"""A newcomer's natural mistakes: what is written, and the one line that it costs. docs/mistakes.md shows this table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.tiny import merged, write_experiment, write_task


@dataclass(frozen=True)
class Mistake:
    """What somebody writes, in words, and the last line on the screen, without the kind of error; ``{here}`` is the
    folder. ``changes`` are settings in the file, ``files`` others beside it, ``arguments`` those of a start."""

    written: str
    line: str
    changes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, bool] = field(default_factory=dict)


def reward(text: str, written: str, line: str, **changes: Any) -> Mistake:
    """A mistake in the reward's file."""
    return Mistake(written, line, changes, {"reward.py": text})


ROWS = '{{"prompt": "w1", "answer": "w2", "level": 3}}\n' * 24
SETTINGS = (
    Mistake("`ppo.klcoef`", "unknown setting ppo.klcoef; did you mean ppo.kl_coef?", {"ppo.klcoef": 0.1}),
    Mistake("`ppo.kl_coeff`", "unknown setting ppo.kl_coeff; did you mean ppo.kl_coef?", {"ppo.kl_coeff": 0.1}),
    Mistake(
        "a section `rollouts`", "unknown section 'rollouts'; did you mean rollout?", {"rollouts.max_new_tokens": 8}
    ),
    Mistake(
        "`update.learning_rate`, TRL's name",
        "unknown setting update.learning_rate; did you mean update.policy_lr?",
        {"update.learning_rate": 1e-4},
    ),
    Mistake(
        "`update.lr`, a supervised run's",
        "unknown setting update.lr; did you mean update.policy_lr?",
        {"update.lr": 1e-4},
    ),
    Mistake(
        "`model.load_in_4bit: true`",
        "unknown setting model.load_in_4bit; did you mean model.quantization: nf4?",
        {"model.load_in_4bit": True},
    ),
    Mistake("`model.lora_r`", "unknown setting model.lora_r; did you mean model.lora_rank?", {"model.lora_r": 8}),
    Mistake(
        "`rollout.num_generations`",
        "unknown setting rollout.num_generations; did you mean rollout.responses_per_prompt?",
        {"rollout.num_generations": 8},
    ),
    Mistake(
        "`rollout.max_completion_length`",
        "unknown setting rollout.max_completion_length; did you mean rollout.max_new_tokens?",
        {"rollout.max_completion_length": 8},
    ),
    Mistake("`ppo.beta`", "unknown setting ppo.beta; did you mean ppo.kl_coef?", {"ppo.beta": 0.1}),
    Mistake(
        "`reward.reward_funcs`",
        "unknown setting reward.reward_funcs; did you mean reward.function?",
        {"reward.reward_funcs": "f.py:f"},
    ),
    Mistake(
        "`data.dataset_name`", "unknown setting data.dataset_name; did you mean data.train?", {"data.dataset_name": "x"}
    ),
    Mistake(
        "`ppo.temperature`",
        "unknown setting ppo.temperature; did you mean rollout.temperature?",
        {"ppo.temperature": 0.7},
    ),
    Mistake("a section `lora`", "unknown section 'lora'; did you mean model?", {"lora.r": 8}),
    Mistake(
        "`learning_rate` in no section",
        "unknown section 'learning_rate'; did you mean update.policy_lr?",
        {"learning_rate.": 1},
    ),
    Mistake(
        "`ppo.num_rollouts: many`",
        "ppo.num_rollouts='many' is not int; the default is 100",
        {"ppo.num_rollouts": "many"},
    ),
    Mistake(
        "`rollout.max_new_tokens: 16.5`",
        "rollout.max_new_tokens=16.5 is not int; the default is 256",
        {"rollout.max_new_tokens": 16.5},
    ),
    Mistake(
        "`model.gradient_checkpointing: yes please`",
        "model.gradient_checkpointing='yes please' is not bool; the default is false",
        {"model.gradient_checkpointing": "yes please"},
    ),
    Mistake(
        "`update.policy_lr: 1e-4x`",
        "update.policy_lr='1e-4x' is not float; the default is 0.0001",
        {"update.policy_lr": "1e-4x"},
    ),
    Mistake("`run.wandb: true`", "run.wandb=True is not str; known are online, offline, off", {"run.wandb": True}),
    Mistake(
        "`model.dtype: fp16`",
        "model.dtype='fp16'; did you mean float16?; known are auto, bfloat16, float16, float32",
        {"model.dtype": "fp16"},
    ),
    Mistake("`rollout.top_p: 1.5`", "rollout.top_p=1.5 must be in (0, 1]; the default is 1.0", {"rollout.top_p": 1.5}),
    Mistake(
        "`rollout.temperature: 0`",
        "rollout.temperature=0.0 must be above 0; the default is 1.0",
        {"rollout.temperature": 0},
    ),
    Mistake(
        "`run.save_every: -1`", "run.save_every=-1 must not be negative; the default is none", {"run.save_every": -1}
    ),
    Mistake(
        "`model.lora_dropout: 0.05`",
        "model.lora_dropout=0.05 must be 0: dropout makes the ratio differ from 1 before any update; the "
        "default is 0.0",
        {"model.lora_dropout": 0.05},
    ),
    Mistake(
        "`model.target_modules: q_proj,v_proj`",
        "model.target_modules=q_proj,v_proj must be all-linear, a list of name endings such as [q_proj, "
        "v_proj], or a regular expression of whole names; the default is all-linear",
        {"model.target_modules": "q_proj,v_proj"},
    ),
    Mistake(
        "`model.exclude_modules: q_proj`",
        "model.exclude_modules='q_proj' is not list of str; write a list: ['q_proj']",
        {"model.exclude_modules": "q_proj"},
    ),
    Mistake(
        "`rollout.stop_strings: END`",
        "rollout.stop_strings='END' is not list of str; write a list: ['END']",
        {"rollout.stop_strings": "END"},
    ),
    Mistake(
        "`run.evaluate_every: 1` without `data.evaluation`",
        "run.evaluate_every=1 has nothing to evaluate; name held-out rows in data.evaluation, or set it to 0",
        {"run.evaluate_every": 1},
    ),
    Mistake(
        "7 responses in 2 mini-batches",
        "a rollout of 7 responses does not divide into ppo.mini_batches=2; try 1 or 7",
        {"rollout.prompts_per_rollout": 7, "ppo.mini_batches": 2},
    ),
    Mistake("no model", "model.name=None is not str; it has no default, so give it a value", {"model.name": None}),
    Mistake(
        "no reward",
        "reward.function is missing; set it in the YAML file or as reward.function=... on the command line",
        {"reward.function": ""},
    ),
    Mistake(
        "`reward.functions` as well as `reward.function`",
        "reward.functions and reward.function are both set; put the one function into the list of functions",
        {"reward.functions": [{"function": "f.py:f"}]},
    ),
)
STARTS = (
    Mistake(
        "a wrong path of data",
        "there is no file {here}/nothing.jsonl (looked in {cwd}); check data.train or data.evaluation",
        {"data.train": "{here}/nothing.jsonl"},
    ),
    Mistake(
        "an unknown advantage",
        "ppo.advantage='grop'; did you mean grpo?; known are gae, grpo, dr_grpo, rloo, "
        "reinforce_plus_plus, reinforce_plus_plus_baseline, remax, opo, vapo, or give "
        "path/to/file.py:name",
        {"ppo.advantage": "grop"},
    ),
    Mistake(
        "`reward.function: mine/reward.py`, without `:name`",
        "reward.function='mine/reward.py' names no function; write path/to/file.py:name or package.module:name",
        {"reward.function": "mine/reward.py"},
    ),
    Mistake(
        "a reward file that is not there",
        "reward.function='{here}/other.py:f': there is no file {here}/other.py (looked in {cwd}); check the path",
        {"reward.function": "{here}/other.py:f"},
    ),
    Mistake(
        "a reward's name misspelt",
        "reward.function='{here}/reward.py:low_word': low_word is not defined there; did you mean low_words?",
        {"reward.function": "{here}/reward.py:low_word"},
    ),
    reward(
        "def low_words(:\n",
        "a syntax error in the reward file",
        "reward.function='{here}/reward.py:low_words': importing {here}/reward.py raised SyntaxError: "
        "invalid syntax (reward.py, line 1); repair it, or give path/to/file.py:name",
    ),
    reward(
        "import nltkk\n",
        "a missing import in the reward file",
        "reward.function='{here}/reward.py:low_words': importing {here}/reward.py raised "
        "ModuleNotFoundError: No module named 'nltkk' at reward.py:1; repair it, or give "
        "path/to/file.py:name",
    ),
    reward(
        "def low_words(completions, **kwargs): ...\n",
        "TRL's `(completions, **kwargs)`",
        "reward.function: low_words(completions, **kwargs) takes the responses first, as TRL has it; "
        "here prompts come first: def low_words(prompts, responses, **columns)",
    ),
    reward(
        "def low_words(completions, answer, **kwargs): ...\n",
        "TRL's `(completions, answer, **kwargs)`",
        "reward.function: low_words(completions, answer, **kwargs) takes the responses first, as TRL has "
        "it; here prompts come first: def low_words(prompts, responses, **columns)",
    ),
    reward(
        "def low_words(text): ...\n",
        "a reward of one text",
        "reward.function: low_words(text) cannot take prompts and responses; write def "
        "low_words(prompts, responses, **columns)",
    ),
    Mistake(
        "a reward without `**columns`, data with more columns",
        "reward.function: low_words does not take the dataset's answer, level; columns arrive by name, "
        "so let it end with **columns",
        {},
        {"reward.py": "def low_words(prompts, responses): ...\n", "prompts.jsonl": ROWS},
    ),
    Mistake(
        "a reward's parameter that no column is called",
        "reward.function: low_words needs solution, which no column of the dataset is called (beside the "
        "prompt's: answer, level); rename one of them, or give it a default, or set it in reward.kwargs",
        {},
        {"reward.py": "def low_words(prompts, responses, solution, **columns): ...\n", "prompts.jsonl": ROWS},
    ),
    Mistake(
        "`reward.kwargs` that the reward does not take",
        "reward.kwargs.strcit: low_words has no such parameter; did you mean strict?; it takes strict",
        {"reward.kwargs": {"strcit": True}},
        {"reward.py": "def low_words(prompts, responses, *, strict=False): ...\n"},
    ),
    Mistake(
        "an environment without `turn`",
        "rollout.environment: tool(prompts, responses) does not take turn, which it is given by name; "
        "write def tool(prompts, responses, turn, **columns)",
        {"rollout.environment": "{here}/env.py:tool"},
        {"env.py": "def tool(prompts, responses): ...\n"},
    ),
    Mistake(
        "an environment of one text",
        "rollout.environment: tool(response) takes the responses first; here prompts come first: def "
        "tool(prompts, responses, turn, **columns)",
        {"rollout.environment": "{here}/env.py:tool"},
        {"env.py": "def tool(response): ...\n"},
    ),
    Mistake(
        "an environment whose column is not there",
        "rollout.environment: tool needs answer, which no column of the dataset is called (beside the "
        "prompt's: none); rename one of them, or give it a default",
        {"rollout.environment": "{here}/env.py:tool"},
        {"env.py": "def tool(prompts, responses, turn, answer): ...\n"},
    ),
    Mistake(
        "data with `instruction`, `input`, `output`",
        "no column 'prompt' for data.prompt_column; the columns are instruction, input, output; set "
        "data.prompt_column: instruction",
        {},
        {"prompts.jsonl": '{{"instruction": "w1", "input": "w2", "output": "w3"}}\n' * 24},
    ),
    Mistake(
        "data with `question`, `answer`",
        "no column 'prompt' for data.prompt_column; the columns are question, answer; set data.prompt_column: question",
        {},
        {"prompts.jsonl": '{{"question": "w1", "answer": "w2"}}\n' * 24},
    ),
    Mistake(
        "data with `messages`",
        "no column 'prompt' for data.prompt_column; the columns are messages; set data.prompt_column: messages",
        {},
        {"prompts.jsonl": '{{"messages": [{{"role": "user", "content": "w1"}}]}}\n' * 24},
    ),
    Mistake(
        "more prompts in a rollout than there are",
        "rollout.prompts_per_rollout=32 is more than the 24 prompts there are, so that every rollout "
        "would repeat some; set it to 24 or less, or add prompts",
        {"rollout.prompts_per_rollout": 32},
    ),
    Mistake(
        "a local model that is not there",
        "cannot load the model '/nowhere/model': there is no such folder; give a hub name or a local folder",
        {"model.name": "/nowhere/model"},
    ),
    Mistake(
        "a chat template asked of a model without one",
        "the tokenizer of {here}/model has no chat template; set data.chat_template: false and give "
        "prompts as strings, or use a model that has one",
        {"data.chat_template": True},
    ),
    Mistake(
        "the folder of another run",
        "run.output_dir={here}/run holds another run; continue it with --resume, replace it with "
        "--overwrite, or choose another folder",
        {},
        {"run/run.json": "{{}}", "run/log.jsonl": '{{"kind": "train", "rollout": 1}}\n'},
    ),
    Mistake(
        "`--resume` without a run",
        "--resume, but run.output_dir={here}/run holds no run; start without --resume",
        {},
        {},
        {"resume": True},
    ),
    Mistake(
        "the output folder is a file",
        "run.output_dir={here}/reward.py cannot be written: File exists; choose a folder you may write to",
        {"run.output_dir": "{here}/reward.py"},
    ),
)
SCORINGS = (
    reward(
        "def low_words(prompts, responses, **columns):\n    return 'good'\n",
        "a reward that returns a text",
        "reward low_words returned 'good' (str); return one number for each of the 2 responses; the "
        "first of its 2 prompts was 'prompt\\n0' (row 100 of the dataset)",
    ),
    reward(
        "def low_words(prompts, responses, **columns):\n    return ['good'] * len(responses)\n",
        "a reward that returns texts",
        "reward low_words gave score 'good' (str); return a finite number for each response, or one for "
        "each of its tokens; its prompt was 'prompt\\n0' (row 100 of the dataset)",
    ),
    reward(
        "def low_words(prompts, responses, **columns):\n    return [1.0]\n",
        "a reward that returns too few scores",
        "reward low_words returned 1 scores; return one number for each of the 2 responses; the first of "
        "its 2 prompts was 'prompt\\n0' (row 100 of the dataset)",
    ),
    reward(
        "def low_words(prompts, responses, **columns):\n    return [score for score in responses[0]['x']]\n",
        "a reward that raises",
        "reward low_words raised TypeError: string indices must be integers, not 'str'; repair the "
        "function (see its traceback); the first of its 2 prompts was 'prompt\\n0' (row 100 of the "
        "dataset)",
    ),
)


def written(case: Mistake, folder: Path) -> Path:
    """The experiment's file with the mistake in it, and the files beside it."""
    here = {name: v.replace("{here}", str(folder)) if isinstance(v, str) else v for name, v in case.changes.items()}
    task = merged(write_task(folder), here)
    for name, text in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text.format(here=folder))
    return write_experiment(folder / "experiment.yaml", task)
