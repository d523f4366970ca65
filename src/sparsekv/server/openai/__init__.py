"""OpenAI's interface: what may be asked, what is answered."""
