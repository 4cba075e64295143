"""Generation engines behind one interface (base.py): torch, vLLM, SGLang."""
