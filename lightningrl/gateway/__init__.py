"""An OpenAI-compatible server that records an agent's calls token by token: the agent does not change.

An agent gets `base_url` and `api_key`. The key names its rollout; the model name may carry a role (`policy:writer`).
"""

from lightningrl.gateway.errors import GatewayError
from lightningrl.gateway.server import Gateway
from lightningrl.gateway.sessions import CallRecord, GatewaySettings, SamplingOverrides

__all__ = ["CallRecord", "Gateway", "GatewayError", "GatewaySettings", "SamplingOverrides"]
