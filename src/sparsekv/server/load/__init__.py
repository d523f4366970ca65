"""The server under load: clients, and what they measure."""
