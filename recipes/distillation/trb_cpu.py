"""On-policy distillation whose rollouts move from the teacher's to the student's: TRB (arXiv 2605.31159), on two cores.

python recipes/distillation/trb_cpu.py --student STUDENT --teacher TEACHER [--max-steps 8]
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from trl import DistillationConfig

from dual_rollout import CoordinatorConfig, DualDistillationTrainer
from dual_rollout.server.launch import EmbeddedServer
from dual_rollout.training.schedules import AlphaSchedule

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "How many legs has a spider?",
    "What does a clock show?",
    "Why is the sky blue?",
    "Say hello in Spanish.",
    "What is 3 plus 4?",
    "Which month comes after May?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="outputs/models/SmolLM2-135M-Instruct")
    parser.add_argument("--teacher", required=True, help="a model with the student's vocabulary")
    parser.add_argument("--max-steps", type=int, default=8)
    parser.add_argument("--max-completion-length", type=int, default=48)
    parser.add_argument("--output-dir", default="outputs/distillation")
    options = parser.parse_args()
    args = DistillationConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=4,
        max_completion_length=options.max_completion_length,
        temperature=1.0,
        learning_rate=1e-5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    flags = ["--max-logprobs", "100", "--threads", "1"]
    with EmbeddedServer(options.student, flags) as theta, EmbeddedServer(options.teacher, flags) as t:
        trainer = DualDistillationTrainer(
            model=options.student,
            teacher_model=options.teacher,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS]),
            dual_config=CoordinatorConfig(
                theta_url=theta.url, t_url=t.url, top_k=100, alpha_method="kl_budget", kl_budget=0.1, seed=0
            ),
            alpha_schedule=AlphaSchedule(shape="linear", kl_budget_end=0.0),
        )
        with trainer.rollout:
            trainer.train()
    if trainer.accelerator.is_main_process:
        print(trainer.metrics_log.table())


if __name__ == "__main__":
    main()
