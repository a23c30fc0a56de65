import sys, torch, itertools
from mikv_vllm.evaluation.reference_model import ReferenceModel, divergence
from mikv_vllm.evaluation.windows import cut_windows
from mikv_vllm.evaluation.methods.mikv import MiKV
from mikv_vllm.evaluation.methods import mikv as M
from mikv_vllm.tiers import blocks as B
from mikv_vllm.tiers.formats import LADDER, LowFormat, LADDERS
from mikv_vllm.models import embedded_model
torch.set_num_threads(1)
model=ReferenceModel(str(embedded_model())) if True else None
wins=cut_windows(model.tokenizer, 2, 2048, 192)
pre=[(w,model.prefill(w.prompt)) for w in wins]
refs=[model.continue_with(p,w.inputs,None).log_probs for w,p in pre]
def run(r, bs=32):
    kl=[];ra=[]
    for (w,p),ref in zip(pre,refs):
        x=model.continue_with(p,w.inputs,MiKV(r,block_size=bs))
        kl.append(divergence(ref,x.log_probs)); ra.append(x.ratio)
    return sum(kl)/len(kl), sum(ra)/len(ra)
FINE=("K6655V5","K6554V5","K6544V5","K6544V4","K6443V4","K6433V4","K6433V3","K6432V3","K5432V3","K5332V3","K5322V3","K4322V3","K4322V2","K3222V2")
for T in (512,1024,2048):
    for name,lad in (("ladder",LADDER),("fine",tuple(map(LowFormat.parse,FINE)))):
        B.LEAST_BLOCK_TOKENS=T
        LADDERS["channel"]=lad
        for r in (3,4,5):
            p=B.BlockPlanner(B.TierGeometry(64,32),r,16,lad); f=p.form(0)
            kl,ra=run(r); print(T,name,r,"achieved %.2f"%ra,"KL %.5f"%kl,f.low_format.name,f.sizes.pages,f.sizes.high_tokens,flush=True)
