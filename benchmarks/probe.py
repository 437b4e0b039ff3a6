"""Where the time goes in one configuration."""
from __future__ import annotations
import sys, time, torch, mmflex
from mask_builders import *
from mmflex.runtime import steps, backends

def med(fn, n=5, k=6):
    fn(); fn(); torch.cuda.synchronize(); ts=[]
    for _ in range(n):
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        a.record()
        for _ in range(k): fn()
        b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b)/k)
    return sorted(ts)[n//2]

def probe(n, name, spec, backend, prof=False):
    torch.manual_seed(0)
    q=torch.randn(1,28,n,128,device="cuda",dtype=torch.bfloat16); k,v=(torch.randn(1,4,n,128,device="cuda",dtype=torch.bfloat16) for _ in range(2))
    t=time.time(); out=mmflex.attention(q,k,v,spec,backend=backend); torch.cuda.synchronize(); first=time.time()-t
    base=torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
    total=med(lambda: mmflex.attention(q,k,v,spec,backend=backend)); peak=(torch.cuda.max_memory_allocated()-base)/2**30
    plan=med(lambda: mmflex.plan(q,k,spec,backend=backend))
    p=mmflex.plan(q,k,spec,backend=backend); att=med(lambda: p._attend(q,k,v,False))
    rows=[]
    for i,l in enumerate(p.program.launches):
        if l.kind=="dense": continue
        r=p.state.ready[i]; Q,K,V=steps.queries(p.state,i,q),steps.keys(p.state,i,k),steps.keys(p.state,i,v)
        tk=med(lambda: backends.attend(p._backend,Q,K,V,r.mask_mod,r.lists,128,p.scale,False))
        part,full=int(r.lists[0].sum()),int(r.lists[2].sum()); fl=(part+full)*128*128*128*4
        rows.append(f"{l.label}: kernel {tk:.2f} full {full} part {part} W {l.width} {fl/tk/1e9:.0f} TF/s; keys {med(lambda: (steps.keys(p.state,i,k),steps.keys(p.state,i,v))):.2f}")
    hs=[]
    for _ in range(5):
        torch.cuda.synchronize(); t=time.time(); mmflex.plan(q,k,spec,backend=backend); hs.append((time.time()-t)*1e3)
    host=sorted(hs)[2]
    print(f"## {n} {name} {backend}: first {first:.1f}s total {total:.2f} plan {plan:.2f} (host {host:.2f}) attend {att:.2f} peak+ {peak:.2f} GiB | "+" | ".join(rows),flush=True)
    for s,fn in {"estimate":lambda: [steps.estimate(p.state,key,q,k,p.scale) for op,key in p.program.steps("plan") if op=="estimate"],
              "select":lambda: [steps.select(p.state,key) for op,key in p.program.steps("plan") if op=="select"],
              "gather":lambda: [steps.gather_and_list(p.state,key) for op,key in p.program.steps("plan") if op=="gather"]}.items():
        print(f"   {s} {med(fn):.2f}",flush=True)
    if prof:
        from torch.profiler import profile, ProfilerActivity
        with profile(activities=[ProfilerActivity.CUDA,ProfilerActivity.CPU]) as pr:
            mmflex.attention(q,k,v,spec,backend=backend); torch.cuda.synchronize()
        print(pr.key_averages().table(sort_by="cuda_time_total",row_limit=25,max_name_column_width=60),flush=True)

if __name__=="__main__":
    for b in sys.argv[2].split(","):
        for n in map(int,sys.argv[1].split(",")):
            for name,s in {"vs":VerticalSlash(1000,2048),"grid":Grid(256,rows=True)}.items():
                try: probe(n,name,s,b,prof=len(sys.argv)>3)
                except Exception as e:
                    import traceback; traceback.print_exc(); 
