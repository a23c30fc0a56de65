import os, sys, time
os.environ["HF_HUB_OFFLINE"]="1"; os.environ["VLLM_LOGGING_LEVEL"]="ERROR"
def main():
    import mikv_vllm; print(mikv_vllm.__file__)
    from mikv_vllm import LLM
    from vllm import SamplingParams
    from mikv_vllm.models import embedded_model
    from mikv_vllm.evaluation.windows import topics_text
    llm = LLM(model=str(embedded_model()), enforce_eager=True, kv_cache_memory_bytes=1<<28, max_model_len=8192)
    tok = llm.get_tokenizer()
    ids = tok(topics_text()).input_ids
    prompts = [{"prompt_token_ids": ids[i*3000:i*3000+n]} for i,n in enumerate((300, 700, 1024, 2100))]
    outs={}
    for r in (1.0,2.0,4.0,5.0):
        t=time.time()
        o = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, extra_args={"kv_compression_ratio": r}), use_tqdm=False)
        outs[r]=[x.outputs[0].token_ids for x in o]
        for x in o:
            same=sum(a==b for a,b in zip(x.outputs[0].token_ids, outs[1.0][o.index(x)]))
            first=next((i for i,(a,b) in enumerate(zip(x.outputs[0].token_ids, outs[1.0][o.index(x)])) if a!=b),300)
            print(r, len(x.prompt_token_ids), "first diff", first, (x.kv_transfer_params or {}).get("kv_compression"))
        print(r, round(time.time()-t,1),"s")
if __name__=="__main__": main()
