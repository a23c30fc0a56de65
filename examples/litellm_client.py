"""LiteLLM: ``extra_body`` carries the ratio, ``usage`` the report."""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no download of prices

import litellm

if __name__ == "__main__":
    answer = litellm.completion(
        model="hosted_vllm/" + os.environ.get("MIKV_MODEL", "smollm2-135m-instruct"),
        api_base=os.environ.get("MIKV_URL", "http://localhost:8000/v1"),
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=32,
        extra_body={"kv_compression_ratio": 4.0},
    )
    print(answer.choices[0].message.content)
    print(answer.usage.kv_compression)
