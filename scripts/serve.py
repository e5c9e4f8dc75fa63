"""Serves a policy as an OpenAI engine: chat completions, completions with token ids and log-probs, responses, new weights on request.

    python scripts/serve.py --policy=run/policy --port=8000
    python -m lightningrl.fit --engine=http://127.0.0.1:8000 --engine_reload=lightningrl --policy=run/policy …

A request needs the key in LIGHTNINGRL_ENGINE_KEY. Without one the server listens on loopback only, and lets everybody in.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from pathlib import Path

from lightningrl import flags
from lightningrl.config import setting
from lightningrl.errors import UserError, settings_of_a_person
from lightningrl.gateway import GatewaySettings
from lightningrl.gateway.engine import EngineService, serve
from lightningrl.gateway.rendering import Renderer
from lightningrl.policy import Policy, load_policy
from lightningrl.sampler.engine import PolicySampler, SamplerSettings
from lightningrl.sampler.remote import KEY


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    policy: str = setting("", "folder of the policy, such as OUT/policy")
    host: str = setting("127.0.0.1", "address to listen on; other than loopback only with a key")
    port: int = setting(8000, "port to listen on; 0: any free one")
    api_key: str | None = setting(None, f"what clients send as their API key; none: {KEY}, which other users of this machine can't see")
    model: str = setting("policy", "the model's name")
    slots: int = setting(32, "conversations decoded at once")
    context_length: int = setting(256, "tokens of a prompt and its response, at most")
    prefix_cache_mb: float = setting(64.0, "memory for beginnings of prompts that were read; 0: none is kept")
    deterministic: bool = setting(True, "a request is answered alike to the last bit whatever else is running; off: shapes follow the load")
    max_tokens: int = setting(256, "of a response to a request that does not say")


def main() -> None:
    config = flags.config_from_flags(ServeConfig)
    api_key = config.api_key or os.environ.get(KEY) or None
    if not config.policy:
        raise UserError("give --policy=DIR, the folder of a policy such as OUT/policy")
    if api_key is None and not is_loopback(config.host):
        raise UserError(f"on {config.host} everybody could reach this server: set {KEY} to a key, or listen on 127.0.0.1")
    policy = without_critic(load_policy(Path(config.policy)))
    with settings_of_a_person():
        settings = SamplerSettings(
            slots=config.slots,
            context_length=config.context_length,
            prefix_cache_mb=config.prefix_cache_mb,
            deterministic=config.deterministic,
        )
        sampler = PolicySampler(policy.params, policy.config, policy.tokenizer, settings, end_ids=policy.end_ids)

    def reload(folder: str, version: int) -> None:
        new = without_critic(load_policy(Path(folder)))
        if new.config != policy.config:
            raise UserError(f"the policy in {folder} has another shape than the one in {config.policy}: start a server of its own for it")
        sampler.set_params(new.params, version)

    gateway = GatewaySettings(host=config.host, port=config.port, model=config.model, default_max_tokens=config.max_tokens)
    service = EngineService(sampler, Renderer(policy.tokenizer), gateway, api_key)
    with sampler:
        serve(service, reload, lambda url: print(f"serving {config.policy} as {config.model} at {url}", flush=True))


def without_critic(policy: Policy) -> Policy:
    """A policy that only samples; one with a value head takes the place of one without, and back."""
    shape = dataclasses.replace(policy.config, value_head=False)
    return dataclasses.replace(policy, config=shape, params={k: v for k, v in policy.params.items() if k != "value_head"})


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    flags.define_flags(ServeConfig)
    flags.run_app(main)
