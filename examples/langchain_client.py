"""LangChain: ``extra_body`` carries the ratio, ``token_usage`` the report."""

import os

from langchain_openai import ChatOpenAI

if __name__ == "__main__":
    chat = ChatOpenAI(
        base_url=os.environ.get("MIKV_URL", "http://localhost:8000/v1"),
        api_key="none",
        model=os.environ.get("MIKV_MODEL", "smollm2-135m-instruct"),
        temperature=0,
        max_tokens=32,
        extra_body={"kv_compression_ratio": 4.0},
    )
    answer = chat.invoke("What is the capital of France?")
    print(answer.content)
    print(answer.response_metadata["token_usage"]["kv_compression"])
