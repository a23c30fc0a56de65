"""LangChain: ``extra_body`` carries the ratio."""

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
    print(chat.invoke("What is the capital of France?").content)
