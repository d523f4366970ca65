"""What a retrofit is trained on: documents, rows of them, and facts to keep."""
