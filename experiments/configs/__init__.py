"""The three experiments at the size of the paper: a model from a local folder, real data, accelerators.

The paper (arXiv 2508.03680) names the model, Llama-3.2-3B-Instruct, the agents and the rewards, and no other setting. Batch, lengths,
learning rate, clipping and the missing KL term are those of the original repository's examples, which have Qwen2.5 models of 1.5B;
`--policy` takes either. Weight decay, evaluation, limits of time and memory, and how long the last two train are ours. Memory and
time: docs/scaling.md.
"""
