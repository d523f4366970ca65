"""Ablations: one short retrofit for each choice of the recipe, measured alike, and the page that shows them."""
