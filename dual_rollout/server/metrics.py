"""Counters in Prometheus's format, under vLLM's names."""

from __future__ import annotations

from dual_rollout.server.scheduler import Scheduler


def metrics_text(scheduler: Scheduler, model_name: str, started: float) -> str:
    """The body of `/metrics`; `started`: when the process began, in seconds since 1970."""
    counters = scheduler.metrics
    labels = f'engine="0",model_name="{model_name}"'
    lines = []
    for kind, name, value in (
        ("gauge", "num_requests_running", scheduler.num_running),
        ("gauge", "num_requests_waiting", scheduler.num_waiting),
        ("counter", "prompt_tokens_total", counters.prompt_tokens),
        ("counter", "generation_tokens_total", counters.generation_tokens),
        ("counter", "prefix_cache_queries_total", counters.prefix_cache_queries),
        ("counter", "prefix_cache_hits_total", counters.prefix_cache_hits),
    ):
        lines += [f"# TYPE vllm:{name.removesuffix('_total')} {kind}", f"vllm:{name}{{{labels}}} {value}"]
    lines.append("# TYPE vllm:iteration_tokens_total histogram")
    lines.append(f'vllm:iteration_tokens_total_bucket{{{labels},le="+Inf"}} {counters.steps}')
    lines.append(f"vllm:iteration_tokens_total_count{{{labels}}} {counters.steps}")
    lines.append(f"vllm:iteration_tokens_total_sum{{{labels}}} {counters.computed_tokens}")
    lines.append("# TYPE vllm:request_success counter")
    for reason, count in counters.finished.items():
        lines.append(f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}')
    lines += ["# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {started}"]
    return "\n".join(lines) + "\n"
