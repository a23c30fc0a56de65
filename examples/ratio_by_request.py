"""Requests with different ratios run at the same time; each answer reports what its cache takes."""

import os
from concurrent.futures import ThreadPoolExecutor
from pydoc_data.topics import topics

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("MIKV_URL", "http://localhost:8000/v1"), api_key="none")
model = os.environ.get("MIKV_MODEL", "smollm2-135m-instruct")


def report_at(ratio: float) -> dict:
    """The report of one request."""
    answer = client.completions.create(
        model=model,
        prompt=topics["import"][:6000],
        max_tokens=16,
        temperature=0,
        # With one salt, requests would share the blocks of the smallest ratio.
        extra_body={"kv_compression_ratio": ratio, "cache_salt": f"ratio {ratio}"},
    )
    return answer.kv_compression


if __name__ == "__main__":
    print("requested  achieved  tokens  bytes")
    with ThreadPoolExecutor() as pool:
        for report in pool.map(report_at, [1.0, 2.0, 3.0, 4.0, 5.0]):
            print(
                f"{report['requested_ratio']:9.1f} {report['achieved_ratio']:9.2f}"
                f" {report['kv_tokens']:7} {report['kv_bytes']:6}"
            )
