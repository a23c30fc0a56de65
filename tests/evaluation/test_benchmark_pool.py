"""Size of the pools of ``python -m benchmarks``."""

import argparse

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.pool import ENGINE_BYTES, GIB, SPARE, pool_bytes, token_bytes

DEFAULTS = vars(benchmarks.parser().parse_args([]))


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**DEFAULTS, **changes})


def test_the_default_pools_fit_a_machine_with_24_gb():
    tokens = benchmarks.most_tokens(arguments())
    available = int(0.9 * 24e9)
    size = pool_bytes(tokens, 3, available)
    assert tokens * token_bytes() <= size
    assert 3 * (size + ENGINE_BYTES) <= available


def test_a_small_batch_gets_a_small_pool():
    assert pool_bytes(10_000, 3, 1000 * GIB) == round(SPARE * 10_000 * token_bytes())


def test_a_given_size_is_used():
    assert pool_bytes(10_000, 3, 100 * GIB, gib=5.5) == 5.5 * GIB


@pytest.mark.parametrize(
    ("tokens", "available", "gib", "message"),
    [
        (128_000, 12 * GIB, None, "3 engines with pools of 2.75 GiB do not fit into 12.0 GiB"),
        (10_000, 4 * GIB, None, "give smaller --contexts, --sequences or --pool-gib"),
        (10_000, 20 * GIB, 8.0, "3 engines with pools of 8 GiB do not fit into 20.0 GiB"),
        (128_000, 20 * GIB, 1.0, "--pool-gib 1 is too small for 128000 .* --pool-gib 2.75 or more"),
    ],
)
def test_too_little_memory_is_one_sentence_that_names_a_flag(tokens, available, gib, message):
    with pytest.raises(ValueError, match=message):
        pool_bytes(tokens, 3, available, gib)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": [512, 9000]}, "--contexts: 9000 tokens is not between 49 and 8192"),
        ({"contexts": [48]}, "--contexts: 48 tokens is not between 49 and 8192"),
        ({"prompt": 8192}, "--prompt: 8192 tokens is not between 1 and 8191"),
    ],
)
def test_wrong_lengths_are_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.most_tokens(arguments(**changes))
