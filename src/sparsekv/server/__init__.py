"""An OpenAI-compatible server on our engine: any policy, exact samples of one prefill, votes, and what is forgotten.

A request: routes (FastAPI) -> requests (what may be asked) -> service (who may come in) -> LLM.stream -> replies.
"""
