"""The sampler gives a request the same tokens whatever else is running, and the trainer's log-probs."""

from __future__ import annotations

import concurrent.futures
import dataclasses

import jax
import numpy as np
import pytest

from lightningrl.model.params import init_params
from lightningrl.packing.rows import RowSettings, pack
from lightningrl.sampler.engine import PolicySampler, SamplerSettings, shape_for
from lightningrl.sampler.prefix_cache import PrefixCache
from lightningrl.sampler.request import Request
from lightningrl.sampler.steps import TurnShape
from lightningrl.train import score_edges
from lightningrl.types import Completion, SamplingParams, Transition
from tests.tiny import tiny_policy

SETTINGS = SamplerSettings(slots=8, context_length=128, prefill_rows=2, prefill_runs=3, chunk=16, steps=3)


def sampler(settings: SamplerSettings = SETTINGS, seed: int = 0) -> PolicySampler:
    policy = tiny_policy(seed)
    return PolicySampler(policy.params, policy.config, policy.tokenizer, settings)


def requests(count: int, vocabulary: int = 300) -> list[tuple[np.ndarray, SamplingParams, tuple[int, int]]]:
    rng = np.random.default_rng(0)
    kinds = [
        SamplingParams(20),
        SamplingParams(12, temperature=0.7),
        SamplingParams(8, temperature=0.0),
        SamplingParams(9, top_p=0.8, top_k=7),
    ]
    return [
        (rng.integers(7, vocabulary, rng.integers(1, 70)).astype(np.int32), kinds[i % 4], (i, int(rng.integers(2**32))))
        for i in range(count)
    ]


def run(engine: PolicySampler, work: list, concurrency: int) -> list[Completion]:
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda r: engine.submit(*r).result(timeout=60), work))


@pytest.mark.slow
def test_other_tokens_may_end_a_response_too() -> None:
    policy, work = tiny_policy(), requests(6)
    with sampler() as engine:
        long = run(engine, work, 3)
    ends = {int(c.token_ids[2]) for c in long}  # what was said third
    with PolicySampler(policy.params, policy.config, policy.tokenizer, SETTINGS, end_ids=tuple(ends)) as engine:
        for cut, whole in zip(run(engine, work, 3), long, strict=True):
            first = next(i for i, token in enumerate(whole.token_ids) if token in ends)
            np.testing.assert_array_equal(cut.token_ids, whole.token_ids[: first + 1])
            assert cut.finish_reason == "stop"


def agents(count: int) -> list[list[tuple[np.ndarray, SamplingParams, tuple[int, int]]]]:
    """Calls of some agents, one after the other: groups of four share a first prompt, and each goes on in its own way."""
    rng = np.random.default_rng(1)
    firsts = [rng.integers(7, 300, rng.integers(20, 60)) for _ in range(-(-count // 4))]
    work = []
    for i in range(count):
        prompt, calls = firsts[i // 4], []
        for turn in range(3):
            calls.append((prompt.astype(np.int32), SamplingParams(6, temperature=0.8), (i, turn)))
            prompt = np.concatenate([prompt, rng.integers(7, 300, rng.integers(1, 20))])
        work.append(calls)
    return work


def converse(engine: PolicySampler, work: list, concurrency: int) -> list[Completion]:
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        return [c for calls in pool.map(lambda calls: [engine.submit(*call).result(60) for call in calls], work) for c in calls]


def assert_same(one: list[Completion], other: list[Completion]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert a.finish_reason == b.finish_reason


def sampler_with_blocks(blocks: int | None) -> PolicySampler:
    """One whose prefix cache has so many blocks, in a pool of the usual size: the compiled program is the same."""
    engine = sampler()
    if blocks is not None:
        engine._prefixes = PrefixCache(blocks, SETTINGS.chunk)
    return engine


@pytest.mark.slow
def test_same_bits_at_any_concurrency_with_the_cache_on_off_and_full() -> None:
    work, others = agents(64), requests(40)
    results, hits = [], []
    for blocks, concurrency in ((None, 1), (None, 7), (None, 64), (0, 64), (5, 64), (12, 7)):
        with sampler_with_blocks(blocks) as engine:
            results.append(converse(engine, work, concurrency) + run(engine, others, concurrency))
            hits.append(engine.counts.cache_hit_ratio)
            assert len(engine._prefixes) <= engine._prefixes.blocks
    with sampler(dataclasses.replace(SETTINGS, prefix_cache_mb=0)) as engine:
        results.append(converse(engine, work, 64) + run(engine, others, 64))
        assert engine.counts.cache_hit_ratio == 0
    for other in results[1:]:
        assert_same(results[0], other)
    assert hits[3] == 0 < min(hits[4], hits[5]) < hits[0]  # off; something was given up; everything was kept
    assert hits[0] > 0.6


@pytest.mark.slow
def test_identical_prompts_that_arrive_together_are_read_once() -> None:
    prompt = np.arange(10, 75, dtype=np.int32)  # four blocks, all full
    with sampler() as engine:
        futures = [engine.submit(prompt, SamplingParams(3), (i, 0)) for i in range(8)]
        done = [f.result(60) for f in futures]
        assert engine.counts.prompt_tokens == 8 * 64
        assert engine.counts.cached_tokens == 7 * 64
        assert len(engine._prefixes) == 4
        beginning = engine.submit(prompt[:41], SamplingParams(3), (0, 1)).result(60)  # two blocks and a half
        assert engine.counts.cached_tokens == 7 * 64 + 40
    assert len({c.token_ids.tobytes() for c in done}) > 1
    with sampler_with_blocks(0) as engine:
        assert_same([beginning], [engine.submit(prompt[:41], SamplingParams(3), (0, 1)).result(60)])


@pytest.mark.slow
def test_without_determinism_shapes_follow_the_load_and_numbers_agree_to_rounding() -> None:
    settings = dataclasses.replace(SETTINGS, slots=4, context_length=512, chunk=64)
    work = [(np.arange(10, 10 + n, dtype=np.int32), SamplingParams(5, temperature=0.0), (0, n)) for n in (40, 280)]
    with sampler(settings) as engine:
        exact = run(engine, work, 1)
    with sampler(dataclasses.replace(settings, deterministic=False)) as engine:
        for a, b in zip(exact, run(engine, work, 1), strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=2e-5)


def test_shapes_that_follow_the_load() -> None:
    shape = TurnShape(slots=8, group=4, steps=8, chunk=64, rows=4, pieces=8, loads=64, length=1024)
    short, long = (Request(np.zeros(n, np.int32), SamplingParams(9), (0, 0), None) for n in (100, 600))
    assert (shape_for(shape, [(3, short)]).group, shape_for(shape, [(3, short), (5, short)]).group) == (1, 4)
    lengths = [shape_for(shape, active).length for active in ([], [(0, short)], [(0, short), (1, long)])]
    assert lengths == [256, 256, 1024]


@pytest.mark.slow
def test_logprobs_are_those_of_the_trainer() -> None:
    work = [(p, s, k) for p, s, k in requests(24) if not s.truncated and s.temperature > 0]
    with sampler() as engine:
        done = run(engine, work, 8)
    policy = tiny_policy()
    transitions = [
        Transition(prompt, c.token_ids, c.logprobs, params.temperature, 0, "policy", 0)
        for (prompt, params, _), c in zip(work, done, strict=True)
    ]
    packed = pack(transitions, range(len(work)), RowSettings((64, 128), tokens=512, edges=256))
    for i, rows in enumerate(packed.rows):
        edges = jax.tree.map(lambda x, i=i: x[i], packed.edges)
        scores = score_edges(policy.params, policy.config, rows, edges)
        # float32 rounding of two differently shaped programs, on log-probs of up to 10 nats
        np.testing.assert_allclose(np.asarray(scores.logp)[edges.mask], edges.behaviour_logp[edges.mask], rtol=0, atol=2e-5)


def test_greedy_is_the_likeliest_token_and_ignores_the_key() -> None:
    prompt = np.arange(10, 40, dtype=np.int32)
    with sampler() as engine:
        a = engine.submit(prompt, SamplingParams(10, temperature=0.0, top_logprobs=3), (1, 2)).result(60)
        b = engine.submit(prompt, SamplingParams(10, temperature=0.0), (3, 4)).result(60)
    np.testing.assert_array_equal(a.token_ids, b.token_ids)
    np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert [top[0][0] for top in a.top] == a.token_ids.tolist()
    assert [top[0][1] for top in a.top] == pytest.approx(a.logprobs.tolist(), abs=1e-6)


@pytest.mark.slow
def test_samples_follow_the_distribution() -> None:
    """2,000 samples of one token: every likely token's frequency within five standard errors of its probability."""
    prompt = np.array([20, 21, 22], np.int32)
    count = 2000
    with sampler() as engine:
        futures = [engine.submit(prompt, SamplingParams(1, temperature=0.5), (i, 7)) for i in range(count)]
        done = [f.result(120) for f in futures]
    probability = {int(c.token_ids[0]): float(np.exp(c.logprobs[0])) for c in done}
    seen = {t: np.mean([c.token_ids[0] == t for c in done]) for t in probability}
    likely = [t for t, p in probability.items() if p > 0.01]
    assert likely
    for t in likely:
        p = probability[t]
        assert abs(seen[t] - p) < 5 * np.sqrt(p * (1 - p) / count)


def test_top_k_and_top_p_keep_what_they_say() -> None:
    prompt = np.array([30, 31, 32, 33], np.int32)
    with sampler() as engine:
        likeliest = engine.submit(prompt, SamplingParams(1, top_logprobs=20), (0, 0)).result(60).top[0]
        top_k = {int(engine.submit(prompt, SamplingParams(1, top_k=3), (i, 1)).result(60).token_ids[0]) for i in range(60)}
        mass = np.cumsum([np.exp(lp) for _, lp in likeliest])
        p = float((mass[3] + mass[4]) / 2)  # the nucleus is then exactly the five likeliest
        top_p = {int(engine.submit(prompt, SamplingParams(1, top_p=p), (i, 1)).result(60).token_ids[0]) for i in range(60)}
    assert top_k <= {t for t, _ in likeliest[:3]} and len(top_k) > 1
    assert top_p <= {t for t, _ in likeliest[:5]} and len(top_p) > 1


def test_stop_string_ends_the_response_and_is_cut_from_its_text() -> None:
    prompt = np.arange(50, 80, dtype=np.int32)
    with sampler() as engine:
        whole = engine.submit(prompt, SamplingParams(30), (5, 6)).result(60)
        assert len(whole.text) > 8
        stop = whole.text[4:6]
        cut = engine.submit(prompt, SamplingParams(30, stop=(stop,)), (5, 6)).result(60)
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.find(stop)]
    np.testing.assert_array_equal(cut.token_ids, whole.token_ids[: len(cut.token_ids)])
    assert len(cut.logprobs) == len(cut.token_ids) <= len(whole.token_ids)


def test_max_tokens_and_context_limit_end_with_length() -> None:
    with sampler() as engine:
        c = engine.submit(np.arange(10, 20, dtype=np.int32), SamplingParams(3), (0, 1)).result(60)
        long = engine.submit(np.arange(10, 130, dtype=np.int32), SamplingParams(100), (0, 1)).result(60)
        with pytest.raises(ValueError, match="does not fit a context of 128"):
            engine.submit(np.zeros(128, np.int32), SamplingParams(1), (0, 1))
    assert (len(c.token_ids), c.finish_reason) == (3, "length") or c.finish_reason == "stop"
    assert len(long.token_ids) <= 8


def test_cancelled_requests_free_their_slots() -> None:
    with sampler() as engine:
        futures = [engine.submit(p, SamplingParams(60), k) for p, _, k in requests(40)]
        for future in futures[::2]:
            future.cancel()
        for future in futures[1::2]:
            future.result(60)
        assert engine.submit(np.array([9, 8], np.int32), SamplingParams(2), (0, 0)).result(60).token_ids.size > 0
        assert engine.queue_length == 0


def test_new_weights_are_used_and_named_and_no_prefix_outlives_the_old_ones() -> None:
    prompt = np.arange(10, 40, dtype=np.int32)
    new = init_params(tiny_policy().config, jax.random.key(9))
    with sampler() as engine:
        before = engine.submit(prompt, SamplingParams(20), (1, 1)).result(60)
        engine.set_params(new, 5)
        after = engine.submit(prompt, SamplingParams(20), (1, 1)).result(60)
    assert (before.policy_version, after.policy_version) == (0, 5)
    assert not np.array_equal(before.logprobs, after.logprobs)
    policy = tiny_policy()
    with PolicySampler(new, policy.config, policy.tokenizer, SETTINGS) as engine:
        assert_same([after], [engine.submit(prompt, SamplingParams(20), (1, 1)).result(60)])


def test_requests_in_flight_go_on_under_new_weights() -> None:
    new = init_params(tiny_policy().config, jax.random.key(9))
    with sampler() as engine:
        futures = [engine.submit(p, SamplingParams(40), k) for p, _, k in requests(30)]
        futures[0].result(60)
        engine.set_params(new, 1)
        assert {f.result(60).policy_version for f in futures} <= {0, 1}
        assert futures[-1].result(60).policy_version == 1


def test_stopping_fails_what_is_waiting() -> None:
    engine = sampler().start()
    futures = [engine.submit(p, SamplingParams(60), k) for p, _, k in requests(30)]
    engine.stop()
    assert all(f.done() for f in futures)
    with pytest.raises(RuntimeError, match="not running"):
        engine.submit(np.array([9], np.int32), SamplingParams(1), (0, 0))


def test_tokens_arrive_as_they_are_sampled() -> None:
    parts: list[np.ndarray] = []
    with sampler() as engine:
        done = engine.submit(np.arange(10, 40, dtype=np.int32), SamplingParams(20), (1, 1), lambda ids, lps: parts.append(ids)).result(60)
    np.testing.assert_array_equal(np.concatenate(parts), done.token_ids)


def test_no_cache_and_too_small_a_cache_are_settings() -> None:
    policy, megabyte = tiny_policy(), 2**20
    block = 2 * 2 * policy.config.num_kv_heads * policy.config.head_dim * 4 * SETTINGS.chunk  # keys and values, two layers, 4 bytes
    for megabytes, blocks in ((0, 0), (0.9 * block / megabyte, 0), (3.5 * block / megabyte, 3)):
        assert sampler(dataclasses.replace(SETTINGS, prefix_cache_mb=megabytes))._prefixes.blocks == blocks


def test_counts_add_up_and_read_as_prometheus_text() -> None:
    work = requests(20)
    with sampler() as engine:
        done = run(engine, work, 10)
        counts, text = dataclasses.replace(engine.counts), engine.metrics_text()
        run(engine, work, 10)
        more = engine.counts.since(counts)
    assert counts.requests == counts.completed == 20
    assert counts.sampled_tokens == sum(len(c.token_ids) for c in done)
    assert counts.prompt_tokens == sum(len(p) - 1 for p, _, _ in work) == more.prompt_tokens
    assert counts.cached_tokens == 0 and more.cache_hit_ratio == 1.0
    assert counts.queue_seconds >= 0 < counts.busy_seconds
    values = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
    assert float(values["lightningrl_sampler_sampled_tokens_total"]) == counts.sampled_tokens
    assert float(values["lightningrl_sampler_slots"]) == 8
    for name in values:
        assert f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n" in text
