"""Other people's engines, with our cache inside. Each is imported only by whoever has that engine."""
