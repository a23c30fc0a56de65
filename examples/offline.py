"""Generate without a server, with a compression ratio per request."""

from pydoc_data.topics import topics

from vllm import SamplingParams

from mikv_vllm import LLM


def main() -> None:
    llm = LLM(max_model_len=4096, enforce_eager=True, kv_cache_memory_bytes=200 << 20)
    prompt = topics["try"] + "\n\nIn short, a try statement"
    for ratio in (1.0, 4.0):
        params = SamplingParams(
            temperature=0, max_tokens=40, extra_args={"kv_compression_ratio": ratio}
        )
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        report = output.kv_transfer_params["kv_compression"]
        print(f"ratio {ratio:g}: {report['kv_bytes']} bytes for {report['kv_tokens']} tokens")
        print(output.outputs[0].text.strip())


if __name__ == "__main__":
    main()
