"""The vLLM side: spec, block manager, scheduler and plan, worker and tables, attention backend."""
