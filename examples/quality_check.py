"""Compare answers at some ratios with uncompressed answers, on prompts of your own.

This runs ``mikv-eval compare`` on a file of prompts, one JSON object a line.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

URL = os.environ.get("MIKV_URL", "http://localhost:8000/v1").removesuffix("/v1")

if __name__ == "__main__":
    prompts = [topics[name][:3000] for name in ("for", "while")]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.jsonl")
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        command = ["compare", "--url", URL, "--prompts", str(file), "--max-tokens", "32"]
        subprocess.run([sys.executable, "-m", "mikv_vllm.evaluation.cli", *command], check=True)
