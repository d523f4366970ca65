"""Tables of pages from results files, each a command of its own."""
