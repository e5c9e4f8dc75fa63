"""Text-to-SQL: a question about an SQLite database is answered by a query, and the reward is execution match.

- `sql_tool`: the read-only sandbox that an agent runs its drafts in;
- `metric`: execution match as Spider's official evaluation defines it (arXiv 1809.08887; test suites, 2010.02840);
- `databases`, `questions`, `demonstrations`: seeded data for training from nothing, or on anyone's own file;
- `spider`: the Spider data set in its official layout.
"""
