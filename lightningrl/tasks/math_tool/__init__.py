"""Math word problems with a calculator: the agent calculates step by step, and the reward is numeric exact match.

- `calculator`: the tool, with a grammar of its own;
- `metric`: whether an answer is the right number;
- `chains`, `stories`, `problems`, `demonstrations`: seeded data for training from nothing;
- `data`: GSM8K (arXiv 2110.14168), SVAMP (2103.07191) and MAWPS with checked calculator chains, from a folder.
"""
