"""A streamed answer. The last event contains the report."""

import os
from pydoc_data.topics import topics

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("MIKV_URL", "http://localhost:8000/v1"), api_key="none")
model = os.environ.get("MIKV_MODEL", "smollm2-135m-instruct")

if __name__ == "__main__":
    question = topics["with"][:4000] + "\n\nWhat does the with statement do?"
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"kv_compression_ratio": 3.0},
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            print(event.choices[0].delta.content, end="", flush=True)
        if report := getattr(event, "kv_compression", None):
            print(f"\n{report}")
