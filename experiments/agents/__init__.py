"""Agents as their authors would write them, each in its own framework and against any OpenAI endpoint.

They import nothing of lightningrl.
"""
