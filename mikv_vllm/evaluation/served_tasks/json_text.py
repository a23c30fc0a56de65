"""JSON in the text of an answer."""

import json
import re
from typing import Any


class JsonError(ValueError):
    """A text contains no JSON object."""


def find_json(text: str) -> Any:
    """Return the object of a text: the first one that a ``{`` begins.

    Raises:
        JsonError: there is none.
    """
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            return decoder.raw_decode(text, match.start())[0]
        except ValueError:
            continue
    raise JsonError("the text contains no JSON object")


def follows_schema(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value follows a JSON schema."""
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema).is_valid(value)
