"""The debate "is a CNN a kind of local self-attention?" (Zhihu 448924025) as experiments, one function a claim."""
