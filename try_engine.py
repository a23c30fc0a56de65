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
    def run(prompts, n=40, r=4.0, **kw):
        t=time.time()
        o = llm.generate([{"prompt_token_ids": p} for p in prompts], SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, extra_args={"kv_compression_ratio": r}, **kw), use_tqdm=False)
        for x in o:
            print(r, len(x.prompt_token_ids), "cached", x.num_cached_tokens, {k:v for k,v in (x.kv_transfer_params or {}).get("kv_compression").items() if k in ("achieved_ratio","kv_tokens","reused_tokens","high_tokens")}, tok.decode(x.outputs[0].token_ids[:12]).replace("\n"," "))
        print(round(time.time()-t,1),"s")
        return [list(x.prompt_token_ids)+list(x.outputs[0].token_ids) for x in o]
    doc=ids[:1500]
    h,=run([doc+ids[5000:5060]])
    for turn in range(3):
        h,=run([h+ids[6000+100*turn:6060+100*turn]])
    ref,=run([h],r=1.0)
    run([h],r=4.0)
    print("16 with one prefix")
    run([ids[10000:12048]+ids[20000+100*i:20064+100*i] for i in range(4)])
    print("n=4")
    p=SamplingParams
    o=llm.generate([{"prompt_token_ids": ids[30000:32100]}], p(n=4,temperature=1.0,max_tokens=30,ignore_eos=True,extra_args={"kv_compression_ratio":4.0}),use_tqdm=False)
    print(o[0].kv_transfer_params)
    print(llm.llm_engine.engine_core.call_utility("x") if 0 else "")
if __name__=="__main__": main()
