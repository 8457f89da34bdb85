"""TRL's GRPOTrainer on one task of `against_trl.py`, in the environment that has TRL.

python trl_arm.py SETTINGS.json

It imports nothing of this project. It writes one JSON line per step to the file that the settings
name: step, seconds since the start of training, accuracy and generated tokens of its batch.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

MARKER = "####"


def is_right(response: str, answer: str) -> bool:
    """The rule of the verifier `marker`."""
    _, marker, given = response.rpartition(MARKER)
    return bool(marker) and given.strip() == answer


def main() -> None:
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch: Any = importlib.import_module("torch")
    trl: Any = importlib.import_module("trl")
    transformers: Any = importlib.import_module("transformers")
    datasets: Any = importlib.import_module("datasets")
    torch.set_num_threads(settings["threads"])
    batch: dict[str, float] = {}

    def reward(
        completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        pairs = zip(completions, answer, strict=True)
        right = [is_right(response, gold) for response, gold in pairs]
        batch["accuracy"] = sum(right) / len(right)
        batch["tokens"] = sum(map(len, completion_ids))
        return [1.0 if each else -1.0 for each in right]

    class Rows(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began_s = time.time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            row = {"step": state.global_step - 1, "time_s": time.time() - self.began_s, **batch}
            with Path(settings["rows"]).open("a") as file:
                file.write(json.dumps(row) + "\n")

    problems = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    prompts = [{"prompt": f"{row['prompt']}=", "answer": row["answer"]} for row in problems]
    config = trl.GRPOConfig(
        output_dir=settings["folder"],
        max_steps=settings["steps"],
        seed=settings["seed"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=settings["groups"] * settings["group_size"],
        gradient_accumulation_steps=1,
        num_generations=settings["group_size"],
        steps_per_generation=1,
        num_iterations=1,
        max_completion_length=settings["max_response_tokens"],
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        scale_rewards="group",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=settings["steps"],
    )
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.float32
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(settings["model"]),
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_list(prompts),
        callbacks=[Rows()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
