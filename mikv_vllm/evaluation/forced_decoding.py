"""Force an engine to generate a known text, and compare its predictions with a stored run.

A logits processor of vLLM runs in the worker, where it has the logits of the whole vocabulary. The
reference run stores its log-probabilities in files. Other runs are compared with these files in the
worker, so no logits have to be sent to another process.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logits_process import LogitsProcessor as RequestLogitsProcessor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

COLUMNS = 4
"""Numbers per token in :attr:`Forced.measured`."""
FIELD = "forced_decoding"
"""Entry of ``SamplingParams.extra_args`` that carries a :class:`Forced`."""


@dataclass(frozen=True)
class Forced:
    """The forced continuation of one request.

    Attributes:
        tokens: token ids that the request generates.
        log_probs: file of float32 log-probabilities ``[tokens, vocabulary]``.
        measured: file for the comparison, float64 ``[tokens, 4]``. The columns are the KL
            divergence from ``log_probs`` in nats, whether the likeliest token is the same, the
            log-probability of the forced token, and whether the forced token is the likeliest. If
            None, the request is a reference: it writes ``log_probs``.
    """

    tokens: list[int]
    log_probs: str
    measured: str | None

    def sampling_params(self, **extra_args: Any) -> SamplingParams:
        """Return the parameters of the request, with further ``extra_args``."""
        return SamplingParams(
            temperature=0.0,
            max_tokens=len(self.tokens),
            ignore_eos=True,
            extra_args={FIELD: asdict(self), **extra_args},
        )


class ForcedDecoding(AdapterLogitsProcessor):
    """Logits processor that forces the tokens of requests with a :class:`Forced`.

    Use it as ``LLM(logits_processors=[ForcedDecoding])``.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        settings = (params.extra_args or {}).get(FIELD)
        if settings is None:
            return None
        forced = Forced(**settings)

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            step = len(output_ids)
            if get_tensor_model_parallel_rank() == 0:
                _store(forced, step, logits.float().log_softmax(-1))
            only = torch.full_like(logits, -torch.inf)
            only[forced.tokens[step]] = 0.0
            return only

        return force


def _store(forced: Forced, step: int, log_probs: torch.Tensor) -> None:
    """Write the row of one token, float32 ``[vocabulary]``, or its comparison."""
    rows = np.memmap(
        forced.log_probs,
        dtype=np.float32,
        mode="r+" if Path(forced.log_probs).exists() else "w+",
        shape=(len(forced.tokens), len(log_probs)),
    )
    if forced.measured is None:
        rows[step] = log_probs.numpy()
        return
    reference = torch.from_numpy(np.array(rows[step]))
    divergence = (reference.double().exp() * (reference.double() - log_probs.double())).sum()
    measured = np.memmap(
        forced.measured,
        dtype=np.float64,
        mode="r+" if Path(forced.measured).exists() else "w+",
        shape=(len(forced.tokens), COLUMNS),
    )
    likeliest, token = log_probs.argmax(), forced.tokens[step]
    measured[step] = (
        divergence.item(),
        float(reference.argmax() == likeliest),
        log_probs[token].item(),
        float(likeliest == token),
    )
