"""Multi-hop question answering with retrieval: the agent searches, reads, searches again and answers.

- `retrieval`: BM25 and dense retrieval over a corpus of passages, behind one interface;
- `metric`: exact match and F1 as SQuAD defines them, and the reward 0.9 · F1 + 0.1 · format (arXiv 2508.03680);
- `worlds`, `questions`, `demonstrations`: seeded fictional worlds for training from nothing;
- `data`: MuSiQue, 2WikiMultihopQA and HotpotQA as corpora and questions.
"""
