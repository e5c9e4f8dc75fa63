"""Every call is answered by its role's weights, as by a sampler of those alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightningrl.sampler.by_role import RoleSampler
from lightningrl.sampler.engine import PolicySampler, SamplerSettings
from lightningrl.types import SamplingParams
from tests.small_step import CONFIG, params

SETTINGS = SamplerSettings(slots=4, context_length=64, prefill_rows=4, chunk=16, steps=4)
PROMPT = np.arange(20, 32, dtype=np.int32)


class Tokens:
    eos_token_id = -1

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return ""


def make(weights: Any) -> PolicySampler:
    return PolicySampler(weights, CONFIG, Tokens(), SETTINGS)


@pytest.mark.slow
def test_a_call_goes_to_the_weights_of_its_role() -> None:
    weights = {"reader": params(1), "writer": params(2)}
    alone = {}
    for seed in range(4):
        with make(params(seed)) as sampler:
            alone[seed] = sampler.submit(PROMPT, SamplingParams(8), (3, 4)).result(60)
    assert len({completion.token_ids.tobytes() for completion in alone.values()}) == 4
    with RoleSampler(make, weights, params(0)) as sampler:
        asked = {role: sampler.submit(PROMPT, SamplingParams(8, role=role), (3, 4)) for role in ("reader", "writer", "judge", "")}
        for role, seed in {"reader": 1, "writer": 2, "judge": 0, "": 0}.items():
            done = asked[role].result(60)
            np.testing.assert_array_equal(done.token_ids, alone[seed].token_ids)
            np.testing.assert_array_equal(done.logprobs, alone[seed].logprobs)
            assert done.policy_version == 0
        values = dict(line.rsplit(" ", 1) for line in sampler.metrics_text().splitlines() if not line.startswith("#"))
        requests = {role: float(values[f'lightningrl_sampler_requests_total{{role="{role}"}}']) for role in ("reader", "writer", "*")}
        assert requests == {"reader": 1.0, "writer": 1.0, "*": 2.0}
        assert sampler.metrics_text().count("# TYPE lightningrl_sampler_requests_total counter\n") == 1
        assert sampler.context_length == 64 and sampler.queue_length == 0 and sampler.busy_seconds > 0
        sampler.set_params({"reader": params(3), "writer": params(2)}, 5)
        again = {role: sampler.submit(PROMPT, SamplingParams(8, role=role), (3, 4)).result(60) for role in ("reader", "judge")}
        assert [completion.policy_version for completion in again.values()] == [5, 5]
        np.testing.assert_array_equal(again["reader"].token_ids, alone[3].token_ids)
        np.testing.assert_array_equal(again["judge"].token_ids, alone[0].token_ids)
        with pytest.raises(ValueError, match=r"there are samplers for the roles \['reader', 'writer'\], but weights for \['reader'\]"):
            sampler.set_params({"reader": params(3)}, 6)
    with pytest.raises(RuntimeError, match="not running"):
        sampler.submit(PROMPT, SamplingParams(8, role="reader"), (3, 4))
