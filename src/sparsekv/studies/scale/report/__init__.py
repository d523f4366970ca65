"""What the draws of a study say: scores, tables, fronts, margins, and the page of them."""
