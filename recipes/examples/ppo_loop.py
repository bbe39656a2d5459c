"""PPO in plain PyTorch and accelerate, with rollouts from q*: value head, GAE, clipped objective, importance weights.

The task: answer with as many of the wanted letters as possible. π_t is told which they are, π_θ has to find out.
Where the weights are worth too little, the next rollouts stay closer to the policy: α is bounded below what it was.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from servers import make_parser, two_servers
from transformers import AutoModelForCausalLM, AutoTokenizer

from dual_rollout import CoordinatorConfig, DualRollout, RolloutBatch
from dual_rollout.training.correction import corrected_weights
from dual_rollout.training.processes import fail_together

QUESTIONS = ("What is that?", "Name a colour.", "Say something.", "How are you?")


class ActorCritic(torch.nn.Module):
    """The policy, and a linear value head on its last hidden states."""

    def __init__(self, policy: Any):
        super().__init__()
        self.policy = policy
        self.value = torch.nn.Linear(policy.config.hidden_size, 1)
        torch.nn.init.zeros_(self.value.weight)

    def forward(self, batch: RolloutBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """log π_θ of the completion's tokens and the values of the states they were chosen in, `(B, T)` each."""
        ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
        mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = self.policy(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        states = slice(-batch.completion_ids.shape[1] - 1, -1)
        logprobs = output.logits[:, states].float().log_softmax(dim=-1)
        logprobs = logprobs.gather(2, batch.completion_ids.unsqueeze(2)).squeeze(2)
        return logprobs, self.value(output.hidden_states[-1][:, states].float()).squeeze(2)


def reward(texts: list[str], letters: str) -> torch.Tensor:
    """The share of wanted letters in each text, `(B,)`."""
    return torch.tensor([sum(letter in letters for letter in text) / max(len(text), 1) for text in texts])


def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and the targets of the values, `(B, T)`, of one reward at a completion's end."""
    last = mask.sum(dim=1) - 1
    advantages, running = torch.zeros_like(values), torch.zeros_like(rewards)
    for t in reversed(range(values.shape[1])):
        ends, goes_on = (last == t).float(), (last > t).float()
        next_value = values[:, t + 1] * goes_on if t + 1 < values.shape[1] else torch.zeros_like(rewards)
        running = rewards * ends + gamma * next_value - values[:, t] * mask[:, t] + gamma * lam * running * goes_on
        advantages[:, t] = running
    return advantages * mask, (advantages + values) * mask


def ppo_loss(model: Any, batch: RolloutBatch, old: dict[str, torch.Tensor], args: argparse.Namespace) -> torch.Tensor:
    """Clipped objective against the policy from before the update, times the weights of that policy over q*."""
    logprobs, values = model(batch)
    ratio = (logprobs - old["logprobs"]).exp()
    gain = torch.min(ratio * old["advantages"], ratio.clamp(1 - args.clip, 1 + args.clip) * old["advantages"])
    value_error = (values - old["returns"]).square()
    mask = batch.completion_mask
    # Both are expectations over what π_θ would have done, hence the weight on either.
    return (old["weights"] * (args.value_coef * value_error - gain) * mask).sum() / mask.sum()


def prepare(model: Any, batch: RolloutBatch, rewards: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """What stays fixed while a batch is trained on, `(B, T)` each."""
    mask = batch.completion_mask
    with torch.no_grad():
        logprobs, values = model(batch)
    advantages, returns = advantages_and_returns(rewards, values, mask, args.gamma, args.lam)
    # Of this process's own log π_θ, which is the policy even where the server holds it in another precision.
    weights = corrected_weights(logprobs - batch.logprobs_q, mask, "token_truncate", clip_max=args.weight_max)
    real, weighted = mask.bool(), weights * mask
    mean = (weighted * advantages).sum() / weighted.sum()
    deviation = ((weighted * (advantages - mean).square()).sum() / weighted.sum()).sqrt()
    advantages = torch.where(real, (advantages - mean) / (deviation + 1e-4), 0.0)
    return {"logprobs": logprobs, "advantages": advantages, "returns": returns, "weights": weights}


def send_weights(accelerator: Accelerator, model: Any, rollout: DualRollout, folder: Path, version: int) -> None:
    """π_θ's server gets the policy's weights through a folder that both see; a new one each time."""
    path = folder / f"weights-{version}"
    state = accelerator.get_state_dict(model)
    with fail_together():  # what fails in the main process must not leave the others waiting
        if accelerator.is_main_process:
            policy = {name.removeprefix("policy."): x for name, x in state.items() if name.startswith("policy.")}
            accelerator.unwrap_model(model).policy.save_pretrained(path, state_dict=policy)
            rollout.reload_policy_weights(str(path))
            shutil.rmtree(path)
    rollout.share_policy_weights(version)


def means(accelerator: Accelerator, batch: RolloutBatch) -> tuple[float, float]:
    """Mean α, and the effective share of samples (Σw)²/(nΣw²), over the tokens of all processes."""
    real = batch.completion_mask.bool()
    alpha, w = batch.alpha[real], batch.importance_weights[real]
    sums = accelerator.reduce(torch.stack([real.sum().float(), alpha.sum(), w.sum(), w.square().sum()]), "sum")
    n, alphas, first, second = sums.tolist()
    return alphas / n, first**2 / (n * second)


def next_alpha_max(alpha_max: float, alpha: float, ess: float, min_ess: float) -> float:
    """A tenth below the α that cost too much, or else a tenth more room than before."""
    return 0.9 * min(alpha_max, alpha) if ess < min_ess else min(1.0, alpha_max / 0.9)


def train(args: argparse.Namespace, theta_url: str, t_url: str, folder: Path) -> None:
    """Rollout, weights, update, again; before and after it, what π_θ gets by itself."""
    accelerator = Accelerator(cpu=args.cpu)
    if accelerator.num_processes > 1 and not (args.theta_url and args.t_url):
        raise ValueError("several processes share two servers: start them, and give --theta-url and --t-url")
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = ActorCritic(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    questions = [[{"role": "user", "content": question}] for question in QUESTIONS]
    hints = [[{"role": "user", "content": f"{question} Only use {args.letters}."}] for question in QUESTIONS]
    config = CoordinatorConfig(theta_url=theta_url, t_url=t_url, top_k=args.top_k, seed=args.seed, support="tail")
    shape = {"num_generations": args.num_generations, "max_tokens": args.max_tokens}

    def rewards_of(batch: RolloutBatch) -> torch.Tensor:
        texts = tokenizer.batch_decode(batch.completion_ids, skip_special_tokens=True)
        return reward(texts, args.letters).to(accelerator.device)

    def show_policy() -> None:
        with DualRollout(config, tokenizer) as alone, fail_together():
            rewards = rewards_of(alone.generate(questions, targets=["none"] * len(questions), **shape))
        accelerator.print(f"reward of the policy by itself: {accelerator.gather(rewards).mean():.3f}", flush=True)

    with DualRollout(config, tokenizer) as rollout:
        send_weights(accelerator, model, rollout, folder, version=0)
        show_policy()
        for iteration in range(args.iterations):
            with fail_together():
                batch = rollout.generate(questions, t_prompts=hints, **shape).to(accelerator.device)
            alpha, ess = means(accelerator, batch)
            alpha_max = next_alpha_max(rollout.config.alpha_max, alpha, ess, args.min_ess)
            rollout.config = replace(rollout.config, alpha_max=alpha_max)  # for the next rollout
            rewards = rewards_of(batch)
            old = prepare(model, batch, rewards, args)
            for _, first in itertools.product(range(args.epochs), range(args.minibatches)):
                rows = slice(first, None, args.minibatches)
                loss = ppo_loss(model, batch[rows], {name: value[rows] for name, value in old.items()}, args)
                optimizer.zero_grad()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
            send_weights(accelerator, model, rollout, folder, version=iteration + 1)
            under_q, weight = accelerator.gather(rewards).mean(), old["weights"][batch.completion_mask.bool()].mean()
            accelerator.print(
                f"{iteration:3d}  reward under q* {under_q:.3f}  α {alpha:.2f}  weight {weight:.2f}  ESS {ess:.2f}  "
                f"next α ≤ {alpha_max:.2f}  loss {loss:+.3f}",
                flush=True,
            )
        show_policy()


def main() -> None:
    options = make_parser(__doc__)
    options.add_argument("--letters", default="aeiou", help="what the reward counts")
    options.add_argument("--iterations", type=int, default=20)
    options.add_argument("--num-generations", type=int, default=8, help="completions per question")
    options.add_argument("--epochs", type=int, default=2, help="passes over a rollout")
    options.add_argument("--minibatches", type=int, default=2)
    options.add_argument("--learning-rate", type=float, default=1e-5)
    options.add_argument("--top-k", type=int, default=100)
    options.add_argument("--clip", type=float, default=0.2, help="ε of the ratio to the policy before the update")
    options.add_argument("--weight-max", type=float, default=3.0, help="bound on the weights π_θ/q*")
    options.add_argument("--min-ess", type=float, default=0.5, help="below this effective share of samples α goes down")
    options.add_argument("--value-coef", type=float, default=0.5)
    options.add_argument("--gamma", type=float, default=1.0)
    options.add_argument("--lam", type=float, default=0.95)
    options.add_argument("--max-grad-norm", type=float, default=1.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--cpu", action="store_true")
    args = options.parse_args()
    with two_servers(args) as (theta_url, t_url), tempfile.TemporaryDirectory() as folder:
        train(args, theta_url, t_url, Path(folder))


if __name__ == "__main__":
    main()
