"""Clients that people use, each with a ratio and its report, against one real server.

The server's default ratio is 1, so a request that does not set a ratio gets vLLM's own answer.
"""

import pytest

from .client_calls import CLIENTS
from .serving import RunningServer

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)]

FLAGS = [
    *("--max-model-len", "4096", "--kv-cache-memory-bytes", str(300 << 20)),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_path):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with RunningServer(FLAGS, log, env={"VLLM_ENABLE_COHERE_API": "1"}) as running:
        yield running


def compressed_so_far(server: RunningServer) -> int:
    """Requests that were compressed, or that found compressed blocks."""
    operations = server.client.get("/mikv/stats").json()["operations"]
    return operations["compress"] + operations["reuse"]


def test_it_sets_a_ratio_and_reads_the_report(server, client):
    before = compressed_so_far(server)
    report = client.ask(server.url, {"kv_compression_ratio": 4.0}).report
    assert compressed_so_far(server) == before + 1
    if client.keeps_report:
        assert report["requested_ratio"] == 4.0
        assert report["achieved_ratio"] > 2
        assert report["low_tokens"] > 0
    else:
        assert report is None


def test_a_wrong_ratio_is_refused_in_a_sentence(server, client):
    said = r"kv.compression.ratio is '?99'?, which is out of range"
    with pytest.raises(client.error, match=said):
        client.ask(server.url, {"kv_compression_ratio": 99})


def test_ratio_1_changes_nothing(server, client):
    before = compressed_so_far(server)
    stock = client.ask(server.url, {})
    same = client.ask(server.url, {"kv_compression_ratio": 1})
    assert compressed_so_far(server) == before
    assert same.text == stock.text
    assert stock.report is None
    if client.keeps_report:
        assert (same.report["requested_ratio"], same.report["low_tokens"]) == (1.0, 0)
