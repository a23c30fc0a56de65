"""Claims of the MiKV paper (arXiv:2402.18096), checked on the embedded model."""

import pytest
import torch

from mikv_vllm.evaluation.methods import H2O, Balanced, MiKV, PaperMiKV, PerToken
from mikv_vllm.evaluation.reference_model import ReferenceModel, divergence
from mikv_vllm.evaluation.tasks import windows_of


@pytest.fixture(scope="module")
def compare(model_path):
    """Divergence and accuracy of a method on a task, over two prompts of 512 tokens."""
    model = ReferenceModel(model_path)
    runs = {}
    for task in ("text", "copying"):
        runs[task] = []
        for window in windows_of(task, model.tokenizer, 2, 512, 64):
            prefill = model.prefill(window.prompt)
            tokens = window.inputs
            wanted = torch.tensor(window.continuation)
            reference = model.continue_with(prefill, tokens, None).log_probs
            runs[task].append((prefill, tokens, wanted, reference))

    def measure(task, method):
        apart = accuracy = 0.0
        for prefill, tokens, wanted, reference in runs[task]:
            mine = model.continue_with(prefill, tokens, method).log_probs
            apart += divergence(reference, mine) / 2
            accuracy += (mine.argmax(-1) == wanted).float().mean().item() / 2
        return apart, accuracy

    return measure


def test_a_passage_is_lost_if_tokens_are_dropped_and_kept_at_three_bits(compare):
    _, uncompressed = compare("copying", None)
    _, dropped = compare("copying", H2O(5.0))
    _, kept = compare("copying", PaperMiKV(3, 16))
    assert uncompressed > 0.9
    assert dropped < 0.3
    assert kept > 0.7


def test_the_balancer_halves_divergence_at_two_bits(compare):
    plain, _ = compare("text", PerToken(2))
    balanced, _ = compare("text", Balanced(2))
    assert balanced < 0.5 * plain


def test_important_tokens_need_more_bits_than_other_tokens(compare):
    high, _ = compare("text", PaperMiKV(2, 16))
    low, _ = compare("text", PaperMiKV(2, 16, inverted=True))
    assert high < 0.7 * low


def test_this_package_needs_fewer_bytes_for_less_divergence(compare):
    theirs, _ = compare("text", PaperMiKV(4, 8))
    ours, _ = compare("text", MiKV(3.5))
    assert ours < theirs
