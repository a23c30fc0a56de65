"""OpenAI's Python client: ``extra_body`` adds the ratio to the request."""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("MIKV_URL", "http://localhost:8000/v1"), api_key="none")
model = os.environ.get("MIKV_MODEL", "smollm2-135m-instruct")

if __name__ == "__main__":
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=32,
        extra_body={"kv_compression_ratio": 4.0},
    )
    print(answer.choices[0].message.content)
    print(answer.kv_compression)
