"""A tool call, and JSON that follows a schema, with a compressed cache.

The tool is named in the request, so that a model of any size calls it.
"""

import json
import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("MIKV_URL", "http://localhost:8000/v1"), api_key="none")
model = os.environ.get("MIKV_MODEL", "smollm2-135m-instruct")

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}

if __name__ == "__main__":
    messages = [{"role": "user", "content": "What is the weather like in Paris?"}]
    ratio = {"kv_compression_ratio": 4.0}
    tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=64,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        extra_body=ratio,
    )
    call = answer.choices[0].message.tool_calls[0].function
    print("tool call:", call.name, call.arguments)

    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
        extra_body=ratio,
    )
    print("JSON:", json.loads(answer.choices[0].message.content))
