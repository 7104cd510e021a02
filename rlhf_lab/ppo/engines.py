"""The engine that samples PPO's rollouts, by the settings."""

from __future__ import annotations

from .config import PPOConfig
from .executor import Executor
from .logprobs import AnyModel
from .losses import StopTokens
from .rollout_engines import ContinuousBatching, OwnLoop, RolloutEngine, Sampling


def make_engine(
    args: PPOConfig,
    policy: AnyModel,
    executor: Executor,
    stop_token_ids: StopTokens,
    pad_token_id: int,
    processes: int = 1,
) -> RolloutEngine:
    """The engine that the settings ask for. Raises ValueError, one line, where its package is
    missing or it cannot run this policy."""
    stops = () if stop_token_ids is None else stop_token_ids
    stops = (stops,) if isinstance(stops, int) else tuple(stops)
    sampling = Sampling(args.response_length, stops, pad_token_id, args.temperature)
    if args.engine and (shard := _sharded(policy)):
        raise ValueError(f"{args.engine} samples with whole weights, and {shard} is sharded")
    if args.use_vllm:
        from .vllm_engine import VLLMEngine

        return VLLMEngine(policy, sampling, args, processes)
    if args.use_transformers_continuous_batching:
        return ContinuousBatching(policy, sampling, args.transformers_continuous_batching_config)
    return OwnLoop(policy, sampling, executor)


def _sharded(policy: AnyModel) -> str | None:
    """The first parameter of which this process has a part only, by FSDP2 or ZeRO-3."""
    for name, parameter in policy.named_parameters():
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
            return str(name)
    return None
