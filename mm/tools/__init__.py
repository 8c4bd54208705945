"""Tools beside the model: passages found for a question, arithmetic, programs in a sandbox, and who decides on them.

documents -> chunks -> index -> hits -> the chat's documents -> an answer with its sources      (retrieval)
a written call, or a probe on the hidden state -> which tool -> what it says                    (routing)
"""
