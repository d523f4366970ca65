"""Problems that are solved by a chain of thought: made by a rule and a seed, or read from a benchmark's file."""
